"""What another implementation gave, under npgpt's stage names and in npgpt's shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..config import Config
from ..errors import NpgptError, numbers
from ..parameters import Array
from .naming import HEADS, HOOKED, SAME, SPLIT, canonical, described, is_hook, is_known, shape_of
from .textbook import located

OUTPUTS = ("logits", "log_probabilities")
SURPLUS = 1024  # columns by which a vocabulary may be padded
SHOWN = 6  # names that are listed


@dataclass(frozen=True)
class Case:
    """Rows of one length, run together: ids [B, T], their stages in their own order, each [B, …], and how they were
    run: chunks of tokens with a cache, where that is known; padding, tokens on the left that are not here; given,
    stages that both were handed, as a part's input is.
    """

    token_ids: NDArray[np.integer[Any]]
    theirs: Mapping[str, Array]
    chunks: tuple[int, ...] = ()
    padding: int = 0
    given: Mapping[str, Array] = field(default_factory=dict)

    def seen(self, stage: str, array: Array) -> Array:
        """A stage [B, T, …] on the positions that theirs has: all of them, or of an output the last alone."""
        last = stage in OUTPUTS and stage in self.theirs and self.theirs[stage].shape[1] == 1
        return array[:, -1:] if last else array


@dataclass
class Taken:
    """What is compared, and what is to be said of it. judged: which positions [B, T] are no padding.

    doubtful: of cases that are padded on the right and of whose output one position was given, their number and the
    place of their last token. hooks: whether names are TransformerLens's.
    """

    config: Config
    judged: NDArray[np.bool_]
    cases: list[Case] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    doubtful: dict[int, int] = field(default_factory=dict)
    hooks: bool = False

    def named(self, arrays: Mapping[str, ArrayLike]) -> dict[str, Array]:
        """Return their stages [B, …] by npgpt's names. Raises NpgptError as shaped does, and for one that is there
        twice.
        """
        unknown = [name for name in arrays if not is_known(name, self.config)]
        if len(unknown) == len(arrays):
            canonical(unknown[0], self.config)  # raises
        if unknown:
            rest = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
            self.notes.append(f"Left out, since they are no stages: {', '.join(unknown[:SHOWN])}{rest}.")
        theirs: dict[str, Array] = {}
        for name in (name for name in arrays if name not in unknown):
            stage, array = self.shaped(name, np.asarray(arrays[name]))
            if stage in theirs:
                raise NpgptError(f"{name} is {stage}, which is given twice")
            theirs[stage] = array
        return theirs

    def shaped(self, name: str, array: NDArray[Any]) -> tuple[str, Array]:
        """Return the stage of that name, and its numbers [B, …] in float64. Raises NpgptError where it cannot be one.

        Heads may be side by side in one row of C numbers, or in an axis of their own, before the tokens or behind them.
        """
        stage, heads_last = canonical(name, self.config)
        if array.dtype.kind not in "fiu":
            raise NpgptError(f"{name} must be numbers, not {array.dtype}")
        with np.errstate(invalid="ignore"):  # a signalling NaN stays a NaN
            found = array.astype(np.float64)
        if stage in OUTPUTS and (output := self.output(name, stage, found)) is not None:
            return stage, output
        layer, local = located(stage)
        usual = HOOKED if heads_last else described(stage).shape
        forms = {usual: stage}  # in the order in which they are tried, and the stage that each is
        if local in SAME:
            forms |= {HEADS: stage, HOOKED: stage, "B T C": f"h.{layer}.{SAME[local]}"}
        elif local in SPLIT:
            forms |= dict.fromkeys((HEADS, HOOKED), f"h.{layer}.{SPLIT[local]}")
        elif stage == "wpe":
            forms["B T C"] = stage
        for form, meant in forms.items():
            sizes = shape_of(form, self.config, self.judged.shape)
            if found.shape in (sizes, sizes[1:] if sizes[0] == 1 else None):
                whole = found.reshape(sizes)
                return meant, whole.transpose(0, 2, 1, 3) if form == HOOKED else whole
        expected = list(shape_of(usual, self.config, self.judged.shape))
        raise NpgptError(f"{name} is {list(array.shape)}; for these ids and this model it is {expected}")

    def output(self, name: str, stage: str, found: Array) -> Array | None:
        """Return an output as [B, T, V] in whichever order of axes it comes, without surplus columns; None for none.

        The last position alone may be there, or one more or one less than there are ids.
        """
        (B, T), V = self.judged.shape, self.config.vocab_size
        if found.ndim == 1:
            found = found[None]
        if found.ndim == 2:
            if B > 1 and found.shape == (V, B) and V != B:
                self.notes.append(f"{name} is given as [V, B], and was transposed.")
                found = found.T
            found = found[None] if B == 1 else found[:, None]
        if found.ndim != 3:
            return None
        surplus = found.shape[2] - V
        if found.shape[0] != B or not 0 <= surplus <= (SURPLUS if stage == "logits" else 0):
            sizes = {"B": B, "T": T, "V": V}
            fitting = [order for order in permutations(sizes) if found.shape == tuple(sizes[axis] for axis in order)]
            if len(fitting) != 1:
                return None
            order = "V, T" if B == 1 else ", ".join(fitting[0])
            self.notes.append(f"{name} is given as [{order}], and was transposed to [B, T, V].")
            return found.transpose([fitting[0].index(axis) for axis in sizes])
        if found.shape[1] not in (1, T - 1, T, T + 1):
            there = f"{name} has {found.shape[1]} positions, and there are {T} ids"
            raise NpgptError(f"{there}: they do not belong together")
        if surplus:
            self.told_of_surplus(name, found[self.judged] if found.shape[1] == T else found)
        return found[..., :V]

    def told_of_surplus(self, name: str, found: Array) -> None:
        """Say what columns beyond the vocabulary hold, [..., V + surplus]."""
        ours, rest = np.split(found, [self.config.vocab_size], axis=-1)
        count = f"{rest.shape[-1]} columns of {name} beyond the {self.config.vocab_size} ids"
        self.notes.append(f"The {count} are left out.")
        if np.isnan(rest).any() or np.isposinf(rest).any():
            self.problems.append(f"the {count} hold NaN or infinity, which spoils a softmax over all")
        elif above := int((rest.max(axis=-1) > ours.max(axis=-1)).sum()):
            self.notes[-1] += (
                f" At {above} of {rest[..., 0].size} positions the largest of them is above every real logit: a "
                "program that does not cut them off would draw ids that there are not."
            )


def cases(arrays: Mapping[str, ArrayLike], config: Config, ids: ArrayLike, chunks: Sequence[int] = ()) -> list[Case]:
    """What take has to compare, without what it says."""
    return take(arrays, config, config.token_rows(ids), None, chunks).cases


def take(
    arrays: Mapping[str, ArrayLike],
    config: Config,
    ids: NDArray[np.integer[Any]],
    attention_mask: ArrayLike | None,
    chunks: Sequence[int],
) -> Taken:
    """Their arrays checked, named and shaped. Padded positions, on either side, and names of nothing are left out.

    Raises NpgptError for a name or a shape that cannot be, for a mask and chunks that do not fit the ids, and where
    nothing is to compare.
    """
    if not arrays:
        raise NpgptError("there is nothing to compare: no logits and no stage")
    chunks = tuple(chunks)
    if not all(isinstance(chunk, (int, np.integer)) and chunk is not True and chunk > 0 for chunk in chunks):
        raise NpgptError(f"chunks must be whole numbers from 1, such as (5, 1, 1), not {chunks!r:.80}")
    if chunks and sum(chunks) != ids.shape[1]:
        raise NpgptError(f"chunks {list(chunks)} are {sum(chunks)} tokens, and there are {ids.shape[1]}")
    judged = _judged(attention_mask, ids)
    found = Taken(config, judged, hooks=any(is_hook(name) for name in arrays))
    theirs = found.named(arrays)
    if judged.all():
        found.cases.append(Case(ids, theirs, tuple(chunks)))
        return found
    found.notes.append(f"{(~judged).sum()} of {judged.size} positions are padding, and are not compared.")
    for row in range(len(ids)):
        places = np.flatnonzero(judged[row])
        begin, end = int(places[0]), int(places[-1]) + 1
        cut = {stage: _cut(stage, array, row, slice(begin, end), ids.shape[1]) for stage, array in theirs.items()}
        found.cases.append(Case(ids[row : row + 1, begin:end], cut, (), begin))
        if end < ids.shape[1] and any(theirs[stage].shape[1] == 1 for stage in OUTPUTS if stage in theirs):
            found.doubtful[row] = end - 1
            found.notes.append(
                f"Row {row} is padded on the right: the one position that is given of its output is compared with that "
                f"of its last token, at {end - 1}."
            )
    return found


def _judged(attention_mask: ArrayLike | None, ids: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Return which positions [B, T] are no padding. Raises NpgptError for a mask that cannot be."""
    if attention_mask is None:
        return np.ones(ids.shape, bool)
    mask = np.atleast_2d(numbers("attention_mask", attention_mask, "biuf"))
    if mask.shape != ids.shape or not np.isin(mask, (0, 1)).all():
        raise NpgptError(f"attention_mask must be 0 or 1 for each of the ids {list(ids.shape)}, not {list(mask.shape)}")
    for row, judged in enumerate(mask.astype(bool)):
        places = np.flatnonzero(judged)
        if not len(places) or places[-1] - places[0] + 1 != len(places):
            raise NpgptError(f"attention_mask of row {row} must be one run of ones, with padding on one side")
    return mask.astype(bool)


def _cut(stage: str, array: Array, row: int, own: slice, tokens: int) -> Array:
    """One row of a stage without its padding; of an output's single position, that position."""
    letters, part = described(stage).shape, array if len(array) == 1 else array[row : row + 1]
    if letters == "B H T T":
        return part[:, :, own, own]
    if letters == HEADS:
        return part[:, :, own]
    if part.shape[1] == 1:
        return part
    return part[:, own.start : own.stop + part.shape[1] - tokens]  # an output may have one more or less than ids
