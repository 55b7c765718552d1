"""Write checkpoints of every kind by hand, from each format's description, without the real programs.

A second derivation of what npgpt reads, so nothing from npgpt.checkpoints is used. Every field that describes the file
itself (a size, a checksum, an offset) can be overridden, so that tests can write what no real program would.
"""

from __future__ import annotations

import functools
import io
import json
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from npgpt.checkpoints import configs
from npgpt.config import Config
from tests.support.namings import llamacpp, llms_from_scratch, openai

Arrays = Mapping[str, NDArray[Any]]
Files = dict[str, bytes]  # by name; the first is the one to load
Order = Literal["little", "big"]

# --- ZIP (PKWARE, APPNOTE.TXT 6.3.10) --------------------------------------------------------------------------------


class Member(NamedTuple):
    """A file in an archive; a field that is not None overrides the true value in the archive."""

    name: str
    content: bytes
    deflated: bool = False
    flags: int = 0
    crc: int | None = None
    size: int | None = None  # unpacked size in the directory
    stored: int | None = None  # packed size in the directory
    place: int | None = None  # the directory's offset
    local_name: str | None = None  # the name in the local header
    listed: bool = True  # whether it is in the directory


def zip_archive(members: Iterable[Member], *, alignment: int = 64, zip64: bool = False, comment: bytes = b"") -> bytes:
    """Return an archive whose members' bytes are aligned by an extra field, as torch does."""
    content, directory, count = b"", b"", 0
    for member in members:
        packed = member.content
        if member.deflated:
            deflate = zlib.compressobj(wbits=-15)
            packed = deflate.compress(member.content) + deflate.flush()
        crc = zlib.crc32(member.content) if member.crc is None else member.crc
        size = len(member.content) if member.size is None else member.size
        stored = len(packed) if member.stored is None else member.stored
        place = len(content) if member.place is None else member.place
        local_name = (member.name if member.local_name is None else member.local_name).encode()
        method, name = 8 * member.deflated, member.name.encode()
        padding = -(len(content) + 30 + len(local_name) + 4) % alignment
        extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        content += struct.pack(
            "<4s5H3I2H", b"PK\3\4", 20, member.flags, method, 0, 33, crc, stored, size, len(local_name), len(extra)
        )
        content += local_name + extra + packed
        if member.listed:
            long = struct.pack("<2H3Q", 1, 24, size, stored, place) if zip64 else b""
            size, stored, place = (2**32 - 1,) * 3 if zip64 else (size, stored, place)
            head = struct.pack("<4s6H3I", b"PK\1\2", 45, 45, member.flags, method, 0, 33, crc, stored, size)
            directory += head + struct.pack("<5H2I", len(name), len(long), 0, 0, 0, 0, place) + name + long
            count += 1
    start, end = len(content), len(content) + len(directory)
    content += directory
    if zip64:
        content += struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), start)
        content += struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
        return content + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *(2**16 - 1,) * 2, *(2**32 - 1,) * 2, 0)
    end_record = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(directory), start, len(comment))
    return content + end_record + comment


# --- torch.save (pytorch/pytorch, docs/source/notes/serialization.rst) -----------------------------------------------


class Global:
    """A name for the pickle to import; it is callable because pickle requires that of functions it writes."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self, *arguments: object) -> object:
        """Never called; only the name is written."""
        raise AssertionError(self.name)


class Storage(NamedTuple):
    """A storage, as its persistent id describes it."""

    kind: str
    key: str
    numel: int


class View(NamedTuple):
    """A tensor, which is a view of a storage; a parameter wraps one."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    parameter: bool = False


class Call(NamedTuple):
    """Any other call: function, arguments, and the state for BUILD."""

    function: Any
    arguments: tuple[Any, ...] = ()
    state: Any = None


class StateDict(OrderedDict[str, Any]):
    """An OrderedDict with attributes, as torch.nn.Module.state_dict returns; BUILD sets its _metadata."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), {"_metadata": OrderedDict(version=1)}, None, iter(self.items())


class Pickler(pickle._Pickler):
    """Python's own pickler, extended to write torch's objects without importing torch."""

    def persistent_id(self, obj: object) -> object:
        """Return a storage's persistent id."""
        if isinstance(obj, Storage):
            return "storage", Global("torch", obj.kind), obj.key, "cpu", obj.numel
        return None

    def reducer_override(self, obj: object) -> Any:
        """Reduce a tensor or one of the tests' own calls."""
        hooks = Call(OrderedDict)
        if isinstance(obj, View) and obj.parameter:
            return Global("torch._utils", "_rebuild_parameter"), (obj._replace(parameter=False), True, hooks)
        if isinstance(obj, View):
            return Global("torch._utils", "_rebuild_tensor_v2"), (*obj[:4], False, hooks)
        if isinstance(obj, Call):
            return obj.function, obj.arguments, obj.state
        return NotImplemented

    def save_global(self, obj: Any, name: str | None = None) -> None:
        """Write a name without checking that it exists."""
        if isinstance(obj, Global):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())  # type: ignore[attr-defined]
            self.memoize(obj)  # type: ignore[attr-defined]
        else:
            super().save_global(obj, name)  # type: ignore[misc]

    dispatch = pickle._Pickler.dispatch | {Global: save_global}  # type: ignore[assignment]


def pickled(value: object, protocol: int = 2) -> bytes:
    """Return a pickle as torch.save writes it."""
    file = io.BytesIO()
    Pickler(file, protocol).dump(value)
    return file.getvalue()


KINDS = {"float32": "Float", "float64": "Double", "float16": "Half", "int64": "Long", "int32": "Int", "int16": "Short"}
KINDS |= {"int8": "Char", "uint8": "Byte", "bool": "Bool"}


def in_storages(arrays: Arrays, byteorder: Order = "little") -> tuple[dict[str, View], dict[str, bytes]]:
    """Return each array as a tensor, and the storages' bytes; an array given twice shares its storage."""
    views: dict[str, View] = {}
    storages: dict[str, bytes] = {}
    keys: dict[int, str] = {}
    for name, array in arrays.items():
        key = keys.setdefault(id(array), str(len(keys)))
        storage = Storage(f"{KINDS[str(array.dtype)]}Storage", key, array.size)
        strides = tuple(prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
        views[name] = View(storage, 0, array.shape, strides)
        storages[key] = np.ascontiguousarray(array, array.dtype.newbyteorder(byteorder)).tobytes()
    return views, storages


def torch_members(
    program: bytes, storages: Mapping[str, bytes], *, stem: str = "archive", byteorder: str | None = "little"
) -> list[Member]:
    """Return an archive's members in torch's order: pickle, byte order, storages, version."""
    order = [] if byteorder is None else [Member(f"{stem}/byteorder", byteorder.encode())]
    data = [Member(f"{stem}/data/{key}", content) for key, content in storages.items()]
    return [Member(f"{stem}/data.pkl", program), *order, *data, Member(f"{stem}/version", b"3\n")]


def torch_zip(
    arrays: Arrays,
    *,
    wrap: Callable[[Any], object] = lambda state: state,
    byteorder: Order = "little",
    **options: Any,
) -> bytes:
    """Return what torch.save writes for a state dict, or for wrap's result."""
    views, storages = in_storages(arrays, byteorder)
    return zip_archive(torch_members(pickled(wrap(StateDict(views))), storages, byteorder=byteorder), **options)


# --- GGUF (ggml-org/ggml, docs/gguf.md) ------------------------------------------------------------------------------

VALUE_TYPES = {"B": 0, "b": 1, "H": 2, "h": 3, "I": 4, "i": 5, "f": 6, "?": 7, "Q": 10, "q": 11, "d": 12}
LETTERS: dict[type, str] = {bool: "?", int: "I", float: "f", str: "s"}
TENSOR_TYPES = {"float32": 0, "float16": 1, "int8": 24, "int16": 25, "int32": 26, "int64": 27, "float64": 28}


class Typed(NamedTuple):
    """A value of a stated type: struct's letter, or "s" for text."""

    kind: str
    value: Any


def gguf_text(text: str, order: str) -> bytes:
    """Return a text prefixed by its length."""
    return struct.pack(order + "Q", len(text.encode())) + text.encode()


def gguf_value(value: Any, order: str) -> bytes:
    """Return a value prefixed by its type."""
    kind, content = typed(value, order)
    return struct.pack(order + "I", kind) + content


def typed(value: Any, order: str) -> tuple[int, bytes]:
    """Return a value's type and bytes; a list's begin with its elements' type and its length."""
    if isinstance(value, list):
        items = [typed(item, order) for item in value]
        head = struct.pack(order + "IQ", items[0][0] if items else 8, len(items))
        return 9, head + b"".join(content for _, content in items)
    kind, value = value if isinstance(value, Typed) else (LETTERS[type(value)], value)
    if kind == "s":
        return 8, gguf_text(value, order)
    return VALUE_TYPES[kind], struct.pack(order + kind, value)


def gguf(
    arrays: Arrays,
    keys: Mapping[str, Any],
    *,
    version: int = 3,
    order: Literal["<", ">"] = "<",
    types: Mapping[str, int] | None = None,
    dims: Mapping[str, Sequence[int]] | None = None,
    offsets: Mapping[str, int] | None = None,
) -> bytes:
    """Return a GGUF file of tensors and keys; types, dims and offsets override what it states."""
    alignment = keys.get("general.alignment", 32)
    head = struct.pack(order + "4sIQQ", b"GGUF", version, len(arrays), len(keys))
    head += b"".join(gguf_text(key, order) + gguf_value(value, order) for key, value in keys.items())
    data = b""
    for name, array in arrays.items():
        data += bytes(-len(data) % alignment)
        sizes = (dims or {}).get(name, array.shape[::-1])
        kind = (types or {}).get(name, TENSOR_TYPES[str(array.dtype)])
        head += gguf_text(name, order) + struct.pack(f"{order}I{len(sizes)}QI", len(sizes), *sizes, kind)
        head += struct.pack(order + "Q", (offsets or {}).get(name, len(data)))
        data += np.ascontiguousarray(array, array.dtype.newbyteorder(order)).tobytes()
    return head + bytes(-len(head) % alignment) + data


# --- llm.c (karpathy/llm.c, train_gpt2.py, write_model) --------------------------------------------------------------


def llmc(config: Config, arrays: Arrays, *, version: int = 3, padded: int | None = None) -> bytes:
    """Return llm.c's model file in float32 (version 3) or bfloat16 (5), from arrays by canonical names."""
    vocab_size = config.vocab_size
    padded = vocab_size if padded is None else padded
    header = np.zeros(256, "<i4")
    header[:8] = 20240326, version, config.n_positions, vocab_size, config.n_layer, config.n_head, config.n_embd, padded
    parts = [arrays["wte.weight"], np.zeros((padded - vocab_size, config.n_embd)), arrays["wpe.weight"]]
    for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for kind in ("weight", "bias"):
            parts += [arrays[f"h.{layer}.{name}.{kind}"].T for layer in range(config.n_layer)]
    parts += [arrays["ln_f.weight"], arrays["ln_f.bias"]]
    values = np.concatenate([part.ravel() for part in parts]).astype("<f4")
    return header.tobytes() + (values.tobytes() if version == 3 else bfloat16(values).tobytes())


def bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the upper halves of float32 values whose lower halves must be zero."""
    bits = values.view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


# --- TensorFlow (core/lib/io/table_format.txt, core/protobuf/tensor_bundle.proto) ------------------------------------

DATA_TYPES = {"float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int8": 6, "int64": 9, "bool": 10, "float16": 19}


@functools.cache
def after_8_bits(register: int) -> int:
    """Return a CRC register below 256 after 8 steps of the reflected polynomial, from the definition."""
    for _ in range(8):
        register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register


@functools.lru_cache(maxsize=4096)
def crc32c(content: bytes) -> int:
    """Return the CRC-32C, byte by byte, starting from all ones and inverting the result."""
    register = 0xFFFFFFFF
    for byte in content:
        register = register >> 8 ^ after_8_bits((register ^ byte) & 0xFF)
    return register ^ 0xFFFFFFFF


def masked_crc(content: bytes) -> int:
    """Return a CRC as it is stored: rotated right by 15 bits, plus a constant."""
    crc = crc32c(content)
    return ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32


def varint(number: int) -> bytes:
    """Return a varint: 7 bits a byte, lowest first."""
    low = b""
    while number > 127:
        low += bytes([number & 127 | 128])
        number >>= 7
    return low + bytes([number])


def message(*fields: tuple[int, int | bytes]) -> bytes:
    """Return a protocol buffer of integers and bytes; zeros are omitted as in proto3."""
    encoded = b""
    for number, value in fields:
        if isinstance(value, bytes):
            encoded += varint(number << 3 | 2) + varint(len(value)) + value
        elif value:
            encoded += varint(number << 3) + varint(value)
    return encoded


def bundle_header(shards: int = 1, big_endian: bool = False) -> bytes:
    """Return a BundleHeaderProto."""
    return message((1, shards), (2, int(big_endian)), (3, message((1, 1))))


def bundle_entry(
    kind: int,
    shape: Iterable[int],
    shard: int,
    offset: int,
    content: bytes,
    *,
    size: int | None = None,
    crc: int | None = None,
    more: bytes = b"",
) -> bytes:
    """Return a BundleEntryProto; size and crc override the true values, more adds fields."""
    dims = b"".join(message((2, message((1, size)) if size else b"")) for size in shape)
    place = message((3, shard), (4, offset), (5, len(content) if size is None else size))
    checksum = struct.pack("<BI", 6 << 3 | 5, masked_crc(content) if crc is None else crc)
    return message((1, kind), (2, dims)) + place + checksum + more


def table_block(entries: Sequence[tuple[bytes, bytes]], *, every: int = 16, kind: int = 0) -> bytes:
    """Return a block with its trailer; except for every 16th, keys omit the prefix shared with the previous one."""
    content, restarts, last = b"", [], b""
    for number, (key, value) in enumerate(entries):
        shared = 0
        if number % every == 0:
            restarts.append(len(content))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        content += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    restarts = restarts or [0]
    content += struct.pack(f"<{len(restarts)}II", *restarts, len(restarts)) + bytes([kind])
    return content + struct.pack("<I", masked_crc(content))


def table(blocks: Iterable[Sequence[tuple[bytes, bytes]]], *, every: int = 16, kind: int = 0) -> bytes:
    """Return a table of blocks of sorted entries; kind is the compression that the blocks claim."""
    rows = [(block[-1][0], table_block(block, every=every, kind=kind)) for block in blocks]
    last, block = rows[-1]
    above = bytes(byte + 1 for byte in last[:1] if byte < 255)  # the shortest key above the last
    return framed([*rows[:-1], (above or last, block)])


def framed(blocks: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return a table of the given blocks, each with an upper bound of its keys, plus metaindex, index and footer."""
    content, index = b"", []
    for last, block in blocks:
        index.append((last, varint(len(content)) + varint(len(block) - 5)))
        content += block
    handles = b""
    for block in (table_block([]), table_block(index, every=1)):
        handles += varint(len(content)) + varint(len(block) - 5)
        content += block
    return content + handles.ljust(40, b"\0") + (0xDB4775248B80FB57).to_bytes(8, "little")


def bundle(
    arrays: Arrays,
    *,
    shards: int = 1,
    per_block: int = 8,
    big_endian: bool = False,
    sliced: str | None = None,
    compression: int = 0,
    stem: str = "model.ckpt",
) -> Files:
    """Return a tensor bundle, tensors distributed over the shards in turn; sliced claims to be stored in parts."""
    data = [b""] * shards
    entries = [(b"", bundle_header(shards, big_endian))]
    for turn, name in enumerate(sorted(arrays, key=str.encode)):
        array = arrays[name]
        content = np.ascontiguousarray(array, array.dtype.newbyteorder(">" if big_endian else "<")).tobytes()
        more = message((7, message((1, message((2, 4)))))) if name == sliced else b""
        kind, shard = DATA_TYPES[str(array.dtype)], turn % shards
        entry = bundle_entry(kind, array.shape, shard, len(data[shard]), content, more=more)
        entries.append((name.encode(), entry))
        data[shard] += content
    blocks = [entries[at : at + per_block] for at in range(0, len(entries), per_block)]
    files = {f"{stem}.index": table(blocks, kind=compression)}
    return files | {f"{stem}.data-{n:05d}-of-{shards:05d}": content for n, content in enumerate(data)}


# --- safetensors (huggingface/safetensors, README.md) ----------------------------------------------------------------


def safetensors(arrays: Arrays) -> bytes:
    """Return a safetensors file of float32 arrays."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in arrays.items():
        content = np.ascontiguousarray(array, "<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


# --- one model in every form -----------------------------------------------------------------------------------------


def gguf_keys(config: Config) -> dict[str, Any]:
    """Return the keys that llama.cpp's converter writes for a GPT-2."""
    return {
        "general.architecture": "gpt2",
        "gpt2.block_count": config.n_layer,
        "gpt2.context_length": config.n_positions,
        "gpt2.embedding_length": config.n_embd,
        "gpt2.feed_forward_length": config.inner_width,
        "gpt2.attention.head_count": config.n_head,
        "gpt2.attention.layer_norm_epsilon": config.layer_norm_epsilon,
    }


def in_shards(config: Config, arrays: Arrays) -> Files:
    """Return safetensors in two files and their index."""
    names = sorted(arrays)
    shards = {f"model-{n + 1:05d}-of-00002.safetensors": names[n::2] for n in range(2)}
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    files = {file: safetensors({name: arrays[name] for name in held}) for file, held in shards.items()}
    return {"model.safetensors.index.json": index, **files, "config.json": config_json(config)}


def config_json(config: Config) -> bytes:
    """Return the configuration under Hugging Face's names."""
    return json.dumps(configs.to_dict(config)).encode()


# Each form's files for a model of canonical names, the one to load first.
FORMS: dict[str, Callable[[Config, Arrays], Files]] = {
    "safetensors": lambda config, arrays: {
        "model.safetensors": safetensors(arrays),
        "config.json": config_json(config),
    },
    "sharded": in_shards,
    "torch zip": lambda config, arrays: {
        "pytorch_model.bin": torch_zip({f"transformer.{name}": array for name, array in arrays.items()})
    },
    "torch zip, LLMs-from-scratch": lambda config, arrays: {
        "model.pth": torch_zip(
            llms_from_scratch(arrays), wrap=lambda state: {"model_state_dict": state, "epoch": 3}, zip64=True
        )
    },
    "torch zip, big-endian": lambda config, arrays: {"model.pth": torch_zip(arrays, byteorder="big")},
    "GGUF": lambda config, arrays: {"model.gguf": gguf(llamacpp(arrays), gguf_keys(config))},
    "GGUF 2, big-endian": lambda config, arrays: {
        "model.gguf": gguf(llamacpp(arrays), gguf_keys(config), version=2, order=">")
    },
    "llm.c": lambda config, arrays: {"gpt2_124M.bin": llmc(config, arrays, padded=config.vocab_size + 3)},
    "TensorFlow": lambda config, arrays: bundle(openai(arrays)),
    "TensorFlow, 2 shards, big-endian": lambda config, arrays: bundle(openai(arrays), shards=2, big_endian=True),
}


def write(folder: Path, files: Files) -> Path:
    """Write files to a folder, as new files because mapped ones must not change; return the first one's path."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)
    return folder / next(iter(files))
