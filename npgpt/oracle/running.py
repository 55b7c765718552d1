"""Calling what others wrote: in the kind of input that it takes, and twice, to tell whether its output is its own.

No framework is imported: torch is used where it is imported already.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import NpgptError
from .outputs import logits_of, raised

DRAWN = "its outputs differ from run to run: dropout is on, or something else is drawn"
STATE = "state is kept between calls (a cache that is not reset?)"
ROWS = ", row by row"
Ids = NDArray[np.integer[Any]]
Run = Callable[[Ids], Mapping[str, NDArray[Any]]]  # theirs, on ids [B, T]


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that torch.compile, where it is in use, runs and does not translate."""
    if "torch._dynamo" not in sys.modules:
        return function
    kept: Callable[..., Any] = sys.modules["torch"].compiler.disable(function)
    return kept


def invoke(function: Callable[..., Any], given: Any, signature: Callable[..., Any] | None = None) -> Any:
    """Call a function with its input, and with None for each further argument that it needs, such as targets; with the
    input for these, where it cannot do with None. signature: what tells its arguments, where that is another function.
    """
    torch = sys.modules.get("torch")
    try:
        parameters = list(inspect.signature(signature or function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    needed = [p for p in parameters if p.default is p.empty]
    more = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in needed) - 1
    names = [p.name for p in needed if p.kind is p.KEYWORD_ONLY]
    with nullcontext() if torch is None else torch.no_grad():
        if more < 1 and not names:
            return function(given)
        try:
            return function(given, *[None] * more, **dict.fromkeys(names))
        except Exception:
            return function(given, *[given] * more, **dict.fromkeys(names, given))


class Kind(NamedTuple):
    """A kind of input: what it is called for a whole batch and for one row of it, and how an array becomes one."""

    batch: str
    row: str
    convert: Callable[[NDArray[Any]], Any]


Ways = dict[str, Callable[[NDArray[Any]], NDArray[Any]]]  # how a function can be called, by what messages say of it


def ways(kinds: list[Kind], call: Callable[[Any], NDArray[Any]]) -> Ways:
    """Return calls with each kind for the whole batch, and then for one row after another."""

    def whole(kind: Kind, batch: NDArray[Any]) -> NDArray[Any]:
        return call(kind.convert(batch))

    def by_rows(kind: Kind, batch: NDArray[Any]) -> NDArray[Any]:
        rows = [call(kind.convert(row)) for row in batch]
        return np.stack([row[0] if row.ndim == 3 and len(row) == 1 else row for row in rows])

    found: Ways = {kind.batch: partial(whole, kind) for kind in kinds}
    return found | {kind.row + ROWS: partial(by_rows, kind) for kind in kinds}


def working(
    calls: Ways, x: NDArray[Any], failed: dict[str, str], final: type[Exception] | tuple[()] = ()
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield what x gives in each way in which nothing is raised; what is raised in others is put into failed.

    final: an exception after which no other way is tried.
    """
    for way, call in calls.items():
        try:
            found = call(x)
        except final:
            raise
        except Exception as error:  # of any kind, since the function is foreign
            failed.setdefault(way, raised(error))
            continue
        yield way, found


def _long_tensor(ids: Ids) -> Any:
    return sys.modules["torch"].as_tensor(np.array(ids, np.int64))


# The kinds of ids, in the order in which they are tried.
USUAL = Kind("NumPy's int64 [B, T]", "NumPy's int64 [T]", lambda ids: ids.astype(np.int64))
TENSORS = Kind("a torch LongTensor [B, T]", "a torch LongTensor [T]", _long_tensor)
LISTS = Kind("a list of rows", "a list", lambda ids: ids.tolist())


@dataclass
class Function:
    """A callable from ids to logits. way: in which it is called, known once it was."""

    theirs: Callable[..., Any]
    vocab_size: int
    way: str = ""

    def run(self, token_ids: Ids) -> dict[str, NDArray[Any]]:
        """Return its logits on ids [B, T]. Raises NpgptError where it raises with every kind of ids."""
        kinds = [USUAL, TENSORS, LISTS] if "torch" in sys.modules else [USUAL, LISTS]
        known = ways(kinds, lambda ids: logits_of(invoke(self.theirs, ids), self.vocab_size))
        failed: dict[str, str] = {}
        tried = {self.way: known[self.way]} if self.way else known
        for self.way, logits in working(tried, token_ids, failed, final=NpgptError):
            return {"logits": logits}
        if len(set(failed.values())) == 1:
            raise NpgptError(f"{self.name} raises {next(iter(failed.values()))}")
        whole = "; with ".join(f"{way}, {error}" for way, error in failed.items() if not way.endswith(ROWS))
        raise NpgptError(f"{self.name} raises an error for every kind of ids: with {whole}")

    @property
    def name(self) -> str:
        """What it is called in messages."""
        name = str(getattr(self.theirs, "__qualname__", type(self.theirs).__name__))
        return "the lambda" if name.endswith("<lambda>") else name.rpartition("<locals>.")[2]

    @property
    def notes(self) -> list[str]:
        """Which kind of ids it was called with, where that is not the usual one."""
        if self.way == USUAL.batch:
            return []
        return [f"It was called with ids as {self.way}, since {USUAL.batch} raises an error in it."]


def unsteady(run: Run, token_ids: Ids, first: NDArray[Any], rewind: Callable[[], None], unit: float) -> str:
    """Return what is wrong where a second run on the same ids gives other logits than the first, nothing where not.

    rewind: puts random numbers back to where they were before the first run, which tells drawing from keeping.
    """
    try:
        second = run(token_ids)["logits"]
    except NpgptError as error:
        return f"called a second time on the same ids, {error}: {STATE}"
    if alike(first, second, unit):
        return ""
    rewind()
    with suppress(NpgptError):
        if alike(first, run(token_ids)["logits"], unit):
            return DRAWN
    if first.shape != second.shape:
        return f"its second output on the same ids is {list(second.shape)}, the first {list(first.shape)}: {STATE}"
    return f"its outputs differ from run to run, with the same random numbers too: {STATE}, or its own generator draws"


def alike(one: NDArray[Any], other: NDArray[Any], unit: float) -> bool:
    """Return whether two outputs are equal but for rounding, which threads that add up in another order may bring."""
    if one.shape != other.shape:
        return False
    if one.dtype.kind not in "fiu" or np.array_equal(one, other, equal_nan=True):  # text is refused elsewhere
        return True
    with np.errstate(all="ignore"):
        gap, size = (float(np.square(x.astype(np.float64)).mean()) for x in (one - other, one))
    return gap <= (16 * unit) ** 2 * size


def rewinder() -> Callable[[], None]:
    """Return what puts the random numbers of Python, NumPy and torch back to where they are now."""
    kept: list[tuple[Callable[[Any], Any], Any]] = [(random.setstate, random.getstate())]
    kept.append((np.random.set_state, np.random.get_state()))  # noqa: NPY002 - the ones that others draw from
    if (torch := sys.modules.get("torch")) is not None:
        kept.append((torch.set_rng_state, torch.get_rng_state()))

    def rewind() -> None:
        for put_back, state in kept:
            put_back(state)

    return rewind
