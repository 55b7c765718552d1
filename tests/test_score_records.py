"""Scores as lines of JSON, and resuming from a file of them."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt.errors import NpgptError
from npgpt.scoring import records, windows
from npgpt.scoring.likelihood import Score, total, unknown
from npgpt.scoring.records import Known, ScoredText, appending
from npgpt.scoring.scoring import score
from tests.support.thorough import examples

SETTINGS: dict[str, Any] = {"weights": "1234", "stride": 4}
TEXTS = {"a\nb": "Emma", '日本" \\': "x y", "": "naïve"}


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def line(name: str, text: str, score: Score, settings: dict[str, Any]) -> str:
    """Return a complete record."""
    return "".join(records.line(name, sha256(text), score, settings))


def made(text: str) -> Score:
    """Return a score of literal values in which every letter is a token and the first is not scored."""
    n = len(text)
    log_probs, ranks = np.array([math.nan, *[-1.5] * (n - 1)]), np.array([0, *[2] * (n - 1)])
    known = unknown(n, 1)._replace(log_probs=log_probs, ranks=ranks, top_log_probs=log_probs[:, None])
    return Score(np.arange(n), tuple(letter.encode() for letter in text), known)


LINES = [line(name, text, made(text), SETTINGS) for name, text in TEXTS.items()]
READ = [(name, sha256(text), SETTINGS, made(text).totals) for name, text in TEXTS.items()]


def test_a_record_is_json_and_can_be_joined() -> None:
    model, text = npgpt.load(dtype="float64"), "naïve 日本"
    rule = windows.convention("huggingface", model.config)
    settings = records.settings(model, rule, 2, False)
    (found,) = score([text], model, convention="huggingface", top=2)
    written = line("a.txt", text, found, settings)
    assert written.isascii()
    assert "\n" not in written
    record = json.loads(written)
    n = len(found.pieces)
    columns = ("token_ids", "pieces", "byte_offsets", "log_probs", "ranks", "top_ids", "top_log_probs")
    assert {len(record[name]) for name in columns} == {n}
    assert record["token_ids"] == model.tokenizer.encode(text)
    assert record["log_probs"][0] is record["ranks"][0] is record["top_ids"][0] is record["top_log_probs"][0] is None
    assert record["log_probs"][1:] == found.log_probs[1:].tolist()
    assert record["ranks"][1:] == found.ranks[1:].tolist()
    assert record["top_ids"][1:] == found.likelihood.top_ids[1:].tolist()
    assert record["top_log_probs"][1:] == found.likelihood.top_log_probs[1:].tolist()
    assert next(iter(record)) == "text"
    assert record["settings"] == settings
    assert settings["weights"] == model.fingerprint
    assert (settings["stride"], settings["context"], settings["end_of_text"]) == (128, 256, False)
    assert records.read(written.encode()) == ("a.txt", record["sha256"], settings, found.totals)
    for key, value in (
        ("text", [1]),
        ("sha256", 1),
        ("settings", 5),
        ("scored", "x"),
        ("scored", True),
        ("words", None),
        ("nll", "1"),
    ):
        assert records.read(json.dumps(record | {key: value}).encode()) is None
        assert records.read(json.dumps({name: record[name] for name in record if name != key}).encode()) is None
    assert record["perplexity"] == found.perplexity


def test_what_json_has_no_number_for_is_null() -> None:
    record = json.loads(line("white.txt", "  ", made("  "), SETTINGS))
    assert (record["words"], record["word_perplexity"]) == (0, None)
    assert record["log_probs"] == [None, -1.5]


def test_every_byte_at_which_it_may_have_been_killed(tmp_path: Path) -> None:
    """Plain runs try every fourth byte and those at line ends."""
    whole = "".join(text + "\n" for text in LINES).encode()
    path = tmp_path / "out.jsonl"
    some = [at for at in range(len(whole) + 1) if at % examples(4, 1) == 0 or b"\n" in whole[at - 1 : at + 1]]
    for size in some:
        path.unlink(missing_ok=True)  # what is cut to nothing and written again, file systems bring to the disk at once
        path.write_bytes(whole[:size])
        found: list[ScoredText] = []
        with appending(path, found.append) as add:
            assert found == READ[: whole[:size].count(b"\n")]
            for text in LINES[len(found) :]:
                add([text[:9], text[9:]])
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "content",
    [
        b"My diary\n",
        b"My diary",
        b'{"name": 1}\n',
        b'[1]\n{"text": 1}\n',
        b'{"text": 1}\nMy dia',
        b"{}\n",
        b'{"text": 1\n',
        b"\n",
        b"\xff\n",
        b'{"text": "my only notes"}',
        b'{"text": "my only notes", "more": 1}',
        b'{"text": "my only notes", "mo',
        b'{"text": "my \\"only\\", \\"sha256\\": notes"}',
        b'{"text": 5}',
        b'{"text": 5',
        b'{"name": "',
        b'{"sha256": 1, "text": 2}\n',
        b'{"text": ' + b"[" * 200_000 + b"\n",
    ],
)
def test_what_is_not_ours_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(NpgptError, match=r"out\.jsonl"), appending(path, print):
        pass
    assert path.read_bytes() == content


def test_an_empty_file_stays_and_one_that_was_made_goes_where_nothing_is_added(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    for name in ("empty.jsonl", "new.jsonl"):
        with pytest.raises(KeyError), appending(tmp_path / name, print):
            raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["empty.jsonl"]


def test_what_was_cut_short_stays_until_something_is_added(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"text": "a", "sha')
    found: list[ScoredText] = []
    with appending(path, found.append) as add:
        assert found == []
        assert path.read_bytes() == b'{"text": "a", "sha'
        add([LINES[0]])
        assert path.read_text() == LINES[0] + "\n"  # at once, not at the end
        add([LINES[1]])
    assert path.read_text() == f"{LINES[0]}\n{LINES[1]}\n"


def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="this system has no file locks")
    path = tmp_path / "out.jsonl"
    with (
        appending(path, print),
        pytest.raises(NpgptError, match="another process is writing to"),
        appending(path, print),
    ):
        pass
    with appending(path, print) as add:
        add([LINES[0]])
    assert path.read_text() == LINES[0] + "\n"


def known(found: list[Any], settings: dict[str, Any] = SETTINGS) -> Known:
    """Return what a file of these records contains."""
    of_file = Known("out.jsonl", settings)
    for record in found:
        of_file.add(ScoredText(*record))
    return of_file


def test_a_text_is_done_as_often_as_it_is_there() -> None:
    names, texts = list(TEXTS), list(TEXTS.values())

    def done(known: Known, names: list[str], texts: list[str]) -> list[int]:
        of_all = enumerate(zip(names, texts, strict=True))
        return [n for n, (name, text) in of_all if known.has(name) and known.take(name, sha256(text))]

    assert done(known(READ), names, texts) == [0, 1, 2]
    assert done(known(READ[1:]), names, texts) == [1, 2]
    assert done(known(READ), [names[0], "new", names[0]], [texts[0], "b", texts[0]]) == [0]
    assert done(known([READ[0], *READ]), [names[0], "new", names[0]], [texts[0], "b", texts[0]]) == [0, 2]
    assert known(READ).sums.totals() == total(found[3] for found in READ)
    with pytest.raises(NpgptError, match=r"new is not the same text as the new in out\.jsonl: use another file"):
        done(known([("new", *READ[0][1:])]), ["new"], ["b"])
    with pytest.raises(NpgptError, match=r"out\.jsonl was made with stride 4, but now it is 5: use another file"):
        known(READ, SETTINGS | {"stride": 5})


@pytest.mark.parametrize("longest", [1, 2, 100, 300, 400, 500])
def test_of_a_long_record_the_beginning_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    """The lists of tokens are skipped: a record of 50 MB of text is a line of a gigabyte."""
    monkeypatch.setattr(records, "LONGEST", longest)
    path = tmp_path / "out.jsonl"
    path.write_text("".join(text + "\n" for text in LINES) + LINES[0][:-7])
    found: list[ScoredText] = []
    if longest < 400:  # not even the sums are within
        with pytest.raises(NpgptError, match="line 1 is not a record that npgpt score writes"), appending(path, print):
            pass
        return
    with appending(path, found.append) as add:
        add([LINES[0]])
    assert found == READ
    assert path.read_text() == "".join(text + "\n" for text in [*LINES, LINES[0]])
    for wrong in (LINES[0][:-1], LINES[0] + " ", LINES[0].replace('"scored": 3', '"scored": "3"')):
        path.write_text(wrong + "\n")
        with pytest.raises(NpgptError, match="line 1 is not a record that npgpt score writes"), appending(path, print):
            pass


def test_a_record_is_written_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = LINES[2]
    monkeypatch.setattr(records, "VALUES", 2)
    parts = list(records.line("", sha256("naïve"), made("naïve"), SETTINGS))
    assert "".join(parts) == expected == json.dumps(json.loads(expected))
    assert max(map(len, parts[1:])) < 40
