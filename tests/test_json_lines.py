from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from npgpt.errors import NpgptError
from npgpt.json_lines import appending, line

RECORDS: list[dict[str, Any]] = [{"text": "a\nb"}, {"text": "日本", "ids": [1, 2]}, {"text": "", "more": None}]


def test_one_line_each_in_ascii() -> None:
    assert line({"text": "é\n"}) == '{"text": "\\u00e9\\n"}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        line({"text": float("nan")})


def test_every_byte_at_which_it_may_have_been_killed(tmp_path: Path) -> None:
    whole = "".join(line(record) + "\n" for record in RECORDS).encode()
    path = tmp_path / "out.jsonl"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with appending(path, ["text"]) as (records, add):
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
    ],
)
def test_what_is_not_ours_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(NpgptError, match=r"out\.jsonl"), appending(path, ["text"]):
        pass
    assert path.read_bytes() == content


def test_every_key_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"text": 1, "sha256": 2}\n')
    with appending(path, ["text", "sha256"]) as (records, _):
        assert records == [{"text": 1, "sha256": 2}]
    with pytest.raises(NpgptError, match="line 1 is none of ours"), appending(path, ["text", "settings"]):
        pass


def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="this system has no file locks")
    path = tmp_path / "out.jsonl"
    with (
        appending(path, ["text"]),
        pytest.raises(NpgptError, match="another process is adding to"),
        appending(path, ["text"]),
    ):
        pass
    with appending(path, ["text"]) as (records, add):
        add({"text": 1})
    assert json.loads(path.read_text()) == {"text": 1}
    assert records == []
