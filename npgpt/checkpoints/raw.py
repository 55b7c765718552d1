"""Named arrays as a folder of raw numbers: a little-endian .bin for each array, and manifest.json to describe them.

A program in any language can read and write the form without a library:

    {"format": "npgpt raw", "token_ids": [[1026, 318]],
     "arrays": [{"name": "logits", "dtype": "float32", "shape": [1, 2, 4096], "file": "logits.bin", "sha256": "…"}]}

Numbers are in C order (the last axis varies fastest). sha256 is optional, and so is everything else besides arrays.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import NpgptError
from .atomic import new_folder, writing
from .files import is_input, naming, reading
from .strict_json import read_file
from .tensor import LONGEST_SHAPE

MANIFEST = "manifest.json"
DTYPES = {
    **{name: np.dtype(name).newbyteorder("<") for name in ("float16", "float32", "float64", "int32", "int64")},
    "bfloat16": np.dtype("<u2"),
}


def write(folder: Path, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> None:
    """Write arrays and what `about` says to a new folder, whole or not at all.

    Raises NpgptError if the folder exists and is not empty, OSError if it cannot be written.
    """
    with new_folder(folder) as unfinished:
        entries = []
        for name, array in arrays.items():
            content = np.ascontiguousarray(array, DTYPES[str(array.dtype)]).reshape(-1).view(np.uint8).data
            with writing(unfinished / f"{name}.bin") as file:
                file.write(content)
            entry = {"name": name, "dtype": str(array.dtype), "shape": array.shape, "file": f"{name}.bin"}
            entries.append(entry | {"sha256": hashlib.sha256(content).hexdigest()})
        with writing(unfinished / MANIFEST) as file:
            lines = ",\n".join(f"    {json.dumps(entry)}" for entry in entries)
            head = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in about.items())
            file.write(f'{{\n  "format": "npgpt raw",\n{head}  "arrays": [\n{lines}\n  ]\n}}\n'.encode())


def read(folder: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Return a folder's arrays by name, bfloat16 widened to float32, and the manifest.

    Raises NpgptError if the manifest is invalid, or a file is missing, of another size, or has another checksum.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise NpgptError(f"{folder} is a folder without {MANIFEST}: it is not a folder of raw arrays")
    manifest = read_file(path)
    entries = manifest.get("arrays")
    if not isinstance(entries, list) or not entries:
        raise NpgptError(f"{path} must list the folder's arrays under the key 'arrays'")
    arrays: dict[str, NDArray[Any]] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"]:
            raise NpgptError(f"{path}: entry {number} of 'arrays' has no name")
        name = entry["name"]
        if name in arrays:
            raise NpgptError(f"{path} lists the array {name!r:.80} twice")
        arrays[name] = _array(folder, entry, f"{path}: {name:.80}")
    return arrays, manifest


def _array(folder: Path, entry: Mapping[str, Any], source: str) -> NDArray[Any]:
    """Read one array. Raises NpgptError if the entry is invalid or its file does not fit."""
    dtype, shape, file = entry.get("dtype"), entry.get("shape"), entry.get("file")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise NpgptError(f"{source}: dtype must be one of {', '.join(DTYPES)}, not {dtype!r:.80}")
    lengths: list[Any] = shape if isinstance(shape, list) and len(shape) <= LONGEST_SHAPE else [None]
    if not all(type(length) is int and 0 <= length < 2**63 for length in lengths):
        raise NpgptError(f"{source}: shape must be a list of whole numbers, not {shape!r:.80}")
    if 0 in lengths and prod(length or 1 for length in lengths) >= 2**59:
        raise NpgptError(f"{source}: shape is too large for an array: {shape!r:.80}")
    if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]+", file) or file in (".", ".."):
        raise NpgptError(f"{source}: file must be the name of a file in the same folder, not {file!r:.80}")
    path, expected = folder / file, prod(lengths) * DTYPES[dtype].itemsize
    with reading(path) as opened, naming(path):
        is_input(path)
        size = path.stat().st_size
        if size != expected:
            raise NpgptError(f"{path} has {size} bytes, but {lengths} in {dtype} takes {expected}")
        content = opened.read()
    digest = entry.get("sha256")
    if digest is not None and digest != hashlib.sha256(content).hexdigest():
        raise NpgptError(f"{path} is damaged: its sha256 is not the one in {MANIFEST}")
    found = np.frombuffer(content, DTYPES[dtype]).reshape(lengths)
    if dtype == "bfloat16":
        return (found.astype(np.uint32) << 16).view(np.float32)
    return found if sys.byteorder == "little" else found.astype(found.dtype.newbyteorder("="))
