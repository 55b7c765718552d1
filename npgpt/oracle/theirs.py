"""Bring the arrays of another implementation to npgpt's stage names and shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..config import Config
from ..errors import NpgptError, numbers
from ..parameters import Array, schema
from .backward import IGNORED, is_backward, is_parameter
from .naming import HEADS, HOOKED, SAME, SPLIT, canonical, described, is_hook, is_known, shape_of
from .textbook import Pass, Textbook, located

OUTPUTS = ("logits", "log_probabilities")
SURPLUS = 1024  # most columns by which a vocabulary may be padded
SHOWN = 6  # most names that are listed


@dataclass(frozen=True)
class Case:
    """Rows of equal length that are run together: ids [B, T] and their stages, each [B, …].

    chunks: numbers of tokens run at a time with a cache, if known. padding: tokens removed on the left. given: stages
    that both sides get as input, as in the check of a part. targets: [B, T], if there are a loss or gradients.
    """

    token_ids: NDArray[np.integer[Any]]
    theirs: Mapping[str, Array]
    chunks: tuple[int, ...] = ()
    padding: int = 0
    given: Mapping[str, Array] = field(default_factory=dict)
    targets: NDArray[np.integer[Any]] | None = None

    def run(self, book: Textbook, known: Mapping[str, Any]) -> Pass:
        """Return a pass of this model from known stages."""
        return Pass(book, self.token_ids, dict(known), self.padding, self.targets)

    def seen(self, stage: str, array: Array) -> Array:
        """Return a stage [B, T, …] at the positions that theirs has: all, or only the last of an output."""
        last = stage in OUTPUTS and stage in self.theirs and self.theirs[stage].shape[1] == 1
        return array[:, -1:] if last else array


@dataclass
class Taken:
    """The cases to compare, with notes and problems. judged: which positions [B, T] are not padding.

    doubtful: position of the last token, by row, for rows padded on the right of whose output one position was given.
    hooks: whether names are TransformerLens's.
    """

    config: Config
    judged: NDArray[np.bool_]
    cases: list[Case] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    doubtful: dict[int, int] = field(default_factory=dict)
    hooks: bool = False

    def named(self, arrays: Mapping[str, ArrayLike]) -> dict[str, Array]:
        """Return their stages [B, …] by npgpt's names. Raises NpgptError as shaped does, and for a duplicate stage."""
        unknown = [name for name in arrays if not is_known(name, self.config)]
        if len(unknown) == len(arrays):
            canonical(unknown[0], self.config)  # raises
        if unknown:
            rest = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
            self.notes.append(f"Ignored, since they are not stages: {', '.join(unknown[:SHOWN])}{rest}.")
        theirs: dict[str, Array] = {}
        for name in (name for name in arrays if name not in unknown):
            stage, array = self.shaped(name, np.asarray(arrays[name]))
            if stage in theirs:
                raise NpgptError(f"{name} is the stage {stage}, which was given before under another name")
            theirs[stage] = array
        return theirs

    def shaped(self, name: str, array: NDArray[Any]) -> tuple[str, Array]:
        """Return the stage for a name, and its numbers [B, …] in float64.

        Heads may be side by side in C channels, or have an axis of their own, before or after the tokens. Raises
        NpgptError if the name, dtype or shape is not that of a stage.
        """
        stage, heads_last = canonical(name, self.config)
        if array.dtype.kind not in "fiu":
            raise NpgptError(f"{name} must be numbers, not {array.dtype}")
        with np.errstate(invalid="ignore"):  # a signalling NaN stays a NaN
            found = array.astype(np.float64)
        if stage in OUTPUTS and (output := self.output(name, stage, found)) is not None:
            return stage, output
        if stage == "loss" or is_parameter(stage, self.config):
            expected = (1,) if stage == "loss" else schema(self.config)[stage[2:]]
            if found.shape != expected and (stage != "loss" or found.size != 1):
                raise NpgptError(f"{name} has shape {list(array.shape)} and must be {list(expected)}")
            return stage, found.reshape(expected)
        layer, local = located(stage)
        mark = "d." if is_backward(stage) else ""
        local = local.removeprefix(mark)
        usual = HOOKED if heads_last else described(stage).shape
        forms = {usual: stage}  # stage by form, in the order in which they are tried
        if local in SAME:
            forms |= {HEADS: stage, HOOKED: stage, "B T C": f"{mark}h.{layer}.{SAME[local]}"}
        elif local in SPLIT:
            forms |= dict.fromkeys((HEADS, HOOKED), f"{mark}h.{layer}.{SPLIT[local]}")
        elif stage == "wpe":
            forms["B T C"] = stage
        for form, meant in forms.items():
            sizes = shape_of(form, self.config, self.judged.shape)
            if found.shape in (sizes, sizes[1:] if sizes[0] == 1 else None):
                whole = found.reshape(sizes)
                if mark and local == "attn.weights":  # whatever is in memory for hidden keys, if it is not computed
                    whole = np.where(np.tri(sizes[-1], dtype=bool) | np.isfinite(whole), whole, 0)
                return meant, whole.transpose(0, 2, 1, 3) if form == HOOKED else whole
        must = list(shape_of(usual, self.config, self.judged.shape))
        raise NpgptError(f"{name} has shape {list(array.shape)}; for these ids and this model it must be {must}")

    def output(self, name: str, stage: str, found: Array) -> Array | None:
        """Return an output as [B, T, V] from any order of axes, without surplus columns, or None if it does not fit.

        It may have only the last position, or one position more or fewer than there are ids.
        """
        (B, T), V = self.judged.shape, self.config.vocab_size
        if found.ndim == 1:
            found = found[None]
        if found.ndim == 2:
            if B > 1 and found.shape == (V, B) and V != B:
                self.notes.append(f"{name} was given as [V, B] and was transposed.")
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
            self.notes.append(f"{name} was given as [{order}] and was transposed to [B, T, V].")
            return found.transpose([fitting[0].index(axis) for axis in sizes])
        if found.shape[1] not in (1, T - 1, T, T + 1):
            there = f"{name} has {found.shape[1]} positions, but there are {T} ids"
            raise NpgptError(f"{there}: give the ids that theirs was run on")
        if surplus:
            self.told_of_surplus(name, found[self.judged] if found.shape[1] == T else found)
        return found[..., :V]

    def told_of_surplus(self, name: str, found: Array) -> None:
        """Note what the columns beyond the vocabulary contain. found: [..., V + surplus]."""
        ours, rest = np.split(found, [self.config.vocab_size], axis=-1)
        count = f"{rest.shape[-1]} columns of {name} beyond the {self.config.vocab_size} ids"
        self.notes.append(f"The {count} are ignored.")
        if np.isnan(rest).any() or np.isposinf(rest).any():
            self.problems.append(f"the {count} contain NaN or infinity, which spoils a softmax over all columns")
        elif above := int((rest.max(axis=-1) > ours.max(axis=-1)).sum()):
            self.notes[-1] += (
                f" At {above} of {rest[..., 0].size} positions one of them is larger than every real logit: a "
                "program that does not remove them would sample ids that do not exist."
            )


def cases(arrays: Mapping[str, ArrayLike], config: Config, ids: ArrayLike, chunks: Sequence[int] = ()) -> list[Case]:
    """Return the cases that take finds, without its notes."""
    return take(arrays, config, config.token_rows(ids), None, chunks).cases


def take(
    arrays: Mapping[str, ArrayLike],
    config: Config,
    ids: NDArray[np.integer[Any]],
    attention_mask: ArrayLike | None,
    chunks: Sequence[int],
    targets: NDArray[np.integer[Any]] | None = None,
) -> Taken:
    """Check, name and shape their arrays. Padding on either side and unknown names are left out.

    targets: [B, T] of the loss, −100 where none counts, as targets_of returns them. Raises NpgptError for an impossible
    name or shape, for a mask or chunks that do not fit the ids, for a loss or gradients without targets, and if there
    is nothing to compare.
    """
    if not arrays:
        raise NpgptError("there is nothing to compare: no logits and no stage")
    chunks = tuple(chunks)
    if not all(isinstance(chunk, (int, np.integer)) and chunk is not True and chunk > 0 for chunk in chunks):
        raise NpgptError(f"chunks must be whole numbers from 1, such as (5, 1, 1), not {chunks!r:.80}")
    if chunks and sum(chunks) != ids.shape[1]:
        raise NpgptError(f"chunks {list(chunks)} add up to {sum(chunks)} tokens, but there are {ids.shape[1]}")
    judged = _judged(attention_mask, ids)
    found = Taken(config, judged, hooks=any(is_hook(name) for name in arrays))
    theirs = found.named(arrays)
    backward = next((stage for stage in theirs if is_backward(stage)), None)
    if targets is None and backward is not None:
        raise NpgptError(f"{backward} depends on the targets of the loss: give targets=")
    if judged.all():
        found.cases.append(Case(ids, theirs, tuple(chunks), targets=targets))
        return found
    if targets is not None:
        raise NpgptError(
            "a loss is one number for all rows, so attention_mask cannot be used with targets: pad on the right, with "
            f"targets of {IGNORED}, and leave attention_mask out"
        )
    found.notes.append(f"{(~judged).sum()} of {judged.size} positions are padding and are not compared.")
    for row in range(len(ids)):
        places = np.flatnonzero(judged[row])
        begin, end = int(places[0]), int(places[-1]) + 1
        cut = {stage: _cut(stage, array, row, slice(begin, end), ids.shape[1]) for stage, array in theirs.items()}
        found.cases.append(Case(ids[row : row + 1, begin:end], cut, (), begin))
        if end < ids.shape[1] and any(theirs[stage].shape[1] == 1 for stage in OUTPUTS if stage in theirs):
            found.doubtful[row] = end - 1
            found.notes.append(
                f"Row {row} is padded on the right, and its output has one position: it is compared with the output "
                f"of the last token, at {end - 1}."
            )
    return found


def _judged(attention_mask: ArrayLike | None, ids: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Return which positions [B, T] are not padding. Raises NpgptError for an impossible mask."""
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
    """Return one row of a stage without its padding. An output with a single position is kept."""
    letters, part = described(stage).shape, array if len(array) == 1 else array[row : row + 1]
    if letters == "B H T T":
        return part[:, :, own, own]
    if letters == HEADS:
        return part[:, :, own]
    if part.shape[1] == 1:
        return part
    return part[:, own.start : own.stop + part.shape[1] - tokens]  # an output may have one more or fewer than ids
