"""Compute in another dtype. float16 and bfloat16, slow or missing in NumPy, are rounded after every operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import NpgptError
from ..parameters import Array
from .derivative import Traced

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # largest relative rounding
SAMPLED = 4096  # numbers that are checked first
FEW = 8  # fewer different numbers than this do not reveal a dtype


def rounded(x: Array, dtype: str) -> Array:
    """Return x rounded to dtype, to nearest with ties to even. float16 and bfloat16 values are returned as float32."""
    with np.errstate(over="ignore", invalid="ignore"):  # out of range becomes infinite, as in that dtype
        if dtype == "float16":
            return x.astype(np.float16).astype(np.float32)
        if dtype != "bfloat16":
            return x.astype(dtype)
        single = np.asarray(x, np.float32)
        bits = single.view(np.uint32)
        up = ((bits >> 16) & 1) + 0x7FFF
        return np.where(np.isfinite(single), ((bits + up) & 0xFFFF0000).astype(np.uint32).view(np.float32), single)


def known_dtype(dtype: str) -> None:
    """Raise NpgptError unless dtype is one that other programs may compute in."""
    if dtype not in UNIT:
        raise NpgptError(f"their dtype must be one of {', '.join(UNIT)}, not {dtype}")


def computed_in(x: NDArray[Any]) -> str:
    """Return the coarsest dtype that represents all numbers: float16 and bfloat16 are often stored upcast."""
    stored = str(x.dtype) if str(x.dtype) in UNIT else "float32"
    parts = (x.reshape(-1)[:SAMPLED], x)  # the first numbers nearly always suffice
    if x.dtype.kind != "f" or all(len(np.unique(part[np.isfinite(part)])) < FEW for part in parts):
        return stored
    coarser = (dtype for dtype in ("bfloat16", "float16", "float32") if UNIT[dtype] > UNIT[stored])
    return next((d for d in coarser if all(np.array_equal(rounded(y, d), y, equal_nan=True) for y in parts)), stored)


class Rounded(np.ndarray[Any, np.dtype[np.float32]]):
    """float32 values whose operations return rounded results; a matrix product is rounded once, at its end, as on
    hardware that accumulates in float32.
    """

    kind = "float32"

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        plain = [x.view(np.ndarray) if isinstance(x, Rounded) else x for x in inputs]
        into = None if out is None else tuple(x.view(np.ndarray) if isinstance(x, Rounded) else x for x in out)
        result = getattr(ufunc, method)(*plain, **options, **({} if into is None else {"out": into}))
        if isinstance(result, tuple) or np.asarray(result).dtype.kind != "f":
            return result
        exact = rounded(np.asarray(result), self.kind)
        if into is not None:
            into[0][...] = exact
            return out[0]
        return exact.view(type(self))


class Float16(Rounded):
    """IEEE half precision."""

    kind = "float16"


class BFloat16(Rounded):
    """The upper half of a float32."""

    kind = "bfloat16"


ROUNDED: dict[str, type[Rounded]] = {"float16": Float16, "bfloat16": BFloat16}


def as_computed(x: Array, dtype: str) -> Array:
    """Return x rounded to dtype, as an array with which NumPy computes in dtype."""
    return rounded(x, dtype).view(ROUNDED[dtype]) if dtype in ROUNDED else np.asarray(x).astype(dtype, copy=False)


def once(function: Callable[[Array], Array], x: Array) -> Array:
    """Return function(x) computed as one operation, rounded only at its end. The only one that is traced is erf."""
    if isinstance(x, Traced):
        return x.erf(function)
    return as_computed(function(x.view(np.ndarray)), x.kind) if isinstance(x, Rounded) else function(x)


def plain(x: Any) -> NDArray[np.float64]:
    """Return any array as a plain float64 array, itself if it is one."""
    return np.asarray(x).view(np.ndarray).astype(np.float64, copy=False)
