"""``turboquant-np demo``: what 1 to 8 bits do to the keys and values of a real language model."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from importlib.resources import files
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from . import CommandError
from .table import format_table, significant

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..quantizer import TurboQuant

    Floats = npt.NDArray[np.float64]

BITS = (1, 2, 3, 4, 5, 6, 8)
OFFSET_TOKENS = 64  # the key offset of a head is the mean of its first 64 keys
DEFAULT_PLOT = "turboquant_demo.png"

EPILOG = """\
examples:
  turboquant-np demo
  turboquant-np demo --plot errors.svg
  turboquant-np demo --scale mse --bits 2 3 4 --no-plot

The data come with the package: 3 layers of SmolLM2-135M-Instruct, 256 tokens of English prose.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="real keys and values at 1 to 8 bits: errors, theory, a plot",
        description="Quantise the keys and values of a real language model at several bit widths, "
        "and measure what it does to them, to attention scores and to attention outputs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--bits", type=int, nargs="+", default=BITS, metavar="B", help="bit widths, from 1 to 8"
    )
    parser.add_argument(
        "--scale",
        default="norm",
        choices=["norm", "mse", "unbiased"],
        help="what is stored beside the codes: the norm, as in the paper (default), the scale of "
        "least error, or the one that makes inner products unbiased",
    )
    parser.add_argument(
        "--rotation", default="hadamard", choices=["hadamard", "haar"], help="default: hadamard"
    )
    parser.add_argument("--backend", default="auto", help="auto (default), reference, cpu, ...")
    plot = parser.add_mutually_exclusive_group()
    plot.add_argument(
        "--plot",
        metavar="PATH",
        help=f"where to draw the errors, .png, .svg or .pdf (default: {DEFAULT_PLOT} in the "
        "current folder if matplotlib is installed)",
    )
    plot.add_argument("--no-plot", action="store_true", help="draw nothing")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Sample:
    """Real attention inputs, float64; see turboquant_np/data/README.md.

    Attributes
    ----------
    keys, values : [layers, kv_heads, tokens, head_dim]
    queries : [layers, query_heads, num_queries, head_dim], those of the last tokens
    """

    keys: Floats
    values: Floats
    queries: Floats


@dataclass(frozen=True)
class Row:
    """What one bit width does; errors are squared and relative where not said otherwise."""

    bits: int
    bytes_per_vector: int
    ratio_to_float16: float
    key_error: float
    value_error: float
    expected_error: float  # of a Haar rotation, scale "norm"
    lower_bound: float
    upper_bound: float
    score_rms_error: float  # of q . k / sqrt(d), not relative: what softmax sees
    output_error: float
    kl: float  # of attention weights, nats
    kl_with_key_offset: float


def load_sample() -> Sample:
    """The sample that comes with the package."""
    import numpy as np

    with (
        (files("turboquant_np.data") / "smollm2_kv.npz").open("rb") as file,
        np.load(file) as arrays,
    ):
        keys, values, queries = (
            arrays[name].astype(np.float64) for name in ("keys", "values", "queries")
        )
    return Sample(keys, values, queries)


def attend(queries: Floats, keys: Floats, values: Floats) -> tuple[Floats, Floats, Floats]:
    """Causal grouped-query attention of the last tokens.

    Returns
    -------
    scores, log_weights : [layers, query_heads, num_queries, tokens]; -inf where masked
    outputs : [layers, query_heads, num_queries, head_dim]
    """
    import numpy as np

    group = queries.shape[1] // keys.shape[1]
    tokens, head_dim = keys.shape[2:]
    positions = np.arange(tokens - queries.shape[2], tokens)
    masked = np.arange(tokens) > positions[:, None]
    scores = queries @ np.repeat(keys, group, axis=1).swapaxes(-1, -2) / np.sqrt(head_dim)
    scores = np.where(masked, -np.inf, scores)
    highest = scores.max(axis=-1, keepdims=True)
    log_weights = scores - highest
    log_weights -= np.log(np.exp(log_weights).sum(axis=-1, keepdims=True))
    return scores, log_weights, np.exp(log_weights) @ np.repeat(values, group, axis=1)


def measure(sample: Sample, tq: TurboQuant) -> Row:
    """Encode and decode keys and values, and attend to what came back."""
    import numpy as np

    from ..theory import expected_mse, get_theory_bounds

    def restore(x: Floats) -> Floats:
        decoded = tq.decode(*tq.encode(x.astype(np.float32)), dtype=np.float32)
        return np.asarray(decoded, np.float64)

    def relative(x: Floats, y: Floats) -> float:
        """Mean over vectors of the squared error over the squared length."""
        return float((((y - x) ** 2).sum(axis=-1) / (x**2).sum(axis=-1)).mean())

    scores, log_weights, outputs = attend(sample.queries, sample.keys, sample.values)
    seen = np.isfinite(scores)

    def kl(log_weights_restored: Floats) -> float:
        """Mean over queries of KL(exact || restored)."""
        difference = np.subtract(
            log_weights, log_weights_restored, where=seen, out=np.zeros_like(scores)
        )
        return float((np.exp(log_weights) * difference).sum(axis=-1).mean())

    keys, values = restore(sample.keys), restore(sample.values)
    offset = sample.keys[:, :, :OFFSET_TOKENS].mean(axis=2, keepdims=True)
    keys_by_offset = restore(sample.keys - offset) + offset
    scores_restored, log_weights_restored, outputs_restored = attend(sample.queries, keys, values)
    _, log_weights_by_offset, _ = attend(sample.queries, keys_by_offset, values)
    lower, upper = get_theory_bounds(tq.bits)
    return Row(
        bits=tq.bits,
        bytes_per_vector=tq.packed_dim + 4,
        ratio_to_float16=tq.compression_ratio(),
        key_error=relative(sample.keys, keys),
        value_error=relative(sample.values, values),
        expected_error=expected_mse(tq.head_dim, tq.bits),
        lower_bound=lower,
        upper_bound=upper,
        score_rms_error=float(np.sqrt(((scores_restored[seen] - scores[seen]) ** 2).mean())),
        output_error=float(((outputs_restored - outputs) ** 2).sum() / (outputs**2).sum()),
        kl=kl(log_weights_restored),
        kl_with_key_offset=kl(log_weights_by_offset),
    )


def run(arguments: argparse.Namespace) -> int:
    from .. import TurboQuant

    if arguments.plot and find_spec("matplotlib") is None:
        raise CommandError("--plot needs matplotlib: pip install 'turboquant-np[plot]'")
    sample = load_sample()
    rows = [
        measure(
            sample,
            TurboQuant(
                head_dim=sample.keys.shape[-1],
                bits=bits,
                scale=arguments.scale,
                rotation=arguments.rotation,
                backend=arguments.backend,
            ),
        )
        for bits in sorted(set(arguments.bits))
    ]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(report(sample, rows))
    if arguments.plot or not (arguments.no_plot or arguments.json):
        plot(rows, arguments.plot, quiet=arguments.json)
    return 0


def report(sample: Sample, rows: list[Row]) -> str:
    """The table and what one sees in it."""
    layers, kv_heads, tokens, head_dim = sample.keys.shape
    query_heads, num_queries = sample.queries.shape[1:3]
    table = format_table(
        [
            "bits",
            "bytes a\nvector",
            "times\nsmaller",
            "error of\nkeys",
            "error of\nvalues",
            "theory",
            "lower\nbound",
            "upper\nbound",
            "error of\nscores",
            "error of\noutput",
            "KL of\nsoftmax",
        ],
        [
            [
                f"{row.bits}",
                f"{row.bytes_per_vector}",
                f"{row.ratio_to_float16:.1f}",
                significant(row.key_error),
                significant(row.value_error),
                significant(row.expected_error),
                significant(row.lower_bound),
                significant(row.upper_bound),
                f"{row.score_rms_error:.3f}",
                significant(row.output_error),
                significant(row.kl),
            ]
            for row in rows
        ],
    )
    middle = min(rows, key=lambda row: abs(row.bits - 4))
    plural = "s" if middle.bits > 1 else ""
    before, after = significant(middle.kl), significant(middle.kl_with_key_offset)
    return f"""\
Keys, values and queries of SmolLM2-135M-Instruct: {layers} layers, {kv_heads} KV heads, \
{tokens} tokens, vectors of {head_dim}.
Attention: {query_heads} heads, the last {num_queries} tokens as queries, causal.

{table}

Errors are squared and relative to the squared length; that of scores, q.k/sqrt({head_dim}), is the
root mean square, KL is in nats. `theory` is the exact expectation over rotations, whatever the
data are; the bounds are those of the paper. Nothing was trained, and real data follow the theory.
Subtracting a head's mean key (first {OFFSET_TOKENS} tokens) before encoding is exact under softmax:
it takes the KL at {middle.bits} bit{plural} from {before} to {after}."""


def plot(rows: list[Row], path: str | None, *, quiet: bool) -> None:
    """Draw the rows if matplotlib is there, and say where."""
    if find_spec("matplotlib") is None:
        print("\nFor a plot of this: pip install 'turboquant-np[plot]', then run the demo again.")
        return
    from .demo_plot import draw

    written = draw(rows, path or DEFAULT_PLOT)
    if not quiet:
        print(f"\nPlot: {written}")
