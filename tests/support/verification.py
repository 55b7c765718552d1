"""What a parity run compared, with what, and how large the differences were.

    pytest -m parity --verification=docs/verification.md

writes the tables of that file. Tests hand in their figures by the fixture `difference`, as properties of their reports,
which pytest-xdist carries from its processes to the one that writes.
"""

from __future__ import annotations

import importlib.metadata
import platform
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Report = Callable[[str, str, str, float], None]  # table, row, column, difference

# each table's heading, and what its figures are
TABLES = {
    "model": (
        "The model",
        "Random weights in many shapes, and in the shape of gpt2 where the row says so. A figure is the largest\n"
        "difference of any number in any stage compared, relative to the largest absolute value of that stage.",
    ),
    "gradients": (
        "Gradients",
        "The loss's gradient with respect to every parameter. A figure is the largest difference of any number,\n"
        "relative to the largest absolute value of that gradient; in float32 root mean squares are compared.",
    ),
    "checkpoints": (
        "Checkpoints",
        "Each file is written by the program named. Its weights, loaded directly and after `npgpt convert`, equal the\n"
        "program's bit for bit. A figure is the largest difference of a logit, relative to the largest logit.",
    ),
    "sampling": ("Sampling", "A figure is the largest difference of a probability, relative to the largest one."),
    "scores": (
        "Scores",
        "The embedded model in float64. A figure is the relative difference of a sum of log-probabilities, or of a\n"
        "perplexity.",
    ),
    "text": ("Token ids and text", "Two sequences of ids are equal or they are not: there is no tolerance."),
}
PACKAGES = ("torch", "transformers", "peft", "gguf", "safetensors", "llms-from-scratch", "lm_eval", "numpy")

PREFACE = """\
# What has been compared with what

`pytest -m parity --verification=docs/verification.md` runs the real packages beside npgpt and writes this file. Every
figure is the largest one of that run. The last digits differ from machine to machine.

- float64 figures near 1e-15 are rounding: two programs add the same numbers in another order.
- float32 figures stay below a bound derived from the number of roundings (`tests/support/tolerances.py`). The bound is
  small enough to tell GPT-2's GELU from the exact one.

Four more comparisons have files of their own. [PROGRAMS.md](../tests/parity/PROGRAMS.md),
[GRADIENTS.md](../tests/parity/GRADIENTS.md) and [ORACLE.md](../tests/parity/ORACLE.md) list what `npgpt.check` answers
for right and for altered programs.
[TOKENIZERS.md](../tests/parity/TOKENIZERS.md) lists every setting of a tokenizer's folder.

The ordinary tests need no other package. They compare the error function with `math.erf`, token ids with the textbook
algorithm for byte-pair encoding, and the embedded model with logits and greedy text that another program recorded when
the model was trained. `tests/published/` compares the real gpt2 with numbers that others published. These tests run
where the weights are found and are skipped elsewhere: no automatic run has the real weights.
"""


def version(package: str) -> str:
    """Return the installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def add_option(parser: pytest.Parser) -> None:
    """Declare --verification."""
    parser.addoption("--verification", type=Path, metavar="FILE", help="write what a parity run compared")


def reporter(request: pytest.FixtureRequest) -> Report:
    """Return a function that takes down a difference for a row and a column of a table; 0 is shown as "equal"."""

    def report(table: str, row: str, column: str, error: float) -> None:
        assert table in TABLES
        request.node.user_properties.append(("difference", (table, row, column, float(error))))

    return report


def largest(properties: Iterable[tuple[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the largest difference of each table, row and column."""
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in TABLES}
    for name, value in properties:
        if name == "difference":
            table, row, column, error = value
            cells = found[table].setdefault(row, {})
            cells[column] = max(cells.get(column, 0.0), error)
    return found


def document(tables: dict[str, dict[str, dict[str, float]]]) -> Iterator[str]:
    """Yield the lines of docs/verification.md: rows in the order of their names, columns float64 first."""
    yield from PREFACE.splitlines()
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    machine = f"{platform.system()} on {platform.machine()}, Python {platform.python_version()}"
    yield from ("", *textwrap.wrap(f"This run: {machine}, {versions}.", 120))
    for name, (heading, explanation) in TABLES.items():
        rows = tables[name]
        columns = sorted({column for cells in rows.values() for column in cells}, reverse=True)
        yield from ("", f"## {heading}", "", *explanation.splitlines(), "")
        yield f"| compared with | {' | '.join(columns)} |"
        yield "|---|" + "---|" * len(columns)
        for row in sorted(rows, key=str.lower):
            yield f"| {row} | {' | '.join(shown(rows[row].get(column)) for column in columns)} |"


def shown(error: float | None) -> str:
    """Return a cell: nothing where nothing was compared, "equal" where no bit differs."""
    return "" if error is None else "equal" if error == 0 else f"{error:.1e}"


def summarise(reporter: pytest.TerminalReporter) -> None:
    """Print the tables at the end of a run, and write them if --verification asks for it and no test failed.

    A process of pytest-xdist has seen only its own part of the tests, and writes nothing.
    """
    reports = [report for name in ("passed", "failed") for report in reporter.stats.get(name, [])]
    tables = largest(each for report in reports for each in report.user_properties)
    for name, rows in tables.items():
        for row in sorted(rows):
            figures = ", ".join(f"{column} {shown(error)}" for column, error in sorted(rows[row].items()))
            reporter.write_line(f"{name}: {row}: {figures}")
    path: Path | None = reporter.config.getoption("verification")
    if (
        path
        and not hasattr(reporter.config, "workerinput")
        and not reporter.stats.get("failed")
        and not reporter.stats.get("error")
    ):
        path.write_text("\n".join(document(tables)) + "\n", "utf-8")
        reporter.write_line(f"written: {path}")


def relative(ours: float, theirs: float) -> float:
    """Return the relative difference of two numbers."""
    return float(np.abs(ours / theirs - 1))
