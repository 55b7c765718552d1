"""Atomic writes: a file or a folder appears complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import NpgptError
from .files import naming, not_an_input


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file beside path; on success sync it and rename it to path, on failure remove it.

    An interrupted write leaves the old file unchanged. Raises NpgptError if path is a device or another special file,
    which the rename would replace, or if this run reads path. An OSError names path, not the temporary file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise NpgptError(f"{path} is not a regular file: choose another path for the output")
    not_an_input(path, str(path))
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    sync_folder(path.parent)


def check_new(path: Path) -> None:
    """Raise NpgptError if a path exists and is not an empty folder, or is the current one, which nothing replaces."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise NpgptError(f"{path} exists and is not an empty folder: choose another place for the output")
    if path.resolve() == Path.cwd():
        raise NpgptError(f"{path} is the current folder, and the output is a folder of its own: give it a name")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside path; on success rename it to path, on failure remove it.

    Raises NpgptError if path exists and is not an empty folder. An OSError names path, not the temporary folder.
    """
    check_new(path)
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        temporary.mkdir()
        yield temporary
        temporary.rename(path)  # replaces an empty folder only
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno and str(error.filename or temporary).startswith(str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync the folder so that a rename in it survives a crash; does nothing on systems other than POSIX."""
    if os.name == "posix":
        with naming(folder):
            opened = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(opened)
            finally:
                os.close(opened)
