"""Read and write llm.c's format: a header of 256 int32, then 16 consecutive arrays, each stacked over all blocks.

The format is defined by karpathy/llm.c, train_gpt2.py (write_model) and train_gpt2.c (ParameterTensors); the arrays
keep their names from there. Matrices are [out, in], and there is no output head. wte is padded with rows that are not
part of the model: llm.c computes logits only for the first V, and npgpt drops the others.

Two more files have such a header: the tokenizer (write_tokenizer), and the reference state that test_gpt2.c compares
itself with (write_state). They are written in float32, version 3 of the model and 2 of the others.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import NpgptError
from ..parameters import Parameters, Shape, to_arrays
from .atomic import writing
from .names import LLM_C
from .tensor import Contents, Stated, Tensor, itemsize, map_file

if TYPE_CHECKING:
    from ..config import Config

MODEL, STATE, TOKENIZER = (number.to_bytes(4, "little") for number in (20240326, 20240327, 20240328))  # h[0]
DTYPES = {3: "float32", 5: "bfloat16"}  # h[1], the version
HEADER = 256 * 4
MULTIPLE = 128  # to which train_gpt2.py pads the vocabulary (pad_vocab)


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


def cut(flat: NDArray[Any], config: Config) -> dict[str, NDArray[Any]]:
    """Return a reference state's gradients by name. wte has more rows than the vocabulary if it was padded.

    Raises NpgptError for a number of them that is no such model's.
    """

    def of(rows: int) -> dict[str, Shape]:
        return shapes(rows, config.n_positions, config.n_layer, config.n_embd)

    sizes = {sum(map(prod, of(rows).values())): rows for rows in (config.vocab_size, padded_size(config.vocab_size))}
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


def check_config(config: Config) -> None:
    """Raise NpgptError, with both values, for an option that llm.c's programs do not have: they know one GPT-2 only."""
    fixed = {
        "n_inner": (config.inner_width, 4 * config.n_embd),
        "activation_function": (config.activation_function.replace("gelu_pytorch_tanh", "gelu_new"), "gelu_new"),
        "layer_norm_epsilon": (str(np.float32(config.layer_norm_epsilon)), "1e-05"),  # 1e-5f in train_gpt2.c
        "tie_word_embeddings": (config.tie_word_embeddings, True),
        "scale_attn_weights": (config.scale_attn_weights, True),
        "scale_attn_by_inverse_layer_idx": (config.scale_attn_by_inverse_layer_idx, False),
    }
    for name, (value, theirs) in fixed.items():
        if value != theirs:
            raise NpgptError(
                f"llm.c cannot run this model: its {name} is {value}, and llm.c has {theirs} alone; "
                "--to raw DIR writes any model's numbers"
            )


def padded_size(vocab_size: int) -> int:
    """Return Vp, the number of wte's rows in the file: the next multiple of 128 (50257 → 50304)."""
    return -(-vocab_size // MULTIPLE) * MULTIPLE


def write_model(path: Path, config: Config, parameters: Parameters) -> None:
    """Write gpt2_124M.bin, the parameters; see check_config for what does not fit."""
    sizes = (config.n_positions, config.vocab_size, config.n_layer, config.n_head, config.n_embd)
    _write(path, (MODEL, 3, *sizes, padded_size(config.vocab_size)), _in_order(parameters))


def write_state(
    path: Path,
    token_ids: NDArray[np.integer[Any]],
    targets: NDArray[np.integer[Any]],
    logits: NDArray[np.floating[Any]],
    loss: float,
    gradients: Parameters,
) -> None:
    """Write gpt2_124M_debug_state.bin: ids and targets [B, T], logits [B, T, V], the loss, and the gradients.

    The logits are not padded, but the gradient of wte is, as wte itself.
    """
    ids = (token_ids.astype("<i4"), targets.astype("<i4"))
    _write(path, (STATE, 2, *token_ids.shape), [*ids, logits, np.array(loss), *_in_order(gradients)])


def write_tokenizer(path: Path, pieces: Mapping[int, bytes], end_of_text: int | None, source: str) -> None:
    """Write gpt2_tokenizer.bin, from which llm.c decodes: the length of each id's piece in one byte, and its bytes.

    source names the vocabulary in errors. Raises NpgptError for one that the file cannot hold: without <|endoftext|>,
    with an id that has no piece, with a piece that is empty or longer than 255 bytes, or with two alike.
    """
    if end_of_text is None:
        raise NpgptError(f"{source} has no <|endoftext|>, whose id llm.c's tokenizer states")
    tokens = [pieces.get(token_id, b"") for token_id in range(max(pieces) + 1)]
    for token_id, token in enumerate(tokens):
        if not 0 < len(token) < 256:
            raise NpgptError(f"id {token_id} of {source} has {len(token)} bytes, and llm.c's tokenizer holds 1 to 255")
    if len(set(tokens)) < len(tokens):
        raise NpgptError(f"{len(tokens) - len(set(tokens))} ids of {source} have the text of another")
    content = b"".join(bytes([len(token)]) + token for token in tokens)
    _write(path, (TOKENIZER, 2, len(tokens), end_of_text), [np.frombuffer(content, np.uint8)])


def _in_order(parameters: Parameters) -> Iterator[NDArray[np.floating[Any]]]:
    """Yield parameters, or their gradients, in the order of the file, wte with zeros as padding."""
    arrays = to_arrays(parameters)
    for name in shapes(1, 1, 1, 1):
        ours, _ = LLM_C.tensors[name]
        if "*" in ours:
            for layer in range(len(parameters.h)):
                yield arrays[ours.replace("*", str(layer))].T  # [out, in]
        else:
            yield arrays[ours]
        if name == "wte":
            V, C = arrays[ours].shape
            yield np.zeros((padded_size(V) - V, C))


def _write(path: Path, header: Iterable[int | bytes], arrays: Iterable[NDArray[Any]]) -> None:
    """Write a header, padded with zeros, and arrays; floats become float32."""
    with writing(path) as file:
        numbers = [int.from_bytes(n, "little") if isinstance(n, bytes) else n for n in header]
        file.write(struct.pack("<256i", *numbers, *[0] * (256 - len(numbers))))
        for array in arrays:
            file.write(np.ascontiguousarray(array, "<f4" if array.dtype.kind == "f" else array.dtype).data)
