"""Read a checkpoint in several files with an index {"weight_map": {tensor: file}}, Hugging Face's large ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..errors import NpgptError
from . import safetensors, stand_ins, strict_json
from .files import INDEX
from .tensor import Contents, Tensor


def read(path: Path, read_file: Callable[[Path], Contents]) -> Contents:
    """Read an index and, with read_file, the files beside it that it lists.

    Raises NpgptError for an index of another form, for a file that is missing or in another folder, and where the index
    and the files disagree about a tensor.
    """
    index = strict_json.read_file(path, INDEX)
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if isinstance(answer := index.get("error"), str):
        raise NpgptError(f"{path} is an answer of the hub's, {answer!r:.200}, and no file: the download went wrong")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise NpgptError(
            f"{path} is JSON but no index of a checkpoint: it has no weight_map of tensors to files; "
            "give the folder, or the file of the weights"
        )
    files: dict[str, Contents] = {}
    for name in dict.fromkeys(weight_map.values()):
        file = path.with_name(name) if name and Path(name).name == name else None
        if file is None or not os.path.isfile(file):  # is_file raises OSError for a name that is too long
            first = next(tensor for tensor, place in weight_map.items() if place == name)
            begun = "; a download was interrupted" if file and stand_ins.unfinished(path.parent) else ""
            raise NpgptError(f"{path} says that {first} lies in {name!r:.200}, which is not beside it{begun}")
        files[name] = read_file(file)
    tensors: dict[str, Tensor] = {}
    for name, contents in files.items():
        for tensor, found in contents.tensors.items():
            if weight_map.get(tensor) != name and found.name == tensor:  # not another name of one that is there
                raise NpgptError(f"{path} says nothing of {tensor}, which {name} holds")
        tensors |= contents.tensors
    if missing := [tensor for tensor in weight_map if tensor not in tensors]:
        raise NpgptError(f"{path} says that {missing[0]} lies in {weight_map[missing[0]]}, which does not hold it")
    if isinstance(metadata, dict):
        tensors |= safetensors.aliases(metadata, tensors)
    formats = sorted({contents.format for contents in files.values()})
    return Contents(
        f"{' and '.join(formats)} in {len(files)} files", (path, *(f for c in files.values() for f in c.files)), tensors
    )
