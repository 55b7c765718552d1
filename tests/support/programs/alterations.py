"""Mistakes in the programs: edits of their texts, and the right answers to each.

ALTERATIONS.txt lists them below "# program": a line with the truth, in the catalogue's words if it has the mistake;
lines "= name" with other right answers, equivalent names of the catalogue or a part of a sentence about weights; then,
as in a diff, the old text ("-") and the new ("+"), exactly. Those below "# program, beside another" affect one block,
are in no catalogue, and are combined with one of the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

BESIDE = ", beside another"


@dataclass(frozen=True)
class Alteration:
    """One edit of one program."""

    program: str
    truth: str
    before: str
    after: str
    also: tuple[str, ...] = ()

    @property
    def right(self) -> set[str]:
        """Return the names that are right answers."""
        return {self.truth, *self.also}


def paragraphs(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Yield each alteration of a file as its heading, its truth, and its other lines."""
    heading = ""
    for part in path.read_text("utf-8").split("\n\n"):
        truth, *lines = part.strip("\n").split("\n")
        if truth.startswith("# "):
            heading = truth[2:]
        elif truth:
            yield heading, truth, lines


@cache
def read() -> dict[str, list[Alteration]]:
    """Return the file's alterations by heading."""
    found: dict[str, list[Alteration]] = {}
    for heading, truth, lines in paragraphs(Path(__file__).parent / "ALTERATIONS.txt"):
        also, before, after = ([line[1:] for line in lines if line[0] == mark] for mark in "=-+")
        program = heading.removesuffix(BESIDE)
        names = tuple(name.strip() for name in also)
        found.setdefault(heading, []).append(Alteration(program, truth, "\n".join(before), "\n".join(after), names))
    return found


def alterations() -> Iterator[Alteration]:
    """Yield the alterations that are tried alone."""
    for heading, rows in read().items():
        if not heading.endswith(BESIDE):
            yield from rows


def pairs() -> Iterator[tuple[Alteration, Alteration]]:
    """Yield each alteration with an unknown one of its program, taken in turn."""
    for heading, others in read().items():
        if heading.endswith(BESIDE):
            for number, one in enumerate(read()[others[0].program]):
                other = others[number % len(others)]
                if one.before not in other.before and other.before not in one.before:
                    yield one, other
