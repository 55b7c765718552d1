"""Files as they are read: regular, of a bounded size, named where the system fails; and no output over an input.

What a run reads and what it is to write are known to the run that `one_run` begins: the command line, or a conversion.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

from ..errors import NpgptError


class Kind(NamedTuple):
    """What a file should be, and how many bytes of such a file are read at most."""

    name: str
    most: int


CONFIGURATION = Kind("configuration", 16_000_000)
INDEX = Kind("index of a checkpoint", 16_000_000)
VOCABULARY = Kind("vocabulary", 64_000_000)  # gpt2's takes 1.5 MB, the largest known of any model 34
REVISION = Kind("name of a revision", 1000)

AnyPath: TypeAlias = str | os.PathLike[str]
Identity: TypeAlias = tuple[int, int] | str  # device and inode; a path with links resolved where nothing is
STREAMS = ("standard input", "standard output", "standard error")  # by their numbers


@dataclass(frozen=True)
class Run:
    """What one run reads and writes: the names that messages use, by identity."""

    inputs: dict[Identity, str] = field(default_factory=dict)
    outputs: dict[Identity, str] = field(default_factory=dict)


_RUN: ContextVar[Run | None] = ContextVar("run", default=None)


@contextmanager
def one_run() -> Iterator[None]:
    """Within this context no file is both read and written, whichever comes first, nor written by two outputs.

    A run within another one is a part of it.
    """
    token = None if _RUN.get() is not None else _RUN.set(Run())
    try:
        yield
    finally:
        if token is not None:
            _RUN.reset(token)


def identity(path: AnyPath) -> Identity:
    """Return what a path has in common with every other path of the same file, links followed."""
    try:
        status = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


def is_input(path: AnyPath) -> None:
    """Remember a file that is read in this run. Raises NpgptError where an output of the run would replace it."""
    if run := _RUN.get():
        own = identity(path)
        if own in run.outputs:
            raise _destroyed(str(path), run.outputs[own])
        run.inputs.setdefault(own, str(path))


def is_output(path: AnyPath, name: str) -> None:
    """Remember a file that this run will write, which messages call `name`.

    Raises NpgptError where the run reads it, or writes it as another output or a standard stream.
    """
    not_an_input(path, name)
    if run := _RUN.get():
        other = run.outputs.setdefault(identity(path), name)
        if other != name:
            raise NpgptError(f"{name} is the same file as {other}: give each output a file of its own")


def not_an_input(path: AnyPath, name: str) -> None:
    """Raise NpgptError where this run reads the file that is to be written, or a standard stream leads into it."""
    if (run := _RUN.get()) is None:
        return
    own = identity(path)
    if own in run.inputs:
        raise _destroyed(run.inputs[own], name)
    for number, stream in enumerate(STREAMS):
        with suppress(OSError):  # a closed stream
            status = os.fstat(number)
            if stat.S_ISREG(status.st_mode) and own == (status.st_dev, status.st_ino):
                raise NpgptError(f"{name} is the file of {stream}: give the output a file of its own")


def _destroyed(source: str, output: str) -> NpgptError:
    return NpgptError(f"{output} would replace {source}, which this run reads: choose another place for the output")


def check_file(path: Path) -> None:
    """Raise NpgptError where there is no regular file."""
    if not path.is_file():
        raise NpgptError(f"{path} is no regular file" if os.path.lexists(path) else f"{path} does not exist")


@contextmanager
def naming(path: AnyPath) -> Iterator[None]:
    """Give an OSError within this context the file's name where the system left it out, as for a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file.

    Raises NpgptError for anything else, without waiting for it, and OSError, with the path, where it cannot be read.
    """
    check_file(path)
    with naming(path), open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # replaced meanwhile
            raise NpgptError(f"{path} is no regular file")
        yield file


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a FIFO would otherwise wait for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_bytes(path: Path, kind: Kind) -> bytes:
    """Return all of a regular file. Raises NpgptError where it is too large for its kind, and as `reading` does."""
    with reading(path) as file:
        is_input(path)
        size = os.fstat(file.fileno()).st_size
        if size > kind.most:
            raise NpgptError(f"{path} is no {kind.name}: it has {size} bytes, above {kind.most}")
        return file.read(size)
