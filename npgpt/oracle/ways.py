"""Describe in which way one tensor differs from what it should be. WAYS lists the ways; the first that fits is used.

A way yields pairs of words that follow "is" and whether they fit. It runs only up to the first pair that fits. Most
checks look at the first row before the whole tensor, since a model is large.
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

C_ATTN = ("queries", "keys", "values")  # the thirds of c_attn
SAMPLE = 16  # number of rows, columns or blocks searched for a grid
KINDS = ("float16", "bfloat16", "float32")  # dtypes that weights may have been rounded to
LEAST = 24  # fewest numbers whose distribution says anything
Words = Iterator[tuple[str, bool]]


@dataclass(frozen=True)
class Pair:
    """A tensor of theirs and the reference's, of equal shape. unit: largest relative rounding of the stored dtype."""

    name: str
    found: Array
    expected: Array
    reference: Mapping[str, Array]
    unit: float


def same(one: Array, other: Array) -> bool:
    """Return whether two arrays are equal. The first row is compared first, since most differences show there."""
    return one.shape == other.shape and np.array_equal(one[:1], other[:1]) and np.array_equal(one, other)


def same_rounded(one: Array, other: Array, dtype: str) -> bool:
    """Return whether one array equals another rounded to dtype."""
    return all(same(one[:rows], rounded(other[:rows], dtype)) for rows in (1, None))


def in_which_way(pair: Pair) -> str:
    """Return the words of the first way that fits. The last way always fits."""
    return next(words for way in WAYS for words, fits in way(pair) if fits)


def spoiled(pair: Pair) -> Words:
    """Yield signs of a tensor without content: not finite, zero, or one number throughout."""
    x = pair.found
    finite = np.isfinite(x)
    yield f"NaN or infinite in {_place(~finite)}", not finite.all()
    yield "all 0: dropped, or never loaded", not x.any()
    yield f"all {x.flat[0]:g}: never loaded?", x.size > 1 and bool((x == x.flat[0]).all())


def rearranged(pair: Pair) -> Words:
    """Yield the ways to rearrange, misplace or round the numbers of the reference."""
    x, y, (layer, local) = pair.found, pair.expected, located(pair.name)
    yield "transposed", same(x, y.T)
    if thirds := _thirds(pair, y):
        yield "transposed in each of q, k, v", same(x, np.concatenate([third.T for third in thirds], axis=-1))
        for order in permutations(range(3)):
            words = f"permuted: {', '.join('qkv'[place] for place in order)} instead of q, k, v"
            yield words, same(x, np.concatenate([thirds[place] for place in order], axis=-1))
    for dtype in KINDS:
        yield f"rounded to {dtype}", same_rounded(x, y, dtype)
    for other, array in pair.reference.items():
        at, same_local = located(other)[0], located(other)[1] == local
        elsewhere = f"from another block (h.{at} instead of h.{layer}): the blocks are in the wrong order"
        yield elsewhere if same_local else f"the reference's {other}", other != pair.name and same(x, array)
    for by in (1, -1, 2, -2) if x.ndim == 2 and len(x) > 8 else ():
        late, early = (x, y) if by > 0 else (y, x)
        words = f"shifted by {by:+d} rows: row {3 + by} is the reference's row 3"
        yield words, same(late[abs(by) :], early[: -abs(by)])


def in_part(pair: Pair) -> Words:
    """Yield faults of one part: one or two of queries, keys and values, or a part that is 0."""
    found, expected = _thirds(pair, pair.found), _thirds(pair, pair.expected)
    wrong = [n for n, (x, y) in enumerate(zip(found, expected, strict=True)) if not same(x, y)]
    if 0 < len(wrong) < 3:
        name = pair.name.replace("c_attn", "third")
        told, *more = {in_which_way(replace(pair, name=name, found=found[n], expected=expected[n])) for n in wrong}
        yield f"{told} (only in its {' and '.join(C_ATTN[n] for n in wrong)})", not more
    apart = pair.found != pair.expected
    zero = not apart.all() and not np.logical_and(apart, pair.found).any()
    yield f"0 in {_place(apart)} and correct elsewhere", zero


def shuffled(pair: Pair) -> Words:
    """Yield orders in which the reference's numbers may be."""
    x, y = pair.found, pair.expected
    if (x.min(), x.max()) != (y.min(), y.max()) or abs(x.sum() - y.sum()) > 1e-9 * np.abs(x).sum():
        return
    if x.ndim == 2:
        reshaped = same(x, y.reshape(y.shape[::-1]).T) or same(x, y.T.reshape(y.shape))
        yield "reshaped instead of transposed", reshaped
        for axis, word in enumerate(("rows", "columns")):
            drawn = np.random.default_rng(0).standard_normal(x.shape[1 - axis])
            one, other = (np.sort(np.moveaxis(z, axis, 0) @ drawn) for z in (x, y))
            words = f"the reference's with its {word} in a different order"
            yield words, np.allclose(one, other, rtol=1e-9, atol=1e-9)
    yield "made of the reference's numbers in a different order", np.array_equal(np.sort(x.ravel()), np.sort(y.ravel()))


def scaled(pair: Pair) -> Words:
    """Yield a common factor or a common summand. Gemma-style gains, for example, are stored minus 1."""
    x, y, unit = pair.found, pair.expected, 4 * pair.unit

    def near(room: float, factor: float = 1.0, by: float = 0.0) -> bool:
        gaps = (np.abs(x[:rows] - factor * y[:rows] - by).max() for rows in (1, None))
        return x.size > 2 and all(gap <= room for gap in gaps)

    factor = float(np.vdot(y, x) / (np.vdot(y, y) or 1.0))
    times = abs(factor - 1) > unit and near(unit * float(np.abs(x).max()), factor)
    yield f"{factor:.6g} times the reference's", times
    by, room = float((x[:1] - y[:1]).mean()), unit * float(np.abs(y).max())
    yield f"the reference's plus {by:.6g}", abs(by) > 2 * room and near(room, by=by)


def quantised(pair: Pair) -> Words:
    """Yield quantisations: numbers near the reference's, on a regular grid in each group."""
    x, y = pair.found, pair.expected
    if x.size < LEAST or np.square(x - y).mean() > 0.05 * np.square(y).mean():
        return
    for title, groups in _groups(x):
        for bits in (2, 3, 4, 5, 6, 8) if groups.shape[-1] > 4 else ():
            yield f"quantised: {bits} bits, one scale for {title}", _on_a_grid(groups, bits)


def others(pair: Pair) -> Words:
    """Yield what is left: numbers unrelated to the reference's, or near them, with where and by how much."""
    x, y = pair.found, pair.expected
    one, other = x - x.mean(), y - y.mean()
    related = float(np.vdot(one, other) / (np.linalg.norm(one) * np.linalg.norm(other) or 1.0))
    if x.size >= LEAST and not abs(related) > 5 / math.sqrt(x.size):
        widths = {*x.shape, *pair.reference["wte.weight"].shape[1:]}
        begun = next((words for words, fits in _beginnings(x, widths) if fits), "")
        fresh = begun != "" and not dict(_beginnings(y, widths))[begun]
        yield f"never loaded: still the initial values ({begun})", fresh
        how = f"correlation {related:.2f}, standard deviation {x.std():.3g} instead of {y.std():.3g}"
        yield f"unrelated to the reference's ({how}): from another model, or never loaded", True
    apart = x != y
    where = "" if apart.all() else f" in {_place(apart)}"
    yield f"different{where}, by up to {np.abs(x - y).max():.3g}", True


WAYS: tuple[Callable[[Pair], Words], ...] = (spoiled, rearranged, in_part, shuffled, scaled, quantised, others)


def _thirds(pair: Pair, array: Array) -> list[Array]:
    """Return the thirds of c_attn, and no parts for any other tensor."""
    return np.split(array, 3, axis=-1) if ".c_attn." in pair.name else []


def _place(mask: NDArray[np.bool_]) -> str:
    """Return words for where a mask is set: rows or columns if only some are affected, else a count of numbers."""
    for axis, word in enumerate(("row", "column") if mask.ndim == 2 else ("number",)):
        along = np.asarray(mask.any(axis=1 - axis)) if mask.ndim == 2 else mask
        places = np.flatnonzero(along)
        if 0 < len(places) < len(along):
            first, last = places[[0, -1]]
            if last - first + 1 == len(places):
                return f"{word} {first}" if first == last else f"{word}s {first} to {last}"
            return f"{len(places)} of {len(along)} {word}s"
    return f"{int(mask.sum())} of {mask.size} numbers"


def _groups(x: Array) -> Iterator[tuple[str, Array]]:
    """Yield titles and samples [groups, size] of numbers that may share a scale."""
    if x.ndim == 2:
        for lines, word in ((x[:SAMPLE], "row"), (x.T[:SAMPLE], "column")):
            yield f"each {word}", lines
            for size in (32, 64, 128, 256):
                if lines.shape[1] % size == 0 and lines.shape[1] > size:
                    yield f"each {size} numbers of a {word}", lines.reshape(-1, size)[:SAMPLE]
    yield "the whole tensor", np.r_[x.ravel()[: SAMPLE**2], x.min(), x.max()][None]


def _on_a_grid(groups: Array, bits: int) -> bool:
    """Return whether each group's numbers are integer multiples of a scale, counted from 0 or from the minimum."""
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    peak = np.maximum(np.abs(low), np.abs(high))
    spread = np.abs(groups - np.median(groups, axis=1, keepdims=True)).mean()
    steps = ((0, peak / (2 ** (bits - 1) - 1)), (0, peak / 2 ** (bits - 1)), (low, (high - low) / (2**bits - 1)))
    for origin, step in steps:
        places = (groups - origin) / np.where(step > 0, step, 1)
        off = np.abs(places - np.round(places))  # 0.25 on average without a grid
        if off.mean() < 0.04 and (off * step).mean() < 0.02 * spread:  # not just due to an outlier
            return True
    return False


def _beginnings(x: Array, widths: Iterable[int]) -> Words:
    """Yield common initialisations and whether these numbers follow them."""
    room, spread = 4 / math.sqrt(x.size), float(x.std())
    centred = abs(float(x.mean())) < room * spread
    peak = float(np.abs(x).max())
    for size in (0.02, 1.0):
        yield f"mean 0, standard deviation {size:g}", centred and abs(spread / size - 1) < room and peak > 2 * spread
    for width in sorted(widths):
        bound = 1 / math.sqrt(width)
        yield f"uniform within 1/sqrt({width})", centred and bound * (1 - 8 / x.size) < peak <= bound * (1 + 1e-6)
