"""Call foreign code with the kind of input that it takes, and twice, to check that its output is reproducible.

No framework is imported: torch is used only if it is imported already.
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

DRAWN = "its outputs differ from run to run: dropout is on, or something else is random"
STATE = "state is kept between calls (a cache that is not reset?)"
ROWS = ", row by row"
Ids = NDArray[np.integer[Any]]
Run = Callable[[Ids], Mapping[str, NDArray[Any]]]  # their model, on ids [B, T]


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that torch.compile, if in use, runs without compiling it."""
    if "torch._dynamo" not in sys.modules:
        return function
    kept: Callable[..., Any] = sys.modules["torch"].compiler.disable(function)
    return kept


def invoke(function: Callable[..., Any], given: Any, signature: Callable[..., Any] | None = None) -> Any:
    """Call a function as called() does, without recording anything for gradients."""
    torch = sys.modules.get("torch")
    with nullcontext() if torch is None else torch.no_grad():
        return called(function, given, signature)


def called(function: Callable[..., Any], given: Any, signature: Callable[..., Any] | None = None) -> Any:
    """Call a function with its input, and with None for other required arguments, such as targets; if it raises,
    call it with the input for these. signature: the function whose signature counts, if another.
    """
    try:
        parameters = list(inspect.signature(signature or function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    needed = [p for p in parameters if p.default is p.empty]
    more = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in needed) - 1
    names = [p.name for p in needed if p.kind is p.KEYWORD_ONLY]
    if more < 1 and not names:
        return function(given)
    try:
        return function(given, *[None] * more, **dict.fromkeys(names))
    except Exception:
        return function(given, *[given] * more, **dict.fromkeys(names, given))


class Kind(NamedTuple):
    """A kind of input: its name for a whole batch, its name for one row, and the conversion of an array to it."""

    batch: str
    row: str
    convert: Callable[[NDArray[Any]], Any]


Ways = dict[str, Callable[[NDArray[Any]], NDArray[Any]]]  # ways to call a function, by their name in messages


def ways(kinds: list[Kind], call: Callable[[Any], NDArray[Any]]) -> Ways:
    """Return the ways to call with each kind of input: first with the whole batch, then row by row."""

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
    """Yield (way, output for x) for each way that raises nothing. Errors of the others are put into failed.

    final: an exception that ends the trials and is raised.
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
USUAL = Kind("a NumPy array of int64 [B, T]", "a NumPy array of int64 [T]", lambda ids: ids.astype(np.int64))
TENSORS = Kind("a torch LongTensor [B, T]", "a torch LongTensor [T]", _long_tensor)
LISTS = Kind("a list of rows", "a list", lambda ids: ids.tolist())


@dataclass
class Function:
    """A callable from ids to logits. way: how to call it, known after the first call."""

    theirs: Callable[..., Any]
    vocab_size: int
    way: str = ""

    def run(self, token_ids: Ids) -> dict[str, NDArray[Any]]:
        """Return its logits on ids [B, T]. Raises NpgptError if it raises with every kind of ids."""
        kinds = [USUAL, TENSORS, LISTS] if "torch" in sys.modules else [USUAL, LISTS]
        known = ways(kinds, lambda ids: logits_of(invoke(self.theirs, ids), self.vocab_size))
        failed: dict[str, str] = {}
        tried = {self.way: known[self.way]} if self.way else known
        for self.way, logits in working(tried, token_ids, failed, final=NpgptError):
            return {"logits": logits}
        if len(set(failed.values())) == 1:
            raise NpgptError(f"{self.name} raises {next(iter(failed.values()))}")
        whole = "; with ".join(f"{way}, {error}" for way, error in failed.items() if not way.endswith(ROWS))
        raise NpgptError(f"{self.name} raises an error for every kind of input: with {whole}")

    @property
    def name(self) -> str:
        """Its name in messages."""
        name = str(getattr(self.theirs, "__qualname__", type(self.theirs).__name__))
        return "the lambda" if name.endswith("<lambda>") else name.rpartition("<locals>.")[2]

    @property
    def notes(self) -> list[str]:
        """A note on the kind of ids that it was called with, unless it is the usual one."""
        if self.way == USUAL.batch:
            return []
        return [f"It was called with ids as {self.way}, since it raises an error for {USUAL.batch}."]


def unsteady(run: Run, token_ids: Ids, first: NDArray[Any], rewind: Callable[[], None], unit: float) -> str:
    """Return why a second run on the same ids gives other logits than the first, or "" if it does not.

    rewind: resets the random number generators to before the first run, which tells randomness from kept state.
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
        return f"its outputs on the same ids have shapes {list(first.shape)}, then {list(second.shape)}: {STATE}"
    return f"its outputs differ from run to run, even with the same random seed: {STATE}, or it has its own generator"


def alike(one: NDArray[Any], other: NDArray[Any], unit: float) -> bool:
    """Return whether two outputs are equal up to rounding, since threads may add in another order."""
    if one.shape != other.shape:
        return False
    if one.dtype.kind not in "fiu" or np.array_equal(one, other, equal_nan=True):  # text is rejected elsewhere
        return True
    with np.errstate(all="ignore"):
        gap, size = (float(np.square(x.astype(np.float64)).mean()) for x in (one - other, one))
    return gap <= (16 * unit) ** 2 * size


def rewinder() -> Callable[[], None]:
    """Return a function that resets the generators of Python, NumPy and torch to their present state."""
    kept: list[tuple[Callable[[Any], Any], Any]] = [(random.setstate, random.getstate())]
    kept.append((np.random.set_state, np.random.get_state()))  # noqa: NPY002 - the global generator that others use
    if (torch := sys.modules.get("torch")) is not None:
        kept.append((torch.set_rng_state, torch.get_rng_state()))

    def rewind() -> None:
        for put_back, state in kept:
            put_back(state)

    return rewind
