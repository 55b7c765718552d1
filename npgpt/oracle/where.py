"""Describe where a stage differs: rows, positions, heads and channels, or a relation that holds everywhere.

This helps with mistakes outside the catalogue: masks and caches show in positions, padding in rows, splits in heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ..parameters import Array
from .difference import aligned, root
from .textbook import located
from .theirs import OUTPUTS

LISTED = 4  # most places that are listed individually
BY_HEAD = ("attn.q", "attn.k", "attn.v", "attn.scores", "attn.weights", "attn.heads")  # [B, H, T, …]
IN_HEADS = ("attn.query", "attn.key", "attn.value", "attn.merged")  # [B, T, C], C = H · D
RELATED = 3  # tolerances that a relation may leave, since its constants are fitted


def where(stage: str, theirs: Sequence[Array], ours: Sequence[Array], tolerance: float, n_head: int) -> str:
    """Return one line on where a stage differs by more than its tolerance, and by which relation.

    theirs, ours: the stage in each case, [B, T, …] or [B, H, T, …].
    """
    pairs = [aligned(stage, one, other) for one, other in zip(theirs, ours, strict=True)]
    whole = [pair for pair in pairs if pair is not None]
    if len(whole) < len(pairs):
        return "the shapes differ, so the numbers cannot be compared"
    if stage == "loss" or stage.endswith((".weight", ".bias")):
        return "; ".join(of_one(stage, *whole[0], tolerance))
    if len({one.shape[1:] for one, _ in whole}) > 1:  # padded rows of different lengths
        bad = [n for n, (one, other) in enumerate(whole) if root(one - other) > tolerance]
        rows = listed("row", bad, len(whole)) if bad else "no single row"
        return f"{rows} {'differ' if len(bad) > 1 else 'differs'}{'' if bad else ' by more than a tolerance'}"
    x, y = (np.concatenate([pair[side] for pair in whole]) for side in (0, 1))
    if not np.isfinite(x).all():
        return "; ".join(not_finite(x, y, tolerance))
    return "; ".join([*places(stage, x - y, tolerance, n_head), *relations(x, y, tolerance)])


def of_one(stage: str, x: Array, y: Array, tolerance: float) -> Iterator[str]:
    """Yield where the loss or a parameter's gradient differs, which has neither rows of the batch nor positions."""
    if stage == "loss":
        yield f"theirs is {x.item():.7g}, ours {y.item():.7g}, {x.item() / (y.item() or 1.0):.6g} times as much"
        return
    if not np.isfinite(x).all():
        yield f"{int((~np.isfinite(x)).sum())} of {x.size} numbers are NaN or infinite"
        return
    gap = x - y
    everywhere = True
    for axis, name in enumerate(("row", "column") if x.ndim == 2 else ("number",)):
        squares = np.square(gap).mean(axis=tuple(a for a in range(gap.ndim) if a != axis))
        bad = np.flatnonzero(np.sqrt(squares) > tolerance)
        if 0 < len(bad) < gap.shape[axis]:
            yield f"only {listed(name, bad, gap.shape[axis])}"
            everywhere = False
    factor = float(np.vdot(x, y) / (np.vdot(y, y) or 1.0))
    room = min(RELATED * tolerance, root(gap) / 4)
    ways: list[tuple[str, Callable[[], Array]]] = [
        ("theirs is 0 everywhere: frozen, detached or never computed?", lambda: x),
        (f"theirs = {factor:.6g} x ours, up to rounding", lambda: (x - factor * y) / max(1.0, abs(factor))),
        ("transposed", lambda: x.T - y if x.shape == x.T.shape else gap),
        ("[out, in] written as [in, out]", lambda: x.reshape(x.shape[::-1]).T - y),
        ("the right rows in a different order", lambda: np.sort(x, axis=0) - np.sort(y, axis=0)),
        ("the right numbers of each row in a different order", lambda: np.sort(x, axis=-1) - np.sort(y, axis=-1)),
    ]
    found = [text for text, left in ways if root(left()) <= room][:1]
    yield from found or (["everywhere, and by no simple relation"] if everywhere else [])


def not_finite(x: Array, y: Array, tolerance: float) -> Iterator[str]:
    """Yield how many numbers are NaN or infinite, at which positions, and whether all others agree."""
    for name, found in (("NaN", np.isnan(x)), ("-inf", np.isneginf(x)), ("inf", np.isposinf(x))):
        at = np.unique(found.nonzero()[-2])
        if len(at):
            share = f"{found.sum() / found.size:.1%} of all numbers" if not found.all() else "every number"
            yield f"{share} {'are' if share[0].isdigit() else 'is'} {name}, {at_positions(at, x.shape[-2])}"
    rest = np.isfinite(x) & np.isfinite(y)
    if rest.any():
        yield "all other numbers agree" if root((x - y)[rest]) <= tolerance else "other numbers also differ"


def places(stage: str, gap: Array, tolerance: float, n_head: int) -> Iterator[str]:
    """Yield the rows, heads, positions and channels that differ, unless all do."""
    local = located(stage)[1].removeprefix("d.")
    axes = ("row", "position", "id" if local in OUTPUTS else "channel")
    if local in BY_HEAD:
        axes = ("row", "head", "position")
    if local in IN_HEADS:
        gap = gap.reshape(*gap.shape[:2], n_head, -1)
        axes = ("row", "position", "head")
    for axis, name in enumerate(axes):
        size = gap.shape[axis]
        squares = np.square(gap).mean(axis=tuple(a for a in range(gap.ndim) if a != axis))
        bad = np.flatnonzero(np.sqrt(squares) > tolerance)
        if name == "position" and size > 1:
            yield at_positions(bad, size)
        elif 0 < len(bad) < size:
            yield f"only {listed(name, bad, size)}"


def at_positions(bad: NDArray[np.intp], count: int) -> str:
    """Return positions in words. A run from the beginning or to the end suggests a mask, a cache or padding."""
    first, last = (int(bad[0]), int(bad[-1])) if len(bad) else (0, 0)
    if len(bad) == count:
        return f"at all {count} positions" if count > 1 else "at the only position"
    if len(bad) > 1 and len(bad) == last - first + 1:
        if last == count - 1:
            agree = f"positions 0 to {first - 1} agree" if first > 1 else "position 0 agrees"
            return f"{agree}, all from {first} on differ"
        if first == 0:
            return f"positions 0 to {last} differ, all from {last + 1} on agree"
    return f"only {listed('position', bad, count)}" if len(bad) else "at no single position by more than a tolerance"


def listed(name: str, bad: Sequence[int] | NDArray[np.intp], count: int) -> str:
    """Return places in words: a few by their numbers, a run by its ends, many by their count."""
    numbers = [int(n) for n in bad]
    if len(numbers) == 1:
        return f"{name} {numbers[0]} of {count}"
    if len(numbers) == numbers[-1] - numbers[0] + 1:
        return f"{name}s {numbers[0]} to {numbers[-1]} of {count}"
    if len(numbers) <= LISTED:
        return f"{name}s {', '.join(map(str, numbers[:-1]))} and {numbers[-1]} of {count}"
    return f"{len(numbers)} of {count} {name}s"


def relations(x: Array, y: Array, tolerance: float) -> Iterator[str]:
    """Yield the first relation between theirs and ours that holds up to rounding, if any."""

    def times(axis: int | None) -> Array:
        products, squares = (np.sum(each * y, axis=axis, keepdims=True) for each in (x, y))
        return np.asarray(products / np.maximum(squares, 1e-300))

    gap, scale = x - y, times(None)
    ways: list[tuple[str, Callable[[], Array]]] = [
        ("theirs = 0 everywhere", lambda: x),
        (f"theirs = {scale.item():.6g} x ours, up to rounding", lambda: (x - scale * y) / max(1.0, abs(scale.item()))),
        ("theirs = ours + one constant, up to rounding", lambda: gap - gap.mean()),
        ("theirs = ours + a constant for each position", lambda: gap - gap.mean(axis=-1, keepdims=True)),
        ("theirs = ours times a factor for each position", lambda: x - times(-1) * y),
        ("each position has the correct numbers of the position before it", lambda: x[..., 1:, :] - y[..., :-1, :]),
        ("each position has the correct numbers of the position after it", lambda: x[..., :-1, :] - y[..., 1:, :]),
        ("the rows are in a different order", lambda: np.sort(x, axis=0) - np.sort(y, axis=0)),
        ("each position has the right numbers in a different order", lambda: np.sort(x, axis=-1) - np.sort(y, axis=-1)),
    ]
    for text, left in ways:
        remains = left()
        if remains.size and x.shape[-1] > 2 and root(remains) <= min(RELATED * tolerance, root(gap) / 4):
            yield text
            return
