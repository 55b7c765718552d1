"""Conditions under which a PyTorch module, or a part of one, is run.

The module runs in evaluation mode. Parameters that hold one number throughout, as in a fresh model, get other values,
since they would hide mistakes. Flags and data are restored afterwards, even after an exception. The parameters' own
data is never written to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from .outputs import as_array

SPREAD = 0.25  # standard deviation of the values that replace one number
# Notes on dropout, and on parameters that hold one number throughout.
EVALUATED = "The module is in training mode, and {} applies dropout: it was run in evaluation mode, as after .eval()."
PERTURBED = (
    "Parameters filled with one number, as in a fresh model, hide mistakes: both models were run with other values of "
    "{}. The module has its own back (perturb=False keeps them)."
)


def evaluated(module: Any) -> list[str]:
    """Return a note on the first part whose dropout is active, or an empty list."""
    for path, part in module.named_modules():
        for name, p in vars(part).items() if getattr(part, "training", False) else ():
            is_rate = "drop" in name or (name == "p" and "Dropout" in type(part).__name__)
            if is_rate and isinstance(p, float) and 0 < p <= 1:
                return [EVALUATED.format(f"{path or 'the module'} ({type(part).__name__}, {name} = {p:g})")]
    return []


@contextmanager
def as_judged(module: Any, changed: Sequence[tuple[Any, Any]] = ()) -> Iterator[None]:
    """Put every part in evaluation mode and give each changed parameter its other data. Restore everything on exit.

    The flags are set one by one, since a module's own eval() may do more.
    """
    flags = [(part, part.training) for part in module.modules() if getattr(part, "training", False)]
    own = [(parameter, parameter.data) for parameter, _ in changed]
    try:
        for part, _ in flags:
            part.training = False
        for parameter, data in changed:
            parameter.data = data
        yield
    finally:
        for parameter, data in own:
            parameter.data = data
        for part, flag in flags:
            part.training = flag


def perturbation(module: Any, wanted: Collection[str] | None = None) -> list[tuple[str, Any, Any]]:
    """Return (name, parameter, other data) for each parameter that holds one number. The data is drawn around it.

    A shared parameter appears under each of its names, with the same data. wanted: names to look at; None for all.
    """
    rng, drawn, found = np.random.default_rng(0), {}, []
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if wanted is not None and name not in wanted:
            continue
        if id(parameter) not in drawn:
            array = as_array(parameter)
            if array.size < 2 or array.dtype.kind != "f" or (array != array.flat[0]).any():
                continue
            spread = SPREAD if array.ndim < 2 else SPREAD / np.sqrt(max(array.shape))
            values = array + spread * rng.standard_normal(array.shape)
            drawn[id(parameter)] = parameter.detach().float().new_tensor(values.tolist()).to(parameter.dtype)
        found.append((name, parameter, drawn[id(parameter)]))
    return found
