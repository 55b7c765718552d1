"""A ZIP archive whose members are stored as they are, and so can be mapped where they lie.

zipfile reads the directory, and that alone; what it says is checked here against the file (PKWARE, APPNOTE.TXT, 4.3).
"""

from __future__ import annotations

import mmap
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..errors import NpgptError


class Member(NamedTuple):
    """A file in the archive: where its bytes lie, and their CRC-32 (0: torch was told to compute none)."""

    begin: int
    size: int
    crc: int


def directory(path: Path) -> list[zipfile.ZipInfo]:
    """The archive's directory, which zipfile reads. Raises NpgptError where there is none, or it is malformed."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, EOFError, OSError) as error:
        raise NpgptError(f"{path} is no whole ZIP archive, perhaps cut short: {error}") from None


def members(path: Path, data: mmap.mmap, entries: Iterable[zipfile.ZipInfo]) -> dict[str, Member]:
    """Each member's place, by its name.

    Raises NpgptError where one is not stored as it is, leaves the file, stands twice, or lies in another.
    """
    found: dict[str, Member] = {}
    end, last = 0, ""
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        name, start = entry.filename, entry.header_offset
        if name in found:
            raise NpgptError(f"{path}: {name:.200} stands twice in the archive")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            kind = "encrypted" if entry.flag_bits & 1 else "compressed"
            raise NpgptError(f"{path}: {name:.200} is {kind}, and torch.save stores plainly: unpack and zip -0 it")
        header = data[start : start + 30]
        if start < 0 or len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise NpgptError(f"{path}: {name:.200} has no header at byte {start}")
        length, more = struct.unpack("<HH", header[26:30])
        begin = start + 30 + length + more
        if data[start + 30 : start + 30 + length] != _encoded(entry):
            raise NpgptError(f"{path}: {name:.200} should begin at byte {start}, where another member does")
        if start < end:
            raise NpgptError(f"{path}: {name:.200} begins within {last:.200}, at byte {start}")
        end, last = begin + entry.file_size, name
        if entry.compress_size != entry.file_size or end > len(data):
            raise NpgptError(
                f"{path}: {name:.200} has {entry.file_size} bytes, of which {entry.compress_size} are stored "
                f"and {max(0, len(data) - begin)} are there"
            )
        found[name] = Member(begin, entry.file_size, entry.CRC)
    return found


def _encoded(entry: zipfile.ZipInfo) -> bytes:
    """Its name as it stands in the file; a bit tells which encoding zipfile took."""
    return entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")


def contents(path: Path, name: str, data: mmap.mmap, member: Member) -> bytes:
    """A member's bytes. Raises NpgptError as verify does."""
    verify(path, name, data, member)
    return data[member.begin : member.begin + member.size]


def verify(path: Path, name: str, data: mmap.mmap, member: Member) -> None:
    """Raises NpgptError where a member's bytes do not have its CRC-32."""
    with memoryview(data) as view, view[member.begin : member.begin + member.size] as part:
        found = zlib.crc32(part)
    if member.crc not in (0, found):
        raise NpgptError(f"{path}: {name} is damaged: its CRC-32 is {found:08x}, the archive says {member.crc:08x}")
