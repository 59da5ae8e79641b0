"""Streams, graphs, devices, memory pools and other libraries' arrays."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from turboquant_np import TurboQuant
from turboquant_np.cuda import compiled_kernels, warmup
from turboquant_np.paged import encode_paged
from turboquant_np.testing import assert_bits_equal

cupy: Any = pytest.importorskip("cupy")


def vectors(n: int, d: int = 128, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float16)


@pytest.mark.parametrize("d", [128, 100])
def test_work_is_ordered_by_the_current_stream(d: int) -> None:
    """A long fill on the stream comes first; on another stream encode would read the old values."""
    tq = TurboQuant(head_dim=d, bits=4)
    warmup(tq)
    x = cupy.zeros((1 << 18, d), np.float16)
    source = cupy.asarray(np.tile(vectors(1 << 10, d), (1 << 8, 1)))
    want = tq.encode(source)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        for _ in range(20):
            cupy.copyto(x, source * 0)
        cupy.copyto(x, source)
        got = tq.encode(x, check_finite=False)
    stream.synchronize()
    assert (got[0] == want[0]).all()
    assert (got[1] == want[1]).all()


def test_threads_may_share_a_quantizer_from_its_first_call_on() -> None:
    x = vectors(4096)
    on_gpu = cupy.asarray(x)
    for seed in range(20):
        tq = TurboQuant(head_dim=128, bits=3, seed=seed)
        barrier = threading.Barrier(4)

        def first_call(_: int, tq: Any = tq, barrier: Any = barrier) -> Any:
            barrier.wait()
            packed, norms = tq.encode(on_gpu)
            return packed, norms, tq.decode(packed, norms)

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(first_call, range(4)))
        want = TurboQuant(head_dim=128, bits=3, seed=seed).encode(x)
        restored = tq.decode(*want)
        for packed, norms, back in results:
            assert_bits_equal(packed.get(), want[0])
            assert_bits_equal(norms.get(), want[1])
            assert_bits_equal(back.get(), restored)


def test_graph_capture() -> None:
    tq = TurboQuant(head_dim=128, bits=4)
    warmup(tq)
    x = cupy.asarray(vectors(300))
    out, back = tq.encode(x), cupy.empty_like(x)
    scores = cupy.empty(300, np.float32)
    cache = [cupy.zeros((20, 16, 3, 64), np.uint8), cupy.zeros((20, 16, 3), np.float32)]
    cache += [cupy.zeros_like(a) for a in cache]
    names = ("k_packed", "k_norms", "v_packed", "v_norms")
    named = dict(zip(names, cache, strict=True))
    slots = cupy.arange(100)
    tokens = x.reshape(100, 3, 128)

    def step() -> None:
        tq.encode(x, out=out, check_finite=False)
        tq.decode(*out, out=back)
        tq.inner_products(x[7], *out, out=scores)
        encode_paged(tokens, tokens, **named, slot_mapping=slots, key_quantizer=tq, check=False)

    step()  # compiles what warmup does not: the paged kernel
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    kernels = compiled_kernels()
    with stream:
        stream.begin_capture()
        step()
        graph = stream.end_capture()
    assert compiled_kernels() == kernels
    fresh = vectors(300, seed=1)
    x[...] = cupy.asarray(fresh)
    for array in (*out, back, scores, *cache):
        array.fill(0)
    cupy.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    expected = TurboQuant(head_dim=128, bits=4, backend="reference")
    want = expected.encode(fresh)
    assert_bits_equal(out[0].get(), want[0])
    assert_bits_equal(out[1].get(), want[1])
    assert_bits_equal(back.get(), expected.decode(*want))
    assert_bits_equal(cache[0].reshape(-1, 64)[:300].get(), want[0])
    np.testing.assert_allclose(
        scores.get(), expected.inner_products(fresh[7], *want), rtol=0, atol=1e-3
    )


def test_encode_with_out_allocates_nothing_and_does_not_wait() -> None:
    tq = TurboQuant(head_dim=128, bits=4)
    x = cupy.asarray(vectors(300))
    out, back = tq.encode(x), cupy.empty_like(x)
    tq.decode(*out, out=back)
    pool = cupy.get_default_memory_pool()
    hook_calls: list[int] = []

    class Hook(cupy.cuda.memory_hook.MemoryHook):  # type: ignore[misc]
        name = "count"

        def malloc_preprocess(self, **kwargs: Any) -> None:
            hook_calls.append(kwargs["size"])

    before = pool.used_bytes()
    with Hook():
        tq.encode(x, out=out, check_finite=False)
        tq.decode(*out, out=back)
    assert not hook_calls
    assert pool.used_bytes() == before


def test_warmup_compiles_what_follows() -> None:
    tq = TurboQuant(head_dim=96, bits=5)
    warmup(tq, dtypes=["float16", "float32"])
    kernels = compiled_kernels()
    assert any("HEAD_DIM=96" in line for line in kernels)
    for dtype in (np.float16, np.float32):
        x = cupy.asarray(vectors(40, 96).astype(dtype))
        tq.decode(*tq.encode(x), dtype=dtype)
    assert compiled_kernels() == kernels


def test_another_memory_pool() -> None:
    tq = TurboQuant(head_dim=128, bits=4)
    pool = cupy.cuda.MemoryAsyncPool()
    with cupy.cuda.using_allocator(pool.malloc):
        packed, norms = tq.encode(cupy.asarray(vectors(100)))
        want = TurboQuant(head_dim=128, bits=4, backend="reference").encode(vectors(100))
        assert_bits_equal(packed.get(), want[0])
        assert_bits_equal(norms.get(), want[1])


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_torch_tensors_in_and_out(name: str) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA")
    tq = TurboQuant(head_dim=128, bits=4, dtype=name)
    dtype = getattr(torch, name)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # results are ordered behind the stream torch works on
        x = torch.zeros((1 << 18, 128), dtype=dtype, device="cuda")
        for _ in range(10):
            x = x * 0 + torch.tensor(vectors(1).astype(np.float32)).to("cuda", dtype)
        packed, norms = tq.encode(x)
        back = tq.decode(packed, norms)
        norm_sum = float(norms.double().sum())
    assert isinstance(packed, torch.Tensor)
    assert packed.device.type == "cuda"
    assert back.dtype == dtype
    expected = TurboQuant(head_dim=128, bits=4, backend="reference", dtype="float32")
    want = expected.encode(x[:1].float().cpu().numpy())
    assert (packed.cpu().numpy() == want[0]).all()
    assert norm_sum == pytest.approx(float(want[1][0]) * 2**18, rel=1e-6)
    error = back[:1].float().cpu().numpy() - expected.decode(*want)
    assert np.abs(error).max() < 0.02


def test_arrays_in_different_memory() -> None:
    tq = TurboQuant(head_dim=128, bits=4)
    x = cupy.asarray(vectors(4))
    packed, norms = tq.encode(x)
    with pytest.raises(ValueError, match="same memory"):
        tq.decode(packed, norms.get())
    with pytest.raises(ValueError, match="same memory"):
        tq.inner_products(vectors(1), packed, norms)
    with pytest.raises(ValueError, match="same memory"):
        tq.encode(x, out=(packed.get(), norms))
    with pytest.raises(ValueError, match="host memory"):
        TurboQuant(head_dim=128, backend="reference").encode(x)
    with pytest.raises(ValueError, match="device='cpu'"):
        TurboQuant(head_dim=128, device="cpu").encode(x)


def test_the_device_of_the_input_counts() -> None:
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU only")
    tq = TurboQuant(head_dim=128, bits=4)
    with cupy.cuda.Device(1):
        x = cupy.asarray(vectors(50))
    with cupy.cuda.Device(0):
        packed, norms = tq.encode(x)
        back = tq.decode(packed, norms)
    assert packed.device.id == norms.device.id == back.device.id == 1
    assert_bits_equal(packed.get(), TurboQuant(head_dim=128, bits=4).encode(vectors(50))[0])
