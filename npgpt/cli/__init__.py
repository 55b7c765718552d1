"""The command line. Nothing here computes, and NumPy is imported only by a verb that runs."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import __version__
from ..errors import NpgptError
from . import attend, check, convert, download, generate, inspect, score, tokens, trace
from .options import note

VERBS = {  # a file for each, and what --help says of it
    "generate": (generate, "continue a prompt"),
    "score": (score, "perplexity, and each token's probability"),
    "attend": (attend, "attention weights as a picture"),
    "check": (check, "name the mistake in another implementation"),
    "trace": (trace, "a run's intermediates, in a file"),
    "tokens": (tokens, "a text's token ids and pieces"),
    "inspect": (inspect, "a model's configuration, parameters and file"),
    "convert": (convert, "any GPT-2 checkpoint to safetensors"),
    "download": (download, "fetch a model from the Hugging Face hub"),
}
PIPE_CLOSED = 128 + 13  # as a shell reports a process that SIGPIPE ended


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports a wrong argument in one line and accepts no abbreviated options."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise NpgptError with what is wrong and where the help is."""
        raise NpgptError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 2 for bad input, 141 for a closed pipe.

    Raises KeyboardInterrupt for Ctrl-C.
    """
    try:
        if sys.stdout is None:
            raise NpgptError("standard output is closed")
        if isinstance(sys.stdout, io.TextIOWrapper):  # \\u20ac, not an error, where a terminal lacks the character
            sys.stdout.reconfigure(errors="backslashreplace")
        options = parse(arguments)
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # so that Python's last flush does not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (NpgptError, OSError) as error:
        note(f"error: {error}")
        return 2
    except MemoryError:
        note("error: not enough memory for this model in this dtype")
        return 2


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line, with the verb's `run` among them.

    Raises NpgptError for a wrong one, SystemExit after --help.
    """
    parser = Parser(
        prog="npgpt",
        description="GPT-2 in pure NumPy, on a CPU.",
        epilog='example: npgpt generate "It is a truth universally acknowledged"',
    )
    parser.add_argument("--version", action="version", version=f"npgpt {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (verb, text) in VERBS.items():
        one = verbs.add_parser(name, help=text)
        one.set_defaults(run=verb.run)
        verb.declare(one)
    return parser.parse_args(arguments)
