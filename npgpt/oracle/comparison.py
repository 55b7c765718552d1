"""The comparison itself: what another implementation gave against GPT-2's numbers, as one report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from ..config import Config
from ..errors import NpgptError
from ..parameters import Array
from .arithmetic import UNIT, known_dtype
from .diagnosis import diagnose
from .difference import Difference, aligned, difference, logit_statistics
from .judge import Judge
from .mistakes import Mistake, catalogue
from .report import Report, Row
from .rounding import CLEAR, Progress, run_all, tolerances
from .running import Ids, Run
from .textbook import stages, textbook
from .theirs import Case, cases
from .where import where

SHOWN = 3  # unexplained stages of which it is said where they differ


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
    """Compare cases with a model of these float64 tensors. dtype: in which theirs computed; entries: the mistakes that
    are looked for, by default all that a model of this shape can have. tried: experiments for where no mistake explains
    it, as notes. coarser: a dtype that it is judged in where rounding in dtype is not all.
    """
    known_dtype(dtype)
    judged = [stage for stage in stages(config.n_layer) if any(stage in case.theirs for case in given)]
    if not judged:
        raise NpgptError("there is nothing to compare: no judged position has logits or a stage")
    book = textbook(config, tensors)
    reference = run_all(book, given)

    def differences(dtype: str) -> dict[str, Difference]:
        allowed = tolerances(config, tensors, given, reference, dtype, judged, progress)
        return {stage: difference(stage, given, reference, allowed[stage], dtype) for stage in judged}

    found, said = differences(dtype), [*notes]
    if coarser is not None and any(each.ratio > 1 for each in found.values()):
        found = differences(coarser)
        finer = f"right to {coarser}, and given in {dtype}, which is finer than it computes"
        judging = f"given in {dtype}, and judged in {coarser}, since a part of it may compute in that (dtype=)"
        said.insert(0, f"It is {judging if any(each.ratio > 1 for each in found.values()) else finer}.")
        dtype = coarser
    allowed = {stage: each.tolerance for stage, each in found.items()}
    judge = Judge(given, judged, allowed, tensors, dtype, progress=progress)
    alone = judge.right(book)
    statistics = None
    if "logits" in judged:
        both = [(case.theirs.get("logits"), run["logits"]) for case, run in zip(given, reference, strict=True)]
        pairs = [aligned("logits", theirs, ours) for theirs, ours in both if theirs is not None]
        statistics = logit_statistics(pairs, allowed["logits"])
        if statistics is None:
            said.append(
                "Their logits are not finite, or of another number of positions, so that they have no statistics."
            )
    if entries is None:
        tokens = max(case.token_ids.shape[1] for case in given)
        entries = catalogue(config, tokens, given[0].chunks, any(case.padding for case in given))
    apart = [stage for stage, each in found.items() if each.ratio > 1]
    diagnosis = diagnose(judge, alone, entries, search=bool(apart))
    if apart and not diagnosis.findings and not diagnosis.unknown:  # each is right alone, their errors add up
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


def experiments(run: Run, ids: Ids, config: Config, judge: Judge) -> list[str]:
    """The two that tell most where nothing is explained: one token alone, and another token at the end."""
    if ids.shape[1] < 2:
        return []

    def given(ids: Ids) -> Case:
        return cases({"logits": run(ids)["logits"]}, config, ids)[0]

    try:
        one = given(np.concatenate([case.token_ids[:, :1] for case in judge.cases]))
        agrees = compare(config, judge.tensors, [one], judge.dtype, entries=[]).matches
        found = [f"Tried: the first token alone {'agrees' if agrees else 'differs as well'}."]
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
