"""Shell completion by the package argcomplete (extra completion): verbs, options, choices, models and files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any


def complete(parsers: Iterable[argparse.ArgumentParser]) -> None:
    """Print what may come next on a shell's command line and end the process, if argcomplete is installed.

    The first parser is the whole command's, the others are those of the verbs.
    """
    with suppress(ImportError):
        import argcomplete

        whole, *verbs = parsers
        for action in (action for verb in verbs for action in verb._actions):
            if action.choices is None:
                vars(action)["completer"] = COMPLETERS.get(action.dest, _nothing)
        argcomplete.autocomplete(whole, always_complete_options=False)


def _nothing(**_: Any) -> list[str]:
    return []


def _files(prefix: str, **_: Any) -> list[str]:
    """Return the files and folders that begin with the prefix, folders with a slash."""
    folder, begun = os.path.split(prefix)
    with suppress(OSError), os.scandir(os.path.expanduser(folder) or ".") as entries:
        there = sorted((entry.name, entry.is_dir()) for entry in entries if entry.name.startswith(begun))
        shown = [(name, is_folder) for name, is_folder in there if begun or not name.startswith(".")]
        return [os.path.join(folder, name) + "/" * is_folder for name, is_folder in shown]
    return []


def _models(prefix: str, **_: Any) -> list[str]:
    """Return the names of models, and files and folders."""
    from ..checkpoints.places import names

    return [*names(), *_files(prefix)]


def _form_and_folder(prefix: str, **_: Any) -> list[str]:
    return ["raw", "llm.c", *_files(prefix)]  # argcomplete does not tell which of the two values it is


def _published(**_: Any) -> list[str]:
    from ..checkpoints.places import ORGANISATIONS

    return [*ORGANISATIONS]


COMPLETERS: dict[str, Callable[..., list[str]]] = {  # by an argument's name; arguments with choices complete those
    **dict.fromkeys(("model", "source"), _models),
    **dict.fromkeys(("files", "theirs", "html", "resume", "prompts", "output", "folder"), _files),
    "to": _form_and_folder,
    "name": _published,
}
