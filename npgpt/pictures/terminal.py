"""Attention weights as lines of text: the large map of one head, and a grid of small ones.

A weight's shade goes by its square root, so that 0.05 can be told from 0. What is masked has no shade: in its place is
a dot or, among colours, the terminal's own background.
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..parameters import Array

RAMP = (53, 54, 24, 30, 36, 77, 149, 220, 226)  # of the 256 colours, from violet to yellow, ever lighter
LONGEST_QUERY = 24  # columns of a row's label
LONGEST_KEY = 8  # characters of a token written downwards above its column
SMALL = 24  # columns that a small map may always take
GAP = "  "
RESET = "\x1b[0m"


class Style(NamedTuple):
    """With which characters. shades: what is masked, and then, where there is no colour, from zero to one."""

    colour: bool
    shades: str
    space: str
    cut: str

    @property
    def steps(self) -> int:
        """How many shades there are for weights."""
        return len(RAMP) if self.colour else len(self.shades) - 1


SHADED = Style(False, "· ░▒▓█", "␣", "…")
COLOURED = SHADED._replace(colour=True, shades=" ")
ASCII = Style(False, "- .:*#", "_", "~")


def map_lines(weights: Array, texts: Sequence[str], columns: int, style: Style) -> list[str]:
    """One head, weights [T, T] of T tokens: queries down the side, keys along the top, no line wider than `columns`.

    A cell is 2 columns wide, or 1 where that has no room; then the keys are numbered, not written.
    """
    T = len(texts)
    texts = [label(text, style) for text in texts]
    digits = len(str(T - 1))
    side = min(LONGEST_QUERY, columns // 3, digits + 1 + max(map(width, texts)))
    if columns - side - 1 < T:
        side = min(LONGEST_QUERY, columns // 3)  # for the numbers of those that share a row
    room = columns - side - 1
    cell = 2 if room >= 2 * T else 1
    group = -(-T // (room // cell))
    cells = levels(pooled(weights, group), style.steps)
    top = [ruler(len(cells), group)] if cell == 1 else downwards(texts, style)
    lines = [*sharing(group, columns), *(f"{'':{side}} {line}".rstrip() for line in top)]
    for row, start in zip(cells, range(0, T, group), strict=True):
        number = f"{start:{digits}}" + (f"-{min(start + group, T) - 1}" if group > 1 else "")
        name = fitted(f"{number} {''.join(texts[start : start + group])}", side, style)
        lines.append(f"{name} {whole(row, cell, style)}".rstrip())
    return lines


def grid_lines(weights: Array, heads: Sequence[int], columns: int, style: Style) -> list[str]:
    """A layer's heads, weights [H, T, T], as small maps side by side, no line wider than `columns`.

    A cell is 2 columns wide where that has room. Otherwise it is 1, and in colour a line of text then holds two rows.
    """
    T = weights.shape[-1]
    small = min(columns, max(SMALL, (columns + len(GAP)) // 4 - len(GAP)))  # four beside each other, if not too small
    group = -(-T // small)
    maps = levels(pooled(weights, group), style.steps)  # [H, n, n]
    n = maps.shape[-1]
    cell = 2 if 2 * n <= small else 1
    wide = max(n * cell, *(len(f"head {head}") for head in heads))
    beside = max(1, (columns + len(GAP)) // (wide + len(GAP)))
    between = " " * (wide - n * cell) + GAP
    lines = sharing(group, columns)
    for start in range(0, len(heads), beside):
        blocks = [
            list(halves(one)) if style.colour and cell == 1 else [whole(row, cell, style) for row in one]
            for one in maps[start : start + beside]
        ]
        titles = GAP.join(f"head {head}".ljust(wide) for head in heads[start : start + beside])
        lines += [""] * bool(lines) + [titles.rstrip()]
        lines += [between.join(parts).rstrip() for parts in zip(*blocks, strict=True)]
    return lines


def scale(style: Style) -> str:
    """What the shades mean: the weight from which on each is used."""
    steps = style.steps
    bounds = [f"{max(0.0, (step - 0.5) / (steps - 1)) ** 2:.2g}" for step in range(steps)]
    if style.colour:
        shown = [f"\x1b[48;5;{colour}m  {RESET} {bound}" for colour, bound in zip(RAMP, bounds, strict=True)]
        return f"{' '.join(shown)} to 1"
    shown = [f"{shade} {bound}" for shade, bound in zip(style.shades[2:], bounds[1:], strict=True)]
    return f"blank 0, {', '.join(shown)} to 1"


def pooled(weights: Array, group: int) -> Array:
    """[..., T, T] → [..., n, n], n = ⌈T / group⌉: the largest of group × group weights, −1 where all are masked."""
    *rest, T, _ = weights.shape
    n = -(-T // group)
    padded = np.full((*rest, n * group, n * group), -1, weights.dtype)
    padded[..., :T, :T] = np.where(np.tri(T, dtype=bool), weights, -1)
    largest: Array = padded.reshape(*rest, n, group, n, group).max(axis=(-3, -1))
    return largest


def levels(weights: Array, steps: int) -> NDArray[np.intp]:
    """Which of the shades 0 to steps − 1 each weight has, any shape; −1 stays."""
    return np.where(weights < 0, -1, np.rint(np.sqrt(np.maximum(weights, 0)) * (steps - 1))).astype(np.intp)


def whole(row: Iterable[Any], cell: int, style: Style) -> str:
    """A row of levels as cells of 1 or 2 columns."""
    if not style.colour:
        return "".join((style.shades[level + 1] * cell if level >= 0 else style.shades[0].ljust(cell)) for level in row)
    line = ""
    for level, run in groupby(row):
        count = len(list(run))
        masked = style.shades[0].ljust(cell) * count
        line += masked if level < 0 else f"\x1b[48;5;{RAMP[level]}m{' ' * cell * count}{RESET}"
    return line


def halves(levels: NDArray[np.intp]) -> Iterator[str]:
    """Levels [n, n] as coloured lines, each of two rows; where there is no weight, the terminal's background."""
    n = len(levels)
    padded = np.full((n + n % 2, n), -1)
    padded[:n] = levels
    for upper, lower in zip(padded[::2], padded[1::2], strict=True):
        line = ""
        for (above, below), run in groupby(zip(upper.tolist(), lower.tolist(), strict=True)):
            count = len(list(run))
            if above < 0 and below < 0:
                line += " " * count
            elif above < 0:
                line += f"\x1b[38;5;{RAMP[below]}m{'▄' * count}{RESET}"
            else:
                back = "" if below < 0 else f"\x1b[48;5;{RAMP[below]}m"
                line += f"\x1b[38;5;{RAMP[above]}m{back}{'▀' * count}{RESET}"
        yield line


def sharing(group: int, columns: int) -> list[str]:
    """The lines that say so, where tokens share a cell."""
    text = f"(no room for every token: a cell is {group} by {group}, of which it shows the largest)"
    return [] if group == 1 else textwrap.wrap(text, columns)


def ruler(cells: int, group: int) -> str:
    """The number of every tenth cell's first token, above it, where that has room for all its digits."""
    numbers = [f"{cell * group:<10}" for cell in range(0, cells, 10) if cell + len(str(cell * group)) <= cells]
    return "".join(numbers).rstrip()


def downwards(texts: Sequence[str], style: Style) -> list[str]:
    """Each text from top to bottom over 2 columns, ending in the last line."""
    columns = []
    for text in texts:
        characters = list(clusters(text))
        if len(characters) > LONGEST_KEY:
            characters = [*characters[: LONGEST_KEY - 1], style.cut]
        columns.append(characters)
    height = max(map(len, columns))
    padded = [[""] * (height - len(column)) + column for column in columns]
    return ["".join(column[line] + " " * (2 - width(column[line])) for column in padded) for line in range(height)]


def label(text: str, style: Style) -> str:
    """A piece's text with its spaces made visible; in ASCII where the terminal has no more."""
    if style is ASCII:
        text = text.encode("ascii", errors="backslashreplace").decode()
    return text.replace(" ", style.space)


def fitted(text: str, columns: int, style: Style) -> str:
    """The text cut or filled to so many columns."""
    if width(text) > columns:
        kept = ""
        for cluster in clusters(text):
            if width(kept + cluster) > columns - 1:
                break
            kept += cluster
        text = kept + style.cut
    return text + " " * (columns - width(text))


def clusters(text: str) -> Iterator[str]:
    """Characters, each with the marks that follow it and take no column of their own."""
    cluster = ""
    for character in text:
        if cluster and width(character):
            yield cluster
            cluster = ""
        cluster += character
    if cluster:
        yield cluster


def width(text: str) -> int:
    """Columns that a terminal needs for printable text: 2 for wide characters, 0 for combining marks."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )
