"""A ZIP archive whose members are stored as they are, and so can be mapped where they lie.

zipfile reads the directory, and that alone; what it says is checked here against the file (PKWARE, APPNOTE.TXT, 4.3).
"""

from __future__ import annotations

import mmap
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..errors import NpgptError
from .tensor import map_file


class Member(NamedTuple):
    """A file in the archive: where its bytes lie, and their CRC-32 (0: torch was told to compute none)."""

    begin: int
    size: int
    crc: int


@dataclass(frozen=True)
class Archive:
    """A mapped archive and its members by name."""

    path: Path
    data: mmap.mmap
    members: Mapping[str, Member]
    verified: set[str] = field(default_factory=set)

    def contents(self, name: str) -> bytes:
        """Return a member's bytes. Raises NpgptError as verify does."""
        self.verify(name)
        begin, size, _ = self.members[name]
        return self.data[begin : begin + size]

    def verify(self, name: str) -> None:
        """Raises NpgptError where a member's bytes, which are read once, do not have its CRC-32."""
        if name in self.verified:
            return
        begin, size, expected = self.members[name]
        with memoryview(self.data) as view, view[begin : begin + size] as part:
            found = zlib.crc32(part)
        if expected not in (0, found):
            raise NpgptError(
                f"{self.path}: {name} is damaged: its CRC-32 is {found:08x}, the archive says {expected:08x}"
            )
        self.verified.add(name)


def directory(path: Path) -> list[zipfile.ZipInfo]:
    """Return the archive's directory, as zipfile reads it. Raises NpgptError where it is missing or malformed."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, EOFError, OSError) as error:
        raise NpgptError(f"{path} is no whole ZIP archive, perhaps cut short: {error}") from None


def read(path: Path, entries: Iterable[zipfile.ZipInfo]) -> Archive:
    """Map the archive whose directory has these entries.

    Raises NpgptError where a member is not stored as it is, leaves the file, stands twice, or lies in another.
    """
    data = map_file(path)
    members: dict[str, Member] = {}
    end, last = 0, ""
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        name, start = f"{path}: {entry.filename:.200}", entry.header_offset
        if entry.filename in members:
            raise NpgptError(f"{name} stands twice in the archive")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            kind = "encrypted" if entry.flag_bits & 1 else "compressed"
            raise NpgptError(f"{name} is {kind}, and torch.save stores plainly: unpack and zip -0 it")
        header = data[start : start + 30]
        if start < 0 or len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise NpgptError(f"{name} has no header at byte {start}")
        length, more = struct.unpack("<HH", header[26:30])
        encoding = "utf-8" if entry.flag_bits & 0x800 else "cp437"  # which zipfile took for the name
        if data[start + 30 : start + 30 + length] != entry.orig_filename.encode(encoding):
            raise NpgptError(f"{name} should begin at byte {start}, where another member does")
        if start < end:
            raise NpgptError(f"{name} begins within {last:.200}, at byte {start}")
        begin = start + 30 + length + more
        end, last = begin + entry.file_size, entry.filename
        if entry.compress_size != entry.file_size or end > len(data):
            raise NpgptError(
                f"{name} has {entry.file_size} bytes, of which {entry.compress_size} are stored "
                f"and {max(0, len(data) - begin)} are there"
            )
        members[entry.filename] = Member(begin, entry.file_size, entry.CRC)
    return Archive(path, data, members)
