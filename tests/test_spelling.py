"""Command line mistakes are answered with the wrong word, the nearest right one, and nothing else."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from npgpt.cli import VERBS
from npgpt.errors import nearest, reason
from npgpt.scoring.windows import DEFAULTS
from tests.support.austen import CARD_SHA256
from tests.support.command import here, refused
from tests.support.models import small, store


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("scroe x", "there is no verb 'scroe' (did you mean score?)"),
        ("Generate hi", "there is no verb 'Generate' (did you mean generate?)"),
        ("ls", "there is no verb 'ls' (did you mean list?)"),
        ("--", "there is no verb '--' ("),
        ("help", "there is no verb 'help' (did you mean --help?)"),
        ("xyzzy --temp 0", "there is no verb 'xyzzy'"),
        ("--verson", "there is no option --verson (did you mean --version?)"),
        ("--modle austen generate hi", "there is no option --modle (did you mean --model?)"),
        ("--model austen generate hi", "--model goes after the verb"),
        ("generate --temp 0 hi", "there is no option --temp (did you mean --temperature?)"),
        ("generate hi --temp 0", "there is no option --temp (did you mean --temperature?)"),
        ("generate --temp=0 hi", "there is no option --temp (did you mean --temperature?)"),
        ("generate --Temperature 0", "there is no option --Temperature (did you mean --temperature?)"),
        ("generate -t 0 hi", "there is no option -t"),
        ("generate --temp x --max-tokens y", "there is no option --temp (did you mean --temperature?)"),
        (
            "generate --sede 3 hi --temp 0",
            "there is no option --sede (did you mean --seed?), nor --temp (did you mean --temperature?)",
        ),
        ("generate hi --dtype flaot32", "--dtype must be float32 or float64, not 'flaot32' (did you mean float32?)"),
        ("generate hi --dtype=Float64", "--dtype must be float32 or float64, not 'Float64' (did you mean float64?)"),
        (
            "score x --convention llamacpp",
            "--convention must be rolling, huggingface or llama.cpp, not 'llamacpp' (did you mean llama.cpp?)",
        ),
        ("generate hi --max-tokens ten", "--max-tokens must be a whole number, not 'ten'"),
        ("generate hi --temperature hot", "--temperature must be a number, not 'hot'"),
        ("generate hi --json=1", "--json takes no value, and '1' was given"),
        ("attend --ids", "--ids expects one argument"),
        ("trace hi", "give -o/--output or --to"),
        ("check", "THEIRS is missing"),
        ("tokens a b", "'b' is one argument too many: a text with spaces needs quotes"),
        ("list x", "'x' is one argument too many (see"),
        ("inspect a b", "'b' is one argument too many (see"),
        ("check a b", "'b' is one argument too many (see"),
        ("score x --json --html y", "--html and --json exclude each other: give one of them"),
    ],
)
def test_the_mistake_is_named_with_what_was_meant(arguments: str, message: str) -> None:
    error = refused(*arguments.split())
    assert error.startswith(f"npgpt: error: {message}")
    assert error.endswith(" --help)\n")


@pytest.mark.parametrize(
    "arguments", [("--stop", "--- a dash"), ("--stop=--x",), ("-v",), ("--", "--temp 0"), ("--max-tokens", "0")]
)
def test_what_is_right_stays_right(arguments: tuple[str, ...]) -> None:
    assert here("generate", "--max-tokens", "1", *arguments)[0] == 0


def test_help_is_shown_beside_a_wrong_option() -> None:
    code, out, _ = here("generate", "--temp", "0", "--help")
    assert (code, out.startswith("usage: npgpt generate")) == (0, True)


def test_nearest() -> None:
    assert nearest("flaot32", ["float32", "float64"]) == " (did you mean float32?)"
    assert nearest("FLOAT64", ["float32", "float64"]) == " (did you mean float64?)"
    assert nearest("bytes", ["float32", "float64"]) == nearest("x", []) == ""


def test_a_model_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    for name, meant in (("austn", "austen"), ("austin", "austen"), ("gtp2", "gpt2"), ("tinny", "tiny")):
        store(tmp_path / "weights" / "tiny", small())
        assert f"no model {name!r} here (did you mean {meant}?)" in refused("inspect", name, cwd=tmp_path)
    assert "no model 'gpt3' here; looked for" in refused("inspect", "gpt3", cwd=tmp_path)


MISSING = (
    ("score", "no.txt"),
    ("generate", "--prompts", "no.txt"),
    ("convert", "no.pth", "out"),
    ("inspect", "no.safetensors"),
    ("inspect", "some/no/folder"),
    ("generate", "hi", "--model", "no.gguf"),
    ("check", "no.npz", "--ids", "1"),
)


@pytest.mark.parametrize("arguments", MISSING, ids=" ".join)
def test_a_missing_file_is_told_the_same_way_everywhere(arguments: tuple[str, ...], tmp_path: Path) -> None:
    name = next(text for text in arguments if text.startswith(("no.", "some")))
    assert refused(*arguments, cwd=tmp_path) == f"npgpt: error: {name} does not exist\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOENT, "a.txt does not exist"),
        (errno.EISDIR, "a.txt is a folder, not a file"),
        (errno.EACCES, "a.txt: permission denied"),
        (errno.ENOSPC, "a.txt: no space left on device"),
        (errno.ENAMETOOLONG, "a.txt: file name too long"),
    ],
)
def test_a_systems_error_is_put_into_words(number: int, words: str) -> None:
    assert reason(OSError(number, os.strerror(number), "a.txt")) == words
    assert reason(OSError(number, os.strerror(number), b"a.txt")) == words
    assert "Errno" not in reason(OSError("odd"))


def test_a_terminal_that_is_waited_for_is_told(tmp_path: Path) -> None:
    waiting = "npgpt: reading from the terminal: end with Ctrl-D\n"
    for arguments in (("tokens", "-"), ("generate", "-", "--max-tokens", "1"), ("score",), ("score", "-", "--json")):
        code, _, error = here(*arguments, stdin=b"It is a truth", terminal=True, cwd=tmp_path)
        assert (code, error.count(waiting)) == (0, 1), arguments
        assert waiting not in here(*arguments, stdin=b"It is a truth", cwd=tmp_path)[2]
    assert waiting not in here("tokens", "hi", terminal=True)[2]


def test_notes_break_between_words_on_a_terminal_alone(tmp_path: Path) -> None:
    long = " ".join(["words-with-hyphens"] * 12)
    for columns in ("40", "80"):
        lines = here("tokens", "hi", "--model", f"no/{long}/x", terminal=True, COLUMNS=columns)[2].splitlines()
        assert len(lines) > 1
        assert max(map(len, lines)) <= int(columns)
        assert " ".join(line.strip() for line in lines) == refused("tokens", "hi", "--model", f"no/{long}/x").strip()


def test_the_lines_of_inspect_are_indented_behind_their_label() -> None:
    lines = here("inspect", terminal=True, COLUMNS="80")[1].splitlines()
    assert "  mlp             192 → 768 → 192, gelu_new" in lines
    assert lines[lines.index("  sha256") + 1] == " " * 16 + CARD_SHA256
    lines = here("inspect", terminal=True, COLUMNS="44")[1].splitlines()
    at = lines.index("  tensors         76 float16; converted to")
    assert lines[at + 1] == " " * 18 + "float32 at load"


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_reads_well_at_80_columns(verb: str) -> None:
    """No word is broken, the example is on one line, and the whole help fits a screen."""
    code, out, _ = here(*verb.split(), "--help", COLUMNS="80")
    lines = out.splitlines()
    assert code == 0
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith(f"example: npgpt {verb}")
    assert len(lines) <= 41
    assert not [line for line in lines if line.rstrip().endswith("-")]


def test_the_defaults_in_scores_help_are_those_of_the_conventions() -> None:
    text = " ".join(here("score", "--help", COLUMNS="80")[1].split())
    assert "(default: the model's context; llama.cpp: 512)" in text
    assert "(default: the window; huggingface: 1/2 of it)" in text
    assert "(default: rolling does)" in text
    assert {name: default[:3] for name, default in DEFAULTS.items()} == {
        "rolling": (None, 1, True),
        "huggingface": (None, 2, False),
        "llama.cpp": (512, 1, False),
    }
