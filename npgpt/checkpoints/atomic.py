"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import NpgptError
from .files import naming, not_an_input


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file in path's own folder; on success sync and rename it to path, else remove it.

    An interrupted write leaves the old file as it was. Raises NpgptError where path is a device or the like, which a
    rename would replace, and where this run reads it; OSError as open, write and rename do, for path's name.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise NpgptError(f"{path} is no regular file, and would be replaced by one")
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


def sync_folder(folder: Path) -> None:
    """Let a rename in the folder survive a crash. Only POSIX has that."""
    if os.name == "posix":
        with naming(folder):
            opened = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(opened)
            finally:
                os.close(opened)
