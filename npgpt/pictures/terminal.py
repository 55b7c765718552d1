"""Attention weights as lines of text: a heat map for each head.

A weight is shaded by its square root, so that 0.05 can be told from 0. A masked cell has no shade: it shows a dot or,
in colours, the terminal's own background.
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import printable
from ..parameters import Array
from .attention import AttentionWeights
from .heads import label as label_of

LONGEST_QUERY = 24  # columns of a row's label
LONGEST_KEY = 8  # characters of a token written downwards above its column


@dataclass(frozen=True)
class Palette:
    """The signs of a map; shades from weight 0 to 1 are characters, or numbers of a terminal's 256 colours."""

    shades: str | tuple[int, ...]
    masked: str
    space: str = "␣"
    cut: str = "…"

    def cell(self, level: int, columns: int) -> str:
        """Return a cell of a number of columns in the shade of a level; level -1 is masked."""
        if level < 0:
            return self.masked.ljust(columns)
        shade = self.shades[level]
        return shade * columns if isinstance(shade, str) else f"\x1b[48;5;{shade}m{' ' * columns}\x1b[0m"


SHADED = Palette(" ░▒▓█", masked="·")
COLOURED = Palette((53, 54, 24, 30, 36, 77, 149, 220, 226), masked=" ")  # from violet to yellow, getting lighter
ASCII = Palette(" .:*#", masked="-", space="_", cut="~")


def palette_for(encoding: str | None, coloured: bool) -> Palette:
    """Return the palette for a terminal or file with this encoding: ASCII if it lacks the other characters."""
    try:
        "·░▒▓█␣…".encode(encoding or "ascii")
    except UnicodeEncodeError:
        return ASCII
    return COLOURED if coloured else SHADED


def picture(attention: AttentionWeights, columns: int, palette: Palette) -> list[str]:
    """Return the lines that show a layer: the maps of its heads one after another, and what they mean."""
    T, heads, weights = len(attention.token_ids), attention.heads, attention.weights[0]  # [H, T, T]
    name, whole = f"{printable(attention.model)}, layer {attention.layers[0]}", f"[1, {attention.n_head}, {T}, {T}]"
    title = f"{name}: weights {whole}, a map for each head (--head H for one alone, --html FILE for a page)"
    if len(heads) == 1:
        does = label_of(weights[0])
        title = f"{name}, head {heads[0]}{f' ({does})' if does else ''}: weights [{T}, {T}] out of {whole}"
    axes = "Rows are queries, columns are keys; softmax over the keys: each row sums to 1. Later keys are masked: "
    masked = "no colour" if palette is COLOURED else palette.masked
    lines = [*textwrap.wrap(title, columns), *textwrap.wrap(f"{axes}{masked}.", columns)]
    for head, its_weights in zip(heads, weights, strict=True):
        does = label_of(its_weights)
        heading = textwrap.wrap(f"head {head}{f': {does}' if does else ''}", columns) if len(heads) > 1 else []
        lines += ["", *heading, *head_map(its_weights, attention.texts, columns, palette)]
    return [*lines, "", scale(palette)]


def head_map(weights: Array, texts: Sequence[str], columns: int, palette: Palette) -> list[str]:
    """Return one head's weights [T, T] as lines of up to `columns`: queries down the side, keys along the top.

    A cell is 2 columns wide. If that is too wide, a cell is 1 column and the keys are numbered. If that is too
    wide as well, neighbouring tokens share a cell.
    """
    T = len(texts)
    texts = [label(text, palette) for text in texts]
    digits, longest = len(str(T - 1)), min(LONGEST_QUERY, columns // 3)
    side = min(longest, digits + 1 + max(map(width, texts)))
    if columns - side - 1 < T:
        side = longest  # the tokens that share a row are numbered, too
    room = columns - side - 1
    cell = 2 if room >= 2 * T else 1
    group = -(-T // room)
    starts = range(0, T, group)
    keys = downwards(texts, palette) if cell == 2 else [ruler(len(starts), group)]
    shared = f"(no room for every token: a cell is {group} by {group}, of which it shows the largest)"
    lines = textwrap.wrap(shared, columns) if group > 1 else []
    lines += [f"{'':{side}} {key}".rstrip() for key in keys]
    for start, row in zip(starts, levels(pooled(weights, group), len(palette.shades)), strict=True):
        number = f"{start:{digits}}" + (f"-{min(start + group, T) - 1}" if group > 1 else "")
        query = fitted(f"{number} {''.join(texts[start : start + group])}", side, palette)
        lines.append(f"{query} {''.join(palette.cell(level, cell) for level in row)}".rstrip())
    return lines


def scale(palette: Palette) -> str:
    """Return a legend: the smallest weight of each shade."""
    steps = len(palette.shades)
    bounds = (max(0.0, (step - 0.5) / (steps - 1)) ** 2 for step in range(steps))
    shown = (f"{palette.cell(step, 1).strip() or 'blank'} {bound:.2g}" for step, bound in enumerate(bounds))
    return f"{', '.join(shown)} to 1"


def pooled(weights: Array, group: int) -> Array:
    """Return the largest of each group × group weights, [n, n] of [T, T], n = ⌈T / group⌉; -1 if all are masked."""
    T = len(weights)
    n = -(-T // group)
    masked = np.where(np.tri(T, dtype=bool), weights, -1)
    padded = np.pad(masked, (0, n * group - T), constant_values=-1)
    largest: Array = padded.reshape(n, group, n, group).max(axis=(1, 3))
    return largest


def levels(weights: Array, steps: int) -> NDArray[np.intp]:
    """Return each weight's shade, from 0 to steps - 1; a weight of -1 stays -1. Any shape."""
    return np.where(weights < 0, -1, np.rint(np.sqrt(np.maximum(weights, 0)) * (steps - 1))).astype(np.intp)


def ruler(cells: int, group: int) -> str:
    """Return the number of every tenth cell's first token, above that cell; numbers without room are left out."""
    numbers = [f"{cell * group:<10}" for cell in range(0, cells, 10) if cell + len(str(cell * group)) <= cells]
    return "".join(numbers).rstrip()


def downwards(texts: Sequence[str], palette: Palette) -> list[str]:
    """Return the lines of texts that run from top to bottom, 2 columns each, and end in the last line."""
    keys = [characters(text) for text in texts]
    keys = [key if len(key) <= LONGEST_KEY else [*key[: LONGEST_KEY - 1], palette.cut] for key in keys]
    height = max(map(len, keys))
    padded = ([""] * (height - len(key)) + key for key in keys)
    return ["".join(fitted(character, 2, palette) for character in line) for line in zip(*padded, strict=True)]


def label(text: str, palette: Palette) -> str:
    """Return a piece's text with its spaces made visible, in ASCII if the palette is."""
    if palette is ASCII:
        text = text.encode("ascii", errors="backslashreplace").decode()
    return text.replace(" ", palette.space)


def fitted(text: str, columns: int, palette: Palette) -> str:
    """Return the text cut or padded to a number of columns."""
    if width(text) > columns:
        while width(text) >= columns:
            text = text[:-1]
        text += palette.cut
    return text + " " * (columns - width(text))


def characters(text: str) -> list[str]:
    """Return the text's characters, each with the combining marks that follow it."""
    found: list[str] = []
    for character in text:
        if found and width(character) == 0:
            found[-1] += character
        else:
            found.append(character)
    return found


def width(text: str) -> int:
    """Return the columns that a terminal needs for printable text: 2 for wide characters, 0 for combining marks."""
    spacing = [c for c in text if unicodedata.category(c) not in ("Mn", "Me")]
    return len(spacing) + sum(unicodedata.east_asian_width(c) in "WF" for c in spacing)
