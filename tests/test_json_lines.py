from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from npgpt.errors import NpgptError
from npgpt.scoring.json_lines import appending, line

KEYS = ("text", "sha256")
RECORDS: list[dict[str, Any]] = [
    {"text": "a\nb", "sha256": "1"},
    {"text": '日本"', "sha256": "2", "ids": [1, 2]},
    {"text": "", "sha256": "3", "more": None},
]


def known(found: dict[str, Any]) -> dict[str, Any] | None:
    """Any object with the two keys."""
    return found if list(found)[:2] == list(KEYS) else None


def test_one_line_each_in_ascii() -> None:
    assert line({"text": "é\n"}) == '{"text": "\\u00e9\\n"}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        line({"text": float("nan")})


def test_every_byte_at_which_it_may_have_been_killed(tmp_path: Path) -> None:
    whole = "".join(line(record) + "\n" for record in RECORDS).encode()
    path = tmp_path / "out.jsonl"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with appending(path, KEYS, known) as (records, add):
            assert records == RECORDS[: whole[:size].count(b"\n")]
            for record in RECORDS[len(records) :]:
                add(record)
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
        b'{"text": 5}',
        b'{"name": "',
        b'{"sha256": 1, "text": 2}\n',
        b'{"text": ' + b"[" * 200_000 + b"\n",
    ],
)
def test_what_is_not_ours_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(NpgptError, match=r"out\.jsonl"), appending(path, KEYS, known):
        pass
    assert path.read_bytes() == content


def test_an_empty_file_stays_and_one_that_was_made_goes_where_nothing_is_added(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    for name in ("empty.jsonl", "new.jsonl"):
        with pytest.raises(KeyError), appending(tmp_path / name, KEYS, known):
            raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["empty.jsonl"]


def test_what_was_cut_short_stays_until_something_is_added(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"text": "a", "sha')
    with appending(path, KEYS, known) as (records, add):
        assert records == []
        assert path.read_bytes() == b'{"text": "a", "sha'
        add(RECORDS[0])
        assert json.loads(path.read_bytes()) == RECORDS[0]  # at once, not at the end


def test_what_is_whole_is_read_as_it_wants(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"text": "a", "sha256": "b"}\n' * 2)
    with appending(path, KEYS, lambda found: found["sha256"]) as (records, _):
        assert records == ["b", "b"]


def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="this system has no file locks")
    path = tmp_path / "out.jsonl"
    with (
        appending(path, KEYS, known),
        pytest.raises(NpgptError, match="another process is adding to"),
        appending(path, KEYS, known),
    ):
        pass
    with appending(path, KEYS, known) as (records, add):
        add(RECORDS[0])
    assert json.loads(path.read_text()) == RECORDS[0]
    assert records == []
