"""The blocks of docs/reading.md print what it shows, and its exercises have the stated answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import documents
from tests.support.reading import EXERCISES, TOUR, altered, answer, printed, use
from tests.support.thorough import examples


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
@pytest.mark.parametrize(
    "exercise", EXERCISES[:: examples(10, 1)], ids=lambda exercise: exercise.splitlines()[0].removeprefix("### ")
)
def test_an_exercise_has_its_answer(exercise: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(altered(exercise), monkeypatch)
    out = printed(exercise, tmp_path)
    assert documents.matches(answer(exercise), out, exactly=False), f"shown:\n{answer(exercise)}\nprinted:\n{out}"


def test_without_the_change_the_answer_is_another(tmp_path: Path) -> None:
    """All other exercises with a change have answers that begin with Differs."""
    (exercise,) = (text for text in EXERCISES if "diff" in text and "Differs" not in answer(text))
    assert not documents.matches(answer(exercise), printed(exercise, tmp_path), exactly=False)
