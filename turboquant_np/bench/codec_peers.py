"""Other libraries that encode vectors.

A peer's `calls` takes float32 vectors [n, d] on the device and a bit width and returns
``{"encode": call}``, with ``"decode"`` where the library decodes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from .attention_peers import on_current_stream
from .codec import Case, vectors
from .options import usable_cores
from .peers import Peer, compare, peer_tasks
from .timing import Call
from .workbench import Row, Task, Workbench

__all__ = ["CODEC_PEERS", "tasks"]

VALUES_AT_ONCE = 2**21  # slow peers need seconds for more

Calls = dict[str, Call]


def _faiss_codes(x: Any, kind: str, rotated: bool) -> Calls:
    """A scalar quantiser of faiss, behind its random rotation or without it; it stores no norm."""
    import faiss

    number = getattr(faiss.ScalarQuantizer, kind, None)
    if number is None:
        raise ValueError(f"faiss has no {kind}")
    quantizer = faiss.ScalarQuantizer(x.shape[1], number)
    quantizer.train(x)
    if not rotated:
        codes = quantizer.compute_codes(x)
        return {
            "encode": lambda: quantizer.compute_codes(x),
            "decode": lambda: quantizer.decode(codes),
        }
    rotation = faiss.RandomRotationMatrix(x.shape[1], x.shape[1])
    rotation.init(1)
    codes = quantizer.compute_codes(rotation.apply(x))
    return {
        "encode": lambda: quantizer.compute_codes(rotation.apply(x)),
        "decode": lambda: rotation.reverse_transform(quantizer.decode(codes)),
    }


def faiss_rotated(x: Any, bits: int) -> Calls:
    """Its TurboQuant codes."""
    return _faiss_codes(x, f"QT_{bits}bit_tqmse", rotated=True)


def faiss_plain(x: Any, bits: int) -> Calls:
    """The same codes without any rotation: what is left is rounding and packing."""
    return _faiss_codes(x, f"QT_{bits}bit_tqmse", rotated=False)


def faiss_uniform(x: Any, bits: int) -> Calls:
    """Its oldest codes, SQ4 and SQ8: a uniform grid for each coordinate, learnt from the data."""
    return _faiss_codes(x, f"QT_{bits}bit", rotated=False)


def faiss_rabitq(x: Any, bits: int) -> Calls:
    """RaBitQ behind its random rotation."""
    faiss: Any = import_module("faiss")  # its type stubs lag behind
    d = x.shape[1]
    rotation = faiss.RandomRotationMatrix(d, d)
    rotation.init(1)
    quantizer = faiss.RaBitQuantizer(d, faiss.METRIC_L2, bits)
    return {"encode": lambda: quantizer.compute_codes(rotation.apply(x))}


def turbovec_add(x: Any, bits: int) -> Calls:
    """Adding to its index; there is no decoder."""
    import turbovec

    if bits not in (2, 3, 4):
        raise ValueError(f"turbovec has no {bits}-bit codes")
    index = turbovec.TurboQuantIndex(x.shape[1], bits)
    return {"encode": lambda: index.add(x, chunk_size=0)}


def turbo_quant_lite(x: Any, bits: int) -> Calls:
    """Its batched encoder; codes are left unpacked."""
    import turbo_quant_lite as lite

    if bits > 4:
        raise ValueError(f"turbo-quant-lite has no {bits}-bit codes")
    quantizer = lite.TurboQuant(x.shape[1], bits)
    return {"encode": lambda: quantizer.encode_batch(x)}


def rabitqlib_build(x: Any, bits: int) -> Calls:
    """Building its index of one cluster, the quick way of encoding; there is no decoder."""
    rabitqlib = import_module("rabitqlib")
    rows, d = x.shape
    centroid, clusters = np.zeros((1, d), np.float32), np.zeros(rows, np.uint32)

    def build() -> None:
        index = rabitqlib.IvfIndex(d, rows, 1, bits, "l2")
        index.build(x, centroid, clusters, num_threads=threads, fast_quantization=True)

    threads = usable_cores()
    return {"encode": build}


def aither_kvcache(x: Any, bits: int) -> Calls:
    """The torch package whose names ours follow, with its Hadamard rotation."""
    import torch

    d = x.shape[1]
    if bits not in (2, 3, 4) or d & (d - 1):
        raise ValueError("aither-kvcache has 2, 3 and 4 bits, and powers of two as lengths")
    device = "cpu" if isinstance(x, np.ndarray) else "cuda"
    package = import_module("turboquant")
    tq = package.TurboQuant(head_dim=d, bits=bits, use_hadamard=True, device=device)
    tensor = torch.from_dlpack(x)
    packed, norms = tq.encode(tensor)
    calls: Calls = {"encode": lambda: tq.encode(tensor), "decode": lambda: tq.decode(packed, norms)}
    if device == "cuda":
        calls = {name: on_current_stream(call) for name, call in calls.items()}
    return calls


CPU, BOTH = ("cpu",), ("cpu", "cuda")
CODEC_PEERS = (
    Peer("faiss tqmse + rotation", "faiss-cpu", "faiss", CPU, faiss_rotated),
    Peer("faiss tqmse, no rotation", "faiss-cpu", "faiss", CPU, faiss_plain),
    Peer("faiss SQ, no rotation", "faiss-cpu", "faiss", CPU, faiss_uniform),
    Peer("faiss RaBitQ + rotation", "faiss-cpu", "faiss", CPU, faiss_rabitq),
    Peer("turbovec add", "turbovec", "turbovec", CPU, turbovec_add),
    Peer("turbo-quant-lite", "turbo-quant-lite", "turbo_quant_lite", CPU, turbo_quant_lite),
    Peer("rabitqlib", "rabitqlib", "rabitqlib", CPU, rabitqlib_build),
    Peer("aither-kvcache", "aither-kvcache", "turboquant", BOTH, aither_kvcache),
)


def comparisons(bench: Workbench, peer: Peer) -> Iterable[Task]:
    """Settings in which a peer is compared."""
    head_dims = (64, 128, 256, 768, 1536) if bench.options.full else (128, 768, 1536)
    settings = [(d, 4) for d in head_dims]
    if bench.options.full or peer.calls is faiss_rabitq:
        settings += [(128, 1), (128, 2)]
    for d, bits in settings:
        yield lambda d=d, bits=bits: encode_beside(bench, peer, d, bits)  # type: ignore[misc]


def encode_beside(bench: Workbench, peer: Peer, head_dim: int, bits: int) -> list[Row]:
    """Rows for encoding and decoding; none if the peer has no such bit width or length."""
    rows = max(1, min(VALUES_AT_ONCE, bench.num_bytes // 4) // head_dim)
    x = vectors(bench, head_dim, "float32", rows)
    try:
        theirs = peer.calls(x, bits)
    except ValueError:
        return []
    check = bench.device == "cpu"
    ours: dict[str, Calls] = {}
    for rounds in (3, 1):
        tq = Case(head_dim, bits, rounds).quantizer(bench.options.backend)
        packed, norms = tq.encode(x)
        restored = tq.decode(packed, norms, dtype="float32")
        ours[f"{rounds} round{'s' if rounds > 1 else ''}"] = {
            "encode": partial(tq.encode, x, out=(packed, norms), check_finite=check),
            "decode": partial(tq.decode, packed, norms, out=restored),
        }
    settings = {"head_dim": head_dim, "bits": bits, "dtype": "float32"}
    found = []
    for operation, call in theirs.items():
        variants = {name: [calls[operation]] for name, calls in ours.items()}
        found += compare(bench, peer, "codec", operation, settings, rows, variants, [call])
    return found


def tasks(bench: Workbench) -> Iterable[Task]:
    """Comparisons with everything that is installed."""
    return peer_tasks(bench, "codec", CODEC_PEERS, comparisons)
