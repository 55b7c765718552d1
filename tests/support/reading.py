"""The exercises of docs/reading.md, each done as it says.

    python -m tests.support.reading

replaces answers that have changed. Look at what it did to output with `…` in it.
"""

from __future__ import annotations

import re
import tempfile
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

from npgpt import model

from . import documents
from .documents import ROOT, Block

PATH = ROOT / "docs" / "reading.md"
TOUR, *EXERCISES = re.split(r"^(?=### \d+\. )", PATH.read_text("utf-8"), flags=re.MULTILINE)
SOURCE = (ROOT / "npgpt" / "model.py").read_text("utf-8")


def fenced(text: str, *languages: str) -> list[Block]:
    """Return a text's fenced blocks in some languages, without the output behind them."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(PATH, language, content, None) for language, content in found if language in languages]


def altered(exercise: str) -> str:
    """Return model.py with an exercise's changes. Raises AssertionError if a line to replace is not in it once."""
    source = SOURCE
    for block in fenced(exercise, "diff"):
        lines = block.text.splitlines()
        old, new = ("".join(f"{line[1:]}\n" for line in lines if line[0] == sign) for sign in "-+")
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def use(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace model.py's functions and tables, except forward, which other modules have imported."""
    import_module("npgpt.language_model")  # before anything is replaced
    changed = ModuleType("npgpt.changed")
    changed.__package__ = "npgpt"
    exec(compile(source, "changed.py", "exec"), vars(changed))
    body = re.compile(r"^def forward\(.*", re.DOTALL | re.MULTILINE)
    assert body.findall(source) == body.findall(SOURCE)
    for name, value in vars(changed).items():
        if isinstance(value, (FunctionType, dict)) and not name.startswith("__"):
            monkeypatch.setattr(model, name, value)


def printed(exercise: str, folder: Path) -> str:
    """Return what an exercise's commands print, or the commands of all exercises if it has none."""
    names: dict[str, Any] = {}
    commands = fenced(exercise, "sh", "python") or fenced(TOUR, "sh")
    return "".join(documents.run(block, folder, names) for block in commands)


def answer(exercise: str) -> str:
    """Return the output in the answer of an exercise."""
    (block,) = fenced(exercise[exercise.index("<details>") :], "text")
    return block.text


def main() -> None:
    """Replace the answers that have changed."""
    for exercise in EXERCISES:
        with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as folder:
            use(altered(exercise), monkeypatch)
            out, shown = printed(exercise, Path(folder)), answer(exercise)
        if not documents.matches(shown, out, exactly=False):
            print(exercise.splitlines()[0], out, sep="\n")
            after = exercise.replace(f"```text\n{shown}", f"```text\n{documents.renewed(shown, out)}")
            PATH.write_text(PATH.read_text("utf-8").replace(exercise, after), "utf-8")


if __name__ == "__main__":
    main()
