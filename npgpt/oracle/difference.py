"""Measure how far theirs is from what is expected: for a stage as a whole, and for logits as probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..parameters import Array
from .arithmetic import UNIT, plain
from .functions import log_softmax
from .textbook import Pass, located
from .theirs import OUTPUTS, Case

HIDDEN = -5e3  # no visible score is this low, so a lower one is hidden


@dataclass(frozen=True)
class Difference:
    """How far theirs is from what is expected: rms and largest in the units of the stage, nmse in dB, ulps in units in
    the last place of the dtype at the root mean square of the stage.
    """

    rms: float
    tolerance: float
    largest: float
    nmse: float
    cosine: float
    ulps: float

    @property
    def ratio(self) -> float:
        """rms in tolerances."""
        return in_tolerances(self.rms, self.tolerance)


@dataclass(frozen=True)
class LogitStatistics:
    """Statistics of logits over positions: KL divergence in nats, shares that agree, shift in logits."""

    kl_mean: float
    kl_99: float
    top_1: float
    top_10: float
    shift: float  # largest constant that is added at a position
    shape_of_shift: bool  # whether only such constants differ


def aligned(stage: str, theirs: Array, expected: Array) -> tuple[Array, Array] | None:
    """Return both arrays in comparable form, or None if they have different numbers of positions."""
    ours = plain(expected)
    if not ours.size:
        return None
    if stage == "wpe":
        ours = np.broadcast_to(ours, (len(theirs), *ours.shape[1:]))
    elif stage in OUTPUTS and theirs.shape[1] == 1:
        ours = ours[:, -1:]
    if theirs.shape != ours.shape:
        return None
    if located(stage)[1] == "attn.scores":  # by −inf, −1e4 or the lowest float: all count as hidden
        visible = ours[ours > HIDDEN]
        floor = max(HIDDEN, (visible.min() if visible.size else 0.0) - 30 * np.abs(visible).max(initial=1.0))
        return np.maximum(theirs, floor), np.maximum(ours, floor)
    if located(stage)[1] == "d.attn.weights":  # of keys that are hidden, nothing depends on it: many do not compute it
        visible = np.tri(ours.shape[-1], dtype=bool)
        return np.where(visible, theirs, 0), np.where(visible, ours, 0)
    return theirs, ours


def paired(stage: str, theirs: Sequence[Array], expected: Sequence[Array]) -> tuple[Array, Array] | None:
    """Return all numbers of both, over all cases, or None if a case cannot be compared."""
    pairs = [aligned(stage, a, b) for a, b in zip(theirs, expected, strict=True)]
    if any(pair is None for pair in pairs):
        return None
    one, other = (np.concatenate([pair[side].ravel() for pair in pairs if pair is not None]) for side in (0, 1))
    return one, other


def root(*arrays: Array) -> float:
    """Return the root mean square of all numbers, infinite if there is a NaN, and 0 if there is no number."""
    found = math.sqrt(sum(float(np.vdot(x, x)) for x in arrays) / max(1, sum(x.size for x in arrays)))
    return math.inf if math.isnan(found) else found


def in_tolerances(rms: float, tolerance: float) -> float:
    """Return a root mean square in tolerances. Rounding explains it up to 1."""
    return rms / tolerance if tolerance else (0.0 if rms == 0 else math.inf)


@np.errstate(invalid="ignore", over="ignore")
def rms(stage: str, theirs: Sequence[Array], expected: Sequence[Array]) -> float:
    """Return the root mean square of the differences, infinite if there is a NaN or they cannot be compared."""
    pairs = [aligned(stage, a, b) for a, b in zip(theirs, expected, strict=True)]
    return math.inf if None in pairs else root(*(a - b for a, b in filter(None, pairs)))


@np.errstate(invalid="ignore", over="ignore")
def difference(stage: str, cases: Sequence[Case], runs: Sequence[Pass], tolerance: float, dtype: str) -> Difference:
    """Return the difference between theirs and these runs at a stage, over all cases."""
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
    """Return statistics of pairs of theirs and what is expected, or None if a pair cannot be compared."""
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
