"""The command line, as a process and in this one."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from npgpt import cli

COMMAND = [sys.executable, "-m", "npgpt"]
ROOT = Path(__file__).parents[2]


def run(*arguments: str, cwd: Path | None = None, stdin: bytes = b"", **environment: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    variables = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"} | environment
    done = subprocess.run([*COMMAND, *arguments], input=stdin, capture_output=True, cwd=cwd, env=os.environ | variables)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


class Stream(io.BytesIO):
    """A stream in memory that may say that it is a terminal."""

    def __init__(self, content: bytes, terminal: bool) -> None:
        super().__init__(content)
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def here(
    *arguments: str,
    cwd: Path | None = None,
    stdin: bytes = b"",
    terminal: bool = False,
    encoding: str = "utf-8",
    **environment: str,
) -> tuple[int, str, str]:
    """The same in this process, because starting one takes longer than all else; encoding is that of the streams."""
    streams = [io.TextIOWrapper(Stream(content, terminal), encoding=encoding) for content in (stdin, b"", b"")]
    before = Path.cwd()
    with mock.patch.multiple(sys, stdin=streams[0], stdout=streams[1], stderr=streams[2]):
        with mock.patch.dict(os.environ, environment):
            os.chdir(cwd or before)
            try:
                code = cli.main(arguments)
            except SystemExit as end:  # after --help
                code = int(end.code or 0)
            finally:
                os.chdir(before)
        for stream in streams:
            stream.flush()
    out, error = (stream.buffer.getvalue().decode() for stream in streams[1:])
    return code, out, error


def refused(*arguments: str, **options: Any) -> str:
    """The one line of an error."""
    code, out, error = here(*arguments, **options)
    assert (code, out) == (2, ""), (out, error)
    assert error.startswith("npgpt: error: ")
    assert error.count("\n") == 1
    return error


def wait_for_the_end(processes: list[int]) -> None:
    """Of processes that may be no children of this one. Raises AssertionError where one runs on."""
    deadline = time.monotonic() + 30
    while any(map(running, processes)):
        assert time.monotonic() < deadline, "a worker outlives its work"
        time.sleep(0.02)


def running(process: int) -> bool:
    """Whether a process is there, and not merely not yet taken note of."""
    try:
        os.kill(process, 0)
        return not Path(f"/proc/{process}/stat").exists() or Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
