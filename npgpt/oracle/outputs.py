"""Extract arrays and logits from whatever another program returns.

No framework is imported: the objects' own methods are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.tensor import LONGEST_SHAPE
from ..errors import NpgptError, is_masked

NO_STAGES = ("past_key_values", "cross_attentions")  # fields of transformers' outputs
# How to get an array from a framework's tensor, in the order in which this is tried.
WAYS_OUT: tuple[Callable[[Any], Any], ...] = (
    lambda tensor: tensor.numpy(),
    lambda tensor: tensor.__array__(),
    lambda tensor: np.from_dlpack(tensor),
    lambda tensor: tensor.get(),
    lambda tensor: np.array(tensor.tolist()),
)


def as_array(tensor: Any) -> NDArray[Any]:
    """Return a tensor of any framework as an array, bfloat16 as float32. Raises NpgptError for anything else."""
    kind = type(tensor).__name__
    title = f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"
    if hasattr(tensor, "detach"):
        try:
            tensor = tensor.detach().cpu()
            return np.asarray((tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy())
        except Exception as error:  # sparse, quantised, or on the meta device
            raise NpgptError(f"{title} cannot be read as an array: {raised(error)}") from error
    if is_masked(tensor):
        raise NpgptError("a masked array has numbers without meaning: fill it, or give attention_mask=")
    if _holds_arrays(tensor):
        return np.stack([as_array(item) for item in tensor])
    foreign = hasattr(tensor, "shape") and not isinstance(tensor, (np.ndarray, np.generic))
    for way in WAYS_OUT if foreign else (np.asarray,):
        try:
            array = np.asarray(way(tensor))
        except Exception:  # of any kind, since the type is foreign; for lists, rows of different lengths
            continue
        if array.dtype != object:
            return array.astype(np.float32) if array.dtype.name == "bfloat16" else array  # JAX's
    if foreign:
        raise NpgptError(f"{title} cannot be read as an array: pass its .numpy()")
    raise NpgptError(f"{title} is not an array of numbers: give logits [V], [T, V] or [B, T, V]")


def logits_of(output: Any, vocab_size: int | None = None) -> NDArray[Any]:
    """Return the logits from whatever a model returns.

    These are a tensor itself, the field "logits" of an object or dict, or else the first array in a tuple, dict or
    dataclass whose last axis is vocab_size long (or, except in a dict, with two axes). Raises NpgptError if none is.
    """
    if output is None:
        raise NpgptError("it returns None: is a return statement missing?")
    if getattr(output, "logits", None) is not None:
        return as_array(output.logits)
    if isinstance(output, Mapping):
        fields = {str(name): value for name, value in output.items()}
        if "logits" in fields:
            return as_array(fields["logits"])
    elif isinstance(output, (tuple, list)) and len({_shape(item) for item in output}) > (len(output) > 1):
        fields = {f"[{place}]": item for place, item in enumerate(output)}
    elif hasattr(output, "__dict__") and not hasattr(output, "shape"):
        fields = vars(output)
    else:
        return as_array(output)
    shapes = {name: _shape(item) for name, item in fields.items()}
    wide = [name for name, shape in shapes.items() if shape[-1:] == (vocab_size,)]
    if not wide and not isinstance(output, Mapping):
        wide = [name for name, shape in shapes.items() if len(shape) >= 2]
    if not wide:
        raise NpgptError(f"there are no logits in its output ({', '.join(fields) or 'empty'}): is the head missing?")
    return as_array(fields[wide[0]])


def named(theirs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Return arrays by name. For transformers' outputs, split tuples into their items and drop what is not a stage."""
    found: dict[str, NDArray[Any]] = {}
    for name, value in theirs.items():
        if _holds_arrays(value):
            found |= {f"{name}.{place}": as_array(item) for place, item in enumerate(value)}
        elif value is not None and name not in NO_STAGES:
            found[name] = as_array(value)
    return found


def _holds_arrays(value: Any) -> bool:
    """Return whether a value is a tuple or list that contains an array of any framework."""
    return isinstance(value, (tuple, list)) and any(hasattr(item, "shape") for item in value)


def _shape(item: Any, depth: int = 0) -> tuple[int, ...]:
    """Return the shape of an array or of nested lists, up to a depth limit, and () for anything else."""
    if isinstance(item, list) and item and depth < LONGEST_SHAPE:
        return len(item), *_shape(item[0], depth + 1)
    return tuple(getattr(item, "shape", ()))


def raised(error: Exception) -> str:
    """Return an exception as one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.200}" if text else type(error).__name__
