"""Read and write safetensors files: the header is checked completely, and the data are mapped.

A file is a little-endian u64 header length, a JSON header {name: {dtype, shape, data_offsets}, "__metadata__":
{str: str}}, and raw little-endian data. The checks and their order are those of the reference reader (huggingface,
safetensors/src/tensor.rs). Duplicate keys, NaN and deep nesting, which Python's json accepts, are errors as well.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import NpgptError
from ..parameters import Shape
from . import strict_json
from .atomic import writing
from .tensor import Contents, Tensor, check_shape, itemsize, map_file

MAX_HEADER = 16_000_000  # the reference reader allows 100 MB; 10,000 blocks need 15 MB, and parsed JSON takes more
ALIGNMENT = 64  # in files written here, the data begin at a multiple of this

BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6} | dict.fromkeys(
    ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8
)
BITS |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
BITS |= {"F64": 64, "I64": 64, "U64": 64, "C64": 64}
NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}  # dtypes of weights
WRITTEN = {name: dtype for dtype, name in NAMES.items()} | {"int64": "I64"}  # int64 for token ids
Parts: TypeAlias = Callable[[str], Iterable[NDArray[Any]]]  # maps a tensor's name to its contents in parts


def recognises(head: bytes, tail: bytes) -> bool:
    """Return whether a file begins with a plausible header length and the opening brace of JSON."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100 * MAX_HEADER


def read(path: Path) -> Contents:
    """Map a safetensors file and check its header completely.

    Raises NpgptError, naming the file and the tensor, if it is malformed; OSError if it cannot be opened.
    """
    data = map_file(path)
    return Contents("safetensors", (path,), _header(path, data, len(data)))


def _header(path: Path, data: mmap.mmap, size: int) -> dict[str, Tensor]:
    if size < 8:
        raise NpgptError(f"{path} is not a safetensors file: {size} bytes, but the header length alone takes 8")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise NpgptError(f"{path} is not a safetensors file: its header length {length} exceeds {MAX_HEADER}")
    if 8 + length > size:
        raise NpgptError(f"{path} is truncated: its header ends at byte {8 + length}, the file at {size}")
    header = strict_json.read_object(data[8 : 8 + length], f"{path}: its header")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise NpgptError(f"{path}: its __metadata__ must map strings to strings")
    entries = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    tensors: dict[str, Tensor] = {}
    expected = 8 + length
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != expected or end < begin:
            raise NpgptError(
                f"{path}: {name} spans bytes {begin} to {end}, but must begin at {expected}, "
                "where the previous tensor ends"
            )
        bits = prod(shape) * BITS[dtype]
        if bits % 8 or bits // 8 != end - begin:
            raise NpgptError(
                f"{path}: {name}, {dtype} {list(shape)}, takes {bits / 8:g} bytes, but its offsets span {end - begin}"
            )
        tensors[name] = Tensor(path, name, data, NAMES.get(dtype, dtype), shape, begin)
        expected = end
    if expected != size:
        raise NpgptError(f"{path} is truncated or too long: its tensors end at byte {expected}, the file at {size}")
    return tensors | aliases(metadata, tensors)


def aliases(metadata: Mapping[str, object], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that the metadata list as aliases of others, by name.

    If tensors share memory, such as a tied head and wte, safetensors' save_model stores one of them and writes
    {"omitted name": "stored name"} to the metadata.
    """
    pairs = ((name, stored) for name, stored in metadata.items() if isinstance(stored, str) and name != "format")
    return {name: tensors[stored] for name, stored in pairs if stored in tensors and name not in tensors}


def _entry(path: Path, name: str, entry: object, data_start: int) -> tuple[str, Shape, int, int]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise NpgptError(f"{path}: the header's entry for {name} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise NpgptError(f"{path}: {name} has the unknown dtype {dtype!r:.40}")
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        # type(…) is int, since True is an int to isinstance; the bound is the reference reader's word size
        if not isinstance(value, list) or not all(type(number) is int and 0 <= number < 2**63 for number in value):
            raise NpgptError(f"{path}: the {key} of {name} must be a list of sizes, not {value!r:.80}")
    if len(offsets) != 2:
        raise NpgptError(f"{path}: {name} must have two data_offsets, not {offsets!r:.80}")
    check_shape(path, name, tuple(shape))
    return dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1]


def write(
    path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write float16, float32, float64 or int64 arrays in the given order; see write_parts."""
    layout = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
    write_parts(path, layout, lambda name: [arrays[name]], metadata)


def write_parts(
    path: str | os.PathLike[str],
    layout: Mapping[str, tuple[str, Shape]],
    parts: Parts,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors {name: (dtype, shape)} in the given order; the data begin at a 64-byte boundary.

    parts returns a tensor's contents in consecutive parts, bfloat16 as uint16 bits, so no tensor has to fit in memory.
    The file appears complete or not at all: a temporary file is written, synced and renamed. Raises NpgptError for
    another dtype, a reserved name, and names or metadata that are not strings.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}  # transformers needs "format"
    offset = 0
    if not all(isinstance(text, str) for text in (*layout, *(metadata or {}), *(metadata or {}).values())):
        raise NpgptError(f"{path}: tensor names and metadata must be strings")
    for name, (dtype, shape) in layout.items():
        if dtype not in WRITTEN:
            raise NpgptError(f"{path}: {name} is {dtype}, but npgpt writes only {', '.join(WRITTEN)}")
        if name == "__metadata__":
            raise NpgptError(f"{path}: a tensor cannot be named __metadata__")
        offsets = [offset, offset + prod(shape) * itemsize(dtype)]
        header[name] = {"dtype": WRITTEN[dtype], "shape": list(shape), "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with writing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in layout:
            for part in parts(name):
                file.write(np.ascontiguousarray(part, part.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data)
        if file.tell() != 8 + len(text) + offset:
            raise AssertionError(f"{path}: {file.tell()} bytes written, {8 + len(text) + offset} expected")
