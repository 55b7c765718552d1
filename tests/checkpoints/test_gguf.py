"""GGUF written by hand: every type, the vocabulary inside, and refusals. tests/parity has the real writer."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt.checkpoints import formats, gguf
from npgpt.checkpoints.inspect import inspect
from npgpt.checkpoints.open import open_checkpoint
from npgpt.errors import NpgptError
from npgpt.parameters import to_arrays
from tests.support import writers
from tests.support.models import random_arrays, small
from tests.support.namings import llamacpp
from tests.support.thorough import examples

CONFIG = small()
Key = tuple[str, int, bytes]  # name, type, value


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def texts(*values: str) -> bytes:
    return struct.pack("<IQ", 8, len(values)) + b"".join(map(text, values))


ARCHITECTURE: Key = ("general.architecture", 8, text("gpt2"))
KEYS: list[Key] = [
    ARCHITECTURE,
    ("gpt2.block_count", 4, struct.pack("<I", 2)),
    ("gpt2.attention.head_count", 10, struct.pack("<Q", 3)),
    ("gpt2.embedding_length", 2, struct.pack("<H", 21)),
    ("gpt2.context_length", 0, struct.pack("<B", 24)),
    ("gpt2.feed_forward_length", 5, struct.pack("<i", 84)),
    ("gpt2.attention.layer_norm_epsilon", 6, struct.pack("<f", 1e-5)),
    ("general.file_type", 12, struct.pack("<d", 0.0)),
    ("general.flag", 7, b"\x01"),
]


def put(path: Path, keys: list[Key], tensors: dict[str, Any], version: int = 3, alignment: int = 32) -> Path:
    """Write a file; tensors are float32 arrays, or (type, dims, offset, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    head += b"".join(text(name) + struct.pack("<I", kind) + value for name, kind, value in keys)
    data = b""
    for name, tensor in tensors.items():
        kind, dims, offset, content = tensor if isinstance(tensor, tuple) else (0, tensor.shape[::-1], None, None)
        data += b"\0" * (-len(data) % alignment)
        offset = len(data) if offset is None else offset
        head += text(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
        head += struct.pack("<IQ", kind, offset)
        data += tensor.astype("<f4").tobytes() if content is None else content
    path.write_bytes(head + b"\0" * (-len(head) % alignment) + data)
    return path


@pytest.mark.parametrize(("version", "alignment"), [(3, 32), (2, 32), (3, 64), (3, 1)])
def test_keys_of_every_type_and_the_whole_model(tmp_path: Path, version: int, alignment: int) -> None:
    arrays = random_arrays(CONFIG, dtype="float32")
    keys = [*KEYS, ("general.alignment", 4, struct.pack("<I", alignment))]
    model = npgpt.load(put(tmp_path / "m.gguf", keys, llamacpp(arrays), version, alignment))
    assert model.config == CONFIG
    assert model.config.layer_norm_epsilon == 1e-5  # and not 9.999999747378752e-06
    assert model.origin.endswith("GGUF, llama.cpp's names")
    for name, array in to_arrays(model.parameters).items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)


def test_sizes_are_the_reverse_of_numpys(tmp_path: Path) -> None:
    content = struct.pack("<6f", *range(6))
    path = put(tmp_path / "m", [ARCHITECTURE], {"w": (0, (3, 2), 0, content)})
    assert formats.read(path).tensors["w"].load().tolist() == [[0, 1, 2], [3, 4, 5]]


# not: data of a big-endian file read as little-endian (test_damage.py alone has such a file)
def test_both_byte_orders(tmp_path: Path) -> None:
    arrays = random_arrays(CONFIG, dtype="float32")
    content = writers.gguf(llamacpp(arrays), writers.gguf_keys(CONFIG), version=2, order=">")
    model = npgpt.load(writers.write(tmp_path, {"m.gguf": content}))
    for name, array in to_arrays(model.parameters).items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)


# not: bos_token_id (or eos_token_id) not taken over
def test_the_ids_of_the_texts_ends_are_taken_over(tmp_path: Path) -> None:
    ends = [(f"tokenizer.ggml.{end}_token_id", 4, struct.pack("<I", n)) for end, n in (("bos", 5), ("eos", 7))]
    arrays = llamacpp(random_arrays(CONFIG, dtype="float32"))
    npgpt.convert(put(tmp_path / "m.gguf", KEYS + ends, arrays), tmp_path / "out")
    stated = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (stated["bos_token_id"], stated["eos_token_id"]) == (5, 7)


# llama.cpp ends at all of them
def test_the_ends_of_a_turn_and_of_a_message_end_a_text(tmp_path: Path) -> None:
    ends = [
        (f"tokenizer.ggml.{end}_token_id", 4, struct.pack("<I", n)) for end, n in (("eos", 7), ("eot", 9), ("eom", 7))
    ]
    arrays = llamacpp(random_arrays(CONFIG, dtype="float32"))
    assert npgpt.load(put(tmp_path / "m.gguf", KEYS + ends, arrays)).end_ids == (7, 9)
    npgpt.convert(tmp_path / "m.gguf", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [7, 9]
    assert npgpt.load(tmp_path / "out").end_ids == (7, 9)


def vocabulary_keys(tokens: list[str], types: list[int] | None = None) -> list[Key]:
    keys = [("tokenizer.ggml.model", 8, text("gpt2")), (gguf.TOKENS, 9, texts(*tokens)), (gguf.MERGES, 9, texts("a b"))]
    if types is not None:
        keys.append((gguf.TOKEN_TYPES, 9, struct.pack(f"<IQ{len(types)}i", 5, len(types), *types)))
    return keys


def test_the_vocabulary_within(tmp_path: Path) -> None:
    """The vocabulary is 256 bytes, one merge, <|endoftext|>, and padding without text."""
    characters = list(npgpt.text.byte_pairs.byte_characters())
    tokens = [*characters, "ab", "<|endoftext|>", "[PAD258]", "[PAD259]"]
    config = small(vocab_size=260)
    arrays = random_arrays(config, dtype="float32")
    keys = KEYS + vocabulary_keys(tokens, [1] * 257 + [3] + [5] * 2)
    path = put(tmp_path / "m.gguf", keys, llamacpp(arrays))
    tokenizer = npgpt.load(path).tokenizer
    assert tokenizer.encode("xab") == [characters.index("x"), 256]
    assert tokenizer.end_of_text == 257
    assert tokenizer.n_vocab == 258
    assert tokenizer.source == f"vocab.json in {path} and merges.txt in {path}"
    npgpt.convert(path, tmp_path / "out")
    again = npgpt.load(tmp_path / "out")
    assert again.tokenizer.encode("xab") == tokenizer.encode("xab")
    npgpt.save(npgpt.load(path), tmp_path / "saved")
    assert npgpt.load(tmp_path / "saved").tokenizer.encode("xab") == tokenizer.encode("xab")
    assert npgpt.text.vocabularies.load_tokenizer(path).encode("ab") == [256]


def test_a_broken_vocabulary_within_is_a_reason_and_not_gpt2s(tmp_path: Path) -> None:
    config = small(vocab_size=50257, n_embd=3)
    keys = [key for key in KEYS if key[0] != "gpt2.embedding_length" and key[0] != "gpt2.feed_forward_length"]
    keys += [("tokenizer.ggml.model", 8, text("gpt2")), (gguf.TOKENS, 9, texts("a")), (gguf.MERGES, 6, bytes(4))]
    path = put(tmp_path / "m.gguf", keys, llamacpp(random_arrays(config, dtype="float32")))
    model = npgpt.load(path)
    with pytest.raises(NpgptError, match=r"has no text: .*tokens and .*merges must be lists of strings"):
        model.generate("a")


def with_vocabulary(tmp_path: Path, *keys: Key, kinds: list[int] | None = None) -> npgpt.LanguageModel:
    """Write a model with a vocabulary of 256 bytes, ab, <|endoftext|>, <|user|> and <s>."""
    tokens = [*npgpt.text.byte_pairs.byte_characters(), "ab", "<|endoftext|>", "<|user|>", "<s>"]
    path = tmp_path / "m.gguf"
    arrays = llamacpp(random_arrays(small(vocab_size=260), dtype="float32"))
    return npgpt.load(put(path, [*KEYS, *vocabulary_keys(tokens, kinds or [1] * 257 + [3, 4, 3]), *keys], arrays))


def flag(name: str, value: bool = True) -> Key:
    return (f"tokenizer.ggml.{name}", 7, bytes([value]))


def number(name: str, value: int) -> Key:
    return (f"tokenizer.ggml.{name}", 4, struct.pack("<I", value))


def test_added_tokens_and_ends_within(tmp_path: Path) -> None:
    ends = (flag("add_bos_token"), number("bos_token_id", 259), flag("add_eos_token"), number("eos_token_id", 257))
    model = with_vocabulary(tmp_path, *ends, ("tokenizer.ggml.pre", 8, text("gpt-2")), flag("add_space_prefix", False))
    assert model.tokenizer.encode("ab<|user|>ab", special=True) == [259, 256, 258, 256, 257]
    assert model.tokenizer.encode("ab<|user|>ab") == [259, 256, 258, 256, 257]
    assert 259 not in model.tokenizer.encode("<s>", alone=True)
    assert model.tokenizer.encode("<s>", special=True, alone=True) == [259]
    npgpt.convert(tmp_path / "m.gguf", tmp_path / "out")
    assert npgpt.load(tmp_path / "out").tokenizer.encode("ab<|user|>ab") == [259, 256, 258, 256, 257]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            [("tokenizer.ggml.pre", 8, text("llama-bpe"))],
            "tokenizer.ggml.pre is 'llama-bpe', but npgpt reads only 'gpt-2'",
        ),
        ([("tokenizer.ggml.pre", 9, texts("gpt-2"))], "tokenizer.ggml.pre is"),
        ([flag("add_space_prefix")], "tokenizer.ggml.add_space_prefix is True, but npgpt reads only False"),
        ([flag("add_bos_token")], "add_bos_token is set, but bos_token_id is None"),
        ([flag("add_eos_token"), number("eos_token_id", 260)], "add_eos_token is set, but eos_token_id is 260"),
        ([number("add_bos_token", 1), number("bos_token_id", 257)], "add_bos_token must be true or false, not 1"),
    ],
)
def test_a_setting_within_that_is_not_honoured(tmp_path: Path, keys: list[Key], message: str) -> None:
    with pytest.raises(NpgptError, match="has no text: ") as error:
        with_vocabulary(tmp_path, *keys).generate("a")
    assert message in str(error.value)


@pytest.mark.parametrize("model", ["llama", "bert", "t5"])
def test_another_vocabulary_within_is_never_replaced_by_gpt2s(tmp_path: Path, model: str) -> None:
    config = small(vocab_size=50257, n_embd=3)
    keys = [key for key in KEYS if key[0] != "gpt2.embedding_length" and key[0] != "gpt2.feed_forward_length"]
    keys += [("tokenizer.ggml.model", 8, text(model)), (gguf.TOKENS, 9, texts("a"))]
    path = put(tmp_path / "m.gguf", keys, llamacpp(random_arrays(config, dtype="float32")))
    assert f"tokenizer.ggml.model is '{model}', but npgpt reads only 'gpt2'" in npgpt.load(path).why_no_text


FOUR = struct.pack("<f", 1.0)


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ([], {}, "general.architecture is None, but npgpt runs only 'gpt2'"),
        ([("general.architecture", 8, text("llama"))], {}, "general.architecture is 'llama'"),
        ([ARCHITECTURE, ARCHITECTURE], {}, "duplicate key general.architecture"),
        ([("x", 13, b"")], {}, "has the unknown type 13"),
        ([("x", 9, struct.pack("<IQ", 9, 1) * 6)], {}, "has the unknown type 9"),
        ([("x", 9, struct.pack("<IQ", 8, 2**60))], {}, "is truncated"),
        ([("x", 9, struct.pack("<IQ", 4, 2**62))], {}, "is truncated"),
        ([("x", 8, struct.pack("<Q", 2**63))], {}, "is truncated"),
        ([("x", 8, struct.pack("<Q", 2) + b"\xff\xff")], {}, "is not UTF-8"),
        ([ARCHITECTURE, ("general.alignment", 4, bytes(4))], {}, "alignment must be a positive whole number, not 0"),
        ([ARCHITECTURE, ("general.alignment", 8, text("a"))], {}, "alignment must be a positive whole number, not 'a'"),
        ([ARCHITECTURE], {"w": (0, (2, 2), 0, FOUR)}, "is truncated: w ends at byte"),
        ([ARCHITECTURE], {"w": (0, (1,), 7, FOUR)}, "w has offset 7, which is not a multiple of 32"),
        ([ARCHITECTURE], {"w": (0, (2**40, 2**40), 0, FOUR)}, "w has an impossible shape"),
        ([ARCHITECTURE], {"w": (0, (1,) * 9, 0, FOUR)}, "w has 9 dimensions"),
        (
            [ARCHITECTURE],
            {"v": (0, (16,), 0, FOUR * 16), "w": (0, (1,), 32, b"")},
            "w at offset 32 overlaps v, which ends at offset 64",
        ),
    ],
)
def test_whatever_is_malformed(tmp_path: Path, keys: list[Key], tensors: dict[str, Any], message: str) -> None:
    path = put(tmp_path / "bad.gguf", keys, tensors)
    with pytest.raises(NpgptError, match=message) as error:
        formats.read(path)
    assert "bad.gguf" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tensor_that_stands_twice(tmp_path: Path) -> None:
    path = put(tmp_path / "m", [ARCHITECTURE], {"v": np.ones(8), "w": np.ones(8)})
    path.write_bytes(path.read_bytes().replace(text("w"), text("v"), 1))
    with pytest.raises(NpgptError, match="duplicate tensor v"):
        formats.read(path)


@pytest.mark.parametrize("version", [1, 4, 2**16])
def test_other_versions(tmp_path: Path, version: int) -> None:
    with pytest.raises(NpgptError, match=r"is GGUF version \d+, but npgpt reads only 2 and 3"):
        formats.read(put(tmp_path / "m", [ARCHITECTURE], {}, version))


Q8_0 = np.dtype([("scale", "<f2"), ("values", "i1", 32)])


def widened_by_hand(stored: Any, kind: int) -> Any:
    """Replace gguf.quants.dequantize for the type with the simplest formula: a scale and 32 whole numbers."""
    if kind != 8:
        raise NotImplementedError
    blocks = stored.reshape(-1, 34).view(Q8_0)[:, 0]
    wide = blocks["scale"].astype(np.float32)[:, None] * blocks["values"].astype(np.float32)
    return wide.reshape(*stored.shape[:-1], -1)


@pytest.fixture(name="widened")
def _widened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Replace the package gguf and return the list of shapes passed to it."""
    shapes: list[tuple[int, ...]] = []
    package = ModuleType("gguf")

    def dequantize(stored: Any, kind: int) -> Any:
        shapes.append(stored.shape)
        return widened_by_hand(stored, kind)

    vars(package).update(quants=SimpleNamespace(dequantize=dequantize), GGMLQuantizationType=int)
    monkeypatch.setitem(sys.modules, "gguf", package)
    return shapes


def blocks(array: Any) -> bytes:
    """Return Q8_0 of an array of whole numbers from -127 to 127."""
    found = np.zeros(array.size // 32, Q8_0)
    found["scale"], found["values"] = 0.5, array.reshape(-1, 32)
    return found.tobytes()


def test_a_quantised_model_is_widened_tensor_by_tensor(tmp_path: Path, widened: list[tuple[int, ...]]) -> None:
    """Loading, converting and inspecting give the blocks' float32 values and name the stored types."""
    config = small(n_embd=32, n_head=4)
    drawn = np.random.default_rng(0)
    arrays = {
        name: drawn.integers(-127, 127, array.shape).astype("float32") if ".c_" in name and array.ndim == 2 else array
        for name, array in random_arrays(config, dtype="float32").items()
    }
    tensors = {
        name: (8, array.shape[::-1], None, blocks(array)) if array.ndim == 2 and "blk" in name else array
        for name, array in llamacpp(arrays).items()
    }
    put_quantised(tmp_path / "m.gguf", config, tensors)
    expected = {name: array * 0.5 if ".c_" in name and array.ndim == 2 else array for name, array in arrays.items()}
    model = npgpt.load(tmp_path / "m.gguf")
    for name, array in to_arrays(model.parameters).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    found = inspect(tmp_path / "m.gguf")
    assert found.dtypes == {"float32": len(arrays) - 4 * config.n_layer, "Q8_0": 4 * config.n_layer}
    widened.clear()
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert widened == []  # nothing before it is asked for
    checkpoint.stored("h.1.mlp.c_fc.weight")
    assert widened == [(128, 34)]  # [out, in / 32 × 34]
    npgpt.convert(tmp_path / "m.gguf", tmp_path / "out")
    converted = to_arrays(npgpt.load(tmp_path / "out").parameters)
    assert all(np.array_equal(converted[name], array) for name, array in expected.items())


# not: a head and embeddings widened, both at once, to see that they are the same
@pytest.mark.parametrize("same", [True, False])
def test_a_quantised_head_that_equals_wte_is_tied(tmp_path: Path, widened: list[tuple[int, ...]], same: bool) -> None:
    config = small(n_embd=32, n_head=4)
    arrays: dict[str, Any] = {**llamacpp(random_arrays(config, dtype="float32"))}
    wte = np.random.default_rng(0).integers(-127, 127, (40, 32))
    for name, values in (("token_embd.weight", wte), ("output.weight", wte if same else -wte)):
        arrays[name] = (8, (32, 40), None, blocks(values))
    checkpoint = open_checkpoint(put_quantised(tmp_path / "m.gguf", config, arrays))
    assert checkpoint.config.tie_word_embeddings == same
    assert widened == []


@pytest.mark.usefixtures("widened")
def test_a_damaged_quantised_file_is_refused_in_one_line_or_read(tmp_path: Path) -> None:
    config = small(n_embd=32, n_head=4, n_layer=1)
    arrays: dict[str, Any] = {**llamacpp(random_arrays(config, dtype="float32"))}
    arrays |= {name: (8, a.shape[::-1], None, blocks(0 * a)) for name, a in arrays.items() if ".ffn_up.w" in name}
    path = put_quantised(tmp_path / "m.gguf", config, arrays)
    content, drawn = path.read_bytes(), np.random.default_rng(0)
    behind = content.index(b"output_norm.bias") + 64  # of the directory
    for _ in range(examples(100, 3000)):
        damaged, message = bytearray(content), ""
        for place in drawn.integers(4, behind, drawn.integers(1, 4)):
            damaged[place] = drawn.choice(np.array([0, 1, 2, 8, 12, 39, 255, drawn.integers(256)]))
        path.unlink()  # what is mapped must not change
        path.write_bytes(damaged)
        try:
            assert npgpt.load(path).config.n_embd == 32
        except NpgptError as error:
            message = str(error)
        assert message.isprintable()


def put_quantised(path: Path, config: npgpt.Config, tensors: dict[str, Any]) -> Path:
    sizes = ("n_layer", "n_head", "n_embd", "n_positions")
    stated = [(key, getattr(config, name)) for key, name in gguf.CONFIG.items() if name in sizes]
    placed: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        size = tensor.nbytes if isinstance(tensor, np.ndarray) else len(tensor[3])
        placed[name] = tensor if isinstance(tensor, np.ndarray) else (*tensor[:2], at, tensor[3])
        at += size + -size % 32
    return put(path, [ARCHITECTURE, *[(key, 4, struct.pack("<I", value)) for key, value in stated]], placed)


@pytest.mark.parametrize("kind", sorted(gguf.QUANTISED))
def test_without_the_package_the_message_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    name, (values, size) = gguf.QUANTISED[kind]
    rows = bytes(256 // values * size * 8)
    path = put(tmp_path / "m", [ARCHITECTURE], {"blk.0.ffn_up.weight": (kind, (256, 8), 0, rows)})
    tensor = formats.read(path).tensors["blk.0.ffn_up.weight"]
    message = (
        rf'blk\.0\.ffn_up\.weight is quantised \({name}\), which needs the extra gguf: pip install "npgpt\[gguf\]"'
    )
    with pytest.raises(NpgptError, match=message):
        tensor.load()


@pytest.mark.usefixtures("widened")
def test_a_type_that_the_package_does_not_widen(tmp_path: Path) -> None:
    path = put(tmp_path / "m", [ARCHITECTURE], {"w": (15, (256, 1), 0, bytes(292))})
    with pytest.raises(NpgptError, match=r"w is Q8_K, which the installed package gguf cannot dequantise"):
        formats.read(path).tensors["w"].load()


@pytest.mark.usefixtures("widened")
def test_quantised_and_big_endian_is_refused(tmp_path: Path) -> None:
    content = writers.gguf({"w": np.zeros(32, "float32")}, {"general.architecture": "gpt2"}, order=">", types={"w": 8})
    path = writers.write(tmp_path, {"m.gguf": content})
    with pytest.raises(NpgptError, match="w is Q8_0 in a big-endian file"):
        formats.read(path).tensors["w"].load()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ((12, (128, 8), 0, bytes(1152)), r"w is Q4_K, whose blocks of 256 values do not divide .* \[8, 128\]"),
        ((8, (), 0, bytes(34)), r"w is Q8_0, whose blocks of 32 values do not divide .* \[\]"),
        ((8, (32, 2), 0, bytes(67)), "is truncated: w ends at byte"),
        ((14, (256, 2**50), 0, bytes(420)), "is truncated: w ends at byte"),
        ((99, (32, 2), 0, bytes(64)), None),  # a type that npgpt does not know is refused when it is used
    ],
)
def test_sizes_in_blocks_are_checked_before_anything_is_read(tmp_path: Path, tensor: Any, message: str | None) -> None:
    path = put(tmp_path / "bad.gguf", [ARCHITECTURE], {"w": tensor})
    with pytest.raises(NpgptError, match=message or "w is of the unknown type 99, not one of"):
        formats.read(path).tensors["w"].load()


# not: an object of Python's for each of the millions of items of a list that no model has
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (struct.pack("<IQ", 8, 101) + bytes(8 * 101), "its lists have more than 100 items"),
        (struct.pack("<IQ", 9, 2) + (struct.pack("<IQ", 8, 50) + bytes(400)) * 2, "its lists have more than 100 items"),
        (struct.pack("<IQ", 8, 2**20), "is truncated: the list at byte .* has 1048576 items"),
        (struct.pack("<IQ", 9, 2**20), "is truncated: the list at byte .* has 1048576 items"),
    ],
)
def test_lists_are_bounded_by_what_the_file_can_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: bytes, message: str
) -> None:
    assert gguf.MOST_ITEMS == 2**20
    monkeypatch.setattr(gguf, "MOST_ITEMS", 100)
    path = put(tmp_path / "bad.gguf", [("x", 9, value)], {})
    with pytest.raises(NpgptError, match=message):
        formats.read(path)


def test_the_numbers_of_keys_and_tensors_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2**16 + 1))
    with pytest.raises(NpgptError, match="has 0 tensors and 65537 keys, but npgpt reads at most 65536"):
        formats.read(path)


# not: split.count not looked at
def test_one_of_several_parts_is_refused(tmp_path: Path) -> None:
    keys = [*KEYS, ("split.count", 2, struct.pack("<H", 2))]
    path = put(tmp_path / "m.gguf", keys, {"w": np.ones(8)})
    with pytest.raises(
        NpgptError, match=r"m\.gguf is one part of a split file: join the parts with llama-gguf-split --merge"
    ):
        formats.read(path)


# not: a tensor of a type that has no size here takes no place at all
def test_two_quantised_tensors_in_one_place(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {"v": (12, (256, 1), 0, bytes(144)), "w": (12, (256, 1), 0, b"")}
    path = put(tmp_path / "m.gguf", [ARCHITECTURE], tensors)
    with pytest.raises(NpgptError, match="w at offset 0 overlaps v"):
        formats.read(path)
