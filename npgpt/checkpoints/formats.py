"""Recognise a checkpoint's format by its content and read it. A new format is a module and a row in READERS."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..errors import NpgptError
from . import gguf, llmc, safetensors, sharded, stand_ins, tensorflow, torch_zip
from .files import INDEX, read_bytes, reading
from .tensor import Contents

# A test of a file's first and last bytes, and the function that reads files of that format.
READERS: tuple[tuple[Callable[[bytes, bytes], bool], Callable[[Path], Contents]], ...] = (
    (torch_zip.recognises, torch_zip.read),
    (gguf.recognises, gguf.read),
    (llmc.recognises, llmc.read),
    (tensorflow.recognises, tensorflow.read),
    (safetensors.recognises, safetensors.read),
)
# Preferred file names in a folder; the content alone determines the format.
WEIGHTS_FILE = "model.safetensors"
PREFERRED = (
    WEIGHTS_FILE,
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")  # peft's
ADAPTER_CONFIG = "adapter_config.json"


def read(path: Path, *, may_be_index: bool = True) -> Contents:
    """Read a checkpoint's file, or the files that an index lists.

    Raises NpgptError for an unknown format and as the readers do, OSError if the file cannot be opened.
    """
    head, tail = _ends(path)
    if may_be_index and (part := stand_ins.part(path)) is not None:
        raise NpgptError(f"{path} is {part}")
    if (reader := _reader(head, tail)) is not None:
        contents = reader(path)
        tensors = contents.tensors.items()
        if stub := [name for name, tensor in tensors if tensor.shape == (0,) and name.endswith(".weight")]:
            raise NpgptError(f"{path}: {stub[0]:.80} has no elements: this is a stub that belongs to {stand_ins.ZERO}")
        return contents
    if may_be_index and head.lstrip().startswith(b"{"):
        return sharded.read(path, lambda file: read(file, may_be_index=False))
    raise NpgptError(f"{path} is {stand_ins.whole(path) or _unknown(head)}")


def find(folder: Path) -> Path | None:
    """Return the checkpoint in a folder: the one with a usual name, else the only one of a known format, else None.

    Adapters have usual names too. Among several TensorFlow checkpoints, the file `checkpoint` names the latest. Raises
    NpgptError if the choice is ambiguous, OSError if the folder cannot be read.
    """
    usual = [folder / name for name in PREFERRED if (folder / name).is_file()][:1]
    usual += [folder / name for name in ADAPTERS if (folder / name).is_file()][:1]
    if len(usual) == 1:
        return usual[0]
    if usual:
        raise NpgptError(
            f"the folder {folder} has a model, {usual[0].name}, and an adapter, {usual[1].name}; give one of them"
        )
    known = [path for path in sorted(folder.iterdir()) if path.is_file() and stand_ins.part(path) is None]
    known = [path for path in known if _reader(*_ends(path)) is not None]
    latest = folder / "checkpoint"
    if len(known) > 1 and latest.is_file():
        content = read_bytes(latest, INDEX).decode("utf-8", "replace")
        stated = content.partition("\n")[0]  # model_checkpoint_path: "model.ckpt-1000"
        name = stated.partition('"')[2].rpartition('"')[0].rpartition("/")[2]
        known = [path for path in known if path.name == f"{name}.index"] or known
    if len(known) > 1:
        names = ", ".join(path.name for path in known[:8])
        raise NpgptError(f"the folder {folder} has several checkpoints: {names}; give one of them")
    return known[0] if known else None


def _reader(head: bytes, tail: bytes) -> Callable[[Path], Contents] | None:
    return next((read for recognises, read in READERS if recognises(head, tail)), None)


def _ends(path: Path) -> tuple[bytes, bytes]:
    """Return a file's first and last 64 bytes. Raises NpgptError if it is not a regular file."""
    with reading(path) as file:
        head = file.read(64)
        file.seek(-min(64, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return head, file.read(64)


def _unknown(head: bytes) -> str:
    known = "safetensors, torch.save's ZIP, a TensorFlow .index, llm.c's .bin, GGUF"
    return f"not a checkpoint that npgpt reads ({known}): it begins with {head[:8]!r}" if head else "empty: 0 bytes"
