"""A file of JSON objects, one a line, that grows line by line and can be gone on with after any interruption."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ..errors import NpgptError

T = TypeVar("T")


def line(record: dict[str, Any]) -> str:
    """One object on one line, in ASCII."""
    return json.dumps(record, allow_nan=False)


@contextmanager
def appending(
    path: Path, keys: tuple[str, str], read: Callable[[dict[str, Any]], T | None]
) -> Iterator[tuple[list[T], Callable[[dict[str, Any]], None]]]:
    """Open or make a file of objects that begin with these two keys, to add more; gives what read makes of each that is
    whole in it, and a function that adds one. read gives None for an object of another kind.

    A last line that an interruption cut short goes as the first is added. Until then nothing is changed, and a file
    that was made here goes again where none is added. Raises NpgptError for a file of anything else, and for one that
    another process is adding to; OSError where it cannot be opened or written.
    """
    made = not path.exists()
    with open(path, "a+b") as file:
        _lock(file, path)
        file.seek(0)
        end, found = 0, []
        rest = b""
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n"):
                rest = text
                break
            end += len(text)
            one = read(_object(text))
            if one is None:
                raise NpgptError(f"{path}: line {number} is not as they are written here: {text[:40]!r}")
            found.append(one)
        if not _is_cut_short(rest, keys):
            raise NpgptError(f"{path} ends with something else than a line that was cut short: {rest[:40]!r}")

        def add(record: dict[str, Any]) -> None:
            nonlocal rest
            if rest:
                file.truncate(end)
                rest = b""
            file.write(line(record).encode() + b"\n")
            file.flush()

        try:
            yield found, add
        finally:
            if made and file.tell() == 0:
                with suppress(OSError):
                    path.unlink()


def _object(text: bytes) -> dict[str, Any]:
    """The object of a line, or an empty one for what is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_cut_short(rest: bytes, keys: tuple[str, str]) -> bool:
    """Whether it can be the beginning of one of our lines: the first key, its value, and the second key behind that."""
    text, begin = rest.decode("ascii", errors="replace"), json.dumps({keys[0]: ""})[:-3]
    if not text.startswith(begin):
        return begin.startswith(text)
    try:
        _, end = json.JSONDecoder().raw_decode(text, len(begin))
    except (ValueError, RecursionError):
        return True  # within the value
    behind = f", {json.dumps(keys[1])}: "
    return text[end:].startswith(behind) or behind.startswith(text[end:])


def _lock(file: BinaryIO, path: Path) -> None:
    """Until the file is closed; where the system or the file system has no such locks, nothing."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise NpgptError(f"another process is adding to {path}") from None
    except OSError:
        return
