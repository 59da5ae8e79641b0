"""PagedKVCache: the state machine, and one test for each promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from turboquant_np import TurboQuant
from turboquant_np._arrays import widen
from turboquant_np._kv_attend_cuda import CudaAttention
from turboquant_np._pages import PagePool
from turboquant_np.kv_cache import OutOfPagesError, PagedKVCache
from turboquant_np.testing import assert_bits_equal
from turboquant_np.testing.stateful import PagedCacheMachine

TestPagedCache = PagedCacheMachine.TestCase
TestPagedCache.settings = settings(stateful_step_count=30, deadline=None)


def make_cache(**changes: Any) -> PagedKVCache:
    return PagedKVCache(
        **{**dict(num_layers=2, num_kv_heads=2, head_dim=32, num_blocks=40), **changes}
    )


def tokens(count: int, seed: int = 0, layers: int = 2) -> tuple[Any, Any]:
    rng = np.random.Generator(np.random.PCG64([23, seed]))
    keys, values = rng.standard_normal((2, layers, count, 2, 32), np.float32)
    return keys, values


def test_without_copy_on_write_the_machine_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PagePool, "is_shared", lambda self, page: False)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            PagedCacheMachine,
            settings=settings(
                max_examples=300,
                stateful_step_count=30,
                deadline=None,
                database=None,
                phases=[Phase.generate],
            ),
        )


BY_LAYER: dict[str, Any] = {"num_layers": 3, "key_bits": [4, 2, 4], "value_bits": (3, 3, 3)}


def test_layers_with_their_own_bits_are_as_caches_of_one_layer() -> None:
    """Appended, forked, truncated and gone on with, swapped: every layer by itself."""
    together = make_cache(**BY_LAYER)
    alone = [make_cache(num_layers=1, key_bits=b, value_bits=3) for b in (4, 2, 4)]
    keys, values = tokens(200, layers=3)
    query = np.random.Generator(np.random.PCG64(4)).standard_normal((9, 4, 32), np.float32)
    for cache, layers in (
        (together, slice(None)),
        *((c, slice(i, i + 1)) for i, c in enumerate(alone)),
    ):
        a = cache.allocate()
        cache.append(a, keys[layers, :150], values[layers, :150])
        b = cache.fork(a)
        cache.truncate(b, 60)  # in a packed page
        cache.append([a, b] * 20, keys[layers, 150:190], values[layers, 150:190])
        cache.swap_out(b)
        cache.swap_in(b)
        step = cache.begin_step([a, b], [7, 2])
        outs = []
        for i, layer in enumerate(range(3)[layers]):
            step.append(i, keys[layer, 190:199], values[layer, 190:199])
            outs.append(step.attend(i, query))
        if cache is together:
            expected = outs
        else:
            assert_bits_equal(outs[0], expected[layer])
            for sequence in (a, b):
                for got, want in zip(
                    cache.read(sequence, 0), together.read(sequence, layer), strict=True
                ):
                    assert_bits_equal(got, want)
    by_layer = [cache.stats()["used_bytes"] for cache in alone]
    assert together.stats()["layer_bytes"] == by_layer
    assert together.stats()["used_bytes"] == sum(by_layer)
    assert together.stats()["allocated_bytes"] == sum(c.stats()["allocated_bytes"] for c in alone)


def test_layers_with_equal_bits_are_packed_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(**BY_LAYER)
    calls: list[tuple[int, tuple[int, ...]]] = []
    encode = TurboQuant.encode

    def counting(self: TurboQuant, x: Any, **options: Any) -> Any:
        calls.append((self.bits, x.shape))
        return encode(self, x, **options)

    monkeypatch.setattr(TurboQuant, "encode", counting)
    keys, values = tokens(96, layers=3)
    sequence = cache.allocate()
    for i in range(96):  # token 96 sends the page behind the sink away
        assert not calls
        step = cache.begin_step([sequence], [1])
        for layer in range(3):
            step.append(layer, keys[layer, i : i + 1], values[layer, i : i + 1])
    pages = (1, 16, 2, 32)
    assert calls == [(4, (2, *pages)), (3, (2, *pages)), (2, (1, *pages)), (3, (1, *pages))]


def test_default_scales() -> None:
    cache = make_cache(num_layers=8, key_bits=range(1, 9), value_bits=np.arange(1, 9))
    pairs = zip(cache.key_quantizers, cache.value_quantizers, strict=True)
    for layer, quantizers in enumerate(pairs):
        few = layer < 2
        assert [q.bits for q in quantizers] == [layer + 1] * 2
        assert [q.config.scale for q in quantizers] == (
            ["mse", "unbiased"] if few else ["unbiased", "mse"]
        )
    with pytest.raises(ValueError, match=r"different quantisers: key_quantizers\[layer\]"):
        cache.key_quantizer  # noqa: B018
    assert make_cache(key_bits=[5, 5]).key_quantizer.bits == 5


def test_repr_names_the_bits() -> None:
    assert "key_bits=4, value_bits=2," in repr(make_cache(value_bits=2))
    by_layer = repr(make_cache(num_layers=3, key_bits=[4, 2, 4], value_bits=(3, 3, 3)))
    assert "key_bits=2-4 (3.3 on average), value_bits=3," in by_layer


def test_windows_stay_in_full_precision() -> None:
    cache = make_cache(sink_tokens=4, recent_tokens=64)
    sequence = cache.allocate()
    keys, values = tokens(200)
    cache.append(sequence, keys, values)
    read, _ = cache.read(sequence, 0)
    exact = np.abs(read - keys[0]).max(axis=(1, 2)) < 2e-3
    page = np.arange(200) // 16
    # page 0 is the sink; token 136 is the oldest of the last 64, so pages from 8 on are recent
    assert_bits_equal(exact, (page == 0) | (page >= 8))


def test_offset_is_the_mean_of_the_first_keys() -> None:
    """Keys far from the origin lose nothing: their mean is removed before they are packed."""
    keys, values = tokens(160)
    far = keys + np.float32(30)
    errors = {}
    for count in (0, 64):
        cache = make_cache(key_offset_tokens=count)
        sequence = cache.allocate()
        cache.append(sequence, far, values)
        errors[count] = np.square(cache.read(sequence, 0)[0] - far[0]).mean()
    assert errors[0] > 100 * errors[64]
    spread = np.square(far[0] - far[0, :64].mean(axis=0)).mean()
    assert errors[64] < 0.02 * spread


def test_one_token_at_a_time_equals_all_at_once() -> None:
    keys, values = tokens(150)
    exact = keys.astype(np.float16).astype(np.float32), values.astype(np.float16).astype(np.float32)
    slow, fast = make_cache(), make_cache()
    a, b = slow.allocate(), fast.allocate()
    for i in range(150):
        slow.append(a, *(x[:, i : i + 1] for x in exact))
    fast.append(b, *exact)
    # The offset is taken when the first page leaves, which is after 80 tokens in both cases.
    for layer in range(2):
        for one, other in zip(slow.read(a, layer), fast.read(b, layer), strict=True):
            assert_bits_equal(one, other)


def steps(cache: PagedKVCache, sequence: int, x: Any, size: int, **options: Any) -> None:
    keys, values = x
    for start in range(0, keys.shape[1], size):
        part = slice(start, start + size)
        step = cache.begin_step([sequence], [keys[:, part].shape[1]], **options)
        for layer in range(2):
            step.append(layer, keys[layer, part], values[layer, part])


def test_bits_do_not_depend_on_how_tokens_come() -> None:
    x = tokens(150)
    caches = [make_cache() for _ in range(4)]
    for cache in caches:
        assert cache.allocate() == 0
    steps(caches[0], 0, x, 1)
    steps(caches[1], 0, x, 150)
    steps(caches[2], 0, x, 37, pack_first=True)
    caches[3].append(0, *x)
    for layer in range(2):
        expected = caches[0].read(0, layer)
        for cache in caches[1:]:
            for got, want in zip(cache.read(0, layer), expected, strict=True):
                assert_bits_equal(got, want)


@pytest.mark.parametrize("pack_first", [False, True])
def test_tokens_of_a_long_step_attend_in_full_precision(pack_first: bool) -> None:
    cache = make_cache(num_layers=1)
    keys, values = (x[0, :200] for x in tokens(200))
    query = np.random.Generator(np.random.PCG64(4)).standard_normal((200, 4, 32), np.float32)
    step = cache.begin_step([cache.allocate()], [200], pack_first=pack_first)
    step.append(0, keys, values)
    out = step.attend(0, query)
    k, v = (x.astype(np.float16).astype(np.float64) for x in (keys, values))
    scores = np.einsum("ihd,jhd->hij", query, k.repeat(2, axis=1)) / np.sqrt(32)
    scores[:, np.triu(np.ones((200, 200), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    want = np.einsum(
        "hij,jhd->ihd", weights / weights.sum(axis=-1, keepdims=True), v.repeat(2, axis=1)
    )
    assert (np.abs(out - want).max() < 2e-6) == (not pack_first)


def test_a_fork_after_a_long_step_shares_what_was_packed() -> None:
    cache = make_cache()
    sequence = cache.allocate()
    steps(cache, sequence, tokens(200), 200)
    before = cache.stats()
    cache.fork(sequence)
    assert cache.stats()["used_bytes"] == before["used_bytes"]
    assert before["packed_pages"][0] > before["full_pages"][0]


def test_a_long_step_takes_full_pages_unless_it_packs_first() -> None:
    cache = make_cache(num_full_blocks=8)
    sequence = cache.allocate()
    with pytest.raises(OutOfPagesError, match="full-precision pages needed"):
        cache.begin_step([sequence], [200])
    assert cache.stats()["used_bytes"] == 0
    steps(cache, sequence, tokens(200), 200, pack_first=True)
    assert cache.length(sequence) == 200


@pytest.mark.parametrize("query_len", [1, 7])
def test_attention_equals_attention_on_what_is_read(query_len: int) -> None:
    cache = make_cache()
    keys, values = tokens(300)
    sequences = [cache.allocate() for _ in range(3)]
    lengths = (290, 20, 100)
    for sequence, length in zip(sequences, lengths, strict=True):
        cache.append(sequence, keys[:, :length], values[:, :length])
    rng = np.random.Generator(np.random.PCG64(4))
    count = query_len * 3
    query = rng.standard_normal((count, 8, 32), np.float32)
    sinks = rng.standard_normal(8).astype(np.float32)
    step = cache.begin_step(sequences, [query_len] * 3)
    for layer in range(2):
        step.append(layer, keys[layer, :count], values[layer, :count])
        options: dict[str, Any] = dict(
            scale=0.3, logits_soft_cap=4.0, sliding_window=90, sinks=sinks
        )
        out = step.attend(layer, query, **options)
        for s, sequence in enumerate(sequences):
            if layer == 0:
                continue  # the step is finished after the last layer, then `read` sees it
            k, v = (x.astype(np.float64) for x in cache.read(sequence, layer))
            for i in range(query_len):
                row, last = s * query_len + i, len(k) - query_len + i
                seen = slice(max(0, last - 89), last + 1)
                for head in range(8):
                    scores = 0.3 * (k[seen, head // 4] @ query[row, head].astype(np.float64))
                    scores = np.append(4 * np.tanh(scores / 4), sinks[head])
                    weights = np.exp(scores - scores.max())
                    want = weights[:-1] @ v[seen, head // 4] / weights.sum()
                    assert np.abs(out[row, head] - want).max() < 2e-6


def test_out_of_pages_changes_nothing() -> None:
    cache = make_cache(num_blocks=2, num_full_blocks=9, recent_tokens=16)
    a, b = cache.allocate(), cache.allocate()
    keys, values = tokens(400)
    cache.append(a, keys[:, :50], values[:, :50])
    before, stats = cache.read(a, 1), cache.stats()
    with pytest.raises(OutOfPagesError, match=r"packed pages needed, \d of 2 free"):
        cache.append([a] * 200 + [b] * 200, keys, values)
    assert cache.stats() == stats
    assert cache.length(b) == 0
    for one, other in zip(cache.read(a, 1), before, strict=True):
        assert_bits_equal(one, other)


def test_cancelled_step_changes_nothing() -> None:
    cache = make_cache()
    sequence = cache.allocate()
    keys, values = tokens(120)
    cache.append(sequence, keys[:, :100], values[:, :100])
    before, stats = cache.read(sequence, 1), cache.stats()
    step = cache.begin_step([sequence], [20])
    step.append(0, keys[0, 100:], values[0, 100:])
    step.cancel()
    assert cache.stats() == stats
    for one, other in zip(cache.read(sequence, 1), before, strict=True):
        assert_bits_equal(one, other)
    with pytest.raises(RuntimeError, match="was cancelled"):
        step.append(1, keys[1, 100:], values[1, 100:])


def test_stats_count_every_byte() -> None:
    cache = make_cache(key_bits=4, value_bits=2)
    assert cache.stats()["used_bytes"] == 0
    a = cache.allocate()
    keys, values = tokens(200)
    cache.append(a, keys, values)
    cache.fork(a)
    stats = cache.stats()
    # 13 pages: the sink, 7 packed ones, and tokens 128 to 199 in 5 full ones
    assert (stats["packed_pages"][0], stats["full_pages"][0]) == (7, 6)
    packed = 7 * 16 * 2 * 2 * (16 + 4 + 8 + 4)  # pages, tokens, layers, heads, bytes
    full = 6 * 16 * 2 * 2 * (2 * 32 * 2)
    assert stats["used_bytes"] == packed + full + 2 * 2 * 32 * 4
    assert (stats["tokens"], stats["stored_tokens"]) == (400, 200)
    assert stats["fp16_bytes"] == 200 * 2 * 2 * 2 * 32 * 2
    assert stats["fragmentation"] == pytest.approx(1 - 200 / 208)


def test_swapping_frees_pages() -> None:
    cache = make_cache()
    a = cache.allocate()
    keys, values = tokens(100)
    cache.append(a, keys, values)
    before = cache.read(a, 1)
    cache.swap_out(a)
    assert cache.stats()["used_bytes"] == 0
    assert cache.stats()["swapped_bytes"] > 0
    assert cache.length(a) == 100
    with pytest.raises(ValueError, match="swapped out"):
        cache.read(a, 0)
    cache.swap_in(a)
    for one, other in zip(cache.read(a, 1), before, strict=True):
        assert_bits_equal(one, other)
    with pytest.raises(ValueError, match="is not swapped out"):
        cache.swap_in(a)


WRONG_SIZES = [
    (dict(num_layers=0), ValueError, "num_layers must be at least 1"),
    (dict(num_blocks=-1), ValueError, "num_blocks must be at least 0"),
    (dict(block_size=2.0), TypeError, "block_size must be an integer"),
    (dict(recent_tokens=True), TypeError, "recent_tokens must be an integer"),
    (dict(device="tpu"), ValueError, "device must be 'cpu' or 'cuda'"),
    (dict(dtype="int8"), TypeError, "dtype must be one of"),
    (dict(key_bits=9), ValueError, "Supported bit-widths"),
    (dict(key_bits=[4]), ValueError, "key_bits must be one for all layers or .* of the 2, got 1"),
    (dict(value_bits=[4, 0]), ValueError, "Supported bit-widths"),
    (dict(key_bits=(4, 2.5)), TypeError, "bits must be an integer from 1 to 8, got 2.5"),
    (dict(key_bits="43"), TypeError, "bits must be an integer from 1 to 8, got '43'"),
    (dict(value_quantizer=TurboQuant(head_dim=64)), ValueError, "value_quantizer has head_dim 64"),
    (dict(key_quantizer=4), TypeError, "key_quantizer must be a TurboQuant or one for each layer"),
    (dict(key_quantizer=[TurboQuant()] * 3), ValueError, "of the 2, got 3"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG_SIZES, ids=lambda x: str(x)[:30])
def test_wrong_sizes(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_cache(**change)


def test_wrong_steps() -> None:
    cache = make_cache()
    a = cache.allocate()
    keys, values = tokens(10)
    with pytest.raises(ValueError, match="no sequence 77"):
        cache.append(77, keys, values)
    with pytest.raises(ValueError, match="named twice"):
        cache.begin_step([a, a], [1, 1])
    with pytest.raises(ValueError, match="2 sequences and 1 counts"):
        cache.begin_step([a, 5], [1])
    with pytest.raises(ValueError, match="must not be negative"):
        cache.begin_step([a], [-1])
    with pytest.raises(ValueError, match="keys must have shape"):
        cache.append(a, keys[..., :31], values)
    with pytest.raises(TypeError, match="values must be float16"):
        cache.append(a, keys, values.astype(np.int64))
    bad = keys.copy()
    bad[1, 3, 0, 5] = np.inf
    with pytest.raises(ValueError, match=r"keys\[3, 0, 5\] is inf"):
        cache.append(a, bad, values)
    bad[1, 3, 0, 5] = 1e6
    with pytest.raises(ValueError, match="which float16 cannot hold"):
        cache.append(a, bad, values)
    assert cache.length(a) == 0
    step = cache.begin_step([a], [10])
    with pytest.raises(RuntimeError, match="while a step is open"):
        cache.begin_step([a], [1])
    with pytest.raises(RuntimeError, match="cannot truncate"):
        cache.truncate(a, 0)
    with pytest.raises(RuntimeError, match="layer 0 has not been appended"):
        step.attend(0, np.zeros((10, 4, 32), np.float32))
    step.append(0, keys[0], values[0])
    with pytest.raises(RuntimeError, match="no layer 0 left"):
        step.append(0, keys[0], values[0])
    with pytest.raises(ValueError, match="query must have shape"):
        step.attend(0, np.zeros((9, 4, 32), np.float32))
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        step.attend(0, np.zeros((10, 3, 32), np.float32))
    step.append(1, keys[1], values[1])
    with pytest.raises(ValueError, match="has 10 tokens, cannot truncate it to 11"):
        cache.truncate(a, 11)
    cache.truncate(a, 5)
    with pytest.raises(RuntimeError, match="the cache has changed"):
        step.attend(0, np.zeros((10, 4, 32), np.float32))


def test_pages_that_go_on_in_full_precision_stay_finite() -> None:
    """Decoded numbers beyond the largest float16 would be infinite there."""
    cache = make_cache(num_layers=1, sink_tokens=0, recent_tokens=16, key_bits=2, value_bits=2)
    x = np.sign(tokens(40, layers=1)[0]) * np.float32(65504)
    a = cache.allocate()
    cache.append(a, x, x)
    assert max(read.max() for read in cache.read(a, 0)) > 65504
    cache.truncate(a, 10)
    cache.append(a, x[:, :1], x[:, :1])
    assert max(read.max() for read in cache.read(a, 0)) == 65504


def test_packing_that_failed_before_a_step_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, expected = make_cache(), make_cache()
    for each in (cache, expected):
        each.append(each.allocate(), *tokens(95))
    with monkeypatch.context() as patch:
        patch.setattr(cache.value_quantizer, "encode", out_of_memory)
        with pytest.raises(MemoryError):
            cache.begin_step([0], [1])
    assert cache.stats() == expected.stats()
    for each in (cache, expected):
        each.append(0, *tokens(30, seed=1))
    for got, want in zip(cache.read(0, 1), expected.read(0, 1), strict=True):
        assert_bits_equal(got, want)


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise MemoryError


def test_packing_that_failed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, expected = make_cache(), make_cache()
    for each in (cache, expected):
        steps(each, each.allocate(), tokens(200), 200)
    with monkeypatch.context() as patch:
        patch.setattr(cache.value_quantizer, "encode", out_of_memory)
        with pytest.raises(MemoryError):
            cache.fork(0)
    assert cache.stats() == expected.stats()
    for got, want in zip(cache.read(0, 1), expected.read(0, 1), strict=True):
        assert_bits_equal(got, want)


def test_tables_of_a_gpu_say_where_every_token_is() -> None:
    """What CudaAttention hands to the kernels, looked at in host memory."""
    cache = make_cache(num_layers=1, sink_tokens=20, recent_tokens=20)
    keys, values = tokens(150, layers=1)
    counts = [150, 5, 0, 33]
    sequences = [cache.allocate() for _ in counts]
    for sequence, count in zip(sequences, counts, strict=True):
        cache.append(sequence, keys[:, :count], values[:, :count])
    lens = [3, 0, 0, 2]
    states = [cache._sequences[s] for s in sequences]
    tables = CudaAttention(cache, states, lens)
    memory = cache._layers[0]
    for s, count in enumerate(counts):
        found = np.full((count, 2, 32), np.nan, np.float32)
        held = [
            (n, p)
            for n, p in zip(tables.full_pages[s], tables.full_positions[s], strict=True)
            if p >= 0
        ]
        for number, position in held:
            part = memory.k_full[number][: count - position]
            found[position : position + len(part)] = part
        first = tables.query_positions[s] - tables.packed_query_positions[s]
        for j in range(-(-tables.context_lens[s] // 16)):
            start = first + 16 * j
            page = memory.decode_page(tables.block_tables[s, j], tables.offset_slots[s])[0]
            found[start : start + 16] = page[: count - start]
        assert_bits_equal(found, cache.read(sequences[s], 0)[0])
    assert tables.query_start_loc.tolist() == [0, 3, 3, 3, 5]
    assert tables.query_positions.tolist() == [147, 5, 0, 31]


def test_float16_is_widened_exactly() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    assert_bits_equal(widen(finite), finite.astype(np.float32))
    assert_bits_equal(widen(finite[::-3]), finite[::-3].astype(np.float32))
