"""Speed of attention on packed, paged keys and values: a decoding step, several tokens, prefill."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from .. import TQPagedAttention, TurboQuant
from .._arrays import float_dtype
from .timing import Call
from .workbench import Row, Task, Work, Workbench

__all__ = ["AttentionCase", "Problem", "attention_cases", "measure", "tasks"]

MOST_SETS = 64
GRAPH_STEPS = 4  # at least, of a CUDA graph
RANDOM_BLOCK = 2**24  # bytes of random codes; more are the same ones again


@dataclass(frozen=True)
class AttentionCase:
    """One shape of a call.

    Attributes
    ----------
    context : int
        Tokens of each sequence in the cache, the query tokens included.
    group : int
        Query heads for each kv head.
    query_len : int
        Query tokens of each sequence, the last ones of its context.
    order : {"token", "head"}
        Whether a page is stored [token][head], as `PagedKVCache` does, or [head][token].
    """

    key_bits: int = 4
    value_bits: int = 4
    batch: int = 1
    context: int = 8192
    head_dim: int = 128
    kv_heads: int = 8
    group: int = 4
    query_len: int = 1
    block_size: int = 16
    dtype: str = "float32"
    order: str = "token"

    @property
    def blocks_per_sequence(self) -> int:
        return -(-self.context // self.block_size)

    @property
    def operation(self) -> str:
        """What tables call it."""
        if self.query_len == 1:
            return "step"
        return "prefill" if self.query_len == self.context else "several tokens"

    @property
    def visible(self) -> int:
        """Pairs of query token and cached token that it sees, of one sequence and head."""
        first = self.context - self.query_len + 1
        return self.query_len * (first + self.context) // 2


def with_bits(case: AttentionCase, bits: int) -> AttentionCase:
    return replace(case, key_bits=bits, value_bits=bits)


CUDA_PREFILL = AttentionCase(dtype="float16", order="head", query_len=8192)


def attention_cases(full: bool, device: str) -> list[AttentionCase]:
    """What is measured."""
    if device == "cuda":
        return _cuda_cases(full)
    base = AttentionCase()
    cases = [with_bits(base, bits) for bits in (4, 3, 2, 8)]
    cases += [replace(base, context=context) for context in (1024, 32768)]
    cases += [replace(base, batch=batch, context=1024) for batch in (4, 16)]
    cases += [replace(base, context=1024, query_len=1024)]
    if full:
        cases += [with_bits(base, bits) for bits in (1, 5, 6, 7)]
        cases += [replace(base, value_bits=2), replace(base, group=1), replace(base, group=8)]
        cases += [replace(base, head_dim=d) for d in (64, 96, 256)]
        cases += [replace(base, block_size=32), replace(base, order="head")]
        cases += [replace(base, query_len=n) for n in (2, 8)]
        cases += [replace(base, context=n, batch=1) for n in (131072,)]
    return cases


def _cuda_cases(full: bool) -> list[AttentionCase]:
    base = AttentionCase(batch=32, dtype="float16", order="head")
    shapes = ((32, 8192), (64, 2048), (1, 131072), (1, 8192))
    cases = [
        with_bits(replace(base, batch=batch, context=context), bits)
        for bits in (4, 3, 2)
        for batch, context in shapes
    ]
    cases += [with_bits(base, bits) for bits in (5, 6, 8)]
    cases += [replace(base, value_bits=2), replace(base, key_bits=5)]
    cases += [replace(base, head_dim=d) for d in (64, 96, 256)]
    cases += [replace(base, group=8), replace(base, block_size=32), replace(base, order="token")]
    cases += [replace(base, query_len=8), CUDA_PREFILL]
    if full:
        cases += [with_bits(base, 7)]
        cases += [replace(base, query_len=n) for n in (2, 4)]
        cases += [replace(base, dtype=dtype) for dtype in ("bfloat16", "float32")]
        cases += [replace(base, batch=8, context=32768), replace(base, batch=4, context=4096)]
    return cases


class Problem:
    """Random pages in random order, and calls that read different ones of them.

    Parameters
    ----------
    bench : Workbench
    case : AttentionCase
    """

    def __init__(self, bench: Workbench, case: AttentionCase) -> None:
        self.bench, self.case = bench, case
        xp, backend = bench.xp, bench.options.backend
        self.quantizers = [
            TurboQuant(head_dim=case.head_dim, bits=bits, seed=seed, backend=backend)
            for bits, seed in ((case.key_bits, 3), (case.value_bits, 4))
        ]
        width = case.blocks_per_sequence
        vector_bytes = sum(q.packed_dim + 4 for q in self.quantizers)
        self.cache_bytes = case.batch * width * case.block_size * case.kv_heads * vector_bytes
        self.sets = min(MOST_SETS, max(1, -(-bench.num_bytes // self.cache_bytes)))
        if case.operation == "prefill" and bench.device == "cuda":
            self.sets = 1  # arithmetic takes hundreds of times as long as reading the cache
        blocks = self.sets * case.batch * width
        pages = (blocks, case.block_size, case.kv_heads)
        if case.order == "head":
            pages = (blocks, case.kv_heads, case.block_size)
        self.cache = []
        for quantizer in self.quantizers:
            codes = self._random_codes((*pages, quantizer.packed_dim))
            norms = self._norms(pages)
            both = (codes, norms)
            self.cache += [a.swapaxes(1, 2) if case.order == "head" else a for a in both]
        order = np.random.Generator(np.random.PCG64(2)).permutation(blocks).astype(np.int32)
        self.tables = [xp.asarray(t) for t in order.reshape(self.sets, case.batch, width)]
        self.lens = xp.full(case.batch, case.context, np.int32)
        heads = case.kv_heads * case.group
        rng = np.random.Generator(np.random.PCG64(5))
        query = rng.standard_normal((case.batch, case.query_len, heads, case.head_dim), np.float32)
        query = query.astype(float_dtype(case.dtype))
        self.query = xp.asarray(query[:, 0] if case.query_len == 1 else query)
        self.out = xp.empty_like(self.query)

    def _random_codes(self, shape: tuple[int, ...]) -> Any:
        size = int(np.prod(shape))
        rng = np.random.Generator(np.random.PCG64(size % 1000))
        block = np.frombuffer(rng.bytes(min(size, RANDOM_BLOCK)), np.uint8)
        return self.bench.xp.resize(self.bench.xp.asarray(block), shape)

    def _norms(self, shape: tuple[int, ...]) -> Any:
        """Such that coordinates of keys and values are about 1."""
        rng = np.random.Generator(np.random.PCG64(6))
        block = rng.uniform(0.5, 1.5, min(int(np.prod(shape)), RANDOM_BLOCK // 4))
        block = (block * self.case.head_dim**0.5).astype(np.float32)
        return self.bench.xp.resize(self.bench.xp.asarray(block), shape)

    @cached_property
    def attention(self) -> TQPagedAttention:
        key_quantizer, value_quantizer = self.quantizers
        heads = self.case.kv_heads * self.case.group
        return TQPagedAttention(key_quantizer, heads, value_quantizer=value_quantizer)

    def steps(self) -> list[Call]:
        """Calls that read one set of pages after the other."""
        count = max(GRAPH_STEPS, self.sets) if self.bench.device == "cuda" else self.sets
        attend: Any = self.attention
        return [
            partial(
                attend,
                self.query,
                *self.cache,
                self.tables[i % self.sets],
                self.lens,
                out=self.out,
            )
            for i in range(count)
        ]

    def work(self) -> Work:
        """Codes and norms of the context, query and result; two products with each vector."""
        case = self.case
        heads = case.batch * case.kv_heads * case.group
        on_tensor_cores = self.bench.device == "cuda" and case.query_len > 1
        return Work(
            self.cache_bytes + 2 * self.query.nbytes,
            "read",
            2 * heads * case.visible * case.head_dim,
            "tensor cores" if on_tensor_cores else "multiply-add",
        )

    def decoded(self, i: int, dtype: Any) -> tuple[Any, Any]:
        """Keys and values of set i as [batch, context, kv_heads, head_dim]."""
        case = self.case
        pair = []
        for side, quantizer in enumerate(self.quantizers):
            codes, norms = self.cache[2 * side : 2 * side + 2]
            table = self.tables[i]
            vectors = quantizer.decode(
                self.bench.xp.ascontiguousarray(codes[table]),
                self.bench.xp.ascontiguousarray(norms[table]),
                dtype=dtype,
            )
            shape = (case.batch, -1, case.kv_heads, case.head_dim)
            pair.append(vectors.reshape(shape)[:, : case.context])
        return pair[0], pair[1]


def measure(bench: Workbench, case: AttentionCase, section: str = "attention") -> Row:
    """The line of one case."""
    problem = Problem(bench, case)
    row = bench.measure(
        section,
        case.operation,
        asdict(case) | {"sets": problem.sets},
        case.batch * case.query_len,
        problem.work(),
        problem.steps(),
    )
    del problem
    bench.free()
    return row


def tasks(bench: Workbench) -> Iterable[Task]:
    """All cases of this section."""
    for case in attention_cases(bench.options.full, bench.device):
        yield lambda case=case: [measure(bench, case)]  # type: ignore[misc]
