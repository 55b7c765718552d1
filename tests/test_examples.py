"""The commands in examples/ print what their READMEs show."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import npgpt
from tests.support import documents
from tests.support.austen import AUSTEN
from tests.support.documents import ROOT, Block
from tests.support.thorough import only_thorough

EXAMPLES = ROOT / "examples"


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """Return a folder for PATH with this environment's npgpt and python."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name, arguments in (("npgpt", "-m npgpt"), ("python", ""), ("pytest", "-m pytest")):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def no_torch(tmp_path: Path) -> Path:
    """Return a folder for PYTHONPATH that makes importing torch and transformers fail."""
    folder = tmp_path / "no_torch"
    folder.mkdir()
    for name in ("torch", "transformers"):
        (folder / f"{name}.py").write_text("raise ModuleNotFoundError('this machine has none')\n")
    return folder


def copied(name: str, tmp_path: Path) -> Path:
    """Return a copy of an example's folder."""
    return shutil.copytree(EXAMPLES / name, tmp_path / name)


def check_blocks(folder: Path, tools: Path, blocks: Iterable[Block], *modules: Path) -> None:
    """Run a README's blocks in a folder, optionally with other modules. Raises AssertionError if output differs."""
    variables = os.environ | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(map(str, (*modules, ROOT))),
        "COLUMNS": str(documents.WIDEST),
    }
    for block in blocks:
        done = subprocess.run(["sh", "-e", "-c", block.text], cwd=folder, env=variables, capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stderr  # 1: check found a difference
        assert "Traceback" not in done.stderr, done.stderr
        assert block.agrees(done.stdout), f"{block}\nshown:\n{block.shown}\nprinted:\n{done.stdout}\n{done.stderr}"


def blocks(name: str) -> list[Block]:
    """Return the sh blocks in an example's README."""
    return [block for block in documents.blocks(EXAMPLES / name / "README.md") if block.language == "sh"]


@only_thorough
@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler is installed")
def test_a_port_in_c(tmp_path: Path, tools: Path) -> None:
    check_blocks(copied("c_port", tmp_path), tools, blocks("c_port"))


@pytest.mark.parity
def test_a_suite_of_a_pytorch_port(tmp_path: Path, tools: Path) -> None:
    pytest.importorskip("torch", reason="extra parity is not installed")
    check_blocks(copied("pytest_port", tmp_path), tools, blocks("pytest_port"))


@pytest.mark.parity
def test_a_finetuned_model(tmp_path: Path, tools: Path, no_torch: Path) -> None:
    pytest.importorskip("transformers", reason="extra parity is not installed")
    folder, (training, *elsewhere) = copied("finetuned", tmp_path), blocks("finetuned")
    check_blocks(folder, tools, [training])
    check_blocks(folder, tools, elsewhere, no_torch)


@only_thorough
def test_a_model_of_save_pretrained_gives_text_without_torch(tmp_path: Path, tools: Path, no_torch: Path) -> None:
    """The example's commands run on a folder in transformers' form, so the shown text itself is not expected."""
    folder, (_, *elsewhere) = tmp_path, blocks("finetuned")
    npgpt.convert("austen", folder / "mine")
    config = json.loads((folder / "mine" / "config.json").read_text("utf-8"))
    added = {"architectures": ["GPT2LMHeadModel"], "dtype": "float32", "transformers_version": "5.23.0"}
    (folder / "mine" / "config.json").write_text(json.dumps(config | added), "utf-8")
    logits = npgpt.trace("It is a truth", folder / "mine", only=["logits"])["logits"]
    np.savez(folder / "mine" / "logits.npz", token_ids=AUSTEN.encode_prompt("It is a truth"), logits=logits)
    generate, check, python = elsewhere
    check_blocks(folder, tools, [replace(generate, shown=None), check, replace(python, shown=None)], no_torch)
