"""Building blocks of the tables of known mistakes. A row is a line of the report and the formulas that it replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from ..parameters import Array
from .textbook import Formula, parameter

Formulas: TypeAlias = dict[str, Formula]  # keys: names of the wrong stages in textbook.py
Table: TypeAlias = dict[str, Formulas]  # keys: "name: explanation (known from: source)"


def rows(*parts: str | Formulas) -> Table:
    """Return a table from texts and formulas that alternate."""
    texts = [part for part in parts if isinstance(part, str)]
    return dict(zip(texts, (part for part in parts if not isinstance(part, str)), strict=True))


def changed(change: Callable[[Array], Array], *names: str) -> Formulas:
    """Return formulas that apply a change to these tensors."""
    return {name: parameter(name, change) for name in names}
