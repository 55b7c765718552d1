"""The conditions in which a PyTorch module, or a part of one, is run.

It is in evaluation mode, and has other values in parameters that one number fills, as in a fresh model, since these
hide mistakes. Neither outlasts the run: flags and the parameters' own data are put back, also after an exception, and
nothing is ever written to that data.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from .outputs import as_array

SPREAD = 0.25  # of what takes the place of one number
# Notes: on what drops out, and on which parameters one number fills.
EVALUATED = "The module is in training mode, and {} drops out: it was run in evaluation mode, as by .eval()."
PERTURBED = (
    "One number fills {}, as in a fresh model, which would hide mistakes: both models were run with other values there."
    " The module has its own back (perturb=False keeps them)."
)


def evaluated(module: Any) -> list[str]:
    """Return a note on the first part that drops out as the module stands; none where nothing does."""
    for path, part in module.named_modules():
        for name, p in vars(part).items() if getattr(part, "training", False) else ():
            is_rate = "drop" in name or (name == "p" and "Dropout" in type(part).__name__)
            if is_rate and isinstance(p, float) and 0 < p <= 1:
                return [EVALUATED.format(f"{path or 'the module'} ({type(part).__name__}, {name} = {p:g})")]
    return []


@contextmanager
def as_judged(module: Any, changed: Sequence[tuple[Any, Any]] = ()) -> Iterator[None]:
    """Within, every part is in evaluation mode, and each changed parameter has other data; then all is as it was.

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
    """Return the name of each parameter that one number fills, itself, and other data, drawn around its number.

    A parameter that stands at several places is one and comes with each of its names. wanted: names, None for all.
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
