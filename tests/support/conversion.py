"""Folders to convert, and their contents."""

from __future__ import annotations

from pathlib import Path

from npgpt.checkpoints import safetensors
from tests.support.models import random_arrays, small
from tests.support.namings import NAMINGS


def put(folder: Path, scheme: str = "nanogpt", dtype: str = "float32", **files: str) -> Path:
    """Write weights and other files to a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: array.astype(dtype) for name, array in random_arrays(small(), dtype="float32").items()}
    safetensors.write(folder / "model.safetensors", NAMINGS[scheme](arrays))
    for name, content in files.items():
        (folder / name.replace("_json", ".json").replace("_txt", ".txt").replace("_bpe", ".bpe")).write_text(content)
    return folder


def listed(folder: Path) -> list[str]:
    """Return the sorted names of a folder's entries."""
    return sorted(path.name for path in folder.iterdir())
