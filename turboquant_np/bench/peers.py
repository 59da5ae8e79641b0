"""Other libraries on the same data, in turns with ours.

Each adapter takes float32 vectors [n, d] and a bit width and returns a call that encodes them.  It
raises ImportError if the library is not installed, ValueError if it has no such bit width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from .. import TurboQuant
from .codec import CodecBench
from .timing import Call, alternate

__all__ = ["PEERS", "PeerResult", "compare", "installed_peers"]

VALUES_AT_ONCE = 2**22  # slow peers need seconds for more


def faiss_rotated(x: Any, bits: int) -> Call:
    """Its TurboQuant codes behind its random rotation; no norm is computed or stored."""
    import faiss

    rotation = faiss.RandomRotationMatrix(x.shape[1], x.shape[1])
    rotation.init(1)
    quantizer = _faiss_quantizer(x, bits)
    return lambda: quantizer.compute_codes(rotation.apply(x))


def faiss_plain(x: Any, bits: int) -> Call:
    """The same codes without any rotation: what is left is rounding and packing."""
    quantizer = _faiss_quantizer(x, bits)
    return lambda: quantizer.compute_codes(x)


def _faiss_quantizer(x: Any, bits: int) -> Any:
    import faiss

    kind = getattr(faiss.ScalarQuantizer, f"QT_{bits}bit_tqmse", None)
    if kind is None:
        raise ValueError(f"faiss has no {bits}-bit TurboQuant codes")
    quantizer = faiss.ScalarQuantizer(x.shape[1], kind)
    quantizer.train(x)
    return quantizer


def turbovec_add(x: Any, bits: int) -> Call:
    """Adding to its index; there is no decoder."""
    import turbovec

    if bits not in (2, 3, 4):
        raise ValueError(f"turbovec has no {bits}-bit codes")
    index = turbovec.TurboQuantIndex(x.shape[1], bits)
    return lambda: index.add(x, chunk_size=0)


def turbo_quant_lite(x: Any, bits: int) -> Call:
    """Its batched encoder; codes are left unpacked."""
    import turbo_quant_lite as lite

    if bits > 4:
        raise ValueError(f"turbo-quant-lite has no {bits}-bit codes")
    quantizer = lite.TurboQuant(x.shape[1], bits)
    return lambda: quantizer.encode_batch(x)


@dataclass(frozen=True)
class Peer:
    name: str
    distribution: str
    encoder: Callable[[Any, int], Call]

    @property
    def version(self) -> str:
        return version(self.distribution)


PEERS = (
    Peer("faiss tqmse + rotation", "faiss-cpu", faiss_rotated),
    Peer("faiss tqmse, no rotation", "faiss-cpu", faiss_plain),
    Peer("turbovec add", "turbovec", turbovec_add),
    Peer("turbo-quant-lite", "turbo-quant-lite", turbo_quant_lite),
)


@dataclass(frozen=True)
class PeerResult:
    """Encoding speed of a peer and ours in the same turns; times faster for 3 rounds and for 1."""

    peer: str
    version: str
    head_dim: int
    bits: int
    threads: int
    vectors: int
    peer_mvec_s: float
    ours_3_rounds_mvec_s: float
    ours_1_round_mvec_s: float

    @property
    def ratio_3_rounds(self) -> float:
        return self.ours_3_rounds_mvec_s / self.peer_mvec_s

    @property
    def ratio_1_round(self) -> float:
        return self.ours_1_round_mvec_s / self.peer_mvec_s


def installed_peers() -> list[Peer]:
    """Those whose library can be imported."""
    import numpy as np

    found = []
    for peer in PEERS:
        try:
            peer.encoder(np.ones((64, 64), np.float32), 4)
        except ImportError:
            continue
        found.append(peer)
    return found


def compare(peer: Peer, head_dim: int, bits: int, bench: CodecBench) -> PeerResult | None:
    """Encode the same vectors with the peer and with ours; None if it has no such bit width."""
    rows = max(1, min(VALUES_AT_ONCE * 4, bench.num_bytes) // (4 * head_dim))
    x = bench.vectors(head_dim, "float32", rows)
    try:
        theirs = peer.encoder(x, bits)
    except ValueError:
        return None

    def ours(rounds: int) -> Call:
        tq = TurboQuant(head_dim=head_dim, bits=bits, hadamard_rounds=rounds, backend=bench.backend)
        out = tq.encode(x)
        return lambda: tq.encode(x, out=out)

    seconds = alternate({"theirs": theirs, "three": ours(3), "one": ours(1)})
    mvec_s = {name: rows / time / 1e6 for name, time in seconds.items()}
    return PeerResult(
        peer=peer.name,
        version=peer.version,
        head_dim=head_dim,
        bits=bits,
        threads=bench.threads,
        vectors=rows,
        peer_mvec_s=mvec_s["theirs"],
        ours_3_rounds_mvec_s=mvec_s["three"],
        ours_1_round_mvec_s=mvec_s["one"],
    )
