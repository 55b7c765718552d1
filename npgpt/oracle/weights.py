"""Two sets of weights that should be the same: which tensors differ, and in which way.

A way is a function of a Pair in WAYS; the first one that fits is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from ..parameters import Array, count_blocks
from .arithmetic import UNIT, rounded
from .textbook import located

HEAD, WTE = "lm_head.weight", "wte.weight"
TABLES = (WTE, "wpe.weight", HEAD)  # a row for each id or position
THIRDS = ("queries", "keys", "values")  # of c_attn, side by side
SHOWN = 3  # names in a line
SAMPLE = 16  # rows, columns or blocks in which a grid is looked for
KINDS = ("float16", "bfloat16", "float32")  # to which weights may have been rounded
LEAST = 24  # numbers, below which nothing is told from their distribution


@dataclass(frozen=True)
class Comparison:
    """What is wrong with weights, a line each, and what is other but right."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Pair:
    """A tensor of theirs beside the reference's, of one shape. unit: how far storing it may round it."""

    name: str
    found: Array
    expected: Array
    reference: Mapping[str, Array]
    unit: float


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
            to, how = _other_shape(name, found, expected, dtype)
            (notes if to else problems).setdefault(how, []).append(name)
        elif not same(found, expected):
            if same_rounded(found, expected, dtype):
                notes.setdefault(f"the reference's, rounded to {dtype}, in which they are kept", []).append(name)
            else:
                how = _source(
                    name, in_which_way(Pair(name, found, expected, reference, UNIT[dtype])), theirs, reference
                )
                problems.setdefault(how, []).append(name)
    strange = [name for name in theirs if name not in reference and name != HEAD and not _beyond(name, depth)]
    if strange:
        problems.setdefault("not in the reference", []).extend(strange)
    counted = [] if blocks == depth else [f"there are {blocks} blocks, the reference has {depth}"]
    common = min(blocks, depth)
    return Comparison([*_lines(problems, common), *counted], [f"{line}." for line in _lines(notes, common)])


def same(one: Array, other: Array) -> bool:
    """Return whether two arrays are equal; different ones are mostly told by their first row."""
    return one.shape == other.shape and np.array_equal(one[:1], other[:1]) and np.array_equal(one, other)


def same_rounded(one: Array, other: Array, dtype: str) -> bool:
    """Return whether an array is another one rounded to dtype."""
    return all(same(one[:rows], rounded(other[:rows], dtype)) for rows in (1, None))


def in_which_way(pair: Pair) -> str:
    """Return the first way that fits, or that the numbers are others, where, and by how much."""
    told = next((found for way in WAYS if (found := way(pair))), "")
    if told:
        return told
    apart = pair.found != pair.expected
    where = "" if apart.all() else f" in {_place(apart)}"
    return f"different{where}, by up to {np.abs(pair.found - pair.expected).max():.3g}"


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


# The ways: each returns words that follow "is", or none where it is another.


def not_finite(pair: Pair) -> str:
    """NaN or infinite."""
    finite = np.isfinite(pair.found)
    return "" if finite.all() else f"not finite in {_place(~finite) or 'all its numbers'}"


def zero(pair: Pair) -> str:
    """Nothing in it."""
    return "" if pair.found.any() else "zero: dropped, or never loaded"


def constant(pair: Pair) -> str:
    """One number everywhere, as gains begin."""
    first = pair.found.flat[0]
    return f"{first:g} everywhere: never loaded?" if pair.found.size > 1 and (pair.found == first).all() else ""


def transposed(pair: Pair) -> str:
    """The whole matrix, or in c_attn each of the three."""
    if same(pair.found, pair.expected.T):
        return "transposed"
    thirds = _thirds(pair, pair.expected)
    turned = bool(thirds) and same(pair.found, np.concatenate([third.T for third in thirds], axis=-1))
    return "transposed in each of q, k, v" if turned else ""


def permuted(pair: Pair) -> str:
    """Queries, keys and values in another order."""
    thirds = _thirds(pair, pair.expected)
    for order in permutations(range(3)) if thirds else ():
        if same(pair.found, np.concatenate([thirds[place] for place in order], axis=-1)):
            return f"permuted: {', '.join('qkv'[place] for place in order)} in place of q, k, v"
    return ""


def coarser(pair: Pair) -> str:
    """Rounded to another dtype."""
    return next((f"rounded to {dtype}" for dtype in KINDS if same_rounded(pair.found, pair.expected, dtype)), "")


def elsewhere(pair: Pair) -> str:
    """Another block's, or another tensor's altogether."""
    layer, local = located(pair.name)
    for other, array in pair.reference.items():
        if other != pair.name and same(pair.found, array):
            place, same_local = located(other)
            if None not in (layer, place) and same_local == local:
                return f"another block's (h.{place} for h.{layer}): the layers are in another order"
            return f"the reference's {other}"
    return ""


def shifted_rows(pair: Pair) -> str:
    """Rows that stand some places further on."""
    for by in (1, -1, 2, -2) if pair.found.ndim == 2 and len(pair.found) > 8 else ():
        late, early = (pair.found, pair.expected) if by > 0 else (pair.expected, pair.found)
        if same(late[abs(by) :], early[: -abs(by)]):
            return f"shifted by {by:+d} rows: row {3 + by} is the reference's row 3"
    return ""


def reshaped(pair: Pair) -> str:
    """The same numbers in another order."""
    x, y = pair.found, pair.expected
    if (x.min(), x.max()) != (y.min(), y.max()) or abs(x.sum() - y.sum()) > 1e-9 * np.abs(x).sum():
        return ""
    if x.ndim == 2 and (same(x, y.reshape(y.shape[::-1]).T) or same(x, y.T.reshape(y.shape))):
        return "reshaped where it had to be transposed"
    for axis, word in enumerate(("rows", "columns") if x.ndim == 2 else ()):
        drawn = np.random.default_rng(0).standard_normal(x.shape[1 - axis])
        one, other = (np.sort(np.moveaxis(z, axis, 0) @ drawn) for z in (x, y))
        if np.allclose(one, other, rtol=1e-9, atol=1e-9):
            return f"the reference's with its {word} in another order"
    moved = np.array_equal(np.sort(x.ravel()), np.sort(y.ravel()))
    return "the reference's numbers in another order" if moved else ""


def scaled(pair: Pair) -> str:
    """All numbers times one."""
    x, y = pair.found, pair.expected
    factor = float(np.vdot(y, x) / (np.vdot(y, y) or 1.0))
    room = 4 * pair.unit * np.abs(x).max()
    near = all(np.abs(x[:rows] - factor * y[:rows]).max() <= room for rows in (1, None))
    return f"{factor:.6g} times the reference's" if x.size > 2 and near and abs(factor - 1) > 4 * pair.unit else ""


def offset(pair: Pair) -> str:
    """One number added to all, as where gains are stored less one."""
    by, room = float((pair.found[:1] - pair.expected[:1]).mean()), 4 * pair.unit * float(np.abs(pair.expected).max())
    near = all(np.abs(pair.found[:rows] - pair.expected[:rows] - by).max() <= room for rows in (1, None))
    return f"the reference's plus {by:.6g}" if pair.found.size > 2 and near and abs(by) > 2 * room else ""


def in_part(pair: Pair) -> str:
    """One or two of queries, keys and values alone."""
    found, expected = _thirds(pair, pair.found), _thirds(pair, pair.expected)
    wrong = [n for n, (x, y) in enumerate(zip(found, expected, strict=True)) if not same(x, y)]
    if not 0 < len(wrong) < 3:
        return ""
    name = pair.name.replace("c_attn", "third")
    ways = {in_which_way(replace(pair, name=name, found=found[n], expected=expected[n])) for n in wrong}
    which = " and ".join(THIRDS[n] for n in wrong)
    return f"{ways.pop()}, in its {which} alone" if len(ways) == 1 else ""


def partly_zero(pair: Pair) -> str:
    """Zero in a part, and right elsewhere."""
    apart = pair.found != pair.expected
    other = apart.all() or np.logical_and(apart, pair.found).any()
    return "" if other else f"zero in {_place(apart)}, and right elsewhere"


def quantised(pair: Pair) -> str:
    """Near the reference's numbers, on a grid for each group of them."""
    x, y = pair.found, pair.expected
    if x.size < LEAST or np.square(x - y).mean() > 0.05 * np.square(y).mean():
        return ""
    for title, groups in _groups(x):
        for bits in (2, 3, 4, 5, 6, 8):
            if groups.shape[-1] > 4 and _on_a_grid(groups, bits):
                return f"quantised: {bits} bits, one scale for {title}"
    return ""


def never_loaded(pair: Pair) -> str:
    """Numbers that have nothing to do with the reference's."""
    x, y = pair.found, pair.expected
    if x.size < LEAST or abs(related := _correlation(x, y)) > 5 / math.sqrt(x.size):
        return ""
    widths = {*x.shape, *pair.reference[WTE].shape[1:]}
    begun = next((words for words, fits in _beginnings(x, widths) if fits), None)
    if begun and not dict(_beginnings(y, widths))[begun]:
        return f"never loaded: still as initialised ({begun})"
    spreads = f"spread {x.std():.3g} in place of {y.std():.3g}"
    return f"unrelated to the reference's (correlation {related:.2f}, {spreads}): another model's, or never loaded"


WAYS: tuple[Callable[[Pair], str], ...] = (
    not_finite,
    zero,
    constant,
    transposed,
    permuted,
    coarser,
    elsewhere,
    shifted_rows,
    in_part,
    partly_zero,
    reshaped,
    scaled,
    offset,
    quantised,
    never_loaded,
)


def _thirds(pair: Pair, array: Array) -> list[Array]:
    """Of c_attn alone; none of any other tensor."""
    return np.split(array, 3, axis=-1) if ".c_attn." in pair.name else []


def _place(mask: NDArray[np.bool_]) -> str:
    """Where a mask is set, by rows or columns where that tells it, else how much of it."""
    for axis, word in enumerate(("row", "column") if mask.ndim == 2 else ("number",)):
        along = np.asarray(mask.any(axis=1 - axis)) if mask.ndim == 2 else mask
        places = np.flatnonzero(along)
        if len(places) < len(along):
            first, last = places[0], places[-1]
            if last - first + 1 == len(places):
                return f"{word} {first}" if first == last else f"{word}s {first} to {last}"
            return f"{len(places)} of {len(along)} {word}s"
    return f"{int(mask.sum())} of {mask.size} numbers"


def _groups(x: Array) -> Iterator[tuple[str, Array]]:
    """Numbers [groups, size] that may share a scale, a sample of them."""
    if x.ndim == 2:
        for lines, word in ((x[:SAMPLE], "row"), (x.T[:SAMPLE], "column")):
            yield f"each {word}", lines
            for size in (32, 64, 128, 256):
                if lines.shape[1] % size == 0 and lines.shape[1] > size:
                    yield f"each {size} numbers of a {word}", lines.reshape(-1, size)[:SAMPLE]
    yield "the whole tensor", np.r_[x.ravel()[: SAMPLE**2], x.min(), x.max()][None]


def _on_a_grid(groups: Array, bits: int) -> bool:
    """Whether the numbers of each group are whole multiples of its scale, counted from 0 or from its least number."""
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    peak = np.maximum(np.abs(low), np.abs(high))
    spread = np.abs(groups - np.median(groups, axis=1, keepdims=True)).mean()
    steps = ((0, peak / (2 ** (bits - 1) - 1)), (0, peak / 2 ** (bits - 1)), (low, (high - low) / (2**bits - 1)))
    for origin, step in steps:
        places = (groups - origin) / np.where(step > 0, step, 1)
        off = np.abs(places - np.round(places))  # 0.25 on average where there is no grid
        if off.mean() < 0.04 and (off * step).mean() < 0.02 * spread:  # and not since all but an outlier is small
            return True
    return False


def _correlation(x: Array, y: Array) -> float:
    one, other = x - x.mean(), y - y.mean()
    return float((one * other).sum() / (np.linalg.norm(one) * np.linalg.norm(other) or 1.0))


def _beginnings(x: Array, widths: Iterable[int]) -> Iterator[tuple[str, bool]]:
    """How programs initialise, and whether these numbers are so."""
    room, spread = 4 / math.sqrt(x.size), float(x.std())
    centred = abs(float(x.mean())) < room * spread
    peak = float(np.abs(x).max())
    for size in (0.02, 1.0):
        normal = abs(spread / size - 1) < room and peak > 2 * spread
        yield f"mean 0 and spread {size:g}", centred and normal
    for width in sorted(widths):
        bound = 1 / math.sqrt(width)
        yield f"uniform within 1/sqrt({width})", centred and bound * (1 - 8 / x.size) < peak <= bound * (1 + 1e-6)
