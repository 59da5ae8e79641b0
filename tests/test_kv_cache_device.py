"""PagedKVCache as on a GPU, without one: NumPy in CuPy's place, the two kernels in float64.

What is left to a GPU is whether CuPy's functions and the kernels do the same (tests/cuda).
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from turboquant_np._attention_checks import AttentionBatch
from turboquant_np.backends.reference import decode
from turboquant_np.testing.stateful import PagedCacheMachine


class NotAnArray:
    """No array is one, so the library takes NumPy arrays for what they are."""


def fake_cupy() -> types.ModuleType:
    module: Any = types.ModuleType("cupy")
    vars(module).update({name: getattr(np, name) for name in np.__all__ if name != "cuda"})
    module.ndarray = NotAnArray
    faked: types.ModuleType = module
    return faked


def attention_beside(key_spec: Any, value_spec: Any, batch: AttentionBatch, full: Any) -> None:
    """What the function of the same name does, one query token at a time."""
    assert batch.sinks is None
    assert not batch.logits_soft_cap
    assert not batch.sliding_window
    size = full.keys.shape[1]
    for s in range(batch.num_seqs):
        begin, end = batch.query_start_loc[s : s + 2].tolist()
        first_packed = int(full.query_positions[s] - batch.query_positions[s])
        n = int(batch.context_lens[s])
        sides = []
        for spec, packed, norms, pages in (
            (key_spec, batch.k_packed, batch.k_norms, full.keys),
            (value_spec, batch.v_packed, batch.v_norms, full.values),
        ):
            where = batch.block_tables[s, np.arange(n) // size], np.arange(n) % size
            vectors = np.empty((n, batch.num_kv_heads, spec.head_dim), np.float32)
            decode(spec, packed[where], norms[where], vectors)
            sides.append([vectors.astype(np.float64)])
            if packed is batch.k_packed:
                sides[0][0] += batch.key_offset[full.offset_slots[s]]
            sides[-1] += list(pages[full.pages[s][full.positions[s] >= 0]])
        positions = [first_packed + np.arange(n)]
        positions += [at + np.arange(size) for at in full.positions[s] if at >= 0]
        at = np.concatenate(positions)
        keys, values = (np.concatenate(side) for side in sides)
        for token in range(begin, end):
            seen = at <= full.query_positions[s] + token - begin
            for head in range(batch.query.shape[1]):
                kv_head = head // batch.group
                scores = batch.scale * (keys[seen, kv_head] @ batch.query[token, head].astype("f8"))
                weights = np.exp(scores - scores.max())
                batch.out[token, head] = weights @ values[seen, kv_head] / weights.sum()


@pytest.fixture(autouse=True, scope="module")
def on_host() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", fake_cupy())
        cuda = importlib.import_module("turboquant_np.backends.cuda")
        patch.setattr(cuda, "empty", lambda shape, dtype, like: np.empty(shape, dtype))
        attention = importlib.import_module("turboquant_np.backends.cuda.attention")
        patch.setattr(attention, "attention_beside", attention_beside)
        yield


class OnDevice(PagedCacheMachine):
    device = "cuda"


TestOnDevice = OnDevice.TestCase
TestOnDevice.settings = settings(stateful_step_count=20, max_examples=80, deadline=None)
