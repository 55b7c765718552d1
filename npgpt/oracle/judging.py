"""How far rounding alone can take a stage, and how far another implementation is from it.

Rounding is sampled: the model redrawn by its symmetries (symmetry.py), run in the declared dtype, against float64. A
stage's tolerance is FACTOR times the largest root-mean-square error of the draws, and never less than that of rounding
the stage itself once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..config import Config
from ..parameters import Array
from .arithmetic import UNIT, as_computed, plain
from .evidence import OUTPUTS, Case
from .symmetry import Redraw, redraw
from .textbook import Pass, Textbook, located, textbook

DRAWS = 24
# A naive sum in C, one product after the other, was measured at 3 times BLAS's error, which keeps 16 or more partial
# sums; twice that leaves room for another exp and tanh, and for the draws' own spread.
FACTOR = 6.0
CLEAR = 5.0  # times the tolerance, from which on a difference is named


@dataclass(frozen=True)
class Difference:
    """Theirs against what is expected. rms and largest are in the stage's own unit, nmse in dB, ulps in units in the
    last place of the declared dtype at the stage's root mean square.
    """

    rms: float
    tolerance: float
    largest: float
    nmse: float
    cosine: float
    ulps: float

    @property
    def ratio(self) -> float:
        """The root mean square in tolerances: up to 1 rounding explains it."""
        return self.rms / self.tolerance if self.tolerance else (0.0 if self.rms == 0 else math.inf)


def aligned(stage: str, theirs: Array, expected: Array) -> tuple[Array, Array] | None:
    """Both as they are compared; None where they cannot be, since one has more positions than the other."""
    ours = plain(expected)
    if stage == "wpe":
        ours = np.broadcast_to(ours, (len(theirs), *ours.shape[1:]))
    elif stage in OUTPUTS and theirs.shape[1] == 1:
        ours = ours[:, -1:]
    if theirs.shape != ours.shape:
        return None
    if located(stage)[1] == "attn.scores":  # hidden by −inf, by −1e4, by the least number: hidden all the same
        visible = ours[np.isfinite(ours)]
        floor = (visible.min() if visible.size else 0.0) - 30 * (np.abs(visible).max() if visible.size else 1.0)
        return np.maximum(theirs, floor), np.maximum(ours, floor)
    return theirs, ours


def squares(stage: str, theirs: Array, expected: Array) -> tuple[float, int]:
    """Sum of squared differences, infinite where there is a NaN or no comparison, and how many there are."""
    pair = aligned(stage, theirs, expected)
    if pair is None:
        return math.inf, 1
    with np.errstate(invalid="ignore", over="ignore"):
        total = float(np.square(pair[0] - pair[1]).sum())
    return (total if not math.isnan(total) else math.inf), pair[0].size


def rms(stage: str, theirs: Sequence[Array], expected: Sequence[Array]) -> float:
    """Over all cases."""
    sums = [squares(stage, a, b) for a, b in zip(theirs, expected, strict=True)]
    return math.sqrt(sum(s for s, _ in sums) / max(1, sum(n for _, n in sums)))


@dataclass(frozen=True)
class Tolerances:
    """By stage, of one model on some cases in one dtype; computed when asked for."""

    cases: Sequence[Case]
    reference: Sequence[Pass]
    dtype: str
    draws: list[list[tuple[Redraw, Pass]]]
    known: dict[str, float]

    def __getitem__(self, stage: str) -> float:
        if stage not in self.known:
            self.known[stage] = max(FACTOR * self.largest(stage), self.floor(stage))
        return self.known[stage]

    def floor(self, stage: str) -> float:
        """Of one rounding of each number, and of its being stored."""
        expected = np.concatenate([plain(run[stage]).ravel() for run in self.reference])
        finite = expected[np.isfinite(expected)]
        return 2 * UNIT[self.dtype] * math.sqrt(float(np.square(finite).mean())) if finite.size else 0.0

    def largest(self, stage: str) -> float:
        """The largest error of the draws."""
        return max(self.errors(stage), default=0.0)

    def errors(self, stage: str) -> list[float]:
        """Of each draw, on the positions that theirs has."""
        found = []
        for draw in self.draws:
            theirs = [
                case.seen(stage, plain(order.restored(stage, run[stage])))
                for (order, run), case in zip(draw, self.cases, strict=True)
            ]
            found.append(rms(stage, theirs, [run[stage] for run in self.reference]))
        return found


def tolerances(
    config: Config,
    tensors: Mapping[str, Array],
    cases: Sequence[Case],
    reference: Sequence[Pass],
    dtype: str,
    wanted: Sequence[str],
) -> Tolerances:
    """Draw the model anew DRAWS times and run it in dtype. tensors: float64; wanted: the stages that are kept."""
    rough = {name: as_computed(array, dtype) for name, array in tensors.items()}
    draws: list[list[tuple[Redraw, Pass]]] = []
    for number in range(DRAWS):
        order = redraw(config, np.random.default_rng(number))
        book = textbook(config, order.tensors(config, rough))
        runs = run_all(
            book, cases, [{k: as_computed(order.drawn(k, x), dtype) for k, x in c.given.items()} for c in cases]
        )
        for run in runs:
            with np.errstate(over="ignore", invalid="ignore"):
                for stage in wanted:
                    run[stage]
            run.known = {stage: run.known[stage] for stage in wanted}
            run.book = textbook(config, {})  # and the tensors go
        draws.append([(order, run) for run in runs])
    return Tolerances(cases, reference, dtype, draws, {})


def difference(stage: str, cases: Sequence[Case], runs: Sequence[Pass], tolerance: float, dtype: str) -> Difference:
    """Theirs against these runs, all cases together."""
    pairs = [
        aligned(stage, case.theirs[stage], run[stage])
        for case, run in zip(cases, runs, strict=True)
        if stage in case.theirs
    ]
    if any(pair is None for pair in pairs):
        return Difference(math.inf, tolerance, math.inf, math.inf, 0.0, math.inf)
    theirs, ours = (np.concatenate([pair[side].ravel() for pair in pairs if pair is not None]) for side in (0, 1))
    with np.errstate(invalid="ignore", over="ignore"):
        gap = theirs - ours
        root, size = (math.sqrt(float(np.square(x).mean())) for x in (gap, ours))
        cosine = float(theirs @ ours) / (float(np.linalg.norm(theirs) * np.linalg.norm(ours)) or 1.0)
    if math.isnan(root):
        root, cosine = math.inf, math.nan
    nmse = -math.inf if root == 0 else math.inf if not size or math.isinf(root) else 20 * math.log10(root / size)
    ulps = root / (2 * UNIT[dtype] * size) if size else (0.0 if root == 0 else math.inf)
    largest = float(np.abs(gap).max()) if math.isfinite(root) else math.inf
    return Difference(root, tolerance, largest, nmse, cosine, ulps)


def run_all(
    book: Textbook, cases: Sequence[Case], known: Sequence[Mapping[str, Array]] | None = None, dtype: str = "float64"
) -> list[Pass]:
    """A pass for every case; known: stages that are taken as given, besides those that the case says."""
    starts = known or [{}] * len(cases)
    return [
        Pass(
            book,
            case.token_ids,
            {name: as_computed(array, dtype) for name, array in case.given.items()} | dict(start),
            case.padding,
        )
        for case, start in zip(cases, starts, strict=True)
    ]
