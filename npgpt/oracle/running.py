"""Running a part of somebody's GPT-2 in whichever kind of input it takes: arrays, tensors, lists, rows, numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import NpgptError
from ..parameters import Array
from . import modules, outputs
from .check import computed_in


@dataclass(frozen=True)
class Ran:
    """What a part gave in float64, for which input, the dtype in which it seems to compute, and how it was called."""

    output: Array
    x: Array
    dtype: str
    notes: list[str]


def run(part: str, theirs: Any, x: Array, width: int, counts: Sequence[int], dtype: str | None) -> Ran:
    """Run theirs on so many tokens, fewer where it raises, in the first kind of input that it takes.

    Raises NpgptError where it raises with all of them, and where what it gives has another shape.
    """
    failed: list[str] = []
    misshapen = ""
    for count in counts:
        some = np.ascontiguousarray(x[:, np.linspace(0, x.shape[1] - 1, count).astype(int)])
        for kind, called in _ways(part, theirs, dtype).items():
            try:
                found = called(some)
            except Exception as error:  # of any kind, since it is foreign
                failed.append(outputs.raised(error))
                continue
            if found.shape == (*some.shape[:2], width):
                judged = modules.dtype_of(theirs) if _parameter(theirs) is not None else computed_in(found)
                fewer = f" {count} tokens in" if count < counts[0] else ""
                note = f"It was given{fewer} {kind}: otherwise it raises {failed[0]}." if failed else ""
                return Ran(found.astype(np.float64), some, judged, [note] if note else [])
            expected = [*some.shape[:2], width]
            misshapen = misshapen or f"{list(found.shape)} for an input of {list(some.shape)}: it must be {expected}"
    raise NpgptError(f"{part} gives {misshapen}" if misshapen else f"{part} raises {failed[0]}")


def _ways(part: str, theirs: Any, dtype: str | None) -> dict[str, Callable[[Array], NDArray[Any]]]:
    """How a part can be called, by the kind of its input, the usual one first: x [B, T, C] → [B, T, C]."""
    kinds: dict[str, Callable[[Array], Any]] = {}
    torch, exact = sys.modules.get("torch"), "float32" if dtype not in (None, "float64") else "float64"
    if (parameter := _parameter(theirs)) is not None:
        kinds["a tensor"] = lambda x: parameter.detach().double().new_tensor(x.tolist()).to(parameter.dtype)
    elif modules.is_module(theirs):  # such as a GELU: no tensor to make one by
        kinds["a tensor"] = lambda x: _tensor(x, "float32")
    else:
        kinds["a NumPy array"] = lambda x: x.astype(exact)
        kinds["a NumPy array of float32"] = lambda x: x.astype(np.float32)
        if torch is not None:
            kinds |= {f"a torch tensor of {exact}": lambda x: _tensor(x, exact)}
            kinds |= {"a torch tensor of float32": lambda x: _tensor(x, "float32")}
        kinds["lists"] = lambda x: x.astype(exact).tolist()
    forward = getattr(theirs, "forward", theirs)

    def call(given: Any) -> NDArray[Any]:
        output = outputs.invoke(theirs, given, forward)
        return outputs.as_array(output[0] if isinstance(output, tuple) else output)

    def whole(convert: Callable[[Array], Any]) -> Callable[[Array], NDArray[Any]]:
        return lambda x: call(convert(x))

    def by_rows(convert: Callable[[Array], Any]) -> Callable[[Array], NDArray[Any]]:
        return lambda x: np.stack([call(convert(row)) for row in x])

    ways = {kind: whole(convert) for kind, convert in kinds.items()}
    ways |= {f"{kind} of [T, C], row by row": by_rows(convert) for kind, convert in kinds.items()}
    if part == "gelu":
        ways["one number after another"] = lambda x: np.array([theirs(float(n)) for n in x.ravel()]).reshape(x.shape)
    return ways


def _parameter(theirs: Any) -> Any:
    """The first parameter of a module, None where there is none."""
    return next(iter(theirs.parameters()), None) if modules.is_module(theirs) else None


def _tensor(x: Array, dtype: str) -> Any:
    torch = sys.modules["torch"]
    return torch.tensor(x.tolist(), dtype=getattr(torch, dtype))
