"""What an entry of the catalogue is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from .textbook import Formula, Textbook

Change = Callable[[Textbook], Textbook]


@dataclass(frozen=True)
class Mistake:
    """What is wrong, in a name and a sentence, where it is known from, and how to reproduce it."""

    name: str
    explanation: str
    source: str
    change: Change
    first: int = 0  # blocks below this one are not touched


def replaced(formulas: Mapping[str, Formula], flips: bool = False) -> Change:
    """Other formulas under these names; flips: they round within."""
    return lambda book: replace(book.altered(formulas), flips=book.flips or flips)
