"""check: compare another implementation with GPT-2, and return one report.

running.py, outputs.py, modules.py and files.py turn their input into stages, theirs.py turns stages into cases, and
comparison.py makes the report.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..config import Config
from ..errors import NpgptError, checked, whole_number
from ..language_model import LanguageModel
from . import conditions, files, lens, losses, modules
from .arithmetic import UNIT, computed_in, known_dtype
from .comparison import compare, experiments
from .diagnosis import Diagnosis
from .files import Given
from .firings import THIRDS
from .greedy import check_greedy
from .mappings import by_name
from .modules import Module
from .naming import names
from .references import Prompt, Weights, finite, ids_of, in_float64, opened
from .report import GreedyReport, Report
from .rounding import Progress
from .running import Function, Run, rewinder, unsteady
from .targets import answer, targets_of
from .textbook import located
from .theirs import Taken, take
from .weights import Comparison, compare_weights, listed, what_cannot_show

PRODUCTS = ("attn.c_attn", *THIRDS, "attn.q", "attn.k", "attn.v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
OF_PRODUCTS = re.compile(r"d\.h\.\d+\.(?:attn|mlp)\.c_\w+\.weight")  # their weights' gradients


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
    gradients: bool = False,
    shape: Sequence[int] = (),
    perturb: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Compare another implementation of GPT-2 with the reference, and name the mistakes in it.

    theirs: logits [V], [T, V] or [B, T, V]; stages, a loss and gradients by name; the path of a file with one of these
    (.npz, .npy, .safetensors, .pt, .json, .csv, llm.c's debug state, a .bin of raw numbers with this shape, or a folder
    of raw arrays as npgpt trace --to raw writes it); a callable from ids [B, T] to logits; or a PyTorch module with the
    names of transformers, LLMs-from-scratch, nanoGPT or minGPT, which is run in evaluation mode. prompt: a text, or ids
    [T] or [B, T]; a file may contain ids. weights: the model that theirs should be: a name or path, a module or a state
    dict. By default a module is compared with its own weights, anything else with the embedded model. dtype: what
    theirs computed in; by default the coarsest that represents its numbers. attention_mask: 0 at padding, which is not
    compared. chunks: numbers of tokens that theirs ran at a time with a cache. targets: the id that should follow each
    token, [T] or [B, T], −100 where none counts. With them the loss, their mean cross-entropy, and its gradients are
    compared, too. A module's loss is its own if its forward takes targets, or labels, from which it takes the next id
    itself, as in transformers; a callable gets ids and targets, and returns a mapping. gradients: the same with the
    next tokens for targets. perturb: whether parameters of a module that hold one number throughout, such as the biases
    and gains of a fresh model, get other values during the run, since they would hide mistakes. progress: called with
    (steps done, all steps) in each of several parts. Raises NpgptError if the two cannot be compared.
    """
    known_dtype("float32" if dtype is None else dtype)
    backward = gradients or targets is not None
    if backward and chunks:
        raise NpgptError("chunks= describes a run with a cache, which has no gradients: leave it or targets out")
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
        module = module.trained() if backward else module
        model_config = module.config
        tensors = dict(module.tensors) if reference is not None else finite(module.tensors, "the module")
    if reference is not None:
        notes += [f"The reference, {reference.name}: {line}." for line in reference.notes]
    if module is None or not perturb:
        notes += what_cannot_show(tensors, model_config.n_layer)
    ids = ids_of(prompt, reference, model_config, theirs)
    run: Run | None = None
    arrays: Mapping[str, NDArray[Any]]
    rows = targets_of(targets, gradients, ids, model_config)
    rewind = rewinder()
    if module is not None:
        seen = module.observed(ids)
        run, arrays, first = module.run, seen.stages, seen.stages["logits"]
        wrong, said = seen.told()
        problems, notes = problems + wrong, notes + said
        if rows is not None:
            trained = losses.step(module, ids, rows)
            arrays = {**arrays, **trained.arrays}
            problems, notes = [*problems, *trained.problems], [*notes, *trained.notes]
    elif callable(theirs) and rows is None:
        function = Function(theirs, model_config.vocab_size)
        run, arrays = function.run, function.run(ids)
        first = arrays["logits"]
        notes += function.notes
    else:
        theirs = answer(theirs, ids, rows) if callable(theirs) and rows is not None else theirs
        given = by_name(theirs, model_config, tensors, ids, targets, gradients)
        model_config, tensors, arrays, rows = given.config, dict(given.tensors), given.arrays, given.targets
        problems, notes = problems + given.problems, notes + given.notes
    coarser = None
    if dtype is None:
        dtype, said = judged_in(arrays, model_config, None if module is None else module.dtype)
        notes += said
        coarser = "float32" if dtype == "float64" else None
    if run is not None and (why := unsteady(run, ids, first, rewind, UNIT[dtype])):
        return Report([], Diagnosis([], [], []), dtype, notes, None, [why, *problems])
    taken = take(arrays, model_config, ids, attention_mask, chunks, rows)
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

    dtype: that of a module; None to infer it from the numbers of the logits, else of gradients, of which some may be
    zeros and fit any dtype, or of the last stage.
    """
    said = []
    backward = [np.asarray(array) for name, array in arrays.items() if name.startswith("d.")]
    if dtype is None:
        last = np.asarray(arrays["logits"] if "logits" in arrays else [*arrays.values()][-1:])
        if "logits" not in arrays and backward:
            last = min(backward, key=lambda array: UNIT[computed_in(array)])
        dtype = computed_in(last)
        if dtype != str(last.dtype) and last.dtype.kind == "f":
            said = [f"All numbers fit {dtype}, though stored as {last.dtype}: {dtype} is assumed (dtype=)."]
    known = names(config.n_layer)
    kinds = [computed_in(np.asarray(x)) for name, x in arrays.items() if located(known.get(name, ""))[1] in PRODUCTS]
    if not kinds:  # else gradients do not count, which may have been averaged or clipped since
        kinds = [computed_in(np.asarray(x)) for name, x in arrays.items() if OF_PRODUCTS.fullmatch(name)]
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
