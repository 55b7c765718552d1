"""Measure how far rounding alone can take a stage.

Rounding is sampled: the model is rewritten as an equal function that rounds differently, and run in the declared dtype
against float64. For GPT-2 itself, channels, heads and hidden units are permuted (redrawn). A model with a mistake need
not have these symmetries, so its weights are moved by a few units in the last place instead (moved). The tolerance of a
stage is FACTOR times the largest root mean square error of the samples, and at least that of rounding the stage once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..parameters import Array, schema
from .arithmetic import UNIT, as_computed, plain
from .difference import rms, root
from .functions import merge, split
from .textbook import Formula, Pass, Scope, Textbook, located, textbook
from .theirs import OUTPUTS, Case

DRAWS = 24  # samples of the correct model
WIDE, WIDE_DRAWS = 256, 8  # for n_embd from 256: the largest of 8 was at least 0.85 of the largest of 24 at every stage
FLIPS = 4  # samples of a mistake that rounds internally, where a last bit may flip a coarser one
MOVED = 64  # units in the last place by which weights move in these samples; 1 would seldom flip a coarser bit
# A naive sum in C, one product after another, had 3 times the error of BLAS, which keeps 16 or more partial sums. Twice
# that leaves room for another exp and tanh, and for the spread of the samples.
FACTOR = 6.0
CLEAR = 5.0  # tolerances from which a mistake is named
INPUT = {"attn.c_attn": "ln_1", "attn.c_proj": "attn.merged", "mlp.c_fc": "ln_2", "mlp.c_proj": "mlp.act"}
SPLIT = ("attn.q", "attn.k", "attn.v", "attn.heads")  # [B, H, T, D]

Progress: TypeAlias = Callable[[int, int], None]  # steps done, all steps
Order: TypeAlias = NDArray[np.intp]


@dataclass(frozen=True)
class Redraw:
    """A permutation of the model: of the residual channels [C], and per block of the last axis of other stages.

    "heads" is the order of the heads [H] of a block.
    """

    channels: Order
    blocks: list[dict[str, Order]]

    def columns(self, layer: int | None, stage: str) -> Order:
        """Return the order of a stage's last axis, by local name. Stages split into heads count as merged."""
        return self.channels if layer is None else self.blocks[layer].get(stage, self.channels)

    def tensors(self, config: Config, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """Return the model's tensors in this order."""
        found = {}
        for name in schema(config):
            layer, local = located(name)
            part, _, kind = local.rpartition(".")
            array = tensors[name]  # take is four times as fast as indexing
            if kind == "weight" and (rows := self.rows(layer, part, len(array))) is not None:
                array = array.take(rows, axis=0)
            found[name] = array.take(self.columns(layer, part), axis=-1)
        return found

    def rows(self, layer: int | None, part: str, count: int) -> Order | None:
        """Return the order of the rows of a linear map's weight, or None if they keep theirs."""
        rows = self.columns(layer, INPUT[part]) if part in INPUT else None
        # a single attention part may have another input width
        return rows if rows is not None and len(rows) == count else None

    def drawn(self, stage: str, array: Array) -> Array:
        """Return a stage of the model in this order. This is the inverse of restored."""
        places = self.restored(stage, np.arange(array.size, dtype=np.float64).reshape(array.shape))
        return array.reshape(-1)[places.argsort(axis=None)].reshape(array.shape)

    def restored(self, stage: str, array: Array) -> Array:
        """Return a stage of the permuted model in the model's own order."""
        layer, local = located(stage)
        local = local.removeprefix("d.")  # a gradient has the order of what it belongs to
        part, _, kind = local.rpartition(".")
        if kind in ("weight", "bias"):
            rows = self.rows(layer, part, len(array)) if kind == "weight" else None
            array = array if rows is None else array.take(rows.argsort(), axis=0)
            return array.take(self.columns(layer, part).argsort(), axis=-1)
        if local in ("attn.scores", "attn.weights"):
            return array.take(self.columns(layer, "heads").argsort(), axis=1)
        whole = merge(array) if local in SPLIT else array
        columns = self.columns(layer, local)
        if local in (*OUTPUTS, "loss") or len(columns) != whole.shape[-1]:  # or the input of a single attention part
            return array
        whole = whole.take(columns.argsort(), axis=-1)
        return split(whole, array.shape[1]) if local in SPLIT else whole


def redraw(config: Config, generator: np.random.Generator) -> Redraw:
    """Return a random permutation of the model."""
    C, D, layers = config.n_embd, config.head_width, range(config.n_layer)
    heads = [generator.permutation(config.n_head) for _ in layers]
    channels = generator.permutation(C)

    def columns(order: Order) -> Order:
        return np.concatenate([head * D + generator.permutation(D) for head in order])

    queries, values = ([columns(order) for order in heads] for _ in range(2))
    units = [generator.permutation(config.inner_width) for _ in layers]
    return Redraw(
        channels,
        [
            {"heads": order, "attn.c_attn": np.concatenate([query, C + query, 2 * C + value])}
            | dict.fromkeys(("attn.query", "attn.key", "attn.q", "attn.k"), query)
            | dict.fromkeys(("attn.value", "attn.v", "attn.heads", "attn.merged"), value)
            | dict.fromkeys(("mlp.c_fc", "mlp.act"), unit)
            for order, query, value, unit in zip(heads, queries, values, units, strict=True)
        ],
    )


@dataclass(frozen=True)
class Moved(Mapping[str, Array]):
    """float64 tensors in dtype, with columns moved by a few last bits. number: which sample; 0 moves nothing."""

    tensors: Mapping[str, Array]
    dtype: str
    number: int = 0

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


def bias_first(name: str, source: str) -> Formula:
    """Return the formula source @ weight + bias with the bias as the first row of the weight, so it is added first."""

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
    """Return how far rounding in dtype can take each wanted stage of the correct model. tensors: float64.

    Every second sample adds biases before the products, as addmm in BLAS may. If a bias is large compared with the
    product, every partial sum is then rounded at the magnitude of the bias.
    """
    exact = {stage: [run[stage] for run in reference] for stage in wanted}
    draws = DRAWS if config.n_embd < WIDE else WIDE_DRAWS

    def drawn(number: int) -> dict[str, float]:
        if progress is not None:
            progress(number, draws)
        order = redraw(config, np.random.default_rng(number))
        book = textbook(config, order.tensors(config, Moved(tensors, dtype)))
        if number % 2 and dtype in ("float32", "float64"):
            again = {name: bias_first(name, source) for name, source in INPUT.items()}
            book = replace(book, block={**book.block, **again})  # the same function, with the same gradients
        known = [{k: as_computed(order.drawn(k, x), dtype) for k, x in case.given.items()} for case in cases]
        return errors(book, cases, known, exact, order.restored)

    def least(stage: str) -> float:  # each number is rounded once, and again when stored
        finite = np.concatenate([x[np.isfinite(x)] for x in exact[stage]])
        # a sum over n targets, in pairs, is rounded log₂ n times more, which the samples of one number may not show
        sums = math.log2(sum(case.token_ids.size for case in cases)) if stage == "loss" else 0.0
        return 2 * UNIT[dtype] * root(finite) * (1 + sums) if finite.size else 0.0

    found = [drawn(number) for number in range(draws)]
    return {stage: max(FACTOR * max(error[stage] for error in found), least(stage)) for stage in wanted}


def errors(
    book: Textbook,
    cases: Sequence[Case],
    known: Sequence[Mapping[str, Array]],
    exact: Mapping[str, Sequence[Array]],
    restored: Callable[[str, Array], Array] = lambda stage, array: array,
) -> dict[str, float]:
    """Return the root mean square errors, by stage, of runs from known stages, at the positions that theirs has."""
    found = {}
    with np.errstate(over="ignore", invalid="ignore"):
        runs = run_all(book, cases, known)
        for stage, right in exact.items():
            having = [n for n, case in enumerate(cases) if stage in case.theirs]
            rough = [cases[n].seen(stage, plain(restored(stage, runs[n][stage]))) for n in having]
            found[stage] = rms(stage, rough, [right[n] for n in having])
    return found


def run_all(book: Textbook, cases: Sequence[Case], known: Sequence[Mapping[str, Array]] = ()) -> list[Pass]:
    """Return a pass for every case. known: stages to take as given, besides those of the case."""
    starts = known or [{}] * len(cases)
    return [case.run(book, {**case.given, **start}) for case, start in zip(cases, starts, strict=True)]
