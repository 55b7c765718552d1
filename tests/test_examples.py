"""examples/: the commands of each README print what it shows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import documents
from tests.support.documents import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder for PATH, with npgpt and python of this environment."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name, arguments in (("npgpt", "-m npgpt"), ("python", ""), ("pytest", "-m pytest")):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


def check_example(name: str, tmp_path: Path, tools: Path) -> None:
    """Run the blocks of an example's README in a copy of its folder. Raises AssertionError for other output."""
    folder = shutil.copytree(EXAMPLES / name, tmp_path / name)
    variables = os.environ | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": str(documents.WIDEST),
    }
    for block in documents.blocks(EXAMPLES / name / "README.md"):
        if block.language != "sh":
            continue
        done = subprocess.run(["sh", "-e", "-c", block.text], cwd=folder, env=variables, capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
        assert block.agrees(done.stdout), f"{block}\nshown:\n{block.shown}\nprinted:\n{done.stdout}\n{done.stderr}"


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler is installed")
def test_a_port_in_c(tmp_path: Path, tools: Path) -> None:
    check_example("c_port", tmp_path, tools)
