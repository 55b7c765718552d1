"""CRC-32C, TensorFlow's checksum of every block and tensor; zlib has another one, NumPy none.

A loop over bytes reads about 10 MB/s, enough for an index and biases; the package google-crc32c (extra crc32c) reads
gigabytes. RFC 3720, B.4, has test vectors.
"""

from __future__ import annotations

import contextlib
import functools
import warnings

import numpy as np
from numpy.typing import NDArray

POLYNOMIAL = 0x82F63B78  # its bits reversed
SMALL = 2**16  # bytes up to which a tensor is read by the loop
CHUNK = 2**24  # bytes that are copied at a time for the package


def crc32c(data: NDArray[np.uint8]) -> int:
    """Return the checksum of bytes [n], by a loop over them."""
    table, register = _table(), 0xFFFFFFFF
    for byte in data.tolist():
        register = table[(register ^ byte) & 255] ^ register >> 8
    return register ^ 0xFFFFFFFF


def crc32c_of_many(data: NDArray[np.uint8]) -> int:
    """Return the checksum of bytes [n], by google-crc32c; see `available`."""
    from google_crc32c import extend

    checksum = 0
    for start in range(0, len(data), CHUNK):
        checksum = extend(checksum, data[start : start + CHUNK].tobytes())
    return checksum


@functools.cache
def available() -> bool:
    """Return whether google-crc32c is installed with its compiled code; its Python code is a loop over bytes, too."""
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore")  # it warns where it is not compiled
        import google_crc32c

        return bool(google_crc32c.implementation == "c")
    return False


@functools.cache
def _table() -> list[int]:
    """Return what each byte makes of a register of 0."""
    table = list(range(256))
    for _ in range(8):
        table = [register >> 1 ^ POLYNOMIAL * (register & 1) for register in table]
    return table
