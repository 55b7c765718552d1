"""The safetensors container: bytes to named arrays and back, mapped into memory and trusted in nothing.

A file is a u64 little-endian header length, a JSON header {name: {dtype, shape, data_offsets}, "__metadata__":
{str: str}}, and raw little-endian data. The checks and their order are those of the reference reader (huggingface,
safetensors/src/tensor.rs), with what Python's json would let pass on top: a key given twice, NaN, deep nesting.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import strict_json
from ..errors import NpgptError
from ..parameters import Array, Shape
from .atomic import writing

MAX_HEADER = 100_000_000
ALIGNMENT = 64  # files written here begin their data on a multiple of this

BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6} | dict.fromkeys(
    ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8
)
BITS |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
BITS |= {"F64": 64, "I64": 64, "U64": 64, "C64": 64}
FLOATS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}  # what a weight may be, and how its bytes are read
WRITTEN = {"float16": "F16", "float32": "F32", "float64": "F64"}


@dataclass(frozen=True)
class Tensor:
    """One entry of the header; begin and end count bytes of the file."""

    dtype: str
    shape: Shape
    begin: int
    end: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A checked header over a mapped file; nothing of the data is read until it is asked for."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    data: mmap.mmap = field(repr=False)

    def stored(self, name: str) -> NDArray[Any]:
        """The tensor as it lies in the file, read-only and not copied; bfloat16 as its uint16 bits.

        Raises NpgptError where its dtype is none of F16, BF16, F32 and F64.
        """
        tensor = self.tensors[name]
        if tensor.dtype not in FLOATS:
            raise NpgptError(f"{self.path}: {name} is {tensor.dtype}; a weight is one of {', '.join(FLOATS)}")
        dtype = np.dtype(FLOATS[tensor.dtype])
        if tensor.begin == tensor.end:
            return np.empty(tensor.shape, dtype)
        return np.frombuffer(self.data, dtype, prod(tensor.shape), tensor.begin).reshape(tensor.shape)

    def load(self, name: str, dtype: str = "float32") -> Array:
        """The tensor as float32 or float64: the mapped bytes themselves where they are that already and lie on a
        multiple of their size, else one copy in aligned memory (a misaligned weight NumPy would copy in every product).

        Raises NpgptError as `stored` does, and where a finite F64 value is too large for float32.
        """
        stored = self.stored(name)
        if self.tensors[name].dtype == "BF16":
            stored = (stored.astype(np.uint32) << 16).view(np.float32)  # bfloat16 is float32's upper half
        if stored.dtype == dtype and stored.flags.aligned:
            return stored
        with np.errstate(over="raise", invalid="ignore"):  # a signalling NaN stays a NaN
            try:
                return stored.astype(dtype)
            except FloatingPointError:
                raise NpgptError(f"{self.path}: {name} has values too large for {dtype}; load it as float64") from None

    def misaligned(self) -> list[str]:
        """The float tensors that do not lie on a multiple of their element's size, and so cost a copy."""
        return [
            name
            for name, t in self.tensors.items()
            if t.dtype in FLOATS and t.begin % np.dtype(FLOATS[t.dtype]).itemsize
        ]


def read(path: str | os.PathLike[str]) -> SafetensorsFile:
    """Map a safetensors file and check its header in full.

    Raises NpgptError, naming the file and the tensor, for whatever is malformed; OSError where it cannot be opened.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise NpgptError(f"{path} is no safetensors file: {size} bytes, and the header's length alone takes 8")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        tensors, metadata = _header(path, data, size)
    except BaseException:
        data.close()
        raise
    return SafetensorsFile(path, tensors, metadata, data)


def _header(path: Path, data: mmap.mmap, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise NpgptError(f"{path} is no safetensors file: it claims a header of {length} bytes, above {MAX_HEADER}")
    if 8 + length > size:
        raise NpgptError(f"{path} is cut short: its header ends at byte {8 + length}, the file at {size}")
    header = strict_json.read_object(data[8 : 8 + length], f"{path}: its header")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise NpgptError(f"{path}: its __metadata__ must map text to text")
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    end = 8 + length
    for name, tensor in tensors.items():
        if tensor.begin != end or tensor.end < tensor.begin:
            raise NpgptError(
                f"{path}: {name} lies from byte {tensor.begin} to {tensor.end} and must begin at {end}, "
                "where the one before it ends"
            )
        bits = prod(tensor.shape) * BITS[tensor.dtype]
        if bits % 8 or bits // 8 != tensor.end - tensor.begin:
            raise NpgptError(
                f"{path}: {name}, {tensor.dtype} {list(tensor.shape)}, takes {bits / 8:g} bytes "
                f"and its offsets span {tensor.end - tensor.begin}"
            )
        end = tensor.end
    if end != size:
        raise NpgptError(f"{path} is cut short or overlong: its tensors end at byte {end}, the file at {size}")
    return tensors, metadata


def _entry(path: Path, name: str, entry: object, data_start: int) -> Tensor:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise NpgptError(f"{path}: the header's entry for {name} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise NpgptError(f"{path}: {name} has the unknown dtype {dtype!r:.40}")
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        # type(…) is int, since True is an int to isinstance; the bound is the reference reader's word size
        if not isinstance(value, list) or not all(type(number) is int and 0 <= number < 2**63 for number in value):
            raise NpgptError(f"{path}: {name} has a {key} that is no list of sizes: {value!r:.80}")
    # np.ndarray has at most 64 dimensions, and bounds the product of those that are not 0
    if len(offsets) != 2 or len(shape) > 64 or prod(size or 1 for size in shape) * BITS[dtype] >= 2**63:
        raise NpgptError(
            f"{path}: {name} has a shape or data_offsets that no file can hold: {shape!r:.80}, {offsets!r:.80}"
        )
    return Tensor(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write float16, float32 or float64 arrays in the order given, the data beginning on a 64-byte boundary.

    The file appears whole or not at all: written beside its place, synced, renamed. Raises NpgptError for another
    dtype or a name that the format reserves.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}  # transformers asks for "format"
    offset = 0
    if not all(isinstance(text, str) for text in (*tensors, *(metadata or {}), *(metadata or {}).values())):
        raise NpgptError(f"{path}: the names of tensors, and metadata, are text")
    for name, array in tensors.items():
        if str(array.dtype) not in WRITTEN:
            raise NpgptError(f"{path}: {name} is {array.dtype}; written are {', '.join(WRITTEN)}")
        if name == "__metadata__":
            raise NpgptError(f"{path}: __metadata__ is no name for a tensor")
        offsets = [offset, offset + array.nbytes]
        header[name] = {"dtype": WRITTEN[str(array.dtype)], "shape": list(array.shape), "data_offsets": offsets}
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with writing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data)
