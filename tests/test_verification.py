"""docs/verification.md has the largest difference that tests report for each comparison."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support import verification
from tests.support.documents import ROOT


def test_the_largest_of_each_comparison_is_shown() -> None:
    node = SimpleNamespace(user_properties=[("somebody's", "own")])
    report = verification.reporter(cast(pytest.FixtureRequest, SimpleNamespace(node=node)))
    report("model", "transformers: logits", "float64", 1e-15)
    report("model", "transformers: logits", "float64", 2.04e-15)
    report("model", "Another: logits", "float32", 3e-7)
    report("text", "transformers: ids", "ids", 0)
    lines = list(verification.document(verification.largest(node.user_properties)))
    begin = lines.index("## The model")
    assert lines[begin + 5 : begin + 9] == [
        "| compared with | float64 | float32 |",
        "|---|---|---|",
        "| Another: logits |  | 3.0e-07 |",
        "| transformers: logits | 2.0e-15 |  |",
    ]
    assert lines[-1] == "| transformers: ids | equal |"
    with pytest.raises(AssertionError):
        report("no table", "transformers: ids", "ids", 0)


@pytest.mark.parametrize(
    ("stats", "options", "written"),
    [({}, {}, True), ({"failed": []}, {}, True), ({"error": [1]}, {}, False), ({}, {"workerinput": {}}, False)],
)
def test_a_run_that_failed_writes_nothing(tmp_path: Any, stats: Any, options: Any, written: bool) -> None:
    path = tmp_path / "verification.md"
    config = SimpleNamespace(getoption=lambda name: path, **options)
    reporter = SimpleNamespace(stats=stats, config=config, write_line=lambda line: None)
    verification.summarise(cast(pytest.TerminalReporter, reporter))
    assert path.exists() == written


def test_the_file_has_every_table() -> None:
    """The parity session of CI compares the rows; this test needs no other package."""
    text = (ROOT / "docs" / "verification.md").read_text("utf-8")
    assert verification.PREFACE in text
    assert re.findall("^## (.*)", text, re.MULTILINE) == [heading for heading, _ in verification.TABLES.values()]
