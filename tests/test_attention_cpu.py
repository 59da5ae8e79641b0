"""Attention on a CPU: every instruction set, every way through the rows, nothing read outside."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from turboquant_np import TurboQuant, _backend
from turboquant_np.fused_attention import TQPagedAttention

# (head_dim, key bits, value bits, query heads to a kv head): groups of 1 to 8 rows look centroids
# up where they are used, 3 and 7 in several steps; more rows, or wide codes, go through a tile;
# 8 bits have a way of their own where 64 divides head_dim
SHAPES = [
    (64, 4, 4, 4), (128, 4, 3, 8), (96, 3, 4, 3), (80, 4, 2, 7), (33, 5, 6, 9), (128, 2, 8, 1),
    (40, 8, 1, 20), (128, 4, 4, 2), (128, 8, 8, 4), (64, 8, 8, 17), (192, 8, 3, 3),
]  # fmt: skip


def problem(
    head_dim: int, key_bits: int, value_bits: int, group: int, context: int = 331
) -> tuple[dict[str, Any], int]:
    """Arguments of a call over a context of pages in random order, and the number of heads."""
    rng = np.random.Generator(np.random.PCG64([29, head_dim, key_bits, value_bits, group]))
    pages, page, kv_heads = -(-context // 16), 16, 3
    arguments: dict[str, Any] = {
        "query": rng.standard_normal((1, kv_heads * group, head_dim), np.float32),
        "block_tables": rng.permutation(pages)[None],
        "context_lens": np.array([context]),
    }
    for side, bits in (("k", key_bits), ("v", value_bits)):
        shape = (pages, page, kv_heads, -(-head_dim * bits // 8))
        arguments[f"{side}_packed"] = rng.integers(0, 256, shape, np.uint8)
        arguments[f"{side}_norms"] = rng.uniform(5, 12, shape[:3]).astype(np.float32)
    return arguments, kv_heads * group


def attend(backend: str, shape: tuple[int, int, int, int], arguments: Any, heads: int) -> Any:
    head_dim, key_bits, value_bits, _ = shape
    keys = TurboQuant(head_dim=head_dim, bits=key_bits, seed=1, backend=backend)
    values = TurboQuant(head_dim=head_dim, bits=value_bits, seed=2, backend=backend)
    attention = TQPagedAttention(keys, heads, value_quantizer=values)
    return attention(**arguments, return_lse=True)


def check(shape: tuple[int, int, int, int], arguments: dict[str, Any], heads: int) -> None:
    (out, lse), (want, want_lse) = (
        attend(backend, shape, arguments, heads) for backend in ("cpu", "reference")
    )
    assert np.linalg.norm(out - want) <= 2e-6 * np.linalg.norm(want)
    assert np.abs(lse - want_lse).max() <= 2e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape: tuple[int, int, int, int]) -> None:
    check(shape, *problem(*shape))


@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="x86 names")
@pytest.mark.parametrize(("name", "level"), [("haswell", "avx2"), ("nehalem", "generic")])
def test_other_simd_levels_equal_the_reference(name: str, level: str) -> None:
    environment = {**os.environ, "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": ""}
    result = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == [level, str(len(SHAPES))]


@pytest.mark.parametrize("step", [0.05, 1.0, 30.0])
def test_scores_that_rise_all_the_time(step: float) -> None:
    """Whether later tiles exceed the maximum so far by a little, by more, or by far."""
    shape = (64, 4, 4, 4)
    arguments, heads = problem(*shape, context=700)
    tokens = np.arange(700)
    pages = arguments["block_tables"][0, tokens // 16], tokens % 16
    arguments["k_packed"][...] = arguments["k_packed"][:1, :1]  # one key, ever longer
    arguments["k_norms"][pages] = (step * tokens / 64)[:, None]
    check(shape, arguments, heads)


def test_calls_at_once_and_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever helps whom, and whether helpers sleep or wait for the next call."""
    monkeypatch.setenv("TURBOQUANT_NP_NUM_THREADS", "1")
    shape = (64, 4, 4, 4)
    calls = [problem(*shape, context=context) for context in (3000, 2000, 1500)]
    want = [attend("cpu", shape, *call) for call in calls]
    monkeypatch.setenv("TURBOQUANT_NP_NUM_THREADS", "3")
    wrong = []

    def work(number: int) -> None:
        for turn in range(30):
            found = attend("cpu", shape, *calls[number])
            if not all((x == y).all() for x, y in zip(found, want[number], strict=True)):
                wrong.append((number, turn))

    for together in (1, 3):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(together)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_works_in_a_forked_child() -> None:
    """Also while helpers of the parent wait for its next call."""
    environment = {**os.environ, "TURBOQUANT_NP_NUM_THREADS": "3"}
    result = subprocess.run(
        [sys.executable, __file__, "fork"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["0"]


def fork_and_attend() -> None:
    shape = (64, 4, 4, 4)
    call = problem(*shape, context=3000)
    want = attend("cpu", shape, *call)
    warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads
    child = os.fork()
    if child == 0:
        found = attend("cpu", shape, *call)
        os._exit(0 if all((x == y).all() for x, y in zip(found, want, strict=True)) else 3)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_is_read_behind_the_cache(shape: tuple[int, int, int, int]) -> None:
    arguments, heads = problem(*shape)
    want = attend("cpu", shape, arguments, heads)
    maps: list[mmap.mmap] = []
    for name, array in arguments.items():
        if name != "query":
            arguments[name] = ends_at_a_guard(array, maps)
    for ours, theirs in zip(attend("cpu", shape, arguments, heads), want, strict=True):
        assert (ours == theirs).all()


def ends_at_a_guard(like: npt.NDArray[Any], maps: list[mmap.mmap]) -> npt.NDArray[Any]:
    """A copy behind which there is no memory: one byte further is a segmentation fault."""
    size = -(-like.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    maps.append(memory)
    guard = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = np.frombuffer(memory, np.uint8, like.nbytes, size - like.nbytes)
    result = copy.view(like.dtype).reshape(like.shape)
    result[...] = like
    return result


if __name__ == "__main__" and sys.argv[1:] == ["fork"]:
    fork_and_attend()
elif __name__ == "__main__":
    for one in SHAPES:
        check(one, *problem(*one))
    backend: Any = _backend.load("cpu")
    print(backend.describe()["simd"].split()[0], len(SHAPES))
