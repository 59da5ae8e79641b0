"""Speed of storing new tokens: `encode_paged` alone, and `PagedKVCache.append` with all it does."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np

from .. import PagedKVCache, TurboQuant
from .._arrays import float_dtype
from ..paged import encode_paged
from .codec import transform_operations, vectors
from .timing import Call, HostClock
from .workbench import Row, Task, Work, Workbench

__all__ = ["measure_cache", "measure_slots", "tasks"]

HEAD_DIM, KV_HEADS, BLOCK_SIZE = 128, 8, 16
MOST_SETS = 64
TOKENS_A_STEP = BLOCK_SIZE  # so that every step packs a page of each sequence
LONGEST = 1024  # tokens, then sequences begin again


def measure_slots(bench: Workbench, tokens: int, bits: int, dtype: str) -> Row:
    """One token of `tokens` sequences, keys and values, straight into its slot."""
    xp = bench.xp
    tq = TurboQuant(head_dim=HEAD_DIM, bits=bits, backend=bench.options.backend)
    input_bytes = 2 * tokens * KV_HEADS * HEAD_DIM * float_dtype(dtype).itemsize
    sets = min(MOST_SETS, max(1, bench.num_bytes // input_bytes))
    new = vectors(bench, HEAD_DIM, dtype, 2 * sets * tokens * KV_HEADS)
    new = new.reshape(sets, 2, tokens, KV_HEADS, HEAD_DIM)
    blocks = sets * tokens  # a sequence's newest token lies in a page of its own
    pages = (blocks, BLOCK_SIZE, KV_HEADS)
    cache: list[Any] = []
    for _ in "kv":
        cache += [xp.zeros((*pages, tq.packed_dim), np.uint8), xp.zeros(pages, np.float32)]
    rng = np.random.Generator(np.random.PCG64(8))
    slots = rng.permutation(blocks) * BLOCK_SIZE + rng.integers(0, BLOCK_SIZE, blocks)
    places = [xp.asarray(s) for s in slots.astype(np.int32).reshape(sets, tokens)]
    store: Any = partial(encode_paged, key_quantizer=tq, check=False)
    steps: list[Call] = [partial(store, *new[i], *cache, places[i]) for i in range(sets)]
    count = 2 * tokens * KV_HEADS
    operations = count * (HEAD_DIM * (2 + bits) + transform_operations(HEAD_DIM, 3))
    moved = input_bytes + count * (tq.packed_dim + 4)
    settings = {"bits": bits, "sequences": tokens, "new_tokens": 1, "dtype": dtype, "sets": sets}
    work = Work(moved, "copy", operations)
    return bench.measure("append", "encode_paged", settings, tokens, work, steps)


def measure_cache(bench: Workbench, sequences: int, bits: int, dtype: str) -> Row:
    """A page of new tokens for each sequence: windows, key offsets, packing of old pages.

    Timed on the host, device included: planning a step is work for the host.
    """
    most_tokens = LONGEST + TOKENS_A_STEP
    cache = PagedKVCache(
        1,
        KV_HEADS,
        HEAD_DIM,
        num_blocks=sequences * (most_tokens // BLOCK_SIZE + 1),
        max_sequences=sequences,
        key_bits=bits,
        value_bits=bits,
        dtype=dtype,
        device=bench.device,
    )
    rows = 2 * sequences * TOKENS_A_STEP * KV_HEADS
    keys, values = vectors(bench, HEAD_DIM, dtype, rows).reshape(
        2, sequences * TOKENS_A_STEP, KV_HEADS, HEAD_DIM
    )
    members = [cache.allocate() for _ in range(sequences)]

    def append() -> None:
        nonlocal members
        if cache.length(members[0]) >= LONGEST:
            for member in members:
                cache.truncate(member, LONGEST // 2)
        step = cache.begin_step(members, [TOKENS_A_STEP] * sequences)
        step.append(0, keys, values)
        if bench.device == "cuda":
            bench.xp.cuda.get_current_stream().synchronize()

    for _ in range(LONGEST // 2 // TOKENS_A_STEP):  # until old pages are packed in every step
        append()
    spec_bytes = sum(q.packed_dim + 4 for q in (cache.key_quantizer, cache.value_quantizer))
    tokens = sequences * TOKENS_A_STEP * KV_HEADS
    row_bytes = 2 * HEAD_DIM * float_dtype(dtype).itemsize
    # new tokens are copied into full pages, as many old ones are read from such pages and packed
    moved = tokens * (3 * row_bytes + spec_bytes)
    operations = 2 * tokens * (HEAD_DIM * (2 + bits) + transform_operations(HEAD_DIM, 3))
    settings = {
        "bits": bits,
        "sequences": sequences,
        "new_tokens": TOKENS_A_STEP,
        "dtype": dtype,
        "sets": 1,
    }
    return bench.measure(
        "append",
        "PagedKVCache.append",
        settings,
        sequences * TOKENS_A_STEP,
        Work(moved, "copy", operations),
        [append],
        clock=HostClock(),
    )


def tasks(bench: Workbench) -> Iterable[Task]:
    """All cases of this section."""
    counts = (1, 16, 32, 64, 128, 256) if bench.options.full else (1, 32, 256)
    dtype = "float16" if bench.device == "cuda" else "float32"
    for bits in (2, 3, 4, 8) if bench.options.full else (4,):
        for count in counts:
            yield lambda n=count, b=bits: [measure_slots(bench, n, b, dtype)]  # type: ignore[misc]
    for count in (1, 32):
        yield lambda n=count: [measure_cache(bench, n, 4, dtype)]  # type: ignore[misc]
