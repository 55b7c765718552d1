"""Assertions for test suites that another implementation matches npgpt."""

from __future__ import annotations

import os
from typing import Any

from numpy.typing import ArrayLike

from .oracle.check import check
from .oracle.greedy import check_greedy
from .oracle.references import Prompt, Weights


def assert_matches(theirs: Any, prompt: Prompt | None = None, weights: Weights | None = None, **options: Any) -> None:
    """Raise AssertionError with the report if npgpt.check finds a difference that rounding cannot explain.

    The arguments are those of npgpt.check: with gradients=True, the loss of the next tokens and all gradients have to
    match, too; targets= states other ones.
    """
    __tracebackhide__ = True  # pytest then shows the line of the test
    report = check(theirs, prompt, weights, **options)
    if not report.matches:
        raise AssertionError(f"\n{report}")


def assert_greedy(
    theirs: ArrayLike | os.PathLike[str], prompt: Prompt | None = None, weights: Weights | None = None, **options: Any
) -> None:
    """Raise AssertionError with the report if greedy ids differ from the reference's by more than a near tie.

    The arguments are those of npgpt.check_greedy.
    """
    __tracebackhide__ = True
    report = check_greedy(theirs, prompt, weights, **options)
    if not report.matches:
        raise AssertionError(str(report))
