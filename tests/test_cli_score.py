"""npgpt score, run as a process."""

from __future__ import annotations

import io
import itertools
import json
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest

import npgpt
from npgpt.cli.progress import bar
from tests.support.command import COMMAND, ROOT, here, refused, run, wait_for_the_end
from tests.support.models import small, store
from tests.support.thorough import examples
from tests.support.vocabularies import put, small_pair

LINE = "Emma Woodhouse, handsome, clever, and rich, with a comfortable home.\n"
TEXTS = {
    "a.txt": LINE * 3,
    "b.txt": "naïve 日本\n",
    "c.txt": "It is a truth universally acknowledged\n" * 12,
    "d.txt": "and",
    "e.txt": "It is a truth universally acknowledged",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in TEXTS.items():
        (tmp_path / name).write_bytes(text.encode())
    return tmp_path


def test_the_sums_and_the_convention_are_printed(folder: Path) -> None:
    code, out, error = here("score", "a.txt", "b.txt", "--stride", "100", "--no-bos", cwd=folder)
    assert (code, error) == (0, "")
    scores = list(npgpt.score([TEXTS["a.txt"], TEXTS["b.txt"]], stride=100, end_of_text=False))
    for name, found in zip(("a.txt", "b.txt"), scores, strict=True):
        assert f"{name}: {found.totals.tokens} tokens, {found.totals.scored} of them scored: " in out
        assert f"  perplexity per token     {found.perplexity:,.3f}\n" in out
    assert "all 2 texts: " in out
    assert "\x1b" not in out
    last = out.splitlines()[-1]
    assert last.startswith("austen, float32; rolling: windows of 256 tokens, stride 100, nothing before the text; ")


def test_standard_input_is_taken_as_it_is(folder: Path) -> None:
    named = here("score", "b.txt", "--json", cwd=folder)[1]
    for arguments in ([], ["-"]):
        code, out, _ = here("score", *arguments, "--json", stdin=TEXTS["b.txt"].encode())
        assert code == 0
        assert json.loads(out) == json.loads(named) | {"text": "-"}


def test_json_lines_join_with_other_engines(folder: Path) -> None:
    code, out, error = here("score", "a.txt", "b.txt", "--json", "--top", "2", "--dtype", "float64", cwd=folder)
    assert code == 0
    assert error.startswith("npgpt: all 2 texts: ")
    assert error.count("\n") == 1
    for line, name in zip(out.splitlines(), ("a.txt", "b.txt"), strict=True):
        record = json.loads(line)
        text = TEXTS[name].encode()
        starts = [*record["byte_offsets"], len(text)]
        cut = [text[a:b] for a, b in itertools.pairwise(starts)]
        assert [piece.decode(errors="backslashreplace") for piece in cut] == record["pieces"]
        (found,) = npgpt.score([text.decode()], npgpt.load(dtype="float64"), top=2)
        assert record["log_probs"] == pytest.approx(found.log_probs.tolist(), abs=1e-10)
        assert record["ranks"] == found.ranks.tolist()


def test_top_tells_what_the_model_would_rather_have_said(folder: Path) -> None:
    out = here("score", "e.txt", "--top", "2", cwd=folder)[1]
    rows = out.splitlines()
    assert rows[0].split() == ["byte", "rank", "bits", "token"]
    assert [row.split()[0] for row in rows[1:4]] == ["0", "2", "5"]
    assert rows[3].split()[1] == "1"  # " a" after "It is"
    assert rows[3].split("%")[0].count("' a'") == 2


def on_a_terminal(*arguments: str, cwd: Path) -> str:
    """Return what a terminal of 80 columns shows of both streams."""
    main, other = pty.openpty()
    variables = {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "80"}
    started = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | variables
    process = subprocess.Popen([*COMMAND, *arguments], stdin=other, stdout=other, stderr=other, cwd=cwd, env=started)
    os.close(other)
    seen = b""
    while True:
        try:
            if not select.select([main], [], [], 60)[0]:
                break
            part = os.read(main, 2**16)
        except OSError:  # Linux says so at the end
            break
        if not part:
            break
        seen += part
    os.close(main)
    assert process.wait(60) == 0
    return seen.decode().replace("\r\n", "\n")


def test_a_terminal_shows_the_text_tinted_and_a_bar(folder: Path) -> None:
    seen = on_a_terminal("score", "c.txt", cwd=folder)
    assert "\x1b[30;48;5;" in seen
    assert "surprisal in bits, from:" in seen
    assert "tokens/s" in seen
    assert seen.index("tokens/s") < seen.index("surprisal in bits")
    for term, no_color, coloured in (("xterm", "", True), ("xterm", "1", False), ("dumb", "", False)):
        out = here("score", "d.txt", cwd=folder, terminal=True, TERM=term, NO_COLOR=no_color)[1]
        assert ("48;5" in out) == coloured


@pytest.mark.parametrize(("term", "no_color"), [("xterm", "1"), ("dumb", "")])
def test_a_terminal_without_colours_shows_figures(folder: Path, term: str, no_color: str) -> None:
    """A pipe gets only the sums."""
    out = here("score", "d.txt", cwd=folder, terminal=True, TERM=term, NO_COLOR=no_color)[1]
    rows = out.splitlines()
    assert rows[0].split() == ["byte", "rank", "bits", "token"]
    assert re.fullmatch(r" +0 +\d+ +\d+\.\d\d  'and' *", rows[1])
    assert "\n\nd.txt: 1 token" in out
    for arguments in ((), ("--html", "page.html")):  # a page needs each token's figures, too
        assert "rank" not in here("score", "d.txt", *arguments, cwd=folder, TERM=term, NO_COLOR=no_color)[1]


def test_a_byte_order_mark_is_mentioned_once(folder: Path) -> None:
    (folder / "marked.txt").write_bytes(b"\xef\xbb\xbfIt is a truth")
    said = "npgpt: marked.txt begins with a byte order mark, which is dropped\n"
    for _ in range(2):  # the second run reads it only to compare
        assert here("score", "marked.txt", "--resume", "out.jsonl", cwd=folder)[2].count(said) == 1
    assert here("score", "marked.txt", cwd=folder)[2] == said


def test_a_text_for_a_model_without_text_is_answered_with_ids(folder: Path, bare: Path) -> None:
    assert "has no text: give --ids 1,2,3 in place of files" in refused(
        "score", "d.txt", "--model", str(bare), cwd=folder
    )


def test_html(folder: Path) -> None:
    code, out, error = here("score", "b.txt", "d.txt", "--html", "page.html", "--top", "2", cwd=folder)
    page = (folder / "page.html").read_text("utf-8")
    assert code == 0
    assert error == f"npgpt: wrote page.html, {(folder / 'page.html').stat().st_size:,} bytes\n"
    assert out.index("b.txt: ") < out.index("d.txt: ") < out.index("all 2 texts")
    assert page.startswith("<!DOCTYPE html>")
    assert page.count('<div class="text" ') == 2
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_workers_give_the_same(folder: Path) -> None:
    command = ["score", *TEXTS, "--json", "--context", "32"]
    one, two = (
        run(*command, "--threads", "1", cwd=folder),
        run(*command, "--workers", "2", "--threads", "1", cwd=folder),
    )
    assert one[0] == 0
    assert one == two


def test_resume_skips_what_is_there_and_adds_the_rest(folder: Path) -> None:
    expected = here("score", *TEXTS, "--json", cwd=folder)[1]
    code, out, error = here("score", *TEXTS, "--resume", "out.jsonl", cwd=folder)
    assert (code, error) == (0, "")
    assert (folder / "out.jsonl").read_text() == expected
    assert f"all {len(TEXTS)} texts in out.jsonl: " in out
    code, again, error = here("score", *TEXTS, "--resume", "out.jsonl", cwd=folder)
    assert (code, again, error) == (0, out, "npgpt: 5 of 5 texts are in out.jsonl already\n")
    assert (folder / "out.jsonl").read_text() == expected
    # one taken out of the middle comes behind the others
    lines = expected.splitlines(keepends=True)
    (folder / "out.jsonl").write_text("".join(lines[:1] + lines[2:]))
    assert here("score", *TEXTS, "--resume", "out.jsonl", cwd=folder)[0] == 0
    assert (folder / "out.jsonl").read_text() == "".join([lines[0], *lines[2:], lines[1]])


def test_a_file_named_twice_is_scored_twice(folder: Path) -> None:
    assert here("score", "d.txt", "--resume", "out.jsonl", cwd=folder)[0] == 0
    code, _, error = here("score", "d.txt", "d.txt", "--resume", "out.jsonl", cwd=folder)
    assert (code, error) == (0, "npgpt: 1 of 2 texts are in out.jsonl already\n")
    assert [json.loads(line)["text"] for line in (folder / "out.jsonl").read_text().splitlines()] == ["d.txt", "d.txt"]


def test_a_foreign_file_is_left_alone_and_a_link_stays_one(folder: Path) -> None:
    (folder / "notes.jsonl").write_text('{"text": "my only notes"}')
    assert "notes.jsonl: the last line is not a truncated record" in refused(
        "score", "d.txt", "--resume", "notes.jsonl", cwd=folder
    )
    assert (folder / "notes.jsonl").read_text() == '{"text": "my only notes"}'
    (folder / "link.html").symlink_to(folder / "page.html")
    assert here("score", "d.txt", "--html", "link.html", cwd=folder)[0] == 0
    assert (folder / "link.html").is_symlink()
    assert (folder / "page.html").read_text().startswith("<!DOCTYPE html>")


def test_texts_are_printed_and_kept_until_one_cannot_be_scored(folder: Path) -> None:
    (folder / "bad.txt").write_bytes(b"Emma" * 70_000 + b"\xff")
    message = "npgpt: error: bad.txt is not UTF-8: byte 0xFF at 280000\n"
    code, out, error = here("score", "a.txt", "bad.txt", "--context", "8", cwd=folder)
    assert (code, error) == (2, message)
    assert out == "".join(here("score", "a.txt", "--context", "8", cwd=folder)[1].splitlines(keepends=True)[:-1])
    code, out, error = here("score", "a.txt", "bad.txt", "d.txt", "--context", "8", "--resume", "x.jsonl", cwd=folder)
    assert (code, out, error) == (2, "", message)
    assert [json.loads(line)["text"] for line in (folder / "x.jsonl").read_text().splitlines()] == ["a.txt"]
    assert here("score", "a.txt", "bad.txt", "--html", "x.html", cwd=folder)[0] == 2
    assert not [path for path in folder.iterdir() if "x.html" in path.name]


def test_what_comes_through_a_pipe(folder: Path) -> None:
    named = json.loads(here("score", "a.txt", "--json", cwd=folder)[1])
    reader, writer = os.pipe()
    os.write(writer, TEXTS["a.txt"].encode())
    os.close(writer)
    name = f"/dev/fd/{reader}"
    assert json.loads(here("score", name, "--json", cwd=folder)[1]) == named | {"text": name}
    os.close(reader)
    for said in ("", "npgpt: 1 of 1 texts are in x.jsonl already\n"):
        code, _, error = here("score", "-", "--resume", "x.jsonl", cwd=folder, stdin=TEXTS["a.txt"].encode())
        assert (code, error) == (0, said)
    assert json.loads((folder / "x.jsonl").read_text()) == named | {"text": "-"}
    error = refused("score", "-", "--resume", "x.jsonl", cwd=folder, stdin=b"another")
    assert "- is not the same text as the - in x.jsonl" in error
    assert "standard input, which can be read only once" in refused("score", "-", "a.txt", "-", cwd=folder)
    assert "standard input is empty" in refused("score", "-", cwd=folder)
    assert "standard input is not UTF-8: byte 0xC3 at 3" in refused("score", cwd=folder, stdin=b"caf\xc3")


def test_killed_at_any_moment_nothing_is_lost_or_repeated(folder: Path) -> None:
    """A run is killed at random moments by time or by progress, then completed; its file equals that of an
    uninterrupted run.
    """
    names = [f"{number}.txt" for number in range(examples(12, 20))]
    for number, name in enumerate(names):
        (folder / name).write_text(f"Letter {number}. " + LINE * (1 + number % 3))
    arguments = ["score", *names, "--context", "8", "--threads", "1"]  # in several groups, each written as it is done
    expected = here(*arguments[:-2], "--json", cwd=folder)[1]
    rng, out, kills, sizes = random.Random(1), folder / "out.jsonl", 0, {0}

    def size() -> int:
        return out.stat().st_size if out.exists() else 0

    while True:
        process = subprocess.Popen(
            [*COMMAND, *arguments, "--resume", "out.jsonl"],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # by the clock the first times alone, or a slow machine would never come to the end
        deadline = time.monotonic() + (rng.uniform(0, 0.15 * (kills + 1)) if kills < 4 else 60)
        enough = max(sizes) + rng.randrange(examples(len(expected) // 6, 1), len(expected) // examples(3, 6))
        while process.poll() is None and time.monotonic() < deadline and size() < enough:
            time.sleep(0.0005)
        process.kill()
        if process.wait(60) == 0:
            break
        kills += 1
        sizes.add(size())
    assert kills >= 4
    assert len(sizes) > 2, "it was never killed in the middle"
    assert out.read_text() == expected


def workers_of(process: int) -> list[int]:
    """Return the ids of its worker processes."""
    found = []
    with suppress(OSError):  # it, or one of them, ended meanwhile
        for path in Path(f"/proc/{process}/task").glob("*/children"):
            for child in path.read_text().split():
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


def has_numpy(process: int) -> bool:
    return "numpy" in Path(f"/proc/{process}/maps").read_text()


MOMENTS: dict[str, Callable[[list[int], Path], bool]] = {
    "a worker is there": lambda workers, out: len(workers) > 0,
    "two are there": lambda workers, out: len(workers) == 2,
    "they load": lambda workers, out: len(workers) == 2 and all(map(has_numpy, workers)),
    "they compute": lambda workers, out: len(workers) == 2 and out.exists() and out.stat().st_size > 0,
}


def two_workers(folder: Path, moment: str) -> tuple[subprocess.Popen[bytes], list[int]]:
    """Start a run of a minute with two workers, and return while they compute."""
    if not any(Path("/proc/self/task").glob("*/children")):
        pytest.skip("only /proc tells a process's children")
    (folder / "long.txt").write_text(LINE * 2000)
    process = subprocess.Popen(
        [*COMMAND, "score", "c.txt", "long.txt", "--context", "8", "--workers", "2", "--resume", "out.jsonl"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 30
    while not MOMENTS[moment](workers := workers_of(process.pid), folder / "out.jsonl"):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    return process, workers


def test_a_killed_worker_is_one_line(folder: Path) -> None:
    process, workers = two_workers(folder, "they compute")
    os.kill(workers[0], signal.SIGKILL)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error.count(b"\n")) == (2, b"", 1)
    said = b"a worker process was killed, perhaps for lack of memory: use fewer --workers; out.jsonl keeps what is done"
    assert said in error


def test_workers_do_not_outlive_a_killed_command(folder: Path) -> None:
    process, workers = two_workers(folder, "they compute")
    process.kill()
    process.communicate()
    wait_for_the_end(workers)


def ignores_ctrl_c(process: int) -> bool:
    (mask,) = re.findall(r"^SigIgn:\s*(\w+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> signal.SIGINT - 1 & 1)


@pytest.mark.parametrize("moment", [*MOMENTS][:: examples(4, 1)])
def test_ctrl_c_ends_workers_quietly(folder: Path, moment: str) -> None:
    """The whole process group gets the signal, as from a terminal."""
    process, _ = two_workers(folder, moment)
    heeded = False
    while not heeded:  # in the few milliseconds of a worker's start it is ignored: then once more, and never twice
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        heeded = not ignores_ctrl_c(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        process.send_signal(signal.SIGCONT)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error) == (130, b"", b"")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.txt"], "nothing.txt"),
        (["."], "\\. is a folder, not a file"),
        (["latin.txt"], "latin.txt is not UTF-8: byte 0xE9 at 2"),
        (["a.txt", "empty.txt"], "empty.txt is empty: there is nothing to score"),
        (["a.txt", "--stride", "300"], "a stride of 300 skips tokens: use at most 256"),
        (["a.txt", "--stride", "0"], "the stride must be at least 1, not 0"),
        (["a.txt", "--context", "300"], "a window of 300 tokens is longer than the model's context, 256"),
        (["a.txt", "--convention", "paper"], "--convention must be rolling, huggingface or llama.cpp, not 'paper'"),
        (["d.txt", "--no-bos"], "d.txt has too few tokens to score any, 1:"),
        (["a.txt", "--top", "-1"], "top, .* at least 0"),
        (["a.txt", "--workers", "0"], "--workers must be between 1 and .*, not 0"),
        (["a.txt", "--workers", "100000"], "--workers must be between 1 and .*, four per core, not 100000"),
        ([""], "a file's name must not be empty"),
        (["a.txt", "--html", "pipe"], "--html pipe: that is no regular file"),
        (["a.txt", "--resume", "pipe"], "--resume pipe: that is no regular file"),
        (["empty.txt", "--resume", "new.jsonl"], "empty.txt is empty"),
        (["a.txt", "--html", "no/where.html"], "--html no/where.html: there is no folder no"),
        (["a.txt", "--html", "."], "--html .: that is a folder"),
        (["a.txt", "--resume", "no/where.jsonl"], "--resume no/where.jsonl: there is no folder no"),
        (["a.txt", "--resume", "latin.txt"], "latin.txt: the last line is not a truncated record"),
        (["a.txt", "--json", "--html", "x.html"], "--html and --json exclude each other"),
        (["a.txt", "--model", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(folder: Path, arguments: list[str], message: str) -> None:
    (folder / "latin.txt").write_bytes("naïve".replace("ï", "é").encode("latin-1"))
    (folder / "empty.txt").write_bytes(b"")
    os.mkfifo(folder / "pipe")  # never a device: root would replace it, were the check gone
    before = sorted(folder.iterdir())
    assert re.search(message, refused("score", *arguments, cwd=folder))
    assert sorted(folder.iterdir()) == before


def test_resume_refuses_what_was_made_otherwise(folder: Path) -> None:
    assert here("score", "a.txt", "--resume", "out.jsonl", cwd=folder)[0] == 0
    before = (folder / "out.jsonl").read_bytes()
    error = refused("score", "a.txt", "--resume", "out.jsonl", "--stride", "9", cwd=folder)
    assert "out.jsonl was made with stride 256, but now it is 9" in error
    error = refused("score", "a.txt", "--resume", "out.jsonl", "--top", "1", cwd=folder)
    assert "out.jsonl was made with top 0, but now it is 1" in error
    error = refused("score", "a.txt", "--resume", "out.jsonl", "--dtype", "float64", cwd=folder)
    assert "out.jsonl was made with weights " in error
    record = json.loads(before)
    for wrong, message in (
        ({"settings": 5}, "line 1 is not a record that npgpt score writes"),
        ({"scored": "x"}, "line 1 is not a record that npgpt score writes"),
        ({"settings": {}}, "was made with weights None"),
    ):
        (folder / "wrong.jsonl").write_text(json.dumps(record | wrong) + "\n")
        assert message in refused("score", "a.txt", "--resume", "wrong.jsonl", cwd=folder)
    (folder / "a.txt").write_text("another text")
    error = refused("score", "a.txt", "--resume", "out.jsonl", cwd=folder)
    assert "a.txt is not the same text as the a.txt in out.jsonl" in error
    assert (folder / "out.jsonl").read_bytes() == before


def test_a_model_without_text_is_told(bare: Path, folder: Path) -> None:
    assert "has no text" in refused("score", "a.txt", "--model", str(bare), cwd=folder)


def test_help_fits_a_screen() -> None:
    out = here("score", "--help", COLUMNS="80")[1]
    assert len(out.splitlines()) <= 40
    assert max(map(len, out.splitlines())) <= 80


def test_a_folder_in_which_nothing_may_be_written_is_told_before_the_work(folder: Path) -> None:
    with mock.patch.object(os, "access", return_value=False):  # root may write anywhere
        error = refused("score", "a.txt", "--model", "no/such/model", "--html", "x.html", cwd=folder)
    assert f"--html x.html: the folder {folder} is not writable" in error


def test_a_text_of_white_space_has_no_words(folder: Path) -> None:
    (folder / "blank.txt").write_text(" \n")
    code, out, _ = here("score", "blank.txt", cwd=folder)
    assert (code, "  perplexity per word      no words\n" in out) == (0, True)


class Terminal(io.StringIO):
    """A file that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("scale", "seconds", "done", "says"),
    [
        (1, 2.0, 0, " 0 of 24 steps"),
        (1, 10.0, 4, " 4 of 24 steps, 2.5 s/step, 50 s left"),
        (1, 4.0, 4, " 4 of 24 steps, 1 steps/s, 20 s left"),
        (1, 0.5, 4, " 4 of 24 steps, 8 steps/s, 2 s left"),
        (0.5, 10.0, 4, " 8 of 48 steps, 1.2 s/step, 50 s left"),
    ],
)
def test_slow_steps_have_seconds_and_no_rate_of_nought(scale: float, seconds: float, done: int, says: str) -> None:
    with (
        mock.patch.object(sys, "stderr", Terminal()) as seen,
        mock.patch.dict(os.environ, {"COLUMNS": "200"}),
        mock.patch.object(time, "monotonic", side_effect=[1.0, 1.0 + seconds]),
        bar("steps", scale) as progress,
    ):
        assert progress is not None
        progress(done, 24)
        assert seen.getvalue().endswith(f"]{says}\x1b[K")


def test_a_bar_of_an_unknown_whole_and_of_an_estimated_one() -> None:
    for total, says in ((None, "4 steps, 2 steps/s"), (24, "4 of about 24 steps, 2 steps/s, 10 s left")):
        with (
            mock.patch.object(sys, "stderr", Terminal()) as seen,
            mock.patch.dict(os.environ, {"COLUMNS": "200"}),
            mock.patch.object(time, "monotonic", side_effect=[1.0, 3.0]),
            bar("steps", of="of about") as progress,
        ):
            assert progress is not None
            progress(4, total)
            assert seen.getvalue().endswith(f"{says}\x1b[K")
            assert ("[" in seen.getvalue().removesuffix("\x1b[K")) == (total is not None)


def test_a_bar_on_a_narrow_terminal_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for columns in (12, 40, 60, 200):
        with (
            mock.patch.object(sys, "stderr", Terminal()) as seen,
            mock.patch.dict(os.environ, {"COLUMNS": str(columns)}),
            mock.patch.object(time, "monotonic", side_effect=[1.0, 1.11]),
            bar("tokens") as progress,
        ):
            assert progress is not None
            progress(86_016, 228_336)
            drawn = seen.getvalue().strip("\r").removesuffix("\x1b[K")
        assert 0 < len(drawn) < columns
        assert ("86,016 of 228,336 tokens" in drawn) == (columns >= 40)
        assert drawn.startswith("[") == (columns == 200)


def test_bytes_and_words_are_the_texts_own_where_a_tokenizer_rewrites_it(tmp_path: Path) -> None:
    """A prefix space added by the tokenizer does not count. Ids have no text except that of their tokens."""
    folder = store(tmp_path / "m", small(vocab_size=300))
    put(folder, small_pair() | {"tokenizer_config.json": {"add_prefix_space": True}})
    (tmp_path / "text").write_text("the")
    code, printed, notes = here("score", str(tmp_path / "text"), "--model", str(folder))
    assert (code, "scored: 3 bytes, 1 word" in printed, notes) == (0, True, "")
    record = json.loads(here("score", str(tmp_path / "text"), "--model", str(folder), "--json")[1])
    assert (record["bytes"], record["pieces"], record["byte_offsets"]) == (3, [" the"], [0])
    assert "scored: 4 bytes, 1 word" in here("score", "--ids", "258", "--model", str(folder))[1]
