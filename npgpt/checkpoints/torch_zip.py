"""Read files of torch.save (PyTorch ≥ 1.6): a ZIP archive with a pickle and the uncompressed bytes of each storage.

    <stem>/data.pkl  <stem>/byteorder  <stem>/data/0 …  <stem>/version

The format is described in pytorch/pytorch, docs/source/notes/serialization.rst and torch/_weights_only_unpickler.py.
pickles.py reads the pickle without executing it. zipfile reads only the archive's directory, which this module checks
against the file (PKWARE, APPNOTE.TXT, 4.3). Storages are mapped, so unused ones, such as optimizer state, cost nothing.
"""

from __future__ import annotations

import functools
import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from ..errors import NpgptError
from . import pickles, training
from .tensor import Contents, Tensor, check_shape, itemsize, map_file
from .torch_objects import CALLS, NAMES, Unread, View, storage_of
from .training import Chosen

LARGEST_PICKLE = 2**24  # bytes; GPT-2's takes 60 KB, or 200 KB with optimizer state


@dataclass(frozen=True)
class Member:
    """An uncompressed file in the archive; a crc of 0 means that torch was told not to compute it."""

    path: Path  # the archive
    name: str
    data: mmap.mmap = field(repr=False)
    begin: int
    size: int
    crc: int

    @functools.cached_property
    def found_crc(self) -> int:
        """Return the CRC-32 of the contents, computed once."""
        with memoryview(self.data) as view, view[self.begin : self.begin + self.size] as part:
            return zlib.crc32(part)

    def verify(self) -> None:
        """Raise NpgptError if the CRC-32 of the contents differs from the archive's."""
        if self.crc not in (0, self.found_crc):
            found = f"its CRC-32 is {self.found_crc:08x}, not {self.crc:08x} as in the archive"
            raise NpgptError(f"{self.path}: {self.name} is damaged: {found}")

    def content(self) -> bytes:
        """Return the contents. Raises NpgptError as verify does."""
        self.verify()
        return self.data[self.begin : self.begin + self.size]


def recognises(head: bytes, tail: bytes) -> bool:
    """Return whether a file begins like a ZIP archive."""
    return head.startswith(b"PK\x03\x04")


def read(path: Path) -> Contents:
    """Read a checkpoint's pickle and map the storages of its tensors.

    Raises NpgptError, naming the file and the tensor, if anything is malformed or compressed, and for a pickle that
    needs more than tensors and plain values.
    """
    return _mapped(path, training.weights_and_configuration)


def read_outputs(path: Path) -> Contents:
    """Read tensors other than a model's: a single one, named ""; a tuple's, named arr_0 and so on; or a dict's.

    Tensors of a tuple inside a dict are numbered. Raises NpgptError as read does.
    """
    return _mapped(path, training.outputs)


def _mapped(path: Path, chosen: Callable[[Path, object], Chosen]) -> Contents:
    """Map the tensors that `chosen` selects from the pickle's value."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, EOFError, OSError) as error:
        raise NpgptError(f"{path} is not a valid ZIP archive, or is truncated: {error}") from None
    names = [entry.filename for entry in entries]
    stems = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(stems) != 1:
        raise NpgptError(
            f"{path} is a ZIP archive but not a checkpoint of torch.save: it has {len(stems)} data.pkl, "
            f"and contains {', '.join(names[:4]):.200}"
        )
    (stem,) = stems
    if f"{stem}/constants.pkl" in names:
        raise NpgptError(f"{path} is a TorchScript program, not a checkpoint: save model.state_dict() instead")
    members = _members(path, entries)
    program, order = members[f"{stem}/data.pkl"], members.get(f"{stem}/byteorder")
    if program.size > LARGEST_PICKLE:
        raise NpgptError(f"{path}: its data.pkl takes {program.size} bytes, more than {LARGEST_PICKLE}")
    byteorder = b"little" if order is None else order.content()  # older versions of torch write none
    if byteorder not in (b"little", b"big"):
        raise NpgptError(f"{path}: its byteorder is {byteorder!r:.40}, neither little nor big")
    value = pickles.read(program.content(), f"{path}: its pickle", CALLS, NAMES, storage_of)
    found = chosen(path, value)
    tensors: dict[str, Tensor] = {}
    for name, view in found.views.items():
        if isinstance(view, Unread):
            raise pickles.refusal(f"{path}: {name:.200}", view.needs)
        storage = f"{stem}/data/{view.storage.key}"
        if storage not in members:
            raise NpgptError(f"{path}: {name} is in {storage:.200}, which is missing")
        tensors[name] = _in_place(name, view, members[storage], byteorder == b"big")
    return Contents("torch zip", (path,), tensors, found.stated, notes=found.notes)


def _members(path: Path, entries: Iterable[zipfile.ZipInfo]) -> dict[str, Member]:
    """Map the members that an archive's directory lists.

    Raises NpgptError if one is compressed or encrypted, extends beyond the file, is listed twice, or overlaps another.
    """
    data = map_file(path)
    members: dict[str, Member] = {}
    end, last = 0, ""
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        name, start = f"{path}: {entry.filename:.200}", entry.header_offset
        if entry.filename in members:
            raise NpgptError(f"{name} is in the archive twice")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            kind = "encrypted" if entry.flag_bits & 1 else "compressed"
            raise NpgptError(f"{name} is {kind}, but torch.save only stores files: unpack the archive and zip -0 it")
        header = data[start : start + 30]
        if start < 0 or len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise NpgptError(f"{name} has no header at byte {start}")
        length, more = struct.unpack("<HH", header[26:30])
        encoding = "utf-8" if entry.flag_bits & 0x800 else "cp437"  # the encoding that zipfile used for the name
        if data[start + 30 : start + 30 + length] != entry.orig_filename.encode(encoding):
            raise NpgptError(f"{name} should begin at byte {start}, but another member does")
        if start < end:
            raise NpgptError(f"{name} at byte {start} overlaps {last:.200}")
        begin = start + 30 + length + more
        end, last = begin + entry.file_size, entry.filename
        if entry.compress_size != entry.file_size or end > len(data):
            raise NpgptError(
                f"{name} should have {entry.file_size} bytes, but {entry.compress_size} are stored "
                f"and {max(0, len(data) - begin)} are left in the file"
            )
        members[entry.filename] = Member(path, entry.filename, data, begin, entry.file_size, entry.CRC)
    return members


def _in_place(name: str, view: View, member: Member, big_endian: bool) -> Tensor:
    """Return a view as a tensor in the file. Raises NpgptError if it does not fit into its storage."""
    path, (_, dtype, numel) = member.path, view.storage
    size = itemsize(dtype)
    if member.size != numel * size:
        raise NpgptError(
            f"{path}: {name} is in {member.name}, which has {member.size} bytes but must have {numel * size}: "
            f"{numel} × {dtype}"
        )
    check_shape(path, name, view.shape)
    last = view.offset + sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))
    if prod(view.shape) and max(last + 1, prod(view.shape)) > numel:
        raise NpgptError(
            f"{path}: {name}, {list(view.shape)} with strides {list(view.strides)} from {view.offset}, does not fit "
            f"into its storage of {numel} elements"
        )
    begin = member.begin + size * view.offset
    return Tensor(path, name, member.data, dtype, view.shape, begin, view.strides, big_endian, member.verify)
