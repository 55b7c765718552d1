"""The one converted form: model.safetensors, config.json and a vocabulary in a folder, which appears whole or not."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .. import config as configuration
from ..config import Config
from ..errors import NpgptError
from ..parameters import Shape
from . import safetensors
from .atomic import writing
from .opening import CONFIG_FILES, Checkpoint
from .tensor import cast, row_blocks

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", CONFIG_FILES[0]
DTYPES = ("float32", "float16", "bfloat16")


def converted(checkpoint: Checkpoint, dtype: str) -> tuple[dict[str, tuple[str, Shape]], safetensors.Parts]:
    """What write_folder wants of a checkpoint: its tensors' layout, and their contents by blocks of rows.

    Raises NpgptError for another dtype than DTYPES, and while streaming for a finite value that is too large for it.
    """
    if dtype not in DTYPES:
        raise NpgptError(f"written are {', '.join(DTYPES)}, not {dtype!r:.80}")
    layout = {name: (dtype, shape) for name, shape in checkpoint.shapes.items()}

    def parts(name: str) -> Iterator[NDArray[Any]]:
        stored, stored_dtype = checkpoint.stored(name)
        for rows in row_blocks(stored):
            yield cast(rows, stored_dtype, dtype, f"{checkpoint.path}: {checkpoint.stored_name(name)}")

    return layout, parts


def with_progress(parts: safetensors.Parts, total: int, progress: Callable[[int, int], None]) -> safetensors.Parts:
    """The same parts, with progress(bytes so far, total) called as they go."""
    done = 0

    def watched(name: str) -> Iterator[NDArray[Any]]:
        nonlocal done
        for part in parts(name):
            yield part
            done += part.nbytes
            progress(done, total)

    return watched


def check_destination(
    folder: Path, source: Path | None, *, overwrite: bool, replaceable: Set[str] = frozenset()
) -> None:
    """Raises NpgptError where a folder cannot be written: it holds anything and overwrite is not given, it holds files
    other than the replaceable ones, it is the source's own, or it is no folder.
    """
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        raise NpgptError(f"{folder} cannot be a folder: {above} is a file")
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise NpgptError(f"{folder} is there and not a folder: choose another name")
    held = sorted(path.name for path in folder.iterdir())
    if held and not overwrite:
        raise NpgptError(f"{folder} is there and not an empty folder: choose a new one, or overwrite it (--overwrite)")
    if source is not None and source.parent.resolve() == folder.resolve():
        raise NpgptError(f"{folder} holds the source, {source.name}: convert into another folder")
    if others := [name for name in held if name not in replaceable]:
        raise NpgptError(f"{folder} holds {others[0]}, which is no part of a converted model: it is not overwritten")


def write_folder(
    folder: Path,
    config: Config,
    ids: Mapping[str, int | None],
    vocabulary: Mapping[str, bytes],
    layout: Mapping[str, tuple[str, Shape]],
    parts: safetensors.Parts,
) -> None:
    """Write a folder that loads here and in transformers, in place of the one that is there, if any.

    ids: of bos, eos and pad, for config.json; vocabulary: files by name; layout, parts: as safetensors.write_parts.
    The folder is written beside its place and renamed; what was there is removed last. Raises OSError where it cannot
    be written.
    """
    folder = folder.resolve()  # of a link, the folder that it leads to
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    unfinished, old = (folder.with_name(f".{folder.name}.{mark}.{kind}") for kind in ("part", "old"))
    unfinished.mkdir()
    try:
        for name, content in vocabulary.items():
            with writing(unfinished / name) as copy:
                copy.write(content)
        with writing(unfinished / CONFIG_FILE) as stated:
            stated.write(json.dumps({**configuration.to_dict(config), **ids}, indent=2).encode() + b"\n")
        safetensors.write_parts(unfinished / WEIGHTS_FILE, layout, parts)
        if folder.is_dir():
            folder.rename(old)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        if old.is_dir() and not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
