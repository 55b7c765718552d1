"""check and check_greedy: what another implementation gives against GPT-2's numbers, as one report.

What they give becomes stages (theirs.py, modules.py, files.py), stages become cases, and compare makes the report.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import parameters
from ..config import GPT2_VOCAB_SIZES, Config
from ..errors import NpgptError
from ..language_model import LanguageModel, load
from ..parameters import Array
from ..text.vocabularies import load_tokenizer
from . import conditions, files, lens, modules, outputs
from .arithmetic import UNIT, rounded
from .diagnosis import Diagnosis, diagnose
from .firings import THIRDS
from .judge import Judge
from .mistakes import Mistake, catalogue
from .modules import Module
from .naming import flat, names
from .outputs import Run
from .report import GreedyReport, Report, Row, logit_statistics
from .rounding import CLEAR, Progress, aligned, difference, run_all, tolerances
from .textbook import Pass, located, stages, textbook
from .theirs import Case, Taken, cases, take
from .weights import Comparison, compare_weights, listed, what_cannot_show
from .where import where

SHOWN = 3  # unexplained stages of which it is said where they differ
PRODUCTS = ("attn.c_attn", *THIRDS, "attn.q", "attn.k", "attn.v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
SAMPLED = 4096  # numbers that are looked at first
FEW = 8  # different numbers, below which they tell no dtype
Weights = LanguageModel | str | os.PathLike[str] | Mapping[str, Any] | Any  # the last a module
Prompt = str | ArrayLike


def check(
    theirs: Any,
    prompt: Prompt | None = None,
    weights: Weights | None = None,
    *,
    dtype: str | None = None,
    config: Config | None = None,
    n_head: int | None = None,
    attention_mask: ArrayLike | None = None,
    chunks: Sequence[int] = (),
    shape: Sequence[int] = (),
    perturb: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Compare another implementation of GPT-2 with the reference, and name the mistakes in it.

    theirs: logits [V], [T, V] or [B, T, V]; stages by name; the path of a file that holds one of these (.npz, .npy,
    .safetensors, .pt, .json, .csv, llm.c's debug state, or raw numbers of this shape in a .bin); a callable from ids
    [B, T] to logits; or a PyTorch module with the names of transformers, LLMs-from-scratch, nanoGPT or minGPT, run in
    evaluation mode. prompt: a text, or ids [T] or [B, T]; a file may hold them. weights: the model that theirs should
    be, by name or path, a module or a state dict; without it a module's own weights are taken as true, and anything
    else is compared with the embedded model. dtype: in which theirs computed; by default the coarsest that holds all it
    gives. attention_mask: 0 at padding, which is not compared. perturb: whether parameters of a module that hold one
    number throughout, as a fresh model's biases and gains, have others while both models are run, since mistakes with
    them would not show. progress: called with the steps done and all of them, in each of several parts. Raises
    NpgptError where the two cannot be compared.
    """
    if isinstance(theirs, (str, os.PathLike)):
        options: dict[str, Any] = {"dtype": dtype, "n_head": n_head, "attention_mask": attention_mask, "shape": shape}
        found = compare_file(theirs, prompt, weights, **options, config=config, chunks=chunks, progress=progress)
        if isinstance(found, GreedyReport):
            raise NpgptError(f"{os.fspath(theirs)} holds greedy ids and no logits: npgpt.check_greedy judges them")
        return found
    module = modules.open_module(theirs, n_head, config) if modules.is_module(theirs) else None
    judged_in = dtype
    known_heads = n_head or (None if module is None else module.config.n_head)
    reference = None if weights is None and module is not None else opened(weights, known_heads)
    problems: list[str] = []
    notes: list[str] = []
    if module is None:
        assert reference is not None
        model_config, tensors = config or reference.config, in_float64(reference)
    else:
        model_config = module.config
        loaded = loading(module, reference)
        problems, notes = loaded.problems, loaded.notes
        if perturb:
            module, said = module.perturbed()
            notes += said
        tensors = dict(module.tensors)
    if module is None or not perturb:
        notes += what_cannot_show(tensors, model_config.n_layer)
    ids = ids_of(prompt, reference, model_config)
    run: Run | None = None
    rewind = outputs.rewinder()
    if module is not None:
        seen = module.observed(ids)
        run, arrays = module.run, seen.stages
        wrong, said = seen.told()
        problems, notes = problems + wrong, notes + said
    elif callable(theirs):
        function = outputs.Function(theirs, model_config.vocab_size)
        run, arrays = function.run, function.run(ids)
        notes += function.notes
    elif isinstance(stages_of := getattr(theirs, "cache_dict", theirs), Mapping):  # TransformerLens's ActivationCache
        arrays = outputs.named(flat(stages_of))
    else:
        arrays = {"logits": outputs.logits_of(theirs, model_config.vocab_size)}
    if dtype is None:
        dtype, told = (module.dtype, []) if module is not None else stored_in(arrays)
        inner = multiplied_in(arrays, model_config)
        if UNIT[inner] > UNIT[dtype]:
            told = [f"All linear maps give numbers of {inner}, as under autocast: so it is judged (dtype=)."]
            dtype = inner
        notes += told
    if run is not None and (unsteady := outputs.unsteady(run, ids, arrays["logits"], rewind, UNIT.get(dtype, 0.0))):
        return Report([], Diagnosis([], [], []), dtype, notes, None, [unsteady, *problems])
    taken = take(arrays, model_config, ids, attention_mask, chunks)
    if module is None:
        model_config, tensors, taken = lens.undone(model_config, tensors, taken)
    tried = None if run is None else partial(experiments, run, ids, model_config)
    coarser = "float32" if judged_in is None and dtype == "float64" else None
    notes, problems = notes + taken.notes, problems + taken.problems

    def report(cases: Sequence[Case], problems: Sequence[str]) -> Report:
        return compare(
            model_config, tensors, cases, dtype, problems, notes, tried=tried, coarser=coarser, progress=progress
        )

    return without_padding(report, taken, problems)


def without_padding(
    report: Callable[[Sequence[Case], Sequence[str]], Report], taken: Taken, problems: list[str]
) -> Report:
    """Return the report on all cases. Where nothing explains it, and padded rows of which one position was given are
    the reason, they are a problem, and the report is on the other rows.
    """
    found = report(taken.cases, problems)
    if not taken.doubtful or found.diagnosis.unexplained is None:
        return found
    rows, places = (", ".join(map(str, numbers)) for numbers in (taken.doubtful, taken.doubtful.values()))
    rows = f"row {rows}" if len(taken.doubtful) == 1 else f"rows {rows} together"
    problem = (
        f"the output of {rows} is not that of the last token, at {places}: was it taken at -1, where it is padded?"
    )
    others = [case for row, case in enumerate(taken.cases) if row not in taken.doubtful]
    rest = report(others, [*problems, problem]) if others else found
    return rest if rest.diagnosis.unexplained is None else found


def loading(module: Module, reference: LanguageModel | None) -> Comparison:
    """Return what is to be said of a module before it is run: whether it drops out, and how its weights are loaded."""
    problems: list[str] = []
    notes: list[str] = []
    if what := conditions.dropping(module.module):
        notes.append(conditions.EVALUATED.format(what))
    if strange := module.stored.strange:
        line = f"{listed(strange, 0)} {'is' if len(strange) == 1 else 'are'} no tensor of GPT-2's"
        (notes if reference is None else problems).append(line if reference else f"{line}, and left out.")
    if reference is None:
        own = "The module's own weights are taken as true: mistakes in loading them cannot be seen (weights=)."
        return Comparison(problems, [*notes, own])
    found = compare_weights(module.tensors, in_float64(reference), module.dtype)
    if reference.config.n_head != module.config.n_head:
        problems.append(f"n_head is {module.config.n_head}, the reference has {reference.config.n_head}")
    return Comparison(found.problems + problems, notes + found.notes)


def compare_file(
    path: str | os.PathLike[str],
    prompt: Prompt | None = None,
    weights: Weights | None = None,
    *,
    dtype: str | None = None,
    n_head: int | None = None,
    attention_mask: ArrayLike | None = None,
    shape: Sequence[int] = (),
    **options: Any,
) -> Report | GreedyReport:
    """Compare what a file holds, as check and, where it is greedy ids alone, as check_greedy does.

    Arguments as check has them. Raises NpgptError for a file that cannot be read, and where the ids that it was run on
    are not told or told in two ways; OSError where it cannot be opened.
    """
    path = Path(os.path.expanduser(path))
    given = files.read(path, shape, dtype or "float32")
    model = opened(weights, n_head)
    stated = None if prompt is None else ids_of(prompt, model, model.config)
    ids = stated if given.token_ids is None else given.token_ids
    if ids is None:
        raise NpgptError(
            f"{path} holds no ids: give what it was run on, --prompt TEXT or --ids 1,2,3 (check(…, prompt=))"
        )
    if stated is not None and ids.reshape(-1).tolist() != stated.reshape(-1).tolist():
        raise NpgptError(f"{path} holds other ids than --prompt or --ids says: {ids.reshape(-1).tolist()!r:.200}")
    if given.greedy_ids is not None and not given.arrays:
        return check_greedy(given.greedy_ids, ids, model, dtype=dtype or "float32")
    mask = given.attention_mask if attention_mask is None else attention_mask
    report = check(given.stages(model.config), ids, model, dtype=dtype, attention_mask=mask, **options)
    left = [f"Left out, since they are no arrays: {', '.join(given.left)}."] if given.left else []
    return replace(report, notes=[*left, *report.notes])


def check_greedy(
    theirs: ArrayLike | os.PathLike[str],
    prompt: Prompt | None = None,
    weights: Weights | None = None,
    *,
    dtype: str = "float32",
) -> GreedyReport:
    """Judge greedy ids [N] that another implementation continued a prompt with, or prompt and continuation together.

    theirs: the ids, or the path of a file that holds them (greedy_ids, generated_ids or sequences). At the first token
    that differs the two logits' margin is compared with their rounding. Raises NpgptError for ids that do not fit into
    the context.
    """
    if isinstance(theirs, (str, os.PathLike)):
        found = compare_file(theirs, prompt, weights, dtype=dtype)
        if isinstance(found, Report):
            raise NpgptError(f"{os.fspath(theirs)} holds logits or stages: npgpt.check compares them")
        return found
    model = opened(weights)
    ids = ids_of(prompt, model, model.config)
    if len(ids) != 1:
        raise NpgptError(f"greedy ids are judged a row at a time, and the prompt has {len(ids)}")
    drawn = model.config.token_rows(theirs).reshape(-1)
    before = ids[0]
    if len(drawn) > len(before) and np.array_equal(drawn[: len(before)], before):
        drawn = drawn[len(before) :]
    tensors = in_float64(model)
    book = textbook(model.config, tensors)
    whole = model.config.token_rows(np.concatenate([before, drawn[:-1]]))
    rows = Pass(book, whole)["logits"][0, len(before) - 1 :]
    wrong = np.flatnonzero(rows.argmax(axis=-1) != drawn)
    if not len(wrong):
        return GreedyReport(None, None, None, 0.0, 0.0)
    at = int(wrong[0])
    row, best = rows[at], int(rows[at].argmax())
    case = Case(whole[:, : len(before) + at], {"logits": rows[None, at : at + 1]})
    allowed = tolerances(model.config, tensors, [case], run_all(book, [case]), dtype, ["logits"])
    # a logit is off by the root mean square, a difference of two by √2 of that; 3 of these are rare
    margin = 3 * math.sqrt(2) * allowed["logits"]
    return GreedyReport(at, int(drawn[at]), best, float(row[best] - row[drawn[at]]), margin)


def opened(weights: Weights | None, n_head: int | None = None) -> LanguageModel:
    """The model of that name or path, of a module or of a state dict; the embedded one for None."""
    if isinstance(weights, LanguageModel):
        return weights
    if modules.is_module(weights) or isinstance(weights, Mapping):
        return modules.as_language_model(weights, n_head)
    if weights is not None and not isinstance(weights, (str, os.PathLike)):
        raise NpgptError(f"weights must be a model, its name or path, a module or a state dict, not {weights!r:.80}")
    return load(weights, dtype="float64", n_head=n_head)


def in_float64(model: LanguageModel) -> dict[str, Array]:
    """A model's tensors by canonical name."""
    return {
        name: array.astype(np.float64, copy=False) for name, array in parameters.to_arrays(model.parameters).items()
    }


def ids_of(prompt: Prompt | None, model: LanguageModel | None, config: Config) -> NDArray[np.integer[Any]]:
    """Ids [B, T] of a prompt; of a text by the model's vocabulary, or by GPT-2's where its size is GPT-2's."""
    if prompt is None:
        raise NpgptError("there is no prompt: give the text or the ids that theirs was run on")
    if isinstance(prompt, str):
        if model is None:
            if config.vocab_size not in GPT2_VOCAB_SIZES:
                raise NpgptError(f"a text needs a vocabulary, and {config.vocab_size} ids are not GPT-2's: give ids")
            return config.token_rows(load_tokenizer("gpt2").encode(prompt))
        return config.token_rows(model.encode_prompt(prompt))
    return config.token_rows(prompt)


def stored_in(arrays: Mapping[str, NDArray[Any]]) -> tuple[str, list[str]]:
    """Return the dtype in which the last stage was computed, and a note where it is stored in another."""
    last = np.asarray(arrays["logits"] if "logits" in arrays else [*arrays.values()][-1:])
    dtype = computed_in(last)
    if dtype == str(last.dtype) or last.dtype.kind != "f":
        return dtype, []
    return dtype, [f"Every number is one of {dtype}, though stored as {last.dtype}: so it is judged (dtype=)."]


def multiplied_in(arrays: Mapping[str, NDArray[Any]], config: Config) -> str:
    """Return the finest dtype of what linear maps gave within the blocks, float64 for none."""
    known = names(config.n_layer)
    kinds = [computed_in(np.asarray(x)) for name, x in arrays.items() if located(known.get(name, ""))[1] in PRODUCTS]
    return min(kinds, key=UNIT.__getitem__, default="float64")


def computed_in(x: NDArray[Any]) -> str:
    """The coarsest dtype that has all of these numbers, since float16 and bfloat16 are often widened to be stored."""
    stored = str(x.dtype) if str(x.dtype) in UNIT else "float32"
    parts = (x.reshape(-1)[:SAMPLED], x)  # the first numbers tell it nearly always
    if x.dtype.kind != "f" or all(len(np.unique(part[np.isfinite(part)])) < FEW for part in parts):
        return stored
    coarser = (dtype for dtype in ("bfloat16", "float16", "float32") if UNIT[dtype] > UNIT[stored])
    return next((d for d in coarser if all(np.array_equal(rounded(y, d), y, equal_nan=True) for y in parts)), stored)


@np.errstate(all="ignore")  # what a mistake makes infinite is judged, not warned of
def compare(
    config: Config,
    tensors: Mapping[str, Array],
    given: Sequence[Case],
    dtype: str = "float32",
    problems: Sequence[str] = (),
    notes: Sequence[str] = (),
    entries: Sequence[Mistake] | None = None,
    tried: Callable[[Judge], list[str]] | None = None,
    coarser: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """The comparison itself: cases against a model of these float64 tensors. dtype: in which theirs computed; entries:
    the mistakes that are looked for, by default all that a model of this shape can have. tried: experiments for
    where no mistake explains it, as notes. coarser: a dtype that it is judged in where rounding in dtype is not all.
    """
    if dtype not in UNIT:
        raise NpgptError(f"their dtype must be one of {', '.join(UNIT)}, not {dtype}")
    judged = [stage for stage in stages(config.n_layer) if any(stage in case.theirs for case in given)]
    if not judged:
        raise NpgptError("there is nothing to compare: no judged position has logits or a stage")
    book = textbook(config, tensors)
    reference = run_all(book, given)
    allowed = tolerances(config, tensors, given, reference, dtype, judged, progress)
    if coarser is not None and not all(fits(stage, given, reference, allowed) for stage in judged):
        allowed = tolerances(config, tensors, given, reference, coarser, judged, progress)
        right = all(fits(stage, given, reference, allowed) for stage in judged)
        finer = f"right to {coarser}, and given in {dtype}, which is finer than it computes"
        judging = f"given in {dtype}, and judged in {coarser}, since a part of it may compute in that (dtype=)"
        dtype, notes = coarser, [f"It is {finer if right else judging}.", *notes]
    judge = Judge(given, judged, allowed, tensors, dtype, progress=progress)
    alone = judge.right(book)
    rows = [
        Row(
            stage,
            difference(stage, given, reference, allowed[stage], dtype),
            None if stage in ("wte", "wpe") else alone.seen[stage].ratio,
        )
        for stage in judged
    ]
    if entries is None:
        tokens = max(case.token_ids.shape[1] for case in given)
        entries = catalogue(config, tokens, given[0].chunks, any(case.padding for case in given))
    statistics, said = None, list(notes)
    if "logits" in judged:
        having = [(case, right) for case, right in zip(given, reference, strict=True) if "logits" in case.theirs]
        pairs = [aligned("logits", case.theirs["logits"], right["logits"]) for case, right in having]
        statistics = logit_statistics(pairs, allowed["logits"])
        if statistics is None:
            said.append(
                "Their logits are not finite, or of another number of positions, so that they have no statistics."
            )
    apart = [row for row in rows if row.difference.ratio > 1]
    found = diagnose(judge, alone, entries, search=bool(apart))
    if apart and not found.findings and not found.unknown:  # each stage is right by its own input, their errors add up
        found = replace(found, unknown=[apart[0].stage], faint=apart[0].difference.ratio < CLEAR)
    if tried is not None and found.unexplained is not None:
        said += tried(judge)
    shown = [row.stage for row in apart[:1]] + found.unknown[:SHOWN]
    theirs = {stage: [case.theirs[stage] for case in given if stage in case.theirs] for stage in shown}
    at = {stage: where(stage, theirs[stage], alone.seen[stage].ours, allowed[stage], config.n_head) for stage in theirs}
    return Report(rows, found, dtype, said, statistics, list(problems), at)


def fits(stage: str, given: Sequence[Case], reference: Sequence[Pass], allowed: Mapping[str, float]) -> bool:
    """Whether rounding explains a stage."""
    return difference(stage, given, reference, allowed[stage], "float64").ratio <= 1


def experiments(run: Run, ids: NDArray[np.integer[Any]], config: Config, judge: Judge) -> list[str]:
    """The two that tell most where nothing is explained: one token alone, and another token at the end."""
    if ids.shape[1] < 2:
        return []

    def given(ids: NDArray[np.integer[Any]]) -> Case:
        return cases({"logits": run(ids)["logits"]}, config, ids)[0]

    try:
        one = given(np.concatenate([case.token_ids[:, :1] for case in judge.cases]))
        reference = run_all(textbook(config, judge.tensors), [one])
        allowed = tolerances(config, judge.tensors, [one], reference, judge.dtype, ["logits"])
        apart = difference("logits", [one], reference, allowed["logits"], judge.dtype).ratio > 1
        found = [f"Tried: the first token alone {'differs as well' if apart else 'agrees'}."]
    except NpgptError as error:
        found = [f"Tried: the first token alone gives what cannot be compared ({error})."]
    other = ids.copy()
    other[:, -1] = (other[:, -1] + 1) % config.vocab_size
    with suppress(NpgptError):
        before, after = (given(each).theirs["logits"] for each in (ids, other))
        if before.shape == after.shape and before.shape[1] == ids.shape[1]:
            gap = np.abs(before[:, :-1] - after[:, :-1]).max()
            seen = gap > 1000 * UNIT[judge.dtype] * np.abs(before).max()
            found.append(f"Tried: another last token {'changes' if seen else 'does not change'} earlier positions.")
    return found
