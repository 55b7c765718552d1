"""The oracle on programs of many styles: it may fail to explain a mistake, but never gives a wrong explanation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import programs
from tests.support.programs.alterations import alterations
from tests.support.thorough import examples

pytestmark = pytest.mark.parity
pytest.importorskip("torch", reason="extra parity is not installed")
table = pytest.importorskip("tests.support.program_table", reason="extra parity is not installed")

# try every n-th case, correct model and pair; n is prime so that weights, stages and shapes alternate
CASES, RIGHT, PAIRS = table.chosen(1, ())
TRIED = CASES[:: examples(83, 7)]


@pytest.mark.parametrize("program", programs.NAMES)
def test_a_program_as_it_stands_matches(program: str) -> None:
    found = table.answer_right(table.Right(program, "plain", 0, 0))
    assert found.kind == "right", found.said


@pytest.mark.parametrize("program", programs.NAMES)
def test_no_alteration_is_called_by_another_name_or_overlooked(program: str) -> None:
    answers = [table.quiet((table.answer, case)) for case in TRIED if case[0].program == program]
    assert not list(table.faults(answers))


def test_no_alarm_over_a_right_program_however_it_is_run() -> None:
    assert not list(table.faults(table.quiet((table.answer_right, model)) for model in RIGHT[:: examples(31, 1)]))


def test_a_known_alteration_is_named_beside_an_unknown_one() -> None:
    answers = [table.quiet((table.answer_pair, pair)) for pair in PAIRS[:: examples(41, 3)]]
    assert not list(table.faults(answers))
    counted = [answer for answer in answers if answer.kind != "refused"]
    assert sum(answer.kind == "right" for answer in counted) >= 0.8 * len(counted)


def test_the_committed_table_has_the_alterations() -> None:
    text = (Path(__file__).parent / "PROGRAMS.md").read_text("utf-8")
    for each in list(alterations())[:: table.EVERY]:
        assert f"| {each.program} | {each.truth}" in text
