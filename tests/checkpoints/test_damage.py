"""Damaged files of every format give npgpt's one-line error or a whole model, within bounded memory.

Each file is truncated at every byte, damaged at random places, and given arbitrary metadata with corrected checksums.
"""

from __future__ import annotations

import json
import pickletools
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npgpt
from npgpt import parameters
from npgpt.checkpoints import pickles, tensorflow, torch_objects
from npgpt.checkpoints.crc32c import crc32c
from npgpt.checkpoints.inspect import inspect
from npgpt.errors import NpgptError
from npgpt.parameters import to_arrays
from npgpt.text import vocabularies
from tests.fixtures.tensorflow import make
from tests.support import writers
from tests.support.models import random_arrays, small
from tests.support.namings import llamacpp, openai
from tests.support.thorough import examples
from tests.support.writers import Files, StateDict, Storage, Typed, View

pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence")  # pickletools', of a text in a pickle

TINY = small(vocab_size=5, n_positions=3, n_embd=2, n_layer=1, n_head=1)
ARRAYS = random_arrays(TINY, dtype="float32")
FILES: dict[str, Files] = {form: make(TINY, ARRAYS) for form, make in writers.FORMS.items()}

# A vocabulary of bytes and one merge, and a model for it, within one file.
CHARACTERS = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 256 + 68))]
TEXTS = [*CHARACTERS, CHARACTERS[0] + CHARACTERS[1], "<|endoftext|>"]
SPEAKING = small(vocab_size=len(TEXTS), n_positions=2, n_embd=1, n_layer=1, n_head=1)
VOCABULARY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": TEXTS,
    "tokenizer.ggml.merges": [f"{CHARACTERS[0]} {CHARACTERS[1]}"],
    "tokenizer.ggml.token_type": [Typed("i", 1)] * len(TEXTS),
    "tokenizer.ggml.eos_token_id": len(TEXTS) - 1,
}
FILES["GGUF with a vocabulary"] = {
    "model.gguf": writers.gguf(
        llamacpp(random_arrays(SPEAKING, dtype="float32")), writers.gguf_keys(SPEAKING) | VOCABULARY
    )
}
# A state dict that was saved unmerged; its factors are zeros, so that merging changes nothing.
PREFIX = "base_model.model.transformer."
UNMERGED = {PREFIX + name.replace("c_attn.", "c_attn.base_layer."): array for name, array in ARRAYS.items()}
UNMERGED |= {f"{PREFIX}h.0.attn.c_attn.lora_{x}.weight": np.zeros(shape) for x, shape in (("A", (1, 2)), ("B", (6, 1)))}
FILES["LoRA"] = {
    "model.safetensors": writers.safetensors(UNMERGED),
    "adapter_config.json": b'{"peft_type": "LORA", "r": 1, "lora_alpha": 2.5, "alpha_pattern": {"c_fc": 4}}',
}
CHECKED = [form for form in FILES if form.startswith(("torch zip", "TensorFlow"))]  # forms that keep checksums


# --- what may happen -------------------------------------------------------------------------------------------------


@contextmanager
def small_and_quick(size: int, measured: bool = True) -> Iterator[None]:
    """Limit memory to a small multiple of a file's size, and time to seconds, within the context.

    NumPy reports its memory to tracemalloc; mapped files do not count. Another 2 MB are allowed for what does not
    depend on the file, such as the schema of a configuration with a hundred blocks, or a traceback.
    """
    start = time.process_time()
    if measured:
        tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]  # 0 where it does not run
    finally:
        tracemalloc.stop()
    assert peak < 64 * size + 2**21
    assert time.process_time() - start < 10


def refusal(error: NpgptError) -> None:
    """Return an error's message, which must be one printable line."""
    message = str(error)
    assert message
    assert message.isprintable()


def outcome(path: Path, size: int, measured: bool = True) -> npgpt.LanguageModel | None:
    """Return a model with the shapes of its configuration, or None if the file is refused."""
    with small_and_quick(size, measured):
        try:
            model = npgpt.load(path, n_head=1)
        except NpgptError as error:
            refusal(error)
            return None
    arrays = to_arrays(model.parameters)
    assert {name: array.shape for name, array in arrays.items()} == parameters.schema(model.config)
    assert {str(array.dtype) for array in arrays.values()} == {"float32"}
    return model


def look(path: Path, size: int) -> None:
    """Open a path's tokenizer and inspect it."""
    uses: tuple[Callable[[Path], object], ...] = (vocabularies.load_tokenizer, lambda path: inspect(path, n_head=1))
    for use in uses:
        with small_and_quick(size):
            try:
                use(path)
            except NpgptError as error:
                refusal(error)


def unchanged(model: npgpt.LanguageModel | None) -> None:
    """Return whether data with a checksum were read as written."""
    if model is not None:
        for name, array in to_arrays(model.parameters).items():
            np.testing.assert_array_equal(array, ARRAYS[name], err_msg=name)


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Read every form once, so that permanent caches are not counted."""
    for files in FILES.values():
        path = writers.write(tmp_path_factory.mktemp("warm"), files)
        inspect(path, n_head=1)


@pytest.fixture(autouse=True)
def _checksums_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache the checksums of undamaged bytes."""
    known: dict[bytes, int] = {}

    def remembered(data: np.typing.NDArray[np.uint8]) -> int:
        content = data.tobytes()
        if content not in known:
            known[content] = crc32c(data)
        return known[content]

    monkeypatch.setattr(tensorflow, "crc32c", remembered)


def test_the_files_are_whole(tmp_path: Path) -> None:
    """Every form loads before it is damaged, including its vocabulary."""
    for number, (form, files) in enumerate(FILES.items()):
        path = writers.write(tmp_path / str(number), files)
        model = outcome(path, 10_000)
        assert model is not None
        assert model.config == (SPEAKING if "vocabulary" in form else TINY)
        if "vocabulary" in form:
            assert model.tokenizer.encode(model.tokenizer.decode([256, 3])) == [256, 3]
        else:
            unchanged(model)


def test_the_bundle_is_what_tensorflow_writes() -> None:
    """The bundle equals TensorFlow's byte for byte, so the damaged files are realistic."""
    folder = Path(make.__file__).parent / "saver"
    for name, content in writers.bundle(make.arrays(), per_block=1000).items():
        assert content == (folder / name).read_bytes()


# --- cut short -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FILES)
def test_cut_at_every_byte(tmp_path: Path, form: str) -> None:
    """A checkpoint with one truncated file is always refused. Plain runs cut at every 47th byte."""
    files = FILES[form]
    for name, content in files.items():
        path = writers.write(tmp_path, files)
        for length in range(0, len(content), examples(47, 1)):
            writers.write(tmp_path, {name: content[:length]})
            assert outcome(path, len(content), measured=length % 4 == 0) is None, (name, length)


@pytest.mark.parametrize("form", FILES)
def test_a_file_that_is_missing(tmp_path: Path, form: str) -> None:
    """A missing file other than the one asked for is refused like any other fault."""
    for name in FILES[form]:
        path = writers.write(tmp_path, FILES[form])
        (tmp_path / name).unlink()
        if name == "config.json":
            unchanged(outcome(path, 10_000))
        else:
            assert outcome(path, 10_000) is None


# --- damaged at random -----------------------------------------------------------------------------------------------

INTERESTING = [0, 1, 2, 3, 7, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


class Change(NamedTuple):
    """One change: its kind, its place in the file or its metadata, and its value."""

    kind: tuple[str, bool]  # what, and whether in the metadata
    place: int  # in 65536ths of it
    length: int
    content: bytes


SOMETIMES = st.sampled_from([False] * 7 + [True])
NUMBERS = sorted(
    {
        (number % 2 ** (8 * size)).to_bytes(size, order)
        for number in INTERESTING
        for size in (1, 2, 4, 8)
        for order in ("little", "big")
    }
)
LETTERS = [bytes([letter]) for letter in b'0123456789,:[]{}"-aeF']
KINDS = ("set", "set", "set", "insert", "remove", "repeat")
CHANGES = st.lists(
    st.builds(
        Change,
        st.sampled_from([(kind, metadata) for kind in KINDS for metadata in (True, True, True, False)]),
        st.binary(min_size=2, max_size=2).map(lambda place: place[0] << 8 | place[1]),  # integers prefer small ones
        st.integers(1, 64),
        st.binary(min_size=1, max_size=4) | st.sampled_from(NUMBERS) | st.sampled_from(LETTERS),
    ),
    min_size=1,
    max_size=3,
)


def changed(content: bytes, changes: Sequence[Change], metadata: Sequence[tuple[int, int]]) -> bytes:
    """Return the content with all changes made; metadata are the ranges where most of them fall."""
    ranges = [at for begin, end in metadata for at in range(begin, end)]
    places = [
        ranges[change.place * len(ranges) >> 16] if change.kind[1] and ranges else change.place * len(content) >> 16
        for change in changes
    ]
    for change, place in sorted(zip(changes, places, strict=True), key=lambda pair: -pair[1]):
        after = place + change.length
        if change.kind[0] == "set":
            content = content[:place] + change.content + content[place + len(change.content) :]
        elif change.kind[0] == "insert":
            content = content[:place] + change.content + content[place:]
        elif change.kind[0] == "remove":
            content = content[:place] + content[after:]
        else:
            content = content[:after] + content[place:]
    return content


def metadata(form: str, name: str) -> list[tuple[int, int]]:
    """Return the ranges of a file's metadata."""
    content = FILES[form][name]
    if name.endswith((".json", ".index")):
        return [(0, len(content))]
    if name.endswith(".safetensors"):
        return [(0, 8 + int.from_bytes(content[:8], "little"))]
    if form.startswith("torch zip"):
        headers = [at for at in range(len(content)) if content.startswith((b"PK\3\4", b"PK\6\6", b"PK\5\6"), at)]
        return [*((at, at + 60) for at in headers), (content.index(b"PK\1\2"), len(content))]
    if form.startswith("GGUF"):
        return [(0, len(content) - 4 * sum(array.size for array in ARRAYS.values()))]
    return [(0, 32)] if form == "llm.c" else []


def damaged_at_random(form: str, folder: Path, name: str, changes: list[Change], also_look: bool) -> None:
    files = FILES[form]
    content = changed(files[name], changes, metadata(form, name))
    path = writers.write(folder, files | {name: content})
    size = sum(map(len, files.values())) + len(content)
    model = outcome(path, size)
    if form in CHECKED and form != "torch zip, big-endian":  # which is little without its byteorder, by rights
        unchanged(model)
    if also_look:
        look(path, size)


@pytest.mark.parametrize("form", FILES)
def test_damaged_anywhere(tmp_path: Path, form: str) -> None:
    @given(st.sampled_from(sorted(FILES[form])), CHANGES, SOMETIMES)
    @settings(max_examples=examples(8, 100) if "," in form else examples(16, 500), database=None)
    def check(name: str, changes: list[Change], also_look: bool) -> None:
        damaged_at_random(form, tmp_path, name, changes, also_look)

    check()


@pytest.mark.parametrize("form", CHECKED)
def test_a_damaged_weight_is_reported_as_damaged(tmp_path: Path, form: str) -> None:
    """One bit of every weight is flipped. Plain runs try every fifth weight."""
    for name, content in FILES[form].items():
        if name.endswith((".index", ".json")):
            continue
        for array in ARRAYS.values():
            for value in array.ravel()[:: examples(5, 1)]:
                order = "<>"["big-endian" in form]
                at = content.find(struct.pack(f"{order}f", value))
                if at < 0:  # in another file
                    continue
                damage = bytearray(content)
                damage[at + int(value * 1000) % 4] ^= 1 << int(value * 1000) % 8
                path = writers.write(tmp_path, FILES[form] | {name: bytes(damage)})
                with pytest.raises(NpgptError, match=r"is damaged: its (?:CRC-32|checksum) is"):
                    npgpt.load(path, n_head=1)


# --- anything said, with the checksums right -------------------------------------------------------------------------


def tried(folder: Path, files: Files, also_look: bool) -> None:
    path = writers.write(folder, files)
    size = sum(map(len, files.values()))
    outcome(path, size)
    if also_look:
        look(path, size)


WHOLE_NUMBERS = st.sampled_from(INTERESTING) | st.integers(0, 20)
SETTINGS = settings(max_examples=examples(25, 200), database=None)


def numbers(kind: str) -> st.SearchStrategy[Typed]:
    """Return any value of a type, as bits."""
    size = struct.calcsize("<" + kind)
    return st.binary(min_size=size, max_size=size).map(lambda bits: Typed(kind, struct.unpack("<" + kind, bits)[0]))


GGUF_SCALARS = st.one_of(*map(numbers, writers.VALUE_TYPES)) | WHOLE_NUMBERS.map(lambda n: Typed("Q", n))
GGUF_VALUES = st.recursive(
    GGUF_SCALARS | st.sampled_from(["gpt2", "llama", "a", ""]) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | inner.map(lambda one: [one] * 5),
    max_leaves=6,
)
GGUF_KEYS = [*writers.gguf_keys(TINY), *VOCABULARY, "general.alignment", "split.count", "gpt2.vocab_size", ""]
GGUF_TENSORS = [*llamacpp(ARRAYS), "output.weight"]


@given(
    keys=st.dictionaries(st.sampled_from(GGUF_KEYS), GGUF_VALUES | st.none(), max_size=3),
    version=st.sampled_from([2, 3, 3, 3, 3, 3, 3, 2**31]),
    counts=st.sampled_from([None, None, None, (0, 0), (17, 2**64 - 1), (2**64 - 1, 7), (2**32, 2**31), (1, 7)]),
    dims=st.dictionaries(st.sampled_from(GGUF_TENSORS), st.lists(WHOLE_NUMBERS, max_size=9), max_size=2),
    types=st.dictionaries(st.sampled_from(GGUF_TENSORS), st.integers(0, 41), max_size=2),
    offsets=st.dictionaries(st.sampled_from(GGUF_TENSORS), WHOLE_NUMBERS, max_size=2),
    order=st.sampled_from(["<", ">"]),
    also_look=SOMETIMES,
)
@SETTINGS
def test_a_gguf_header_that_says_anything(
    tmp_path_factory: pytest.TempPathFactory,
    keys: dict[str, Any],
    version: int,
    counts: tuple[int, int] | None,
    also_look: bool,
    order: Literal["<", ">"],
    **said: Any,
) -> None:
    stated = writers.gguf_keys(TINY) | (VOCABULARY if also_look else {}) | keys
    stated = {key: value for key, value in stated.items() if value is not None}
    alignment = stated.get("general.alignment", 32)
    try:
        content = writers.gguf(
            llamacpp(ARRAYS), stated | {"general.alignment": 32}, version=version, order=order, **said
        )
    except struct.error:  # a list of several types
        return
    content = content.replace(
        writers.gguf_text("general.alignment", order) + writers.gguf_value(32, order),
        writers.gguf_text("general.alignment", order) + writers.gguf_value(alignment, order),
    )
    if counts is not None:
        content = content[:8] + struct.pack(order + "2Q", *counts) + content[24:]
    tried(tmp_path_factory.getbasetemp() / "said", {"model.gguf": content}, also_look)


@given(
    st.dictionaries(st.integers(2, 7), WHOLE_NUMBERS, min_size=1, max_size=4),
    st.sampled_from([3, 3, 3, 5, 5, 4]),
    st.integers(0, 3000),
    SOMETIMES,
)
@SETTINGS
def test_an_llmc_header_that_says_anything(
    tmp_path_factory: pytest.TempPathFactory, said: dict[int, int], version: int, length: int, also_look: bool
) -> None:
    header = bytearray(FILES["llm.c"]["gpt2_124M.bin"][:1024])
    header[4] = version
    for number, value in said.items():
        struct.pack_into("<I", header, 4 * number, value % 2**32)
    content = bytes(header) + bytes(length)
    tried(tmp_path_factory.getbasetemp() / "said", {"m.bin": content}, also_look)
    # and of the length that the header tells, where that can be
    n_positions, _, n_layer, _, C, padded = struct.unpack("<6i", header[8:32])
    count = padded * C + n_positions * C + n_layer * (12 * C * C + 13 * C) + 2 * C
    if 0 <= count < 10_000:
        content = bytes(header) + bytes(count * (2 if header[4] == 5 else 4))
        tried(tmp_path_factory.getbasetemp() / "said", {"m.bin": content}, also_look)


def field(number: int, kind: int, value: int, content: bytes) -> bytes:
    """Return a protocol buffer's field of any kind."""
    tag = writers.varint(number << 3 | kind)
    if kind == 0:
        return tag + writers.varint(value)
    if kind == 2:
        return tag + writers.varint(len(content)) + content
    return tag + value.to_bytes(8, "little")[: {1: 8, 5: 4}.get(kind, 0)]


FIELDS = [
    field(number, kind, value, content)
    for number in range(10)
    for kind in (0, 1, 2, 3, 5)
    for value, content in ((0, b""), (1, writers.message((2, b"\x08\2"))), (5, b"\x12\0"), (2**63, b"\xff" * 9))
]
MESSAGES = st.lists(st.sampled_from(FIELDS), max_size=5).map(b"".join)
ENTRIES = st.builds(
    writers.bundle_entry,
    st.sampled_from([1, 1, 1, 2, 3, 14, 19, 77]),
    st.lists(WHOLE_NUMBERS, max_size=4) | st.sampled_from([[5, 2], [3, 2], [2], [1, 2, 6]]),
    st.sampled_from([0, 0, 0, 1, 2**40]),
    WHOLE_NUMBERS,
    st.just(b""),
    size=st.sampled_from([None, 0, 8, 16, 24, 40, 48]) | WHOLE_NUMBERS,
    crc=st.none() | st.integers(0, 2**32 - 1),
    more=st.just(b"") | MESSAGES,
)
VARIABLES = ["", *sorted(openai(ARRAYS)), "model/h0/attn/c_attn/w/Adam", "\udcff"]


@given(
    st.dictionaries(st.sampled_from(VARIABLES), MESSAGES | ENTRIES, min_size=1, max_size=3),
    st.integers(1, 20),
    st.integers(1, 5),
    SOMETIMES,
)
@SETTINGS
def test_an_index_whose_entries_say_anything(
    tmp_path_factory: pytest.TempPathFactory, said: dict[str, bytes], per_block: int, every: int, also_look: bool
) -> None:
    """The entries are in blocks of all kinds with correct checksums."""
    files, offset = FILES["TensorFlow"], 0
    entries = {b"": writers.bundle_header()}
    for name, array in sorted(openai(ARRAYS).items()):
        entries[name.encode()] = writers.bundle_entry(1, array.shape, 0, offset, array.tobytes())
        offset += array.nbytes
    entries |= {name.encode("utf-8", "surrogateescape"): value for name, value in said.items()}
    rows = sorted(entries.items())
    blocks = [rows[at : at + per_block] for at in range(0, len(rows), per_block)]
    index = writers.table(blocks, every=every)
    tried(tmp_path_factory.getbasetemp() / "said", files | {"model.ckpt.index": index}, also_look)


@given(CHANGES, st.integers(0, 3), SOMETIMES)
@SETTINGS
def test_an_index_whose_blocks_are_anything(
    tmp_path_factory: pytest.TempPathFactory, changes: list[Change], which: int, also_look: bool
) -> None:
    """A block is damaged and its checksum corrected, or the footer is damaged."""
    index = FILES["TensorFlow"]["model.ckpt.index"]
    bounds = [0]
    for at in range(len(index) - 48):
        if index[at : at + 4] == struct.pack("<I", writers.masked_crc(index[bounds[-1] : at])):
            bounds.append(at + 4)
    parts = [index[begin:end] for begin, end in zip(bounds, [*bounds[1:], len(index)], strict=True)]
    which %= len(parts)
    if which == len(parts) - 1:
        parts[which] = changed(parts[which], changes, [(0, 12)])
    else:
        size = len(parts[which]) - 4
        block = changed(parts[which][:-4], changes, [])[:size].ljust(size, b"\0")
        parts[which] = block + struct.pack("<I", writers.masked_crc(block))
    files = FILES["TensorFlow"] | {"model.ckpt.index": b"".join(parts)}
    tried(tmp_path_factory.getbasetemp() / "said", files, also_look)


JSON = st.recursive(
    st.none() | st.booleans() | WHOLE_NUMBERS | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
PLACES = st.sampled_from([*list(FILES["sharded"]) * 5, "..", "", "/etc/passwd", "a\0b", "x" * 300, "\ud800", 1, None])


@given(
    st.dictionaries(st.sampled_from([*ARRAYS, "a", "", "\ud800", "lm_head.weight"]), PLACES, max_size=4),
    st.booleans(),
    st.dictionaries(st.sampled_from(["metadata", "a", "b", "weight_map"]), JSON, max_size=1),
    SOMETIMES,
)
@SETTINGS
def test_an_index_of_shards_that_says_anything(
    tmp_path_factory: pytest.TempPathFactory, said: dict[str, Any], whole: bool, more: dict[str, Any], also_look: bool
) -> None:
    name = "model.safetensors.index.json"
    weight_map = (json.loads(FILES["sharded"][name])["weight_map"] if whole else {}) | said
    index = json.dumps({"weight_map": weight_map} | more).encode()
    tried(tmp_path_factory.getbasetemp() / "shards", FILES["sharded"] | {name: index}, also_look)


STATED = json.loads(FILES["safetensors"]["config.json"])
FIELDS_OF_A_CONFIGURATION = st.sampled_from([*STATED, "n_inner", "n_heads", "hidden_size", "eos_token_id"])


@given(st.dictionaries(FIELDS_OF_A_CONFIGURATION, JSON, min_size=1, max_size=3), SOMETIMES)
@SETTINGS
def test_a_configuration_that_says_anything(
    tmp_path_factory: pytest.TempPathFactory, said: dict[str, Any], also_look: bool
) -> None:
    files = FILES["safetensors"] | {"config.json": json.dumps(STATED | said).encode()}
    tried(tmp_path_factory.getbasetemp() / "configuration", files, also_look)


# --- pickles and archives --------------------------------------------------------------------------------------------


def counted(kind: str) -> st.SearchStrategy[bytes]:
    """Return bytes prefixed by their length, sometimes a wrong one."""
    size = struct.calcsize("<" + kind)
    right = st.binary(max_size=6).map(lambda content: struct.pack("<" + kind, len(content)) + content)
    return right | WHOLE_NUMBERS.map(lambda number: struct.pack("<Q", number)[:size] + b"ab")


LINES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=8).map(str.encode)
MODULES = st.sampled_from(sorted({*torch_objects.CALLS, *torch_objects.NAMES, "os.system", "builtins.eval", "a.b"}))
ARGUMENTS: dict[str, st.SearchStrategy[bytes]] = {
    "uint1": st.integers(0, 3).map(lambda n: bytes([n])) | st.binary(min_size=1, max_size=1),
    "uint2": st.binary(min_size=2, max_size=2),
    "int4": st.binary(min_size=4, max_size=4),
    "uint4": st.integers(0, 3).map(lambda n: struct.pack("<I", n)) | st.binary(min_size=4, max_size=4),
    "uint8": st.binary(min_size=8, max_size=8),
    "float8": st.binary(min_size=8, max_size=8),
    "decimalnl_short": (st.integers() | st.integers(0, 3)).map(lambda n: b"%d\n" % n) | LINES.map(lambda s: s + b"\n"),
    "decimalnl_long": st.integers().map(lambda n: b"%dL\n" % n),
    "floatnl": st.floats().map(lambda x: repr(x).encode() + b"\n"),
    "stringnl": LINES.map(lambda s: b"'" + s + b"'\n") | LINES.map(lambda s: s + b"\n"),
    "stringnl_noescape": LINES.map(lambda s: s + b"\n"),
    "stringnl_noescape_pair": MODULES.map(lambda name: "\n".join(name.rsplit(".", 1)).encode() + b"\n"),
    "unicodestringnl": LINES.map(lambda s: s + b"\n"),
}
ARGUMENTS |= {f"{kind}1": counted("B") for kind in ("string", "bytes", "unicodestring", "long")}
ARGUMENTS |= {"string4": counted("i"), "long4": counted("i"), "bytes4": counted("I"), "unicodestring4": counted("I")}
ARGUMENTS |= {f"{kind}8": counted("Q") for kind in ("bytes", "bytearray", "unicodestring")}


def instruction(opcode: pickletools.OpcodeInfo) -> st.SearchStrategy[bytes]:
    """Return a pickle instruction with any argument."""
    code = opcode.code.encode("latin-1")
    if opcode.arg is None:
        return st.just(code)
    return ARGUMENTS[opcode.arg.name].map(lambda argument: code + argument)


OPCODES = st.one_of(*map(instruction, pickletools.opcodes))
A = writers.pickled("a")[2:-1]
TENSOR = writers.pickled(View(Storage("FloatStorage", "0", 10), 0, (5, 2), (2, 1)))[2:-1]
WELL = st.sampled_from(
    [
        *(bytes([code]) for code in b"N}])(\x85\x86sutlRbQ"),
        *(b"K\1", b"q\0", b"h\0", A, TENSOR, b"}(" + A + TENSOR + b"u"),
        *(b"ccollections\nOrderedDict\n)R", b"ctorch._utils\n_rebuild_tensor_v2\n"),
    ]
)

ANY_STEP = st.sampled_from([WELL, WELL, WELL, OPCODES]).flatmap(lambda steps: steps)


def test_every_instruction_is_tried() -> None:
    assert {opcode.arg.name for opcode in pickletools.opcodes if opcode.arg is not None} <= ARGUMENTS.keys()
    assert isinstance(
        pickles.read(TENSOR + b".", "t", torch_objects.CALLS, torch_objects.NAMES, torch_objects.storage_of),
        torch_objects.View,
    )


@given(st.lists(ANY_STEP, max_size=30).map(b"".join))
@settings(max_examples=examples(60, 500), database=None)
def test_any_instructions(program: bytes) -> None:
    with small_and_quick(len(program)):
        try:
            pickles.read(program + b".", "t", torch_objects.CALLS, torch_objects.NAMES, torch_objects.storage_of)
        except NpgptError as error:
            refusal(error)


def with_program(program: bytes) -> Files:
    """Return a torch zip with another pickle and its correct checksum."""
    return {"m.pth": writers.zip_archive(writers.torch_members(program, STORAGES))}


TENSORS, STORAGES = writers.in_storages({f"transformer.{key}": array for key, array in ARRAYS.items()})
HONEST = writers.pickled(StateDict(TENSORS))
STARTS = [at for _, _, at in pickletools.genops(HONEST)]
STEPS = [HONEST[begin:end] for begin, end in zip(STARTS, [*STARTS[1:], len(HONEST)], strict=True)]


@given(
    st.lists(st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 5), ANY_STEP, st.binary(min_size=1, max_size=1))),
    SOMETIMES,
)
@SETTINGS
def test_a_damaged_pickle_with_the_right_checksum(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int, bytes, bytes]], also_look: bool
) -> None:
    """Instructions are removed, doubled, moved, replaced, added, or given another last byte."""
    steps = [*STEPS]
    for number, kind, step, byte in changes[:3]:
        was = steps[number]
        steps[number] = [b"", was + was, steps[-number], step, step + was, was[:-1] + byte][kind]
    tried(tmp_path_factory.getbasetemp() / "said", with_program(b"".join(steps)), also_look)


SIZES = st.sampled_from([0, 1, 1, 2, 2, 2, 3, 5, 6, 8, 10, 2**31, 2**58, 2**62, -1])


def view(storage: Storage | None, offset: int, axes: list[tuple[int, int]], more: int, parameter: bool) -> View:
    """Return a tensor with axes (size, stride), and more sizes without a stride."""
    sizes, strides = [size for size, _ in axes], [stride for _, stride in axes]
    return View(storage, offset, (*sizes, *[1] * more), tuple(strides), parameter)


VIEWS = st.builds(
    view,
    st.builds(
        Storage,
        st.sampled_from(["FloatStorage"] * 4 + ["HalfStorage", "LongStorage", "UntypedStorage"]),
        st.sampled_from([*list(STORAGES) * 3, "99", "../data.pkl", ""]),
        st.sampled_from(sorted(len(content) // 4 for content in STORAGES.values())) | SIZES,
    ),
    st.sampled_from([0, 0, 0, 1, 10]) | SIZES,
    st.lists(st.tuples(SIZES, SIZES), max_size=3)
    | st.sampled_from([[(5, 2), (2, 1)], [(2, 1)], [(6, 1)], [(1, 9)] * 70]),
    st.sampled_from([0, 0, 0, 0, 0, 1]),
    st.booleans(),
)
PLAIN_KEYS = st.sampled_from(["model", "state_dict", "model_args", "config", "n_layer", "n_embd", "n_inner", 0, None])
PLAIN = st.recursive(
    st.none() | st.booleans() | SIZES | st.floats() | st.text(max_size=3) | st.binary(max_size=3) | VIEWS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(PLAIN_KEYS, inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    st.dictionaries(st.sampled_from([f"transformer.{key}" for key in ARRAYS]), VIEWS, max_size=2),
    st.dictionaries(st.sampled_from(["model", "config", "model_args", "best_val_loss", 3]), PLAIN, max_size=3),
    st.sampled_from(["bare", "model", "config"]),
    SOMETIMES,
)
@SETTINGS
def test_tensors_that_say_anything(
    tmp_path_factory: pytest.TempPathFactory,
    said: dict[str, View],
    beside: dict[Any, Any],
    wrapped: str,
    also_look: bool,
) -> None:
    views = TENSORS | said
    value = {**views, **beside} if wrapped == "bare" else {**beside, wrapped: StateDict(views)}
    try:
        program = writers.pickled(value)
    except (struct.error, OverflowError):
        return
    tried(tmp_path_factory.getbasetemp() / "said", with_program(program), also_look)


MEMBERS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(
            ["archive/data.pkl", "archive/data/0", "archive/byteorder", "other/data.pkl", "", "a\0b"]
        ),
        "content": st.binary(max_size=9),
        "deflated": st.booleans(),
        "flags": st.integers(0, 2**16 - 1),
        "crc": st.integers(0, 3),
        "size": WHOLE_NUMBERS.filter(lambda n: n < 2**32),
        "stored": WHOLE_NUMBERS.filter(lambda n: n < 2**32),
        "place": WHOLE_NUMBERS.filter(lambda n: n < 2**32) | st.integers(0, 4000),
        "local_name": st.sampled_from(["", "archive/data/1", "x" * 3000]),
        "listed": st.booleans(),
    },
)


@given(
    st.dictionaries(st.integers(0, 19), MEMBERS, min_size=1, max_size=3),
    st.lists(st.integers(0, 18), max_size=2),
    st.booleans(),
    SOMETIMES,
)
@SETTINGS
def test_members_that_say_anything(
    tmp_path_factory: pytest.TempPathFactory,
    said: dict[int, dict[str, Any]],
    again: list[int],
    zip64: bool,
    also_look: bool,
) -> None:
    members = writers.torch_members(HONEST, STORAGES)
    for number, changes in said.items():
        members[number % len(members)] = members[number % len(members)]._replace(**changes)
    members += [members[number] for number in again]
    content = writers.zip_archive(members, zip64=zip64)
    tried(tmp_path_factory.getbasetemp() / "said", {"m.pth": content}, also_look)


# --- what a small file might make large or endless -------------------------------------------------------------------


def test_many_blocks_without_biases(tmp_path: Path) -> None:
    """Missing biases become zeros in time that does not grow with the number of blocks."""
    config = small(n_layer=250, n_embd=1, n_head=1, vocab_size=2, n_positions=2)
    arrays = {name: array for name, array in random_arrays(config).items() if not name.endswith("bias")}
    linear = {name: array.T if ".c_" in name else array for name, array in arrays.items()}
    path = writers.write(tmp_path, {"model.safetensors": writers.safetensors(linear)})
    start = time.process_time()
    model = npgpt.load(path, n_head=1)
    assert time.process_time() - start < 1
    assert (model.config.n_layer, model.config.activation_function) == (250, "gelu")


def test_a_name_on_which_a_pattern_might_go_back_and_forth(tmp_path: Path) -> None:
    name = "model/" + "/.OPTIMIZER_SLOT/" * 8000 + "\n"
    arrays = {"model/wte": np.ones((2, 2)), name: np.ones(2)}
    path = writers.write(tmp_path, {"model.safetensors": writers.safetensors(arrays)})
    start = time.process_time()
    with pytest.raises(NpgptError, match="lacks n_positions, n_layer"):
        npgpt.load(path)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("form", ["safetensors", "GGUF"])
def test_ten_thousand_blocks_that_are_not_there(tmp_path: Path, form: str) -> None:
    """A file's metadata must not lead to a schema far larger than the file."""
    if form == "GGUF":
        keys = writers.gguf_keys(TINY) | {"gpt2.block_count": 9999}
        files = {"model.gguf": writers.gguf(llamacpp(ARRAYS), keys)}
    else:
        files = FILES[form] | {"config.json": b'{"n_layer": 9999, "n_head": 1}'}
    path = writers.write(tmp_path, files)
    with small_and_quick(2000), pytest.raises(NpgptError, match="it has 1 blocks and n_layer is 9999"):
        npgpt.load(path, n_head=1)


def test_blocks_of_an_index_that_are_empty_and_one_and_the_same(tmp_path: Path) -> None:
    """Without a cache, the checksum of an empty block of 40 KB would be computed 5,000 times."""
    empty = bytes(40_000) + struct.pack("<IB", 10_001, 0)
    empty += struct.pack("<I", writers.masked_crc(empty))
    handle = writers.varint(0) + writers.varint(len(empty) - 5)
    index = writers.table_block([(struct.pack(">I", number), handle) for number in range(5_000)], every=1)
    content = empty + writers.table_block([]) + index
    handles = writers.varint(len(empty)) + writers.varint(8)
    handles += writers.varint(len(content) - len(index)) + writers.varint(len(index) - 5)
    path = writers.write(
        tmp_path, {"m.index": content + handles.ljust(40, b"\0") + (0xDB4775248B80FB57).to_bytes(8, "little")}
    )
    with small_and_quick(len(content)), pytest.raises(NpgptError, match="the block at 0 overlaps the one"):
        npgpt.load(path)


def test_more_entries_than_a_model_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long keys take five bytes each by sharing prefixes."""
    monkeypatch.setattr(tensorflow, "MOST_ENTRIES", 1000)
    entries = [(b"", writers.bundle_header())]
    entries += [(b"x" * 500 + number.to_bytes(3, "big"), b"") for number in range(1000)]
    files = {"m.index": writers.table([entries], every=10**9), "m.data-00000-of-00001": b"x"}
    path = writers.write(tmp_path, files)
    with pytest.raises(NpgptError, match="its keys are more than 1000"):
        npgpt.load(path)


@pytest.mark.parametrize("name", ["x" * 300, "..", ".", "", "a/b", "/etc/passwd", "a\0b", "\ud800"])
def test_a_shard_that_is_no_name_of_a_file_beside(tmp_path: Path, name: str) -> None:
    index = json.dumps({"weight_map": {"wte.weight": name}}).encode()
    path = writers.write(tmp_path, {"model.safetensors.index.json": index})
    with pytest.raises(NpgptError, match=r"lists wte\.weight in .*, but that file is not beside it"):
        npgpt.load(path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gpt2.feed_forward_length": [Typed("I", 8)] * 2}, "gpt2.feed_forward_length is a list"),
        ({"gpt2.block_count": []}, "gpt2.block_count is a list"),
        ({"general.architecture": [Typed("I", 1), Typed("I", 2)]}, "general.architecture is array"),
        ({"general.architecture": ["gpt2"]}, r"general.architecture is \['gpt2'\]"),
        ({"split.count": [Typed("H", 1)] * 2}, "split.count is a list"),
        ({"general.alignment": [Typed("I", 32)]}, "general.alignment must be a positive whole number"),
    ],
)
def test_a_list_in_the_place_of_a_number(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    content = writers.gguf(llamacpp(ARRAYS), {})
    stated = b"".join(
        writers.gguf_text(key, "<") + writers.gguf_value(value, "<")
        for key, value in (writers.gguf_keys(TINY) | keys).items()
    )
    count = struct.pack("<Q", len(writers.gguf_keys(TINY) | keys))
    path = writers.write(tmp_path, {"model.gguf": content[:16] + count + stated + content[24:]})
    with pytest.raises(NpgptError, match=message):
        npgpt.load(path)


@pytest.mark.parametrize("types", [3, "a", ["a"], [[Typed("i", 1)]], [Typed("d", 1.5)] * 258])
def test_types_of_tokens_that_are_no_list_of_numbers(tmp_path: Path, types: Any) -> None:
    keys = writers.gguf_keys(SPEAKING) | VOCABULARY | {"tokenizer.ggml.token_type": types}
    arrays = llamacpp(random_arrays(SPEAKING, dtype="float32"))
    path = writers.write(tmp_path, {"model.gguf": writers.gguf(arrays, keys)})
    assert npgpt.load(path).tokenizer.encode("a") == [CHARACTERS.index("a")]


def test_a_special_token_too_long_for_tiktokens_pattern(tmp_path: Path) -> None:
    """tiktoken would reject the token, but npgpt matches added tokens itself."""
    tokens = [*TEXTS[:-1], "<" + "a" * 600_000 + ">"]
    keys = writers.gguf_keys(SPEAKING) | VOCABULARY | {"tokenizer.ggml.tokens": tokens}
    arrays = llamacpp(random_arrays(SPEAKING, dtype="float32"))
    path = writers.write(tmp_path, {"model.gguf": writers.gguf(arrays, keys)})
    assert npgpt.load(path).config == SPEAKING
    tokenizer = vocabularies.load_tokenizer(path)
    assert tokenizer.encode(f"a{tokens[-1]}a", special=True) == [CHARACTERS.index("a"), 257, CHARACTERS.index("a")]


@pytest.mark.parametrize("n_embd", [None, {}, [], "2", 2.0, True, 10**400])
def test_a_width_that_is_no_number(tmp_path: Path, n_embd: object) -> None:
    files = FILES["safetensors"] | {"config.json": json.dumps(STATED | {"n_embd": n_embd, "n_inner": 8}).encode()}
    with pytest.raises(NpgptError, match="n_embd must be"):
        npgpt.load(writers.write(tmp_path, files))
