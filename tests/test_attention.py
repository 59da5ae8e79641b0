"""TQPagedAttention against loops written from the definition, and against its own laws."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from turboquant_np import TurboQuant
from turboquant_np.fused_attention import TQPagedAttention, merge_attention
from turboquant_np.testing import assert_bits_equal

Floats = npt.NDArray[Any]

BACKENDS = ("reference", "cpu")


class Problem:
    """A cache in shuffled pages, queries, and what the definition gives for them."""

    def __init__(
        self,
        seed: int,
        *,
        head_dim: int = 64,
        key_bits: int = 4,
        value_bits: int = 4,
        rotation: str = "hadamard",
        context_lens: tuple[int, ...] = (5, 40, 0),
        query_lens: tuple[int, ...] | int = 1,
        query_positions: tuple[int, ...] | None = None,
        num_kv_heads: int = 2,
        group: int = 4,
        block_size: int = 16,
        dtype: str = "float32",
        sinks: bool = False,
        key_offset: bool = False,
        **options: Any,
    ) -> None:
        rng = np.random.Generator(np.random.PCG64([17, seed]))
        self.context_lens = np.array(context_lens, np.int32)
        self.query_lens = query_lens
        lens = query_lens if isinstance(query_lens, tuple) else (query_lens,) * len(context_lens)
        self.lens = lens
        pages = [-(-n // block_size) for n in context_lens]
        num_blocks = sum(pages) + 3
        order = rng.permutation(num_blocks)
        self.block_tables = np.full((len(pages), max(pages, default=0) + 1), -7, np.int64)
        for s, count in enumerate(pages):
            start = sum(pages[:s])
            self.block_tables[s, :count] = order[start : start + count]
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        self.settings: list[dict[str, Any]] = [
            dict(head_dim=head_dim, bits=key_bits, rotation=rotation, scale="unbiased", seed=3),
            dict(head_dim=head_dim, bits=value_bits, rotation=rotation, scale="mse", seed=9),
        ]
        self.encoded: list[Any] = []
        self.decoded: list[Floats] = []
        for settings in self.settings:
            tq = TurboQuant(**settings, backend="reference")
            x = rng.standard_normal(shape, np.float32) * rng.uniform(0.5, 2, (*shape[:-1], 1))
            packed, norms = tq.encode(x.astype(np.float32))
            self.encoded += [packed, norms]
            self.decoded.append(tq.decode(packed, norms, dtype=np.float64))
        heads = num_kv_heads * group
        self.group = group
        query_shape: tuple[int, ...] = (len(lens), heads, head_dim)
        if isinstance(query_lens, tuple):
            query_shape = (sum(lens), heads, head_dim)
            options["query_start_loc"] = np.cumsum([0, *lens]).astype(np.int32)
        elif query_lens != 1:
            query_shape = (len(lens), query_lens, heads, head_dim)
        self.query = rng.standard_normal(query_shape, np.float32).astype(dtype)
        if query_positions is not None:
            options["query_positions"] = np.array(query_positions, np.int32)
        if sinks:
            options["sinks"] = rng.standard_normal(heads).astype(np.float32)
        if key_offset:
            offset_shape = (len(lens), num_kv_heads, head_dim)
            options["key_offset"] = rng.standard_normal(offset_shape, np.float32)
        self.options = options

    def run(self, backend: str, **changes: Any) -> Any:
        key, value = (TurboQuant(**settings, backend=backend) for settings in self.settings)
        attention = TQPagedAttention(key, self.query.shape[-2], value_quantizer=value)
        arguments = {
            "query": self.query,
            "k_packed": self.encoded[0],
            "k_norms": self.encoded[1],
            "v_packed": self.encoded[2],
            "v_norms": self.encoded[3],
            "block_tables": self.block_tables,
            "context_lens": self.context_lens,
            "return_lse": True,
            **self.options,
            **changes,
        }
        return attention(**arguments)

    def by_definition(self) -> tuple[Floats, Floats]:
        """One query head of one token at a time, one score at a time."""
        d = self.query.shape[-1]
        query = self.query.reshape(-1, *self.query.shape[-2:]).astype(np.float64)
        out, lse = np.zeros(query.shape), np.full(query.shape[:-1], -np.inf)
        block_size = self.encoded[0].shape[1]
        for s, t, position in self._tokens():
            for head in range(query.shape[1]):
                kv_head = head // self.group
                scores, values = [], []
                for j in range(int(self.context_lens[s])):
                    if j > position or j <= position - self.options.get("sliding_window", 10**9):
                        continue
                    at = self.block_tables[s, j // block_size], j % block_size, kv_head
                    key = self.decoded[0][at]
                    if "key_offset" in self.options:
                        key = key + self.options["key_offset"][s, kv_head]
                    score = self.options.get("scale", d**-0.5) * math.fsum(query[t, head] * key)
                    if cap := self.options.get("logits_soft_cap"):
                        score = cap * math.tanh(score / cap)
                    scores.append(score)
                    values.append(self.decoded[1][at])
                if "sinks" in self.options:
                    scores.append(float(self.options["sinks"][head]))
                    values.append(np.zeros(d))
                if scores:
                    lse[t, head] = math.log(math.fsum(math.exp(x) for x in scores))
                    weights = [math.exp(x - lse[t, head]) for x in scores]
                    out[t, head] = sum(w * v for w, v in zip(weights, values, strict=True))
        return out.reshape(self.query.shape), lse.reshape(self.query.shape[:-1])

    def _tokens(self) -> Iterator[tuple[int, int, int]]:
        """(sequence, number in the batch, position) of each query token."""
        t = 0
        for s, length in enumerate(self.lens):
            first = int(self.context_lens[s]) - length
            if "query_positions" in self.options:
                first = int(self.options["query_positions"][s])
            for i in range(length):
                yield s, t, first + i
                t += 1


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """||out - want|| <= tolerance ||want||, and log-sum-exps alike."""
    (out, lse), (want, want_lse) = actual, expected
    error = np.linalg.norm(out.astype(np.float64) - want)
    assert error <= tolerance * np.linalg.norm(want.astype(np.float64))
    assert_bits_equal(np.isneginf(lse), np.isneginf(want_lse))
    finite = np.isfinite(want_lse)
    assert np.abs(lse[finite] - want_lse[finite]).max(initial=0.0) <= 10 * tolerance


CASES = [
    dict(),
    dict(group=1, num_kv_heads=1),
    dict(group=9, num_kv_heads=1, head_dim=80, block_size=5),
    dict(key_bits=3, value_bits=2, head_dim=128, block_size=1),
    dict(key_bits=8, value_bits=1, head_dim=32, rotation="haar"),
    dict(key_bits=5, value_bits=6, head_dim=100, block_size=256),
    dict(query_lens=3, context_lens=(3, 20, 2)),
    dict(query_lens=(0, 4, 1, 7), context_lens=(3, 20, 1, 7)),
    dict(query_positions=(2, 90, 4)),
    dict(query_positions=(-3, 30), query_lens=5, context_lens=(9, 33), sliding_window=4),
    dict(sliding_window=1),
    dict(sliding_window=6, query_lens=4, context_lens=(30, 4)),
    dict(logits_soft_cap=1.5, scale=0.7),
    dict(sinks=True, context_lens=(7, 0)),
    dict(key_offset=True, query_lens=(1, 5), context_lens=(17, 33)),
    dict(
        sinks=True, key_offset=True, logits_soft_cap=3.0, sliding_window=9, scale=0.3,
        query_lens=(2, 6), context_lens=(40, 6), group=3, key_bits=7,
    ),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: ",".join(case) or "plain")
def test_equals_the_definition(backend: str, case: dict[str, Any]) -> None:
    problem = Problem(1, **case)
    assert_close(problem.run(backend), problem.by_definition(), 2e-6)


# (head_dim, key bits, value bits); each is compiled on its own, which takes a second
KERNELS = [
    (32, 8, 8), (33, 6, 3), (64, 4, 4), (80, 3, 5), (96, 5, 1), (128, 4, 4), (128, 3, 2),
    (128, 2, 8), (128, 1, 7), (256, 7, 6), (250, 4, 2),
]  # fmt: skip


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    num_seqs = draw(st.integers(1, 4))
    lens = draw(st.one_of(st.integers(1, 5), st.tuples(*[st.integers(0, 9)] * num_seqs)))
    contexts = st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 300]))
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["sliding_window"] = draw(st.integers(1, 50))
    if draw(st.booleans()):
        positions = [draw(st.integers(-5, 320)) for _ in range(num_seqs)]
        options["query_positions"] = tuple(positions)
    if draw(st.booleans()):
        options["logits_soft_cap"] = draw(st.sampled_from([0.5, 5.0, 30.0]))
    head_dim, key_bits, value_bits = draw(st.sampled_from(KERNELS))
    event(f"ragged={isinstance(lens, tuple)}")
    return Problem(
        draw(st.integers(0, 2**16)),
        head_dim=head_dim,
        key_bits=key_bits,
        value_bits=value_bits,
        rotation=draw(st.sampled_from(["hadamard", "haar"])),
        context_lens=tuple(draw(contexts) for _ in range(num_seqs)),
        query_lens=lens,
        num_kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 3, 4, 7, 8, 12])),
        block_size=draw(st.sampled_from([1, 3, 16, 64])),
        sinks=draw(st.booleans()),
        key_offset=draw(st.booleans()),
        **options,
    )


@given(problems())
def test_cpu_equals_reference(problem: Problem) -> None:
    assert_close(problem.run("cpu"), problem.run("reference"), 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_torch(backend: str) -> None:
    torch = pytest.importorskip("torch", reason="compares with torch's own attention")
    problem = Problem(2, context_lens=(50,), query_lens=6, group=4, num_kv_heads=2)
    keys, values = (
        torch.from_numpy(
            x[problem.block_tables[0, :4]].reshape(-1, 2, 64)[:50].transpose(1, 0, 2).copy()
        ).repeat_interleave(4, dim=0)
        for x in problem.decoded
    )
    mask = torch.ones(6, 50, dtype=torch.bool).tril(diagonal=44)
    query = torch.from_numpy(problem.query[0].astype(np.float64)).transpose(0, 1)
    want = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    out, _ = problem.run(backend)
    assert np.abs(out[0] - want.transpose(0, 1).numpy()).max() < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_output_has_the_dtype_of_the_query(backend: str, dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    problem = Problem(3, dtype=dtype)
    out, lse = problem.run(backend)
    assert (out.dtype.name, lse.dtype.name) == (dtype, "float32")
    tolerance = {"float16": 2e-3, "bfloat16": 1e-2}.get(dtype, 2e-6)
    assert_close((out, lse), problem.by_definition(), tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_context_gives_zeros(backend: str) -> None:
    problem = Problem(4, context_lens=(0, 9))
    out, lse = problem.run(backend)
    assert not out[0].any()
    assert np.isneginf(lse[0]).all()
    assert np.isfinite(lse[1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str) -> None:
    problem = Problem(4, context_lens=(4,))
    out, lse = problem.run(
        backend,
        query=problem.query[:0],
        context_lens=problem.context_lens[:0],
        block_tables=problem.block_tables[:0],
    )
    assert (out.shape, lse.shape) == ((0, 8, 64), (0, 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_moving_pages_changes_nothing(backend: str) -> None:
    problem = Problem(5, context_lens=(70, 33, 128))
    before = problem.run(backend)
    order = np.random.Generator(np.random.PCG64(8)).permutation(len(problem.encoded[0]))
    moved = [np.empty_like(x) for x in problem.encoded]
    for new, old in zip(moved, problem.encoded, strict=True):
        new[order] = old
    problem.encoded = moved
    inside = problem.block_tables >= 0
    problem.block_tables[inside] = order[problem.block_tables[inside]]
    for one, other in zip(problem.run(backend), before, strict=True):
        assert_bits_equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_order_changes_nothing(backend: str) -> None:
    """[head][token] behind the [token][head] shape, and pages in a larger buffer."""
    problem = Problem(6, context_lens=(50, 21))
    before = problem.run(backend)
    names = ("k_packed", "k_norms", "v_packed", "v_norms")
    strided = {}
    for name, x in zip(names, problem.encoded, strict=True):
        buffer = np.empty((2 * x.shape[0], x.shape[2], x.shape[1], *x.shape[3:]), x.dtype)
        view = buffer[::2].swapaxes(1, 2)
        view[...] = x
        strided[name] = view
    for one, other in zip(problem.run(backend, **strided), before, strict=True):
        assert_bits_equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_garbage_beyond_the_context_stays_out(backend: str) -> None:
    problem = Problem(7, context_lens=(20, 33))
    before = problem.run(backend)
    used = np.zeros(problem.encoded[0].shape[:2], bool)
    for s, n in enumerate(problem.context_lens):
        j = np.arange(n)
        used[problem.block_tables[s, j // 16], j % 16] = True
    for x in problem.encoded:
        x[~used] = 255 if x.dtype == np.uint8 else np.nan
    for one, other in zip(problem.run(backend, check=True), before, strict=True):
        assert_bits_equal(one, other)


@given(cut=st.integers(0, 60), seed=st.integers(0, 2**16))
def test_parts_of_a_context_merge(cut: int, seed: int) -> None:
    """Cut a context at any block and merge by log-sum-exp: the same within 1e-6."""
    block_size = 4
    problem = Problem(seed, context_lens=(60,), block_size=block_size, sinks=True)
    want, want_lse = problem.run("cpu")
    cut -= cut % block_size
    parts = [
        problem.run("cpu", context_lens=np.array([cut]), sinks=None),
        problem.run(
            "cpu",
            context_lens=np.array([60 - cut]),
            block_tables=problem.block_tables[:, cut // block_size :],
        ),
    ]
    out, lse = merge_attention([o for o, _ in parts], [x for _, x in parts])
    assert np.linalg.norm(out - want) < 1e-6 * np.linalg.norm(want)
    assert np.abs(lse - want_lse).max() < 1e-6


def test_merging_nothing_gives_nothing() -> None:
    nothing = np.zeros((2, 8), np.float32), np.full(2, -np.inf, np.float32)
    something = np.ones((2, 8), np.float32), np.zeros(2, np.float32)
    out, lse = merge_attention(*zip(nothing, nothing, strict=True))
    assert not out.any()
    assert np.isneginf(lse).all()
    out, lse = merge_attention(*zip(nothing, something, strict=True))
    assert (out == 1).all()
    assert (lse == 0).all()


def test_result_goes_into_out() -> None:
    problem = Problem(9)
    out = np.full_like(problem.query, np.nan)
    result, _ = problem.run("cpu", out=out)
    assert result is out
    assert_bits_equal(out, problem.run("cpu")[0])


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(block_size=8), ValueError, "block_size is 8, but k_packed has blocks of 16"),
    (dict(num_kv_heads=4), ValueError, "num_kv_heads is 4, but k_packed has 2"),
    (dict(context_lens=np.array([5, 65, 0])), ValueError, r"context_lens\[1\] is 65"),
    (dict(context_lens=np.array([5, -1, 0])), ValueError, r"context_lens\[1\] is -1"),
    (dict(context_lens=np.array([5.0, 1, 0])), TypeError, "context_lens must be int32 or int64"),
    (dict(context_lens=np.array([5, 40])), ValueError, r"block_tables must have shape \[2,"),
    (dict(context_lens=np.array([5, 64, 0])), ValueError, r"block_tables\[1, 3\] is -7"),
    (dict(block_tables=np.full((3, 4), 99)), ValueError, r"block_tables\[0, 0\] is 99"),
    (dict(query=np.zeros((3, 8, 32), np.float32)), ValueError, "query must have shape"),
    (dict(query=np.zeros((3, 7, 64), np.float32)), ValueError, "query must have shape"),
    (dict(query=np.zeros((3, 8, 64), np.int32)), TypeError, "query must be float16"),
    (dict(k_packed=np.zeros((7, 16, 2, 31), np.uint8)), ValueError, "axis of 32 bytes"),
    (dict(k_packed=np.zeros((7, 16, 2, 32), np.int8)), TypeError, "k_packed must be uint8"),
    (dict(v_packed=np.zeros((1, 16, 2, 32), np.uint8)), ValueError, "v_packed must have shape"),
    (dict(v_norms=np.zeros((1, 16, 2), np.float32)), ValueError, "v_norms must have shape"),
    (dict(scale=0.0), ValueError, "scale must be positive"),
    (dict(scale=math.nan), ValueError, "scale must be positive"),
    (dict(logits_soft_cap=-1.0), ValueError, "logits_soft_cap must be positive"),
    (dict(sliding_window=0), ValueError, "sliding_window must be a positive integer"),
    (dict(sliding_window=1.5), TypeError, "sliding_window must be a positive integer"),
    (dict(sinks=np.zeros(3, np.float32)), ValueError, "sinks must have shape"),
    (dict(key_offset=np.zeros((3, 2, 63), np.float32)), ValueError, "key_offset must have shape"),
    (dict(query_start_loc=np.array([0, 1, 2, 4])), ValueError, "query_start_loc must rise from 0"),
    (dict(query_start_loc=np.array([0, 2, 1, 3])), ValueError, "query_start_loc must rise from 0"),
    (dict(query_positions=np.array([0, 3])), ValueError, "query_positions must have shape"),
    (dict(query_start_loc=np.array([0, 3])), ValueError, "query_start_loc must have shape"),
    (dict(out=np.zeros((3, 8, 64), np.float16)), TypeError, "out must be float32"),
    (dict(out=np.zeros((3, 8, 63), np.float32)), ValueError, "out must have shape"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=lambda x: str(x)[:40])
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Problem(10).run("cpu", **change)


def test_what_was_right_is_looked_at_again_when_it_changes() -> None:
    problem = Problem(10)
    problem.run("cpu")
    problem.run("cpu")
    problem.block_tables[0, 0] = 99
    with pytest.raises(ValueError, match=r"block_tables\[0, 0\] is 99"):
        problem.run("cpu")
    problem.block_tables[0, 0] = 0
    problem.run("cpu")
    problem.context_lens[1] = 65
    with pytest.raises(ValueError, match=r"context_lens\[1\] is 65"):
        problem.run("cpu")


def test_heads_must_divide() -> None:
    problem = Problem(10)
    attention: Any = TQPagedAttention(TurboQuant(head_dim=64), 7)
    with pytest.raises(
        ValueError, match=r"num_query_heads \(7\) must be a multiple of num_kv_heads"
    ):
        attention(
            problem.query[:, :7], *problem.encoded, problem.block_tables, problem.context_lens
        )


@pytest.mark.parametrize(
    ("arguments", "error"),
    [((128, 8), TypeError), ((TurboQuant(), 0), ValueError), ((TurboQuant(), 2.0), TypeError)],
)
def test_wrong_constructor(arguments: tuple[Any, ...], error: type[Exception]) -> None:
    with pytest.raises(error):
        TQPagedAttention(*arguments)


def test_quantizers_must_agree() -> None:
    with pytest.raises(ValueError, match="keys have head_dim 64, values 128"):
        TQPagedAttention(TurboQuant(head_dim=64), 8, value_quantizer=TurboQuant())


@pytest.mark.parametrize("name", ["query", "k_norms", "v_norms", "sinks", "key_offset"])
def test_check_finds_not_finite(name: str) -> None:
    problem = Problem(11, sinks=True, key_offset=True, context_lens=(5, 40))
    clean: Any = {
        "query": problem.query,
        "k_norms": problem.encoded[1],
        "v_norms": problem.encoded[3],
        **problem.options,
    }[name]
    bad = clean.copy()
    bad[int(problem.block_tables[1, 2]) if "norms" in name else 0] = np.nan
    problem.run("cpu", check=True)
    with pytest.raises(ValueError, match=f"{name}.* contains NaN"):
        problem.run("cpu", check=True, **{name: bad})


@pytest.mark.parametrize("query_lens", [1, 40])
def test_threads_change_nothing(query_lens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(12, context_lens=(3000, 700), query_lens=query_lens)
    results = []
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("TURBOQUANT_NP_NUM_THREADS", threads)
        results.append(problem.run("cpu"))
    for out, lse in results[1:]:
        assert_bits_equal(out, results[0][0])
        assert_bits_equal(lse, results[0][1])


def test_a_sequence_alone_is_as_in_a_batch() -> None:
    problem = Problem(13, context_lens=(700, 90, 2000))
    together = problem.run("cpu")
    for s in range(3):
        alone = problem.run(
            "cpu",
            query=problem.query[s : s + 1],
            block_tables=problem.block_tables[s : s + 1],
            context_lens=problem.context_lens[s : s + 1],
        )
        for one, other in zip(alone, together, strict=True):
            assert np.abs(one[0] - other[s]).max() < 1e-6


@given(
    lens=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 5000)), min_size=1, max_size=6),
    group=st.sampled_from([1, 4, 7, 80]),
    window=st.sampled_from([0, 1, 100]),
    shift=st.sampled_from([0, -50, 7]),
)
def test_units_cover_what_rows_see(
    lens: list[tuple[int, int]], group: int, window: int, shift: int
) -> None:
    """Each visible (row, token) pair lies in exactly one unit of its sequence."""
    cut = importlib.import_module("turboquant_np.backends.cpu.attention_cut").cut
    kv_heads = 3
    starts = np.cumsum([0, *(length for length, _ in lens)])
    contexts = np.array([n for _, n in lens])
    work = cut(starts, contexts - np.diff(starts) + shift, contexts, group, kv_heads, window)
    seen = np.zeros(len(work.first), np.int64)
    places = 0
    for seq, row, rows, start, stop, place in work.units:
        assert starts[seq] * group <= row
        assert row + rows <= starts[seq + 1] * group
        assert 0 <= start < stop <= lens[seq][1]
        assert place == places
        places += kv_heads * rows
        inside = slice(row, row + rows)
        overlap = np.minimum(work.last[inside], stop) - np.maximum(work.first[inside], start)
        seen[inside] += np.maximum(overlap, 0)
    assert places == work.places
    seqs = np.repeat(np.arange(len(lens)), np.diff(starts) * group)
    visible = np.minimum(work.last, contexts[seqs]) - np.maximum(work.first, 0)
    assert_bits_equal(seen, np.maximum(visible, 0).astype(np.int64))
    merged = np.concatenate(
        [np.arange(row, row + rows) for _, _, rows, row in work.merges] or [np.zeros(0)]
    )
    assert_bits_equal(np.sort(merged).astype(np.int64), np.arange(len(work.first)))
