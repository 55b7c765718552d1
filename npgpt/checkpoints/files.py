"""Read only regular files of bounded size, name the file in every error, and keep outputs from replacing inputs.

`one_run` starts a run, such as a command or a conversion, which remembers all files that it reads and writes.
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
    """A kind of file and the most bytes that such a file may have."""

    name: str
    most: int


CONFIGURATION = Kind("configuration", 16_000_000)
INDEX = Kind("checkpoint index", 16_000_000)
VOCABULARY = Kind("vocabulary", 64_000_000)  # gpt2's takes 1.5 MB, the largest known one 34 MB
REVISION = Kind("revision name", 1000)

AnyPath: TypeAlias = str | os.PathLike[str]
Identity: TypeAlias = tuple[int, int] | str  # device and inode, or the resolved path if there is no file yet
STREAMS = ("standard input", "standard output", "standard error")  # by file descriptor


@dataclass(frozen=True)
class Run:
    """The files that one run reads and writes, by identity, with the names that messages use."""

    inputs: dict[Identity, str] = field(default_factory=dict)
    outputs: dict[Identity, str] = field(default_factory=dict)


_RUN: ContextVar[Run | None] = ContextVar("run", default=None)


@contextmanager
def one_run() -> Iterator[None]:
    """Start a run in which no file may be both read and written, in either order, or written by two outputs.

    A run started within another run is part of the outer one.
    """
    token = None if _RUN.get() is not None else _RUN.set(Run())
    try:
        yield
    finally:
        if token is not None:
            _RUN.reset(token)


def identity(path: AnyPath) -> Identity:
    """Return a value that is equal for all paths to the same file; links are followed."""
    try:
        status = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


def is_input(path: AnyPath) -> None:
    """Register a file that this run reads. Raises NpgptError if an output of the run would replace it."""
    if run := _RUN.get():
        own = identity(path)
        if own in run.outputs:
            raise _destroyed(str(path), run.outputs[own])
        run.inputs.setdefault(own, str(path))


def is_output(path: AnyPath, name: str) -> None:
    """Register a file that this run will write; messages call it `name`.

    Raises NpgptError if the run also reads it, or writes it through another output or a standard stream.
    """
    not_an_input(path, name)
    if run := _RUN.get():
        other = run.outputs.setdefault(identity(path), name)
        if other != name:
            raise NpgptError(f"{name} and {other} are the same file: give each output its own file")


def not_an_input(path: AnyPath, name: str) -> None:
    """Raise NpgptError if this run reads the file that it will write, or a standard stream is redirected to it."""
    if (run := _RUN.get()) is None:
        return
    own = identity(path)
    if own in run.inputs:
        raise _destroyed(run.inputs[own], name)
    for number, stream in enumerate(STREAMS):
        with suppress(OSError):  # a closed stream
            status = os.fstat(number)
            if stat.S_ISREG(status.st_mode) and own == (status.st_dev, status.st_ino):
                raise NpgptError(f"{name} and {stream} are the same file: give the output its own file")


def _destroyed(source: str, output: str) -> NpgptError:
    return NpgptError(f"{output} would replace {source}, which this run reads: choose another path for the output")


def check_file(path: Path) -> None:
    """Raise NpgptError if the path does not lead to a regular file."""
    if not path.is_file():
        raise NpgptError(f"{path} is not a regular file" if os.path.lexists(path) else f"{path} does not exist")


@contextmanager
def naming(path: AnyPath) -> Iterator[None]:
    """Add the path to an OSError that lacks it, such as the one for a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading.

    Raises NpgptError at once for anything else, such as a FIFO, and OSError, with the path, if it cannot be opened.
    """
    check_file(path)
    with naming(path), open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # replaced after the check
            raise NpgptError(f"{path} is not a regular file")
        yield file


def _without_waiting(path: str, flags: int) -> int:
    """Open a file without blocking; otherwise opening a FIFO would wait for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_bytes(path: Path, kind: Kind) -> bytes:
    """Return a regular file's contents. Raises NpgptError if it is too large for its kind, and as `reading` does."""
    with reading(path) as file:
        is_input(path)
        size = os.fstat(file.fileno()).st_size
        if size > kind.most:
            raise NpgptError(f"{path} is too large for a {kind.name}: {size} bytes exceed the limit of {kind.most}")
        return file.read(size)
