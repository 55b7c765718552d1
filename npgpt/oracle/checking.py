"""check: another implementation's numbers against GPT-2's, as one report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import parameters
from ..config import Config
from ..errors import NpgptError
from ..language_model import LanguageModel, load
from ..parameters import Array
from . import modules
from .arithmetic import UNIT, rounded
from .diagnosis import Judge, diagnose
from .evidence import OUTPUTS, Case, cases
from .judging import aligned, difference, run_all, tolerances
from .mistakes import Mistake, catalogue
from .modules import logits_of, run_module
from .report import DRAWN, Report, Row, logit_statistics
from .textbook import Pass, Textbook, stages, textbook

FEW = 8  # different numbers, below which they tell no dtype
Weights = LanguageModel | str | os.PathLike[str]


def check(
    theirs: Any,
    prompt: str | ArrayLike,
    weights: Weights | None = None,
    *,
    dtype: str | None = None,
    config: Config | None = None,
    n_head: int | None = None,
    attention_mask: ArrayLike | None = None,
    chunks: Sequence[int] = (),
) -> Report:
    """Compare another implementation of GPT-2 with the reference, and name the mistakes in it.

    theirs: logits [V], [T, V] or [B, T, V]; stages by name; a callable from ids [B, T] to logits; or a PyTorch module
    with the names of transformers, LLMs-from-scratch, nanoGPT or minGPT, which is run as it stands. prompt: a text, or
    ids [T] or [B, T]. weights: the model that theirs should be, by name or path; without it a module's own weights are
    taken as true, and anything else is compared with the embedded model. dtype: in which theirs computed; by default
    the coarsest that holds all it gives. Raises NpgptError where the two cannot be compared.
    """
    reference: LanguageModel | None = None
    if isinstance(weights, LanguageModel):
        reference = weights
    elif weights is not None or not modules.is_module(theirs):
        reference = load(weights, dtype="float64", n_head=n_head)
    problems: list[str] = []
    notes: list[str] = []
    if modules.is_module(theirs):
        opened = modules.open_module(theirs, n_head, config)
        model_config, tensors = opened.config, dict(opened.tensors)
        if reference is None:
            notes.append(
                "The module's own weights are taken as true: mistakes in loading them cannot be seen (weights=)."
            )
        else:
            problems += modules.compare_weights(tensors, in_float64(reference))
            if reference.config.n_head != model_config.n_head:
                problems.append(f"n_head is {model_config.n_head}, the reference has {reference.config.n_head}")
    else:
        assert reference is not None
        opened, model_config, tensors = None, config or reference.config, in_float64(reference)
    ids = ids_of(prompt, reference, model_config)
    if opened is not None:
        problems += modules.dropout(theirs)
        arrays: Mapping[str, ArrayLike] = run_module(opened, ids)
        again = run_module(opened, ids)
        if not np.array_equal(arrays["logits"], again["logits"], equal_nan=True):
            problems.append(DRAWN)
        dtype = dtype or opened.dtype
    elif callable(theirs):
        arrays = {"logits": logits_of(theirs(ids))}
        if not np.array_equal(arrays["logits"], logits_of(theirs(ids)), equal_nan=True):
            problems.append(DRAWN)
    elif isinstance(theirs, Mapping):
        arrays = {name: modules.as_array(array) for name, array in theirs.items()}
    else:
        arrays = {"logits": modules.as_array(theirs)}
    if dtype is None:
        last = np.asarray(arrays["logits"] if "logits" in arrays else [*arrays.values()][-1:])
        dtype = computed_in(last)
        if dtype != str(last.dtype) and last.dtype.kind == "f":
            notes.append(f"Every number is one of {dtype}, though stored as {last.dtype}: so it is judged (dtype=).")
    given = cases(arrays, model_config, ids, attention_mask, chunks)
    report = compare(model_config, tensors, given, dtype, problems, notes)
    if report.diagnosis.unexplained is None or not (opened is not None or callable(theirs)):
        return report

    def run(ids: NDArray[np.integer[Any]]) -> Array:
        """Theirs, on other ids."""
        return run_module(opened, ids)["logits"] if opened is not None else logits_of(theirs(ids)).astype(np.float64)

    return replace(report, notes=[*report.notes, *experiments(run, model_config, tensors, ids, dtype)])


def experiments(
    run: Callable[[NDArray[np.integer[Any]]], Array],
    config: Config,
    tensors: Mapping[str, Array],
    ids: NDArray[np.integer[Any]],
    dtype: str,
) -> list[str]:
    """The two that tell most where nothing is explained: one token alone, and another token at the end."""
    if ids.shape[1] < 2:
        return []
    try:
        one = cases({"logits": run(ids[:, :1])}, config, ids[:, :1])
        agrees = compare(config, tensors, one, dtype, entries=[]).matches
        found = [f"Tried: the first token alone {'agrees' if agrees else 'differs as well'}."]
    except NpgptError as error:
        found = [f"Tried: the first token alone gives what cannot be compared ({error})."]
    other = ids.copy()
    other[:, -1] = (other[:, -1] + 1) % config.vocab_size
    before, after = run(ids), run(other)
    if before.ndim == 3 and before.shape == after.shape and before.shape[1] == ids.shape[1]:
        gap = np.abs(before[:, :-1] - after[:, :-1]).max()
        seen = gap > 1000 * UNIT[dtype] * np.abs(before).max()
        found.append(f"Tried: another last token {'changes' if seen else 'does not change'} earlier positions.")
    return found


def in_float64(model: LanguageModel) -> dict[str, Array]:
    """A model's tensors by canonical name."""
    return {
        name: array.astype(np.float64, copy=False) for name, array in parameters.to_arrays(model.parameters).items()
    }


def ids_of(prompt: str | ArrayLike, model: LanguageModel | None, config: Config) -> NDArray[np.integer[Any]]:
    """Ids [B, T] of a prompt; of a text by the model's vocabulary, or by GPT-2's where its size is GPT-2's."""
    if isinstance(prompt, str):
        if model is None:
            from ..config import GPT2_VOCAB_SIZES
            from ..text.vocabularies import load_tokenizer

            if config.vocab_size not in GPT2_VOCAB_SIZES:
                raise NpgptError(f"a text needs a vocabulary, and {config.vocab_size} ids are not GPT-2's: give ids")
            return config.token_rows(load_tokenizer("gpt2").encode(prompt))
        return config.token_rows(model.encode_prompt(prompt))
    return config.token_rows(prompt)


def computed_in(x: NDArray[Any]) -> str:
    """The coarsest dtype that has all of these numbers, since float16 and bfloat16 are often widened to be stored."""
    stored = str(x.dtype) if str(x.dtype) in UNIT else "float32"
    if x.dtype.kind != "f" or len(np.unique(x[np.isfinite(x)])) < FEW:
        return stored
    coarser = (dtype for dtype in ("bfloat16", "float16", "float32") if UNIT[dtype] > UNIT[stored])
    return next((dtype for dtype in coarser if np.array_equal(rounded(x, dtype), x, equal_nan=True)), stored)


@np.errstate(all="ignore")  # what a mistake makes infinite is judged, not warned of
def compare(
    config: Config,
    tensors: Mapping[str, Array],
    given: Sequence[Case],
    dtype: str = "float32",
    problems: Sequence[str] = (),
    notes: Sequence[str] = (),
    entries: Sequence[Mistake] | None = None,
) -> Report:
    """The comparison itself: cases against a model of these float64 tensors. dtype: in which theirs computed; entries:
    the mistakes that are looked for, by default all that a model of this shape can have.
    """
    if dtype not in UNIT:
        raise NpgptError(f"their dtype must be one of {', '.join(UNIT)}, not {dtype}")
    judged = [stage for stage in stages(config.n_layer) if any(stage in case.theirs for case in given)]
    if not judged:
        raise NpgptError("there is nothing to compare: no judged position has logits or a stage")
    book = textbook(config, tensors)
    reference = run_all(book, given)
    allowed = tolerances(config, tensors, given, reference, dtype, judged)
    judge = Judge(given, judged, allowed, tensors, dtype)
    own = _alone(judge, book)
    rows = [
        Row(stage, difference(stage, *_having(judge, stage, reference), allowed[stage], dtype), own.get(stage))
        for stage in judged
    ]
    tokens = max(case.token_ids.shape[1] for case in given)
    if entries is None:
        entries = catalogue(config, tokens, given[0].chunks, any(case.padding for case in given))
    statistics = None
    if "logits" in judged:
        pairs = [
            aligned("logits", case.theirs["logits"], run["logits"])
            for case, run in zip(*_having(judge, "logits", reference), strict=True)
        ]
        whole = [pair for pair in pairs if pair is not None and np.isfinite(pair[0]).all()]
        if len(whole) == len(pairs):
            statistics = logit_statistics([a for a, _ in whole], [b for _, b in whole], allowed["logits"])
        else:
            notes = [
                *notes,
                "Their logits are not finite, or of another number of positions, so that they have no statistics.",
            ]
    return Report(rows, diagnose(judge, reference, entries), dtype, list(notes), statistics, list(problems))


def _having(judge: Judge, stage: str, runs: Sequence[Pass]) -> tuple[list[Case], list[Pass]]:
    have = judge.theirs(stage)
    return [case for case, _ in have], [runs[number] for _, number in have]


def _alone(judge: Judge, book: Textbook) -> dict[str, float]:
    """Each stage computed from their own input, in tolerances: where the next mistake begins. The first has none."""
    found = {}
    inputs = [
        {name: array for name, array in case.theirs.items() if name not in OUTPUTS and name != "wpe"}
        for case in judge.cases
    ]
    runs = run_all(book, judge.cases, inputs)
    for stage in judge.stages:
        if stage not in ("wte", "wpe"):
            found[stage] = judge.ratio(stage, [replace(run, known={stage: run.compute(stage)}) for run in runs])
    return found
