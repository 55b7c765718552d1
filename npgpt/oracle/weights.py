"""Two sets of weights that should be the same: every tensor of both is accounted for."""

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
TABLES = (WTE, "wpe.weight", HEAD)  # a row for each id or position
SHOWN = 3  # names in a line
# What cannot show where one number fills a bias, or a LayerNorm's gain.
HIDDEN = {
    ("bias", 0): "A bias that is missing, added twice or added at another place",
    ("weight", 1): "A LayerNorm without its gain, or with another's,",
}


@dataclass(frozen=True)
class Comparison:
    """What is wrong with weights, a line each, and what is other but right."""

    problems: list[str]
    notes: list[str]


@np.errstate(all="ignore")  # what is infinite is told
def compare_weights(theirs: Mapping[str, Array], reference: Mapping[str, Array], dtype: str) -> Comparison:
    """Compare by canonical names what should be equal, bit for bit once the reference is rounded to their dtype.

    Every tensor of both sides is accounted for. The output head is compared by its true source, wte where it is tied.
    """
    ours, right = _with_head(theirs, reference), _with_head(reference, theirs)
    blocks, depth = count_blocks(theirs), count_blocks(reference)
    common = min(blocks, depth)
    problems: dict[str, list[str]] = {}  # names by words that follow "is"
    notes: dict[str, list[str]] = {}
    for name in {**right, **ours}:
        if (layer := located(name)[0]) is not None and layer >= common:
            continue  # blocks that one of them has not are told once
        told = problems
        if name not in ours or name not in right:
            how = "missing" if name in right else "not in the reference"
        elif ours[name].shape != right[name].shape:
            is_fine, how = _other_shape(name, ours[name], right[name], dtype)
            told = notes if is_fine else problems
        elif same(ours[name], right[name]):
            continue
        elif same_rounded(ours[name], right[name], dtype):
            told, how = notes, f"the reference's, rounded to {dtype}, in which they are kept"
        elif name == HEAD and HEAD not in theirs:
            how = "wte.weight itself (tied), and the reference has an output head of its own"
        else:
            how = in_which_way(Pair(name, ours[name], right[name], reference, UNIT[dtype]))
            if name == HEAD and HEAD not in reference:
                how += "; the reference's output head is its wte.weight (tied)"
        told.setdefault(how, []).append(name)
    counted = [] if blocks == depth else [f"there are {blocks} blocks, the reference has {depth}"]
    return Comparison([*_lines(problems, common), *counted], [f"{line}." for line in _lines(notes, common)])


def together(starred: Iterable[tuple[str, str]], blocks: int) -> list[str]:
    """Lines or names, each after what it is with * for a block's number: once with * what is true of all blocks."""
    alike: dict[str, list[str]] = {}
    for star, line in starred:
        alike.setdefault(star, []).append(line)
    return [line for star, group in alike.items() for line in ([star] if len(group) == blocks > 1 else group)]


def listed(names: Iterable[str], blocks: int) -> str:
    """Names in short: h.* for all blocks of so many, the first SHOWN, and how many more there are."""
    short = together(((re.sub(r"^h\.\d+", "h.*", name), name) for name in names), blocks)
    return ", ".join(short[:SHOWN]) + (f" and {len(short) - SHOWN} more" if len(short) > SHOWN else "")


def _lines(told: Mapping[str, list[str]], blocks: int) -> Iterator[str]:
    for how, names in told.items():
        yield f"{listed(names, blocks)} {'is' if len(names) == 1 else 'are'} {how}"


def _with_head(tensors: Mapping[str, Array], others: Mapping[str, Array]) -> Mapping[str, Array]:
    """The tensors with wte as their output head, where they are tied and the others are not."""
    return {**tensors, HEAD: tensors[WTE]} if HEAD in others and HEAD not in tensors and WTE in tensors else tensors


def _other_shape(name: str, found: Array, expected: Array, dtype: str) -> tuple[bool, str]:
    """Return whether another number of rows is right, since a vocabulary is padded or a context shorter, and words."""
    how = f"of shape {list(found.shape)}, not {list(expected.shape)}"
    rows = min(len(found), len(expected))
    if name not in TABLES or found.shape[1:] != expected.shape[1:]:
        return False, how
    equal = same(found[:rows], expected[:rows]) or same_rounded(found[:rows], expected[:rows], dtype)
    right = equal and (len(found) > len(expected) or name == "wpe.weight")
    return right, f"{how}: the first {rows} rows are {'the same' if equal else 'others'}"


def what_cannot_show(tensors: Mapping[str, Array], blocks: int) -> list[str]:
    """Return notes on parameters of which one number is all there is, which hides mistakes."""
    found = []
    for (kind, number), what in HIDDEN.items():
        names = [name for name, x in tensors.items() if name.endswith(kind) and x.ndim == 1 and (x == number).all()]
        if names:
            found.append(f"{listed(names, blocks)}: all {number} in the reference. {what} cannot show there.")
    return found
