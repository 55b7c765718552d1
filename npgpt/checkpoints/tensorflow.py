"""Read TensorFlow's tensor bundles, written by tf.train.Saver and tf.train.Checkpoint: OpenAI's own download.

    checkpoint  model.ckpt.index  model.ckpt.data-00000-of-00001

The index is a table in LevelDB's format: blocks of sorted, prefix-compressed keys, each with a checksum. The footer
points to the last block, which lists the others. A key is a tensor's name, and its value a BundleEntryProto; the key
"" has the BundleHeaderProto. See tensorflow, core/lib/io/format.h and core/protobuf/tensor_bundle.proto.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np

from ..errors import NpgptError
from .crc32c import SMALL, available, crc32c, crc32c_of_many
from .tensor import FLOATS, Contents, Cursor, Tensor, check_shape, itemsize, map_file

MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
FOOTER = 48
LARGEST_INDEX, LONGEST_KEY = 2**22, 512  # bytes; gpt2-xl's index takes 20 KB
MOST_ENTRIES = 20_000  # gpt2-xl with Adam's slots has 1742
# core/framework/types.proto, DataType
TYPES = {1: "float32", 2: "float64", 3: "int32", 4: "uint8", 6: "int8", 7: "string", 9: "int64", 10: "bool"}
TYPES |= {14: "bfloat16", 19: "float16"}


def recognises(head: bytes, tail: bytes) -> bool:
    """Return whether a file ends with the magic number of LevelDB's tables."""
    return tail.endswith(MAGIC)


def read(path: Path) -> Contents:
    """Read an .index file and map the data files beside it.

    Without google-crc32c, the checksums of large tensors are not verified. Raises NpgptError, naming the file and the
    tensor, if anything is malformed, damaged, compressed or missing, and for a partitioned variable.
    """
    index = map_file(path)
    if not FOOTER <= len(index) <= LARGEST_INDEX:
        raise NpgptError(f"{path} has {len(index)} bytes, but an index has {FOOTER} to {LARGEST_INDEX}")
    entries = dict(_entries(path, index[:]))
    header, _ = _fields(f"{path}: its header", entries.pop(b"", b""))
    if 1 not in header:  # Saver's V1 format has such a table too, with the tensors inside it
        raise NpgptError(f"{path} is not the index of a TensorFlow V2 checkpoint: its header names no data files")
    n_shards, big_endian = header[1], bool(header[2])
    stem = path.name.removesuffix(".index")
    shards: dict[Path, mmap.mmap] = {}
    tensors: dict[str, Tensor] = {}
    for key, value in entries.items():
        name = key.decode("utf-8", "backslashreplace")
        source = f"{path}: {name:.200}"
        entry, strings = _fields(source, value)
        _, axes = _fields(source, b"".join(strings[2]))
        shape = tuple(_fields(source, axis)[0][1] for axis in axes[2])
        shard, offset, size, checksum = (entry[field] for field in (3, 4, 5, 6))
        dtype = TYPES.get(entry[1], f"of TensorFlow's type {entry[1]}")
        if 7 in entry or 7 in strings:
            raise NpgptError(f"{path}: {name} is a partitioned variable: save it unpartitioned")
        file = path.with_name(f"{stem}.data-{shard:05d}-of-{n_shards:05d}")
        if shard >= n_shards or not os.path.isfile(file):
            raise NpgptError(f"{path}: {name} is in {file.name}, data file {shard + 1} of {n_shards}, which is missing")
        if file not in shards:
            shards[file] = map_file(file)
        check_shape(file, name, shape)
        if dtype in FLOATS and prod(shape) * itemsize(dtype) != size:
            raise NpgptError(f"{path}: {name}, {list(shape)} of {dtype}, does not have the {size} bytes listed")
        if offset + size > len(shards[file]):
            raise NpgptError(
                f"{file} is truncated: {name} ends at byte {offset + size}, the file at {len(shards[file])}"
            )
        verify = functools.partial(_verify, file, name, shards[file], offset, size, checksum)
        checked = verify if size <= SMALL or available() else None
        tensors[name] = Tensor(file, name, shards[file], dtype, shape, offset, big_endian=big_endian, verify=checked)
    large = sum(tensor.verify is None for tensor in tensors.values())
    which = f"{large} of {len(tensors)} tensors, those above {SMALL:,} bytes"
    unchecked = f"not verified for {which}: pip install google-crc32c" if large else None
    return Contents("TensorFlow bundle", (path, *sorted(shards)), tensors, unchecked=unchecked)


def _verify(path: Path, name: str, data: mmap.mmap, begin: int, size: int, expected: int) -> None:
    checksum = crc32c if size <= SMALL else crc32c_of_many
    found = _masked(checksum(np.frombuffer(data, np.uint8, size, begin)))
    if found != expected:
        raise NpgptError(f"{path}: {name} is damaged: its checksum is {found:08x}, not {expected:08x} as in the index")


def _masked(crc: int) -> int:
    """Return a CRC in its stored form, masked since the data may contain CRCs themselves (core/lib/hash/crc32c.h)."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _varint(cursor: Cursor) -> int:
    """Return the next varint: 7 bits per byte, least significant first."""
    number = 0
    for shift in range(0, 64, 7):
        (byte,) = cursor.take(1)
        number |= (byte & 127) << shift
        if byte < 128:
            return number & (2**64 - 1)
    raise NpgptError(f"{cursor.source} is malformed: the number before byte {cursor.at} takes more than 10 bytes")


def _entries(path: Path, index: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a table in order."""
    if not index.endswith(MAGIC):
        raise NpgptError(f"{path} is truncated or not a TensorFlow index: its last 8 bytes are not the magic number")
    footer = Cursor(f"{path}: its footer", index[-FOOTER:])
    _, _, *blocks = (_varint(footer) for _ in range(4))  # offset and size of the metaindex, then of the index
    last: bytes | None = None
    count = end = 0
    for _, handle in _block(path, index, *blocks):
        place = Cursor(f"{path}: its index", handle)
        offset, size = _varint(place), _varint(place)
        if offset < end:
            raise NpgptError(f"{path} is malformed: the block at {offset} overlaps the one that ends at {end}")
        end = offset + size
        for key, entry in _block(path, index, offset, size):
            count += 1
            if count > MOST_ENTRIES or (last is not None and key <= last):
                fault = f"more than {MOST_ENTRIES}" if count > MOST_ENTRIES else "out of order"
                raise NpgptError(f"{path} is malformed: its keys are {fault} at {key!r:.80}")
            last = key
            yield key, entry


def _block(path: Path, index: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a block.

    A block consists of entries {varint shared, unshared and value size; rest of the key; value}, restart points and
    their count. A compression byte and the masked checksum of everything before it follow the block.
    """
    if offset + size + 5 > len(index) - FOOTER or size < 4:
        raise NpgptError(f"{path} is truncated or malformed: a block of {size} bytes at {offset} of {len(index)}")
    block, kind = index[offset : offset + size], index[offset + size]
    expected = int.from_bytes(index[offset + size + 1 :][:4], "little")
    found = _masked(crc32c(np.frombuffer(index, np.uint8, size + 1, offset)))
    if found != expected:
        raise NpgptError(f"{path} is damaged: the block at {offset} has the checksum {found:08x}, not {expected:08x}")
    if kind:
        raise NpgptError(f"{path} is compressed (kind {kind} at byte {offset + size}): TensorFlow writes no such index")
    restarts = 4 * int.from_bytes(block[-4:], "little")
    content, key = block[: max(0, size - 4 - restarts)], b""
    entries = Cursor(f"{path}: its block at {offset}", content)
    while entries.at < len(content):
        shared, rest, length = _varint(entries), _varint(entries), _varint(entries)
        if shared > len(key) or shared + rest > LONGEST_KEY:
            raise NpgptError(f"{entries.source} is malformed: the key after {key!r:.80} is too long")
        key = key[:shared] + entries.take(rest)
        yield key, entries.take(length)


def _fields(source: str, message: bytes) -> tuple[Counter[int], dict[int, list[bytes]]]:
    """Return a protocol buffer's fields by number: the last integer of each (default 0), and all byte strings of each.

    Strings and nested messages are not decoded. The format is described at protobuf.dev, Encoding.
    """
    numbers: Counter[int] = Counter()
    strings: dict[int, list[bytes]] = defaultdict(list)
    cursor = Cursor(source, message)
    while cursor.at < len(message):
        field, kind = divmod(_varint(cursor), 8)
        if kind == 0:
            numbers[field] = _varint(cursor)
        elif kind in (1, 5):
            numbers[field] = int.from_bytes(cursor.take(8 if kind == 1 else 4), "little")
        elif kind == 2:
            strings[field].append(cursor.take(_varint(cursor)))
        else:
            raise NpgptError(f"{source} is malformed: field {field} has wire type {kind}")
    return numbers, strings
