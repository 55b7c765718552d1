"""check and check_greedy: compare another implementation with GPT-2, and return one report.

running.py, outputs.py, modules.py and files.py turn their input into stages, theirs.py turns stages into cases, and
comparison.py makes the report.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import parameters
from ..config import GPT2_VOCAB_SIZES, Config
from ..errors import NpgptError, checked, whole_number
from ..language_model import LanguageModel, load
from ..parameters import Array
from ..text.vocabularies import load_tokenizer
from . import conditions, files, lens, modules
from .arithmetic import UNIT, computed_in, known_dtype
from .comparison import compare, experiments
from .diagnosis import Diagnosis
from .files import Given
from .firings import THIRDS
from .modules import Module
from .naming import flat, names
from .outputs import logits_of, named
from .report import GreedyReport, Report
from .rounding import Progress, run_all, tolerances
from .running import Function, Ids, Run, rewinder, unsteady
from .textbook import Pass, located, textbook
from .theirs import Case, Taken, take
from .weights import Comparison, compare_weights, listed, what_cannot_show

PRODUCTS = ("attn.c_attn", *THIRDS, "attn.q", "attn.k", "attn.v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
Weights = LanguageModel | str | os.PathLike[str] | Mapping[str, Any] | Any  # the last is a module
Prompt = str | ArrayLike


@checked
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
    targets: ArrayLike | None = None,
    shape: Sequence[int] = (),
    perturb: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Compare another implementation of GPT-2 with the reference, and name the mistakes in it.

    theirs: logits [V], [T, V] or [B, T, V]; stages by name; the path of a file with one of these (.npz, .npy,
    .safetensors, .pt, .json, .csv, llm.c's debug state, a .bin of raw numbers with this shape, or a folder of raw
    arrays as npgpt trace --to raw writes it); a callable from ids [B, T] to logits; or a PyTorch module with the names
    of transformers, LLMs-from-scratch, nanoGPT or minGPT, which is run in evaluation mode. prompt: a text, or ids [T]
    or [B, T]; a file may contain ids. weights: the model that theirs should be: a name or path, a module or a state
    dict. By default a module is compared with its own weights, anything else with the embedded model. dtype: what
    theirs computed in; by default the coarsest that represents its numbers. attention_mask: 0 at padding, which is not
    compared. chunks: numbers of tokens that theirs ran at a time with a cache. targets: ids [T] or [B, T] of the loss
    that theirs has a loss or gradients of, −100 where none counts. perturb: whether parameters of a module
    that hold one number throughout, such as the biases and gains of a fresh model, get other values during the run,
    since they would hide mistakes. progress: called with (steps done, all steps) in each of several parts. Raises
    NpgptError if the two cannot be compared.
    """
    known_dtype("float32" if dtype is None else dtype)
    if n_head is not None:
        n_head = whole_number("n_head", n_head)
    shape = [whole_number("a size in shape", size) for size in shape]
    if isinstance(theirs, (str, os.PathLike)):
        theirs = files.read(theirs, shape, dtype)
    elif shape:
        raise NpgptError("shape= describes a file of raw numbers, but theirs is not a file")
    notes: list[str] = []
    problems: list[str] = []
    if isinstance(theirs, Given):
        if theirs.is_greedy:
            raise NpgptError(f"{theirs.path} contains greedy ids and no logits: use npgpt.check_greedy")
        attention_mask = theirs.attention_mask if attention_mask is None else attention_mask
        notes += [f"Ignored, since they are not arrays: {', '.join(theirs.left)}."] if theirs.left else []
        if theirs.greedy_ids is not None:
            notes.append("The file's greedy ids are ignored: npgpt judges them only if the file contains nothing else.")
        notes += [f"{line}." for line in theirs.notes]
    module = modules.open_module(theirs, n_head, config) if modules.is_module(theirs) else None
    reference: LanguageModel | None = None
    if module is None:
        reference = opened(weights, n_head)
        model_config, tensors = config or reference.config, in_float64(reference)
    else:
        model_config = module.config
        if weights is not None:
            reference = opened(weights, n_head or model_config.n_head)
        loaded = loading(module, reference)
        notes, problems = loaded.notes, loaded.problems
        if perturb:
            module, said = module.perturbed()
            notes += said
        tensors = dict(module.tensors) if reference is not None else finite(module.tensors, "the module")
    if reference is not None:
        notes += [f"The reference, {reference.name}: {line}." for line in reference.notes]
    if module is None or not perturb:
        notes += what_cannot_show(tensors, model_config.n_layer)
    ids = ids_of(prompt, reference, model_config, theirs)
    run: Run | None = None
    rewind = rewinder()
    if module is not None:
        seen = module.observed(ids)
        run, arrays = module.run, seen.stages
        wrong, said = seen.told()
        problems, notes = problems + wrong, notes + said
    elif callable(theirs):
        function = Function(theirs, model_config.vocab_size)
        run, arrays = function.run, function.run(ids)
        notes += function.notes
    else:
        held = theirs.stages(model_config) if isinstance(theirs, Given) else getattr(theirs, "cache_dict", theirs)
        if isinstance(theirs, Given) and isinstance(held, Mapping) and not held:
            raise NpgptError(f"{theirs.path}: there is nothing to compare: no logits and no stage")
        is_named = isinstance(held, Mapping)  # also TransformerLens's ActivationCache, which is not a dict
        arrays = named(flat(held)) if is_named else {"logits": logits_of(held, model_config.vocab_size)}
    coarser = None
    if dtype is None:
        dtype, said = judged_in(arrays, model_config, None if module is None else module.dtype)
        notes += said
        coarser = "float32" if dtype == "float64" else None
    if run is not None and (why := unsteady(run, ids, arrays["logits"], rewind, UNIT[dtype])):
        return Report([], Diagnosis([], [], []), dtype, notes, None, [why, *problems])
    taken = take(arrays, model_config, ids, attention_mask, chunks, targets)
    if module is None:
        model_config, tensors, taken = lens.undone(model_config, tensors, taken)
    tried = None if run is None else partial(experiments, run, ids, model_config)
    options: dict[str, Any] = {"notes": notes + taken.notes, "tried": tried, "coarser": coarser, "progress": progress}
    return without_padding(partial(compare, model_config, tensors, dtype=dtype, **options), taken, problems)


def without_padding(report: Callable[..., Report], taken: Taken, problems: list[str]) -> Report:
    """Return the report on all cases, or, if this explains a difference, without the rows that are padded on the right
    and have one position. A problem names these rows.
    """
    problems = problems + taken.problems
    found = report(taken.cases, problems=problems)
    if not taken.doubtful or found.diagnosis.unexplained is None:
        return found
    rows, places = (", ".join(map(str, numbers)) for numbers in (taken.doubtful, taken.doubtful.values()))
    rows = f"row {rows}" if len(taken.doubtful) == 1 else f"rows {rows} together"
    problem = f"the output of {rows} is not that of the last token, at {places}: was it taken at -1, in the padding?"
    others = [case for row, case in enumerate(taken.cases) if row not in taken.doubtful]
    rest = report(others, problems=[*problems, problem]) if others else found
    return rest if rest.diagnosis.unexplained is None else found


def loading(module: Module, reference: LanguageModel | None) -> Comparison:
    """Return problems and notes on a module before it is run: active dropout, and how its weights were loaded."""
    problems: list[str] = []
    notes = conditions.evaluated(module.module)
    if strange := module.stored.strange:
        line = f"{listed(strange, 0)} {'is' if len(strange) == 1 else 'are'} not in GPT-2"
        (notes if reference is None else problems).append(line if reference else f"{line}, and ignored.")
    if reference is None:
        own = "The module's own weights are taken as correct, so mistakes in loading them cannot be seen (weights=)."
        return Comparison(problems, [*notes, own])
    found = compare_weights(module.tensors, in_float64(reference), module.dtype)
    if reference.config.n_head != module.config.n_head:
        problems.append(f"n_head is {module.config.n_head}, the reference has {reference.config.n_head}")
    return Comparison(found.problems + problems, notes + found.notes)


def judged_in(arrays: Mapping[str, NDArray[Any]], config: Config, dtype: str | None) -> tuple[str, list[str]]:
    """Return the dtype in which theirs computed, and a note if its numbers are stored in another.

    dtype: that of a module; None to infer it from the numbers of the last stage.
    """
    said = []
    if dtype is None:
        last = np.asarray(arrays["logits"] if "logits" in arrays else [*arrays.values()][-1:])
        dtype = computed_in(last)
        if dtype != str(last.dtype) and last.dtype.kind == "f":
            said = [f"All numbers fit {dtype}, though stored as {last.dtype}: {dtype} is assumed (dtype=)."]
    known = names(config.n_layer)
    kinds = [computed_in(np.asarray(x)) for name, x in arrays.items() if located(known.get(name, ""))[1] in PRODUCTS]
    finest = min(kinds, key=UNIT.__getitem__, default="float64")
    if UNIT[finest] > UNIT[dtype]:
        return finest, [f"All linear maps return {finest}, as under autocast: {finest} is assumed (dtype=)."]
    return dtype, said


def compare_file(
    path: str, prompt: Prompt | None, weights: Weights | None, shape: Sequence[int], dtype: str | None, **options: Any
) -> Report | GreedyReport:
    """Compare the contents of a file as check does with these options, or as check_greedy if it has only greedy ids.

    Raises NpgptError as these do, and if the file cannot be read; OSError if it cannot be opened.
    """
    given = files.read(path, shape, dtype)
    if given.is_greedy:
        return check_greedy(given, prompt, opened(weights, options.get("n_head")), dtype=dtype or "float32")
    return check(given, prompt, weights, dtype=dtype, **options)


@checked
def check_greedy(
    theirs: ArrayLike | os.PathLike[str] | Given,
    prompt: Prompt | None = None,
    weights: Weights | None = None,
    *,
    dtype: str = "float32",
) -> GreedyReport:
    """Judge the greedy ids [N] with which another implementation continued a prompt. They may include the prompt.

    theirs: the ids, or the path of a file that contains them (greedy_ids, generated_ids or sequences). At the first
    token that differs, the margin between the two logits is compared with their rounding. Raises NpgptError if the ids
    do not fit into the context.
    """
    known_dtype(dtype)
    given: Any = files.read(theirs) if isinstance(theirs, (str, os.PathLike)) else theirs
    if isinstance(given, Given) and not given.is_greedy:
        raise NpgptError(f"{given.path} contains logits or stages: use npgpt.check")
    model = opened(weights)
    ids = ids_of(prompt, model, model.config, given)
    if len(ids) != 1:
        raise NpgptError(f"greedy ids are judged one row at a time, but the prompt has {len(ids)} rows")
    drawn = model.config.token_rows(getattr(given, "greedy_ids", given)).reshape(-1)
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
    # a logit is off by the root mean square, a difference of two by √2 times that; 3 times this is rare
    margin = 3 * math.sqrt(2) * allowed["logits"]
    return GreedyReport(at, int(drawn[at]), best, float(row[best] - row[drawn[at]]), margin)


def opened(weights: Weights | None, n_head: int | None = None) -> LanguageModel:
    """Return the model for a name, path, module or state dict; for None the embedded one."""
    if modules.is_module(weights) or isinstance(weights, Mapping):
        return modules.as_language_model(weights, n_head)
    if weights is not None and not isinstance(weights, (str, os.PathLike, LanguageModel)):
        raise NpgptError(f"weights must be a model, its name or path, a module or a state dict, not {weights!r:.80}")
    model = weights if isinstance(weights, LanguageModel) else load(weights, dtype="float64", n_head=n_head)
    if model.no_logits:
        raise NpgptError(f"{model.name} cannot be the reference: {model.no_logits}")
    return model


def in_float64(model: LanguageModel) -> dict[str, Array]:
    """Return the tensors of a model in float64, by canonical name. Raises NpgptError as finite() does."""
    tensors = parameters.to_arrays(model.parameters).items()
    return finite({name: array.astype(np.float64, copy=False) for name, array in tensors}, model.name)


def finite(tensors: Mapping[str, Array], whose: str) -> dict[str, Array]:
    """Return the tensors. Raises NpgptError for NaN or infinity, with which no output could be compared."""
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise NpgptError(f"{whose} cannot be the reference: {name} has values that are not finite")
    return dict(tensors)


def ids_of(prompt: Prompt | None, model: LanguageModel | None, config: Config, theirs: Any = None) -> Ids:
    """Return the ids [B, T] of a prompt. theirs: may be a file that contains ids.

    A text is encoded with the model's vocabulary, or without a model with GPT-2's if the size fits.
    """
    if isinstance(theirs, Given):
        prompt = theirs.ids(None if prompt is None else ids_of(prompt, model, config))
    if prompt is None:
        raise NpgptError("there is no prompt: give the text or ids that theirs was run on")
    if isinstance(prompt, str):
        if model is not None:
            prompt = model.encode_prompt(prompt)
        elif config.vocab_size in GPT2_VOCAB_SIZES:
            prompt = load_tokenizer("gpt2").encode(prompt)
        else:
            raise NpgptError(f"there is no vocabulary: {config.vocab_size} ids are not GPT-2's; give ids")
    return config.token_rows(prompt)
