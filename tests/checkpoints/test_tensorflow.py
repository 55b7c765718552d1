"""TensorFlow's bundles: files that the real TensorFlow wrote (tests/fixtures/tensorflow), and damaged copies."""

from __future__ import annotations

import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import npgpt
from npgpt import cli
from npgpt.checkpoints import crc32c, formats, tensorflow
from npgpt.errors import NpgptError
from npgpt.parameters import to_arrays
from tests.fixtures.tensorflow import make
from tests.support import writers
from tests.support.models import random_arrays, small
from tests.support.namings import openai

FIXTURES = Path(make.__file__).parent


def canonical() -> dict[str, np.typing.NDArray[np.float32]]:
    """Return the arrays that make.py gave to TensorFlow, under canonical names."""
    kinds = {"g": "weight", "b": "bias", "w": "weight", "wte": "wte.weight", "wpe": "wpe.weight"}
    found = {}
    for name, array in make.arrays().items():
        *path, last = name.removeprefix("model/").split("/")
        path = [f"h.{part[1:]}" if part[1:].isdigit() and part[0] == "h" else part for part in path]
        found[".".join([*path, kinds[last]])] = array[0] if last == "w" else array
    return found


@pytest.mark.parametrize("fixture", ["saver", "training", "object_graph", "sharded"])
def test_what_tensorflow_wrote_is_read_bit_for_bit(fixture: str) -> None:
    model = npgpt.load(FIXTURES / fixture, n_head=3)
    assert (model.config.n_layer, model.config.n_embd, model.config.vocab_size) == (2, 21, 40)
    found, expected = to_arrays(model.parameters), canonical()
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_half_precision() -> None:
    tensors = formats.read(FIXTURES / "half" / "model.ckpt.index").tensors
    for name, expected in make.halves().items():
        np.testing.assert_array_equal(tensors[name].load(), np.asarray(expected, np.float32), err_msg=name)
    assert {tensor.dtype for tensor in tensors.values()} == {"float16", "bfloat16", "float32"}


def test_hparams_json_tells_the_heads(tmp_path: Path) -> None:
    assert npgpt.load(FIXTURES / "saver").config.n_head == 3
    with pytest.raises(NpgptError, match="does not state n_head"):
        npgpt.load(FIXTURES / "sharded")


def test_a_prefix_an_index_and_the_latest_of_several(tmp_path: Path) -> None:
    for prefix in ("a", "b"):
        for part in ("index", "data-00000-of-00001"):
            shutil.copy(FIXTURES / "saver" / f"model.ckpt.{part}", tmp_path / f"{prefix}.ckpt.{part}")
    assert npgpt.checkpoints.find.find(tmp_path / "a.ckpt").weights == tmp_path / "a.ckpt.index"
    assert npgpt.checkpoints.find.find(tmp_path / "a.ckpt.index").weights == tmp_path / "a.ckpt.index"
    with pytest.raises(NpgptError, match=r"has several checkpoints: a\.ckpt\.index, b\.ckpt\.index; give one of them"):
        npgpt.checkpoints.find.find(tmp_path)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/elsewhere/b.ckpt"\n')
    assert npgpt.checkpoints.find.find(tmp_path).weights == tmp_path / "b.ckpt.index"


def test_a_variable_saved_in_parts_is_refused() -> None:
    with pytest.raises(NpgptError, match=r"model\.ckpt\.index: model/wte is a partitioned variable"):
        formats.read(FIXTURES / "partitioned" / "model.ckpt.index")


def copied(tmp_path: Path, fixture: str = "saver") -> tuple[Path, Path]:
    """Return the index and the first data file of a copy."""
    folder = tmp_path / fixture
    shutil.copytree(FIXTURES / fixture, folder)
    (index,) = folder.glob("*.index")
    return index, next(iter(sorted(folder.glob("*.data-00000*"))))


def test_a_missing_shard_is_named_with_the_tensor(tmp_path: Path) -> None:
    index, _ = copied(tmp_path, "sharded")
    index.with_name("model.ckpt.data-00001-of-00002").unlink()
    with pytest.raises(NpgptError, match=r"model/h1/.* is in model\.ckpt\.data-00001-of-00002, data file 2 of 2"):
        npgpt.load(index, n_head=3)


def test_a_data_file_cut_short_or_damaged(tmp_path: Path) -> None:
    index, data = copied(tmp_path)
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    with pytest.raises(NpgptError, match=r"data-00000-of-00001: model/\S+ is damaged: its checksum is"):
        npgpt.load(index)
    data.write_bytes(content[:-1])
    with pytest.raises(NpgptError, match=r"data-00000-of-00001 is truncated: model/\S+ ends at byte 50064"):
        npgpt.load(index)


def test_an_index_with_a_bad_checksum(tmp_path: Path) -> None:
    index, _ = copied(tmp_path)
    content = bytearray(index.read_bytes())
    content[40] ^= 1
    index.write_bytes(content)
    with pytest.raises(NpgptError, match=r"model\.ckpt\.index is damaged: the block at 0 has the checksum"):
        npgpt.load(index)


def test_a_compressed_index(tmp_path: Path) -> None:
    """The checksum covers the compression type, so it must be correct."""
    index, _ = copied(tmp_path)
    content = bytearray(index.read_bytes())
    size = next(n for n in range(1, len(content)) if _trailer(content, n) == bytes(content[n : n + 5]))
    content[size] = 1
    content[size : size + 5] = _trailer(content, size, kind=1)
    index.write_bytes(content)
    with pytest.raises(NpgptError, match=rf"is compressed \(kind 1 at byte {size}\)"):
        npgpt.load(index)


def _trailer(content: bytearray, size: int, kind: int = 0) -> bytes:
    crc = crc32c.crc32c(np.frombuffer(bytes(content[:size]) + bytes([kind]), np.uint8))
    return bytes([kind]) + struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


# not: overlapping blocks allowed: a hundred thousand entries may lead to one block without keys, each read anew
def test_a_block_that_many_entries_lead_to_is_refused(tmp_path: Path) -> None:
    block = writers.table_block([])
    index = [(bytes([97 + n]), writers.varint(0) + writers.varint(len(block) - 5)) for n in range(3)]
    content, handles = block, b""
    for part in (writers.table_block([]), writers.table_block(index, every=1)):
        handles += writers.varint(len(content)) + writers.varint(len(part) - 5)
        content += part
    content += handles.ljust(40, b"\0") + tensorflow.MAGIC
    path = writers.write(tmp_path, {"model.ckpt.index": content})
    with pytest.raises(NpgptError, match="the block at 0 overlaps the one that ends at 8"):
        formats.read(path)


# not: keys in any order, so that of two entries with one name the last counts without a word
def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    entry = writers.bundle_entry(1, (1,), 0, 0, bytes(4))
    rows = [(b"", writers.bundle_header()), (b"model/wte", entry), (b"model/wte", entry)]
    files = {"m.index": writers.table([rows]), "m.data-00000-of-00001": bytes(4)}
    with pytest.raises(NpgptError, match="its keys are out of order at b'model/wte'"):
        formats.read(writers.write(tmp_path, files))


# not: data of a big-endian bundle read as little-endian (test_damage.py alone has such a file)
def test_a_big_endian_bundle(tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = writers.write(tmp_path, writers.bundle({"model/wte": x}, big_endian=True))
    np.testing.assert_array_equal(formats.read(path).tensors["model/wte"].load(), x)


# not: an entry that claims more bytes than its shape takes
@pytest.mark.parametrize("size", [20, 28])
def test_a_size_that_contradicts_the_shape(tmp_path: Path, size: int) -> None:
    entry = writers.bundle_entry(1, (2, 3), 0, 0, bytes(24), size=size)
    rows = [(b"", writers.bundle_header()), (b"model/wte", entry)]
    files = {"m.index": writers.table([rows]), "m.data-00000-of-00001": bytes(64)}
    with pytest.raises(NpgptError, match=rf"model/wte, \[2, 3\] of float32, does not have the {size} bytes listed"):
        formats.read(writers.write(tmp_path, files))


# not: a shard beyond those that the header counts, where a file of that name lies there
def test_a_shard_too_many(tmp_path: Path) -> None:
    rows = [(b"", writers.bundle_header()), (b"model/wte", writers.bundle_entry(1, (1,), 1, 0, bytes(4)))]
    files = {"m.index": writers.table([rows]), "m.data-00001-of-00001": bytes(4)}
    with pytest.raises(NpgptError, match=r"model/wte is in m\.data-00001-of-00001, data file 2 of 1, which is missing"):
        formats.read(writers.write(tmp_path, files))


def test_tensorflows_older_form_is_told_apart(tmp_path: Path) -> None:
    """Saver V1's single file is also such a table; the first field of its entry "" is not a number."""
    body = b"\x00\x00\x02" + b"\x0a\x00" + struct.pack("<II", 0, 1)
    block = body + _trailer(bytearray(body), len(body))
    handle = bytes([0, len(body)])
    index = b"\x00\x01\x02" + b"z" + handle + struct.pack("<II", 0, 1)
    index_block = index + _trailer(bytearray(index), len(index))
    footer = bytes([0, len(body), len(block), len(index)]).ljust(40, b"\0") + tensorflow.MAGIC
    (tmp_path / "v1.ckpt").write_bytes(block + index_block + footer)
    with pytest.raises(NpgptError, match="is not the index of a TensorFlow V2 checkpoint"):
        formats.read(tmp_path / "v1.ckpt")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_crc32c_has_the_published_values(data: bytes, expected: int) -> None:
    """The values come from RFC 3720, B.4, and the catalogue of CRCs."""
    assert crc32c.crc32c(np.frombuffer(data, np.uint8)) == expected


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000, 4096])
def test_crc32c_of_many_lengths_against_the_definition(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    register = 0xFFFFFFFF
    for byte in data.tolist():
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 * (register & 1))
    assert crc32c.crc32c(data) == register ^ 0xFFFFFFFF


def package(implementation: str) -> ModuleType:
    """Return a replacement for google-crc32c that uses npgpt's loop."""
    module = ModuleType("google_crc32c")
    module.implementation = implementation  # type: ignore[attr-defined]

    def extend(checksum: int, chunk: bytes) -> int:
        table, register = crc32c._table(), checksum ^ 0xFFFFFFFF
        for byte in chunk:
            register = table[(register ^ byte) & 255] ^ register >> 8
        return register ^ 0xFFFFFFFF

    module.extend = extend  # type: ignore[attr-defined]
    return module


@pytest.fixture
def large(tmp_path: Path) -> Callable[[str], Path]:
    """Return the index of a bundle with one wrong bit in the named tensor: wte is large, ln_f small."""
    arrays = random_arrays(small(vocab_size=900), dtype="float32")
    assert arrays["ln_f.bias"].nbytes < crc32c.SMALL < arrays["wte.weight"].nbytes

    def damaged(name: str) -> Path:
        files = writers.bundle(openai(arrays))
        content = bytearray(files["model.ckpt.data-00000-of-00001"])
        content[content.index(arrays[name].tobytes())] ^= 1
        folder = writers.write(tmp_path / name, files | {"model.ckpt.data-00000-of-00001": bytes(content)}).parent
        return folder / "model.ckpt.index"

    return damaged


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[ModuleType | None], None]]:
    """Replace google_crc32c; None means that it is not installed."""

    def put(module: ModuleType | None) -> None:
        monkeypatch.setitem(sys.modules, "google_crc32c", module)
        crc32c.available.cache_clear()

    yield put
    crc32c.available.cache_clear()


def test_with_google_crc32c_every_checksum_is_looked_at(
    large: Callable[[str], Path],
    installed: Callable[[ModuleType | None], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    installed(package("c"))
    for name in ("wte.weight", "ln_f.bias"):
        with pytest.raises(NpgptError, match=r"is damaged: its checksum is [0-9a-f]{8}, not [0-9a-f]{8} as in"):
            npgpt.load(large(name), n_head=3)
    monkeypatch.setattr("npgpt.checkpoints.crc32c.CHUNK", 1000)  # joined from many chunks
    with pytest.raises(NpgptError, match="model/wte is damaged: its checksum is"):
        npgpt.load(large("wte.weight"), n_head=3)
    assert cli.main(["inspect", str(FIXTURES / "saver")]) == 0
    assert "checksums" not in capsys.readouterr().out


@pytest.mark.parametrize("module", [None, package("python")], ids=["not installed", "not compiled"])
def test_without_it_those_of_large_tensors_are_not_and_inspect_says_so(
    large: Callable[[str], Path],
    installed: Callable[[ModuleType | None], None],
    module: ModuleType | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    installed(module)
    with pytest.raises(NpgptError, match="model/ln_f/b is damaged: its checksum is"):
        npgpt.load(large("ln_f.bias"), n_head=3)
    assert cli.main(["inspect", str(large("wte.weight")), "--n-head", "3"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "checksums" in line)
    assert line.split(maxsplit=1) == [
        "checksums",
        "not verified for 1 of 28 tensors, those above 65,536 bytes: pip install google-crc32c",
    ]
    assert cli.main(["inspect", str(FIXTURES / "saver")]) == 0
    assert "checksums" not in capsys.readouterr().out


def test_the_package_has_the_same_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("google_crc32c", reason="extra crc32c is not installed")
    assert crc32c.available()
    data = np.random.default_rng(0).integers(0, 256, 70_001, dtype=np.uint8)
    assert crc32c.crc32c_of_many(data) == crc32c.crc32c(data)
    monkeypatch.setattr("npgpt.checkpoints.crc32c.CHUNK", 300)
    assert crc32c.crc32c_of_many(data) == crc32c.crc32c(data)


def test_a_data_file_sends_to_its_index() -> None:
    with pytest.raises(NpgptError, match=r"is part of a TensorFlow checkpoint: give its \.index file"):
        npgpt.load(FIXTURES / "saver" / "model.ckpt.data-00000-of-00001")


def test_an_index_that_can_be_none(tmp_path: Path) -> None:
    index, _ = copied(tmp_path)
    content = index.read_bytes()
    index.write_bytes(content[-47:])
    with pytest.raises(NpgptError, match="has 47 bytes, but an index has 48 to 4194304"):
        npgpt.load(index, n_head=3)
    index.write_bytes(content[:-48] + b"\xff" * 40 + content[-8:])
    with pytest.raises(NpgptError, match="its footer is malformed: the number before byte 10 takes more"):
        npgpt.load(index, n_head=3)
