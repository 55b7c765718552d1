"""Tabulate the oracle's answers to two programs with a backward pass by hand, right ones and altered ones.

    python -m tests.support.backward_table [--every N] [TRUTH …]

writes tests/parity/GRADIENTS.md. For alterations that contain one of the named texts it prints the answers and writes
nothing. program_table.py explains the kinds of answers; here, a false match is one in which something that was given
differs from the unaltered program's.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import npgpt
from npgpt.config import Config
from npgpt.errors import NpgptError
from npgpt.oracle.mistakes import backward_catalogue
from npgpt.oracle.report import Report
from npgpt.parameters import Array, schema
from tests.support import backward
from tests.support.backward import Alteration
from tests.support.models import random_arrays, random_ids, small
from tests.support.program_table import (
    KINDS,
    SEEN,
    Answer,
    cell,
    classify,
    confused,
    faults,
    fresh_arrays,
    largest_ratio,
    reference,
    run_all,
)

CONFIGS = {
    "tied": small(),
    "untied": small(n_embd=32, n_head=2, n_layer=3, tie_word_embeddings=False),
}
ARRAYS = {"random": random_arrays, "fresh": fresh_arrays}
SETTINGS = ("random tied", "random untied", "fresh untied", "fresh tied")
GIVEN = ("stages", "parameters")
COLUMNS = [(setting, given) for setting in SETTINGS for given in GIVEN]
EVERY = 4  # of its eight columns, an alteration is tried in two, of either shape: all take an hour
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """A model, and what it is trained on."""

    config: Config
    arrays: Mapping[str, Array]
    ids: NDArray[Any]
    targets: NDArray[Any]

    def run(self, alteration: Alteration, dtype: str = "float32") -> dict[str, Any]:
        """Return a program's loss, stages and gradients."""
        found: dict[str, Any] = backward.load(alteration.program, alteration.edits).run(
            self.arrays, self.config, self.ids, self.targets, dtype
        )
        return found

    def given(self, shown: Mapping[str, Any], given: str) -> dict[str, Any]:
        """Return all that a program shows, or the loss and the gradients of parameters alone."""
        known = {"loss", *(f"d.{name}" for name in schema(self.config))}
        return {name: array for name, array in shown.items() if given == "stages" or name in known}

    def report(self, shown: Mapping[str, Any], given: str) -> Report:
        """Return the oracle's report on what a program shows."""
        model = reference(self.config, self.arrays)
        return npgpt.check(self.given(shown, given), self.ids, model, targets=self.targets)


@cache
def batch(setting: str, seed: int = 0) -> Batch:
    """Return 3 rows of 11 tokens with the next ids as targets; padding, and in another row a prompt, do not count."""
    weights, shape = setting.split()
    config = CONFIGS[shape]
    tokens = random_ids(config, (3, 12), seed)
    targets = tokens[:, 1:].copy()
    targets[0, 8:] = targets[1, :2] = IGNORED
    return Batch(config, ARRAYS[weights](config, seed), tokens[:, :-1], targets)


@cache
def usual(program: str, setting: str) -> dict[str, Any]:
    """Return what the unaltered program shows."""
    return batch(setting).run(Alteration(program, "", ()))


@cache
def names(setting: str) -> frozenset[str]:
    """Return the catalogue's names of mistakes in the backward pass."""
    one = batch(setting)
    return frozenset(each.name for each in backward_catalogue(one.config, len(one.ids), True, True, np.inf, np.inf))


def change(theirs: Mapping[str, Any], right: Mapping[str, Any]) -> float:
    """Return the largest relative change of anything that both programs show."""
    changes = [0.0]
    for name in theirs.keys() & right.keys():
        a, b = (np.where(np.isinf(x[name]), 0, x[name]) for x in (theirs, right))
        if a.shape != b.shape or not np.isfinite(a).all():
            return np.inf
        changes.append(float(np.sqrt(np.square(a - b).mean() / max(np.square(b).mean(), 1e-30))))
    return max(changes)


def answer(case: tuple[Alteration, str, str]) -> Answer:
    """Return the oracle's answer to an alteration in a setting, from "stages" or from "parameters"."""
    alteration, setting, given = case
    one = batch(setting)
    head = (alteration.program, alteration.truth, bool(alteration.right & names(setting)))
    try:
        shown = one.run(alteration)
        report = one.report(shown, given)
    except NpgptError as error:
        return Answer(*head, "refused", str(error), weights=setting, given=given)
    except Exception as error:
        return Answer(*head, "CRASH", f"{type(error).__name__}: {error}", weights=setting, given=given)
    changed = change(one.given(shown, given), usual(alteration.program, setting))
    kind, said = classify(report, alteration.right, changed)
    largest = max((len(finding.mistakes) for finding in report.diagnosis.findings), default=0)
    return Answer(*head, kind, said, largest_ratio(report), largest, setting, given)


@dataclass(frozen=True)
class Right:
    """A rewrite that is right, and how it is run."""

    alteration: Alteration
    setting: str
    dtype: str
    given: str
    seed: int


def right_runs() -> Iterator[Right]:
    """Yield every rewrite in every setting and dtype, with stages and without them in turn."""
    for number, alteration in enumerate(backward.rewrites()):
        for place, setting in enumerate(SETTINGS):
            for dtype in SEEN:
                yield Right(alteration, setting, dtype, GIVEN[(number + place) % 2], number)


def answer_right(right: Right) -> Answer:
    """Return "right" for a right run that matches, "ALARM" or "CRASH" otherwise. Targets are random."""
    what = f"{right.alteration.truth} in {right.dtype}"
    head = (right.alteration.program, what, False)
    one, rng = batch(right.setting, right.seed), np.random.default_rng(right.seed)
    targets = rng.integers(0, one.config.vocab_size, one.ids.shape)
    targets[rng.random(targets.shape) < 0.2] = IGNORED
    one = Batch(one.config, one.arrays, one.ids, targets)
    try:
        report = one.report(one.run(right.alteration, right.dtype), right.given)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        return Answer(*head, "CRASH", said, weights=right.setting, given=right.given)
    kind = "right" if report.matches else "ALARM"
    return Answer(*head, kind, report.verdict, largest_ratio(report), 1, right.setting, right.given)


# The file.


def summary(answers: Sequence[Answer]) -> Iterator[str]:
    """Yield the counts, as a table."""
    kinds = [*KINDS, "WRONG", "FALSE MATCH", "CRASH"]
    yield "| alterations | all | " + " | ".join(kinds) + " | named |"
    yield "| --- |" + " ---: |" * (2 + len(kinds))
    for program in backward.TEXTS:
        for setting in SETTINGS:
            for given in GIVEN:
                for known in (True, False):
                    key = (program, setting, given, known)
                    some = [a for a in answers if (a.program, a.weights, a.given, a.known) == key]
                    if not some:
                        continue
                    count = Counter(a.kind for a in some)
                    named = count["right"] + count["class"] + count["partly"]
                    clear = len(some) - count["unseen"] - count["too small"] - count["refused"]
                    share = f"{named / max(clear, 1):.0%} of {clear}" if known else ""
                    what = f"{program}, {setting}, from {given}, {'in' if known else 'not in'} the catalogue"
                    numbers = " | ".join(str(count[kind]) for kind in kinds)
                    yield f"| {what} | {len(some)} | {numbers} | {share} |"


def document(answers: Sequence[Answer], right: Sequence[Answer]) -> Iterator[str]:
    """Yield the lines of the file."""
    yield "# What the oracle says of gradients of others"
    yield ""
    yield "Made by `python -m tests.support.backward_table`: the two programs of tests/support/backward/, c_like in the"
    yield "manner of llm.c and functions of PyTorch's autograd functions, one alteration of a text at a time. Tied is a"
    yield "model of 2 blocks of 3 × 7, untied one of 3 blocks of 2 × 16. Both get 3 rows of 11 tokens; 5 targets are"
    yield "ignored. From parameters: the loss and the parameters' gradients alone. From stages: those of stages and"
    yield "the stages, too. tests/support/program_table.py explains the kinds of answers. Named is the share of the"
    yield "alterations in the catalogue that show clearly in what was given. Each alteration is tried in some columns."
    yield ""
    yield from summary(answers)
    yield ""
    alarms = sum(a.kind != "right" for a in right)
    yield f"Right runs, rewrites in every setting, in float32 and in bfloat16: {len(right)}, of which alarms: {alarms}."
    yield from confused(answers, GIVEN)
    yield ""
    yield "## What must not be"
    yield ""
    yield from [*faults(answers), *faults(right)] or ["Nothing."]
    yield ""
    yield "## Each alteration"
    yield ""
    yield "| program | alteration | " + " | ".join(", ".join(column) for column in COLUMNS) + " |"
    yield "|" + " --- |" * (2 + len(COLUMNS))
    rows: dict[tuple[str, str, int], dict[tuple[str, str], str]] = {}
    seen: Counter[tuple[str, str, str, str]] = Counter()
    known = {a.truth for a in answers if a.known}
    for a in answers:
        place = (a.program, a.truth, a.weights, a.given)
        rows.setdefault((a.program, a.truth, seen[place]), {})[a.weights, a.given] = cell(a)
        seen[place] += 1
    for (program, truth, _), cells in rows.items():
        mark = "" if truth in known else " (unknown)"
        yield f"| {program} | {truth}{mark} | " + " | ".join(cells.get(column, "") for column in COLUMNS) + " |"


def chosen(every: int = 1, texts: Sequence[str] = ()) -> tuple[list[tuple[Alteration, str, str]], list[Right]]:
    """Return the cases and the right runs whose truth contains one of the texts (default: all).

    Of an alteration's columns, every `every`th is taken, beginning with another one for each alteration in turn.
    """

    def wanted(alteration: Alteration) -> bool:
        return not texts or any(text in alteration.truth for text in texts)

    some = [each for each in backward.mistakes() if wanted(each)]
    cases = [(each, *column) for number, each in enumerate(some) for column in COLUMNS[number % every :: every]]
    return cases, [each for each in right_runs() if wanted(each.alteration)]


def main() -> int:
    """Write the file; for named alterations, only print the answers."""
    parser = argparse.ArgumentParser(description="What the oracle says of gradients of others.")
    parser.add_argument("texts", nargs="*", metavar="TRUTH", help="alterations that contain one alone; writes no file")
    parser.add_argument("--every", type=int, default=EVERY, metavar="N", help="every Nth column (%(default)s)")
    options = parser.parse_args()
    cases, right = chosen(options.every, options.texts)
    lines = list(document(run_all(answer, cases), run_all(answer_right, right)))
    print("\n".join(lines if options.texts else lines[: lines.index("## Each alteration")]))
    if not options.texts:
        (Path(__file__).parents[1] / "parity" / "GRADIENTS.md").write_text("\n".join(lines) + "\n", "utf-8")
    return "Nothing." not in lines


if __name__ == "__main__":
    sys.exit(main())
