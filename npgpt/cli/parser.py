"""The command line's parser: a wrong argument is answered in one line, with the nearest right one."""

from __future__ import annotations

import argparse
import itertools
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from ..errors import NpgptError, nearest
from .streams import paint

DASHES = "; a text that begins like an option goes after --"
REWORDED = (  # argparse's messages
    (r"argument (\S+): invalid int value: (.*)", r"\1 must be a whole number, not \2"),
    (r"argument (\S+): invalid float value: (.*)", r"\1 must be a number, not \2"),
    (r"argument (\S+): ignored explicit argument (.*)", r"\1 takes no value, and \2 was given"),
    (r"argument (\S+): expected", r"\1 expects"),
    (r"argument (\S+): not allowed with argument (\S+)", r"\1 and \2 exclude each other: give one of them"),
    (r"the following arguments are required: (.*)", r"\1 is missing"),
    (r"one of the arguments (\S+) (\S+) is required", r"give \1 or \2"),
)


class Formatter(argparse.HelpFormatter):
    """argparse's formatter, except that it does not break words at hyphens."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.indent("\n".join(self._split_lines(text, width)), indent)


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises NpgptError instead of printing its usage, and rejects abbreviated options."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=Formatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise NpgptError with what is wrong and how to see the help."""
        for pattern, words in REWORDED:
            message = re.sub(pattern, words, message, count=1)
        raise NpgptError(f"{message} (see {self.prog} --help)")

    def print_help(self, file: Any = None) -> None:
        """Print the help, which recent versions of Python colour."""
        paint(self.format_help().rstrip("\n"))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a value that is none of the choices; argparse calls this."""
        if action.choices is not None and value not in action.choices:
            *most, last = map(str, action.choices)
            name = "/".join(action.option_strings) or action.metavar
            known = f"{', '.join(most)} or {last}"
            self.error(f"{name} must be {known}, not {value!r:.80}{nearest(value, [*most, last])}")

    @property
    def takes_text(self) -> bool:
        """Whether one of its arguments is a text."""
        return any(action.dest in ("text", "prompt") and not action.option_strings for action in self._actions)

    @property
    def takes_value(self) -> dict[str, bool]:
        """Whether each option takes a value, by its spellings."""
        return {name: action.nargs != 0 for action in self._actions for name in action.option_strings}


def check_spelling(parser: Parser, verbs: Mapping[str, Parser], arguments: Sequence[str]) -> None:
    """Raise NpgptError for a verb or options that do not exist, with the nearest ones that do.

    This runs before argparse, which would take an unknown option's value for a text and blame that.
    """
    first, *rest = arguments
    if first in verbs:
        _check_options(verbs[first], rest)
    elif not first.strip("-") or not first.startswith("-"):
        parser.error(f"there is no verb {first!r:.80}{nearest(first, [*verbs, *parser.takes_value])}")
    elif (name := _name(first)) not in parser.takes_value:
        if any(name in verb.takes_value for verb in verbs.values()):
            following = (verbs[text] for text in rest if text in verbs)
            next(following, parser).error(f"{name} goes after the verb")
        parser.error(_unknown([name], {*parser.takes_value}.union(*(verb.takes_value for verb in verbs.values()))))


def _check_options(verb: Parser, arguments: Sequence[str]) -> None:
    """Raise NpgptError for options that a verb does not have.

    argparse takes an argument that contains a space for a text, even if it begins with two dashes.
    """
    if {"-h", "--help"} & {*arguments}:
        return
    known, unknown, before = verb.takes_value, [], ""
    for text in itertools.takewhile(lambda text: text != "--", arguments):
        name, of_option, before = _name(text), known.get(before, False), text
        if not re.match("--[a-zA-Z]" if " " in text else "--?[a-zA-Z]", text) or (of_option and " " in text):
            continue
        if name in known and re.match(r"\s", text[len(name) :]):
            verb.error(f"{text!r:.80} is one argument: {name} and its value are two{DASHES}")
        if name not in known and name[:2] not in known:  # -oFILE is -o FILE
            unknown.append(name)
    if unknown:
        verb.error(f"{_unknown(unknown, known)}{DASHES}")


def _unknown(names: Iterable[str], known: Iterable[str]) -> str:
    """Return the message for unknown options, with the nearest known ones; a prefix of an option means that option."""
    known = sorted(known)
    found = []
    for name in names:
        whole = next((option for option in known if option.startswith(name)), None)
        found.append(f"{name:.80}{f' (did you mean {whole}?)' if whole else nearest(name, known)}")
    return f"there is no option {', nor '.join(found)}"


def _name(text: str) -> str:
    """Return an option's name without its value."""
    return re.split(r"[\s=]", text, maxsplit=1)[0]
