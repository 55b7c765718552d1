"""docs/reading.md: its blocks print what it shows, and each exercise has the answer that it states."""

from __future__ import annotations

import re
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

from npgpt import model
from tests.support import documents
from tests.support.documents import ROOT, Block

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


def test_there_are_ten() -> None:
    assert [int(exercise.split()[1].rstrip(".")) for exercise in EXERCISES] == list(range(1, 11))


def test_the_tour_prints_what_it_shows(tmp_path: Path) -> None:
    path, names = tmp_path / "tour.md", dict[str, Any]()
    path.write_text(TOUR, "utf-8")
    for block in documents.blocks(path):
        out = documents.run(block, tmp_path, names)
        assert block.agrees(out), f"{block.text}\nshown:\n{block.shown}\nprinted:\n{out}"


@pytest.mark.usefixtures("few_pairs")
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.splitlines()[0].removeprefix("### "))
def test_an_exercise_has_its_answer(exercise: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(altered(exercise), monkeypatch)
    out = printed(exercise, tmp_path)
    assert documents.matches(answer(exercise), out, exactly=False), f"shown:\n{answer(exercise)}\nprinted:\n{out}"


def test_without_the_change_the_answer_is_another(tmp_path: Path) -> None:
    """The other exercises with a change have answers that begin with Differs."""
    (exercise,) = (text for text in EXERCISES if "diff" in text and "Differs" not in answer(text))
    assert not documents.matches(answer(exercise), printed(exercise, tmp_path), exactly=False)
