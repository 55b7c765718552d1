"""Which known mistakes explain the differences: one after another, at the first stage that is still unexplained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from ..parameters import Array
from .arithmetic import UNIT, plain
from .mistakes import Mistake
from .rounding import CLEAR, FACTOR, FLIPS, Sample, Tolerances, largest_error, moved, rms, run_all, sampled
from .textbook import Pass, Textbook, located, stages
from .theirs import Case

MOST = 4  # mistakes that are looked for one after another
PAIRED = 24  # entries that are tried in pairs, the most telling ones
LEADING = 4  # those of them that are tried with every other entry
NEAR = 100.0  # tolerances, within which a mistake's own rounding is looked at


@dataclass(frozen=True)
class Finding:
    """A mistake that is there: the only entry that fits, or one of several that this data cannot tell apart. before:
    how many tolerances the difference was without it, where it was greatest. decide: what would tell them apart.
    """

    stage: str
    mistakes: tuple[Mistake, ...]
    before: float
    decide: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What was found; unexplained is the first stage that still differs, left the entries that cannot be excluded."""

    findings: list[Finding]
    unexplained: str | None
    left: list[Mistake]
    faint: bool = False  # what differs is below CLEAR tolerances: too little to name anything


@dataclass
class Judge:
    """All that is held against each other."""

    cases: Sequence[Case]
    stages: list[str]  # that theirs has, in the order of computation
    tolerances: Tolerances
    tensors: Mapping[str, Array]  # float64
    dtype: str
    samples: tuple[Textbook, list[Sample]] | None = None  # of the last book whose own rounding was asked for

    def ratio(self, stage: str, runs: Sequence[Pass]) -> float:
        """Theirs from these runs, in tolerances; with the rounding that the runs' own mistakes bring."""
        if not has(runs, stage):
            return math.inf
        having = [number for number, case in enumerate(self.cases) if stage in case.theirs]
        gap = rms(stage, [self.cases[n].theirs[stage] for n in having], [runs[n][stage] for n in having])
        tolerance = self.tolerances[stage]
        if tolerance < gap < NEAR * tolerance and runs[0].book is not self.tolerances.reference[0].book:
            tolerance = max(tolerance, FACTOR * self._own_rounding(stage, runs))
        return gap / tolerance if tolerance else (0.0 if gap == 0 else math.inf)

    def _own_rounding(self, stage: str, runs: Sequence[Pass]) -> float:
        """The rounding error of these runs in the declared dtype, the largest of some where a formula flips."""
        book = runs[0].book
        if self.samples is None or self.samples[0] is not book:
            variants = moved(self.tensors, self.dtype, FLIPS if book.flips else 1)
            self.samples = (book, list(sampled(book, variants, self.cases, self.dtype)))
        with np.errstate(over="ignore", invalid="ignore"):
            return largest_error(self.samples[1], stage, self.cases, runs)

    def matched(self, runs: Sequence[Pass]) -> int:
        """How many stages, from the first on, these runs explain."""
        return next((at for at, stage in enumerate(self.stages) if self.ratio(stage, runs) > 1), len(self.stages))

    def runs(self, mistake: Mistake, current: Sequence[Pass]) -> list[Pass]:
        """The current runs with one mistake more; what lies below its first block is taken over."""
        known: list[dict[str, Array]] = [{} for _ in current]
        if mistake.first:
            for start, run in zip(known, current, strict=True):
                start.update((k, v) for k, v in run.known.items() if k == "embedding" or -1 < _layer(k) < mistake.first)
        return run_all(mistake.change(current[0].book), self.cases, known)


def _layer(stage: str) -> int:
    """The block of a stage, −1 for none."""
    layer = located(stage)[0]
    return -1 if layer is None else layer


def has(runs: Sequence[Pass], stage: str) -> bool:
    """Whether these runs have the stage: a model with a block missing has one block less."""
    return _layer(stage) < len(runs[0].book.layers)


@dataclass(frozen=True)
class Trial:
    """One entry more than now: how many stages it explains, and how far the first unexplained one then is."""

    entry: Mistake
    reached: int
    ratio: float


def diagnose(judge: Judge, reference: Sequence[Pass], entries: Sequence[Mistake]) -> Diagnosis:
    """See the module."""
    current, rest = list(reference), list(entries)
    findings: list[Finding] = []
    faint = False
    while (depth := judge.matched(current)) < len(judge.stages) and len(findings) < MOST:
        stage = judge.stages[depth]
        before = judge.ratio(stage, current)
        trials = []
        for entry in rest:
            runs = judge.runs(entry, current)
            trials.append(Trial(entry, judge.matched(runs), judge.ratio(stage, runs)))
        best = max((trial.reached for trial in trials), default=0)
        if best > depth:
            fits = [trial.entry for trial in trials if trial.reached == best]
            strongest = max(judge.ratio(name, current) for name in judge.stages[depth:best])
            if strongest < CLEAR:
                return Diagnosis(findings, stage, fits, faint=True)
            groups = [tuple(fits)]
        else:
            groups = _pair(judge, current, depth, before, trials)
            strongest, faint = before, before < CLEAR
            if not groups or faint:
                break
        for group in groups:
            findings.append(Finding(stage, group, strongest, _decide(judge, current, group)))
            rest.remove(group[0])
        for group in groups:
            current = judge.runs(replace(group[0], first=0), current)
    named = {entry.name for finding in findings for entry in finding.mistakes}
    left = [entry for entry in rest if entry.name not in named and not _visible(judge, entry, current)]
    depth = judge.matched(current)
    return Diagnosis(findings, judge.stages[depth] if depth < len(judge.stages) else None, left, faint)


def _pair(
    judge: Judge, current: Sequence[Pass], depth: int, before: float, trials: Sequence[Trial]
) -> list[tuple[Mistake, ...]]:
    """Two mistakes that together explain the stage, each with those that fit in its place: among those that alone bring
    its difference down, and the few that bring it down most with any other, whose own effect may be too small to tell.
    """
    telling = sorted((trial for trial in trials if trial.ratio < before), key=lambda trial: trial.ratio)[:PAIRED]
    pairs = [(one, two) for one, two in combinations(telling, 2)]
    pairs += [(one, two) for one in telling[:LEADING] for two in trials if two not in telling]
    found: list[tuple[int, Mistake, Mistake]] = []
    for one, two in pairs:
        both = Mistake("", "", "", lambda book, a=one.entry, b=two.entry: b.change(a.change(book)))  # type: ignore[misc]
        if (reached := judge.matched(judge.runs(both, current))) > depth:
            found.append((reached, one.entry, two.entry))
    if not found:
        return []
    best = max(reached for reached, _, _ in found)
    (a, b), *others = [(one, two) for reached, one, two in found if reached == best]
    return [
        (a, *(two if one is b else one for one, two in others if b in (one, two))),
        (b, *(two if one is a else one for one, two in others if a in (one, two))),
    ]


def _visible(judge: Judge, entry: Mistake, current: Sequence[Pass]) -> bool:
    """Whether the entry, had it been made, would clearly show somewhere."""
    runs = judge.runs(entry, current)
    for stage in judge.stages:
        if not has(runs, stage):
            return True
        effect = largest_error([Sample(None, runs)], stage, judge.cases, current)
        if effect >= CLEAR * judge.tolerances[stage] and effect > 0:
            return True
    return False


def _decide(judge: Judge, current: Sequence[Pass], group: Sequence[Mistake]) -> str:
    """What would tell several entries apart: a longer prompt, or a stage that was not given."""
    if len(group) < 2:
        return ""
    if all(case.token_ids.shape[1] == 1 for case in judge.cases):
        return "a prompt of several tokens"
    one, other = (judge.runs(entry, current)[0] for entry in group[:2])
    for stage in stages(min(len(one.book.layers), len(other.book.layers))):
        if stage not in judge.stages:
            x, y = plain(one[stage]), plain(other[stage])
            if x.shape != y.shape:
                return f"the stage {stage}"
            finite = np.isfinite(x) & np.isfinite(y)
            x, y = x[finite], y[finite]
            if np.abs(x - y).max(initial=0) > 1000 * UNIT[judge.dtype] * np.abs(x).max(initial=0):
                return f"the stage {stage}"
    return "another prompt, or weights further from each other"
