"""Which known mistakes explain the differences, judged stage by stage.

Every stage that theirs gave is computed from the stages that theirs gave below it, so that one mistake shows in one
place and hides nothing behind it. A mistake is named where it explains stages that differ and no stage speaks against
it; whatever is left is located.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np

from ..parameters import Array
from .arithmetic import UNIT, plain
from .judge import Judge, Model, Seen
from .mistakes import Mistake
from .rounding import CLEAR, WIDE, aligned, run_all
from .textbook import Textbook, stages

MOST = 4  # mistakes that are looked for one after another, and stages at which two at once are
MOST_PAIRS = 400  # that are tried, those first that would add up best
PAIRED, PAIRED_WIDE = 24000, 8000  # formulas that pairs may take: from gpt2's logits, which is wide, some 30 pairs
SAMPLED = 4096  # numbers of a stage by which pairs are ranked
WORSE = 1.1  # times a difference's root mean square, which speaks against the mistake that makes it so large


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


@dataclass(frozen=True)
class Trial:
    """One mistake more than now: the stages that it explains, what speaks against it, and how far it moves anything.

    change: what it adds to some numbers of the first stage that differs, none where it leaves that as it is; the stage
    is `at`.
    """

    entry: Mistake
    used: bool
    explained: tuple[str, ...]
    against: str | None
    effect: float
    change: Array | None = field(repr=False, default=None)
    at: str | None = None


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
    trials = tried(rough, [entry for entry in rest if entry.layer is None], model.differing())
    hidden = [t.entry for t in trials if not t.used and not t.against and 0 <= t.effect < CLEAR]
    alone = [entry for entry in rest if entry.layer is not None]  # those not tried yet with this model
    while faults := [stage for stage in model.differing() if search and stage not in settled]:
        groups, explained = best(model, trials, faults)
        # a mistake in one block alone is looked for where none of the whole model fits, or where it may be an equal
        clear = evidence(model, explained) >= CLEAR
        near = {stage for group in groups for stage in group[0].entry.stages}
        wanted = [entry for entry in alone if not clear or near & set(entry.stages)]
        if wanted:
            alone = [entry for entry in alone if clear and not near & set(entry.stages)]
            trials += tried(rough, wanted, faults)
            groups, explained = best(model, trials, faults)
        strongest = evidence(model, explained) if groups else model.seen[faults[0]].ratio
        if not groups and len(unknown) < MOST and strongest >= CLEAR:
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
            model, rough = (each.with_it(group[0].entry, group[0].used) for each in (model, rough))
        settled.update(explained)
        if faults := [stage for stage in model.differing() if stage not in settled]:
            trials = tried(rough, [entry for entry in rest if entry.layer is None], faults)
            alone = [entry for entry in rest if entry.layer is not None]
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


def evidence(model: Model, explained: Sequence[str]) -> float:
    """How many tolerances some stages differ by, all together."""
    return math.hypot(*(min(model.seen[stage].ratio, 1e9) for stage in explained))


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
    return Trial(entry, used, tuple(explained), against, effect, change, first)


def numbers(arrays: Sequence[Array]) -> Array:
    """Some numbers of a stage, evenly taken."""
    whole = np.concatenate([array.ravel() for array in arrays])
    return whole[:: max(1, len(whole) // SAMPLED)]


def best(model: Model, trials: Sequence[Trial], faults: Sequence[str]) -> Found:
    """Those that explain the most stages, nothing being against them, and of equals the earliest stages.

    Trials are made with a rough model; what is best by them is tried with this one. A mistake in one block alone gives
    way to the same mistake in all of them.
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
            whole = {t.entry.name for t in fits if t.entry.layer is None}
            fits = [t for t in fits if not t.used or t.entry.name not in values]
            return [[t for t in fits if t.entry.layer is None or t.entry.of not in whole]], top.explained
    return [], ()


def pair(model: Model, rough: Model, faults: Sequence[str], trials: Sequence[Trial]) -> Found:
    """Two mistakes that together explain the first stage that differs, each with those that fit in its place.

    Pairs are tried in the order of what their changes, added up, would leave of the difference, and those of the
    mistake that alone would leave the least.
    """
    stage = faults[0]
    theirs, book = [case.theirs[stage] for case in model.judge.having(stage)], model.seen[stage].view.book
    parts = [aligned(stage, x, y) for x, y in zip(theirs, model.seen[stage].ours, strict=True)]
    if any(part is None for part in parts):
        return [], ()
    one, other = (numbers([part[side] for part in parts if part is not None]) for side in (0, 1))
    gap = one - other
    trials = [t for t in trials if t.entry.layer is None]  # of one block alone there would be too many
    if trials and trials[0].at != stage:  # they were made when another stage was the first
        trials = tried(rough.only(stage), list(dict.fromkeys(t.entry for t in trials)), [stage])
    able = [t for t in trials if t.change is not None and len(t.change) == len(gap) and np.isfinite(t.change).all()]
    able = [t for t in able if t.effect > 0]
    if len(able) < 2 or not np.isfinite(gap).all():
        return [], ()
    changes = np.array([t.change for t in able])
    gram, along = changes @ changes.T, changes @ gap
    alone = gram.diagonal() - 2 * along
    left = {
        (i, j): alone[i] + alone[j] + 2 * gram[i, j]
        for i, j in combinations(range(len(able)), 2)
        if not set(able[i].entry.stages) & set(able[j].entry.stages)  # or the second takes the first one's place
    }
    ranked = sorted(left, key=lambda at: left[at])
    # what a large mistake leaves can be little, and look like nothing that the small one does without it
    largest = [at for at in ranked if alone.argmin() in at]
    budget = (PAIRED_WIDE if book.config.n_embd >= WIDE else PAIRED) // len(model.seen[stage].formulas)
    half = min(MOST_PAIRS, budget) // 2
    likely = dict.fromkeys(ranked[:half] + largest[:half])
    found: list[tuple[Trial, Trial, tuple[str, ...]]] = []
    for i, j in likely:
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
    first, second = (model.with_it(each.entry, each.used) for each in (one, two))
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
