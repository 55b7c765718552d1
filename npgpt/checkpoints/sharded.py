"""Read sharded checkpoints: Hugging Face's several files with an index {"weight_map": {tensor: file}}."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..errors import NpgptError
from . import safetensors, stand_ins, strict_json
from .files import INDEX
from .tensor import Contents, Tensor


def read(path: Path, read_file: Callable[[Path], Contents]) -> Contents:
    """Read an index and, with read_file, the shards beside it.

    Raises NpgptError for a malformed index, for a shard that is missing or in another folder, and if the index and the
    shards disagree about a tensor.
    """
    index = strict_json.read_file(path, INDEX)
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if isinstance(answer := index.get("error"), str):
        raise NpgptError(f"{path} is an error message of the hub, {answer!r:.200}: download the file again")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise NpgptError(
            f"{path} is JSON but not a checkpoint index: it has no weight_map from tensors to files; "
            "give the folder or the weights file"
        )
    files: dict[str, Contents] = {}
    for name in dict.fromkeys(weight_map.values()):
        file = path.with_name(name) if name and Path(name).name == name else None
        if file is None or not os.path.isfile(file):  # Path.is_file raises OSError for a name that is too long
            first = next(tensor for tensor, place in weight_map.items() if place == name)
            begun = "; a download was interrupted" if file and stand_ins.unfinished(path.parent) else ""
            raise NpgptError(f"{path} lists {first} in {name!r:.200}, but that file is not beside it{begun}")
        files[name] = read_file(file)
    tensors: dict[str, Tensor] = {}
    for name, contents in files.items():
        for tensor, found in contents.tensors.items():
            if weight_map.get(tensor) != name and found.name == tensor:  # and is not an alias
                raise NpgptError(f"{path} does not list {tensor}, which {name} contains")
        tensors |= contents.tensors
    if missing := [tensor for tensor in weight_map if tensor not in tensors]:
        raise NpgptError(f"{path} lists {missing[0]} in {weight_map[missing[0]]}, but that file does not contain it")
    if isinstance(metadata, dict):
        tensors |= safetensors.aliases(metadata, tensors)
    formats = sorted({contents.format for contents in files.values()})
    return Contents(
        f"{' and '.join(formats)} in {len(files)} files", (path, *(f for c in files.values() for f in c.files)), tensors
    )
