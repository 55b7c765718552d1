"""Judge stage by stage: each is computed from their earlier stages, by a model with or without mistakes.

Then one mistake shows in one place and does not hide later ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..parameters import Array
from .arithmetic import as_computed, plain
from .backward import is_backward, is_last
from .difference import in_tolerances, rms, root
from .mistakes import Mistake
from .rounding import FACTOR, FLIPS, Moved, Progress, errors
from .textbook import Pass, Textbook, located
from .theirs import OUTPUTS, Case

# Tolerances up to which a stage is explained, by the dtype of the computation: float32 adds its own rounding.
EXPLAIN = {"float64": 1.0, "float32": 2.0}
NEAR = 100.0  # tolerances below which a mistake's own rounding is measured
ENERGY = 0.5  # share of the mean square difference that a mistake may leave if it explains a stage


@dataclass(frozen=True, eq=False)
class View:
    """How a stage is computed: a book, and their stages that are not used as input.

    runs: by case, a pass from their stages. Gradients share it, since each rests on most of the forward pass. changed:
    what is computed in these runs otherwise than in those of the view from which this one was made.
    """

    book: Textbook
    dropped: frozenset[str] = frozenset()
    runs: dict[int, Pass] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)


@dataclass(frozen=True, eq=False)
class Seen:
    """One of their stages under a view: what it should be, how far theirs is from that, and what it depends on.

    ours: by case, at the positions that theirs has. formulas: names of everything computed for it. read: names of their
    stages used for it. below: by case, the streams that enter the blocks. gap: root mean square of the difference.
    ratio: gap in tolerances. Of a gradient, below is empty, and so are the names: see Judge.behind.
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
    """The data to compare: their cases, tolerances by stage, and the tensors of the model in float64.

    sizes: root mean squares of the right gradients. computed: the dtype in which stages are computed, float64, or
    float32, which is twice as fast.
    """

    cases: Sequence[Case]
    stages: list[str]  # those that theirs has, in the order of computation
    tolerances: Mapping[str, float]
    tensors: Mapping[str, Array]
    dtype: str
    computed: str = "float64"
    progress: Progress | None = None
    sizes: Mapping[str, float] = field(default_factory=dict)

    def right(self, book: Textbook) -> Model:
        """Return every stage as the correct model computes it."""
        tensors = {name: array.astype(self.computed, copy=False) for name, array in book.tensors.items()}
        view = View(replace(book, tensors=tensors))
        return Model(self, {stage: self.seen(stage, view) for stage in self.stages})

    def having(self, stage: str) -> list[Case]:
        """Return the cases in which theirs has a stage."""
        return [case for case in self.cases if stage in case.theirs]

    def known(self, case: Case, view: View) -> dict[str, Array]:
        """Return their stages that others may be computed from."""
        left = {*OUTPUTS, "wpe", *view.dropped}
        given = {name: x for name, x in {**case.given, **case.theirs}.items() if name not in left and not is_last(name)}
        return {name: x.astype(self.computed, copy=False) for name, x in given.items()}

    def seen(self, stage: str, view: View, before: Seen | None = None, first: int = 0) -> Seen:
        """Compute a stage from their earlier ones. before: the same stage, whose blocks below `first` are reused."""
        if is_backward(stage):
            return self.gradient(stage, view)
        ours, streams = [], []
        formulas, read = {stage}, set[str]()
        if before is not None:
            formulas, read = formulas | before.formulas, read | before.read
        having = self.having(stage)
        below = before.below if before is not None and first else [{} for _ in having]
        same = {"embedding", *(f"h.{layer}" for layer in range(first))}
        for case, taken in zip(having, below, strict=True):
            known = self.known(case, view) | {name: x for name, x in taken.items() if name in same}
            run = case.run(view.book, known)
            ours.append(computed(run, stage, case))
            asked = run.behind(stage)
            formulas |= asked - known.keys()
            read |= asked & known.keys()
            streams.append({k: v for k, v in run.known.items() if k == "embedding" or located(k)[1] == ""})
        gap = rms(stage, [case.theirs[stage] for case in having], ours)
        ratio = in_tolerances(gap, self.tolerances[stage])
        return Seen(view, ours, frozenset(formulas), frozenset(read), streams, gap, ratio)

    def gradient(self, stage: str, view: View) -> Seen:
        """Compute the loss or a gradient from their stages, with the pass that the view's other gradients use."""
        having = self.having(stage)
        for number, case in enumerate(having):
            if number not in view.runs:
                view.runs[number] = case.run(view.book, self.known(case, view))
        ours = [computed(run, stage, case) for run, case in zip(view.runs.values(), having, strict=True)]
        for run in view.runs.values():
            for part in ("d.wte.part", "d.head.part"):  # as large as wte, and seldom read again
                run.known.pop(part, None)
        gap = rms(stage, [case.theirs[stage] for case in having], ours)
        # rounding is in proportion to what comes from above, and theirs may be 65536 times what it should be
        larger = root(*ours) / (self.sizes[stage] or 1.0)
        scale = max(1.0, larger) if math.isfinite(larger) else 1.0
        return Seen(view, ours, frozenset(), frozenset(), [], gap, in_tolerances(gap, self.tolerances[stage] * scale))

    def behind(self, stage: str, seen: Seen) -> tuple[frozenset[str], frozenset[str]]:
        """Return the names of everything computed for a stage, and of their stages used for it."""
        if not is_backward(stage):
            return seen.formulas, seen.read
        asked = {stage}.union(*(run.behind(stage) for run in seen.view.runs.values()))
        given = set[str]().union(*(run.given for run in seen.view.runs.values()))
        return frozenset(asked - given | {stage}), frozenset(asked & given)

    def altered(self, view: View, entry: Mistake, own: frozenset[str]) -> View:
        """Return a view with a mistake, which keeps what this does not change. own: their stages that it drops."""
        found = View(entry.change(view.book), view.dropped | own, changed=set(own))
        for number, (run, case) in enumerate(zip(view.runs.values(), self.cases, strict=False)):
            for name, reads in run.asked.items():  # in the order in which they were finished
                if touches(entry, name) or not found.changed.isdisjoint(reads):
                    found.changed.add(name)
            given = self.known(case, found)
            kept = {name for name in run.asked if name in run.known and name not in found.changed} - given.keys()
            known = given | {name: run.known[name] for name in kept}
            asked = {name: run.asked[name] for name in run.asked if name in kept}
            found.runs[number] = replace(case.run(found.book, known), given=frozenset(given), asked=asked)
        return found

    def explains(self, stage: str, now: Seen, then: Seen, used: bool = False) -> bool:
        """Return whether a view explains a stage: most of the difference is gone, and what remains is rounding.

        The view's own rounding counts if needed, since it may be coarser than the correct model's. used: whether the
        mistake must explain more than the mere fact that the given stage is not what was used.
        """
        if not then.gap**2 <= ENERGY * now.gap**2:
            return False
        most = EXPLAIN[self.computed]
        if then.ratio > most and (then.ratio >= NEAR or then.gap > most * self.own_rounding(stage, then)):
            return False
        return not used or self.explains(stage, self.seen(stage, View(now.view.book, then.view.dropped), now), then)

    def own_rounding(self, stage: str, seen: Seen) -> float:
        """Return how far rounding takes a stage under a view itself, or 0 if that is infinite."""
        book, cases, dtype = seen.view.book, self.having(stage), self.dtype
        known = [
            {name: as_computed(x, dtype) for name, x in self.known(case, seen.view).items() if name != stage}
            for case in cases
        ]
        books = (replace(book, tensors=Moved(self.tensors, dtype, n)) for n in range(FLIPS if book.flips else 1))
        largest = max(errors(rough, cases, known, {stage: seen.ours})[stage] for rough in books)
        return FACTOR * largest if math.isfinite(largest) else 0.0


@dataclass(frozen=True)
class Model:
    """Every one of their stages as a model computes it."""

    judge: Judge
    seen: Mapping[str, Seen]

    def differing(self) -> list[str]:
        """Return the stages that rounding cannot explain, in the order of computation."""
        return [stage for stage, seen in self.seen.items() if seen.ratio > 1]

    def changed(self, entry: Mistake, used: bool) -> Iterator[tuple[str, Seen]]:
        """Yield the stages that a mistake changes, one by one, as they are with it.

        used: the mistake's own stages stay correct as given, and only later stages use the wrong values.
        """
        views: dict[View, View] = {}
        own = frozenset(s for s in self.seen if used and touches(entry, s) and "layers" not in entry.stages)
        own = frozenset(s for s in own if not is_last(s))
        if used and (not own or any(self.seen[s].ratio > 1 for s in own if is_backward(s))):
            return
        for stage, now in self.seen.items():
            if stage in own:
                continue
            if not is_backward(stage) and not any(touches(entry, name) for name in now.formulas | (now.read & own)):
                continue
            if now.view not in views:
                views[now.view] = self.judge.altered(now.view, entry, own)
            if is_backward(stage) and stage not in views[now.view].changed:
                continue
            yield stage, self.judge.seen(stage, views[now.view], now, 0 if used else entry.first)

    def with_it(self, entry: Mistake, used: bool) -> Model:
        """Return the model with a mistake."""
        return replace(self, seen={**self.seen, **dict(self.changed(entry, used))})


def computed(run: Pass, stage: str, case: Case) -> Array:
    """Return a stage computed by a pass, at the positions that theirs has, or nothing if it cannot be."""
    try:
        return case.seen(stage, plain(run.compute(stage)))
    except (ValueError, IndexError):  # ids of another number than theirs, or a block that is not there
        return np.zeros((0, 0, 0))


def touches(entry: Mistake, name: str) -> bool:
    """Return whether a mistake may change this name. The order of layers also decides what ln_f reads."""
    layer, local = located(name)
    if layer is not None and ((layer < entry.first and not is_backward(local)) or entry.layer not in (None, layer)):
        return False
    if layer is None and entry.layer is not None:
        return local in entry.outside or (bool(entry.outside) and local in entry.stages)
    return local in entry.stages or ("layers" in entry.stages and (layer is not None or local == "ln_f"))
