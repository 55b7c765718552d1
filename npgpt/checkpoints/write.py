"""The one converted form: model.safetensors, config.json and a vocabulary in a folder, which appears whole or not."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..config import Config
from ..errors import NpgptError
from ..parameters import Shape
from . import configs, safetensors
from .atomic import sync_folder, writing
from .formats import WEIGHTS_FILE
from .open import CONFIG_FILES, Checkpoint
from .tensor import cast, row_blocks

CONFIG_FILE = CONFIG_FILES[0]
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


def check_destination(folder: Path, source: Path | None, replaceable: Set[str] | None = None) -> None:
    """Raises NpgptError where a folder cannot be written: it is no folder, the source's own, the current one or a mount
    point, or it holds anything; where replaceable names the files that may be replaced, anything else.
    """
    real = Path(os.path.realpath(folder))
    if Path.cwd().is_relative_to(real) or os.path.ismount(real):
        raise NpgptError(f"{folder} is the current folder, one above it, or a mount point: choose a new one in it")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        raise NpgptError(f"{folder} cannot be a folder: {above} is a file")
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise NpgptError(f"{folder} is there and not a folder: choose another name")
    if source is not None and real in (source.absolute().parent.resolve(), source.resolve().parent):
        raise NpgptError(f"{folder} holds the source, {source.name}: convert into another folder")
    _check_contents(folder, folder, replaceable)


def _check_contents(folder: Path, shown: Path, replaceable: Set[str] | None) -> None:
    """Raises NpgptError where the folder, which errors call shown, holds what must not be lost."""
    held = sorted(folder.iterdir())
    if not held:
        return
    if replaceable is None:
        raise NpgptError(f"{shown} is there and not an empty folder: choose a new one, or overwrite it (--overwrite)")
    others = [path.name for path in held if path.name not in replaceable or not path.is_file()]
    if others or not (folder / WEIGHTS_FILE).is_file():
        what = f"holds {others[0]}, which" if others else f"has no {WEIGHTS_FILE}, and so"
        raise NpgptError(f"{shown} {what} is no part of a converted model: it is not overwritten")


def write_folder(
    folder: Path,
    config: Config,
    ids: Mapping[str, int | None],
    vocabulary: Mapping[str, bytes],
    layout: Mapping[str, tuple[str, Shape]],
    parts: safetensors.Parts,
    replaceable: Set[str] | None = None,
) -> None:
    """Write a folder that loads here and in transformers, in place of one that is empty or may be replaced.

    ids: of bos, eos and pad, for config.json; vocabulary: files by name; layout, parts: as safetensors.write_parts;
    replaceable: as check_destination. The folder is written beside its place and renamed; what was there is removed
    last. Raises NpgptError where something came into the folder meanwhile, OSError where it cannot be written.
    """
    shown, folder = folder, Path(os.path.realpath(folder))  # of a link, the folder that it leads to
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = os.urandom(4).hex()
    unfinished, old = (folder.with_name(f".{folder.name}.{mark}.{kind}") for kind in ("part", "old"))
    try:
        unfinished.mkdir()
        for name, content in vocabulary.items():
            with writing(unfinished / name) as copy:
                copy.write(content)
        with writing(unfinished / CONFIG_FILE) as stated:
            stated.write(json.dumps({**configs.to_dict(config), **ids}, indent=2).encode() + b"\n")
        safetensors.write_parts(unfinished / WEIGHTS_FILE, layout, parts)
        if folder.is_dir():
            folder.rename(old)  # and only then looked into: nothing can come into it any more by its name
            _check_contents(old, shown, replaceable)
        unfinished.rename(folder)
        sync_folder(folder.parent)
    except BaseException as error:
        if not unfinished.exists():  # it has been renamed already
            _remove(old)
        elif old.is_dir() and not folder.exists():
            old.rename(folder)  # and where something else took its place, it stays beside it
        shutil.rmtree(unfinished, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # of those that others use by now
                parent.rmdir()
        if isinstance(error, OSError) and error.errno and not error.filename:  # a full disk names nothing
            raise OSError(error.errno, error.strerror, str(shown)) from None
        raise
    _remove(old)


def _remove(folder: Path) -> None:
    """Remove it, and if interrupted remove it all the same."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
