"""Texts named on the command line: files, pipes and standard input. They are checked at once and read in parts."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import IO

from ..errors import NpgptError
from .options import open_file, text_parts


@dataclass
class Input:
    """A text: its name, its size in bytes if known, and the sha256 of its UTF-8 once it has been read."""

    name: str
    size: int | None
    kept: IO[bytes] | None = None  # a copy of a pipe's content that is read more than once
    sha256: str = ""
    ids: list[int] | None = None  # in place of a text

    def parts(self) -> Iterator[str]:
        """Yield the text in parts; a second time only if it is a file or kept.

        Raises NpgptError if it is not UTF-8, OSError as open and read do.
        """
        digest = hashlib.sha256()
        if self.kept:
            self.kept.seek(0)
        with nullcontext(self.kept) if self.kept else open_file(self.name) as file:
            for part in text_parts(file, self.name, say=not self.sha256):
                digest.update(part.encode())
                yield part
        self.sha256 = digest.hexdigest()


def inputs(names: Sequence[str], again: bool) -> list[Input]:
    """Return the texts of these names. again: each will be read twice.

    Raises NpgptError or OSError at once for a file that is missing, empty or unreadable, and for standard input named
    twice.
    """
    if names.count("-") > 1:
        raise NpgptError("- is standard input, which can be read only once: name it once")
    found = [Input(name, _size(name)) for name in names]
    for text in found:
        if again and text.size is None:
            text.kept = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the text
            with open_file(text.name) as file:
                shutil.copyfileobj(file, text.kept)
            text.size = text.kept.tell()
    return found


def of_ids(name: str, ids: list[int]) -> Input:
    """Return a text given as ids; its sha256 is that of the numbers joined by commas."""
    return Input(name, None, sha256=hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest(), ids=ids)


def _size(name: str) -> int | None:
    """Return a file's size, or None for standard input, a pipe and the like. Raises NpgptError for an empty file."""
    if name == "-":
        if sys.stdin is None:
            raise NpgptError("standard input is closed")
        return None
    if name:
        status = os.stat(os.path.expanduser(name))
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            return None
    with open_file(name) as file:
        if not file.read(1):
            raise NpgptError(f"{name} is empty: there is nothing to score")
    return status.st_size
