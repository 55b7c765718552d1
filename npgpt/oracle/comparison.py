"""Compare the numbers of another implementation with GPT-2's, and return one report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from ..config import Config
from ..errors import NpgptError
from ..parameters import Array, schema
from .arithmetic import UNIT, known_dtype
from .backward import IGNORED, backward_stages, is_backward, is_parameter
from .diagnosis import diagnose
from .difference import Difference, aligned, difference, logit_statistics, root
from .judge import Judge
from .mistakes import Mistake, backward_catalogue, catalogue
from .report import Report, Row
from .rounding import CLEAR, Progress, run_all, tolerances
from .running import Ids, Run
from .textbook import Pass, stages, textbook
from .theirs import Case, cases
from .where import where

SHOWN = 3  # unexplained stages whose location is described


@np.errstate(all="ignore")  # infinite numbers are judged, not warned about
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
    """Compare cases with a model of these float64 tensors.

    dtype: what theirs computed in. entries: the mistakes to look for, by default all that a model of this shape can
    have. tried: experiments to run if no mistake explains a difference; returns notes. coarser: a dtype to judge in
    instead if rounding in dtype does not explain everything. Raises NpgptError if there is nothing to compare.
    """
    known_dtype(dtype)
    compared = stages(config.n_layer) + backward_stages(config)
    judged = [stage for stage in compared if any(stage in case.theirs for case in given)]
    if not judged:
        raise NpgptError("there is nothing to compare: no position outside the padding has logits or a stage")
    book = textbook(config, tensors)
    reference = run_all(book, given)

    def differences(dtype: str) -> dict[str, Difference]:
        allowed = tolerances(config, tensors, given, reference, dtype, judged, progress)
        return {stage: difference(stage, given, reference, allowed[stage], dtype) for stage in judged}

    found, said = differences(dtype), [*notes]
    if coarser is not None and any(each.ratio > 1 for each in found.values()):
        found = differences(coarser)
        why = "whose rounding explains every difference"
        if any(each.ratio > 1 for each in found.values()):
            why = "since a part of the model may compute in it (dtype= overrides this)"
        said.insert(0, f"The numbers are {dtype}, but were judged in {coarser}, {why}.")
        dtype = coarser
    allowed = {stage: each.tolerance for stage, each in found.items()}
    sizes = {stage: root(*(run[stage] for run in reference)) for stage in judged if is_backward(stage)}
    judge = Judge(given, judged, allowed, tensors, dtype, progress=progress, sizes=sizes)
    alone = judge.right(book)
    statistics = None
    if "logits" in judged:
        both = [(case.theirs.get("logits"), run["logits"]) for case, run in zip(given, reference, strict=True)]
        pairs = [aligned("logits", theirs, ours) for theirs, ours in both if theirs is not None]
        statistics = logit_statistics(pairs, allowed["logits"])
        if statistics is None:
            said.append("Their logits are not finite, or have another number of positions: no statistics are given.")
    if entries is None:
        tokens = max(case.token_ids.shape[1] for case in given)
        entries = catalogue(config, tokens, given[0].chunks, any(case.padding for case in given))
        entries += backward_entries(config, given[0], reference[0]) if given[0].targets is not None else []
    apart = [stage for stage, each in found.items() if each.ratio > 1]
    diagnosis = diagnose(judge, alone, entries, search=bool(apart))
    if apart and not diagnosis.findings and not diagnosis.unknown:  # each stage is right alone, but the errors add up
        diagnosis = replace(diagnosis, unknown=apart[:1], faint=found[apart[0]].ratio < CLEAR)
    if tried is not None and diagnosis.unexplained is not None:
        said += tried(judge)
    at = {}
    for stage in dict.fromkeys(apart[:1] + diagnosis.unknown[:SHOWN]):
        theirs = [case.theirs[stage] for case in judge.having(stage)]
        at[stage] = where(stage, theirs, alone.seen[stage].ours, allowed[stage], config.n_head)
    ratios = {stage: seen.ratio for stage, seen in alone.seen.items() if stage not in ("wte", "wpe")}
    rows = [Row(stage, each, ratios.get(stage)) for stage, each in found.items()]
    return Report(rows, diagnosis, dtype, said, statistics, list(problems), at)


def backward_entries(config: Config, case: Case, run: Pass) -> list[Mistake]:
    """Return the mistakes of the backward pass that are possible for a case, of which this is the right pass."""
    assert case.targets is not None
    largest = max(float(np.abs(run[f"d.{name}"]).max()) for name in schema(config))
    ignored = bool((case.targets == IGNORED).any())
    stages = any(name.startswith("d.") and not is_parameter(name, config) for name in case.theirs)
    return backward_catalogue(config, len(case.token_ids), ignored, stages, run["d.norm"], largest)


def experiments(run: Run, ids: Ids, config: Config, judge: Judge) -> list[str]:
    """Return notes on two experiments for unexplained differences: one token alone, and another token at the end."""
    if ids.shape[1] < 2:
        return []

    def given(ids: Ids) -> Case:
        return cases({"logits": run(ids)["logits"]}, config, ids)[0]

    try:
        one = given(np.concatenate([case.token_ids[:, :1] for case in judge.cases]))
        agrees = compare(config, judge.tensors, [one], judge.dtype, entries=[]).matches
        found = [f"Tried: the first token alone {'agrees' if agrees else 'also differs'}."]
    except NpgptError as error:
        found = [f"Tried: the output for the first token alone cannot be compared ({error})."]
    other = ids.copy()
    other[:, -1] = (other[:, -1] + 1) % config.vocab_size
    with suppress(NpgptError):
        before, after = (given(each).theirs["logits"] for each in (ids, other))
        if before.shape == after.shape and before.shape[1] == ids.shape[1]:
            gap = np.abs(before[:, :-1] - after[:, :-1]).max()
            seen = gap > 1000 * UNIT[judge.dtype] * np.abs(before).max()
            found.append(f"Tried: another last token {'changes' if seen else 'does not change'} earlier positions.")
    return found
