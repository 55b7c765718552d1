"""npgpt explain on the command line."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

import pytest

from tests.support.command import COMMAND, ROOT, here, refused


def test_the_walk_as_text() -> None:
    code, out, error = here("explain", "It is a truth")
    lines = out.splitlines()
    assert (code, error) == (0, "")
    assert len(lines) == 3 * 95 + 1
    assert lines[0].endswith('  wte = stage("wte", parameters.wte.weight[token_ids])')
    assert lines[12].endswith('  h = record("attn.c_attn", linear(h, *p.attn.c_attn))')
    assert lines[13].startswith("  h.0.attn.c_attn [B, T, 3C] = [1, 4, 576]: mean ")
    assert lines[-1].startswith("next: “")
    assert here("explain", "It is a truth", "--step")[1] == out  # no terminal: nothing to wait for


def test_a_page(tmp_path: Path) -> None:
    code, out, error = here("explain", "It is", "--html", "page.html", cwd=tmp_path)
    assert (code, out) == (0, "")
    size = (tmp_path / "page.html").stat().st_size
    assert error == f"npgpt: wrote page.html, {size:,} bytes\n"
    assert "--step walks" in refused("explain", "It is", "--html", "page.html", "--step", cwd=tmp_path)


def test_a_model_without_text(bare: Path) -> None:
    code, out, _ = here("explain", "--model", str(bare), "--ids", "1,2,39")
    assert code == 0
    assert "token 2 “39”: " in out


def stepped(typed: bytes) -> bytes:
    """Return what a terminal shows of `npgpt explain It --step` for what is typed there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "explain", "It", "--step"], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT
    )
    os.close(theirs)
    os.write(ours, typed)
    seen = b""
    try:
        while part := os.read(ours, 4096):
            seen += part
    except OSError:  # the terminal's other end is closed
        pass
    os.close(ours)
    assert process.wait(60) == 0
    return seen


@pytest.mark.parametrize("end", [b"q\n", b"\x04"], ids=["q", "Ctrl-D"])
def test_step_waits_for_enter_and_ends_with_q_or_the_end_of_input(end: bytes) -> None:
    seen = stepped(b"\n" + end)
    assert b"Enter shows the next stage" in seen
    assert (seen.count(b"model.py:"), b"wte" in seen, b"embedding [B" in seen) == (2, True, False)
    assert seen.endswith(b"\n") or end == b"q\n"  # which the terminal showed when it was typed
