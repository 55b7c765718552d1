"""The oracle on two backward passes by hand: it may fail to explain a mistake, but never gives a wrong explanation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import backward
from tests.support.thorough import examples

pytestmark = pytest.mark.parity
pytest.importorskip("torch", reason="extra parity is not installed")
table = pytest.importorskip("tests.support.backward_table", reason="extra parity is not installed")
quiet = pytest.importorskip("tests.support.program_table", reason="extra parity is not installed").quiet

# every n-th case and right run; n is prime so that alterations, settings and what is given alternate
CASES, RIGHT = table.chosen(1)


@pytest.fixture(scope="module")
def answers() -> list[Any]:
    return [quiet((table.answer, case)) for case in CASES[:: examples(113, 7)]]


def test_no_altered_backward_pass_is_called_by_another_name_or_overlooked(answers: list[Any]) -> None:
    assert not list(table.faults(answers))


def test_nearly_every_altered_backward_pass_is_named(answers: list[Any]) -> None:
    clear = [a for a in answers if a.known and a.kind not in ("unseen", "too small", "refused")]
    assert sum(a.kind in ("right", "class", "partly") for a in clear) >= 0.9 * len(clear)


def test_no_alarm_over_a_right_backward_pass_however_it_is_written() -> None:
    assert not list(table.faults(quiet((table.answer_right, each)) for each in RIGHT[:: examples(29, 1)]))


def test_the_committed_table_has_the_alterations() -> None:
    text = (Path(__file__).parent / "GRADIENTS.md").read_text("utf-8")
    for each in backward.mistakes():
        assert f"| {each.program} | {each.truth}" in text
