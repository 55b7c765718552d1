"""Another implementation's arrays by name: stages, a loss, gradients and the targets of these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..config import Config
from ..errors import NpgptError
from ..parameters import Array
from .files import Given
from .gradient_names import told_apart, translated
from .naming import flat
from .outputs import logits_of, named
from .running import Ids
from .targets import agreed, targets_of
from .weights import HEAD, WTE

LOSS = "loss"
NEXT = "No targets are stated: the gradients are compared with those of the next tokens (targets=, --targets)."
ONLY_FORWARD = "The loss is not compared: give its targets=, or gradients=True for the next tokens."
UNUSED = "The file's targets are not used: it has neither a loss nor gradients."
NOTHING = "targets are for a loss and gradients, but theirs has neither: give them by name, or leave targets out"


@dataclass
class Named:
    """Arrays by npgpt's names, the targets [B, T] of the loss, and the reference's configuration and tensors."""

    config: Config
    tensors: Mapping[str, Array]
    arrays: Mapping[str, NDArray[Any]]
    targets: Ids | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def by_name(
    theirs: Any, config: Config, tensors: Mapping[str, Array], ids: Ids, stated: ArrayLike | None, gradients: bool
) -> Named:
    """Return what a mapping or a file holds, or logits alone. stated, gradients: the caller's targets, see check.

    Raises NpgptError for nothing to compare, for names, shapes and targets that do not fit, and for gradients without
    targets or these without gradients.
    """
    held = theirs.stages(config) if isinstance(theirs, Given) else getattr(theirs, "cache_dict", theirs)
    if isinstance(theirs, Given) and not held:
        raise NpgptError(f"{theirs.path}: there is nothing to compare: no logits and no stage")
    if not isinstance(held, Mapping):  # TransformerLens's ActivationCache is not a dict, but has one
        if gradients or stated is not None:
            raise NpgptError(NOTHING)
        return Named(config, tensors, {"logits": logits_of(held, config.vocab_size)})
    whole = flat(held)
    source, own = ("the mapping", whole.pop("targets", None))
    if isinstance(theirs, Given):
        source, own = (str(theirs.path), theirs.targets)
    targets = agreed(stated, own, source)
    found = Named(config, tensors, {})
    mine, parameters = told_apart(whole, config, gradients or targets is not None)
    backward = [name for name in mine if name.startswith("d.")] + [*parameters]
    if backward and targets is None and isinstance(theirs, Given) and not gradients:
        gradients = True
        found.notes.append(NEXT)
    if backward and targets is None and not gradients:
        raise NpgptError(
            f"{backward[0]} is a gradient, which depends on the targets of the loss: give targets=, or gradients=True "
            "for the next tokens"
        )
    if not backward and mine.get(LOSS) is None:
        if gradients or stated is not None:
            raise NpgptError(NOTHING)
        found.notes += [UNUSED] if targets is not None else []
    else:
        found.targets = targets_of(targets, gradients, ids, config)
    if found.targets is None and mine.pop(LOSS, None) is not None:
        found.notes.append(ONLY_FORWARD)
    found.arrays, own_head = named(mine), False
    if parameters:
        of_parameters = translated(parameters, config)
        found.notes += of_parameters.notes
        found.problems += of_parameters.problems
        if twice := [name for name in of_parameters.arrays if name in found.arrays]:
            raise NpgptError(f"{twice[0]} was given twice, under two names")
        found.arrays = {**found.arrays, **of_parameters.arrays}
        own_head = HEAD in of_parameters.frozen
    if config.tie_word_embeddings and (own_head or f"d.{HEAD}" in found.arrays):
        found.config = replace(config, tie_word_embeddings=False)
        found.tensors = {**tensors, HEAD: np.array(tensors[WTE])}
    return found
