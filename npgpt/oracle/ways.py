"""In which way one tensor differs from what it should be: a function of a Pair for each, in the table WAYS.

The first one that fits is told. Each is looked for in the first row before the whole, since a model is large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from ..parameters import Array
from .arithmetic import rounded
from .textbook import located

C_ATTN = ("queries", "keys", "values")  # of c_attn, side by side
SAMPLE = 16  # rows, columns or blocks in which a grid is looked for
KINDS = ("float16", "bfloat16", "float32")  # to which weights may have been rounded
LEAST = 24  # numbers, below which nothing is told from their distribution


@dataclass(frozen=True)
class Pair:
    """A tensor of theirs beside the reference's, of one shape. unit: how far storing it may round it."""

    name: str
    found: Array
    expected: Array
    reference: Mapping[str, Array]
    unit: float


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
    which = " and ".join(C_ATTN[n] for n in wrong)
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
    widths = {*x.shape, *pair.reference["wte.weight"].shape[1:]}
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
