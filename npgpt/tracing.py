"""Trace a run: its intermediates by name, in memory or in files, for comparing another implementation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import __version__
from .checkpoints import configs, raw, safetensors
from .checkpoints.atomic import writing
from .checkpoints.inspect import sha256
from .errors import NpgptError, checked
from .language_model import LanguageModel, opened
from .parameters import Array


@checked
def trace(
    text: str | ArrayLike,
    model: LanguageModel | str | os.PathLike[str] | None = None,
    *,
    only: Sequence[str] = (),
    special: bool = False,
) -> dict[str, Array]:
    """Return the intermediates of a text, or of ids [T], by name in the order of computation, with B = 1 in front.

    model: a model, or its name or path; None is the embedded one. only: shell patterns such as logits or h.0.*; without
    any, all intermediates are returned. special: encode <|endoftext|> and the like as special tokens. A classifier's
    body has no logits. Raises NpgptError for a pattern that matches no name, and for a text or ids that do not fit the
    model.
    """
    model = opened(model)
    token_ids, only = model.text_ids(text, special=special), tuple(only)
    found: dict[str, Array] = {}
    names: list[str] = []

    def record(name: str, array: Array) -> None:
        if name == "logits" and model.no_logits:  # products with wte, which is not this model's head
            return
        names.append(name)
        if not only or any(fnmatchcase(name, pattern) for pattern in only):
            found[name] = array

    model(token_ids, record=record)
    for pattern in only:
        if model.no_logits and fnmatchcase("logits", pattern) and not found:
            raise NpgptError(f"{model.name} gives no logits: {model.no_logits}")
        if not any(fnmatchcase(name, pattern) for name in names):
            known = ", ".join(name for name in names if not name.startswith("h.") or name.startswith("h.0"))
            raise NpgptError(f"no intermediate is called {pattern!r:.80}; for the first block they are {known}")
    return found


def metadata(model: LanguageModel, token_ids: Sequence[int], text: str | None) -> dict[str, Any]:
    """Return the origin of the numbers: npgpt's version, the model, the sha256 of its weights, the text and ids."""
    return {
        "npgpt": __version__,
        "model": model.name,
        "weights": {path.name: sha256(path) for path in model.files},
        "config": configs.to_dict(model.config),
        "dtype": str(model.parameters.wte.weight.dtype),
        "text": text,
        "token_ids": list(token_ids),
    }


def write(path: Path, stages: Mapping[str, Array], about: Mapping[str, Any], form: str | None = None) -> None:
    """Write stages, ids and metadata whole or not at all: to a file by its suffix, or to a folder in a form of FOLDERS.

    Raises NpgptError for an unknown suffix and for the file of the model's own weights, OSError if it cannot be
    written.
    """
    if path.is_file() and sha256(path) in about["weights"].values():
        raise NpgptError(f"{path} holds the model's own weights: write the intermediates to another file")
    writer = FOLDERS[form] if form else FILES[suffix(path)]
    writer(path, {"token_ids": np.array([about["token_ids"]], np.int64), **stages}, about)


def suffix(path: Path) -> str:
    """Return a path's suffix. Raises NpgptError unless it is .npz or .safetensors."""
    if path.suffix not in FILES:
        raise NpgptError(f"{path} must end in .npz or .safetensors, or give --to raw {path} for a folder of numbers")
    return path.suffix


def _write_npz(path: Path, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> None:
    """Write .npz with the metadata as JSON in UTF-8 bytes, because not every reader of .npz supports text."""
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    with writing(path) as file:
        np.savez(file, metadata=text, **arrays)  # type: ignore[arg-type]  # to NumPy 2.0 allow_pickle is an array


def _write_safetensors(path: Path, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> None:
    """Write safetensors; a value of the metadata that is not a text is stored as JSON."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    safetensors.write(path, arrays, texts)


Writer: TypeAlias = Callable[[Path, Mapping[str, NDArray[Any]], Mapping[str, Any]], None]
FILES: dict[str, Writer] = {".npz": _write_npz, ".safetensors": _write_safetensors}
FOLDERS: dict[str, Writer] = {"raw": raw.write}
