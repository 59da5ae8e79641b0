"""``turboquant-np memory``: sizes of KV caches, and how long a context fits."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from . import CommandError
from .table import format_table

if TYPE_CHECKING:
    from ..memory import ModelShape

GIB = 1024**3

EPILOG = """\
examples:
  turboquant-np memory
  turboquant-np memory --model Qwen3-8B Llama-3.1-8B --gpu-memory 16 --bits 4 3
  turboquant-np memory --layers 32 --kv-heads 8 --head-dim 128 --weights-gb 4.5 --gpu-memory 32

Every byte is counted: packed codes and one float32 scale for each key and each value. Models are
those whose layers all attend to the whole context.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "memory",
        help="size of a KV cache and longest context, by model and bit width",
        description="Compute the size of a KV cache and the longest context that fits on a GPU.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", nargs="+", metavar="NAME", help="only these models (or parts of their names)"
    )
    shape = parser.add_argument_group("a model of your own (give all three)")
    shape.add_argument("--layers", type=int, metavar="N")
    shape.add_argument("--kv-heads", type=int, metavar="N")
    shape.add_argument("--head-dim", type=int, metavar="D")
    shape.add_argument(
        "--weights-gb", type=float, metavar="GB", help="size of its weights; default: 0"
    )
    parser.add_argument(
        "--bits", type=int, nargs="+", default=[8, 5, 4, 3, 2], metavar="B", help="8 5 4 3 2"
    )
    parser.add_argument(
        "--context", type=int, default=131_072, metavar="TOKENS", help="default: 131072"
    )
    parser.add_argument(
        "--gpu-memory",
        type=float,
        default=24.0,
        metavar="GB",
        help="in units of 1e9 bytes; default: 24",
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="of the GPU's memory for weights and cache; default: 0.9",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(run=run)


def choose_models(arguments: argparse.Namespace) -> list[ModelShape]:
    """The models the arguments name, or the one they describe."""
    from ..memory import MODELS, ModelShape

    numbers = (arguments.layers, arguments.kv_heads, arguments.head_dim)
    if any(number is not None for number in (*numbers, arguments.weights_gb)):
        if arguments.model:
            raise CommandError("give --model or a model of your own, not both")
        if None in numbers:
            raise CommandError("a model of your own needs --layers, --kv-heads and --head-dim")
        return [ModelShape("your model", *numbers, weight_gb=arguments.weights_gb or 0.0)]
    if not arguments.model:
        return list(MODELS)
    chosen = []
    for name in arguments.model:
        found = [model for model in MODELS if name.lower() in model.name.lower()]
        if not found:
            known = ", ".join(model.name for model in MODELS)
            raise CommandError(
                f"no model called {name!r}; known: {known}. "
                "For another one give --layers, --kv-heads and --head-dim"
            )
        chosen += [model for model in found if model not in chosen]
    return chosen


def describe(model: ModelShape, arguments: argparse.Namespace) -> dict[str, Any]:
    """Bytes and contexts of one model, for float16 and each bit width."""
    from ..memory import kv_bytes_per_token, longest_context

    formats = {"float16": None} | {f"{bits} bits": bits for bits in arguments.bits}
    per_token = {name: kv_bytes_per_token(model, bits) for name, bits in formats.items()}
    return {
        "model": model.name,
        "layers": model.num_layers,
        "kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "weights_gb": model.weight_gb,
        "bytes_per_token": per_token,
        "cache_bytes": {name: size * arguments.context for name, size in per_token.items()},
        "longest_context": {
            name: longest_context(model, bits, arguments.gpu_memory, arguments.utilisation)
            for name, bits in formats.items()
        },
    }


def run(arguments: argparse.Namespace) -> int:
    if arguments.context < 1:
        raise CommandError(f"--context must be at least 1, got {arguments.context}")
    described = [describe(model, arguments) for model in choose_models(arguments)]
    if arguments.json:
        settings = {
            name: getattr(arguments, name) for name in ("context", "gpu_memory", "utilisation")
        }
        print(json.dumps({**settings, "models": described}, indent=2))
    else:
        print(report(described, arguments))
    return 0


def report(described: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """Two tables: sizes, and longest contexts."""
    formats = list(described[0]["bytes_per_token"])
    sizes = format_table(
        ["model", "layers", "KV\nheads", "head\ndim", *formats],
        [
            [
                model["model"],
                str(model["layers"]),
                str(model["kv_heads"]),
                str(model["head_dim"]),
                *(f"{model['cache_bytes'][name] / GIB:.2f}" for name in formats),
            ]
            for model in described
        ],
    )
    contexts = format_table(
        ["model", "weights\nGB", *formats],
        [
            [
                model["model"],
                f"{model['weights_gb']:.1f}",
                *(f"{tokens:,}" if tokens else "-" for tokens in model["longest_context"].values()),
            ]
            for model in described
        ],
    )
    gpu = f"{arguments.gpu_memory:g} GB, {arguments.utilisation:.0%} used"
    return f"""\
KV cache of {arguments.context:,} tokens, in GiB, scales included:

{sizes}

Longest context in tokens on a GPU of {gpu}, beside the weights (- : they do not fit):

{contexts}

Weights of known models are counted at 4.5 bits per parameter."""
