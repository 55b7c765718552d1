"""Report on a checkpoint without running it."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import parameters
from ..config import Config
from ..errors import NpgptError
from ..text.vocabularies import tokenizer_of
from .find import find
from .open import open_checkpoint


@dataclass(frozen=True)
class Inspection:
    """What is known about a checkpoint; sizes are in bytes, counts in parameters."""

    name: str
    path: Path
    description: str  # its format and naming scheme
    files: dict[Path, tuple[int, str]]  # size and sha256 of each
    config: Config
    published_name: str | None
    unknown_keys: list[str]  # keys of config.json that npgpt does not know
    counts: dict[str, int]  # parameters by part, see parameters.count
    dtypes: dict[str, int]  # number of tensors of each
    misaligned: list[str]  # tensors that are copied when they are loaded
    non_finite: dict[str, tuple[int, int]]  # numbers of NaN and of infinite values by tensor
    vocabulary: str  # its files, or the reason why there is none
    unchecked: str | None  # the checksums that are not checked, see Contents


def inspect(model: str | os.PathLike[str] | None = None, *, n_head: int | None = None) -> Inspection:
    """Read a whole checkpoint, tensor by tensor, and report on it. Raises NpgptError as loading does."""
    location = find(model)
    checkpoint = open_checkpoint(location.weights, n_head=n_head)
    config = checkpoint.config
    try:
        vocabulary = tokenizer_of(checkpoint).source
    except NpgptError as reason:
        vocabulary = str(reason)
    used = {part: checkpoint.tensors[part] for source in checkpoint.sources.values() for part in source.parts}
    merged = {part for name in checkpoint.updates for part in checkpoint.sources[name].parts}
    non_finite = {name: _non_finite(checkpoint.load(name, "float64")) for name in checkpoint.sources}
    return Inspection(
        name=location.name,
        path=location.weights,
        description=checkpoint.description,
        files={path: (path.stat().st_size, sha256(path)) for path in checkpoint.contents.files},
        config=config,
        published_name=config.published_name(),
        unknown_keys=checkpoint.unknown_keys,
        counts=parameters.count(config),
        dtypes=dict(Counter(f"{tensor.dtype}{' + LoRA' * (part in merged)}" for part, tensor in used.items())),
        misaligned=[tensor.name for tensor in used.values() if tensor.misaligned],
        non_finite={name: counts for name, counts in non_finite.items() if any(counts)},
        vocabulary=vocabulary,
        unchecked=checkpoint.contents.unchecked,
    )


def sha256(path: Path) -> str:
    """Return a file's digest, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _non_finite(array: parameters.Array) -> tuple[int, int]:
    return int(np.isnan(array).sum()), int(np.isinf(array).sum())
