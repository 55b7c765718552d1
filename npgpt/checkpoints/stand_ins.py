"""Name what is often taken for a checkpoint, or for a file beside one, with the way out. A new kind is a row."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import NpgptError
from . import llmc

HEAD = 1024  # bytes that tell what a file is: a web page may begin with white space
INSTEAD = "which npgpt does not read: take the model's safetensors or pytorch_model.bin"
PAGE = "a web page: the download went wrong; take the file itself (its download link), or npgpt download NAME"
POINTER = "a Git LFS pointer, not the file itself: fetch it with git lfs pull"
ZERO = "DeepSpeed's ZeRO: python zero_to_fp32.py, which DeepSpeed puts there, makes one pytorch_model.bin of all ranks"
SHARDED = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt makes one file of it"
AGAIN = "npgpt download NAME, or the command that fetched it, once more goes on with it"

# How a file begins, whatever it is called: one that may stand in place of any other, and the rest.
TEXTS: tuple[tuple[bytes, str], ...] = (
    (rb"version https://git-lfs", POINTER),
    (rb"(?:\xef\xbb\xbf)?\s*(?i:<!doctype html|<html|<head|<\?xml)", PAGE),
)
BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    *TEXTS,
    (rb"\x89HDF", f"HDF5 (Keras), {INSTEAD}"),
    (rb"\x80\x02\x8a\nl\xfc\x9cF", "torch.save's form from before 1.6: load it in PyTorch and torch.save it anew"),
    (rb"\x80", "a bare pickle, which npgpt does not read: torch.save(model.state_dict(), …) writes what it does"),
    (re.escape(llmc.STATE), "llm.c's reference state (logits and gradients), not a model"),
    (re.escape(llmc.TOKENIZER), "llm.c's tokenizer, not a model"),
    (rb"\x1f\x8b", "compressed with gzip: unpack it"),
    (rb"[\x81-\x8f][\xa1-\xbf][\w./]", f"msgpack (Flax), {INSTEAD}"),
    (rb"\x08[\x01-\x1f](?:\x12[\x01-\x40][ -~]|\x3a)", f"ONNX, {INSTEAD}"),
)
# What files are called that are parts of a whole, though each is of a form that npgpt reads.
PARTS: tuple[tuple[str, str], ...] = (
    (r".*\.incomplete", f"an interrupted download: {AGAIN}"),
    (r"(?:bf16_|fp16_)?zero_pp_rank_\d+_.*", f"one rank's part of {ZERO}"),
    (r".*\.distcp|\.metadata", f"a part of a distributed checkpoint (FSDP): {SHARDED}"),
    (r".*\.data-\d+-of-\d+|.*\.ckpt\.meta", "a part of a TensorFlow checkpoint: give its .index file, or the folder"),
)
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.(?P<suffix>safetensors|bin)")
# What else a name tells where the content does not, and what folders are called.
NAMES: tuple[tuple[str, str], ...] = (
    (r".*\.(?:h5|hdf5|keras)", f"HDF5 (Keras), {INSTEAD}"),
    (r".*\.msgpack", f"msgpack (Flax), {INSTEAD}"),
    (r".*\.onnx", f"ONNX, {INSTEAD}"),
    (r"zero_to_fp32\.py|global_step\d+", f"of {ZERO}"),
    (r"pytorch_model_fsdp_\d+", f"a distributed checkpoint (FSDP): {SHARDED}"),
)


def by_content(head: bytes, kinds: tuple[tuple[bytes, str], ...] = BEGINNINGS) -> str | None:
    """Return what a file is that begins so, with the way out; None for what may be a checkpoint."""
    return next((what for pattern, what in kinds if re.match(pattern, head, re.DOTALL)), None)


def refuse(content: bytes, source: str) -> bytes:
    """Return the bytes of a file beside weights. Raises NpgptError where something stands in its place."""
    if (what := by_content(content[:HEAD], TEXTS)) is not None:
        raise NpgptError(f"{source} is {what}")
    return content


def part(path: Path) -> str | None:
    """Return of what whole a file is a part, by its name; None where it may be whole."""
    if (shard := SHARD.fullmatch(path.name)) and int(shard["count"]) != 1:
        index, count = path.with_name(f"{shard['stem']}.{shard['suffix']}.index.json"), int(shard["count"])
        if index.is_file():
            return f"one of {count} shards: give their index, {index.name}, or the folder"
        return f"one of {count} shards without their index: put {index.name} beside them, from where they came"
    return next((what for pattern, what in PARTS if re.fullmatch(pattern, path.name)), None)


def whole(path: Path) -> str | None:
    """Return what a file or folder is by its content, else by its name; None where there is nothing to say."""
    what = None
    if path.is_file():
        with path.open("rb") as file:
            what = by_content(file.read(HEAD))
    return what or next((what for pattern, what in NAMES if re.fullmatch(pattern, path.name)), None)


def described(path: Path) -> str | None:
    """Return what a path is that leads to no checkpoint, with the way out; None where there is nothing to say."""
    if path.exists():
        return part(path) or whole(path)
    return f"a link to {os.readlink(path)}, which is not there: {AGAIN}" if path.is_symlink() else None


def in_folder(folder: Path) -> str | None:
    """Return the first of what a folder holds that is no checkpoint, and what it is; None where there is no such."""
    try:
        paths = [*sorted(folder.iterdir())[:100], *unfinished(folder)]
        return next((f"{path.name} is {what}" for path in paths if (what := described(path)) is not None), None)
    except OSError:  # it only explains: what cannot be read has nothing to say
        return None


def unfinished(folder: Path) -> list[Path]:
    """Return what an interrupted download left: links to nothing, and files that the hub's library had begun.

    The folder is one that a download was made into, a repository of the cache, or a snapshot in it.
    """
    repository = folder.parent.parent if folder.parent.name == "snapshots" else folder
    begun = [*repository.glob("blobs/*.incomplete"), *folder.glob(".cache/huggingface/download/*.incomplete")]
    return begun + [path for path in repository.glob("snapshots/*/*") if not path.exists()]
