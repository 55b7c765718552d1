"""The command line: what every verb shares. Nothing here computes, and NumPy is imported by the verbs alone."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..errors import NpgptError
from . import generate, inspect, tokens

INTERRUPTED = 128 + 2  # as a shell reports a process that SIGINT ended
PIPE_CLOSED = 128 + 13  # and SIGPIPE


class Parser(argparse.ArgumentParser):
    """argparse, with a wrong argument told in one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where the help is; exit code 2."""
        self.exit(2, f"npgpt: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 2 for bad input, 130 after Ctrl-C, 141 for a closed pipe."""
    parser = Parser(
        prog="npgpt",
        description="GPT-2 in pure NumPy, on a CPU.",
        epilog='example: npgpt generate "It is a truth universally acknowledged"',
    )
    parser.add_argument("--version", action="version", version=f"npgpt {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb in (generate, tokens, inspect):
        verb.add(verbs)
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where a terminal lacks a character, \u20ac and not an error
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or Python complains as it flushes on the way out
        return PIPE_CLOSED
    except (NpgptError, OSError) as error:
        print(f"npgpt: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except MemoryError:
        print("npgpt: error: not enough memory for this model in this dtype", file=sys.stderr)
        return 2
