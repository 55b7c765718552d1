"""Small vocabularies and folders with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from npgpt.errors import NpgptError
from npgpt.text.byte_pairs import byte_characters
from npgpt.text.tokenizer import Tokenizer
from npgpt.text.vocabularies import open_tokenizer


def small_vocabulary() -> tuple[dict[str, int], list[str]]:
    """Return a vocabulary of bytes in Hugging Face's order, four merges and the special token."""
    vocabulary = {character: i for i, character in enumerate(sorted(byte_characters()))}
    merges = ["Ġ t", "h e", "Ġt he", "i n"]
    for merge in merges:
        vocabulary[merge.replace(" ", "")] = len(vocabulary)
    return vocabulary | {"<|endoftext|>": len(vocabulary)}, merges


def small_pair() -> dict[str, Any]:
    """Return small_vocabulary() as vocab.json and merges.txt."""
    vocabulary, merges = small_vocabulary()
    return {"vocab.json": vocabulary, "merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n"}


def small_whole(**parts: Any) -> dict[str, Any]:
    """Return small_vocabulary() as tokenizer.json."""
    vocabulary, merges = small_vocabulary()
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
    splitter = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    return {"tokenizer.json": {"model": model, "pre_tokenizer": splitter, "added_tokens": []} | parts}


def put(folder: Path, files: dict[str, Any]) -> Path:
    """Write a folder's files, anything but bytes and text as JSON; return the folder."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        as_bytes = content if isinstance(content, bytes) else None
        text = content if isinstance(content, str) else "" if as_bytes is not None else json.dumps(content)
        (folder / name).write_bytes(as_bytes if as_bytes is not None else text.encode())
    return folder


def opened(folder: Path, vocab_size: int = 300) -> Tokenizer:
    """Return the tokenizer of the model in a folder."""
    return open_tokenizer(folder / "model.safetensors", vocab_size)


def reason(folder: Path, vocab_size: int = 300) -> str:
    """Return the one-line reason why the model in a folder has no text."""
    with pytest.raises(NpgptError) as error:
        opened(folder, vocab_size)
    assert "\n" not in str(error.value)
    return str(error.value)
