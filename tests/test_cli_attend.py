"""npgpt attend, run as a process."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

import pytest

from tests.support.attention_page import CODES, data_of, weights_of
from tests.support.command import COMMAND, ROOT, here, refused

TEXT = "It is a truth universally"


def test_a_layer() -> None:
    code, out, error = here("attend", TEXT, "--layer", "5", COLUMNS="80")
    lines = out.splitlines()
    assert (code, error) == (0, "")
    assert lines[:4] == [
        "austen, layer 5: weights [1, 6, 7, 7], a map for each head (--head H for one",
        "alone, --html FILE for a page)",
        "Rows are queries, columns are keys; softmax over the keys: each row sums to 1.",
        "Later keys are masked: ·.",
    ]
    heads = [number for number, line in enumerate(lines) if line.startswith("head ")]
    assert [lines[number] for number in heads] == [
        "head 0: own token 0.41",
        "head 1",
        "head 2",
        "head 3: even 0.95",
        "head 4: previous token 0.46",
        "head 5: own token 0.40",
    ]
    for head, start in enumerate(heads):
        alone = here("attend", TEXT, "--layer", "5", "--head", str(head), COLUMNS="80")[1].splitlines()
        alone = alone[alone.index("") + 1 : -2]  # without the title, the axes and the scale
        height = len(alone)
        assert lines[start - 1] == ""
        assert lines[start + 1 : start + 1 + height] == alone
        assert lines[start + height].startswith("6 ally   ")
    assert lines[-1] == "blank 0, ░ 0.016, ▒ 0.14, ▓ 0.39, █ 0.77 to 1"


def test_a_head_of_the_first_layer() -> None:
    code, out, _ = here("attend", "-", "--head", "5", stdin=TEXT.encode(), COLUMNS="80")
    assert code == 0
    assert out.startswith("austen, layer 0, head 5 (even 0.92): weights [7, 7] out of [1, 6, 7, 7]\n")
    assert "0 It     ██· · · · · ·\n1 ␣is    " in out


def test_a_model_without_text(bare: Path) -> None:
    code, out, _ = here("attend", "--model", str(bare), "--ids", "1,2,39", "--layer", "1", "--head", "2", COLUMNS="200")
    assert code == 0
    assert "weights [3, 3] out of [1, 3, 3, 3]" in out
    assert "\n0 1  ██· ·\n1 2  " in out
    assert "its 40 ids are not GPT-2's 50257" in refused("attend", "--model", str(bare), "hello")


def test_what_a_terminal_must_not_get_is_written_out() -> None:
    code, out, _ = here("attend", "a\x1b[2J\n\u202e<|endoftext|>", "--head", "0", "--special")
    assert code == 0
    assert "<|endoftext|>" in out
    assert "\\x1b" in out
    assert all(line.isprintable() for line in out.splitlines())


def test_a_terminal_without_the_characters() -> None:
    code, out, _ = here("attend", TEXT, "--head", "1", encoding="ascii")
    assert code == 0
    assert "0 It     ##- - - - - -\n1 _is    " in out
    assert "\\u" not in out


@pytest.mark.parametrize(
    ("terminal", "term", "no_color", "coloured"),
    [
        (True, "xterm-256color", "", True),
        (True, "xterm-256color", "1", False),
        (True, "dumb", "", False),
        (False, "xterm-256color", "", False),
    ],
)
def test_colours_where_a_terminal_has_them(terminal: bool, term: str, no_color: str, coloured: bool) -> None:
    out = here("attend", TEXT, "--head", "2", terminal=terminal, TERM=term, NO_COLOR=no_color, COLUMNS="80")[1]
    assert ("\x1b[48;5;226m" in out) == coloured
    assert ("█" in out) != coloured
    assert "It is" not in CODES.sub("", out)


def test_a_terminal_is_known_as_one() -> None:
    own, other = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "NO_COLOR": "", "COLUMNS": "80"}
    subprocess.run([*COMMAND, "attend", TEXT, "--head", "2"], stdout=other, env=environment, check=True)
    os.close(other)
    out = b""
    while part := _read(own):
        out += part
    os.close(own)
    assert b"\x1b[48;5;226m" in out


def _read(terminal: int) -> bytes:
    """Return what can be read, or nothing at the end, which Linux reports as an error."""
    try:
        return os.read(terminal, 2**16)
    except OSError:
        return b""


def test_a_page_of_all_and_of_one(tmp_path: Path) -> None:
    code, out, error = here("attend", TEXT, "--html", "all.html", cwd=tmp_path)
    assert (code, out, error) == (0, "", f"npgpt: wrote all.html, {(tmp_path / 'all.html').stat().st_size:,} bytes\n")
    every = data_of((tmp_path / "all.html").read_text("utf-8"))
    assert every["pieces"] == ["It", " is", " a", " truth", " un", "ivers", "ally"]
    assert weights_of(every).shape == (6, 6, 7, 7)
    here("attend", TEXT, "--layer", "4", "--head", "2", "--html", "one.html", cwd=tmp_path)
    one = data_of((tmp_path / "one.html").read_text("utf-8"))
    assert (one["layers"], one["heads"], one["n_layer"]) == ([4], [2], 6)
    assert (weights_of(one)[0, 0] == weights_of(every)[4, 2]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([TEXT, "--layer", "6"], "layer 6 does not exist: austen has 6, from 0 to 5; give one of these or none"),
        ([TEXT, "--layer", "-1"], "layer -1 does not exist"),
        ([TEXT, "--head", "6"], "head 6 does not exist: austen has 6, from 0 to 5"),
        ([TEXT, "--head", "6", "--html", "x.html"], "head 6 does not exist"),
        ([TEXT, "--head", "x"], "--head"),
        ([], "there is no text: give it, or - for standard input, or --ids 1,2,3"),
        ([""], "the text is empty"),
        (["-"], "the text is empty"),
        ([" the" * 300], "the text has 300 tokens, the context holds 256: shorten it by 44"),
        ([TEXT, "--html", "no/such/folder/x.html"], "--html no/such/folder/x.html: there is no folder no/such/folder"),
        ([TEXT, "--html", "."], "--html .: that is a folder"),
        ([TEXT, "--ids", "1"], "not both"),
        (["--ids", "1,x"], "--ids takes whole numbers with commas between them, not '1,x'"),
        (["--ids", "1,4096"], "token id 4096 at position [1] is out of range"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    assert message in refused("attend", *arguments, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_input_that_is_not_utf8() -> None:
    assert "standard input is not UTF-8: byte 0xFF at 2" in refused("attend", "-", stdin=b"ab\xff")


def test_the_folder_is_looked_for_before_the_work(tmp_path: Path) -> None:
    error = refused("attend", TEXT, "--model", "no/such/model", "--html", "nowhere/x.html", cwd=tmp_path)
    assert "there is no folder nowhere" in error


def test_help_fits_a_screen() -> None:
    code, out, _ = here("attend", "--help", COLUMNS="80")
    assert code == 0
    assert "example: npgpt attend" in out
    assert len(out.splitlines()) <= 24
    assert max(map(len, out.splitlines())) <= 80
