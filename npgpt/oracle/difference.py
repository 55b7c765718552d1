"""How far theirs is from what is expected: of a stage as a whole, and of logits as probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..parameters import Array
from .arithmetic import UNIT, plain
from .textbook import Pass, located, log_softmax
from .theirs import OUTPUTS, Case

HIDDEN = -5e3  # what no score of a model comes near, so that a lower one is hidden


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
        """The root mean square in tolerances."""
        return in_tolerances(self.rms, self.tolerance)


@dataclass(frozen=True)
class LogitStatistics:
    """Theirs against the reference, over positions: KL divergence in nats, shares that agree, the shift in logits."""

    kl_mean: float
    kl_99: float
    top_1: float
    top_10: float
    shift: float  # largest constant by which a position is shifted
    shape_of_shift: bool  # whether nothing but such constants differs


def aligned(stage: str, theirs: Array, expected: Array) -> tuple[Array, Array] | None:
    """Both as they are compared; None where they cannot be, since one has more positions than the other."""
    ours = plain(expected)
    if not ours.size:
        return None
    if stage == "wpe":
        ours = np.broadcast_to(ours, (len(theirs), *ours.shape[1:]))
    elif stage in OUTPUTS and theirs.shape[1] == 1:
        ours = ours[:, -1:]
    if theirs.shape != ours.shape:
        return None
    if located(stage)[1] == "attn.scores":  # hidden by −inf, by −1e4, by the least number: hidden all the same
        visible = ours[ours > HIDDEN]
        floor = max(HIDDEN, (visible.min() if visible.size else 0.0) - 30 * np.abs(visible).max(initial=1.0))
        return np.maximum(theirs, floor), np.maximum(ours, floor)
    return theirs, ours


def paired(stage: str, theirs: Sequence[Array], expected: Sequence[Array]) -> tuple[Array, Array] | None:
    """All numbers of both, case after case; None where a case cannot be compared."""
    pairs = [aligned(stage, a, b) for a, b in zip(theirs, expected, strict=True)]
    if any(pair is None for pair in pairs):
        return None
    one, other = (np.concatenate([pair[side].ravel() for pair in pairs if pair is not None]) for side in (0, 1))
    return one, other


def root(x: Array) -> float:
    """The root mean square, infinite where there is a NaN."""
    found = math.sqrt(float(np.square(x).mean()))
    return math.inf if math.isnan(found) else found


def in_tolerances(rms: float, tolerance: float) -> float:
    """A root mean square in tolerances: up to 1 rounding explains it."""
    return rms / tolerance if tolerance else (0.0 if rms == 0 else math.inf)


@np.errstate(invalid="ignore", over="ignore")
def rms(stage: str, theirs: Sequence[Array], expected: Sequence[Array]) -> float:
    """The root mean square of the differences, infinite where there is a NaN or no comparison."""
    pair = paired(stage, theirs, expected)
    return math.inf if pair is None else root(pair[0] - pair[1])


@np.errstate(invalid="ignore", over="ignore")
def difference(stage: str, cases: Sequence[Case], runs: Sequence[Pass], tolerance: float, dtype: str) -> Difference:
    """Theirs against these runs, all cases together."""
    having = [(case.theirs[stage], run[stage]) for case, run in zip(cases, runs, strict=True) if stage in case.theirs]
    pair = paired(stage, [theirs for theirs, _ in having], [ours for _, ours in having])
    if pair is None:
        return Difference(math.inf, tolerance, math.inf, math.inf, 0.0, math.inf)
    theirs, ours = pair
    gap = theirs - ours
    rms, size = root(gap), root(ours)
    cosine = float(theirs @ ours) / (float(np.linalg.norm(theirs) * np.linalg.norm(ours)) or 1.0)
    nmse = -math.inf if rms == 0 else math.inf if not size or math.isinf(rms) else 20 * math.log10(rms / size)
    ulps = rms / (2 * UNIT[dtype] * size) if size else (0.0 if rms == 0 else math.inf)
    largest = float(np.abs(gap).max()) if math.isfinite(rms) else math.inf
    return Difference(rms, tolerance, largest, nmse, cosine, ulps)


def logit_statistics(pairs: Sequence[tuple[Array, Array] | None], tolerance: float) -> LogitStatistics | None:
    """Of pairs of theirs and what is expected, each [rows, V]; None where there is a pair that cannot be compared."""
    whole = [pair for pair in pairs if pair is not None and np.isfinite(pair[0]).all()]
    if len(whole) < len(pairs):
        return None
    x, y = (np.concatenate([pair[side].reshape(-1, pair[side].shape[-1]) for pair in whole]) for side in (0, 1))
    gap = x - y
    shift = gap.mean(axis=-1, keepdims=True)
    p, q = log_softmax(y), log_softmax(x)
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    count = min(10, x.shape[-1])
    tops = [np.argpartition(-z, count - 1, axis=-1)[:, :count] for z in (x, y)]
    shared = [len(set(a) & set(b)) / count for a, b in zip(*tops, strict=True)]
    return LogitStatistics(
        float(kl.mean()),
        float(np.quantile(kl, 0.99)),
        float((x.argmax(axis=-1) == y.argmax(axis=-1)).mean()),
        float(np.mean(shared)),
        float(np.abs(shift).max()),
        root(gap - shift) <= tolerance < root(gap),
    )
