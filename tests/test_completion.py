"""Shell completion, through the protocol that the shells use."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.command import ROOT

pytest.importorskip("argcomplete", reason="argcomplete is not installed (extra completion)")

ASKED = {  # what is typed before the tab key, and what is offered
    "npgpt ge": {"generate"},
    "npgpt generate --temp": {"--temperature"},
    "npgpt generate --dtype float": {"float32", "float64"},
    "npgpt generate --model au": {"austen"},
    "npgpt generate hi --model mi": {"mine"},
    "npgpt convert mi": {"mine"},
    "npgpt inspect we": {"weights/"},
    "npgpt score ch": {"chapter one.txt", "chapters/"},
    "npgpt score a.txt --html cha": {"chapter one.txt", "chapters/"},
    "npgpt trace hi --to r": {"raw"},
    "npgpt trace hi --to l": {"llm.c"},
    "npgpt trace hi --to raw we": {"weights/"},
    "npgpt download gpt2-l": {"gpt2-large"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a command npgpt, a model and files."""
    (tmp_path / "weights" / "mine").mkdir(parents=True)
    (tmp_path / "weights" / "mine" / "model.safetensors").touch()
    (tmp_path / "chapters").mkdir()
    (tmp_path / "chapter one.txt").touch()
    command = tmp_path / "bin" / "npgpt"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nimport sys\nfrom npgpt.__main__ import main\nsys.exit(main())\n")
    command.chmod(0o755)
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a shell that finds this npgpt and argcomplete's scripts."""
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(folder), "TERM": "dumb", "ZDOTDIR": str(folder)}
    return {"LC_ALL": "C.UTF-8", "HF_HUB_CACHE": str(folder / "cache"), "NPGPT_WEIGHTS": ""} | own


def asked(folder: Path, line: str, **variables: str) -> set[str]:
    """Return npgpt's own candidates for a line, by argcomplete's protocol."""
    found = folder / "found"
    given = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(found)}
    given |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_SHELL": "fish"} | variables
    done = subprocess.run(["npgpt"], env=environment(folder) | given, cwd=folder, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
    return {*found.read_text().split("\n")} - {""}


@pytest.mark.parametrize("line", ASKED)
def test_what_is_offered(folder: Path, line: str) -> None:
    assert {text.strip() for text in asked(folder, line)} == ASKED[line]


def test_verbs_are_offered_first_and_numbers_and_texts_not_at_all(folder: Path) -> None:
    verbs = {text.strip() for text in asked(folder, "npgpt ")}
    assert {"generate", "score", "list", "download"} <= verbs
    assert asked(folder, "npgpt generate ") == asked(folder, "npgpt generate hi --top-k ") == set()
    assert "austen" in asked(folder, "npgpt generate --model ")


def test_completion_does_not_wait_for_numpy(folder: Path) -> None:
    (folder / "bin" / "numpy.py").write_text("raise SystemExit('numpy is imported')")
    for line in ("npgpt ", "npgpt generate --model au", "npgpt score --convention "):
        assert asked(folder, line, PYTHONPATH=f"{folder / 'bin'}{os.pathsep}{ROOT}")


def test_without_argcomplete_a_shell_that_asks_gets_the_usual_answer(folder: Path) -> None:
    """Setting only the variable changes nothing."""
    (folder / "bin" / "argcomplete.py").write_text("raise ImportError")
    path = f"{folder / 'bin'}{os.pathsep}{ROOT}"
    done = subprocess.run(
        ["npgpt", "tokens", "hi", "--json"],
        env=environment(folder) | {"_ARGCOMPLETE": "1", "PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        check=True,
    )
    assert done.stdout.startswith(b'{"ids": [')


def needs(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"{shell} is not installed")


@needs("fish")
def test_fish(folder: Path) -> None:
    for line, offered in ASKED.items():
        code = f'register-python-argcomplete --shell fish npgpt | source; complete -C "{line}"'
        done = subprocess.run(
            ["fish", "--no-config", "-c", code], env=environment(folder), cwd=folder, capture_output=True, check=True
        )
        found = {text.split("\t")[0].strip() for text in done.stdout.decode().splitlines()}
        assert found == offered, line


SETUP = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], 'eval "$(register-python-argcomplete npgpt)"'),
    "zsh": (
        ["zsh", "-f", "-i"],
        'autoload -Uz compinit && compinit -u -D; eval "$(register-python-argcomplete npgpt)"',
    ),
}


@pytest.mark.parametrize("shell", [pytest.param(shell, marks=needs(shell)) for shell in SETUP])
def test_the_tab_key(folder: Path, shell: str) -> None:
    """A single candidate is inserted, quoted if needed; several are listed."""
    command, setup = SETUP[shell]
    main, other = pty.openpty()
    process = subprocess.Popen(
        command, stdin=other, stdout=other, stderr=other, cwd=folder, env=environment(folder), start_new_session=True
    )
    os.close(other)
    try:
        type_and_wait(main, f"PS1='> '; {setup}; echo re''ady\n", lambda seen: "ready" in seen)
        for typed, shown in (
            ("npgpt ge\t", "npgpt generate "),
            ("--temp\t0 ", "--temperature 0 "),
            ("--model au\t", "--model austen "),
            ("\x15npgpt score chapter\\ \t", "chapter\\ one.txt"),
            ("\x15npgpt tokens hi --model aus\t--json\n", '{"ids": ['),
        ):
            type_and_wait(main, typed, lambda seen, shown=shown: shown in seen)  # type: ignore[misc]
    finally:
        process.kill()
        process.wait()
        os.close(main)


def without_backspaces(text: str) -> str:
    """Return a line as a terminal shows it after backspaces."""
    shown: list[str] = []
    for letter in text.replace("\x07", ""):
        if letter != "\b":
            shown.append(letter)
        elif shown:
            shown.pop()
    return "".join(shown)


def type_and_wait(terminal: int, keys: str, is_there: Callable[[str], bool]) -> None:
    """Type into a terminal and read until the expected text appears. Raises AssertionError after 30 seconds."""
    os.write(terminal, keys.encode())
    seen, deadline = b"", time.monotonic() + 30
    while not is_there(without_backspaces(seen.decode(errors="replace"))):
        left = deadline - time.monotonic()
        assert left > 0, seen
        assert select.select([terminal], [], [], left)[0], seen
        seen += os.read(terminal, 2**16)
