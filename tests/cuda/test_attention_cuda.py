"""Attention on CuPy arrays against the float64 reference, and what holds bit for bit."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from turboquant_np import TurboQuant
from turboquant_np.cuda import release_captured
from turboquant_np.fused_attention import TQPagedAttention, merge_attention

cupy: Any = pytest.importorskip("cupy")
captured: Any = importlib.import_module("turboquant_np.backends.cuda.attention_scratch").captured

BLOCK_SIZE = 16
LENS = [0, 1, 37, 300, 555]
GROUP, KV_HEADS = 4, 8


def quantizers(bits: tuple[int, int], d: int, backend: str = "auto") -> list[TurboQuant]:
    return [
        TurboQuant(head_dim=d, bits=b, seed=seed, backend=backend)
        for b, seed in zip(bits, (3, 4), strict=True)
    ]


def pages(bits: tuple[int, int], d: int, *, head_major: bool) -> tuple[list[Any], Any, Any]:
    """[k_packed, k_norms, v_packed, v_norms], block_tables, context_lens, on the host.

    Blocks are in random order; what lies behind a context is NaN.
    """
    rng = np.random.default_rng(7)
    width = -(-max(LENS) // BLOCK_SIZE)
    num_blocks = len(LENS) * width + 1
    order = rng.permutation(num_blocks)[: len(LENS) * width].reshape(len(LENS), width)
    cache = []
    for quantizer, scale in zip(quantizers(bits, d), (d**0.5, 3000.0), strict=True):
        shape = (
            (num_blocks, KV_HEADS, BLOCK_SIZE) if head_major else (num_blocks, BLOCK_SIZE, KV_HEADS)
        )
        packed = rng.integers(0, 256, (*shape, quantizer.packed_dim), np.uint8)
        norms = np.full(shape, np.nan, np.float32)
        if head_major:
            packed, norms = packed.swapaxes(1, 2), norms.swapaxes(1, 2)
        for s, n in enumerate(LENS):
            for j in range(-(-n // BLOCK_SIZE)):
                used = min(BLOCK_SIZE, n - j * BLOCK_SIZE)
                norms[order[s, j], :used] = scale * rng.uniform(0.5, 1.5, (used, KV_HEADS))
        cache += [packed, norms]
    return cache, order.astype(np.int32), np.array(LENS, np.int32)


def on_device(array: Any) -> Any:
    """A copy with the same memory order."""
    order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
    back = np.argsort(order)
    return cupy.asarray(np.ascontiguousarray(array.transpose(order))).transpose(*map(int, back))


def relative_error(got: Any, want: Any) -> float:
    want = want.astype(np.float64)
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))


def both(
    bits: tuple[int, int], d: int, query: Any, *, head_major: bool = True, **options: Any
) -> tuple[Any, Any]:
    """(out, lse) of the GPU and of the reference, on the host."""
    cache, tables, lens = pages(bits, d, head_major=head_major)
    results = []
    for backend, convert in (("cuda", on_device), ("reference", lambda x: x)):
        k, v = quantizers(bits, d, backend)
        attend = TQPagedAttention(k, GROUP * KV_HEADS, value_quantizer=v)
        converted = {
            name: convert(x) if isinstance(x, np.ndarray) else x for name, x in options.items()
        }
        arguments = [convert(x) for x in (query, *cache, tables, lens)]
        out, lse = attend(*arguments, **converted, return_lse=True)
        results.append((cupy.asnumpy(out), cupy.asnumpy(lse)))
    return results[0], results[1]


def random_query(d: int, *shape: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal((*shape, GROUP * KV_HEADS, d), np.float32)


@pytest.mark.parametrize(
    ("bits", "d", "head_major"),
    [
        ((2, 2), 128, True),
        ((3, 3), 128, False),
        ((4, 8), 128, True),
        ((5, 1), 80, True),
        ((4, 4), 256, False),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 50},
        {"logits_soft_cap": 20.0},
        {"query_positions": np.array([3, 0, 20, 299, 600])},
        {"sinks": np.linspace(-2, 2, GROUP * KV_HEADS, dtype=np.float32)},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_agrees_with_the_reference(
    bits: tuple[int, int], d: int, head_major: bool, options: dict[str, Any]
) -> None:
    query = random_query(d, len(LENS)).astype(np.float32)
    (out, lse), (want, want_lse) = both(bits, d, query, head_major=head_major, **options)
    assert relative_error(out, want) < 1e-3
    nothing = np.isneginf(want_lse)
    np.testing.assert_array_equal(np.isneginf(lse), nothing)
    np.testing.assert_allclose(lse[~nothing], want_lse[~nothing], atol=5e-3)
    assert not out[nothing].any()


def test_ragged_queries_and_offsets() -> None:
    starts = np.array([0, 0, 1, 4, 5, 9])
    offset = random_query(128, len(LENS), seed=2)[:, :KV_HEADS].copy()
    query = random_query(128, 9)
    got, want = both((4, 4), 128, query, query_start_loc=starts, key_offset=offset)
    assert relative_error(got[0], want[0]) < 1e-3


def device_arguments() -> tuple[Any, list[Any]]:
    cache, tables, lens = pages((4, 3), 128, head_major=True)
    k, v = quantizers((4, 3), 128)
    attend = TQPagedAttention(k, GROUP * KV_HEADS, value_quantizer=v)
    query = cupy.asarray(random_query(128, len(LENS)).astype(np.float16))
    return attend, [query, *map(on_device, (*cache, tables, lens))]


def test_the_order_of_pages_changes_nothing() -> None:
    attend, (query, *cache, tables, lens) = device_arguments()
    before = attend(query, *cache, tables, lens).get()
    order = np.random.default_rng(3).permutation(len(cache[0]))
    moved = [on_device(c.get()[order]) for c in cache]
    new_place = cupy.asarray(np.argsort(order).astype(np.int32))
    after = attend(query, *moved, new_place[tables], lens).get()
    assert before.tobytes() == after.tobytes()


def test_a_captured_graph_follows_the_lengths() -> None:
    attend, (query, *cache, tables, lens) = device_arguments()
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.get_current_stream().synchronize()
    with stream:
        attend(query, *cache, tables, lens)
        stream.begin_capture()
        out = attend(query, *cache, tables, lens)
        graph = stream.end_capture()
        for n in ([0, 1, 37, 300, 555], [0, 0, 5, 17, 301], [0, 0, 0, 0, 0]):
            lens[:] = cupy.asarray(n, np.int32)
            graph.launch(stream)
            got = out.get()
            assert got.tobytes() == attend(query, *cache, tables, lens).get().tobytes()


def test_a_split_context_merges_to_the_whole() -> None:
    attend, (query, *cache, tables, lens) = device_arguments()
    query = query.astype(np.float32)
    whole = attend(query, *cache, tables, lens)
    blocks = 11
    first = cupy.minimum(lens, blocks * BLOCK_SIZE)
    far = cupy.full(len(lens), 10**6, np.int32)  # these queries stand behind either half
    halves = [
        attend(query, *cache, t, n, query_positions=far, return_lse=True)
        for t, n in ((tables, first), (tables[:, blocks:], lens - first))
    ]
    merged, _ = merge_attention(*zip(*halves, strict=True))
    assert relative_error(merged.get(), whole.get()) < 5e-4


def test_large_and_small_values_do_not_leave_float16() -> None:
    cache, tables, lens = pages((4, 4), 128, head_major=True)
    k, v = quantizers((4, 4), 128)
    attend: Any = TQPagedAttention(k, GROUP * KV_HEADS, value_quantizer=v)
    query = cupy.asarray(random_query(128, len(LENS)))
    results = []
    for scale in (2.0**-60, 1.0, 2.0**60):
        scaled = [*cache[:3], cache[3] * np.float32(scale)]
        results.append(attend(query, *map(on_device, (*scaled, tables, lens))).get() / scale)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[2], results[1])


def test_memory_of_captured_steps_is_given_back() -> None:
    cache, tables, lens = pages((4, 4), 128, head_major=True)
    attend = TQPagedAttention(quantizers((4, 4), 128, "cuda")[0], GROUP * KV_HEADS)
    rng = np.random.default_rng(12)
    query = cupy.asarray(rng.standard_normal((len(LENS), GROUP * KV_HEADS, 128), np.float32))
    arguments = [query, *map(on_device, (*cache, tables, lens))]
    out = cupy.empty_like(query)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        want = attend(*arguments, out=out).get()
        for _ in range(2):  # the second graph is captured behind the release of the first
            stream.begin_capture()
            attend(*arguments, out=out)
            graph = stream.end_capture()
            out[...] = np.nan
            graph.launch(stream)
            assert out.get().tobytes() == want.tobytes()
            assert captured
            del graph
            release_captured()
            assert not captured
