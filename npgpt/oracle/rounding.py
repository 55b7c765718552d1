"""How far rounding alone can take a stage, and how far another implementation is from it.

Rounding is sampled: a model is written in another way that is the same function but rounds anew, and run in the
declared dtype against float64. GPT-2 itself has its channels, heads and units in another order (redrawn). A model with
a mistake in it need not keep these symmetries, so there weights move by some last bits (moved). A stage's tolerance is
FACTOR times the largest root-mean-square error of the samples, and never less than rounding the stage itself once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..parameters import Array, schema
from .arithmetic import UNIT, as_computed, plain
from .textbook import Formula, Pass, Scope, Textbook, located, textbook
from .theirs import OUTPUTS, Case

DRAWS = 24  # samples of the right model
WIDE, WIDE_DRAWS = (
    256,
    8,
)  # from this n_embd on fewer do: the largest of 8 was at least 0.85 of that of 24 at every stage
FLIPS = 4  # samples of a mistake whose formula rounds within, so that a last bit may flip a coarser one
MOVED = 64  # units in the last place by which weights move for these; by one, a coarser bit would seldom flip
# A naive sum in C, one product after the other, was measured at 3 times BLAS's error, which keeps 16 or more partial
# sums; twice that leaves room for another exp and tanh, and for the draws' own spread.
FACTOR = 6.0
HIDDEN = -5e3  # what no score of a model comes near, so that a lower one is hidden
CLEAR = 5.0  # times the tolerance, from which on a difference is named
INPUT = {"attn.c_attn": "ln_1", "attn.c_proj": "attn.merged", "mlp.c_fc": "ln_2", "mlp.c_proj": "mlp.act"}


Progress = Callable[[int, int], None]  # steps done, of how many


@dataclass(frozen=True)
class Redraw:
    """Orders of the residual channels [C]; by block of heads [H], queries' and values' columns [C], units [F]."""

    channels: NDArray[np.intp]
    heads: list[NDArray[np.intp]]
    queries: list[NDArray[np.intp]]
    values: list[NDArray[np.intp]]
    units: list[NDArray[np.intp]]

    def columns(self, layer: int | None, stage: str) -> NDArray[np.intp]:
        """The order of a stage's last axis; heads have an axis of their own."""
        if layer is None:
            return self.channels
        queries, values, C = self.queries[layer], self.values[layer], len(self.channels)
        if stage == "attn.c_attn":
            return np.concatenate([queries, C + queries, 2 * C + values])
        orders = {"attn.query": queries, "attn.key": queries, "attn.q": queries, "attn.k": queries}
        orders |= {"attn.value": values, "attn.merged": values, "attn.v": values, "attn.heads": values}
        orders |= {"mlp.c_fc": self.units[layer], "mlp.act": self.units[layer]}
        return orders.get(stage, self.channels)

    def tensors(self, config: Config, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """The model's tensors in this order."""
        found = {}
        for name in schema(config):
            layer, local = located(name)
            part, _, kind = local.rpartition(".")
            array = tensors[name]  # take is four times as fast as brackets
            if kind == "weight" and part in INPUT:
                rows = self.columns(layer, INPUT[part])
                if len(rows) == len(array):  # an attention alone may have another input width
                    array = array.take(rows, axis=0)
            found[name] = array.take(self.columns(layer, part), axis=-1)
        return found

    def drawn(self, stage: str, array: Array) -> Array:
        """A stage of the model in this order, the inverse of restored."""
        places = self.restored(stage, np.arange(array.size, dtype=np.float64).reshape(array.shape)).astype(np.intp)
        out = np.empty_like(array, order="C")
        out.reshape(-1)[places.reshape(-1)] = array.reshape(-1)
        return out

    def restored(self, stage: str, array: Array) -> Array:
        """A stage of that model in the model's own order."""
        layer, local = located(stage)
        out, columns, width = np.empty_like(array), self.columns(layer, local), array.shape[-1]
        if layer is not None and local in ("attn.scores", "attn.weights"):
            out[:, self.heads[layer]] = array
        elif layer is not None and local in ("attn.q", "attn.k", "attn.v", "attn.heads"):
            for place, head in enumerate(self.heads[layer]):
                out[:, head][..., columns[place * width : (place + 1) * width] - head * width] = array[:, place]
        elif stage in OUTPUTS or len(columns) != width:  # or the input of an attention alone
            return array
        else:
            out[..., columns] = array
        return out


def redraw(config: Config, generator: np.random.Generator) -> Redraw:
    """Another order of everything."""
    D, layers = config.head_width, range(config.n_layer)
    heads = [generator.permutation(config.n_head) for _ in layers]

    def columns(order: NDArray[Any]) -> NDArray[np.intp]:
        return np.concatenate([head * D + generator.permutation(D) for head in order])

    return Redraw(
        generator.permutation(config.n_embd),
        heads,
        [columns(order) for order in heads],
        [columns(order) for order in heads],
        [generator.permutation(config.inner_width) for _ in layers],
    )


@dataclass(frozen=True)
class Moved(Mapping[str, Array]):
    """These float64 tensors in dtype, their columns moved by some last bits: another draw for each number, 0 as is."""

    tensors: Mapping[str, Array]
    dtype: str
    number: int

    def __getitem__(self, name: str) -> Array:
        array = self.tensors[name]
        if self.number:
            step = 2 * UNIT[self.dtype] * MOVED
            rng = np.random.default_rng([self.number, *name.encode()])
            array = array * (1 + rng.uniform(-step, step, array.shape[-1]))
        return as_computed(array, self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def redrawn(config: Config, tensors: Mapping[str, Array], dtype: str, number: int) -> tuple[Redraw, Textbook]:
    """Return another order of a right model of these float64 tensors, and the model in it, in dtype.

    Every second one adds its biases before the products and not after them, as BLAS's addmm may: where a bias is large
    beside its product, each partial sum is then rounded at the bias's size.
    """
    order = redraw(config, np.random.default_rng(number))
    book = textbook(config, order.tensors(config, Moved(tensors, dtype, 0)))
    if number % 2 and dtype in ("float32", "float64"):
        book = book.altered({name: bias_first(name, source) for name, source in INPUT.items()})
    return order, book


def draws(config: Config) -> int:
    """Return how many samples of a model of this size are drawn."""
    return DRAWS if config.n_embd < WIDE else WIDE_DRAWS


def bias_first(name: str, source: str) -> Formula:
    """source @ weight + bias, the bias as one more row of the weight, which is summed before the others."""

    def formula(s: Scope) -> Array:
        x, weight, bias = s[source], s[f"{name}.weight"], s[f"{name}.bias"]
        ones = np.ones((*x.shape[:-1], 1), x.dtype)
        return np.concatenate([ones, x], axis=-1) @ np.concatenate([bias[None], weight])

    return formula


def tolerances(
    config: Config,
    tensors: Mapping[str, Array],
    cases: Sequence[Case],
    reference: Sequence[Pass],
    dtype: str,
    wanted: Sequence[str],
    progress: Progress | None = None,
) -> dict[str, float]:
    """Return how far rounding in dtype can take each of these stages of the right model. tensors: float64."""
    error = dict.fromkeys(wanted, 0.0)
    for number in range(draws(config)):
        if progress is not None:
            progress(number, draws(config))
        order, book = redrawn(config, tensors, dtype, number)
        given = [{k: as_computed(order.drawn(k, x), dtype) for k, x in case.given.items()} for case in cases]
        with np.errstate(over="ignore", invalid="ignore"):
            runs = run_all(book, cases, given)
            for stage in wanted:
                found = [plain(order.restored(stage, run[stage])) for run in runs]
                error[stage] = max(error[stage], rms_of_runs(stage, cases, found, [run[stage] for run in reference]))
        del book, runs  # or they would stay while the next one is drawn
    return {stage: max(FACTOR * error[stage], floor(stage, reference, dtype)) for stage in wanted}


def floor(stage: str, reference: Sequence[Pass], dtype: str) -> float:
    """Return the root mean square of one rounding of each number, and of its being stored."""
    expected = np.concatenate([plain(run[stage]).ravel() for run in reference])
    finite = expected[np.isfinite(expected)]
    return 2 * UNIT[dtype] * math.sqrt(float(np.square(finite).mean())) if finite.size else 0.0


def own_rounding(
    book: Textbook,
    tensors: Mapping[str, Array],
    cases: Sequence[Case],
    known: Sequence[Mapping[str, Array]],
    stage: str,
    exact: Sequence[Array],
    dtype: str,
) -> float:
    """Return how far rounding in dtype takes a stage of a model with a mistake, from known stages; 0 if to infinity."""
    errors = []
    for number in range(FLIPS if book.flips else 1):
        rough = replace(book, tensors=Moved(tensors, dtype, number))
        given = [{k: as_computed(x, dtype) for k, x in each.items()} for each in known]
        with np.errstate(over="ignore", invalid="ignore"):
            runs = run_all(rough, cases, given)
            errors.append(rms_of_runs(stage, cases, [plain(run.compute(stage)) for run in runs], exact))
    return FACTOR * max(errors) if math.isfinite(max(errors)) else 0.0


def rms_of_runs(stage: str, cases: Sequence[Case], found: Sequence[Array], expected: Sequence[Array]) -> float:
    """Return the root mean square of what runs differ by, on the positions that theirs has."""
    having = [number for number, case in enumerate(cases) if stage in case.theirs]
    return rms(stage, [cases[n].seen(stage, found[n]) for n in having], [expected[n] for n in having])


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


def rms(stage: str, theirs: Sequence[Array], expected: Sequence[Array]) -> float:
    """The root mean square of the differences, infinite where there is a NaN or no comparison."""
    pair = paired(stage, theirs, expected)
    if pair is None:
        return math.inf
    with np.errstate(invalid="ignore", over="ignore"):
        root = math.sqrt(float(np.square(pair[0] - pair[1]).mean()))
    return math.inf if math.isnan(root) else root


def difference(stage: str, cases: Sequence[Case], runs: Sequence[Pass], tolerance: float, dtype: str) -> Difference:
    """Theirs against these runs, all cases together."""
    having = [(case.theirs[stage], run[stage]) for case, run in zip(cases, runs, strict=True) if stage in case.theirs]
    pair = paired(stage, [theirs for theirs, _ in having], [ours for _, ours in having])
    if pair is None:
        return Difference(math.inf, tolerance, math.inf, math.inf, 0.0, math.inf)
    theirs, ours = pair
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


def run_all(book: Textbook, cases: Sequence[Case], known: Sequence[Mapping[str, Array]] = ()) -> list[Pass]:
    """A pass for every case; known: stages that are taken as given, besides those that the case says."""
    starts = known or [{}] * len(cases)
    return [
        Pass(book, case.token_ids, {**case.given, **start}, case.padding)
        for case, start in zip(cases, starts, strict=True)
    ]
