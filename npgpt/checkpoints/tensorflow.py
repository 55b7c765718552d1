"""TensorFlow's container, the tensor bundle of tf.train.Saver and tf.train.Checkpoint: OpenAI's own download.

    checkpoint  model.ckpt.index  model.ckpt.data-00000-of-00001

The index is a table in LevelDB's format: blocks of keys that share prefixes, sorted, each block with a checksum; the
last one, found by the footer, lists the others. A key is a tensor's name, its value a BundleEntryProto; the key ""
holds the BundleHeaderProto. tensorflow, core/lib/io/format.h and core/protobuf/tensor_bundle.proto.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np

from ..errors import NpgptError
from .crc32c import crc32c
from .tensor import FLOATS, Tensor, check_shape, itemsize, map_file
from .tensor import Contents as Container

MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
FOOTER = 48
LARGEST_INDEX, LONGEST_KEY = 2**22, 512  # bytes; gpt2-xl's index takes 20 KB
MOST_ENTRIES = 20_000  # gpt2-xl, with Adam's slots, has 1742
# core/framework/types.proto, DataType
TYPES = {1: "float32", 2: "float64", 3: "int32", 4: "uint8", 6: "int8", 7: "string", 9: "int64", 10: "bool"}
TYPES |= {14: "bfloat16", 19: "float16"}

Fields: TypeAlias = dict[int, list[int | bytes]]
T = TypeVar("T", int, bytes)


def recognises(head: bytes, tail: bytes) -> bool:
    """Whether a file ends with the magic of a table."""
    return tail.endswith(MAGIC)


def read(path: Path) -> Container:
    """Read an index and map its data files, which lie beside it; path is the .index file.

    Raises NpgptError, naming the file and the tensor, for whatever is malformed, damaged, compressed or missing, and
    for a variable that was saved in parts.
    """
    index = map_file(path)
    if not FOOTER <= len(index) <= LARGEST_INDEX:
        raise NpgptError(f"{path} has {len(index)} bytes, and an index has {FOOTER} to {LARGEST_INDEX}")
    entries = dict(_entries(path, index[:]))
    header = _fields(path, "its header", entries.pop(b"", b""))
    if not _all(header, 1, int):  # Saver's older form has the same table, with the tensors in it
        raise NpgptError(f"{path} is no index of TensorFlow's V2 checkpoints: its header names no data files")
    n_shards, big_endian = _number(header, 1), bool(_number(header, 2))
    stem = path.name.removesuffix(".index")
    shards: dict[Path, mmap.mmap] = {}
    tensors: dict[str, Tensor] = {}
    for key, value in entries.items():
        name = key.decode("utf-8", "backslashreplace")
        entry = _fields(path, name, value)
        sizes = _fields(path, name, b"".join(_all(entry, 2, bytes)))
        shape = tuple(_number(_fields(path, name, size), 1) for size in _all(sizes, 2, bytes))
        shard, offset, size = (_number(entry, field) for field in (3, 4, 5))
        dtype = TYPES.get(_number(entry, 1), f"of TensorFlow's type {_number(entry, 1)}")
        if 7 in entry:
            raise NpgptError(f"{path}: {name} is a variable that was saved in parts (partitioned): save it whole")
        file = path.with_name(f"{stem}.data-{shard:05d}-of-{n_shards:05d}")
        if shard >= n_shards or not os.path.isfile(file):
            raise NpgptError(f"{path}: {name} lies in {file.name}, data file {shard + 1} of {n_shards}: it is not here")
        if file not in shards:
            shards[file] = map_file(file)
        check_shape(file, name, shape)
        if dtype in FLOATS and prod(shape) * itemsize(dtype) != size:
            raise NpgptError(f"{path}: {name}, {list(shape)} of {dtype}, does not take the {size} bytes it has")
        if offset + size > len(shards[file]):
            raise NpgptError(
                f"{file} is cut short: {name} ends at byte {offset + size}, the file at {len(shards[file])}"
            )
        verify = functools.partial(_verify, file, name, shards[file], offset, size, _number(entry, 6))
        tensors[name] = Tensor(file, name, shards[file], dtype, shape, offset, big_endian=big_endian, verify=verify)
    return Container("TensorFlow bundle", (path, *sorted(shards)), tensors)


def _verify(path: Path, name: str, data: mmap.mmap, begin: int, size: int, expected: int) -> None:
    found = _masked(crc32c(np.frombuffer(data, np.uint8, size, begin)))
    if found != expected:
        raise NpgptError(f"{path}: {name} is damaged: its checksum is {found:08x}, the index says {expected:08x}")


def _masked(crc: int) -> int:
    """As it is stored, so that a checksum of data that holds checksums is no accident (core/lib/hash/crc32c.h)."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _entries(path: Path, index: bytes) -> Iterator[tuple[bytes, bytes]]:
    """All keys and values of a table, in order."""
    footer = index[-FOOTER:]
    if footer[-8:] != MAGIC:
        raise NpgptError(f"{path} is no TensorFlow index, or cut short: its last 8 bytes are not the magic number")
    at = 0
    handle = []
    for _ in range(4):  # metaindex offset and size, then the index's
        number, at = _varint(path, footer, at)
        handle.append(number)
    last: bytes | None = None
    count = end = 0
    for _, value in _block(path, index, *handle[2:]):
        offset, at = _varint(path, value, 0)
        size, _ = _varint(path, value, at)
        if offset < end:
            raise NpgptError(f"{path} is malformed: the block at {offset} begins within the one that ends at {end}")
        end = offset + size
        for key, entry in _block(path, index, offset, size):
            count += 1
            if (last is not None and key <= last) or count > MOST_ENTRIES:
                fault = "not in order" if count <= MOST_ENTRIES else f"more than {MOST_ENTRIES}"
                raise NpgptError(f"{path} is malformed: its keys are {fault} at {key!r:.80}")
            last = key
            yield key, entry


def _block(path: Path, index: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a block: {varint shared, unshared, size; key's rest; value}, restart points, their number;
    then, outside of the block, one byte of compression and the masked checksum of it all.
    """
    if offset + size + 5 > len(index) - FOOTER or size < 4:
        raise NpgptError(f"{path} is cut short or malformed: a block of {size} bytes at {offset} of {len(index)}")
    block, kind, stored = index[offset : offset + size], index[offset + size], index[offset + size + 1 :][:4]
    found, expected = _masked(crc32c(np.frombuffer(block + bytes([kind]), np.uint8))), int.from_bytes(stored, "little")
    if found != expected:
        raise NpgptError(f"{path} is damaged: the block at {offset} has the checksum {found:08x}, not {expected:08x}")
    if kind:
        raise NpgptError(f"{path} is compressed (kind {kind} at byte {offset + size}), which TensorFlow's own are not")
    end = size - 4 - 4 * int.from_bytes(block[-4:], "little")
    key, at = b"", 0
    while at < end:
        shared, at = _varint(path, block, at)
        rest, at = _varint(path, block, at)
        length, at = _varint(path, block, at)
        if shared > len(key) or shared + rest > LONGEST_KEY or at + rest + length > end:
            raise NpgptError(f"{path} is malformed: an entry at {at} of the block at {offset} is too long")
        key = key[:shared] + block[at : at + rest]
        yield key, block[at + rest : at + rest + length]
        at += rest + length


def _varint(path: Path, data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first, and where it ends."""
    number = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            break
        number |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return number & (2**64 - 1), at
    raise NpgptError(f"{path} is malformed: a number does not end at byte {at} of its {len(data)}")


def _fields(path: Path, name: str, message: bytes) -> Fields:
    """A protocol buffer's fields by their number, undecoded: integers, and bytes (protobuf.dev, Encoding)."""
    fields: Fields = {}
    at = 0
    while at < len(message):
        tag, at = _varint(path, message, at)
        kind = tag & 7
        value: int | bytes
        if kind == 0:
            value, at = _varint(path, message, at)
        elif kind in (1, 2, 5):
            length, at = _varint(path, message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = message[at : at + length], at + length
            if kind != 2:
                value = int.from_bytes(value, "little")
        else:
            raise NpgptError(f"{path}: {name:.200} is malformed: a field of kind {kind}")
        if at > len(message):
            raise NpgptError(f"{path}: {name:.200} is malformed: a field leaves its {len(message)} bytes")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _all(fields: Fields, number: int, kind: type[T]) -> list[T]:
    return [value for value in fields.get(number, ()) if isinstance(value, kind)]


def _number(fields: Fields, number: int) -> int:
    """The field's last value; 0, which is left out, where there is none."""
    return (_all(fields, number, int) or [0])[-1]
