"""Tensors in mapped files: what every reader returns, without reading any array before it is used."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import NpgptError
from ..parameters import Array, Shape
from .files import is_input, reading

FLOATS = ("float16", "bfloat16", "float32", "float64")  # the dtypes of weights
LONGEST_SHAPE = 64  # the most dimensions that a NumPy array can have


class Stated(NamedTuple):
    """Configuration fields that a file states, in any program's spelling; source names the file in errors."""

    source: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Tensor:
    """The position and layout of an array in a mapped file.

    dtype is the name of a NumPy dtype, bfloat16, or the format's own name for any other type. begin is the offset in
    the file in bytes; strides count elements (None: C order). verify raises NpgptError if the array's checksum is
    wrong. Quantised types have block, (values per block, bytes per block), and widen, which returns float32.
    """

    path: Path
    name: str
    data: mmap.mmap = field(repr=False)
    dtype: str
    shape: Shape
    begin: int
    strides: tuple[int, ...] | None = None
    big_endian: bool = False
    verify: Callable[[], None] | None = field(default=None, repr=False)
    block: tuple[int, int] | None = None
    widen: Callable[[], NDArray[np.float32]] | None = field(default=None, repr=False)

    @property
    def stored_dtype(self) -> str:
        """Return the dtype of the array that stored() returns."""
        return self.dtype if self.widen is None else "float32"

    @property
    def nbytes(self) -> int:
        """Return the size of the tensor in bytes, 0 for a dtype that no weight has."""
        values, size = self.block or (1, itemsize(self.dtype) if self.dtype in FLOATS else 0)
        return prod(self.shape) // values * size

    @property
    def misaligned(self) -> bool:
        """Return whether the address is not a multiple of the element size: NumPy would copy it in every product."""
        return self.dtype in FLOATS and self.begin % itemsize(self.dtype) != 0

    def stored(self) -> NDArray[Any]:
        """Return the array as a read-only view of the file; bfloat16 as uint16 bits.

        A quantised array is dequantised to float32. Raises NpgptError for a dtype that is not a float, and for a wrong
        checksum.
        """
        if self.widen is not None:
            return self.widen()
        if self.dtype not in FLOATS:
            raise NpgptError(f"{self.path}: {self.name} is {self.dtype}, not one of {', '.join(FLOATS)}")
        if self.verify is not None:
            self.verify()
        dtype = np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)
        dtype = dtype.newbyteorder(">" if self.big_endian else "<")
        if not prod(self.shape):
            return np.empty(self.shape, dtype)
        strides = None if self.strides is None else [stride * dtype.itemsize for stride in self.strides]
        return np.ndarray(self.shape, dtype, self.data, self.begin, strides)

    def load(self, dtype: str = "float32") -> Array:
        """Return the array as float32 or float64; see `cast`. Raises NpgptError as `stored` and `cast` do."""
        return load(self.stored(), self.stored_dtype, dtype, f"{self.path}: {self.name}")


class Source(NamedTuple):
    """How to assemble a canonical tensor from stored ones.

    parts are concatenated along the last axis, such as queries, keys and values; no parts means zeros, for a bias that
    the checkpoint omits. entry selects one layer of a stack; transposed marks matrices that are stored [out, in].
    """

    parts: tuple[str, ...]
    transposed: bool = False
    entry: int | None = None

    def shape(self, tensors: Mapping[str, Tensor]) -> Shape | None:
        """Return the shape, or None for zeros, which take any shape. Raises NpgptError for parts of unequal shapes."""
        if not self.parts:
            return None
        first, *others = (tensors[name] for name in self.parts)
        if unlike := [tensor for tensor in others if tensor.shape != first.shape]:
            raise NpgptError(
                f"{first.path}: {first.name} is {list(first.shape)}, but {unlike[0].name} is {list(unlike[0].shape)}: "
                "queries, keys and values must have the same shape"
            )
        shape = first.shape if self.entry is None else first.shape[1:]
        shape = shape[::-1] if self.transposed else shape
        return (*shape[:-1], shape[-1] * len(self.parts)) if others and shape else shape

    def stored(self, tensors: Mapping[str, Tensor]) -> tuple[NDArray[Any], str]:
        """Return the array and its dtype as stored, as a view of the file if there is one part; not for zeros.

        Raises NpgptError as Tensor.stored does, and for parts of different dtypes.
        """
        first, *others = (tensors[name] for name in self.parts)
        if unlike := [tensor for tensor in others if tensor.dtype != first.dtype]:
            raise NpgptError(f"{first.path}: {first.name} is {first.dtype}, but {unlike[0].name} is {unlike[0].dtype}")
        arrays = [tensor.stored() for tensor in (first, *others)]
        arrays = [array if self.entry is None else array[self.entry] for array in arrays]
        arrays = [array.T if self.transposed else array for array in arrays]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1), first.stored_dtype


@dataclass(frozen=True)
class Contents:
    """The checked contents of a checkpoint's files, with their arrays mapped.

    stated is the configuration inside the files. vocabulary returns the vocabulary inside the files as Hugging Face's
    files by name, or is None. unchecked names the checksums that are not verified and how to verify them; None if all
    are verified or the format has none. notes tell the user what is left out. home, set only for an adapter, is the
    file beside the vocabulary. outdated are the configuration fields that an adapter's tensors change.
    """

    format: str
    files: tuple[Path, ...]
    tensors: Mapping[str, Tensor]
    stated: Stated | None = None
    vocabulary: Callable[[], dict[str, bytes]] | None = field(default=None, repr=False)
    unchecked: str | None = None
    notes: tuple[str, ...] = ()
    home: Path | None = None
    outdated: frozenset[str] = frozenset()


class Cursor:
    """A position in a sequence of bytes, which is read from front to back; source names the bytes in errors."""

    def __init__(self, source: str, data: bytes | mmap.mmap, at: int = 0) -> None:
        self.source, self.data, self.at = source, data, at

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes. Raises NpgptError if fewer are left."""
        if self.at + size > len(self.data):
            raise NpgptError(f"{self.source} is truncated: {size} bytes expected at {self.at} of {len(self.data)}")
        self.at += size
        return self.data[self.at - size : self.at]


def itemsize(dtype: str) -> int:
    """Return the element size of a NumPy dtype or bfloat16 in bytes."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def cast(stored: NDArray[Any], stored_dtype: str, dtype: str, name: str) -> NDArray[Any]:
    """Return an array as float16, bfloat16 (uint16 bits), float32 or float64, rounded to nearest, ties to even.

    An aligned array that already has this dtype is returned without a copy. Raises NpgptError, with the name, if a
    finite value is too large for dtype.
    """
    if stored_dtype == dtype:
        native = stored.dtype.newbyteorder("=")
        return stored if stored.flags.aligned and stored.dtype == native else np.array(stored, native)
    if stored_dtype == "bfloat16":  # float32's upper half
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="raise", invalid="ignore"):  # a signalling NaN stays a NaN
        try:
            narrow = stored.astype("float32" if dtype == "bfloat16" else dtype, copy=False)
        except FloatingPointError:
            raise _too_large(name, dtype) from None
    return _upper_half(narrow, name) if dtype == "bfloat16" else narrow


def _upper_half(x: NDArray[np.float32], name: str) -> NDArray[np.uint16]:
    """Return the bits of the nearest bfloat16. Raises NpgptError if a finite value would round to infinity."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    upper = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    finite = np.isfinite(x)
    if (upper[finite] & 0x7F80 == 0x7F80).any():
        raise _too_large(name, "bfloat16")
    special = (bits >> 16 | ((bits & 0xFFFF != 0) << 6)).astype(np.uint16)  # keep a NaN with a low payload a NaN
    return np.where(finite, upper, special)


def _too_large(name: str, dtype: str) -> NpgptError:
    return NpgptError(f"{name} has values too large for {dtype}: use a wider dtype")


def load(stored: NDArray[Any], stored_dtype: str, dtype: str, name: str) -> Array:
    """Return `cast`'s array in C or Fortran order, which matrix products use without copying."""
    array = cast(stored, stored_dtype, dtype, name)
    return array if array.flags.c_contiguous or array.flags.f_contiguous else np.ascontiguousarray(array)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are bit-identical. Raises NpgptError as Tensor.stored does."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if one.block is not None:  # equal blocks dequantise to equal values
        end, other_end = one.begin + one.nbytes, other.begin + one.nbytes
        return one.data[one.begin : end] == other.data[other.begin : other_end]
    first, second = (tensor.stored() for tensor in (one, other))
    bits = f"u{first.dtype.itemsize}"
    return (one.data is other.data and (one.begin, one.strides) == (other.begin, other.strides)) or np.array_equal(
        first.view(bits), second.view(bits)
    )


def row_blocks(array: NDArray[Any], size: int = 2**24) -> Iterator[NDArray[Any]]:
    """Yield the array in parts of about `size` bytes, split along its first axis."""
    if array.ndim == 0 or array.nbytes <= size:
        yield array
        return
    step = max(1, size * len(array) // array.nbytes)
    for start in range(0, len(array), step):
        yield array[start : start + step]


def map_file(path: Path) -> mmap.mmap:
    """Map a file into memory; its bytes are read when they are used.

    Raises NpgptError if it is empty, missing or not a regular file, OSError if it cannot be opened.
    """
    with reading(path) as file:
        is_input(path)
        if os.fstat(file.fileno()).st_size == 0:
            raise NpgptError(f"{path} is empty: 0 bytes")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def check_shape(path: Path, name: str, shape: Shape) -> None:
    """Raise NpgptError for more dimensions or elements than an array can have; no size may be negative."""
    # np.ndarray limits the product of the nonzero sizes, in bytes
    if len(shape) > LONGEST_SHAPE or prod(size or 1 for size in shape) >= 2**59:
        raise NpgptError(f"{path}: {name} has an impossible shape: {list(shape)!r:.80}")
