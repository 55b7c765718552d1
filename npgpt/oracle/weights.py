"""Compare two sets of weights that should be equal, and account for every tensor of both."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..parameters import Array, count_blocks
from .arithmetic import UNIT
from .textbook import located
from .ways import Pair, in_which_way, same, same_rounded

HEAD, WTE = "lm_head.weight", "wte.weight"
TABLES = (WTE, "wpe.weight", HEAD)  # one row per id or position
SHOWN = 3  # names per line
# Mistakes that do not show if every number of a bias, or of a LayerNorm's gain, is the same.
HIDDEN = {
    ("bias", 0): "A bias that is missing, added twice or added in the wrong place",
    ("weight", 1): "A LayerNorm without its gain, or with the gain of another,",
}


@dataclass(frozen=True)
class Comparison:
    """Lines about weights: problems, and notes on differences that are correct."""

    problems: list[str]
    notes: list[str]


@np.errstate(all="ignore")  # infinite numbers are reported
def compare_weights(theirs: Mapping[str, Array], reference: Mapping[str, Array], dtype: str) -> Comparison:
    """Compare weights by canonical names. They should be equal bit for bit once the reference is rounded to dtype.

    Every tensor of both sides is accounted for. The output head is compared with what it really is: wte if tied.
    """
    ours, right = _with_head(theirs, reference), _with_head(reference, theirs)
    blocks, depth = count_blocks(theirs), count_blocks(reference)
    common = min(blocks, depth)
    problems: dict[str, list[str]] = {}  # names, by words that follow "is"
    notes: dict[str, list[str]] = {}
    for name in {**right, **ours}:
        if (layer := located(name)[0]) is not None and layer >= common:
            continue  # a different number of blocks is reported once, below
        told = problems
        if name not in ours or name not in right:
            how = "missing" if name in right else "not in the reference"
        elif ours[name].shape != right[name].shape:
            is_fine, how = _other_shape(name, ours[name], right[name], dtype)
            told = notes if is_fine else problems
        elif same(ours[name], right[name]):
            continue
        elif same_rounded(ours[name], right[name], dtype):
            told, how = notes, f"the reference's, rounded to the stored dtype, {dtype}"
        elif name == HEAD and HEAD not in theirs:
            how = "wte.weight itself (tied), but the reference has its own output head"
        else:
            how = in_which_way(Pair(name, ours[name], right[name], reference, UNIT[dtype]))
            if name == HEAD and HEAD not in reference:
                how += "; the reference's output head is its wte.weight (tied)"
        told.setdefault(how, []).append(name)
    counted = [] if blocks == depth else [f"the model has {blocks} blocks, the reference has {depth}"]
    return Comparison([*_lines(problems, common), *counted], [f"{line}." for line in _lines(notes, common)])


def together(starred: Iterable[tuple[str, str]], blocks: int) -> list[str]:
    """Return lines or names, given as pairs (with * for the block, itself); all blocks' lines become one with *."""
    alike: dict[str, list[str]] = {}
    for star, line in starred:
        alike.setdefault(star, []).append(line)
    return [line for star, group in alike.items() for line in ([star] if len(group) == blocks > 1 else group)]


def listed(names: Iterable[str], blocks: int) -> str:
    """Return names in short: h.* for all of these blocks, the first SHOWN names, and how many more there are."""
    short = together(((re.sub(r"^h\.\d+", "h.*", name), name) for name in names), blocks)
    return ", ".join(short[:SHOWN]) + (f" and {len(short) - SHOWN} more" if len(short) > SHOWN else "")


def _lines(told: Mapping[str, list[str]], blocks: int) -> Iterator[str]:
    for how, names in told.items():
        yield f"{listed(names, blocks)} {'is' if len(names) == 1 else 'are'} {how}"


def _with_head(tensors: Mapping[str, Array], others: Mapping[str, Array]) -> Mapping[str, Array]:
    """Return the tensors with wte as their output head if they are tied and the others are not."""
    return {**tensors, HEAD: tensors[WTE]} if HEAD in others and HEAD not in tensors and WTE in tensors else tensors


def _other_shape(name: str, found: Array, expected: Array, dtype: str) -> tuple[bool, str]:
    """Return whether another shape is correct, as for a padded vocabulary or a shorter context, and words for it."""
    how = f"of shape {list(found.shape)}, not {list(expected.shape)}"
    rows = min(len(found), len(expected))
    if name not in TABLES or found.shape[1:] != expected.shape[1:]:
        return False, how
    equal = same(found[:rows], expected[:rows]) or same_rounded(found[:rows], expected[:rows], dtype)
    right = equal and (len(found) > len(expected) or name == "wpe.weight")
    return right, f"{how}: the first {rows} rows are {'equal' if equal else 'different'}"


def what_cannot_show(tensors: Mapping[str, Array], blocks: int) -> list[str]:
    """Return notes on parameters that hold one number throughout, which hides mistakes."""
    found = []
    for (kind, number), what in HIDDEN.items():
        names = [name for name, x in tensors.items() if name.endswith(kind) and x.ndim == 1 and (x == number).all()]
        if names:
            found.append(f"{listed(names, blocks)}: all {number} in the reference. {what} would not show there.")
    return found
