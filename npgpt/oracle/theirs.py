"""What another implementation gave, under npgpt's stage names and in npgpt's shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..config import Config
from ..errors import NpgptError
from ..parameters import Array
from .naming import HEADS, HOOKED, SAME, SPLIT, canonical, described, is_hook, is_known, shape_of
from .textbook import located

OUTPUTS = ("logits", "log_probabilities")
SURPLUS = 1024  # columns by which a vocabulary may be padded
SHOWN = 6  # names that are listed
# Other orders of axes in which logits come, and what brings them to [B, T, V].
ORDERS = {
    "[B, V, T]": (0, 2, 1),
    "[T, B, V]": (1, 0, 2),
    "[V, B, T]": (1, 2, 0),
    "[T, V, B]": (2, 0, 1),
    "[V, T, B]": (2, 1, 0),
}


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
    """What is compared, and what is to be said of it.

    doubtful: of cases that are padded on the right and of whose output one position was given, their number and the
    place of their last token. hooks: whether names are TransformerLens's.
    """

    cases: list[Case] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    doubtful: dict[int, int] = field(default_factory=dict)
    hooks: bool = False


def cases(
    arrays: Mapping[str, ArrayLike],
    config: Config,
    token_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    chunks: Sequence[int] = (),
) -> list[Case]:
    """What take has to compare, without what it says."""
    return take(arrays, config, token_ids, attention_mask, chunks).cases


def take(
    arrays: Mapping[str, ArrayLike],
    config: Config,
    token_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    chunks: Sequence[int] = (),
) -> Taken:
    """Their arrays checked, named and shaped. Padded positions, on either side, and names of nothing are left out.

    Raises NpgptError for a name or a shape that cannot be, for ids that do not fit, and where nothing is to compare.
    """
    ids = config.token_rows(token_ids)
    if not arrays:
        raise NpgptError("there is nothing to compare: no logits and no stage")
    if not all(isinstance(chunk, (int, np.integer)) and chunk > 0 for chunk in chunks):
        raise NpgptError(f"chunks must be whole numbers from 1, such as (5, 1, 1), not {chunks!r:.80}")
    if chunks and sum(chunks) != ids.shape[1]:
        raise NpgptError(f"chunks {list(chunks)} are {sum(chunks)} tokens, and there are {ids.shape[1]}")
    judged, found = _judged(attention_mask, ids), Taken(hooks=any(is_hook(name) for name in arrays))
    theirs = _named(arrays, config, judged, found)
    if judged.all():
        found.cases.append(Case(ids, theirs, tuple(chunks)))
        return found
    found.notes.append(f"{(~judged).sum()} of {judged.size} positions are padding, and are not compared.")
    for row in range(len(ids)):
        places = np.flatnonzero(judged[row])
        begin, end = int(places[0]), int(places[-1]) + 1
        found.cases.append(Case(ids[row : row + 1, begin:end], _cut(theirs, row, begin, end, ids.shape[1]), (), begin))
        if end < ids.shape[1] and any(theirs[stage].shape[1] == 1 for stage in OUTPUTS if stage in theirs):
            found.doubtful[row] = end - 1
            found.notes.append(
                f"Row {row} is padded on the right: the one position that is given of its output is compared with that "
                f"of its last token, at {end - 1}."
            )
    return found


def _named(arrays: Mapping[str, ArrayLike], config: Config, judged: NDArray[np.bool_], said: Taken) -> dict[str, Array]:
    """Return their stages [B, …] by npgpt's names. judged, said: see shaped."""
    unknown = [name for name in arrays if not is_known(name, config)]
    if unknown:
        if len(unknown) == len(arrays):
            canonical(unknown[0], config)  # raises
        rest = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        said.notes.append(f"Left out, since they are no stages: {', '.join(unknown[:SHOWN])}{rest}.")
    theirs: dict[str, Array] = {}
    for name in (name for name in arrays if name not in unknown):
        stage, array = shaped(name, arrays[name], config, judged, said)
        if stage in theirs:
            raise NpgptError(f"{name} is {stage}, which is given twice")
        theirs[stage] = array
    return theirs


def _judged(attention_mask: ArrayLike | None, ids: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Return which positions [B, T] are no padding. Raises NpgptError for a mask that cannot be."""
    if attention_mask is None:
        return np.ones(ids.shape, bool)
    try:
        mask = np.atleast_2d(np.asarray(attention_mask))
    except ValueError:  # rows of different lengths
        mask = np.zeros(0)
    if mask.shape != ids.shape or not np.isin(mask, (0, 1)).all():
        raise NpgptError(f"attention_mask must be 0 or 1 for each of the ids {list(ids.shape)}, not {list(mask.shape)}")
    for row, judged in enumerate(mask.astype(bool)):
        places = np.flatnonzero(judged)
        if not len(places) or places[-1] - places[0] + 1 != len(places):
            raise NpgptError(f"attention_mask of row {row} must be one run of ones, with padding on one side")
    return mask.astype(bool)


def _cut(theirs: Mapping[str, Array], row: int, begin: int, end: int, tokens: int) -> dict[str, Array]:
    """One row's stages without its padding; of an output's single position, that position."""
    found = {}
    for stage, array in theirs.items():
        letters = described(stage).shape
        part = array[row : row + 1] if stage != "wpe" or len(array) > 1 else array
        if letters == "B H T T":
            part = part[:, :, begin:end, begin:end]
        elif letters == HEADS:
            part = part[:, :, begin:end]
        elif part.shape[1] > 1:  # an output may have a position more or less than there are ids
            part = part[:, begin : end + part.shape[1] - tokens]
        found[stage] = part
    return found


def shaped(name: str, array: ArrayLike, config: Config, judged: NDArray[np.bool_], said: Taken) -> tuple[str, Array]:
    """Return the stage of that name, and its numbers as [B, …] in float64. Raises NpgptError where it cannot be one.

    Heads may be side by side in one row of C numbers, or in an axis of their own, before the tokens or behind them. Of
    outputs the last position alone may be there, or one more or one less than there are ids. judged: which positions
    [B, T] are no padding. said: where to say what is left out.
    """
    stage, heads_last = canonical(name, config)
    found = np.asarray(array)
    if found.dtype.kind not in "fiu":
        raise NpgptError(f"{name} must be numbers, not {found.dtype}")
    found = found.astype(np.float64)
    ids, letters = (len(judged), judged.shape[1]), described(stage).shape
    expected = shape_of(HOOKED if heads_last else letters, config, ids)
    if stage in OUTPUTS:
        if (output := _output(name, stage, found, config, judged, said)) is not None:
            return stage, output
    else:
        layer, local = located(stage)
        forms = {HEADS: stage, HOOKED: stage} if letters == HEADS else {letters: stage}
        forms = dict(reversed(forms.items())) if heads_last else forms
        if (twin := SAME.get(local)) is not None:
            forms["B T C"] = f"h.{layer}.{twin}"
        elif (twin := SPLIT.get(local)) is not None:
            forms |= {HEADS: f"h.{layer}.{twin}", HOOKED: f"h.{layer}.{twin}"}
        forms |= {"B T C": stage} if stage == "wpe" else {}
        for form, meant in forms.items():
            sizes = shape_of(form, config, ids)
            if found.shape in (sizes, sizes[1:] if sizes[0] == 1 else None):
                whole = found.reshape(sizes)
                return meant, whole.transpose(0, 2, 1, 3) if form == HOOKED else whole
    raise NpgptError(f"{name} is {list(np.shape(array))}; for these ids and this model it is {list(expected)}")


def _output(
    name: str, stage: str, found: Array, config: Config, judged: NDArray[np.bool_], said: Taken
) -> Array | None:
    """Return an output as [B, T, V] in whichever order of axes it comes, without surplus columns; None for none."""
    (B, T), V = judged.shape, config.vocab_size
    if found.ndim == 1:
        found = found[None]
    if found.ndim == 2:
        if B > 1 and found.shape == (V, B) and V != B:
            said.notes.append(f"{name} is given as [V, B], and was transposed.")
            found = found.T
        found = found[None] if B == 1 else found[:, None]
    if found.ndim != 3:
        return None
    surplus = found.shape[2] - V
    if found.shape[0] != B or not 0 <= surplus <= (SURPLUS if stage == "logits" else 0):
        fitting = {order: axes for order, axes in ORDERS.items() if found.transpose(axes).shape == (B, T, V)}
        if len(fitting) != 1:
            return None
        ((order, axes),) = fitting.items()
        said.notes.append(f"{name} is given as {'[V, T]' if B == 1 else order}, and was transposed to [B, T, V].")
        return found.transpose(axes)
    if found.shape[1] not in (1, T - 1, T, T + 1):
        raise NpgptError(f"{name} has {found.shape[1]} positions, and there are {T} ids: they do not belong together")
    if surplus:
        _surplus(name, found[judged] if found.shape[1] == T else found, V, said)
    return found[..., :V]


def _surplus(name: str, found: Array, vocab_size: int, said: Taken) -> None:
    """Say what columns beyond the vocabulary hold, [..., V + surplus]."""
    ours, rest = found[..., :vocab_size], found[..., vocab_size:]
    count = f"{rest.shape[-1]} columns of {name} beyond the {vocab_size} ids"
    said.notes.append(f"The {count} are left out.")
    if np.isnan(rest).any() or np.isposinf(rest).any():
        said.problems.append(f"the {count} hold NaN or infinity, which spoils a softmax over all")
    elif above := int((rest.max(axis=-1) > ours.max(axis=-1)).sum()):
        said.notes[-1] += (
            f" At {above} of {rest[..., 0].size} positions the largest of them is above every real logit: a program "
            "that does not cut them off would draw ids that there are not."
        )
