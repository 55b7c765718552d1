"""Identify files that are often mistaken for a checkpoint, and say what to do instead. A new kind is a row."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import NpgptError
from . import llmc

HEAD = 1024  # bytes that identify a file; a web page may begin with white space
INSTEAD = "which npgpt does not read: use the model's safetensors or pytorch_model.bin"
PAGE = "a web page, not the file itself: use the file's download link, or npgpt download NAME"
POINTER = "a Git LFS pointer, not the file itself: fetch it with git lfs pull"
ZERO = "a DeepSpeed ZeRO checkpoint: join it into one pytorch_model.bin with DeepSpeed's zero_to_fp32.py in its folder"
SHARDED = "join it with python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt"
AGAIN = "resume it with npgpt download NAME, or with the command that started it"

# Kinds of files by their first bytes: those that may replace a file of any name, and the rest.
TEXTS: tuple[tuple[bytes, str], ...] = (
    (rb"version https://git-lfs", POINTER),
    (rb"(?:\xef\xbb\xbf)?\s*(?i:<!doctype html|<html|<head|<\?xml)", PAGE),
)
BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    *TEXTS,
    (rb"\x89HDF", f"HDF5 (Keras), {INSTEAD}"),
    (rb"\x80\x02\x8a\nl\xfc\x9cF", "in torch.save's format before PyTorch 1.6: load it in PyTorch and save it"),
    (rb"\x80", "a bare pickle, which npgpt does not read: use torch.save(model.state_dict(), …)"),
    (re.escape(llmc.STATE), "llm.c's reference state (logits and gradients), not a model"),
    (re.escape(llmc.TOKENIZER), "llm.c's tokenizer, not a model"),
    (rb"\x1f\x8b", "compressed with gzip: unpack it"),
    (rb"[\x81-\x8f][\xa1-\xbf][\w./]", f"msgpack (Flax), {INSTEAD}"),
    (rb"\x08[\x01-\x1f](?:\x12[\x01-\x40][ -~]|\x3a)", f"ONNX, {INSTEAD}"),
)
# Parts of a larger whole, by file name; some are in a format that npgpt reads.
PARTS: tuple[tuple[str, str], ...] = (
    (r".*\.incomplete", f"an interrupted download: {AGAIN}"),
    (r"(?:bf16_|fp16_)?zero_pp_rank_\d+_.*", f"one rank's part of {ZERO}"),
    (r".*\.distcp|\.metadata", f"part of a distributed checkpoint (FSDP): {SHARDED}"),
    (r".*\.data-\d+-of-\d+|.*\.ckpt\.meta", "part of a TensorFlow checkpoint: give its .index file, or the folder"),
)
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.(?P<suffix>safetensors|bin)")
# Kinds of files and folders by name, for those that the content does not identify.
NAMES: tuple[tuple[str, str], ...] = (
    (r".*\.(?:h5|hdf5|keras)", f"HDF5 (Keras), {INSTEAD}"),
    (r".*\.msgpack", f"msgpack (Flax), {INSTEAD}"),
    (r".*\.onnx", f"ONNX, {INSTEAD}"),
    (r"zero_to_fp32\.py|global_step\d+", f"part of {ZERO}"),
    (r"pytorch_model_fsdp_\d+", f"a distributed checkpoint (FSDP): {SHARDED}"),
)


def by_content(head: bytes, kinds: tuple[tuple[bytes, str], ...] = BEGINNINGS) -> str | None:
    """Return what kind of file begins with these bytes, with the way out; None if it may be a checkpoint."""
    return next((what for pattern, what in kinds if re.match(pattern, head, re.DOTALL)), None)


def refuse(content: bytes, source: str) -> bytes:
    """Return a side file's content unchanged. Raises NpgptError for a Git LFS pointer or a web page."""
    if (what := by_content(content[:HEAD], TEXTS)) is not None:
        raise NpgptError(f"{source} is {what}")
    return content


def part(path: Path) -> str | None:
    """Return what a file is a part of, judged by its name, with the way out; None if it may be complete."""
    if (shard := SHARD.fullmatch(path.name)) and int(shard["count"]) != 1:
        index, count = path.with_name(f"{shard['stem']}.{shard['suffix']}.index.json"), int(shard["count"])
        if index.is_file():
            return f"one of {count} shards: give the index, {index.name}, or the folder"
        return f"one of {count} shards without an index: put {index.name}, from the same source, beside them"
    return next((what for pattern, what in PARTS if re.fullmatch(pattern, path.name)), None)


def whole(path: Path) -> str | None:
    """Return what a file or folder is, judged by its content, else by its name; None if it may be a checkpoint."""
    what = None
    if path.is_file():
        with path.open("rb") as file:
            what = by_content(file.read(HEAD))
    return what or next((what for pattern, what in NAMES if re.fullmatch(pattern, path.name)), None)


def described(path: Path) -> str | None:
    """Return why a path is not a checkpoint, with the way out; None if no reason is known."""
    if path.exists():
        return part(path) or whole(path)
    return f"a link to {os.readlink(path)}, which does not exist: {AGAIN}" if path.is_symlink() else None


def in_folder(folder: Path) -> str | None:
    """Return the first file in a folder that is known not to be a checkpoint, with the reason; None if none is."""
    try:
        paths = [*sorted(folder.iterdir())[:100], *unfinished(folder)]
        return next((f"{path.name} is {what}" for path in paths if (what := described(path)) is not None), None)
    except OSError:  # this only explains another error: an unreadable folder adds nothing
        return None


def unfinished(folder: Path) -> list[Path]:
    """Return the traces of an interrupted download: dangling links, and incomplete files of huggingface_hub.

    The folder is a download's target folder, a repository in the cache, or a snapshot in such a repository.
    """
    repository = folder.parent.parent if folder.parent.name == "snapshots" else folder
    begun = [*repository.glob("blobs/*.incomplete"), *folder.glob(".cache/huggingface/download/*.incomplete")]
    return begun + [path for path in repository.glob("snapshots/*/*") if not path.exists()]
