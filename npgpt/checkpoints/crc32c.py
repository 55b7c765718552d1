"""CRC-32C, the checksum that TensorFlow keeps of every block and tensor, over arrays: NumPy has none, zlib another.

A CRC register is a polynomial over GF(2), and reading a zero byte is a linear map of it. So many stretches of the data
are read side by side, each from a register of 0, which zeros before the data leave at 0, and then joined in pairs: the
left register moves on over the right one's bytes and is added. The register that the definition starts from, all ones,
moves on over the whole. Castagnoli, Bräuer & Herrmann 1993; RFC 3720, B.4, has test vectors.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

POLYNOMIAL = np.uint32(0x82F63B78)  # its bits reversed
ONES = np.uint32(0xFFFFFFFF)
LANE = 256  # bytes that a lane reads
SHORT = 8 * LANE  # bytes up to which one after the other is as fast
CHUNK = 2**24  # bytes at a time

Registers = NDArray[np.uint32]


def crc32c(data: NDArray[np.uint8]) -> int:
    """The checksum of bytes [n]."""
    if len(data) < SHORT:
        return _one_by_one(data.tolist())
    register = np.array([ONES])
    for start in range(0, len(data), CHUNK):
        chunk = data[start : start + CHUNK]
        register = _apply(_zero_bytes(len(chunk)), register) ^ _from_zero(chunk)
    return int(register[0] ^ ONES)


def _one_by_one(data: list[int]) -> int:
    """The same by the definition, a byte at a time."""
    table, register = _bytes(), int(ONES)
    for byte in data:
        register = table[(register ^ byte) & 255] ^ (register >> 8)
    return register ^ int(ONES)


def _from_zero(data: NDArray[np.uint8]) -> Registers:
    """The register [1] after the data, from 0: lanes side by side, a power of two of them, then joined in pairs."""
    lanes = 1 << max(0, -(-len(data) // LANE) - 1).bit_length()
    padded = np.zeros(lanes * LANE, np.uint8)
    padded[len(padded) - len(data) :] = data
    words = padded.view("<u4").reshape(lanes, LANE // 4)
    tables = _tables()
    registers = np.zeros(lanes, np.uint32)
    for word in words.T:
        registers ^= word
        registers = (
            tables[3][registers & 255]
            ^ tables[2][registers >> 8 & 255]
            ^ tables[1][registers >> 16 & 255]
            ^ tables[0][registers >> 24]
        )
    length = LANE
    while len(registers) > 1:
        registers = _apply(_zero_bytes(length), registers[::2]) ^ registers[1::2]
        length *= 2
    return registers


def _apply(columns: Registers, registers: Registers) -> Registers:
    """A linear map, given by its images of the 32 single bits, of registers."""
    out = np.zeros_like(registers)
    for bit, column in enumerate(columns):
        out ^= column * (registers >> bit & 1)
    return out


@functools.lru_cache(maxsize=256)
def _zero_bytes(count: int) -> Registers:
    """The map that is reading `count` zero bytes, by squaring."""
    if count == 0:
        return np.uint32(1) << np.arange(32, dtype=np.uint32)
    if count == 1:
        return _read_zero(_zero_bytes(0))
    half = _zero_bytes(count // 2)
    whole = _apply(half, half)
    return _apply(_zero_bytes(1), whole) if count % 2 else whole


def _read_zero(registers: Registers) -> Registers:
    for _ in range(8):
        registers = registers >> np.uint32(1) ^ POLYNOMIAL * (registers & np.uint32(1))
    return registers


@functools.lru_cache(maxsize=1)
def _bytes() -> list[int]:
    """What each byte makes of a register of 0."""
    table: list[int] = _tables()[0].tolist()
    return table


@functools.lru_cache(maxsize=1)
def _tables() -> NDArray[Any]:
    """[4, 256]: what a byte makes of a register of 0, with 0 to 3 zero bytes after it."""
    tables = [_read_zero(np.arange(256, dtype=np.uint32))]
    for _ in range(3):
        tables.append(_read_zero(tables[-1]))
    return np.stack(tables)
