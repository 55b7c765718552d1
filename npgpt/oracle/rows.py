"""What the tables of known mistakes are made of: a row is the line of a report and the formulas that it replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from ..parameters import Array
from .textbook import Formula, parameter

Formulas: TypeAlias = dict[str, Formula]  # by the stages of textbook.py that are wrong
Table: TypeAlias = dict[str, Formulas]  # by "name: explanation (known from: source)"


def rows(*parts: str | Formulas) -> Table:
    """Return the table of rows that are written as a text and its formulas, by turns."""
    texts = [part for part in parts if isinstance(part, str)]
    return dict(zip(texts, (part for part in parts if not isinstance(part, str)), strict=True))


def changed(change: Callable[[Array], Array], *names: str) -> Formulas:
    """Return the formulas of tensors that were changed on their way."""
    return {name: parameter(name, change) for name in names}
