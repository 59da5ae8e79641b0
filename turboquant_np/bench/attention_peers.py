"""Other libraries that attend, to the decoded vectors of the same cache.

A peer's `calls` takes a `Problem` and returns steps, one for each set of pages it was given, each
of which returns its result as an array [batch, query_len, heads, head_dim].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from .attention import CUDA_PREFILL, AttentionCase, Problem, with_bits
from .peers import Peer, compare, peer_tasks
from .timing import Call
from .workbench import Row, Task, Workbench

__all__ = ["ATTENTION_PEERS", "beside", "on_current_stream", "tasks"]


TORCH_DEVICE = {"cpu": "cpu", "cuda": "cuda"}  # how torch calls a device; tests change it


def on_current_stream(call: Call) -> Call:
    """`call`, with torch on the stream that is CuPy's current one when it runs."""
    import cupy
    import torch

    def run() -> Any:
        pointer = cupy.cuda.get_current_stream().ptr
        # Of pointer 0 torch would make a new stream, for which nobody waits.
        stream = torch.cuda.ExternalStream(pointer) if pointer else torch.cuda.default_stream()
        with torch.cuda.stream(stream):
            return call()

    return run


def _sets(problem: Problem, bytes_per_value: float) -> int:
    """Sets of pages a peer needs so that its own data exceed the caches as ours do."""
    case = problem.case
    size = 2 * case.batch * case.context * case.kv_heads * case.head_dim * bytes_per_value
    return max(1, min(problem.sets, -(-problem.bench.num_bytes // max(1, int(size)))))


def _place(problem: Problem, call: Call) -> Call:
    return on_current_stream(call) if problem.bench.device == "cuda" else call


def torch_sdpa(problem: Problem, dtype: str) -> list[Call]:
    """`scaled_dot_product_attention` on contiguous vectors.

    The query heads of a group become query rows, so that each key and value is read once; that is
    several times faster than repeating them for each head.
    """
    import torch

    case = problem.case
    kind = getattr(torch, dtype)
    attend = torch.nn.functional.scaled_dot_product_attention
    prefill = case.query_len > 1
    if prefill and case.query_len != case.context:
        raise ValueError("several tokens behind a context need a mask; not compared")
    if prefill and problem.bench.device == "cuda" and kind.itemsize > 2:
        raise ValueError("writes all scores to memory in float32; not compared")
    plain = problem.query.astype(np.float32).reshape(
        case.batch, case.query_len, case.kv_heads * case.group, case.head_dim
    )
    query = torch.from_dlpack(plain).to(kind)
    if prefill:  # causal masks go by row: heads stay heads
        query = query.transpose(1, 2).contiguous()
        options: dict[str, Any] = {"is_causal": True, "enable_gqa": case.group > 1}
    else:
        query = query.reshape(case.batch, case.kv_heads, case.group, case.head_dim)
        options = {}
    steps: list[Call] = []
    for i in range(_sets(problem, kind.itemsize)):
        k, v = (
            torch.from_dlpack(a).to(kind).transpose(1, 2).contiguous()
            for a in problem.decoded(i, "float16" if kind.itemsize == 2 else "float32")
        )
        steps.append(_place(problem, partial(_attend, attend, query, k, v, options, prefill)))
    return steps


def _attend(attend: Any, query: Any, k: Any, v: Any, options: Any, prefill: bool) -> Any:
    out = attend(query, k, v, **options)
    if prefill:
        return out.transpose(1, 2)
    return out.reshape(out.shape[0], 1, -1, out.shape[-1])


def flashinfer_decode(problem: Problem, dtype: str) -> list[Call]:
    """Its paged decode on pages of unpacked vectors in random order, with tensor cores."""
    import torch

    flashinfer = import_module("flashinfer")
    case = problem.case
    if case.query_len != 1:
        raise ValueError("FlashInfer's decode takes one query token a sequence")
    if case.context % case.block_size:
        raise ValueError("whole pages only")
    kinds = {"float16": torch.float16, "float8": torch.float8_e4m3fn}
    width = case.blocks_per_sequence
    blocks = case.batch * width
    device = TORCH_DEVICE[problem.bench.device]
    place = {"device": device, "dtype": torch.int32}
    order = torch.as_tensor(np.random.Generator(np.random.PCG64(4)).permutation(blocks), **place)
    starts = torch.arange(0, blocks + 1, width, **place)
    last = torch.full((case.batch,), case.block_size, **place)
    query = torch.from_dlpack(problem.query.astype(np.float16))
    steps: list[Call] = []
    workspace = torch.empty(2**27, dtype=torch.uint8, device=device)
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    decode.plan(
        starts,
        order,
        last,
        case.kv_heads * case.group,
        case.kv_heads,
        case.head_dim,
        case.block_size,
        q_data_type=torch.float16,
        kv_data_type=kinds[dtype],
    )
    shape = (blocks, case.block_size, case.kv_heads, case.head_dim)
    for i in range(_sets(problem, kinds[dtype].itemsize)):
        pages = []
        for vectors in problem.decoded(i, "float16"):
            paged = torch.from_dlpack(vectors).reshape(shape).to(kinds[dtype])
            stored = torch.empty_like(paged)
            stored.view(torch.uint8)[order.long()] = paged.view(torch.uint8)
            pages.append(stored)
        run = partial(decode.run, query, tuple(pages))
        steps.append(_place(problem, lambda run=run: run()[:, None]))  # type: ignore[misc]
    return steps


def flashinfer_prefill(problem: Problem, backend: str) -> list[Call]:
    """Its causal attention of one whole prompt to itself, in float16, nothing paged.

    Of its kernels "fa3" is for Hopper and "fa2" for everything since Ampere; which one it takes by
    itself is one of the two.
    """
    import torch

    flashinfer = import_module("flashinfer")
    case = problem.case
    if case.operation != "prefill" or case.batch > 1:
        raise ValueError("one whole prompt only")
    query = torch.from_dlpack(problem.query.astype(np.float16))[0]
    attend = partial(flashinfer.single_prefill_with_kv_cache, causal=True, backend=backend)
    steps: list[Call] = []
    for i in range(_sets(problem, 2)):
        k, v = (torch.from_dlpack(vectors)[0] for vectors in problem.decoded(i, "float16"))
        run = partial(attend, query, k, v)
        steps.append(_place(problem, lambda run=run: run()[None]))  # type: ignore[misc]
    return steps


def aither_paged(problem: Problem) -> list[Call]:
    """`TQPagedAttention` of the torch package whose names ours follow, on packed pages.

    It reads the same memory as ours; its rotation has another seed for values, so only times can
    be compared.
    """
    import torch

    package = import_module("turboquant")
    case = problem.case
    if (case.key_bits, case.value_bits) != (4, 4) or case.query_len != 1:
        raise ValueError("its fused kernel has 4 bits and one query token")
    tq = package.TurboQuant(head_dim=case.head_dim, bits=4, use_hadamard=True, device="cuda")
    paged = import_module("turboquant.fused_attention")
    attention = paged.TQPagedAttention(tq, num_query_heads=case.kv_heads * case.group)
    contiguous = [problem.bench.xp.ascontiguousarray(a) for a in problem.cache]
    cache = [torch.from_dlpack(a) for a in contiguous]
    query, lens = torch.from_dlpack(problem.query), torch.from_dlpack(problem.lens)
    return [
        _place(
            problem,
            partial(attention.forward, query, *cache, torch.from_dlpack(table), lens),
        )
        for table in problem.tables[:4]
    ]


BOTH, GPU = ("cpu", "cuda"), ("cuda",)
ATTENTION_PEERS = (
    Peer("torch SDPA float32", "torch", "torch", BOTH, partial(torch_sdpa, dtype="float32")),
    Peer("torch SDPA bfloat16", "torch", "torch", BOTH, partial(torch_sdpa, dtype="bfloat16")),
    Peer("torch SDPA float16", "torch", "torch", GPU, partial(torch_sdpa, dtype="float16")),
    Peer(
        "FlashInfer float16",
        "flashinfer-python",
        "flashinfer",
        GPU,
        partial(flashinfer_decode, dtype="float16"),
    ),
    Peer(
        "FlashInfer float8",
        "flashinfer-python",
        "flashinfer",
        GPU,
        partial(flashinfer_decode, dtype="float8"),
    ),
    *(
        Peer(
            f"FlashInfer {backend} float16",
            "flashinfer-python",
            "flashinfer",
            GPU,
            partial(flashinfer_prefill, backend=backend),
        )
        for backend in ("fa3", "fa2")
    ),
    Peer("aither-kvcache", "aither-kvcache", "turboquant", GPU, aither_paged),
)
NOT_COMPARABLE = ("aither-kvcache",)  # see there


def cases(full: bool, device: str) -> list[AttentionCase]:
    """Shapes in which peers are compared."""
    if device == "cuda":
        base = AttentionCase(batch=32, dtype="float16", order="head")
        shapes = [(32, 8192), (64, 2048), (1, 131072), (1, 8192)]
        found = [replace(base, batch=b, context=c) for b, c in shapes]
        return [*found, CUDA_PREFILL, *(replace(base, group=8) for _ in range(full))]
    base = AttentionCase()
    found = [replace(base, context=context) for context in (1024, 8192, 32768)]
    found += [replace(base, context=1024, batch=batch) for batch in (4, 16)]
    found += [replace(base, context=1024, query_len=1024)]
    if full:
        found += [replace(base, group=8), replace(base, head_dim=64), replace(base, context=131072)]
    return found


def relative_difference(ours: Any, theirs: Any) -> float:
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def beside(bench: Workbench, peer: Peer, case: AttentionCase) -> list[Row]:
    """Rows for our bit widths; none if the peer cannot do this case."""
    problem = Problem(bench, case)
    try:
        theirs = peer.calls(problem)
    except ValueError:
        return []
    difference = None
    if peer.name not in NOT_COMPARABLE:
        problem.steps()[0]()
        result = theirs[0]().float().cpu().numpy()
        mine = problem.out if bench.device == "cpu" else problem.out.get()
        difference = relative_difference(mine.astype(np.float32).reshape(result.shape), result)
    bits = (4, 3, 2) if case.query_len == 1 else (4,)
    ours = {"4 bits": problem.steps()}
    ours |= {f"{b} bits": Problem(bench, with_bits(case, b)).steps() for b in bits if b != 4}
    settings = {
        "batch": case.batch,
        "context": case.context,
        "query_len": case.query_len,
        "query_heads": case.kv_heads * case.group,
        "kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "dtype": case.dtype,
        "operations": problem.work().operations,
    }
    tokens = case.batch * case.query_len
    rows = compare(
        bench,
        peer,
        "attention",
        case.operation,
        settings,
        tokens,
        ours,
        theirs,
        difference=difference,
    )
    del problem, theirs, ours
    bench.free()
    return rows


def comparisons(bench: Workbench, peer: Peer) -> Iterable[Task]:
    """All cases with one peer."""
    for case in cases(bench.options.full, bench.device):
        yield lambda case=case: beside(bench, peer, case)  # type: ignore[misc]


def tasks(bench: Workbench) -> Iterable[Task]:
    """Comparisons with everything that is installed."""
    return peer_tasks(bench, "attention", ATTENTION_PEERS, comparisons)
