"""A file of JSON objects, one a line, that grows line by line and can be gone on with after any interruption."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

from .errors import NpgptError


def line(record: dict[str, Any]) -> str:
    """One object on one line, in ASCII."""
    return json.dumps(record, allow_nan=False)


@contextmanager
def appending(
    path: str | os.PathLike[str], keys: Sequence[str]
) -> Iterator[tuple[list[dict[str, Any]], Callable[[dict[str, Any]], None]]]:
    """Open or make a file of objects that have these keys, the first in front; gives those that are whole in it,
    and a function that adds one behind them. A last line that an interruption cut short is taken off.

    Raises NpgptError for a file of something else, which stays as it is, and for one that another process is adding
    to; OSError where it cannot be opened or written.
    """
    with open(path, "a+b") as file:
        _lock(file, path)
        file.seek(0)
        content = file.read()
        end = content.rfind(b"\n") + 1
        begin = json.dumps({keys[0]: 0})[:-2].encode()
        records = [_record(text, path, number, keys) for number, text in enumerate(content[:end].splitlines(), 1)]
        rest = content[end:]
        if not (rest.startswith(begin) or begin.startswith(rest)):
            raise NpgptError(f"{path} ends with something else than a line that was cut short: {rest[:40]!r}")
        file.truncate(end)

        def add(record: dict[str, Any]) -> None:
            file.write(line(record).encode() + b"\n")
            file.flush()

        yield records, add


def _record(text: bytes, path: str | os.PathLike[str], number: int, keys: Sequence[str]) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or next(iter(found), None) != keys[0] or not found.keys() >= set(keys):
        raise NpgptError(f"{path}: line {number} is none of ours, which begin with {keys[0]!r}: {text[:40]!r}")
    return found


def _lock(file: BinaryIO, path: str | os.PathLike[str]) -> None:
    """Until the file is closed; where the system has no such locks, nothing."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise NpgptError(f"another process is adding to {path}") from None
