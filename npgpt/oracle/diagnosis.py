"""Which known mistakes explain the differences, judged stage by stage.

Every stage that theirs gave is computed from the stages that theirs gave below it, so that one mistake shows in one
place and hides nothing behind it. A mistake is named where it explains stages that differ and no stage speaks against
it; whatever is left is located.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from ..parameters import Array
from .arithmetic import UNIT, plain
from .mistakes import Mistake
from .rounding import CLEAR, aligned, own_rounding, rms, run_all
from .textbook import Pass, Textbook, located, stages
from .theirs import OUTPUTS, Case

MOST = 4  # mistakes that are looked for one after another, and stages at which two at once are
PAIRED = 8000  # formulas that pairs may take, those first that would add up best: some 30 pairs from gpt2's logits
SAMPLED = 4096  # numbers of a stage by which pairs are ranked
NEAR = 100.0  # tolerances, within which a mistake's own rounding is looked at
WORSE = 1.1  # times a difference's root mean square, which speaks against the mistake that makes it so large
ENERGY = 0.5  # of a difference's mean square, which a mistake may leave where it is to explain the stage


@dataclass(frozen=True)
class Finding:
    """A mistake that is there: the only entry that fits, or one of several that this data cannot tell apart.

    before: how many tolerances the difference was without it, where it was greatest. decide: what would tell them
    apart. used: the stage itself, as it was given, is right, and what follows used something else.
    """

    stage: str
    mistakes: tuple[Mistake, ...]
    before: float
    decide: str = ""
    used: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """What was found: mistakes, stages that none explains, and the entries that cannot be excluded.

    faint: what differs is below CLEAR tolerances, too little to name anything by.
    """

    findings: list[Finding]
    unknown: list[str]
    left: list[Mistake]
    faint: bool = False

    @property
    def unexplained(self) -> str | None:
        """The first stage that no mistake explains."""
        return self.unknown[0] if self.unknown else None


@dataclass(frozen=True, eq=False)
class View:
    """What a stage is computed by: a book, and the stages of theirs that are not taken as its input."""

    book: Textbook
    dropped: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Seen:
    """One stage of theirs under a view: what it should be, how far theirs is from it, and what that rests on.

    formulas: the names of all that was computed for it, read: of what theirs gave. below: the streams that enter the
    blocks, by case. gap: the root mean square of the difference; ratio: the same in tolerances.
    """

    view: View
    ours: Sequence[Array]
    formulas: frozenset[str]
    read: frozenset[str]
    below: list[dict[str, Array]]
    gap: float
    ratio: float


Model = Mapping[str, Seen]  # by stage


@dataclass(frozen=True)
class Judge:
    """All that is held against each other; tolerances are by stage, tensors in float64."""

    cases: Sequence[Case]
    stages: list[str]  # that theirs has, in the order of computation
    tolerances: Mapping[str, float]
    tensors: Mapping[str, Array]
    dtype: str

    def right(self, book: Textbook) -> Model:
        """Return every stage as the right model has it."""
        view = View(book)
        return {stage: self.seen(stage, view) for stage in self.stages}

    def seen(self, stage: str, view: View, before: Seen | None = None, first: int = 0) -> Seen:
        """Compute a stage from theirs below it. before: the same stage, whose blocks below `first` are taken over."""
        ours, streams = [], []
        formulas, read = {stage}, set[str]()
        having = [case for case in self.cases if stage in case.theirs]
        for number, case in enumerate(having):
            known = inputs(case, view)
            if before is not None and first:
                known |= {k: v for k, v in before.below[number].items() if k == "embedding" or layer_of(k) < first}
            run = Pass(view.book, case.token_ids, dict(known), case.padding)
            try:
                ours.append(plain(run.compute(stage)))
            except (ValueError, IndexError):  # ids of another number than theirs, or a block that is not there
                ours.append(np.zeros((0, 0, 0)))
            formulas |= run.asked - known.keys()
            read |= run.asked & known.keys()
            streams.append({k: v for k, v in run.known.items() if k == "embedding" or located(k)[1] == ""})
        if before is not None:
            formulas, read = formulas | before.formulas, read | before.read
        gap = rms(stage, [case.theirs[stage] for case in having], ours)
        return Seen(view, ours, frozenset(formulas), frozenset(read), streams, gap, self.ratio(stage, gap))

    def ratio(self, stage: str, gap: float) -> float:
        """A root mean square in tolerances."""
        tolerance = self.tolerances[stage]
        return gap / tolerance if tolerance else (0.0 if gap == 0 else math.inf)

    def effect(self, stage: str, now: Seen, then: Seen) -> float:
        """How far two views of a stage are from each other, in tolerances, on the positions that theirs has."""
        return self.ratio(stage, rms(stage, self.shown(stage, then), now.ours))

    def shown(self, stage: str, seen: Seen) -> list[Array]:
        """What a view makes of a stage, on the positions that theirs has."""
        having = [case for case in self.cases if stage in case.theirs]
        return [case.seen(stage, ours) for case, ours in zip(having, seen.ours, strict=True)]

    def explains(self, stage: str, now: Seen, then: Seen) -> bool:
        """Whether a view explains a stage: what it leaves is rounding, and most of what was there is gone.

        A view's own rounding, which may be coarser than the right model's, counts where it is needed.
        """
        if not then.gap**2 <= ENERGY * now.gap**2:
            return False
        if then.ratio <= 1 or then.ratio >= NEAR:
            return then.ratio <= 1
        having = [case for case in self.cases if stage in case.theirs]
        known = [inputs(case, then.view) for case in having]
        return then.gap <= own_rounding(then.view.book, self.tensors, having, known, stage, then.ours, self.dtype)

    def applied(self, entry: Mistake, used: bool, model: Model) -> Iterator[tuple[str, Seen]]:
        """The stages that a mistake changes, as they are with it, one after another.

        As a value, its own stages are what it makes of them. As a use, these stay right, and others use what it makes.
        """
        views: dict[View, View] = {}
        own = frozenset(s for s in self.stages if used and touches(entry, s) and "layers" not in entry.stages)
        for stage, now in model.items():
            by = now.read & own if used else now.formulas
            if stage in own or not any(touches(entry, name) for name in by):
                continue
            if now.view not in views:
                views[now.view] = View(entry.change(now.view.book), now.view.dropped | own)
            yield stage, self.seen(stage, views[now.view], now, 0 if used else entry.first)


def inputs(case: Case, view: View) -> dict[str, Array]:
    """What theirs gave and a stage may be computed from."""
    return {**case.given} | {k: v for k, v in case.theirs.items() if k not in (*OUTPUTS, "wpe", *view.dropped)}


def layer_of(stage: str) -> int:
    """The block of a stage, −1 for none."""
    layer = located(stage)[0]
    return -1 if layer is None else layer


def touches(entry: Mistake, name: str) -> bool:
    """Whether a mistake may replace what stands under this name; the order of layers decides what ln_f reads, too."""
    layer, local = located(name)
    if layer is not None and (layer < entry.first or entry.layer not in (None, layer)):
        return False
    return local in entry.stages or ("layers" in entry.stages and (layer is not None or local == "ln_f"))


@dataclass(frozen=True)
class Trial:
    """One mistake more than now: the stages that it explains, what speaks against it, and how far it moves anything.

    change: what it adds to some numbers of the first stage that differs, none where it leaves that as it is.
    """

    entry: Mistake
    used: bool
    explained: tuple[str, ...]
    against: str | None
    effect: float
    change: Array | None = field(repr=False, default=None)


def diagnose(judge: Judge, model: Model, entries: Sequence[Mistake]) -> Diagnosis:
    """Name what explains the differences from this model, the right one, and locate the rest."""
    findings: list[Finding] = []
    faint: list[Mistake] = []
    unknown: list[str] = []
    settled: set[str] = set()
    book = next(iter(model.values())).view.book
    current, rest = dict(model), list(entries)
    trials = list(tried(judge, current, rest, differing(judge, current)))
    # what could not be seen if it were there; a mistake that touches nothing of what was given is not spoken of
    hidden = [t.entry for t in trials if not t.used and not t.against and 0 <= t.effect < CLEAR]
    while faults := [stage for stage in differing(judge, current) if stage not in settled]:
        strongest = current[faults[0]].ratio
        groups, explained = best(trials, faults)
        if groups:
            strongest = math.hypot(*(min(current[stage].ratio, 1e9) for stage in explained))
        elif len(unknown) < MOST and strongest >= CLEAR:
            groups, explained = pair(judge, current, faults, trials)
        if not groups or strongest < CLEAR or len(findings) >= MOST:
            faint += [fit.entry for group in groups for fit in group]
            unknown += explained or faults[:1]
            settled.update(unknown)
            continue
        for group in groups:
            fits = tuple(fit.entry for fit in group)
            before = max(current[stage].ratio for stage in explained)
            findings.append(Finding(explained[0], fits, before, decide(judge, book, fits), group[0].used))
            rest = [entry for entry in rest if entry.name not in [fit.name for fit in fits]]
        for group in groups:
            current |= dict(judge.applied(group[0].entry, group[0].used, current))
        settled.update(explained)
        faults = [stage for stage in differing(judge, current) if stage not in settled]
        trials = list(tried(judge, current, rest, faults)) if faults else []
    strongest = max((current[stage].ratio for stage in unknown), default=0.0)
    named = {entry.name for finding in findings for entry in finding.mistakes}
    left = [entry for entry in dict.fromkeys([*faint, *hidden]) if entry.name not in named]
    unknown = [stage for stage in judge.stages if stage in unknown]
    findings.sort(key=lambda finding: judge.stages.index(finding.stage))
    return Diagnosis(findings, unknown, left, bool(unknown) and strongest < CLEAR)


def differing(judge: Judge, model: Model) -> list[str]:
    """The stages that rounding cannot explain, in the order of computation."""
    return [stage for stage in judge.stages if model[stage].ratio > 1]


def tried(judge: Judge, model: Model, entries: Sequence[Mistake], faults: Sequence[str]) -> Iterator[Trial]:
    """Every entry on top of a model, as a value and as a use; effect −1 where it changes nothing that was given."""
    first = faults[0] if faults else None
    before = None if first is None else numbers(judge, first, model[first])
    for entry in entries:
        for used in (False, True) if faults else (False,):
            yield trial(judge, model, judge.applied(entry, used, model), entry, used, first, before)


def trial(
    judge: Judge,
    model: Model,
    changed: Iterable[tuple[str, Seen]],
    entry: Mistake,
    used: bool,
    first: str | None = None,
    before: Array | None = None,
) -> Trial:
    """Hold what a mistake would change against theirs, up to the first stage that speaks against it."""
    explained, against, effect, change = [], None, -1.0, None
    for stage, then in changed:
        now = model[stage]
        effect = max(effect, judge.effect(stage, now, then))
        if stage == first and before is not None and (after := numbers(judge, stage, then)).shape == before.shape:
            change = after - before
        if now.ratio > 1 and judge.explains(stage, now, then):
            explained.append(stage)
        elif then.ratio > 1 and (now.ratio <= 1 or then.gap > WORSE * now.gap):
            against = stage
            if first is None or change is not None or judge.stages.index(stage) > judge.stages.index(first):
                break
    return Trial(entry, used, tuple(explained), against, effect, change)


def numbers(judge: Judge, stage: str, seen: Seen) -> Array:
    """Some numbers of a stage, evenly taken, on the positions that theirs has."""
    whole = np.concatenate([array.ravel() for array in judge.shown(stage, seen)])
    return whole[:: max(1, len(whole) // SAMPLED)]


Found = tuple[list[list[Trial]], tuple[str, ...]]  # groups, each of mistakes that fit alike, and what they explain


def best(trials: Sequence[Trial], faults: Sequence[str]) -> Found:
    """Those that explain the most stages, nothing being against them, and of equals the earliest stages.

    A mistake in one block alone is left out where the same evidence fits a mistake of the whole model.
    """
    able = [t for t in trials if t.against is None and any(stage in faults for stage in t.explained)]
    if not able:
        return [], ()
    top = max(able, key=lambda t: (len(t.explained), -faults.index(next(s for s in t.explained if s in faults))))
    fits = [t for t in able if t.explained == top.explained]
    values = {t.entry.name for t in fits if not t.used}
    fits = [t for t in fits if not t.used or t.entry.name not in values]
    return [[t for t in fits if t.entry.layer is None] or fits], top.explained


def pair(judge: Judge, model: Model, faults: Sequence[str], trials: Sequence[Trial]) -> Found:
    """Two mistakes that together explain the first stage that differs, each with those that fit in its place.

    Pairs are tried in the order of what their changes, added up, would leave of the difference.
    """
    stage = faults[0]
    having = [case for case in judge.cases if stage in case.theirs]
    parts = [aligned(stage, case.theirs[stage], x) for case, x in zip(having, model[stage].ours, strict=True)]
    if any(part is None for part in parts):
        return [], ()
    theirs, ours = (np.concatenate([part[side].ravel() for part in parts if part is not None]) for side in (0, 1))
    step = max(1, len(ours) // SAMPLED)
    gap = (theirs - ours)[::step]
    able = [t for t in trials if t.change is not None and len(t.change) == len(gap) and np.isfinite(t.change).all()]
    able = [t for t in able if t.effect > 0]
    if len(able) < 2 or not np.isfinite(gap).all():
        return [], ()
    changes = np.array([t.change for t in able])
    gram, along = changes @ changes.T, changes @ gap
    left = {
        (i, j): gram[i, i] + gram[j, j] + 2 * gram[i, j] - 2 * (along[i] + along[j])
        for i, j in combinations(range(len(able)), 2)
        if not set(able[i].entry.stages) & set(able[j].entry.stages)  # or the second takes the first one's place
    }
    found: list[tuple[Trial, Trial, tuple[str, ...]]] = []
    for i, j in sorted(left, key=lambda at: left[at])[: PAIRED // len(model[stage].formulas)]:
        one, two = able[i], able[j]
        at = {stage: model[stage]}
        then = {**at, **twice(judge, one, two, at)}[stage]
        alone = [{**at, **dict(judge.applied(each.entry, each.used, at))}[stage] for each in (one, two)]
        if all(judge.explains(stage, now, then) for now in alone):  # each takes away most of what the other one leaves
            outcome = trial(judge, model, twice(judge, one, two, model).items(), one.entry, one.used)
            if outcome.against is None:
                found.append((one, two, outcome.explained))
    if not found:
        return [], ()
    most = max(len(explained) for _, _, explained in found)
    explained = next(explained for _, _, explained in found if len(explained) == most)
    (a, b), *others = [(one, two) for one, two, same in found if same == explained]
    return [
        [a, *(two if one is b else one for one, two in others if b in (one, two))],
        [b, *(two if one is a else one for one, two in others if a in (one, two))],
    ], explained


def twice(judge: Judge, one: Trial, two: Trial, model: Model) -> Model:
    """The stages that two mistakes change."""
    first = dict(judge.applied(one.entry, one.used, model))
    return {**first, **dict(judge.applied(two.entry, two.used, {**model, **first}))}


def decide(judge: Judge, book: Textbook, group: Sequence[Mistake]) -> str:
    """What would tell several entries apart: a longer prompt, or a stage that was not given."""
    if len(group) < 2:
        return ""
    if all(case.token_ids.shape[1] == 1 for case in judge.cases):
        return "a prompt of several tokens"
    one, other = (run_all(entry.change(book), judge.cases)[0] for entry in group[:2])
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
