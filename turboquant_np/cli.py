"""The command line, ``turboquant-np``: parsing, errors and exit codes.  The work is in `commands`.

Exit codes: 0 done, 1 a check failed, 2 a mistake in the call, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__
from .commands import CommandError

# Each module has add_parser(subparsers), or add_parsers for several commands, and sets `run`: a
# function of the parsed arguments that returns the exit code.  Modules import NumPy, Numba and the
# library inside `run`, so that --help is quick.
COMMANDS = ("demo", "files", "validate", "memory", "doctor", "bench")

DESCRIPTION = """\
Quantise vectors to 1-8 bits a coordinate with TurboQuant (arXiv:2504.19874): close to the least
error possible, with no training data.
"""

EPILOG = """\
start here:
  turboquant-np demo                       real keys and values of a language model, 1 to 8 bits
  turboquant-np doctor                     what works on this machine, and what is missing
  turboquant-np memory --gpu-memory 24     how long a context fits, at every bit width

your own vectors:
  turboquant-np quantize vectors.npy --bits 4
  turboquant-np inspect vectors.npz
  turboquant-np restore vectors.npz restored.npy
  turboquant-np COMMAND --help             options and examples of a command

exit codes: 0 done, 1 a check failed, 2 a mistake in the call, 130 stopped with Ctrl-C
"""

USER_ERRORS = (
    CommandError,
    ValueError,
    TypeError,
    OverflowError,
    OSError,
    ImportError,
    RuntimeError,
    MemoryError,
)


def make_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="turboquant-np",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"turboquant-np {__version__}")
    parser.add_argument(
        "--debug", action="store_true", help="show a traceback when a command fails"
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f"turboquant_np.commands.{name}")
        add = getattr(module, "add_parsers", None) or module.add_parser
        add(subparsers)
    for command in subparsers.choices.values():  # --debug behind the command as well as before it
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; by default those of the process.

    Returns
    -------
    int
        The exit code.

    Raises
    ------
    SystemExit
        From argparse: code 0 for ``--help`` and ``--version``, 2 for arguments it cannot parse.

    Examples
    --------
    >>> from turboquant_np.cli import main
    >>> main(["memory", "--layers", "32", "--kv-heads", "0", "--head-dim", "128"])
    2
    """
    arguments = make_parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` say, has left: nothing to complain about
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except USER_ERRORS as error:
        if arguments.debug:
            raise
        print(f"turboquant-np: error: {one_line(error)}", file=sys.stderr)
        return 2


def one_line(error: BaseException) -> str:
    """What went wrong, without line breaks and error numbers."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
