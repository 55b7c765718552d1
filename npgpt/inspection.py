"""What can be said of a checkpoint without running it."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import parameters
from .config import Config
from .finding import find
from .loading import open_checkpoint


@dataclass(frozen=True)
class Inspection:
    """The findings; sizes in bytes, counts in parameters."""

    name: str
    path: Path
    size: int
    sha256: str
    config: Config
    published_name: str | None
    unknown_keys: list[str]  # keys of config.json that nobody knows
    counts: dict[str, int]  # parameters by part, see parameters.count
    dtypes: dict[str, int]  # how many tensors there are of each
    misaligned: list[str]  # tensors that are copied at load
    non_finite: dict[str, tuple[int, int]]  # name -> how many NaN, how many infinite
    vocabulary: str  # the files it comes from, or the reason why there is none


def inspect(model: str | os.PathLike[str] | None = None, *, n_head: int | None = None) -> Inspection:
    """Read a whole checkpoint, tensor by tensor, and report on it. Raises NpgptError as loading does."""
    location = find(model)
    checkpoint = open_checkpoint(location, n_head=n_head)
    file, config = checkpoint.file, checkpoint.config
    vocabulary = checkpoint.vocabulary()
    used = set(checkpoint.names.values())
    non_finite = {name: _non_finite(file.load(stored, "float64")) for name, stored in checkpoint.names.items()}
    return Inspection(
        name=location.name,
        path=location.weights,
        size=location.weights.stat().st_size,
        sha256=_sha256(location.weights),
        config=config,
        published_name=config.published_name(),
        unknown_keys=checkpoint.unknown_keys,
        counts=parameters.count(config),
        dtypes=dict(Counter(file.tensors[stored].dtype for stored in checkpoint.names.values())),
        misaligned=[name for name in file.misaligned() if name in used],
        non_finite={name: counts for name, counts in non_finite.items() if any(counts)},
        vocabulary=vocabulary if isinstance(vocabulary, str) else vocabulary.source,
    )


def _non_finite(array: parameters.Array) -> tuple[int, int]:
    return int(np.isnan(array).sum()), int(np.isinf(array).sum())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
