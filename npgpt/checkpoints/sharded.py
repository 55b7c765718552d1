"""A checkpoint in several files, with an index {"weight_map": {tensor: file}}: how Hugging Face cuts large ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..errors import NpgptError
from . import safetensors, strict_json
from .container import Container
from .tensor import Tensor, map_file

LARGEST_INDEX = 16_000_000  # bytes


def recognises(head: bytes, tail: bytes) -> bool:
    """Whether a file may be an index: JSON."""
    return head.lstrip().startswith(b"{")


def read(path: Path, read_file: Callable[[Path], Container]) -> Container:
    """The index's tensors out of the files beside it, which read_file opens.

    Raises NpgptError for an index of another form, a file that is missing or lies elsewhere, and for tensors that the
    index and the files do not agree on.
    """
    data = map_file(path)
    if len(data) > LARGEST_INDEX:
        raise NpgptError(f"{path} is no index of a checkpoint: it has {len(data)} bytes, above {LARGEST_INDEX}")
    index = strict_json.read_object(data[:], str(path))
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise NpgptError(f"{path} is JSON but no index of a checkpoint: it has no weight_map of tensors to files")
    files: dict[str, Container] = {}
    for name in dict.fromkeys(weight_map.values()):
        file = path.with_name(name) if name and Path(name).name == name else None
        if file is None or not os.path.isfile(file):  # is_file raises OSError for a name that is too long
            first = next(tensor for tensor, place in weight_map.items() if place == name)
            raise NpgptError(f"{path} says that {first} lies in {name!r:.200}, which is not beside it")
        files[name] = read_file(file)
    tensors: dict[str, Tensor] = {}
    for name, container in files.items():
        for tensor, found in container.tensors.items():
            if weight_map.get(tensor) != name and found.name == tensor:  # not another name of one that is there
                raise NpgptError(f"{path} says nothing of {tensor}, which {name} holds")
        tensors |= container.tensors
    if missing := [tensor for tensor in weight_map if tensor not in tensors]:
        raise NpgptError(f"{path} says that {missing[0]} lies in {weight_map[missing[0]]}, which does not hold it")
    if isinstance(metadata, dict):
        tensors |= safetensors.aliases(metadata, tensors)
    formats = sorted({container.format for container in files.values()})
    return Container(
        f"{' and '.join(formats)} in {len(files)} files", (path, *(f for c in files.values() for f in c.files)), tensors
    )
