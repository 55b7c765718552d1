"""Two sets of weights that should be the same: every tensor of both is accounted for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from ..parameters import Array, count_blocks
from .arithmetic import UNIT
from .textbook import located
from .ways import Pair, in_which_way, same, same_rounded

HEAD, WTE = "lm_head.weight", "wte.weight"
TABLES = (WTE, "wpe.weight", HEAD)  # a row for each id or position
SHOWN = 3  # names in a line


@dataclass(frozen=True)
class Comparison:
    """What is wrong with weights, a line each, and what is other but right."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@np.errstate(all="ignore")  # what is infinite is told
def compare_weights(theirs: Mapping[str, Array], reference: Mapping[str, Array], dtype: str) -> Comparison:
    """Compare by canonical names what should be equal, bit for bit once the reference is rounded to their dtype.

    Every tensor of both sides is accounted for. The output head is compared by its true source, wte where it is tied.
    """
    problems: dict[str, list[str]] = {}
    notes: dict[str, list[str]] = {}
    ours, blocks = _with_heads(theirs, reference), count_blocks(theirs)
    depth = count_blocks(reference)
    for name, expected in _with_heads(reference, theirs).items():
        found = ours.get(name)
        if found is None:
            if not _beyond(name, blocks):
                problems.setdefault("missing", []).append(name)
        elif found.shape != expected.shape:
            right, how = _other_shape(name, found, expected, dtype)
            (notes if right else problems).setdefault(how, []).append(name)
        elif not same(found, expected):
            if same_rounded(found, expected, dtype):
                notes.setdefault(f"the reference's, rounded to {dtype}, in which they are kept", []).append(name)
            else:
                how = in_which_way(Pair(name, found, expected, reference, UNIT[dtype]))
                problems.setdefault(_source(name, how, theirs, reference), []).append(name)
    strange = [name for name in theirs if name not in reference and name != HEAD and not _beyond(name, depth)]
    if strange:
        problems.setdefault("not in the reference", []).extend(strange)
    counted = [] if blocks == depth else [f"there are {blocks} blocks, the reference has {depth}"]
    common = min(blocks, depth)
    return Comparison([*_lines(problems, common), *counted], [f"{line}." for line in _lines(notes, common)])


def listed(names: Iterable[str], blocks: int) -> str:
    """Names in short: h.* for all blocks of so many, the first SHOWN, and how many more there are."""
    alike: dict[str, list[str]] = {}
    for name in names:
        layer, local = located(name)
        alike.setdefault(name if layer is None else f"h.*.{local}", []).append(name)
    short = [entry for pattern, group in alike.items() for entry in ([pattern] if len(group) == blocks > 1 else group)]
    return ", ".join(short[:SHOWN]) + (f" and {len(short) - SHOWN} more" if len(short) > SHOWN else "")


def _lines(found: Mapping[str, list[str]], blocks: int) -> Iterator[str]:
    for how, names in found.items():
        yield f"{listed(names, blocks)} {'is' if len(names) == 1 else 'are'} {how}"


def _with_heads(tensors: Mapping[str, Array], others: Mapping[str, Array]) -> Mapping[str, Array]:
    """The tensors with wte as their output head, where they are tied and the others are not."""
    return {**tensors, HEAD: tensors[WTE]} if HEAD in others and HEAD not in tensors and WTE in tensors else tensors


def _source(name: str, how: str, theirs: Mapping[str, Array], reference: Mapping[str, Array]) -> str:
    """How it differs; of an output head also where it comes from, where the two have another source."""
    if name != HEAD or (HEAD in theirs) == (HEAD in reference):
        return how
    if HEAD in theirs:
        return f"{how}; the reference's output head is its wte.weight (tied)"
    return "wte.weight itself (tied), and the reference has an output head of its own"


def _beyond(name: str, blocks: int) -> bool:
    """Whether it belongs to a block that there is not, which is told once."""
    layer = located(name)[0]
    return layer is not None and layer >= blocks


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
    zero_biases = [name for name, x in tensors.items() if name.endswith("bias") and not x.any()]
    gains = [name for name, x in tensors.items() if name.endswith("weight") and x.ndim == 1 and (x == 1).all()]
    found = []
    if zero_biases:
        found.append(
            f"{listed(zero_biases, blocks)}: all 0 in the reference. A bias that is missing, added twice or added at "
            "another place cannot show there."
        )
    if gains:
        found.append(
            f"{listed(gains, blocks)}: all 1 in the reference. A LayerNorm without its gain, or with another's, cannot "
            "show there."
        )
    return found
