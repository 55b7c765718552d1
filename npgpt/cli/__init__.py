"""The command line. Nothing here computes, and NumPy is imported only by a verb that runs."""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import __version__
from ..checkpoints.files import one_run
from ..errors import NpgptError
from . import attend, check, convert, download, explain, generate, inspect, score, tokens, trace
from .options import note
from .streams import finish, paint, standard_streams

VERBS = {  # a file for each, and what --help says of it
    "generate": (generate, "continue a prompt"),
    "score": (score, "perplexity, and each token's probability"),
    "explain": (explain, "model.py beside what each line computes"),
    "attend": (attend, "attention weights as a picture"),
    "check": (check, "name the mistake in another implementation"),
    "trace": (trace, "a run's intermediates, in a file"),
    "tokens": (tokens, "a text's token ids and pieces"),
    "inspect": (inspect, "a model's configuration, parameters and file"),
    "convert": (convert, "any GPT-2 checkpoint to safetensors"),
    "download": (download, "fetch a model from the Hugging Face hub"),
}
AFTER = "a text that begins like an option goes after --"
PIPE_CLOSED = 128 + 13  # as a shell reports a process that SIGPIPE ended


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports a wrong argument in one line and accepts no abbreviated options."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise NpgptError with what is wrong and where the help is."""
        raise NpgptError(f"{message} (see {self.prog} --help)")

    def print_help(self, file: Any = None) -> None:
        """Print the help, which newer Pythons colour."""
        paint(self.format_help().rstrip("\n"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 2 for bad input, 141 for a closed pipe.

    Raises KeyboardInterrupt for Ctrl-C, and SystemExit after --help.
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
        except (NpgptError, OSError) as error:
            note(f"error: {error}")
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
    parser.add_argument("--version", action="version", version=f"npgpt {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    parsers = {}
    for name, (verb, text) in VERBS.items():
        parsers[name] = verbs.add_parser(name, help=text)
        parsers[name].set_defaults(run=verb.run)
        verb.declare(parsers[name])
    options, unknown = parser.parse_known_args(arguments)
    check_spelling(parsers[options.verb], arguments, options, unknown)
    return options


def check_spelling(
    parser: argparse.ArgumentParser, arguments: Sequence[str], options: argparse.Namespace, unknown: Sequence[str]
) -> None:
    """Raise NpgptError for options that a verb does not have, with the nearest one that it has.

    argparse takes an argument for a text, not for an option, where there is a space in it.
    """
    own = [name for action in parser._actions for name in action.option_strings]
    given = [getattr(options, action.dest, None) for action in parser._actions if not action.option_strings]
    texts = Counter(text for value in given if value for text in (value if isinstance(value, list) else [value]))
    after = Counter(arguments[arguments.index("--") + 1 :] if "--" in arguments else ())
    for text in (Counter(unknown) + texts) - after:
        import difflib  # only a mistake needs it

        name = re.split(r"[\s=]", text)[0]
        nearest = [option for option in own if option.startswith(name)] or difflib.get_close_matches(name, own, 1)
        if name in own and text in unknown:
            parser.error(f"{name} goes after the verb")
        elif name in own:
            parser.error(f"{text!r:.80} is one argument: {name} and its value are two; {AFTER}")
        elif re.match("--[a-zA-Z]" if text not in unknown else "--?[a-zA-Z]", name):
            meant = f" (is {nearest[0]} meant?)" if nearest else ""
            parser.error(f"there is no option {name:.80}{meant}; {AFTER}")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
