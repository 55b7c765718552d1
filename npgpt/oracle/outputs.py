"""Calling what others wrote: ids in the kind that it takes, and logits out of whatever it returns.

No framework is imported: torch is used where it is imported already, and all else goes through the objects' own
methods.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import NpgptError

DRAWN = "its outputs differ from run to run: dropout is on, or something else is drawn"
STATE = "state is kept between calls (a cache that is not reset?)"
Run = Callable[[NDArray[np.integer[Any]]], Mapping[str, NDArray[Any]]]  # theirs, on ids [B, T]
Ids = NDArray[np.integer[Any]]
NO_ARRAY = "{} is no array of numbers: give logits [V], [T, V] or [B, T, V]"
NO_STAGES = ("loss", "past_key_values", "cross_attentions")  # of what transformers returns
# How a framework hands out an array, in the order in which the ways are tried.
WAYS_OUT: tuple[Callable[[Any], Any], ...] = (
    lambda tensor: tensor.numpy(),
    lambda tensor: tensor.__array__(),
    lambda tensor: np.from_dlpack(tensor),
    lambda tensor: tensor.get(),
    lambda tensor: np.array(tensor.tolist()),
)


def as_array(tensor: Any) -> NDArray[Any]:
    """Return a tensor of any framework as an array; bfloat16 as float32. Raises NpgptError for what is none."""
    if hasattr(tensor, "detach"):
        try:
            tensor = tensor.detach().cpu()
            tensor = tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor
            return np.asarray(tensor.numpy())
        except Exception as error:  # sparse, quantised, or on no device
            raise NpgptError(f"{_kind(tensor)} cannot be read as an array: {raised(error)}") from error
    if isinstance(tensor, (list, tuple)) and any(hasattr(item, "shape") for item in tensor):
        return np.stack([as_array(item) for item in tensor])
    if not hasattr(tensor, "shape") or isinstance(tensor, (np.ndarray, np.generic)):
        try:
            return _numbers(np.asarray(tensor), tensor)
        except NpgptError:
            raise
        except ValueError:  # rows of different lengths
            raise NpgptError(NO_ARRAY.format(_kind(tensor))) from None
    for way in WAYS_OUT:
        try:
            return _numbers(np.asarray(way(tensor)), tensor)
        except Exception:  # of any kind, since the type is foreign
            continue
    raise NpgptError(f"{_kind(tensor)} cannot be read as an array: give .numpy() of it")


def _numbers(array: NDArray[Any], tensor: Any) -> NDArray[Any]:
    """The array itself, JAX's bfloat16 as float32. Raises NpgptError where it is of objects."""
    if array.dtype.name == "bfloat16":
        return array.astype(np.float32)
    if array.dtype == object:
        raise NpgptError(NO_ARRAY.format(_kind(tensor)))
    return array


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def logits_of(output: Any, vocab_size: int | None = None) -> NDArray[Any]:
    """Return the logits in whatever a model returns: a tensor, an object or dict with logits, else in a tuple, a dict
    or a dataclass the first array with a number for each id, or the first with two axes. Raises NpgptError for none.
    """
    if getattr(output, "logits", None) is not None:
        return as_array(output.logits)
    if isinstance(output, Mapping) and "logits" in output:
        return as_array(output["logits"])
    if output is None:
        raise NpgptError("it returns None: does it return its logits?")
    if isinstance(output, Mapping):
        fields = {str(name): value for name, value in output.items()}
    elif isinstance(output, (tuple, list)) and len({_shape(item) for item in output}) > (len(output) > 1):
        fields = {f"[{place}]": item for place, item in enumerate(output)}
    elif hasattr(output, "__dict__") and not hasattr(output, "shape"):
        fields = vars(output)
    else:
        return as_array(output)
    shapes = {name: _shape(item) for name, item in fields.items()}
    wide = [name for name, shape in shapes.items() if len(shape) and shape[-1] == vocab_size]
    if not wide and not isinstance(output, Mapping):
        wide = [name for name, shape in shapes.items() if len(shape) >= 2]
    if not wide:
        raise NpgptError(f"it gives no logits, but {', '.join(fields) or 'nothing'}: is the output head left out?")
    return as_array(fields[wide[0]])


def named(theirs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Return arrays by name. Of what transformers returns, a tuple is an array for each of its places, and what is no
    stage is left out.
    """
    found: dict[str, NDArray[Any]] = {}
    for name, value in theirs.items():
        if isinstance(value, (tuple, list)) and any(hasattr(item, "shape") for item in value):
            found |= {f"{name}.{place}": as_array(item) for place, item in enumerate(value)}
        elif value is not None and name not in NO_STAGES:
            found[name] = as_array(value)
    return found


def _shape(item: Any) -> tuple[int, ...]:
    """Of an array of any framework or of nested lists; none of anything else."""
    if isinstance(item, list) and item:
        return len(item), *_shape(item[0])
    return tuple(getattr(item, "shape", ()))


@contextmanager
def without_gradients() -> Iterator[None]:
    """Keep torch, where it is imported, from recording what runs within."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    with torch.no_grad():
        yield


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that torch.compile, where it is in use, runs and does not translate."""
    if "torch._dynamo" not in sys.modules:
        return function
    kept: Callable[..., Any] = sys.modules["torch"].compiler.disable(function)
    return kept


def invoke(function: Callable[..., Any], ids: Any, signature: Callable[..., Any] | None = None) -> Any:
    """Call a function with ids, and with None for each further argument that it needs, such as targets; with the ids
    for these, where it cannot do with None. signature: what tells its arguments, where that is another function.
    """
    try:
        parameters = list(inspect.signature(signature or function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    needed = [p for p in parameters if p.default is p.empty]
    more = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in needed) - 1
    names = [p.name for p in needed if p.kind is p.KEYWORD_ONLY]
    with without_gradients():
        if more < 1 and not names:
            return function(ids)
        try:
            return function(ids, *[None] * more, **dict.fromkeys(names))
        except Exception:
            return function(ids, *[ids] * more, **dict.fromkeys(names, ids))


def _long_tensor(ids: Ids) -> Any:
    return sys.modules["torch"].as_tensor(np.array(ids, np.int64))


# The kinds of ids, in the order in which they are tried; a function of one row comes last.
KINDS: dict[str, Callable[[Ids], Any]] = {
    "NumPy's int64 [B, T]": lambda ids: ids.astype(np.int64),
    "a torch LongTensor [B, T]": _long_tensor,
    "a list of rows": lambda ids: ids.tolist(),
}
ROWS: dict[str, Callable[[Ids], Any]] = {
    "NumPy's int64 [T], row by row": lambda row: row.astype(np.int64),
    "a torch LongTensor [T], row by row": _long_tensor,
    "a list, row by row": lambda row: row.tolist(),
}


USUAL = next(iter(KINDS))


@dataclass
class Function:
    """A callable from ids to logits. kind: in which it takes ids, known once it was called."""

    theirs: Callable[..., Any]
    vocab_size: int
    kind: str = ""

    def run(self, token_ids: Ids) -> dict[str, NDArray[Any]]:
        """Return its logits on ids [B, T]. Raises NpgptError where it raises with every kind of ids."""
        if self.kind:
            try:
                return {"logits": self._with(self.kind, token_ids)}
            except NpgptError:
                raise
            except Exception as error:
                raise NpgptError(f"{self.name} raises {raised(error)}") from error
        failed: dict[str, str] = {}
        for kind in KINDS | ROWS:
            if "torch" in kind and "torch" not in sys.modules:
                continue
            try:
                found = self._with(kind, token_ids)
            except NpgptError:
                raise
            except Exception as error:
                failed[kind] = raised(error)
                continue
            self.kind = kind
            return {"logits": found}
        if len(set(failed.values())) == 1:
            raise NpgptError(f"{self.name} raises {failed[USUAL]}")
        whole = "; with ".join(f"{kind}, {error}" for kind, error in failed.items() if kind in KINDS)
        raise NpgptError(f"{self.name} raises an error for every kind of ids: with {whole}")

    @property
    def name(self) -> str:
        """What it is called in messages."""
        name = str(getattr(self.theirs, "__qualname__", type(self.theirs).__name__))
        return "the lambda" if name.endswith("<lambda>") else name.rpartition("<locals>.")[2]

    @property
    def notes(self) -> list[str]:
        """Which kind of ids it was called with, where that is not the usual one."""
        if self.kind in ("", USUAL):
            return []
        return [f"It was called with ids as {self.kind}, since {USUAL} raises an error in it."]

    def _with(self, kind: str, token_ids: Ids) -> NDArray[Any]:
        if kind in KINDS:
            return logits_of(invoke(self.theirs, KINDS[kind](token_ids)), self.vocab_size)
        rows = [logits_of(invoke(self.theirs, ROWS[kind](row)), self.vocab_size) for row in token_ids]
        return np.stack([row[0] if row.ndim == 3 and len(row) == 1 else row for row in rows])


def unsteady(run: Run, token_ids: Ids, first: NDArray[Any], rewind: Callable[[], None], unit: float) -> str:
    """Return what is wrong where a second run on the same ids gives other logits than the first, nothing where not.

    rewind: puts random numbers back to where they were before the first run, which tells drawing from keeping.
    """

    def again() -> NDArray[Any] | str:
        try:
            return run(token_ids)["logits"]
        except NpgptError as error:
            return str(error)

    second = again()
    if isinstance(second, str):
        return f"called a second time on the same ids, {second}: {STATE}"
    if alike(first, second, unit):
        return ""
    rewind()
    third = again()
    if not isinstance(third, str) and alike(first, third, unit):
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
    own, torch = random.getstate(), sys.modules.get("torch")
    numpys = np.random.get_state()  # noqa: NPY002 - the one that others draw from
    torchs = None if torch is None else torch.get_rng_state()

    def rewind() -> None:
        random.setstate(own)
        np.random.set_state(numpys)  # noqa: NPY002
        if torch is not None:
            torch.set_rng_state(torchs)

    return rewind


def raised(error: Exception) -> str:
    """Return an exception as one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.200}" if text else type(error).__name__
