"""The command line, as a process and in this one."""

from __future__ import annotations

import io
import os
import subprocess
import sys
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


def here(*arguments: str, cwd: Path | None = None, stdin: bytes = b"", **environment: str) -> tuple[int, str, str]:
    """The same in this process, because starting one takes longer than all else."""
    streams = [io.TextIOWrapper(io.BytesIO(content), encoding="utf-8") for content in (stdin, b"", b"")]
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
