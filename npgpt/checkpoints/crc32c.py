"""Compute CRC-32C, TensorFlow's checksum for blocks and tensors, which neither zlib nor NumPy offers.

A Python loop over the bytes reaches about 10 MB/s, fast enough for an index and for biases. The package google-crc32c
(extra crc32c) handles gigabytes. RFC 3720, B.4, has test vectors.
"""

from __future__ import annotations

import contextlib
import functools
import warnings

import numpy as np
from numpy.typing import NDArray

POLYNOMIAL = 0x82F63B78  # in reversed bit order
SMALL = 2**16  # the largest tensor, in bytes, whose checksum the loop computes
CHUNK = 2**24  # bytes copied at a time for google-crc32c


def crc32c(data: NDArray[np.uint8]) -> int:
    """Return the checksum of bytes [n], computed by a loop in Python."""
    table, register = _table(), 0xFFFFFFFF
    for byte in data.tolist():
        register = table[(register ^ byte) & 255] ^ register >> 8
    return register ^ 0xFFFFFFFF


def crc32c_of_many(data: NDArray[np.uint8]) -> int:
    """Return the checksum of bytes [n], computed by google-crc32c; see `available`."""
    from google_crc32c import extend

    checksum = 0
    for start in range(0, len(data), CHUNK):
        checksum = extend(checksum, data[start : start + CHUNK].tobytes())
    return checksum


@functools.cache
def available() -> bool:
    """Return whether google-crc32c is installed with its C extension; its Python fallback is as slow as the loop."""
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore")  # it warns if the C extension is missing
        import google_crc32c

        return bool(google_crc32c.implementation == "c")
    return False


@functools.cache
def _table() -> list[int]:
    """Return the lookup table: the register after each byte value, starting from 0."""
    table = list(range(256))
    for _ in range(8):
        table = [register >> 1 ^ POLYNOMIAL * (register & 1) for register in table]
    return table
