"""PagedKVCache with its pages on a GPU: the state machine, and the same output as on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from turboquant_np.kv_cache import PagedKVCache
from turboquant_np.testing import assert_bits_equal
from turboquant_np.testing.stateful import PagedCacheMachine

pytestmark = pytest.mark.cuda


class OnGpu(PagedCacheMachine):
    device = "cuda"
    attention_error = 4e-3


TestOnGpu = OnGpu.TestCase
TestOnGpu.settings = settings(stateful_step_count=20, max_examples=20, deadline=None)
pytest.mark.cuda(TestOnGpu)


def run(device: str, keys: Any, values: Any, query: Any) -> tuple[Any, Any]:
    """Prefill of two sequences, then some tokens one by one: last output, and what is stored."""
    cache = PagedKVCache(2, 2, 64, num_blocks=64, key_bits=3, value_bits=4, device=device)
    xp = cache._xp
    sequences = [cache.allocate(), cache.allocate()]
    counts, at = [200, 33], 0
    for _ in range(20):
        step = cache.begin_step(sequences, counts)
        tokens = slice(at, at + sum(counts))
        for layer in range(2):
            step.append(layer, *(xp.asarray(x[layer, tokens]) for x in (keys, values)))
            out = step.attend(layer, xp.asarray(query[tokens]))
        at, counts = tokens.stop, [1, 1]
    stored = [cache.read(s, 1)[0] for s in sequences]
    return to_host(out), [to_host(x) for x in stored]


def to_host(array: Any) -> Any:
    return array.get() if hasattr(array, "get") else array


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_gpu_equals_cpu(dtype: Any) -> None:
    rng = np.random.Generator(np.random.PCG64(6))
    keys, values = (rng.integers(-64, 65, (2, 2, 300, 2, 64)) / 16).astype(np.float32)
    query = (rng.standard_normal((300, 8, 64)) / 4).astype(dtype)
    (out, stored), (want, want_stored) = (
        run(device, keys, values, query) for device in ("cuda", "cpu")
    )
    for one, other in zip(stored, want_stored, strict=True):
        assert_bits_equal(one, other)
    error = np.linalg.norm(out.astype(np.float64) - want.astype(np.float64))
    assert error < 1e-3 * np.linalg.norm(want.astype(np.float64))


@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "dtype", "settings", "options"),
    [
        (128, 8, np.float16, {}, {}),
        (128, 2, np.float16, {"dtype": "float32", "recent_tokens": 200}, {"sliding_window": 70}),
        (64, 8, np.float32, {"key_bits": 2}, {"sinks": np.linspace(-2, 2, 32, dtype=np.float32)}),
        (96, 1, np.float16, {"block_size": 7, "sink_tokens": 0}, {"logits_soft_cap": 5.0}),
        (128, 8, np.float16, {"recent_tokens": 1000}, {"scale": 0.1}),  # nothing is packed
    ],
)
@pytest.mark.parametrize("new_tokens", [1, 5])
def test_full_pages_are_attended_to(
    head_dim: int,
    kv_heads: int,
    dtype: Any,
    settings: dict[str, Any],
    options: dict[str, Any],
    new_tokens: int,
) -> None:
    """Packed and full-precision pages, ragged sequences, several new tokens: as on a CPU."""
    rng = np.random.Generator(np.random.PCG64(7))
    counts = [300, 20, 0, 90]
    total = sum(counts) + 3 * len(counts) * new_tokens
    keys, values = rng.standard_normal((2, total, kv_heads, head_dim), np.float32) + 1
    query = rng.standard_normal((total, 4 * kv_heads, head_dim), np.float32).astype(dtype)
    outs: dict[str, list[Any]] = {"cuda": [], "cpu": []}
    for device, results in outs.items():
        cache = PagedKVCache(1, kv_heads, head_dim, num_blocks=80, device=device, **settings)
        xp = cache._xp
        converted = {
            k: xp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()
        }
        sequences, at, new = [cache.allocate() for _ in counts], 0, counts
        for _ in range(4):
            step = cache.begin_step(sequences, new)
            tokens = slice(at, at + sum(new))
            step.append(0, *(xp.asarray(x[tokens]) for x in (keys, values)))
            results.append(to_host(step.attend(0, xp.asarray(query[tokens]), **converted)))
            at, new = tokens.stop, [new_tokens] * len(counts)
    for got, want in zip(outs["cuda"], outs["cpu"], strict=True):
        error = np.linalg.norm(got.astype(np.float64) - want.astype(np.float64))
        assert error < 1e-3 * np.linalg.norm(want.astype(np.float64))
