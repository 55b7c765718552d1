"""The targets of a check: the id that should follow each token, of which the loss is the mean cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..config import Config
from ..errors import NpgptError, numbers
from ..gradients import target_rows
from .backward import IGNORED
from .outputs import raised
from .running import Ids


def targets_of(stated: ArrayLike | None, gradients: bool, ids: Ids, config: Config) -> Ids | None:
    """Return targets [B, T]: as stated, or the next tokens for gradients=True, or None.

    Raises NpgptError for targets that do not fit the ids or are all ignored.
    """
    if stated is None:
        return target_rows(config, ids, None, IGNORED) if gradients else None
    found = numbers("targets", stated)
    if (found == -1).any():
        raise NpgptError(f"targets have -1, which is no id: where nothing is to be predicted, give {IGNORED}")
    return target_rows(config, ids, found, IGNORED)


def agreed(stated: ArrayLike | None, held: ArrayLike | None, source: object) -> ArrayLike | None:
    """Return the targets that are stated or that another implementation's numbers hold. Raises NpgptError if the two
    differ.
    """
    if stated is None or held is None:
        return held if stated is None else stated
    if numbers("targets", stated).reshape(-1).tolist() != numbers("targets", held).reshape(-1).tolist():
        raise NpgptError(f"{source} has other targets than those that are given beside it (targets=, --targets)")
    return stated


def answer(step: Callable[..., Any], ids: Ids, targets: Ids) -> Any:
    """Return what a function from ids and targets [B, T] returns. Raises NpgptError if it raises."""
    try:
        return step(ids.astype(np.int64), targets.astype(np.int64))
    except Exception as error:
        name = str(getattr(step, "__qualname__", type(step).__name__)).rpartition("<locals>.")[2]
        raise NpgptError(f"{name}(ids, targets), called with NumPy arrays of int64, raises {raised(error)}") from error
