"""Read llm.c's format: a header of 256 int32, then 16 consecutive arrays, each stacked over all blocks.

The format is defined by karpathy/llm.c, train_gpt2.py (write_model) and train_gpt2.c (ParameterTensors); the arrays
keep their names from there. Matrices are [out, in], and there is no output head. wte is padded with rows that are not
part of the model: llm.c computes logits only for the first V, and npgpt drops the others.
"""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..config import Config
from ..errors import NpgptError
from ..parameters import Shape
from .tensor import Contents, Stated, Tensor, itemsize, map_file

MODEL, STATE, TOKENIZER = (number.to_bytes(4, "little") for number in (20240326, 20240327, 20240328))  # h[0]
DTYPES = {3: "float32", 5: "bfloat16"}  # h[1], the version
HEADER = 256 * 4


def recognises(head: bytes, tail: bytes) -> bool:
    """Return whether a file begins with the magic number of llm.c's models."""
    return head.startswith(MODEL)


def shapes(vocab_size: int, n_positions: int, n_layer: int, n_embd: int) -> dict[str, Shape]:
    """Return the arrays' shapes by name, in the order of the file."""
    V, N, L, C = vocab_size, n_positions, n_layer, n_embd
    norm = {"w": (L, C), "b": (L, C)}
    return {
        "wte": (V, C),
        "wpe": (N, C),
        "ln1w": norm["w"],
        "ln1b": norm["b"],
        "qkvw": (L, 3 * C, C),
        "qkvb": (L, 3 * C),
        "attprojw": (L, C, C),
        "attprojb": (L, C),
        "ln2w": norm["w"],
        "ln2b": norm["b"],
        "fcw": (L, 4 * C, C),
        "fcb": (L, 4 * C),
        "fcprojw": (L, C, 4 * C),
        "fcprojb": (L, C),
        "lnfw": (C,),
        "lnfb": (C,),
    }


def padded(vocab_size: int) -> int:
    """Return the number of wte's rows in llm.c's files, a multiple of 128."""
    return -(-vocab_size // 128) * 128


def cut(flat: NDArray[Any], config: Config) -> dict[str, NDArray[Any]]:
    """Return a reference state's gradients by name. wte has more rows than the vocabulary if it was padded.

    Raises NpgptError for a number of them that is no such model's.
    """

    def of(rows: int) -> dict[str, Shape]:
        return shapes(rows, config.n_positions, config.n_layer, config.n_embd)

    sizes = {sum(map(prod, of(rows).values())): rows for rows in (config.vocab_size, padded(config.vocab_size))}
    if flat.size not in sizes:
        raise NpgptError(
            f"the reference state has {flat.size} numbers behind its loss, but the gradients of this model are "
            f"{' or '.join(map(str, sizes))}: is it truncated, or of another model?"
        )
    found, begin = {}, 0
    for name, shape in of(sizes[flat.size]).items():
        found[name] = flat[begin : begin + prod(shape)].reshape(shape)
        begin += prod(shape)
    return found


def read(path: Path) -> Contents:
    """Map a model file. Raises NpgptError for an unknown version and for a size that contradicts the header."""
    data = map_file(path)
    if len(data) < HEADER:
        raise NpgptError(f"{path} is truncated: {len(data)} bytes, but llm.c's header alone takes {HEADER}")
    _, version, n_positions, V, n_layer, n_head, n_embd, padded = struct.unpack("<8i", data[:32])
    if version not in DTYPES:
        raise NpgptError(
            f"{path} is version {version} of llm.c's format, but npgpt reads only 3 (float32) and 5 (bfloat16): "
            "write it again with a current train_gpt2.py"
        )
    if min(n_positions, V, n_layer, n_head, n_embd) < 1 or padded < V:
        raise NpgptError(
            f"{path}: its header has n_positions {n_positions}, vocab_size {V} padded to {padded}, n_layer {n_layer}, "
            f"n_head {n_head}, n_embd {n_embd}; each must be at least 1, and the padded size at least vocab_size"
        )
    dtype = DTYPES[version]
    stacked = shapes(padded, n_positions, n_layer, n_embd)
    end = HEADER + itemsize(dtype) * sum(map(prod, stacked.values()))
    if end != len(data):
        raise NpgptError(
            f"{path} is truncated or too long: by its header it should have {end} bytes, but it has {len(data)}"
        )
    tensors: dict[str, Tensor] = {}
    begin = HEADER
    for name, shape in stacked.items():
        tensors[name] = Tensor(path, name, data, dtype, (V, n_embd) if name == "wte" else shape, begin)
        begin += itemsize(dtype) * prod(shape)
    fields = {"vocab_size": V, "n_positions": n_positions, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
    return Contents("llm.c .bin", (path,), tensors, Stated(f"the header of {path}", fields))
