"""Where a conversion must not write, what it must not lose, and that it leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt.checkpoints import safetensors
from npgpt.errors import NpgptError
from tests.support.conversion import listed, put


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_came_into_the_destination_meanwhile_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    source, out = put(tmp_path / "source"), tmp_path / "out"
    write_parts = safetensors.write_parts

    def meanwhile(*arguments: Any) -> None:
        write_parts(*arguments)
        out.mkdir()
        (out / "thesis.txt").write_text("mine")

    monkeypatch.setattr(safetensors, "write_parts", meanwhile)
    with pytest.raises((NpgptError, OSError)):
        npgpt.convert(source, out, n_head=3, overwrite=overwrite)
    assert (out / "thesis.txt").read_text() == "mine"
    assert listed(tmp_path) == ["out", "source"]


def test_what_takes_the_place_at_the_last_moment_costs_neither_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = put(tmp_path / "source"), tmp_path / "out"
    npgpt.convert(source, out, n_head=3)
    rename = Path.rename

    def taken(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            target.mkdir()
            (target / "thesis.txt").write_text("mine")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", taken)
    with pytest.raises(OSError, match="not empty"):
        npgpt.convert(source, out, n_head=3, overwrite=True)
    assert listed(out) == ["thesis.txt"]
    (old,) = [name for name in listed(tmp_path) if name not in ("out", "source")]
    assert listed(tmp_path / old) == ["config.json", "model.safetensors"]


def test_a_folder_with_the_name_of_a_file_is_not_overwritten(tmp_path: Path) -> None:
    source, inner = put(tmp_path / "source"), tmp_path / "out" / "model.safetensors"
    inner.mkdir(parents=True)
    (inner / "thesis.txt").write_text("mine")
    with pytest.raises(NpgptError):
        npgpt.convert(source, tmp_path / "out", n_head=3, overwrite=True)
    assert (inner / "thesis.txt").read_text() == "mine"


def test_the_current_folder_stays_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = put(tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    with pytest.raises(NpgptError, match="is the current folder, its parent, or a mount point"):
        npgpt.convert(source, ".", n_head=3)
    assert os.listdir(".") == []
    assert os.path.samefile(".", out)


@pytest.mark.parametrize("folder", ["/", "loop/x"])
def test_impossible_destinations_are_errors_of_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    source = put(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("pool")
    Path("pool").symlink_to("loop")
    with pytest.raises((NpgptError, OSError)):
        npgpt.convert(source, folder, n_head=3)


# not: a dangling link as the destination followed
def test_a_link_to_nowhere_is_no_destination(tmp_path: Path) -> None:
    path = put(tmp_path / "m")
    (tmp_path / "out").symlink_to("nowhere")
    with pytest.raises(NpgptError, match="out exists and is not a folder: choose another name"):
        npgpt.convert(path, tmp_path / "out", n_head=3)
    assert not (tmp_path / "nowhere").exists()


def test_folders_made_on_the_way_go_with_a_conversion_that_fails(tmp_path: Path) -> None:
    source = put(tmp_path / "source", dtype="float64")
    arrays = {
        name: t.load("float64").copy() for name, t in safetensors.read(source / "model.safetensors").tensors.items()
    }
    arrays["_orig_mod.transformer.ln_f.bias"][0] = 1e300
    safetensors.write(source / "model.safetensors", arrays)
    with pytest.raises(NpgptError, match="too large"):
        npgpt.convert(source, tmp_path / "a" / "b" / "out", n_head=3)
    assert listed(tmp_path) == ["source"]


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    source = put(tmp_path / "source")
    program = f"""
import os, sys, time
from npgpt.checkpoints import safetensors
def slow(path, layout, parts, metadata=None):
    print("go", flush=True)
    time.sleep(30)
safetensors.write_parts = slow
from npgpt.__main__ import main
sys.argv = ["npgpt", "convert", {str(source)!r}, {str(tmp_path / "out")!r}, "--n-head", "3"]
sys.exit(main())
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"go\n"
    time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode in (128 + number, -number)
    assert errors == b""
    assert listed(tmp_path) == ["source"]


def test_interrupted_as_the_old_folder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either folder may remain, but nothing else."""
    source, out = put(tmp_path / "source"), tmp_path / "out"
    npgpt.convert(source, out, n_head=3)
    rmtree = shutil.rmtree
    calls: list[object] = []

    def interrupted_once(path: Path, *rest: Any, **options: Any) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        rmtree(path, *rest, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        npgpt.convert(source, out, n_head=3, overwrite=True)
    assert listed(tmp_path) == ["out", "source"]


def test_a_tensor_named_as_the_metadata_of_every_file_gets_no_other_name(tmp_path: Path) -> None:
    """{"format": "pt"} is no alias."""
    safetensors.write(tmp_path / "x", {"pt": np.zeros(1, np.float32)})
    assert list(safetensors.read(tmp_path / "x").tensors) == ["pt"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="FIFOs")
@pytest.mark.parametrize("verb", ["inspect", "convert"])
def test_a_fifo_in_a_vocabularys_place_does_not_hang(tmp_path: Path, verb: str) -> None:
    source = put(tmp_path / "source")
    os.mkfifo(source / "vocab.tiktoken")
    out = [str(tmp_path / "out")] if verb == "convert" else []
    command = [sys.executable, "-m", "npgpt", verb, str(source), *out, "--n-head", "3"]
    done = subprocess.run(command, timeout=20, check=False, capture_output=True, text=True)
    assert done.returncode == (2 if verb == "convert" else 0)
    assert "vocab.tiktoken is not a regular file" in done.stdout + done.stderr
    assert listed(tmp_path) == ["source"]
