"""PagedKVCache(compute="int8"): what it changes, what it leaves alone, where it is refused."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from turboquant_np import PagedKVCache, TurboQuant, _backend
from turboquant_np.testing import assert_bits_equal

Floats = npt.NDArray[Any]

backend: Any = _backend.load("cpu")
attention_int8 = importlib.import_module("turboquant_np.backends.cpu.attention_int8")
needs_int8 = pytest.mark.skipif(
    not attention_int8.has_byte_products(), reason="needs AVX-512 VNNI and VBMI"
)

LAYERS, KV_HEADS, GROUP, DIM = 2, 2, 3, 64
COUNTS = [300, 90, 20]  # of the last one no page is packed


def make_cache(**changes: Any) -> PagedKVCache:
    sizes = dict(num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=DIM, num_blocks=40)
    windows = dict(sink_tokens=4, recent_tokens=16)
    return PagedKVCache(**{**sizes, **windows, **changes})


def tokens(count: int, seed: int = 0) -> tuple[Floats, Floats]:
    """[layers, count, kv_heads, head_dim]; keys far from the origin, so that offsets count."""
    rng = np.random.Generator(np.random.PCG64([41, seed]))
    keys, values = rng.standard_normal((2, LAYERS, count, KV_HEADS, DIM), np.float32)
    return keys + np.float32(0.5), values


def fill(cache: PagedKVCache) -> list[int]:
    sequences = [cache.allocate() for _ in COUNTS]
    for seed, (sequence, count) in enumerate(zip(sequences, COUNTS, strict=True)):
        cache.append(sequence, *tokens(count, seed))
    return sequences


def attend(cache: PagedKVCache, sequences: list[int], **options: Any) -> Floats:
    """[layers, new tokens, heads, head_dim]: several tokens for each sequence."""
    counts = [3, 1, 2][: len(sequences)]
    keys, values = tokens(sum(counts), 7)
    shape = (LAYERS, sum(counts), KV_HEADS * GROUP, DIM)
    query = np.random.Generator(np.random.PCG64(42)).standard_normal(shape, np.float32)
    step = cache.begin_step(sequences, counts)
    outs = []
    for layer in range(LAYERS):
        step.append(layer, keys[layer], values[layer])
        outs.append(step.attend(layer, query[layer], **options))
    return np.stack(outs)


def relative(difference: Floats, of: Floats) -> float:
    return float(np.linalg.norm(difference) / np.linalg.norm(of))


OPTIONS: list[dict[str, Any]] = [
    {},
    dict(logits_soft_cap=3.0, scale=0.2),
    dict(sliding_window=100),
    dict(sinks=np.linspace(-1, 2, KV_HEADS * GROUP, dtype=np.float32)),
]


@needs_int8
@pytest.mark.parametrize("bits", [(4, 4), ([4, 2], [1, 3])], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: ",".join(x) or "plain")
def test_differs_a_little_where_pages_are_packed(bits: Any, options: dict[str, Any]) -> None:
    outs = {}
    for compute in ("float32", "int8"):
        cache = make_cache(key_bits=bits[0], value_bits=bits[1], compute=compute)
        outs[compute] = attend(cache, fill(cache), **options)
    full = slice(4, 6)  # tokens of the sequence without packed pages
    assert_bits_equal(outs["int8"][:, full], outs["float32"][:, full])
    for layer in range(LAYERS):
        for sequence in (slice(0, 3), slice(3, 4)):
            want = outs["float32"][layer, sequence]
            difference = outs["int8"][layer, sequence] - want
            assert 1e-3 < relative(difference, want) < 0.02


def on_what_is_read(cache: PagedKVCache, sequence: int, layer: int, query: Floats) -> Floats:
    """Attention of the last tokens in float64 on the decoded keys and values."""
    keys, values = (x.astype(np.float64) for x in cache.read(sequence, layer))
    q = query.astype(np.float64).reshape(len(query), KV_HEADS, GROUP, DIM)
    scores = np.einsum("tkgd,nkd->tkgn", q, keys) / DIM**0.5
    first = len(keys) - len(query)
    for t in range(len(query)):
        scores[t, ..., first + t + 1 :] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out: Floats = np.einsum("tkgn,nkd->tkgd", weights, values)
    return out.reshape(query.shape)


@needs_int8
@pytest.mark.parametrize(("compute", "most"), [("float32", 2e-6), ("int8", 0.02)])
def test_error_against_float64(compute: Any, most: float) -> None:
    """Against attention on the very numbers that the cache holds."""
    cache = make_cache(num_layers=1, compute=compute, dtype="float32")
    sequence = cache.allocate()
    keys, values = (x[:1] for x in tokens(399))
    cache.append(sequence, keys[:, :395], values[:, :395])
    query = np.random.Generator(np.random.PCG64(43)).standard_normal((4, KV_HEADS * GROUP, DIM))
    step = cache.begin_step([sequence], [4])
    step.append(0, keys[0, 395:], values[0, 395:])
    out = step.attend(0, query.astype(np.float32))
    want = on_what_is_read(cache, sequence, 0, query.astype(np.float32))
    assert cache.stats()["packed_pages"][0] == 22  # no page left the window in the step
    assert relative(out - want, want) <= most


def test_the_default_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, and without a look at what the processor can do."""

    def unexpected(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(backend, "attention_int8", unexpected)
    monkeypatch.setattr(backend, "why_no_int8", unexpected)
    caches = make_cache(), make_cache(compute="float32")
    default, chosen = (attend(cache, fill(cache)) for cache in caches)
    assert_bits_equal(default, chosen)
    assert [cache.compute for cache in caches] == ["float32"] * 2
    assert repr(caches[0]).endswith("device=cpu, compute=float32)")
    monkeypatch.undo()
    packed: list[Any] = []
    attention = backend.attention
    monkeypatch.setattr(backend, "attention", lambda *a: packed.append(attention(*a)))
    assert_bits_equal(attend(cache := make_cache(), fill(cache)), default)
    assert len(packed) == LAYERS


@needs_int8
def test_a_file_does_not_say(tmp_path: Path) -> None:
    cache = make_cache(compute="int8")
    sequences = fill(cache)
    cache.save(tmp_path / "cache.npz")
    with np.load(tmp_path / "cache.npz") as file:
        assert "compute" not in json.loads(bytes(file["metadata"][0]))["settings"]
    outs = {}
    for compute in ("float32", "int8"):
        loaded = PagedKVCache.load(tmp_path / "cache.npz", compute=compute)
        assert loaded.compute == compute
        outs[compute] = attend(loaded, sequences)
    assert PagedKVCache.load(tmp_path / "cache.npz").compute == "float32"
    assert_bits_equal(outs["int8"], attend(cache, sequences))
    assert not np.array_equal(outs["int8"], outs["float32"])


# -- where it cannot be had ------------------------------------------------------------------------

REFUSED = [
    (dict(compute="int4"), "compute must be one of float32, int8, got 'int4'"),
    (dict(device="cuda"), "is for device='cpu', got device='cuda'; use compute='float32'"),
    (
        dict(key_quantizer=TurboQuant(head_dim=DIM, backend="reference")),
        "backend 'reference' has no compute='int8'; use compute='float32'",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda x: str(x)[:20])
def test_refused_at_once(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_cache(**{"compute": "int8", **change})


@needs_int8
@pytest.mark.parametrize("bits", [dict(key_bits=[4, 5]), dict(value_bits=8)], ids=str)
def test_many_bits_are_refused_at_once(bits: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 to 4 bits.*use compute='float32'"):
        make_cache(compute="int8", **bits)
    make_cache(**bits).save(tmp_path / "cache.npz")
    with pytest.raises(ValueError, match=r"1 to 4 bits.*use compute='float32'"):
        PagedKVCache.load(tmp_path / "cache.npz", compute="int8")


def test_other_processors_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_int8, "has_byte_products", lambda: False)
    with pytest.raises(ValueError, match=r"needs a processor .* use compute='float32'"):
        make_cache(compute="int8")
