"""Which known mistakes explain the differences, judged stage by stage.

Every stage that theirs gave is computed from the stages that theirs gave below it, so that one mistake shows in one
place and hides nothing behind it. A mistake is named where it explains stages that differ and no stage speaks against
it; whatever is left is located.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np

from ..parameters import Array
from .arithmetic import UNIT, plain
from .mistakes import Mistake
from .rounding import CLEAR, Progress, aligned, own_rounding, rms, run_all
from .textbook import Pass, Textbook, located, stages
from .theirs import OUTPUTS, Case

ROUGH = 2.0  # tolerances up to which a stage may be explained where it is computed in float32
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
    apart. used: the stage itself, as it was given, is right, and what follows used something else. explained: all
    stages that differ by it.
    """

    stage: str
    mistakes: tuple[Mistake, ...]
    before: float
    decide: str = ""
    used: bool = False
    explained: tuple[str, ...] = ()


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


@dataclass(frozen=True, eq=False)
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


@dataclass(frozen=True)
class Judge:
    """All that is held against each other; tolerances are by stage, tensors in float64.

    exact: whether stages are computed in float64. In float32, twice as fast, its own rounding may be in the way: there
    `most` tolerances explain a stage.
    """

    cases: Sequence[Case]
    stages: list[str]  # that theirs has, in the order of computation
    tolerances: Mapping[str, float]
    tensors: Mapping[str, Array]
    dtype: str
    exact: bool = True
    progress: Progress | None = None

    @property
    def most(self) -> float:
        """Tolerances that explain a stage."""
        return 1.0 if self.exact else ROUGH

    def right(self, book: Textbook) -> Model:
        """Return every stage as the right model has it."""
        if not self.exact:
            book = replace(book, tensors={name: array.astype(np.float32) for name, array in book.tensors.items()})
        view = View(book)
        return Model(self, {stage: self.seen(stage, view) for stage in self.stages})

    def having(self, stage: str) -> list[Case]:
        """The cases in which theirs has a stage."""
        return [case for case in self.cases if stage in case.theirs]

    def known(self, case: Case, view: View) -> dict[str, Array]:
        """What theirs gave and a stage may be computed from."""
        given = {**case.given} | {k: v for k, v in case.theirs.items() if k not in (*OUTPUTS, "wpe", *view.dropped)}
        return given if self.exact else {name: array.astype(np.float32) for name, array in given.items()}

    def seen(self, stage: str, view: View, before: Seen | None = None, first: int = 0) -> Seen:
        """Compute a stage from theirs below it. before: the same stage, whose blocks below `first` are taken over."""
        ours, streams = [], []
        formulas, read = {stage}, set[str]()
        for number, case in enumerate(self.having(stage)):
            known = self.known(case, view)
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
        gap = rms(stage, [case.theirs[stage] for case in self.having(stage)], ours)
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
        return [case.seen(stage, ours) for case, ours in zip(self.having(stage), seen.ours, strict=True)]

    def used(self, stage: str, now: Seen, then: Seen) -> bool:
        """Whether a mistake's use explains a stage, and not only that what was given is not what was used."""
        return self.explains(stage, self.seen(stage, View(now.view.book, then.view.dropped), now), then)

    def explains(self, stage: str, now: Seen, then: Seen) -> bool:
        """Whether a view explains a stage: what it leaves is rounding, and most of what was there is gone.

        A view's own rounding, which may be coarser than the right model's, counts where it is needed.
        """
        if not then.gap**2 <= ENERGY * now.gap**2:
            return False
        if then.ratio <= self.most or then.ratio >= NEAR:
            return then.ratio <= self.most
        having = self.having(stage)
        known = [self.known(case, then.view) for case in having]
        allowed = own_rounding(then.view.book, self.tensors, having, known, stage, then.ours, self.dtype)
        return then.gap <= self.most * allowed


@dataclass(frozen=True)
class Model:
    """Every stage of theirs as a model has it."""

    judge: Judge
    seen: Mapping[str, Seen]

    def differing(self) -> list[str]:
        """The stages that rounding cannot explain, in the order of computation."""
        return [stage for stage, seen in self.seen.items() if seen.ratio > 1]

    def changed(self, entry: Mistake, used: bool) -> Iterator[tuple[str, Seen]]:
        """The stages that a mistake changes, as they are with it, one after another.

        As a value, its own stages are what it makes of them. As a use, these stay right, and others use what it makes.
        """
        views: dict[View, View] = {}
        own = frozenset(s for s in self.seen if used and touches(entry, s) and "layers" not in entry.stages)
        if used and not own:
            return
        for stage, now in self.seen.items():
            if stage in own or not any(touches(entry, name) for name in now.formulas | (now.read & own)):
                continue
            if now.view not in views:
                views[now.view] = View(entry.change(now.view.book), now.view.dropped | own)
            yield stage, self.judge.seen(stage, views[now.view], now, 0 if used else entry.first)

    def with_it(self, trial: Trial) -> Model:
        """The model with a mistake."""
        return replace(self, seen={**self.seen, **dict(self.changed(trial.entry, trial.used))})

    def only(self, stage: str) -> Model:
        """The model, of which one stage alone is looked at."""
        return replace(self, seen={stage: self.seen[stage]})


def layer_of(stage: str) -> int:
    """The block of a stage, −1 for none."""
    layer = located(stage)[0]
    return -1 if layer is None else layer


def touches(entry: Mistake, name: str) -> bool:
    """Whether a mistake may replace what stands under this name; the order of layers decides what ln_f reads, too."""
    layer, local = located(name)
    if layer is not None and (layer < entry.first or entry.layer not in (None, layer)):
        return False
    if layer is None and entry.layer is not None and local != "ln_f":
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


Found = tuple[list[list[Trial]], tuple[str, ...]]  # groups, each of mistakes that fit alike, and what they explain


def diagnose(judge: Judge, right: Model, entries: Sequence[Mistake], search: bool = True) -> Diagnosis:
    """Name what explains the differences from the right model, and locate the rest.

    search: whether anything differs; where nothing does, only what cannot be excluded is told.
    """
    findings: list[Finding] = []
    faint: list[Mistake] = []
    unknown: list[str] = []
    settled: set[str] = set()
    book = next(iter(right.seen.values())).view.book
    model, rest = right, list(entries)
    rough = right if judge.dtype == "float64" else replace(judge, exact=False).right(book)
    # what could not be seen if it were there; a mistake that touches nothing of what was given is not spoken of
    whole = tried(rough, [entry for entry in rest if entry.layer is None], model.differing())
    hidden = [t.entry for t in whole if not t.used and not t.against and 0 <= t.effect < CLEAR]
    while faults := [stage for stage in model.differing() if search and stage not in settled]:
        strongest = model.seen[faults[0]].ratio
        trials = whole if not findings else tried(rough, [entry for entry in rest if entry.layer is None], faults)
        groups, explained = best(model, trials, faults)
        if not groups:  # a mistake in one block alone is looked for where none of the whole model fits
            trials += tried(rough, [entry for entry in rest if entry.layer is not None], faults)
            groups, explained = best(model, trials, faults)
        if groups:
            strongest = math.hypot(*(min(model.seen[stage].ratio, 1e9) for stage in explained))
        elif len(unknown) < MOST and strongest >= CLEAR:
            groups, explained = pair(model, rough, faults, trials)
        if not groups or strongest < CLEAR or len(findings) >= MOST:
            faint += [fit.entry for group in groups for fit in group]
            unknown += explained or faults[:1]
            settled.update(unknown)
            continue
        for group in groups:
            fits = tuple(fit.entry for fit in group)
            before = max(model.seen[stage].ratio for stage in explained)
            findings.append(Finding(explained[0], fits, before, decide(judge, book, fits), group[0].used, explained))
            rest = [entry for entry in rest if entry.name not in [fit.name for fit in fits]]
        for group in groups:
            model, rough = model.with_it(group[0]), rough.with_it(group[0])
        settled.update(explained)
    for finding in findings:  # what reads its stages does not follow: perhaps they only look like it
        if all(any(stage in model.seen[other].read for other in unknown) for stage in finding.explained):
            unknown += finding.explained
    findings = [finding for finding in findings if not set(finding.explained) <= set(unknown)]
    strongest = max((right.seen[stage].ratio for stage in unknown), default=0.0)
    named = {entry.name for finding in findings for entry in finding.mistakes}
    left = [entry for entry in dict.fromkeys([*faint, *hidden]) if entry.name not in named]
    unknown = [stage for stage in judge.stages if stage in unknown]
    findings.sort(key=lambda finding: judge.stages.index(finding.stage))
    return Diagnosis(findings, unknown, left, bool(unknown) and strongest < CLEAR)


def tried(model: Model, entries: Sequence[Mistake], faults: Sequence[str]) -> list[Trial]:
    """Every entry on top of a model, as a value and as a use."""
    found = []
    for number, entry in enumerate(entries):
        if model.judge.progress is not None:
            model.judge.progress(number, len(entries))
        for used in (False, True) if faults else (False,):
            found.append(trial(model, model.changed(entry, used), entry, used, *faults[:1]))
    return found


def trial(
    model: Model, changed: Iterable[tuple[str, Seen]], entry: Mistake, used: bool, first: str | None = None
) -> Trial:
    """Hold what a mistake would change against theirs, up to the first stage that speaks against it.

    first: a stage of which the change is kept. The effect is −1 where nothing that was given is changed.
    """
    judge = model.judge
    explained, against, effect, change = [], None, -1.0, None
    for stage, then in changed:
        now = model.seen[stage]
        effect = max(effect, judge.effect(stage, now, then))
        if stage == first:
            before, after = (numbers(judge.shown(stage, seen)) for seen in (now, then))
            change = after - before if after.shape == before.shape else None
        if now.ratio > 1 and judge.explains(stage, now, then) and (not used or judge.used(stage, now, then)):
            explained.append(stage)
        elif then.ratio > judge.most and (now.ratio <= 1 or then.gap > WORSE * now.gap):
            against = stage
            if first is None or judge.stages.index(stage) >= judge.stages.index(first):
                break
    return Trial(entry, used, tuple(explained), against, effect, change)


def numbers(arrays: Sequence[Array]) -> Array:
    """Some numbers of a stage, evenly taken."""
    whole = np.concatenate([array.ravel() for array in arrays])
    return whole[:: max(1, len(whole) // SAMPLED)]


def best(model: Model, trials: Sequence[Trial], faults: Sequence[str]) -> Found:
    """Those that explain the most stages, nothing being against them, and of equals the earliest stages.

    Trials are made with a rough model; what is best by them is tried with this one.
    """

    def order(trial: Trial) -> tuple[int, int]:
        return len(trial.explained), -faults.index(next(stage for stage in trial.explained if stage in faults))

    able = [t for t in trials if t.against is None and any(stage in faults for stage in t.explained)]
    while able:
        top = max(able, key=order)
        fits = [t for t in able if t.explained == top.explained]
        able = [t for t in able if t.explained != top.explained]
        tested = [trial(model, model.changed(t.entry, t.used), t.entry, t.used) for t in fits]
        fits = [t for t in tested if t.against is None and any(stage in faults for stage in t.explained)]
        if fits:
            top = max(fits, key=order)
            fits = [t for t in fits if t.explained == top.explained]
            values = {t.entry.name for t in fits if not t.used}
            return [[t for t in fits if not t.used or t.entry.name not in values]], top.explained
    return [], ()


def pair(model: Model, rough: Model, faults: Sequence[str], trials: Sequence[Trial]) -> Found:
    """Two mistakes that together explain the first stage that differs, each with those that fit in its place.

    Pairs are tried in the order of what their changes, added up, would leave of the difference.
    """
    stage = faults[0]
    theirs = [case.theirs[stage] for case in model.judge.having(stage)]
    parts = [aligned(stage, x, y) for x, y in zip(theirs, model.seen[stage].ours, strict=True)]
    if any(part is None for part in parts):
        return [], ()
    one, other = (numbers([part[side] for part in parts if part is not None]) for side in (0, 1))
    gap = one - other
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
    for i, j in sorted(left, key=lambda at: left[at])[: PAIRED // len(model.seen[stage].formulas)]:
        a, b = able[i], able[j]
        if together(rough.only(stage), a, b, stage).explained:
            outcome = together(model, a, b, stage)
            if stage in outcome.explained and outcome.against is None:
                found.append((a, b, outcome.explained))
    if not found:
        return [], ()
    most = max(len(explained) for _, _, explained in found)
    explained = next(explained for _, _, explained in found if len(explained) == most)
    (a, b), *others = [(one, two) for one, two, same in found if same == explained]
    return [
        [a, *(two if one is b else one for one, two in others if b in (one, two))],
        [b, *(two if one is a else one for one, two in others if a in (one, two))],
    ], explained


def together(model: Model, one: Trial, two: Trial, stage: str) -> Trial:
    """Try two mistakes at once; a stage counts as explained where each takes away most of what the other one leaves."""
    first, second = model.with_it(one), model.with_it(two)
    both = dict(first.changed(two.entry, two.used))
    outcome = trial(model, {**first.seen, **both}.items(), one.entry, one.used)
    if stage in both and all(model.judge.explains(stage, by.seen[stage], both[stage]) for by in (first, second)):
        return outcome
    return replace(outcome, explained=())


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
