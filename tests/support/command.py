"""Run the command line, in a new process or in this one."""

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
    """Run npgpt in a process; return exit code, standard output and standard error."""
    variables = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"} | environment
    done = subprocess.run([*COMMAND, *arguments], input=stdin, capture_output=True, cwd=cwd, env=os.environ | variables)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


class Stream(io.BytesIO):
    """An in-memory stream that can claim to be a terminal."""

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
    """Run npgpt in this process, which is much faster; encoding is that of the streams. Return what run() returns."""
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
    """Run npgpt in this process, expect exit code 2, and return the single line of its error."""
    code, out, error = here(*arguments, **options)
    assert (code, out) == (2, ""), (out, error)
    assert error.startswith("npgpt: error: ")
    assert error.count("\n") == 1
    return error


def wait_for_the_end(processes: list[int]) -> None:
    """Wait until processes, which need not be children, have ended. Raises AssertionError if one is still running."""
    deadline = time.monotonic() + 30
    while any(map(running, processes)):
        assert time.monotonic() < deadline, "a worker outlives its work"
        time.sleep(0.02)


def running(process: int) -> bool:
    """Return whether a process runs; a zombie does not count."""
    try:
        os.kill(process, 0)
        return not Path(f"/proc/{process}/stat").exists() or Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
