"""Output to a terminal, a non-blocking pipe and a full disk, and arguments that look like options."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npgpt import cli
from npgpt.cli import streams
from tests.support.command import COMMAND, ROOT, here, refused
from tests.support.models import random_ids, small, speaking

EVIL = "a\x1b]0;own\x07\x1b[31mb\x9b2J\rc\x00\x08d\n\te"  # a title, a colour, a screen cleared, a line begun again
SHOWN = "a\\x1b]0;own\\x07\\x1b[31mb\\x9b2J\\rc\\x00\\x08d\n\te"
OURS = re.compile(r"\x1b\[(0|2|48;5;\d+|30;48;5;\d+)m")  # the colours of npgpt's own, and their end
posix = pytest.mark.skipif(os.name != "posix", reason="terminals and pipes of POSIX")


def called(stdin: Any, stdout: Any, stderr: Any, *arguments: str) -> int:
    """Return the exit code of a command line in this process with these byte streams."""
    below = io.BytesIO(stdin) if isinstance(stdin, bytes) else stdin
    texts = [io.TextIOWrapper(stream, encoding="utf-8") for stream in (below, stdout, stderr)]
    with mock.patch.multiple(sys, stdin=texts[0], stdout=texts[1], stderr=texts[2]):
        try:
            return cli.main(arguments)
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            for text in texts:
                with contextlib.suppress(OSError):
                    text.detach()


@contextlib.contextmanager
def collected(number: int, pause: float = 0.0) -> Iterator[list[bytes]]:
    """Read a file descriptor in a thread, with a pause before each read, and yield the parts."""
    parts: list[bytes] = []

    def collect() -> None:
        with contextlib.suppress(OSError):  # a terminal whose other end is closed
            time.sleep(pause)
            while part := os.read(number, 65536):
                parts.append(part)
                time.sleep(pause)

    thread = threading.Thread(target=collect)
    thread.start()
    yield parts
    thread.join(60)
    assert not thread.is_alive()


def on_a_terminal(*arguments: str, stdin: bytes = b"") -> tuple[int, str]:
    """Return the exit code and everything a terminal receives from both output streams."""
    import pty
    import tty

    main, terminal = pty.openpty()
    tty.setraw(terminal)  # no line break of ours becomes two characters
    with (
        collected(main) as parts,
        mock.patch.dict(os.environ, {"TERM": "xterm"}),
        open(terminal, "wb", buffering=0) as stream,
    ):
        code = called(stdin, stream, stream, *arguments)
    os.close(main)
    return code, b"".join(parts).decode()


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a malicious model, text and stage names; the model draws any byte."""
    folder = tmp_path_factory.mktemp("evil")
    speaking(folder / "m\x1b[2J\r")
    (folder / "t\x1b[31m\x9b.txt").write_text(EVIL)
    ids, numbers = random_ids(small(vocab_size=257), (1, 5)), np.ones((1, 5, 257), np.float32)
    arrays: dict[str, Any] = {"input_ids": ids, "logits": numbers, "stage\x1b[31m": numbers}
    np.savez(folder / "x\x1b[31m.npz", **arrays)
    return folder


MODEL = ("--model", "m\x1b[2J\r")
VERBS: dict[str, tuple[str, ...]] = {
    "generate": ("generate", EVIL, *MODEL, "--ignore-eos", "--max-tokens", "10"),
    "generate, what the model draws": ("generate", "a", *MODEL, "--ignore-eos", "--temperature", "9", "--seed", "1"),
    "generate, standard input": ("generate", "-", *MODEL, "--max-tokens", "1"),
    "generate --samples": ("generate", EVIL, *MODEL, "--samples", "2", "--max-tokens", "3"),
    "generate --json": ("generate", EVIL, *MODEL, "--json", "--max-tokens", "3"),
    "score": ("score", "t\x1b[31m\x9b.txt", *MODEL),
    "score --top": ("score", "t\x1b[31m\x9b.txt", *MODEL, "--top", "3"),
    "score --json": ("score", "t\x1b[31m\x9b.txt", *MODEL, "--json"),
    "attend": ("attend", EVIL[:16], *MODEL),
    "tokens": ("tokens", EVIL, *MODEL),
    "tokens --json": ("tokens", EVIL, *MODEL, "--json"),
    "trace": ("trace", EVIL, *MODEL, "-o", "y\x1b[31m.npz"),
    "check": ("check", "x\x1b[31m.npz", *MODEL),
    "check --json": ("check", "x\x1b[31m.npz", *MODEL, "--json"),
    "inspect": ("inspect", "m\x1b[2J\r"),
    "convert": ("convert", "m\x1b[2J\r", "n\x1b[31m"),
    "download": ("download", EVIL),
    "no verb": (EVIL,),
    "no option": ("generate", f"--{EVIL}"),
    "no file": ("score", EVIL.replace("\0", ""), *MODEL),
    "help": ("generate", "--help"),
}


@posix
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.usefixtures("few_mistakes")
def test_a_terminal_gets_no_control_characters(
    evil: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str
) -> None:
    monkeypatch.chdir(evil)
    arguments = [f"{tmp_path}/{part}" if part.startswith(("y\x1b", "n\x1b")) else part for part in VERBS[verb]]
    code, text = on_a_terminal(*arguments, stdin=EVIL.encode())
    assert code in ((2,) if verb in ("no verb", "no option", "no file", "download") else (0, 1)), text
    text = re.sub(r"\r[^\r\n]*\x1b\[K", "", text)  # the progress bar, and that it is cleared
    plain = OURS.sub("", text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", plain), plain
    assert plain == text or verb in ("score", "score --top", "attend")
    assert text


@posix
def test_on_a_terminal_the_escaped_text_stands_in_its_place(evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(evil)
    arguments = ("generate", EVIL, *MODEL, "--max-tokens", "0")
    assert on_a_terminal(*arguments)[1].partition("Face's names\n")[2] == f"{SHOWN}\n"  # after the model's form
    assert here(*arguments)[1] == f"{EVIL}\n"  # through a pipe bytes stay as they are
    assert here("generate", "-", *MODEL, "--max-tokens", "0", stdin=EVIL.encode())[1] == f"{EVIL}\n"


@pytest.mark.parametrize(("options", "before"), [((), "not scored\x1b[0m"), (("--top", "1"), "%")])
def test_one_empty_line_parts_a_texts_tokens_from_its_sums(
    tmp_path: Path, options: tuple[str, ...], before: str
) -> None:
    (tmp_path / "t.txt").write_text("It is")
    out = here("score", "t.txt", *options, cwd=tmp_path, terminal=True, TERM="xterm")[1]
    assert re.search(rf"{re.escape(before)}\n\nt\.txt: 2 tokens", out)


@given(text=st.text())
def test_what_is_escaped_is_control_characters_alone(text: str) -> None:
    out = io.BytesIO()
    below = mock.Mock(wraps=out, isatty=lambda: True, writable=lambda: True)
    screen = streams.Screen(streams.Patient(below, "it"), "utf-8", False)
    screen.write(text)
    screen.finish()
    shown = out.getvalue().decode().replace(os.linesep, "\n")
    expected = "".join(
        c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else c.encode("unicode_escape").decode()
        for c in text
    )
    assert shown == expected.encode("utf-8", "backslashreplace").decode()


LONG = "word " * 20_000  # its ids in JSON take some times what a pipe holds


@posix
def test_a_standard_output_that_does_not_block_gets_everything() -> None:
    expected = here("tokens", "-", "--json", stdin=LONG.encode())[1]
    read, write = os.pipe()
    os.set_blocking(write, False)
    with collected(read, pause=0.02) as parts, open(write, "wb") as stream, io.BytesIO() as error:
        assert called(LONG.encode(), stream, error, "tokens", "-", "--json") == 0
    os.close(read)
    assert b"".join(parts).decode() == expected
    assert len(expected) > 2 * 65536


@posix
def test_a_standard_input_that_does_not_block_is_read_to_its_end() -> None:
    read, write = os.pipe()
    os.set_blocking(read, False)

    def slowly() -> None:
        with open(write, "wb", buffering=0) as stream:
            for part in ("He", "llo", ", wor", "ld"):
                time.sleep(0.02)
                stream.write(part.encode())

    thread = threading.Thread(target=slowly)
    thread.start()
    with open(read, "rb") as stream, io.BytesIO() as out, io.BytesIO() as error:
        code = called(stream, out, error, "tokens", "-", "--json", "--model", "gpt2")
        assert (code, json.loads(out.getvalue())["ids"]) == (0, [15496, 11, 995])
    thread.join()


@posix
def test_a_standard_error_that_does_not_block_gets_its_line() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    while True:  # fill it
        try:
            os.write(write, b"\n" * 4096)
        except BlockingIOError:
            break
    with collected(read, pause=0.02) as parts, open(write, "wb") as stream, io.BytesIO() as out:
        assert called(b"", out, stream, "generate", "a", "--top-p", "2") == 2
    os.close(read)
    assert b"".join(parts).lstrip(b"\n").startswith(b"npgpt: error: ")


def test_after_ctrl_c_nothing_waits_for_a_reader() -> None:
    below = mock.Mock(write=mock.Mock(side_effect=KeyboardInterrupt))
    stream = streams.Patient(below, "it")
    with pytest.raises(KeyboardInterrupt):
        stream.write(b"x")
    assert stream.write(b"yz") == 2
    assert below.write.call_count == 1


class Full(io.RawIOBase):
    """A file on a full disk that accepts only that many bytes."""

    def __init__(self, room: int = 0) -> None:
        self.room = room

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(self.room, len(data))
        self.room -= taken
        return taken


@pytest.mark.parametrize("room", [0, 5])
@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("score", "--help"),
        ("tokens", "a b c"),
        ("tokens", "a", "--json"),
        ("generate", "a b c", "--max-tokens", "3"),
        ("inspect",),
        ("attend", "a b"),
    ],
)
def test_a_full_disk_is_an_error(arguments: tuple[str, ...], room: int) -> None:
    error = io.BytesIO()
    assert called(b"", Full(room) if room else io.BufferedWriter(Full()), error, *arguments) == 2
    lines = [line for line in error.getvalue().decode().splitlines() if " tokens of " not in line]
    assert lines == ["npgpt: error: standard output: no space left on device"]


@posix
def test_a_file_that_may_not_grow_is_an_error_to_the_end_of_the_process(tmp_path: Path) -> None:
    import resource

    with (tmp_path / "out").open("wb") as out:
        done = subprocess.run(
            [*COMMAND, "--help"],
            stdout=out,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
        )
    assert (done.returncode, done.stderr) == (2, b"npgpt: error: standard output: file too large\n")


AFTER = "; a text that begins like an option goes after -- (see npgpt {} --help)\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--tempature 0"), "there is no option --tempature (did you mean --temperature?)"),
        (("generate", "--tempature", "0"), "there is no option --tempature (did you mean --temperature?)"),
        (("generate", "--tempature=0", "a"), "there is no option --tempature (did you mean --temperature?)"),
        (("generate", "a", "--max_tokens", "3"), "there is no option --max_tokens (did you mean --max-tokens?)"),
        (("generate", "--max", "3", "a"), "there is no option --max (did you mean --max-tokens?)"),
        (("generate", "--xyzzy of old"), "there is no option --xyzzy"),
        (("generate", "--temperature 0"), "'--temperature 0' is one argument: --temperature and its value are two"),
        (("tokens", "--jsn it"), "there is no option --jsn (did you mean --json?)"),
        (("attend", "--layers 2"), "there is no option --layers (did you mean --layer?)"),
        (("score", "a.txt", "--top 3"), "'--top 3' is one argument: --top and its value are two"),
        (("score", "a.txt", "--sride", "3"), "there is no option --sride (did you mean --stride?)"),
        (("check", "--promt x"), "there is no option --promt (did you mean --prompt?)"),
        (("inspect", "--n-heads 3"), "there is no option --n-heads (did you mean --n-head?)"),
        (("convert", "a", "--overwrit now"), "there is no option --overwrit (did you mean --overwrite?)"),
        (("download", "--revison main"), "there is no option --revison (did you mean --revision?)"),
    ],
)
def test_what_looks_like_a_mistyped_option_is_no_text(arguments: tuple[str, ...], message: str) -> None:
    assert refused(*arguments) == f"npgpt: error: {message}{AFTER.format(arguments[0])}"


def test_an_option_before_the_verb_and_a_text_without_quotes() -> None:
    assert refused("--json", "tokens", "a") == "npgpt: error: --json goes after the verb (see npgpt tokens --help)\n"
    error = "npgpt: error: {!r} is one argument too many: a text with spaces needs quotes (see npgpt generate --help)\n"
    assert refused("generate", "It", "is", "a", "truth") == error.format("is")
    assert refused("generate", "--", "--json", "--x") == error.format("--x")


@pytest.mark.parametrize("text", ["--tempature 0", "--text", "-v", "--", "--json"])
def test_after_two_dashes_it_is_a_text(text: str) -> None:
    code, out, _ = here("tokens", "--json", "--", text)
    assert (code, "".join(json.loads(out)["pieces"])) == (0, text)


@pytest.mark.parametrize("text", ["- an item", "--- a title", "-5 degrees", "—tempature 0", "-- x"])
def test_a_dash_alone_makes_no_option(text: str) -> None:
    code, out, _ = here("tokens", text, "--json")
    assert (code, "".join(json.loads(out)["pieces"])) == (0, text)
