"""Find the known mistakes that explain the differences, stage by stage.

Each of their stages is compared with what their earlier stages lead to, so one mistake shows in one place and does not
hide later ones. A mistake is named if it explains stages that differ and no stage contradicts it. What remains is
located.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from ..parameters import Array
from .arithmetic import UNIT, plain
from .backward import BACKWARD, is_backward
from .difference import in_tolerances, paired, rms
from .judge import EXPLAIN, Judge, Model, Seen, touches
from .mistakes import Mistake
from .rounding import CLEAR, WIDE, run_all
from .textbook import Textbook, stages

MOST = 4  # most mistakes in a report, and most stages at which pairs of mistakes are tried
MOST_PAIRS = 400  # most pairs that are tried, the most promising first
PAIRED, PAIRED_WIDE = 24000, 8000  # most formulas computed for pairs: at gpt2's logits (wide), some 30 pairs
SAMPLED = 4096  # numbers of a stage used to rank pairs
WORSE = 1.1  # a mistake that raises the rms of a difference by this factor is contradicted


@dataclass(frozen=True)
class Finding:
    """A mistake that was found: the only entry that fits, or several that this data cannot tell apart.

    before: the largest difference that it explains, in tolerances. decide: what would tell the entries apart. used: the
    stage itself is right as given, but later stages use something else. explained: all stages that it explains.
    """

    stage: str
    mistakes: tuple[Mistake, ...]
    before: float
    decide: str = ""
    used: bool = False
    explained: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """The result of a search: mistakes, stages that none explains, and entries that cannot be excluded.

    faint: the unexplained differences are below CLEAR tolerances, too small to name a mistake.
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
class Trial:
    """A trial of one more mistake: the stages that it explains, and its largest effect in tolerances.

    effect is −1 if the mistake changes no given stage. If a stage contradicts the mistake, effect is infinite and
    explained is empty. change: what it adds to some numbers of the stage `at`; empty if it does not change that stage.
    astray: how many wrong gradients it changes and does not explain.
    """

    entry: Mistake
    used: bool
    explained: tuple[str, ...]
    effect: float
    at: str
    change: Array
    astray: int = 0


Found = tuple[list[list[Trial]], tuple[str, ...]]  # groups of equally good mistakes, and what they explain together


def diagnose(judge: Judge, right: Model, entries: Sequence[Mistake], search: bool = True) -> Diagnosis:
    """Name the mistakes that explain the differences from the correct model, and list the unexplained stages.

    search: whether anything differs. If nothing does, only what cannot be excluded is reported.
    """
    findings: list[Finding] = []
    faint: list[Mistake] = []
    unknown: list[str] = []
    settled: set[str] = set()
    book = next(iter(right.seen.values())).view.book
    model, rest = right, list(entries)
    rough = right if judge.dtype == "float64" else replace(judge, computed="float32").right(book)
    # mistakes that would be invisible if present, except those that do not change any given stage
    trials = tried(rough, [entry for entry in rest if entry.layer is None], model.differing())
    # nor those of the backward pass that do not change a bit, such as a mean over one row
    slight = [(t.entry, t.effect) for t in trials if not t.used and 0 <= t.effect < CLEAR]
    hidden = [entry for entry, effect in slight if effect or not BACKWARD.issuperset(entry.stages)]
    while faults := [stage for stage in model.differing() if search and stage not in settled]:
        trials = trials or tried(rough, [entry for entry in rest if entry.layer is None], faults)
        groups, explained = best(model, trials, faults)
        # mistakes in a single block are tried if none in the whole model fits, or if one may fit as well
        clear = evidence(model, explained) >= CLEAR
        near = {stage for group in groups for stage in group[0].entry.stages}
        known = {trial.entry.name for trial in trials}
        alone = [entry for entry in rest if entry.layer is not None and entry.name not in known]
        fitting = {fit.entry.name for group in groups for fit in group}
        if wanted := [
            entry
            for entry in alone
            if not clear or near & set(entry.stages) or (entry.of in fitting and BACKWARD.issuperset(entry.stages))
        ]:
            trials += tried(rough, wanted, faults)
            groups, explained = best(model, trials, faults)
        clear = evidence(model, explained or faults[:1]) >= CLEAR
        if not groups and clear and len(unknown) < MOST:
            groups, explained = pair(model, rough, faults, trials)
        settled.update(explained or faults[:1])
        if not groups or not clear or len(findings) >= MOST:
            faint += [fit.entry for group in groups for fit in group]
            unknown += explained or faults[:1]
            continue
        before = max(model.seen[stage].ratio for stage in explained)
        for group in groups:
            fits = tuple(fit.entry for fit in group)
            findings.append(Finding(explained[0], fits, before, decide(judge, book, fits), group[0].used, explained))
            rest = [entry for entry in rest if not any(entry == fit or entry.replaces(fit) for fit in fits)]
            model, rough = (each.with_it(group[0].entry, group[0].used) for each in (model, rough))
        trials = []
    for finding in findings:  # if later stages that read these are unexplained, the match may be a coincidence
        if all(
            any(stage in judge.behind(other, model.seen[other])[1] for other in unknown) for stage in finding.explained
        ):
            unknown += finding.explained
    findings = [finding for finding in findings if not set(finding.explained) <= set(unknown)]
    strongest = max((right.seen[stage].ratio for stage in unknown), default=0.0)
    named = {entry.name for finding in findings for entry in finding.mistakes}
    left = [entry for entry in dict.fromkeys([*faint, *hidden]) if entry.name not in named]
    unknown = [stage for stage in judge.stages if stage in unknown]
    findings.sort(key=lambda finding: judge.stages.index(finding.stage))
    return Diagnosis(findings, unknown, left, bool(unknown) and strongest < CLEAR)


def evidence(model: Model, explained: Sequence[str]) -> float:
    """Return the combined difference of some stages, in tolerances."""
    return math.hypot(*(min(model.seen[stage].ratio, 1e9) for stage in explained))


def tried(model: Model, entries: Sequence[Mistake], faults: Sequence[str]) -> list[Trial]:
    """Return trials of every entry on top of a model, as a value and (if stages differ) as a use."""
    found = []
    at, uses = (faults[0], (False, True)) if faults else (model.judge.stages[0], (False,))
    for number, entry in enumerate(entries):
        if model.judge.progress is not None:
            model.judge.progress(number, len(entries))
        for used in uses:
            found.append(trial(model, model.changed(entry, used), entry, used, at))
    return found


def trial(model: Model, changed: Iterable[tuple[str, Seen]], entry: Mistake, used: bool, at: str) -> Trial:
    """Compare what a mistake would change with theirs, up to the first stage from `at` on that contradicts it.

    If `at` is a gradient, any stage before it that contradicts the mistake ends the trial, too: passes are expensive.
    """
    judge = model.judge
    explained, against, effect, change, astray, other = [], False, -1.0, np.zeros(0), 0, 0
    for stage, then in changed:
        now = model.seen[stage]
        moved = in_tolerances(rms(stage, then.ours, now.ours), judge.tolerances[stage])
        effect = max(effect, moved)
        if stage == at:
            before, after = (sampled(np.concatenate([x.ravel() for x in seen.ours])) for seen in (now, then))
            change = after - before if after.shape == before.shape else change
        if now.ratio > 1 and judge.explains(stage, now, then, used):
            explained.append(stage)
        elif then.ratio > EXPLAIN[judge.computed] and (now.ratio <= 1 or then.gap > WORSE * now.gap):
            against = True
            if judge.stages.index(stage) >= judge.stages.index(at) or is_backward(at):
                break
        elif now.ratio > 1 and is_backward(stage) and moved > 1:
            astray += 1
            other += touches(entry, stage)
    # most of what it replaces is wrong in another way
    against = against or other > sum(touches(entry, stage) for stage in explained)
    return Trial(entry, used, () if against else tuple(explained), math.inf if against else effect, at, change, astray)


def sampled(x: Array) -> Array:
    """Return an evenly spaced sample of these numbers."""
    return x[:: max(1, len(x) // SAMPLED)]


def best(model: Model, trials: Sequence[Trial], faults: Sequence[str]) -> Found:
    """Return the mistakes that explain the most stages without contradiction; on a tie, the earliest stages.

    Trials come from a rough model; the best are repeated with this one. A mistake in a single block is dropped in
    favour of the same mistake in all blocks, unless this would change wrong gradients without explaining them.
    """

    def order(trial: Trial) -> tuple[int, int]:
        return len(trial.explained), -min(faults.index(stage) for stage in trial.explained if stage in faults)

    def top(trials: Sequence[Trial]) -> list[Trial]:
        able = [t for t in trials if not set(faults).isdisjoint(t.explained)]
        explained = max(able, key=order).explained if able else ()
        return [t for t in able if t.explained == explained]

    while fits := top(trials):
        trials = [t for t in trials if t.explained != fits[0].explained]
        if fits := top([trial(model, model.changed(t.entry, t.used), t.entry, t.used, faults[0]) for t in fits]):
            alone = {(t.entry.of, t.used): t.astray for t in fits}  # which may leave the other blocks' mistakes alone
            fits = [t for t in fits if alone.get((t.entry.name, t.used), t.astray) >= t.astray]
            names, values = {t.entry.name for t in fits}, {t.entry.name for t in fits if not t.used}
            fits = [t for t in fits if t.entry.of not in names and not (t.used and t.entry.name in values)]
            return [fits], fits[0].explained
    return [], ()


def pair(model: Model, rough: Model, faults: Sequence[str], trials: Sequence[Trial]) -> Found:
    """Return two mistakes that together explain the first stage that differs, each with its alternatives."""
    stage, judge = faults[0], model.judge
    sides = paired(stage, [case.theirs[stage] for case in judge.having(stage)], model.seen[stage].ours)
    if sides is None:
        return [], ()
    quick = replace(rough, seen={stage: rough.seen[stage]})
    trials = [t for t in trials if t.entry.layer is None]  # too many entries are in single blocks
    if trials and trials[0].at != stage:  # these trials were made when another stage came first
        trials = tried(quick, list(dict.fromkeys(t.entry for t in trials)), [stage])
    wide = model.seen[stage].view.book.config.n_embd >= WIDE
    count = min(MOST_PAIRS, (PAIRED_WIDE if wide else PAIRED) // len(judge.behind(stage, model.seen[stage])[0]))
    found: dict[tuple[Trial, Trial], tuple[str, ...]] = {}
    for two in likely(trials, sampled(sides[0] - sides[1]), count):
        if together(quick, *two, stage) and stage in (explained := together(model, *two, stage)):
            found[two] = explained
    if not found:
        return [], ()
    explained = max(found.values(), key=len)
    pairs = [two for two in found if found[two] == explained]
    groups = [[each for two in pairs if one in two for each in two if each is not one] for one in pairs[0]]
    return groups[::-1], explained


def likely(trials: Sequence[Trial], gap: Array, count: int) -> list[tuple[Trial, Trial]]:
    """Return up to count pairs, ordered by what the sum of their changes would leave of the difference.

    Half of them contain the mistake that alone leaves the least. What a large mistake leaves can be small, and need not
    look like the effect of a small mistake on its own.
    """
    able = [t for t in trials if t.effect > 0 and len(t.change) == len(gap) and np.isfinite(t.change).all()]
    if len(able) < 2 or not np.isfinite(gap).all():
        return []
    changes = np.array([t.change for t in able])
    gram, along = changes @ changes.T, changes @ gap
    alone = gram.diagonal() - 2 * along
    left = {
        (i, j): alone[i] + alone[j] + 2 * gram[i, j]
        for i, j in combinations(range(len(able)), 2)
        if not set(able[i].entry.stages) & set(able[j].entry.stages)  # else the second would replace the first
    }
    ranked = sorted(left, key=lambda at: left[at])
    largest = [at for at in ranked if alone.argmin() in at]
    return [(able[i], able[j]) for i, j in dict.fromkeys(ranked[: count // 2] + largest[: count // 2])]


def together(model: Model, one: Trial, two: Trial, stage: str) -> tuple[str, ...]:
    """Return what two mistakes explain together, or () unless each removes most of what the other leaves of a stage."""
    first, second = (model.with_it(each.entry, each.used) for each in (one, two))
    both = dict(first.changed(two.entry, two.used))
    if stage not in both or not all(model.judge.explains(stage, m.seen[stage], both[stage]) for m in (first, second)):
        return ()
    return trial(model, {**first.seen, **both}.items(), one.entry, one.used, stage).explained


def decide(judge: Judge, book: Textbook, group: Sequence[Mistake]) -> str:
    """Return what would tell several entries apart: a longer prompt, or a stage that was not given."""
    if len(group) < 2:
        return ""
    if all(case.token_ids.shape[1] == 1 for case in judge.cases):
        return "a prompt of several tokens"
    one, other = (run_all(entry.change(book), judge.cases)[0] for entry in group[:2])
    for stage in stages(min(len(one.book.layers), len(other.book.layers))):
        if stage in judge.stages:
            continue
        x, y = plain(one[stage]), plain(other[stage])
        same = x.shape == y.shape
        if same:
            finite = np.isfinite(x) & np.isfinite(y)
            x, y = x[finite], y[finite]
        if not same or np.abs(x - y).max(initial=0) > 1000 * UNIT[judge.dtype] * np.abs(x).max(initial=0):
            return f"the stage {stage}"
    return "another prompt, or weights that vary more"
