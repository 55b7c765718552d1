"""check_greedy: judge the tokens with which another implementation continued a prompt."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import NpgptError, checked
from . import files
from .arithmetic import known_dtype
from .files import Given
from .references import Prompt, Weights, ids_of, in_float64, opened
from .report import GreedyReport
from .rounding import run_all, tolerances
from .textbook import Pass, textbook
from .theirs import Case


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
