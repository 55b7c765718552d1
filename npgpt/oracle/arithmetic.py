"""Computing in another dtype: float16 and bfloat16 rounded after every operation, which NumPy has not, or not fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..parameters import Array

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # largest relative rounding


def rounded(x: Array, dtype: str) -> Array:
    """x rounded to dtype, to nearest and ties to even; float16 and bfloat16 values are given as float32."""
    with np.errstate(over="ignore", invalid="ignore"):  # beyond its range is infinite, as in that dtype
        if dtype == "float16":
            return x.astype(np.float16).astype(np.float32)
        if dtype != "bfloat16":
            return x.astype(dtype)
        single = np.asarray(x, np.float32)
        bits = single.view(np.uint32)
        up = ((bits >> 16) & 1) + 0x7FFF
        return np.where(np.isfinite(single), ((bits + up) & 0xFFFF0000).astype(np.uint32).view(np.float32), single)


class Rounded(np.ndarray[Any, np.dtype[np.float32]]):
    """float32 values of which every NumPy operation's result is rounded; a product's sum once, at its end, as hardware
    does that adds up in float32.
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
    """float32's upper half."""

    kind = "bfloat16"


ROUNDED: dict[str, type[Rounded]] = {"float16": Float16, "bfloat16": BFloat16}


def as_computed(x: Array, dtype: str) -> Array:
    """x rounded to dtype, as an array with which NumPy computes in dtype."""
    return rounded(x, dtype).view(ROUNDED[dtype]) if dtype in ROUNDED else np.asarray(x).astype(dtype, copy=False)


def once(function: Callable[[Array], Array], x: Array) -> Array:
    """function(x) as one operation, which is rounded at its end alone, whatever NumPy does within."""
    return as_computed(function(x.view(np.ndarray)), x.kind) if isinstance(x, Rounded) else function(x)


def plain(x: Any) -> NDArray[np.float64]:
    """Any of these as float64."""
    return np.asarray(x).view(np.ndarray).astype(np.float64)
