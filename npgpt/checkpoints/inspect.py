"""Report on a checkpoint without running the model."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .. import parameters
from ..config import Config
from ..errors import NpgptError, checked, printable, reason
from ..text.tokenizer import Tokenizer, quoted
from ..text.vocabularies import tokenizer_of
from .files import reading
from .find import find
from .open import open_checkpoint


@dataclass(frozen=True)
class Inspection:
    """A report on a checkpoint; sizes are in bytes, counts in parameters."""

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
    non_finite: dict[str, tuple[int, int]]  # by tensor, how many values are NaN and how many infinite
    vocabulary: str  # its files, or why the model has none
    begin: str  # the id before a text, and the file that states it
    ends: str  # the ids that end a text, and the file that states them
    unused: tuple[str, ...]  # settings for generation in the files that npgpt does not use
    notes: tuple[str, ...]  # what was left out or guessed
    guesses_gelu: bool
    unchecked: str | None  # the checksums that were not verified, see Contents

    def __repr__(self) -> str:
        parameters = f"GPT-2 of {sum(self.counts.values()):,} parameters"
        return printable(f"Inspection({self.name!r}: {parameters}, {self.description}; {self.path})")

    def to_json(self) -> str:
        """Return everything as one JSON object: sizes in bytes, counts in parameters, digests in hexadecimal."""
        found = asdict(self) | {
            "path": str(self.path),
            "parameters": sum(self.counts.values()),
            "head_width": self.config.head_width,
            "files": [{"path": str(file), "bytes": size, "sha256": sum_} for file, (size, sum_) in self.files.items()],
            "non_finite": {name: {"nan": nan, "infinite": inf} for name, (nan, inf) in self.non_finite.items()},
        }
        return json.dumps(found)


@checked
def inspect(
    model: str | os.PathLike[str] | None = None, *, n_head: int | None = None, activation: str | None = None
) -> Inspection:
    """Report on a model by name or path; without one, on the embedded model. Every tensor is read once.

    n_head and activation override the checkpoint's, as in load(). Raises NpgptError as load() does.
    """
    location = find(model)
    checkpoint = open_checkpoint(location.weights, n_head=n_head, activation=activation)
    config = checkpoint.config
    tokenizer, ends = None, checkpoint.ends
    try:
        tokenizer = tokenizer_of(checkpoint)
        vocabulary = tokenizer.source
    except NpgptError as error:
        vocabulary = str(error)
    whole = ends.completed(tokenizer.end_of_text if tokenizer else None)
    begin = () if whole.bos is None else (whole.bos,)
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
        begin=_named(begin, tokenizer, vocabulary if ends.bos is None else ends.sources.get("bos_token_id", "")),
        ends=_named(whole.eos, tokenizer, ends.sources.get("eos_token_id", "") if ends.eos else vocabulary),
        unused=ends.notes,
        notes=checkpoint.notes,
        guesses_gelu=checkpoint.guesses_gelu,
        unchecked=checkpoint.contents.unchecked,
    )


@dataclass(frozen=True)
class Listed:
    """A model of this machine in brief: its weights file, bytes of all weights, and why it cannot be read, if so."""

    name: str
    path: str | None = None
    bytes: int | None = None
    parameters: int | None = None
    error: str | None = None


def listed(name: str) -> Listed:
    """Return a model in brief. No tensor is read, and a fault is an entry in place of an exception."""
    path = None
    try:
        path = str(find(name).weights)
        checkpoint = open_checkpoint(Path(path))
        size = sum(file.stat().st_size for file in checkpoint.contents.files)
        return Listed(name, path, size, sum(parameters.count(checkpoint.config).values()))
    except NpgptError as error:
        return Listed(name, path, error=str(error))
    except OSError as error:
        return Listed(name, path, error=reason(error))


def _named(token_ids: Sequence[int], tokenizer: Tokenizer | None, source: str) -> str:
    """Return ids with their text, if they have any, and the file that states them."""
    named = [
        f"{one} {quoted(tokenizer.piece(one))}" if tokenizer and tokenizer.has_text(one) else f"{one}"
        for one in token_ids
    ]
    return f"{', '.join(named)} ({source})" if named else "at no id"


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    return digest(path, hashlib.sha256())


def digest(path: Path, hasher: hashlib._Hash) -> str:
    """Return the hasher's digest of a file's contents in hexadecimal."""
    with reading(path) as file:
        while chunk := file.read(2**20):
            hasher.update(chunk)
    return hasher.hexdigest()


def _non_finite(array: parameters.Array) -> tuple[int, int]:
    """Return how many values are NaN and how many are infinite."""
    return int(np.isnan(array).sum()), int(np.isinf(array).sum())
