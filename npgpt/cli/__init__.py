"""The command line. Nothing here computes, and NumPy is imported only by a verb that runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import __version__
from ..checkpoints.files import one_run
from ..errors import NpgptError, reason
from ..process import blas_threads
from . import attend, check, convert, download, explain, generate, inspect, score, tokens, trace
from . import list as listing
from .options import importing, note, tune
from .parser import Parser, check_spelling
from .streams import finish, standard_streams

VERBS = {  # a file for each, and its line in --help
    "generate": (generate, "continue a prompt"),
    "score": (score, "perplexity of texts, and each token's probability"),
    "explain": (explain, "model.py beside what each line computes"),
    "attend": (attend, "draw attention weights"),
    "check": (check, "find the mistake in another implementation"),
    "trace": (trace, "write a run's intermediate arrays to a file"),
    "tokens": (tokens, "a text's token ids"),
    "inspect": (inspect, "a model's configuration, parameters and files"),
    "list": (listing, "the models on this machine"),
    "convert": (convert, "write any GPT-2 checkpoint as safetensors"),
    "download": (download, "fetch a model from the Hugging Face hub"),
}
PIPE_CLOSED = 128 + 13  # as a shell reports a process that SIGPIPE ended


class Version(argparse.Action):
    """--version: npgpt's version, and NumPy's with its BLAS and the number of threads that products use."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        """Print the versions and end."""
        tune()
        with importing():
            import numpy as np

        build: Any = np.show_config(mode="dicts")
        blas = build["Build Dependencies"]["blas"]
        print(f"npgpt {__version__}")
        print(f"NumPy {np.__version__}, {blas['name']} {blas['version']}, threads: {blas_threads()}")
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 2 for bad input or no verb, 141 for a closed pipe.

    A verb may return another one. Raises KeyboardInterrupt for Ctrl-C, and SystemExit after --help.
    """
    with standard_streams(), one_run():
        try:
            if sys.stdout is None:
                raise NpgptError("standard output is closed")
            try:
                options = parse(sys.argv[1:] if arguments is None else arguments)
                code: int = options.run(options)
            finally:
                finish()
            return code
        except BrokenPipeError:
            return PIPE_CLOSED
        except NpgptError as error:
            note(f"error: {error}")
        except OSError as error:
            note(f"error: {reason(error)}")
        except MemoryError:
            note("error: not enough memory for this model in this dtype")
        return 2


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line, with the verb's `run` among them.

    Raises NpgptError for a wrong one, SystemExit after --help.
    """
    parser = Parser(
        prog="npgpt",
        description="GPT-2 in pure NumPy, on a CPU.",
        epilog='example: npgpt generate "It is a truth universally acknowledged"',
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print the versions of npgpt and NumPy and exit")
    parser.set_defaults(run=lambda _: _without_a_verb(parser))
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    parsers: dict[str, Parser] = {}
    for name, (verb, text) in VERBS.items():
        parsers[name] = verbs.add_parser(name, help=text)
        parsers[name].set_defaults(run=verb.run)
        verb.declare(parsers[name])
    if "_ARGCOMPLETE" in os.environ:
        from .completion import complete

        complete([parser, *parsers.values()])
    if arguments:
        check_spelling(parser, parsers, arguments)
    options, unexpected = parser.parse_known_args(arguments)
    if unexpected:
        used = parsers[options.verb]
        way = ": a text with spaces needs quotes" if used.takes_text else ""
        used.error(f"{unexpected[0]!r:.80} is one argument too many{way}")
    return options


def _without_a_verb(parser: Parser) -> int:
    """Print the help; return 2, so that a script notices the missing verb."""
    parser.print_help()
    return 2
