"""npgpt check gives exit code 2 for unreadable input, as distinct from 1 for numbers that differ.

Files of each kind are damaged at random, inside and out, 1,100 of each in Hypothesis's profile `thorough`.
"""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt.oracle import files
from tests.support import writers
from tests.support.damage import (
    CONFIG,
    IDS,
    LOGITS,
    ONE,
    damaged,
    damaged_within,
    npy,
    outcome,
    without_comparing,
    zipped,
)
from tests.support.models import store
from tests.support.thorough import examples

HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 4, 40), }"


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return without_comparing(tmp_path, monkeypatch)


def with_header(header: str, version: int = 1) -> bytes:
    """Return a .npy with this header."""
    text = header.encode("latin-1" if version < 3 else "utf-8")
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + bytes(640)


def npz(**arrays: Any) -> bytes:
    """Return an .npz with logits and ids or other values; bytes become a member unchanged."""
    whole = {"logits": LOGITS, "input_ids": IDS} | arrays
    return zipped({f"{name}.npy": x if isinstance(x, bytes) else npy(np.asarray(x)) for name, x in whole.items()})


def state(*header: int, tail: bytes = b"") -> bytes:
    """Return llm.c's debug state."""
    return struct.pack("<256i", *header, *[0] * (256 - len(header))) + tail


RUN = IDS.astype("<i4").tobytes() * 2 + LOGITS.tobytes() + bytes(4)  # the last is the loss
KINDS: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {  # a whole file, and the options that it needs
    "npz": (npz, ()),
    "npy": (lambda: npy(LOGITS), ONE),
    "safetensors": (lambda: writers.safetensors({"logits": LOGITS}), ONE),
    "pt": (lambda: writers.torch_zip({"logits": LOGITS}), ONE),
    "json": (lambda: json.dumps({"logits": LOGITS.tolist(), "input_ids": IDS.tolist()}).encode(), ()),
    "csv": (lambda: "\n".join(",".join(map(str, row)) for row in LOGITS[0].tolist()).encode(), ONE),
    "raw": (LOGITS.tobytes, (*ONE, "--shape", "4,40")),
    "state": (lambda: state(20240327, 2, 1, 4, tail=RUN), ()),
}
SUFFIX = {"raw": "bin", "state": "bin"}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_or_compared(read_only: Path, kind: str) -> None:
    make, arguments = KINDS[kind]
    whole, path = make(), read_only / f"theirs.{SUFFIX.get(kind, kind)}"
    path.write_bytes(whole)
    assert outcome(path.name, *arguments)[0] == 1
    codes = []
    for seed in range(examples(8, 1100)):
        rng = random.Random(f"{kind} {seed}")
        inside = whole.startswith(b"PK") and rng.random() < 0.7
        path.write_bytes((damaged_within if inside else damaged)(whole, rng))
        codes.append(outcome(path.name, *arguments)[0])
    assert 2 in codes


ODD: dict[str, tuple[str, bytes]] = {  # a file's name, and what its error says, beside its content
    "object.npz": ("logits cannot be read as NumPy's: Object", npz(logits=with_header(HEADER.replace("<f4", "|O")))),
    "no array.npz": ("no array.npz: there is nothing to compare", npz(logits=b"hello")),
    "empty member.npz": ("there is nothing to compare", npz(logits=b"")),
    "text.npz": ("logits must be numbers, not <U1", npz(logits=[["a"]])),
    "structured.npz": ("logits must be numbers", npz(logits=np.zeros((1, 4, 40), "i4,f4"))),
    "complex.npz": ("logits must be numbers, not complex64", npz(logits=LOGITS.astype("c8"))),
    "times.npz": ("logits must be numbers, not datetime64", npz(logits=np.zeros((1, 4, 40), "M8[s]"))),
    "mask.npz": ("attention_mask must be numbers", npz(attention_mask=np.zeros((1, 4), "i4,f4"))),
    "mask of text.npz": ("attention_mask must be numbers", npz(attention_mask=[list("1111")])),
    "ids of floats.npz": ("integers", npz(input_ids=IDS + 0.5)),
    "ids of nan.npz": ("integers", npz(input_ids=IDS * np.nan)),
    "ids of truth.npz": ("integers", npz(input_ids=IDS > 0)),
    "ids beyond.npz": ("out of range", npz(input_ids=IDS + 10**12)),
    "two ids.npz": ("input_ids and tokens, which mean the same and differ", npz(tokens=IDS[:, ::-1])),
    "huge.npz": ("cannot be read as NumPy's", npz(logits=with_header(HEADER.replace("40", "99999999999")))),
    "negative.npz": ("cannot be read as NumPy's", npz(logits=with_header(HEADER.replace("(1", "(-1")))),
    "unclosed.npz": ("cannot be read as NumPy's", npz(logits=with_header("{'descr'"))),
    "deep.npz": ("cannot be read as NumPy's", npz(logits=with_header("(" * 3000))),
    "unclosed.npy": ("cannot be read as NumPy's", with_header("{'descr': '<f4', ")),
    "call.npy": ("cannot be read as NumPy's", with_header(HEADER.replace("40", "exit()"))),
    "dtype.npy": ("cannot be read as NumPy's", with_header(HEADER.replace("'<f4'", "5"))),
    "version.npy": ("cannot be read as NumPy's", with_header(HEADER, 9)),
    "deep.json": ("cannot be read as nested lists", b"[" * 100_000),
    "deep objects.json": ("cannot be read as nested lists", b'{"a":' * 100_000),
    "digits.json": ("cannot be read as nested lists", b"[[" + b"9" * 5000 + b"]]"),
    "ragged.json": ("logits: a list is not an array of numbers", b"[[1], [1, 2]]"),
    "words.json": ("logits: a list is not an array of numbers", b'[[1, "x", {}]]'),
    "twice.json": ("duplicate key 'logits'", b'{"logits": [[1]], "logits": [[2]]}'),
    "nothing.json": ("nothing.json: there is nothing to compare", b"{}"),
    "number.json": ("", b"3"),
    "null.json": ("", b"null"),
    "utf-16.json": ("cannot be read as nested lists", "[[1]]".encode("utf-16")),
    "utf-8.json": ("cannot be read as nested lists", b"[[\xff]]"),
    "empty.json": ("cannot be read as nested lists", b""),
    "header.csv": ("cannot be read as rows of numbers", b"a,b\n1,2"),
    "ragged.csv": ("logits: a list is not an array of numbers", b"1,2\n3"),
    "long field.csv": ("cannot be read as rows of numbers", b'"' + b"9" * 200_000),
    "nothing.csv": ("", b"\n\n"),
    "zip.npz": ("has 0 data.pkl", zipped({"a": b"b"})),
    "empty zip.npz": ("has 0 data.pkl", zipped({})),
    "state.bin": ("its header says [-1, 4]", state(20240327, 1, -1, 4, tail=RUN)),
    "state of nothing.bin": ("its header says [0, 4]", state(20240327, 1, 0, 4, tail=RUN)),
    "long state.bin": ("its header says", state(20240327, 1, 2**31 - 1, 2**31 - 1, tail=RUN)),
    "state cut short.bin": ("truncated", state(20240327)[:5]),
    "state of four bytes.bin": ("truncated", state(20240327)[:4]),
    "pickle.pt": ("is a bare pickle", b"\x80\x02}."),
    "empty.pt": ("is empty", b""),
    "empty.npz": ("is empty", b""),
}  # fmt: skip


OWN_IDS = (b"PK\x03\x04", struct.pack("<i", 20240327))  # how the files begin that hold ids


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_refused(read_only: Path, name: str) -> None:
    message, content = ODD[name]
    (read_only / name).write_bytes(content)
    code, error = outcome(name, *(() if content.startswith(OWN_IDS) else ONE))
    assert code == 2
    assert message in error


def test_what_is_no_file_is_refused(read_only: Path) -> None:
    (read_only / "folder.npz").mkdir()
    (read_only / "dangling.npz").symlink_to("nowhere")
    (read_only / "loop").symlink_to("loop")
    names = ["folder.npz", "dangling.npz", "loop", "missing.json", "", "n" * 300, ".", "folder.npz/x"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(read_only / "fifo.csv")
        names.append("fifo.csv")
    for name in names:
        assert outcome(name, *ONE)[0] == 2
    for name in ("sparse.json", "sparse.csv"):
        (read_only / name).write_bytes(b"1")
        os.truncate(read_only / name, 10**10)
        error = outcome(name, *ONE)[1]
        assert "is too large for a list of numbers: 10000000000 bytes exceed the limit of 2147483648" in error


def test_a_bomb_is_refused_and_zeros_are_not(read_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds are lowered; a ZIP's declared sizes are counted before unpacking."""
    zeros = io.BytesIO()
    np.savez_compressed(zeros, logits=np.zeros((1, 4, 40), np.float32), input_ids=IDS, other=np.zeros(50_000))
    path = read_only / "zeros.npz"
    path.write_bytes(zeros.getvalue())
    size = path.stat().st_size
    assert size < 2000
    assert outcome(path.name)[0] == 1
    monkeypatch.setattr(files, "UNPACKED", 400_000)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    code, error = outcome(path.name)
    assert code == 2
    assert f"zeros.npz takes {size} bytes and would unpack to 401" in error
    assert ", above 400000: keep only what is to be compared, or save it without compression" in error


def test_what_is_large_itself_may_be_compressed(read_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "UNPACKED", 0)
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        content = zipped({"logits.npy": npy(LOGITS), "input_ids.npy": npy(IDS)}, compression)
        (read_only / "theirs.npz").write_bytes(content)
        assert outcome("theirs.npz")[0] == 1


@pytest.mark.usefixtures("few_mistakes")
def test_greedy_ids_beside_logits_are_left_out_and_said(tmp_path: Path) -> None:
    store(tmp_path, CONFIG)
    model = npgpt.load(tmp_path)
    np.savez(tmp_path / "x.npz", logits=model(IDS), input_ids=IDS, greedy_ids=[1, 2])
    report = npgpt.check(tmp_path / "x.npz", weights=model)
    assert report.matches
    assert "greedy ids are ignored" in str(report)


def test_npgpts_own_mistakes_are_not_hidden(read_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only exceptions from other packages are attributed to a file's content."""
    for name, mistake in (("a.npz", "_sorted"), ("a.json", "_numbers"), ("a.json", "_sorted"), ("a.csv", "_numbers")):
        (read_only / name).write_bytes({"npz": npz(), "json": b"[[1]]", "csv": b"1,2"}[name[2:]])
        with monkeypatch.context() as patched:
            patched.setattr(files, mistake, lambda *_: {"": 0}["npgpt's own"])
            with pytest.raises(KeyError, match="npgpt's own"):
                files.read(name)
