"""Sizes of KV caches, checked against arithmetic done by hand."""

from __future__ import annotations

import pytest

from turboquant_np.memory import (
    MODELS,
    ModelShape,
    kv_bytes_per_token,
    longest_context,
    memory_report,
)

LLAMA_8B = ModelShape("Llama-3.1-8B", num_layers=32, num_kv_heads=8, head_dim=128, weight_gb=4.5)


def test_a_token_of_llama_3_1_8b() -> None:
    # 32 layers x 8 heads x (key + value) = 512 vectors of 128 coordinates
    assert kv_bytes_per_token(LLAMA_8B, None) == 512 * 256
    assert kv_bytes_per_token(LLAMA_8B, 8) == 512 * (128 + 4)
    assert kv_bytes_per_token(LLAMA_8B, 4) == 512 * (64 + 4)
    assert kv_bytes_per_token(LLAMA_8B, 3) == 512 * (48 + 4)
    assert kv_bytes_per_token(LLAMA_8B, 1) == 512 * (16 + 4)


def test_codes_are_counted_in_whole_bytes() -> None:
    # 3 bits x 3 coordinates = 9 bits: two bytes
    assert kv_bytes_per_token(ModelShape("odd", 1, 1, 3), 3) == 2 * (2 + 4)


def test_the_longest_context_fits_and_one_token_more_does_not() -> None:
    for bits in (None, 8, 4, 3, 2, 1):
        tokens = longest_context(LLAMA_8B, bits, gpu_memory_gb=24.0, utilisation=0.8)
        free = 24.0e9 * 0.8 - 4.5e9
        size = kv_bytes_per_token(LLAMA_8B, bits)
        assert tokens * size <= free < (tokens + 1) * size


def test_no_context_where_the_weights_do_not_fit() -> None:
    assert longest_context(LLAMA_8B, 1, gpu_memory_gb=4.0) == 0


@pytest.mark.parametrize(
    ("gpu_memory_gb", "utilisation", "message"),
    [
        (0.0, 0.9, "gpu_memory_gb must be positive"),
        (float("nan"), 0.9, "gpu_memory_gb must be positive"),
        (24.0, 0.0, "utilisation must be above 0"),
        (24.0, 1.1, "utilisation must be above 0 and at most 1, got 1.1"),
    ],
)
def test_impossible_gpus(gpu_memory_gb: float, utilisation: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        longest_context(LLAMA_8B, 4, gpu_memory_gb, utilisation)


@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "head_dim"])
def test_a_model_has_at_least_one_of_everything(name: str) -> None:
    shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        ModelShape("none", **shape)
    with pytest.raises(ValueError, match="weight_gb"):
        ModelShape("light", 1, 1, 1, weight_gb=-1.0)


def test_known_models() -> None:
    shapes = {m.name: (m.num_layers, m.num_kv_heads, m.head_dim) for m in MODELS}
    assert len(shapes) == len(MODELS), "names are unique"
    assert shapes["Llama-3.1-70B"] == (80, 8, 128)
    assert shapes["Llama-3.2-1B"] == (16, 8, 64)
    assert shapes["Qwen2.5-7B"] == (28, 4, 128)
    weights = {m.name: m.weight_gb for m in MODELS}
    assert weights["Llama-3.1-70B"] == pytest.approx(70.55 * 4.5 / 8)


def test_report_of_forty_thousand_tokens() -> None:
    report = memory_report(head_dim=128, bits=4, seq_len=40_000, num_layers=32, num_kv_heads=8)
    assert report["fp16_mb"] == 5000.0
    assert report["fp8_mb"] == 2500.0
    assert report["tq4_mb"] == 1328.125
    assert report["ratio_vs_fp16"] == pytest.approx(256 / 68)
    assert report["ratio_vs_fp8"] == pytest.approx(128 / 68)
    with pytest.raises(ValueError, match="seq_len must not be negative, got -1"):
        memory_report(128, 4, -1)
