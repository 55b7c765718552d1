"""Recognise a file's format by its content and read it. A new format is a module and a row in READERS."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from ..errors import NpgptError
from . import gguf, llmc, safetensors, sharded, tensorflow, torch_zip
from .tensor import Contents, check_file

# Whether a file's first and last bytes are of the format, and the function that reads it.
READERS: tuple[tuple[Callable[[bytes, bytes], bool], Callable[[Path], Contents]], ...] = (
    (torch_zip.recognises, torch_zip.read),
    (gguf.recognises, gguf.read),
    (llmc.recognises, llmc.read),
    (tensorflow.recognises, tensorflow.read),
    (safetensors.recognises, safetensors.read),
)
# What a folder is searched for first; the names say nothing about the format.
WEIGHTS_FILE = "model.safetensors"
PREFERRED = (
    WEIGHTS_FILE,
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")  # peft's
ADAPTER_CONFIG = "adapter_config.json"
# The first bytes of files that are often taken for a checkpoint, and what they are.
OTHERS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: fetch it with git lfs pull"),
    (b"\x89HDF", "HDF5 (Keras), which npgpt does not read: take the model's safetensors or pytorch_model.bin"),
    (b"\x80\x02\x8a\nl\xfc\x9cF", "torch.save's form from before 1.6: load it in PyTorch and torch.save it anew"),
    (b"\x80", "a bare pickle, which npgpt does not read: torch.save(model.state_dict(), …) writes what it does"),
    (llmc.STATE, "llm.c's reference state (logits and gradients), not a model"),
    (llmc.TOKENIZER, "llm.c's tokenizer, not a model"),
    (b"\x1f\x8b", "compressed with gzip: unpack it"),
    (b"<!DOCTYPE html", "a web page: the download went wrong"),
    (b"<html", "a web page: the download went wrong"),
)


def read(path: Path, *, may_be_index: bool = True) -> Contents:
    """Read a checkpoint's file, or the files that an index lists.

    Raises NpgptError for an unknown format and as the readers do, OSError where the file cannot be opened.
    """
    head, tail = _ends(path)
    if (reader := _reader(head, tail)) is not None:
        return reader(path)
    if may_be_index and head.lstrip().startswith(b"{"):
        return sharded.read(path, lambda file: read(file, may_be_index=False))
    if re.search(r"\.data-\d+-of-\d+$", path.name) or path.name.endswith(".ckpt.meta"):
        raise NpgptError(f"{path} is a part of a TensorFlow checkpoint: give its .index file, or the folder")
    raise NpgptError(f"{path} is {_described(head)}")


def find(folder: Path) -> Path | None:
    """Return the checkpoint in a folder: the one with a usual name, else the only one of a known format, else None.

    An adapter has a usual name too. Of several TensorFlow checkpoints it is the one that the file `checkpoint` names.
    Raises NpgptError if there are several others, OSError where the folder cannot be read.
    """
    usual = [folder / name for name in PREFERRED if (folder / name).is_file()][:1]
    usual += [folder / name for name in ADAPTERS if (folder / name).is_file()][:1]
    if len(usual) == 1:
        return usual[0]
    if usual:
        raise NpgptError(
            f"the folder {folder} has a model, {usual[0].name}, and an adapter, {usual[1].name}; say which"
        )
    known = [path for path in sorted(folder.iterdir()) if path.is_file() and _reader(*_ends(path)) is not None]
    latest = folder / "checkpoint"
    if len(known) > 1 and latest.is_file():
        stated = latest.read_text("utf-8", "replace").partition("\n")[0]  # model_checkpoint_path: "model.ckpt-1000"
        name = stated.partition('"')[2].rpartition('"')[0].rpartition("/")[2]
        known = [path for path in known if path.name == f"{name}.index"] or known
    if len(known) > 1:
        names = ", ".join(path.name for path in known[:8])
        raise NpgptError(f"the folder {folder} has several checkpoints: {names}; say which")
    return known[0] if known else None


def _reader(head: bytes, tail: bytes) -> Callable[[Path], Contents] | None:
    return next((read for recognises, read in READERS if recognises(head, tail)), None)


def _ends(path: Path) -> tuple[bytes, bytes]:
    """Return a file's first and last bytes. Raises NpgptError where it is not a regular file."""
    check_file(path)
    with path.open("rb") as file:
        head = file.read(64)
        file.seek(-min(64, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return head, file.read(64)


def _described(head: bytes) -> str:
    for magic, description in OTHERS:
        if head.startswith(magic):
            return description
    known = "safetensors, torch.save's ZIP, a TensorFlow .index, llm.c's .bin, GGUF"
    return f"no checkpoint that npgpt reads ({known}): it begins with {head[:8]!r}" if head else "empty: 0 bytes"
