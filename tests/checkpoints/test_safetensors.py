from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from npgpt.checkpoints import formats, safetensors
from npgpt.checkpoints.tensor import FLOATS
from npgpt.errors import NpgptError
from tests.support.thorough import examples


def put(path: Path, header: object, data: bytes = b"", *, raw: bytes | None = None, length: int | None = None) -> Path:
    """Write a file by hand; raw replaces the header's JSON, length its true length."""
    text = json.dumps(header).encode() if raw is None else raw
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_literal_bytes(tmp_path: Path) -> None:
    """The bytes are the example in the format's description."""
    data = struct.pack("<4f", 1.0, -2.0, 0.5, 3.25)
    file = safetensors.read(put(tmp_path / "x", {"a": entry("F32", [2, 2], 0, 16), "__metadata__": {"k": "v"}}, data))
    assert file.tensors["a"].load().tolist() == [[1.0, -2.0], [0.5, 3.25]]


def test_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.write(
        path, {"b": np.array([1.0, 2.0], np.float32), "a": np.array([[0.5]], np.float16)}, {"source": "me"}
    )
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    assert (8 + length) % 64 == 0
    assert json.loads(content[8 : 8 + length]) == {
        "__metadata__": {"format": "pt", "source": "me"},
        "b": entry("F32", [2], 0, 8),
        "a": entry("F16", [1, 1], 8, 10),
    }
    assert content[8 + length :] == struct.pack("<2f", 1.0, 2.0) + struct.pack("<e", 0.5)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


ARRAYS = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.sampled_from([np.float16, np.float32, np.float64]).flatmap(
        lambda dtype: hnp.arrays(
            dtype,
            hnp.array_shapes(min_dims=0, min_side=0, max_dims=4, max_side=5),
            elements=st.floats(allow_nan=False, width=np.dtype(dtype).itemsize * 8),  # type: ignore[arg-type]
        )
    ),
    max_size=6,
)


@given(arrays=ARRAYS, transpose=st.booleans())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, Any], transpose: bool) -> None:
    path = tmp_path_factory.mktemp("round") / "x"
    if transpose:
        arrays = {name: array.T for name, array in arrays.items()}
    safetensors.write(path, arrays)
    file = safetensors.read(path)
    assert set(file.tensors) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.tensors[name].stored(), array)
        assert file.tensors[name].stored().dtype == array.dtype
        loaded = file.tensors[name].load("float64")
        assert loaded.dtype == np.float64
        np.testing.assert_array_equal(loaded, array.astype(np.float64))


def test_aligned_float32_is_the_mapping_itself(tmp_path: Path) -> None:
    path = tmp_path / "x"
    safetensors.write(path, {"w": np.arange(6, dtype=np.float32).reshape(2, 3)})
    file = safetensors.read(path)
    weight = file.tensors["w"].load()
    assert np.shares_memory(weight, np.frombuffer(file.tensors["w"].data, np.uint8))
    assert not weight.flags.writeable
    assert not file.tensors["w"].misaligned


@pytest.mark.parametrize("odd", range(1, 8))
def test_an_odd_header_length_costs_one_aligned_copy(tmp_path: Path, odd: int) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    text = json.dumps({"w": entry("F32", [2, 3], 0, 24)}).encode()
    text += b" " * ((odd - 8 - len(text)) % 8)
    file = safetensors.read(put(tmp_path / "x", None, values.tobytes(), raw=text))
    weight = file.tensors["w"].load()
    np.testing.assert_array_equal(weight, values)
    assert weight.flags.aligned
    assert np.shares_memory(weight, np.frombuffer(file.tensors["w"].data, np.uint8)) == (odd == 4)
    assert file.tensors["w"].misaligned == (odd != 4)


def test_half_precision_is_widened_exactly(tmp_path: Path) -> None:
    half = np.array([0, 1, -2.5, 65504, 6e-8, np.inf, -np.inf, np.nan], np.float16)
    bits = np.array([0x0000, 0x3F80, 0xC020, 0x7F7F, 0x0001, 0x7F80, 0xFF80, 0x7FC0], "<u2")
    path = put(
        tmp_path / "x",
        {"h": entry("F16", [8], 0, 16), "b": entry("BF16", [8], 16, 32)},
        half.tobytes() + bits.tobytes(),
    )
    file = safetensors.read(path)
    for dtype in ("float32", "float64"):
        np.testing.assert_array_equal(file.tensors["h"].load(dtype), half.astype(dtype))
        brain = [0, 1, -2.5, (2 - 2**-7) * 2.0**127, 2.0**-133, np.inf, -np.inf, np.nan]
        np.testing.assert_array_equal(file.tensors["b"].load(dtype), np.array(brain, dtype))


def test_float64_is_rounded_to_float32_and_never_to_infinity(tmp_path: Path) -> None:
    path = tmp_path / "x"
    safetensors.write(path, {"fits": np.array([1 + 2**-30, np.inf]), "too large": np.array([1.0, 1e39])})
    file = safetensors.read(path)
    np.testing.assert_array_equal(file.tensors["fits"].load(), np.array([1, np.inf], np.float32))
    with pytest.raises(NpgptError, match="too large has values too large for float32"):
        file.tensors["too large"].load()
    assert file.tensors["too large"].load("float64")[1] == 1e39


@pytest.mark.parametrize("dtype", ["I64", "BOOL", "U8", "F8_E4M3", "F4", "C64"])
def test_a_weight_is_a_float(tmp_path: Path, dtype: str) -> None:
    size = {"I64": 16, "F4": 1, "C64": 16}.get(dtype, 2)
    file = safetensors.read(put(tmp_path / "x", {"mask": entry(dtype, [2], 0, size)}, bytes(size)))
    with pytest.raises(NpgptError, match=f"mask is {dtype}, not one of float16, bfloat16, float32, float64"):
        file.tensors["mask"].load()


OK = entry("F32", [1], 0, 4)
FOUR = b"abcd"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_bytes(b""), "is empty: 0 bytes"),
        (lambda p: p.write_bytes(b"1234567"), "7 bytes"),
        (lambda p: put(p, {}, length=16_000_001), "header length 16000001 exceeds 16000000"),
        (lambda p: put(p, {}, length=2**64 - 1), "header length 18446744073709551615 exceeds"),
        (lambda p: put(p, {}, length=3), "its header ends at byte 11, the file at 10"),
        (lambda p: put(p, None, raw=b'{"\xff": 1}'), "not valid JSON: 'utf-8' codec"),
        (lambda p: put(p, None, raw=b"{"), "not valid"),
        (lambda p: put(p, None, raw=b""), "not valid"),
        (lambda p: put(p, None, raw=b"[" * 100_000), "not valid"),
        (lambda p: put(p, None, raw=b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "not valid"),
        (lambda p: put(p, None, raw=b'{"a": NaN}'), "NaN is not JSON"),
        (lambda p: put(p, None, raw=b'{"a": ' + b"9" * 5000 + b"}"), "not valid"),
        (lambda p: put(p, []), "must be a JSON object, not list"),
        (lambda p: put(p, 3), "must be a JSON object, not int"),
        (
            lambda p: put(p, None, FOUR, raw=b'{"a": %s, "a": %s}' % ((json.dumps(OK).encode(),) * 2)),
            "duplicate key 'a'",
        ),
        (lambda p: put(p, {"__metadata__": {"a": 1}}), "__metadata__ must map strings to strings"),
        (lambda p: put(p, {"__metadata__": False}), "__metadata__ must map strings to strings"),
        (lambda p: put(p, {"a": 1}), "entry for a must have dtype, shape and data_offsets"),
        (lambda p: put(p, {"a": {"dtype": "F32", "shape": [1]}}, FOUR), "must have dtype, shape and data_offsets"),
        (lambda p: put(p, {"a": entry("F33", [1], 0, 4)}, FOUR), "unknown dtype 'F33'"),
        (lambda p: put(p, {"a": entry(["F32"], [1], 0, 4)}, FOUR), "unknown dtype"),  # type: ignore[arg-type]
        (lambda p: put(p, {"a": entry("F32", [True], 0, 4)}, FOUR), "the shape of a must be a list of sizes"),
        (lambda p: put(p, {"a": entry("F32", [-1], 0, 4)}, FOUR), "the shape of a must be a list of sizes"),
        (lambda p: put(p, {"a": entry("F32", [1.0], 0, 4)}, FOUR), "the shape of a must be a list of sizes"),
        (lambda p: put(p, {"a": entry("F32", "1", 0, 4)}, FOUR), "the shape of a must be a list of sizes"),  # type: ignore[arg-type]
        (lambda p: put(p, {"a": entry("F32", [2**63], 0, 4)}, FOUR), "the shape of a must be a list of sizes"),
        (lambda p: put(p, {"a": entry("F32", [2**40, 2**40], 0, 4)}, FOUR), "impossible shape"),
        (lambda p: put(p, {"a": entry("F32", [2**62] * 100_000, 0, 4)}, FOUR), "impossible shape"),
        (lambda p: put(p, {"a": entry("F32", [1] * 65, 0, 4)}, FOUR), "impossible shape"),
        (lambda p: put(p, {"a": entry("F32", [0, 2**62], 0, 0)}), "impossible shape"),
        (lambda p: put(p, {"a": entry("F32", [1], False, 4)}, FOUR), "the data_offsets of a must be a list of sizes"),
        (lambda p: put(p, {"a": entry("F32", [1], 0, "4")}, FOUR), "the data_offsets of a must be a list of sizes"),
        (lambda p: put(p, {"a": OK | {"data_offsets": [0, 2, 4]}}, FOUR), "must have two data_offsets"),
        (lambda p: put(p, {"a": entry("F32", [1], 4, 0)}, FOUR), "a spans bytes"),
        (lambda p: put(p, {"a": entry("F32", [1], 4, 8)}, bytes(8)), "must begin at"),
        (
            lambda p: put(p, {"a": OK, "b": entry("F32", [1], 8, 12)}, bytes(12)),
            "b spans bytes .* where the previous tensor",
        ),
        (lambda p: put(p, {"a": OK, "b": entry("F32", [1], 2, 6)}, bytes(6)), "b spans bytes"),
        (lambda p: put(p, {"a": entry("F32", [2], 0, 4)}, FOUR), r"F32 \[2\], takes 8 bytes, but its offsets span 4"),
        (lambda p: put(p, {"a": entry("F4", [3], 0, 1)}, b"a"), r"takes 1.5 bytes"),
        (lambda p: put(p, {"a": OK}, b"abc"), "end at byte .* the file at"),
        (lambda p: put(p, {"a": OK}, b"abcde"), "end at byte .* the file at"),
        (lambda p: put(p, {}, b"a"), "end at byte"),
    ],
)
def test_whatever_is_malformed_is_refused_in_one_line(tmp_path: Path, write: Any, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    write(path)
    with pytest.raises(NpgptError, match=message) as error:
        safetensors.read(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert "bad.safetensors" in str(error.value)


def good_file() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a": entry("F32", [2, 3], 0, 24),
        "b": entry("F16", [3], 24, 30),
        "c": entry("BF16", [0, 7], 30, 30),
        "d": entry("F64", [], 30, 38),
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(range(38))


GOOD = good_file()


def read_all(path: Path) -> None:
    """Return arrays of the announced shapes, or None for npgpt's error."""
    try:
        file = safetensors.read(path)
        for tensor in file.tensors.values():
            if tensor.dtype in FLOATS:
                assert tensor.load("float64").shape == tensor.shape
    except NpgptError as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_truncated_anywhere(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x"
    path.write_bytes(GOOD[:length])
    with pytest.raises(NpgptError):
        safetensors.read(path)


DAMAGE = st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6)


@given(DAMAGE)
@settings(max_examples=examples(75, 600))
def test_bytes_damaged_anywhere(tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[int, int]]) -> None:
    content = bytearray(GOOD)
    for position, value in damage:
        content[position] = value
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    read_all(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
LIKELY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*safetensors.BITS, "F33", 32]),
        "shape": st.lists(st.integers(-1, 9) | JSON, max_size=3),
        "data_offsets": st.lists(st.integers(-1, 40) | JSON, max_size=3),
    }
)


@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), LIKELY | JSON, max_size=4), st.binary(max_size=40)
)
@settings(max_examples=examples(75, 600))
def test_headers_of_any_kind(tmp_path_factory: pytest.TempPathFactory, header: object, data: bytes) -> None:
    read_all(put(tmp_path_factory.getbasetemp() / "header", header, data))


# not: only short headers recognised: gpt2-xl's has 60 KB
def test_a_long_header_is_recognised(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "x", {f"h.{n}.{'long' * 10}": np.zeros(1, np.float32) for n in range(2000)})
    assert len(formats.read(tmp_path / "x").tensors) == 2000


# not: parts written in the byte order that they have
def test_parts_of_the_other_byte_order(tmp_path: Path) -> None:
    x = np.arange(3, dtype=np.float32)
    for order in "<>":
        swapped = x.astype(x.dtype.newbyteorder(order))  # type: ignore[arg-type]
        safetensors.write_parts(tmp_path / "x", {"x": ("float32", (3,))}, lambda _, part=swapped: [part])  # type: ignore[misc]
        np.testing.assert_array_equal(safetensors.read(tmp_path / "x").tensors["x"].load(), x)


# not: a tensor that is there displaced by another name in the metadata
def test_another_name_displaces_no_tensor(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "x", {"a": np.zeros(1, np.float32), "b": np.ones(1, np.float32)}, {"b": "a"})
    assert safetensors.read(tmp_path / "x").tensors["b"].load().tolist() == [1.0]


def test_only_floats_and_ids_are_written(tmp_path: Path) -> None:
    with pytest.raises(
        NpgptError, match="ids is int32, but npgpt writes only float16, bfloat16, float32, float64, int64"
    ):
        safetensors.write(tmp_path / "x", {"ids": np.arange(3, dtype=np.int32)})
    with pytest.raises(NpgptError, match="cannot be named __metadata__"):
        safetensors.write(tmp_path / "x", {"__metadata__": np.ones(3)})
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(NpgptError, match="pipe is not a regular file: choose another path for the output"):
        safetensors.write(path, {"x": np.ones(3)})
    assert path.is_fifo()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, broken, interrupt)
    with pytest.raises(KeyboardInterrupt):
        safetensors.write(path, {"a": np.ones(1000)})
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_the_temporary_file_lies_in_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Path] = []
    replace = os.replace

    def watch(source: Path, destination: Path) -> None:
        moved.append(source)
        replace(source, destination)

    monkeypatch.setattr(os, "replace", watch)
    safetensors.write(tmp_path / "x", {"a": np.ones(3)})
    assert [path.parent for path in moved] == [tmp_path]


def test_names_and_metadata_are_text(tmp_path: Path) -> None:
    for tensors, metadata in (({1: np.ones(1)}, {}), ({"a": np.ones(1)}, {"n": 1}), ({"a": np.ones(1)}, {1: "n"})):
        with pytest.raises(NpgptError, match="must be strings"):
            safetensors.write(tmp_path / "x", tensors, metadata)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_files_written_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    safetensors.write(tmp_path / "ours", {"a": np.ones(3)})
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode
