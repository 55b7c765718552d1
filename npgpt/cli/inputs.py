"""Texts named on the command line: files, pipes and standard input, checked at once and read part by part."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import IO

from ..errors import NpgptError
from .options import open_file, text_parts


@dataclass
class Input:
    """A text: its name, its size in bytes where that is known, and the sha256 of its UTF-8 once it was read."""

    name: str
    size: int | None
    kept: IO[bytes] | None = None  # what came through a pipe and is read more than once
    sha256: str = ""
    ids: list[int] | None = None  # in place of a text

    def parts(self) -> Iterator[str]:
        """Yield the text in parts, which can be done again only where it is a file or kept.

        Raises NpgptError where it is not UTF-8, OSError as open and read do.
        """
        digest = hashlib.sha256()
        if self.kept:
            self.kept.seek(0)
        with nullcontext(self.kept) if self.kept else open_file(self.name) as file:
            for part in text_parts(file, self.name):
                digest.update(part.encode())
                yield part
        self.sha256 = digest.hexdigest()


def inputs(names: Sequence[str], again: bool) -> list[Input]:
    """Return the texts of these names; again: each will be read twice.

    Raises NpgptError or OSError at once for a file that is missing, empty or not to be opened, and for standard input
    that is named twice.
    """
    if names.count("-") > 1:
        raise NpgptError("- stands for standard input, which can be read only once: name it once")
    found = [Input(name, _size(name)) for name in names]
    for text in found:
        if again and text.size is None:
            text.kept = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the text
            with open_file(text.name) as file:
                shutil.copyfileobj(file, text.kept)
            text.size = text.kept.tell()
    return found


def of_ids(name: str, ids: list[int]) -> Input:
    """Return a text that is given as ids, whose sha256 is that of their numbers with commas between them."""
    return Input(name, None, sha256=hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest(), ids=ids)


def _size(name: str) -> int | None:
    """Return the size of a file that can be opened and is not empty, or None for a pipe and the like."""
    if name not in ("-", ""):
        status = os.stat(os.path.expanduser(name))
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            return None
    with open_file(name) as file:
        if name == "-":
            return None
        if not file.read(1):
            raise NpgptError(f"{name} is empty: there is nothing to score")
    return status.st_size
