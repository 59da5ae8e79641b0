"""The codec's CUDA kernels compile without a GPU, and the fast ones keep rows in registers."""

from __future__ import annotations

import itertools
import os
import re
from typing import Any

import numpy as np
import pytest

from turboquant_np import TurboQuant
from turboquant_np._spec import SCALE_KINDS, ScaleKind
from turboquant_np.backends.cuda import layout
from turboquant_np.backends.cuda.compile import blocks_per_multiprocessor
from turboquant_np.backends.cuda.constants import bucket_table
from turboquant_np.backends.cuda.source import variant_source

nvrtc: Any = pytest.importorskip("cupy_backends.cuda.libs.nvrtc")

ARCHS = [80, 90, 100]
SIZES = {"Half": 2, "BFloat16": 2, "Float": 4, "Double": 8}
KERNEL = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame.*?Used (\d+) registers", re.DOTALL
)
HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
MORE_HEAD_DIMS = (32, 100, 126, 384, 576, 768, 1024, 1536)
# All variants in the nightly run (minutes), those for float16 and head_dim 128 always.
H100_SHARED_BYTES = 232448
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def frames_and_registers(
    file: str, macros: dict[str, str | int], arch: int
) -> dict[str, tuple[int, int]]:
    """{kernel: (bytes of local memory a thread, registers)}."""
    try:
        program = nvrtc.createProgram(variant_source(file, macros), file, [], [])
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"no NVRTC: {error}")
    options = [f"-arch=sm_{arch}", "-std=c++17", "-ftz=true", "--ptxas-options=-v"]
    if nvrtc.getVersion() >= (13, 0):
        options.append("--no-cache")  # a program found in its cache comes without the report
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    log = nvrtc.getProgramLog(program)
    return {name: (int(frame), int(used)) for name, frame, used in KERNEL.findall(log)}


def encode_macros(
    d: int,
    bits: tuple[int, int],
    scale: ScaleKind = "norm",
    type_name: str = "Half",
    contiguous: int = 1,
) -> dict[str, str | int]:
    shape = layout.encode_shape(d, SIZES[type_name], scale != "norm")
    macros: dict[str, str | int] = {
        "INPUT": type_name,
        "HEAD_DIM": d,
        "LOAD": layout.row_width(d, SIZES[type_name]),
        "CONTIGUOUS": contiguous,
        **shape.macros,
    }
    for side, b in enumerate(bits):
        spec = TurboQuant(head_dim=d, bits=b, scale=scale)._spec
        macros |= layout.encode_macros(spec, side, layout.width_of(spec.packed_dim))
    return macros


def decode_macros(d: int, bits: int, type_name: str = "Half") -> dict[str, str | int]:
    return {
        "OUTPUT": type_name,
        "HEAD_DIM": d,
        "BITS": bits,
        "LOAD": layout.width_of(-(-d * bits // 8)),
        "STORE": layout.row_width(d, SIZES[type_name]),
        **layout.decode_shape(d, SIZES[type_name]).macros,
    }


def dense_encode_macros(
    d: int,
    bits: int,
    scale: ScaleKind = "norm",
    type_name: str = "Half",
    contiguous: int = 1,
    limbs: int = 3,
) -> dict[str, str | int]:
    spec = TurboQuant(head_dim=d, bits=bits, scale=scale)._spec
    shape = layout.dense_encode_shape(spec, SIZES[type_name], limbs, H100_SHARED_BYTES)
    assert shape is not None
    return {
        "INPUT": type_name,
        "HEAD_DIM": d,
        "LOAD": 16,
        "CONTIGUOUS": contiguous,
        "BITS": bits,
        "SCALE": SCALE_KINDS.index(scale),
        "STORE": layout.width_of(spec.packed_dim),
        "LIMBS": limbs,
        **shape.macros,
    }


def dense_decode_macros(
    d: int, bits: int, type_name: str = "Half", limbs: int = 3
) -> dict[str, str | int]:
    spec = TurboQuant(head_dim=d, bits=bits)._spec
    shape = layout.dense_decode_shape(spec, limbs, H100_SHARED_BYTES)
    assert shape is not None
    return {
        "OUTPUT": type_name,
        "HEAD_DIM": d,
        "BITS": bits,
        "LOAD": layout.width_of(spec.packed_dim),
        "LIMBS": limbs,
        **shape.macros,
    }


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_hot_kernels_keep_rows_in_registers(bits: int, arch: int) -> None:
    hot = [
        ("encode", encode_macros(128, (bits, bits))),
        ("decode", decode_macros(128, bits)),
        ("encode_dense", dense_encode_macros(128, bits)),
        ("decode_dense", dense_decode_macros(128, bits)),
    ]
    if bits == 4:
        hot += [("encode", encode_macros(768, (4, 4))), ("decode", decode_macros(768, 4))]
    for name, macros in hot:
        frame, registers = frames_and_registers(f"{name}.cu", macros, arch)[name]
        assert frame == 0, macros
        assert registers * 32 * int(macros["WARPS"]) * int(macros["BLOCKS"]) <= 65536


VARIANTS = (
    [
        ("encode.cu", encode_macros(d, bits, scale, type_name, contiguous))
        for d, bits, scale, type_name, contiguous in itertools.product(
            HEAD_DIMS,
            [(b, b) for b in range(1, 9)] + [(4, 2)],
            SCALE_KINDS,
            layout.TYPE_NAMES.values(),
            (0, 1),
        )
    ]
    + [
        ("decode.cu", decode_macros(d, bits, type_name))
        for d, bits, type_name in itertools.product(
            HEAD_DIMS, range(1, 9), layout.TYPE_NAMES.values()
        )
    ]
    + [
        variant
        for d, bits, type_name in itertools.product(MORE_HEAD_DIMS, range(1, 9), ("Half", "Float"))
        for variant in (
            ("encode.cu", encode_macros(d, (bits, bits), SCALE_KINDS[bits % 3], type_name)),
            ("decode.cu", decode_macros(d, bits, type_name)),
        )
    ]
    + [
        (
            "encode_dense.cu",
            dense_encode_macros(d, bits, scale, type_name, contiguous, 3 + bits % 2),
        )
        for d, bits, scale, type_name, contiguous in itertools.product(
            layout.DENSE_HEAD_DIMS,
            range(1, 9),
            SCALE_KINDS,
            ("Half", "BFloat16", "Float"),
            (0, 1),
        )
    ]
    + [
        ("decode_dense.cu", dense_decode_macros(d, bits, type_name, limbs))
        for d, bits, type_name, limbs in itertools.product(
            layout.DENSE_HEAD_DIMS, range(1, 9), layout.TYPE_NAMES.values(), (3, 4)
        )
    ]
    + [
        (
            "inner_products.cu",
            {"TYPE": type_name, "BITS": bits, "QUERIES": queries, "LOAD": load, "DENSE": dense},
        )
        for type_name, bits, queries, load, dense in itertools.product(
            layout.TYPE_NAMES.values(), range(1, 9), (1, 8), (1, 4), (0, 1)
        )
    ]
    + [
        ("any.cu", {"TYPE": type_name, "TEAM": team})
        for type_name, team in itertools.product(
            layout.TYPE_NAMES.values(), ("Warp", "Block", "ScratchBlock")
        )
    ]
)


def test_a_sample_of_all_variants_compiles() -> None:
    """Every head_dim, width, scale and type appears; the nightly run compiles all."""
    step = 1 if NIGHTLY else 149
    for i, (file, macros) in enumerate(VARIANTS[::step]):
        frames_and_registers(file, dict(macros), ARCHS[i % len(ARCHS)])


@pytest.mark.parametrize("d", [2, 31, 128, 4096])
@pytest.mark.parametrize("bits", range(2, 9))
def test_bucket_tables_count_thresholds(bits: int, d: int) -> None:
    """For every float near a threshold and many others, bucket and comparison give the code."""
    thresholds = TurboQuant(head_dim=d, bits=bits, hadamard_rounds=1)._spec.thresholds
    limit = min(16.0, d**0.5)
    table = bucket_table(thresholds, d)
    near = [thresholds, np.nextafter(thresholds, np.float32(9)), np.nextafter(thresholds, -9)]
    random = np.random.default_rng(0).uniform(-limit, limit, 100_000).astype(np.float32)
    z = np.concatenate([*near, random, [0.0, -0.0, 1e-45, -1e-45, limit, -limit]]).astype(
        np.float32
    )
    # z * scale is exact in float64 up to the addition, whose rounding is the float32 one here
    total = z.astype(np.longdouble) * np.longdouble(table.scale) + np.longdouble(1 + 2.0**-10)
    low = total.astype(np.float32).view(np.uint32) & 0x3FFF
    bucket = low // (16384 // len(table.entries))
    code = table.entries[bucket, 1] + (table.entries[bucket, 0].view(np.float32) < z)
    np.testing.assert_array_equal(code, np.searchsorted(thresholds, z, side="left"))


def test_blocks_per_multiprocessor() -> None:
    h100 = {
        "MaxRegistersPerMultiprocessor": 65536,
        "MaxSharedMemoryPerMultiprocessor": 233472,
        "MaxThreadsPerMultiProcessor": 2048,
    }
    assert blocks_per_multiprocessor(h100, 168, 128, 0) == 3
    assert blocks_per_multiprocessor(h100, 32, 128, 0) == 16
    assert blocks_per_multiprocessor(h100, 32, 128, 100_000) == 2
    assert blocks_per_multiprocessor(h100, 255, 512, 230_000) == 1


class Memory:
    """Stands for a CuPy array: `rows_of` looks at shape, strides and address alone."""

    def __init__(self, array: Any, address: int = 1 << 20) -> None:
        self.shape, self.strides, self.itemsize = array.shape, array.strides, array.itemsize
        self.data = type("Data", (), {"ptr": address})
        self._array = array

    def copy(self, order: str) -> Memory:
        return Memory(self._array.copy(order=order))


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (np.s_[...], (1, 0, 120, 128)),  # one run of 120 rows
        (np.s_[:, :2], (4, 3840, 12 // 2 * 2, 128)),
        (np.s_[0, 0, 0], (1, 0, 1, 0)),
        (np.s_[:, 0, 0], (1, 0, 4, 3840)),
        (np.s_[:, :, 0], (1, 0, 20, 768)),
    ],
)
def test_rows_by_two_strides(view: Any, expected: tuple[int, int, int, int]) -> None:
    rows = layout.rows_of(Memory(np.empty((4, 5, 6, 64), np.float16)[view]), 16)
    outer, inner = rows.count // rows.inner, rows.inner
    assert (outer, rows.outer_stride, inner, rows.inner_stride) == expected


def test_rows_that_need_a_copy() -> None:
    array = np.empty((4, 5, 6, 64), np.float16)
    for memory in (
        Memory(array[::2, ::2, ::2]),
        Memory(array[..., ::2]),
        Memory(array, address=(1 << 20) + 2),
    ):
        rows = layout.rows_of(memory, 16)
        assert rows.array is not memory
        assert rows.inner_stride == rows.array.shape[-1] * 2
