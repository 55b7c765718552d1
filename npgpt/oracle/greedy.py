"""Greedy text of another implementation: where it differs, was that a near tie which rounding explains?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import NpgptError
from ..language_model import LanguageModel, load
from .checking import Weights, ids_of, in_float64
from .evidence import Case
from .judging import run_all, tolerances
from .textbook import Pass, textbook


@dataclass(frozen=True)
class GreedyReport:
    """Greedy text against the reference's: the first token that differs, and whether a near tie explains it.

    margin: by how much the reference prefers its own token to theirs there, in logits; tolerance: what rounding of two
    logits explains.
    """

    at: int | None
    theirs: int | None
    expected: int | None
    margin: float
    tolerance: float

    @property
    def matches(self) -> bool:
        """The same, or different by a near tie."""
        return self.at is None or self.margin <= self.tolerance

    @property
    def code(self) -> int:
        """Of the command's exit."""
        return 0 if self.matches else 1

    def __str__(self) -> str:
        if self.at is None:
            return "Matches: every greedy token is the reference's."
        where = f"token {self.at} is {self.theirs}, the reference has {self.expected}"
        margin = f"it prefers its own by {self.margin:.3g}, and rounding explains up to {self.tolerance:.3g}"
        return f"Matches, up to a near tie: {where}; {margin}." if self.matches else f"Differs: {where}; {margin}."


def check_greedy(
    theirs: ArrayLike, prompt: str | ArrayLike, weights: Weights | None = None, *, dtype: str = "float32"
) -> GreedyReport:
    """Judge greedy ids [N] that another implementation continued a prompt with, or prompt and continuation together.

    At the first token that differs the two logits' margin is compared with their rounding. Raises NpgptError for ids
    that do not fit into the context.
    """
    model = weights if isinstance(weights, LanguageModel) else load(weights, dtype="float64")
    ids = ids_of(prompt, model, model.config)
    if len(ids) != 1:
        raise NpgptError(f"greedy ids are judged a row at a time, and the prompt has {len(ids)}")
    drawn = model.config.token_rows(theirs).reshape(-1)
    before = ids[0]
    if len(drawn) > len(before) and np.array_equal(drawn[: len(before)], before):
        drawn = drawn[len(before) :]
    tensors = in_float64(model)
    whole = model.config.token_rows(np.concatenate([before, drawn[:-1]]))
    run = Pass(textbook(model.config, tensors), whole)
    rows = run["logits"][0, len(before) - 1 :]
    wrong = np.flatnonzero(rows.argmax(axis=-1) != drawn)
    if not len(wrong):
        return GreedyReport(None, None, None, 0.0, 0.0)
    at = int(wrong[0])
    row, best = rows[at], int(rows[at].argmax())
    case = Case(whole[:, : len(before) + at], {"logits": rows[None, at : at + 1]})
    allowed = tolerances(
        model.config, tensors, [case], run_all(textbook(model.config, tensors), [case]), dtype, ["logits"]
    )
    # a logit is off by the root mean square, a difference of two by √2 of that; 3 of these are rare
    return GreedyReport(
        at, int(drawn[at]), best, float(row[best] - row[drawn[at]]), 3 * math.sqrt(2) * allowed["logits"]
    )
