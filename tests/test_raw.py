"""A trace as a folder of raw numbers: written, read back by check, and refused if anything does not fit."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npgpt import tracing
from npgpt.checkpoints import raw
from npgpt.errors import NpgptError
from npgpt.oracle import files
from tests.support.austen import AUSTEN
from tests.support.command import here, refused
from tests.support.conversion import listed

TEXT = "It is a truth"


def test_a_trace_is_files_that_any_language_reads(tmp_path: Path) -> None:
    code, out, error = here("trace", TEXT, "--to", "raw", "d", "--only", "logits", "--only", "h.0.attn.q", cwd=tmp_path)
    assert (code, out, error) == (0, "", "npgpt: d: 2 intermediates of 4 tokens, float32, 68,608 bytes\n")
    assert listed(tmp_path / "d") == ["h.0.attn.q.bin", "logits.bin", "manifest.json", "token_ids.bin"]
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text("utf-8"))
    expected = tracing.trace(TEXT)
    assert (manifest["text"], manifest["token_ids"]) == (TEXT, AUSTEN.encode_prompt(TEXT))
    assert manifest["config"]["n_head"] == 6
    assert [entry["name"] for entry in manifest["arrays"]] == ["token_ids", "h.0.attn.q", "logits"]
    for entry in manifest["arrays"][1:]:
        content = (tmp_path / "d" / entry["file"]).read_bytes()
        array = expected[entry["name"]]
        assert (entry["dtype"], entry["shape"]) == ("float32", list(array.shape))
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert struct.unpack(f"<{array.size}f", content) == tuple(array.reshape(-1).tolist())
    assert struct.unpack("<4q", (tmp_path / "d" / "token_ids.bin").read_bytes()) == tuple(manifest["token_ids"])


@pytest.mark.usefixtures("few_mistakes")
def test_check_reads_it_back(tmp_path: Path) -> None:
    assert here("trace", TEXT, "--to", "raw", "d", "--only", "h.2.attn.*", "--only", "logits", cwd=tmp_path)[0] == 0
    code, out, _ = here("check", "d", cwd=tmp_path)
    assert (code, out.splitlines()[0]) == (0, "Matches: rounding in float32 explains every difference, in 10 stages.")
    (tmp_path / "d" / "h.2.attn.heads.bin").unlink()
    assert "h.2.attn.heads.bin does not exist" in refused("check", "d", cwd=tmp_path)


dtypes = st.sampled_from(["float16", "float32", "float64", "int32", "int64"])


@given(st.lists(st.tuples(dtypes, st.lists(st.integers(0, 3), max_size=4)), min_size=1, max_size=4))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[str, list[int]]]) -> None:
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("raw") / "d"
    arrays = {f"a{n}": (100 * rng.standard_normal(shape)).astype(dtype) for n, (dtype, shape) in enumerate(kinds)}
    raw.write(folder, arrays, {"text": "é"})
    found, manifest = raw.read(folder)
    assert (list(found), manifest["text"]) == (list(arrays), "é")
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found[name], array)


def hand_made(folder: Path, **changes: Any) -> Path:
    """Write a folder as a port might: one array without a checksum, and ids in the manifest; return the folder."""
    folder.mkdir()
    (folder / "x.bin").write_bytes(struct.pack("<3f", 1, -2, 0.5))
    entry = {"name": "logits", "dtype": "float32", "shape": [1, 3], "file": "x.bin"} | changes
    manifest = {"token_ids": [7], "arrays": [{key: value for key, value in entry.items() if value is not None}]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_port_needs_little(tmp_path: Path) -> None:
    given = files.read(hand_made(tmp_path / "d"))
    assert given.arrays["logits"].tolist() == [[1, -2, 0.5]]
    assert given.token_ids is not None
    assert given.token_ids.tolist() == [7]


def test_bfloat16_is_widened(tmp_path: Path) -> None:
    folder = hand_made(tmp_path / "d", dtype="bfloat16", shape=[2])
    (folder / "x.bin").write_bytes(struct.pack("<2H", 0x3F80, 0xC040))  # 1 and −3
    assert raw.read(folder)[0]["logits"].tolist() == [1, -3]
    assert raw.read(folder)[0]["logits"].dtype == np.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "entry 0 of 'arrays' has no name"),
        ({"name": ""}, "entry 0 of 'arrays' has no name"),
        ({"dtype": "complex64"}, "logits: dtype must be one of float16, .*, not 'complex64'"),
        ({"dtype": None}, "not None"),
        ({"dtype": ["float32"]}, r"not \['float32'\]"),
        ({"shape": [1, 4]}, r"x.bin has 12 bytes, but \[1, 4\] in float32 takes 16"),
        ({"shape": [1, -3]}, r"shape must be a list of whole numbers, not \[1, -3\]"),
        ({"shape": [1.0, 3]}, "shape must be"),
        ({"shape": [True, 3]}, "shape must be"),
        ({"shape": [2**62, 2**62]}, "x.bin has 12 bytes"),
        ({"shape": [0, 2**62]}, "shape is too large for an array"),
        ({"shape": [0, 2**62, 2**62]}, "shape is too large for an array"),
        ({"shape": [1] * 65}, "shape must be"),
        ({"shape": 3}, "shape must be"),
        ({"file": None}, "file must be the name of a file in the same folder, not None"),
        ({"file": "../x.bin"}, "file must be"),
        ({"file": "sub/x.bin"}, "file must be"),
        ({"file": ".."}, "file must be"),
        ({"file": "y.bin"}, "y.bin does not exist"),
        ({"sha256": "0" * 64}, "x.bin is damaged: its sha256 is not the one in manifest.json"),
        ({"sha256": 5}, "is damaged"),
    ],
)
def test_an_entry_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(NpgptError, match=message):
        raw.read(hand_made(tmp_path / "d", **change))


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "twice": (lambda m: m | {"arrays": m["arrays"] * 2}, "lists the array 'logits' twice"),
    "none": (lambda m: m | {"arrays": []}, "must list the folder's arrays"),
    "no list": (lambda m: {"token_ids": [7]}, "must list the folder's arrays"),
    "no object": (lambda m: [m], "must be a JSON object"),
    "text": (lambda m: m | {"arrays": ["logits"]}, "entry 0 of 'arrays' has no name"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path: Path, kind: str) -> None:
    change, message = MANIFESTS[kind]
    path = hand_made(tmp_path / "d") / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(NpgptError, match=message):
        raw.read(path.parent)


def test_two_kinds_of_ids_must_agree(tmp_path: Path) -> None:
    raw.write(tmp_path / "d", {"token_ids": np.array([[1, 2]]), "logits": np.zeros((1, 2, 4))}, {"token_ids": [1, 3]})
    with pytest.raises(NpgptError, match="has a file of ids that differ from token_ids in manifest"):
        files.read(tmp_path / "d")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "raw", "full"], "--to raw: full exists and is not an empty folder"),
        (["--to", "raw", "file"], "--to raw: file exists and is not an empty folder"),
        (["--to", "raw", "no/d"], "--to raw no/d: there is no folder no"),
        (["--to", "npz", "d"], "--to writes raw or llm.c, not 'npz'; for .npz or .safetensors use -o FILE"),
        (["--to", "raw", "d", "--only", "x"], "no intermediate is called 'x'"),
        (["--to", "raw"], "--to"),
        (["--to", "raw", "d", "-o", "x.npz"], "--to"),
    ],
)
def test_bad_input_writes_nothing(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_bytes(b"kept")
    (tmp_path / "file").write_bytes(b"kept")
    assert message in refused("trace", TEXT, *arguments, cwd=tmp_path)
    assert (listed(tmp_path), listed(tmp_path / "full")) == (["file", "full"], ["kept"])


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dumps", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*d'"):
        raw.write(tmp_path / "d", {"x": np.zeros(2, np.float32)}, {})
    assert listed(tmp_path) == []


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    assert "is a folder without manifest.json" in refused("check", str(tmp_path))
