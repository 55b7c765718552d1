"""The standard streams: no output is lost, failures have names, and a terminal gets no foreign control characters."""

from __future__ import annotations

import contextlib
import io
import re
import select
import sys
from collections.abc import Iterator
from typing import Any

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but line breaks and tabs


class Patient(io.RawIOBase):
    """A standard stream's bytes. A stream that does not block is waited for, so that nothing is lost.

    A failure is an OSError that names the stream. It is kept, because argparse ignores it. Later output is dropped,
    because it would fail again as the process ends; so it is after Ctrl-C, when nobody may be reading.
    """

    def __init__(self, below: Any, name: str) -> None:
        self.below, self.name = below, name
        self.failure: OSError | None = None
        self.dropping = False

    def readable(self) -> bool:
        """Return whether it can be read."""
        return bool(self.below.readable())

    def writable(self) -> bool:
        """Return whether it can be written."""
        return bool(self.below.writable())

    def fileno(self) -> int:
        """Return its file descriptor."""
        return int(self.below.fileno())

    def isatty(self) -> bool:
        """Return whether it is a terminal."""
        return bool(self.below.isatty())

    def readinto(self, buffer: Any) -> int:
        """Read what is available, at least one byte, and return the number of bytes; 0 at the end."""
        while (count := self.below.readinto1(buffer)) is None:
            select.select([self.fileno()], [], [])
        return int(count)

    def write(self, data: Any) -> int:
        """Write some of the data, at least one byte, and return the number of bytes."""
        if self.dropping:
            return len(data)
        try:
            while (count := self.below.write(data)) is None:
                select.select([], [self.fileno()], [])
        except BaseException as error:
            self.dropping = True
            if not isinstance(error, OSError):
                raise
            self.failure = OSError(error.errno, error.strerror, self.name)
            raise self.failure from None
        return int(count)


class Screen(io.TextIOWrapper):
    """Standard output. On a terminal, control characters in printed text are escaped."""

    def __init__(self, below: Patient, encoding: str, line_buffering: bool) -> None:
        self.patient, self.terminal = below, below.isatty()
        super().__init__(io.BufferedWriter(below), encoding, "backslashreplace", line_buffering=line_buffering)

    def write(self, text: str) -> int:
        """Write text from outside: a prompt, a token, a name."""
        return super().write(CONTROL.sub(_escaped, text) if self.terminal else text)

    def paint(self, text: str) -> None:
        """Write text whose control characters are npgpt's own, such as colours."""
        super().write(text)

    def finish(self) -> None:
        """Flush. Raises OSError if any output did not arrive."""
        self.flush()
        if self.patient.failure is not None:
            raise self.patient.failure


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def paint(text: str, end: str = "\n") -> None:
    """Print text whose control characters are npgpt's own, such as colours."""
    write = sys.stdout.paint if isinstance(sys.stdout, Screen) else sys.stdout.write
    write(f"{text}{end}")


def finish() -> None:
    """Flush standard output. Raises OSError if any output did not arrive."""
    if isinstance(sys.stdout, Screen):
        sys.stdout.finish()
    elif sys.stdout is not None:
        sys.stdout.flush()


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Replace sys.stdin, sys.stdout and sys.stderr by such streams within the context.

    A closed stream stays, and so does a text-only stream that a caller in Python has put there.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    if isinstance(sys.stdin, io.TextIOWrapper):
        buffer = io.BufferedReader(Patient(sys.stdin.buffer, "standard input"))
        sys.stdin = io.TextIOWrapper(buffer, sys.stdin.encoding, sys.stdin.errors)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = Screen(_raw(sys.stdout, "standard output"), sys.stdout.encoding, sys.stdout.line_buffering)
    if isinstance(sys.stderr, io.TextIOWrapper):
        writer = io.BufferedWriter(_raw(sys.stderr, "standard error"))
        sys.stderr = io.TextIOWrapper(writer, sys.stderr.encoding, sys.stderr.errors, line_buffering=True)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.flush()
        sys.stdin, sys.stdout, sys.stderr = before


def _raw(stream: io.TextIOWrapper, name: str) -> Patient:
    """Return a stream's raw bytes, below its buffer if it has one."""
    stream.flush()
    return Patient(getattr(stream.buffer, "raw", stream.buffer), name)
