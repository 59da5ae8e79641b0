"""``turboquant-np quantize``, ``restore`` and ``inspect``: arrays in files, of any size."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from . import CommandError
from .progress import ProgressBar

QUANTIZE_EPILOG = """\
examples:
  turboquant-np quantize vectors.npy                     4 bits, into vectors.npz
  turboquant-np quantize keys.npy keys.safetensors --bits 3 --scale unbiased
  turboquant-np quantize bf16.npy --dtype bfloat16

The last axis of the array is the one that is quantised; the array may be larger than memory.
"""

RESTORE_EPILOG = """\
examples:
  turboquant-np restore vectors.npz restored.npy
  turboquant-np restore vectors.npz part.npy --rows 1000:2000 --dtype float32
"""


def add_parsers(subparsers: Any) -> None:
    """Register the three commands."""
    _add_quantize(subparsers)
    _add_restore(subparsers)
    _add_inspect(subparsers)


def _add_quantize(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "quantize",
        help="quantise the vectors of a .npy file",
        description="Quantise the vectors of a .npy file to 1-8 bits a coordinate.",
        epilog=QUANTIZE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="IN.npy", type=Path)
    parser.add_argument(
        "destination",
        metavar="OUT",
        type=Path,
        nargs="?",
        help="ends in .npz (default: IN.npz) or in .safetensors",
    )
    parser.add_argument("--bits", type=int, default=4, metavar="B", help="1 to 8 (default: 4)")
    parser.add_argument(
        "--rotation",
        default="hadamard",
        metavar="KIND",
        help="hadamard (default), haar, or a .npy file with an orthogonal matrix",
    )
    parser.add_argument("--seed", type=int, default=42, help="of the rotation (default: 42)")
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="of the Hadamard rotation (default: 3)"
    )
    parser.add_argument(
        "--scale",
        default="norm",
        choices=["norm", "mse", "unbiased"],
        help="what is stored beside the codes: the norm, as in the paper (default), the scale of "
        "least error, or the one that makes inner products unbiased",
    )
    parser.add_argument(
        "--dtype",
        help="what the elements are, where the file does not say: bfloat16, which .npy files keep "
        "as plain bytes",
    )
    parser.add_argument(
        "--no-check-finite",
        dest="check_finite",
        action="store_false",
        help="let vectors with NaN or infinity pass; they decode to no finite value",
    )
    _add_backend(parser)
    _add_force(parser)
    parser.set_defaults(run=run_quantize)


def _add_restore(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "restore",
        help="restore the vectors of a quantised file",
        description="Restore the vectors of a quantised file into a .npy file.",
        epilog=RESTORE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="IN", type=Path)
    parser.add_argument("destination", metavar="OUT.npy", type=Path)
    parser.add_argument(
        "--dtype",
        help="float16, bfloat16, float32 or float64 (default: that of the original)",
    )
    parser.add_argument(
        "--rows",
        type=_rows,
        metavar="A:B",
        help="only these entries of the first axis, as in a Python slice",
    )
    _add_backend(parser)
    _add_force(parser)
    parser.set_defaults(run=run_restore)


def _add_inspect(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="say what is in a quantised file, and verify its checksums",
        description="Say what is in a quantised file, and verify its checksums.",
    )
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(run=run_inspect)


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="auto", help="auto (default), reference, cpu, ...")


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="overwrite an existing OUT")


def run_quantize(arguments: argparse.Namespace) -> int:
    """Quantise a file; the exit code."""
    import numpy as np

    from ..quantizer import TurboQuant
    from ..storage.files import reading
    from ..storage.stream import encode_npy, map_npy

    source: Path = arguments.source
    destination: Path = arguments.destination or source.with_suffix(".npz")
    _check_free(destination, arguments.force)
    array = map_npy(source)
    if not array.shape:
        raise CommandError(f"{source} holds a single number; vectors need an axis")
    rotation: Any = arguments.rotation
    if rotation.endswith(".npy"):
        rotation = np.load(rotation, allow_pickle=False)
    quantizer = TurboQuant(
        head_dim=array.shape[-1],
        bits=arguments.bits,
        rotation=rotation,
        seed=arguments.seed,
        hadamard_rounds=arguments.rounds,
        scale=arguments.scale,
        backend=arguments.backend,
    )
    with ProgressBar("quantize", "vectors") as progress:
        encode_npy(
            array,
            destination,
            quantizer,
            dtype=arguments.dtype,
            check_finite=arguments.check_finite,
            progress=progress,
        )
    with reading(destination) as contents:
        print(f"{destination}: {_summary(_facts(contents))}")
    return 0


def run_restore(arguments: argparse.Namespace) -> int:
    """Restore a file; the exit code."""
    from ..storage import decode_npy, open

    _check_free(arguments.destination, arguments.force)
    with ProgressBar("verify", "bytes") as progress:
        quantized = open(
            arguments.source, verify=True, backend=arguments.backend, progress=progress
        )
    if arguments.rows is not None:
        if quantized.ndim == 1:
            raise CommandError(f"{arguments.source} holds a single vector; --rows needs several")
        quantized = quantized[arguments.rows]
    with ProgressBar("restore", "vectors") as progress:
        decode_npy(quantized, arguments.destination, dtype=arguments.dtype, progress=progress)
    dtype = arguments.dtype or quantized.dtype
    print(f"{arguments.destination}: {_shape_text(quantized.shape)} {dtype}")
    return 0


def run_inspect(arguments: argparse.Namespace) -> int:
    """Describe and verify a file; the exit code."""
    from ..storage.files import reading, verify_checksums

    with reading(arguments.file) as contents, ProgressBar("verify", "bytes") as progress:
        verify_checksums(contents, progress)
        facts = _facts(contents)
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    rotation = facts["rotation"]
    if facts["seed"] is not None:
        rotation += f", seed {facts['seed']}"
    if facts["hadamard_rounds"] is not None:
        rotation += f", {facts['hadamard_rounds']} rounds"
    print(f"{arguments.file}: {_summary(facts)}")
    for label, text in {
        "rotation": rotation,
        "scale": facts["scale"],
        "bits": f"{facts['bits']} a coordinate, {facts['bits_with_scale']:.4g} with the scales",
        "packed codes": f"{facts['packed_bytes']:,} bytes",
        "scales": f"{facts['scale_bytes']:,} bytes",
        "file": f"{facts['file_bytes']:,} bytes, format version {facts['format_version']}",
        "checksums": "verified",
    }.items():
        print(f"  {label:<13} {text}")
    return 0


def _facts(contents: Any) -> dict[str, Any]:
    """What a file says about itself, and its sizes in bytes."""
    from .._spec import FORMAT_VERSION
    from ..memory import SCALE_BYTES
    from ..packing import packed_size

    metadata = contents.metadata
    sizes = {region.array.name: region.array.nbytes for region in contents.regions}
    num_vectors = sizes["norms"] // SCALE_BYTES
    vector_bits = 8 * (packed_size(metadata.head_dim, metadata.bits) + SCALE_BYTES)
    original_bits = metadata.head_dim * int(metadata.dtype.rpartition("float")[2])
    return {
        "file": contents.file.name,
        "format_version": FORMAT_VERSION,
        "shape": list(metadata.shape),
        "dtype": metadata.dtype,
        "num_vectors": num_vectors,
        "head_dim": metadata.head_dim,
        "bits": metadata.bits,
        "rotation": metadata.rotation,
        "seed": metadata.seed,
        "hadamard_rounds": metadata.hadamard_rounds,
        "scale": metadata.scale,
        "packed_bytes": sizes["packed"],
        "scale_bytes": sizes["norms"],
        "original_bytes": num_vectors * original_bits // 8,
        "file_bytes": os.fstat(contents.file.fileno()).st_size,
        "bits_with_scale": vector_bits / metadata.head_dim,
        "compression": original_bits / vector_bits,
    }


def _summary(facts: dict[str, Any]) -> str:
    return (
        f"{_shape_text(facts['shape'])} {facts['dtype']} in {facts['bits']} bits, "
        f"{facts['compression']:.1f} times smaller"
    )


def _shape_text(shape: Any) -> str:
    return " x ".join(map(str, shape))


def _check_free(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise CommandError(f"{path} exists; --force overwrites it")


def _rows(text: str) -> slice:
    start, colon, stop = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return slice(int(start) if start else None, int(stop) if stop else None)
    except ValueError:
        raise argparse.ArgumentTypeError(f"rows are A:B, A: or :B, got {text!r}") from None
