"""The GGUF format, versions 2 and 3: llama.cpp's.

"GGUF", u32 version, u64 number of tensors, u64 number of keys; the keys with their values; the tensors' names, sizes
(fastest-varying first, the reverse of NumPy's), types and offsets; padding; data. ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import functools
import json
import mmap
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import NpgptError
from .tensor import FLOATS, Contents, Cursor, Stated, Tensor, check_shape, itemsize, map_file

VERSIONS = (2, 3)
NUMBERS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "b1", 10: "u8", 11: "i8", 12: "f8"}
STRING, ARRAY = 8, 9
# ggml's types; the quantised ones only by name
TYPES = {0: "float32", 1: "float16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K"}
TYPES |= {11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS"}
TYPES |= {19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "int8", 25: "int16", 26: "int32"}
TYPES |= {27: "int64", 28: "float64", 29: "IQ1_M", 30: "bfloat16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}
CONFIG = {
    "gpt2.block_count": "n_layer",
    "gpt2.attention.head_count": "n_head",
    "gpt2.embedding_length": "n_embd",
    "gpt2.context_length": "n_positions",
    "gpt2.feed_forward_length": "n_inner",
    "gpt2.attention.layer_norm_epsilon": "layer_norm_epsilon",
    "gpt2.vocab_size": "vocab_size",
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
}
TOKENS, MERGES, TOKEN_TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # a token's type: special; always one token; a row that pads the vocabulary
SPLITTERS = ("gpt-2",)  # what tokenizer.ggml.pre calls GPT-2's way of cutting text; a file may leave it out


def recognises(head: bytes, tail: bytes) -> bool:
    """Return whether a file begins with the magic."""
    return head.startswith(b"GGUF")


class Values(Cursor):
    """The values of a GGUF file behind its magic."""

    @functools.cached_property
    def order(self) -> Literal["<", ">"]:
        """Return the byte order: a file of the other one has its version in the upper half."""
        return "<" if int.from_bytes(self.data[4:8], "little") < 2**16 else ">"

    def number(self, kind: str) -> int:
        """Return a number of one of struct's kinds."""
        (value,) = struct.unpack(self.order + kind, self.take(struct.calcsize(self.order + kind)))
        return int(value)

    def text(self) -> str:
        """Return a string, whose length comes before it."""
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise NpgptError(f"{self.source}: a string that ends at byte {self.at} is not UTF-8: {error}") from None

    def value(self, kind: int, depth: int = 0) -> Any:
        """Return a number, a truth value, a text, or a list of them."""
        if kind == STRING:
            return self.text()
        if kind == ARRAY and depth < 4:
            inner, length = self.number("I"), self.number("Q")
            if inner in NUMBERS:
                dtype = np.dtype(NUMBERS[inner]).newbyteorder(self.order)
                return np.frombuffer(self.take(length * dtype.itemsize), dtype)
            return [self.value(inner, depth + 1) for _ in range(length)]
        if kind not in NUMBERS:
            raise NpgptError(f"{self.source}: a value of the unknown type {kind} ends at byte {self.at}")
        number = np.frombuffer(self.take(np.dtype(NUMBERS[kind]).itemsize), NUMBERS[kind])
        value = number.view(number.dtype.newbyteorder(self.order))[0]
        # the shortest text that is this float32 gives back 1e-5, where its exact value is 9.999999747378752e-06
        return float(str(value)) if NUMBERS[kind] == "f4" else value.item()


def read(path: Path) -> Contents:
    """Map a GGUF file with its configuration, and its vocabulary if that is byte-level BPE.

    Raises NpgptError, naming the tensor or key, for whatever is malformed, for another architecture than gpt2, and for
    tensors that overlap or leave the file. A quantised tensor is refused when it is used.
    """
    data = map_file(path)
    cursor = Values(str(path), data, at=4)
    version, n_tensors, n_keys = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in VERSIONS:
        raise NpgptError(f"{path} is GGUF of version {version}; read are {' and '.join(map(str, VERSIONS))}")
    keys: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.text()
        if key in keys:
            raise NpgptError(f"{path}: the key {key:.80} stands twice")
        keys[key] = cursor.value(cursor.number("I"))
    architecture = keys.get("general.architecture")
    if not isinstance(architecture, str) or architecture != "gpt2":
        raise NpgptError(f"{path}: general.architecture is {architecture!r:.80}, and npgpt runs 'gpt2' alone")
    if several := [key for key in (*CONFIG, "split.count") if isinstance(keys.get(key), (list, np.ndarray))]:
        raise NpgptError(f"{path}: {several[0]} is a list, and a GPT-2 has one number there")
    if keys.get("split.count", 1) != 1:
        raise NpgptError(f"{path} is one of several parts: join them with llama-gguf-split --merge")
    tensors = _tensors(path, data, cursor, n_tensors, keys.get("general.alignment", 32))
    fields = {name: keys[key] for key, name in CONFIG.items() if key in keys}
    vocabulary = None
    if keys.get("tokenizer.ggml.model", "no_vocab") != "no_vocab" or TOKENS in keys:
        vocabulary = lambda: _vocabulary(path, keys)  # noqa: E731
    return Contents("GGUF", (path,), tensors, Stated(f"the keys of {path}", fields), vocabulary)


def _tensors(path: Path, data: mmap.mmap, cursor: Values, count: int, alignment: object) -> dict[str, Tensor]:
    """Read the directory and check that each tensor behind it is aligned, within the file and apart from the others."""
    if type(alignment) is not int or alignment < 1:
        raise NpgptError(f"{path}: general.alignment must be a whole number from 1, not {alignment!r:.40}")
    entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for _ in range(count):
        name, n_dims = cursor.text(), cursor.number("I")
        if name in entries:
            raise NpgptError(f"{path}: the tensor {name:.80} stands twice")
        if n_dims > 8:
            raise NpgptError(f"{path}: {name:.80} has {n_dims} dimensions; ggml has 4 at most")
        shape = tuple(cursor.number("Q") for _ in range(n_dims))[::-1]
        kind = cursor.number("I")
        check_shape(path, name, shape)
        dtype = TYPES.get(kind, f"of the unknown type {kind}")
        if dtype not in FLOATS and not dtype.startswith("int"):
            dtype += " (quantised: take an F16 file, or make one with llama-quantize --allow-requantize)"
        entries[name] = dtype, shape, cursor.number("Q")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    end, last = 0, ""
    for name, (dtype, shape, offset) in sorted(entries.items(), key=lambda item: item[1][2]):
        if offset % alignment:
            raise NpgptError(f"{path}: {name:.80} begins at {offset} of the data, no multiple of {alignment}")
        if offset < end:
            raise NpgptError(
                f"{path}: {name:.80} begins at {offset} of the data, within {last:.80}, which ends at {end}"
            )
        end, last = offset + (prod(shape) * itemsize(dtype) if dtype in FLOATS else 1), name
        if start + end > len(data):
            raise NpgptError(f"{path} is cut short: {name:.80} ends at byte {start + end}, the file at {len(data)}")
        tensors[name] = Tensor(path, name, data, dtype, shape, start + offset, big_endian=cursor.order == ">")
    return tensors


def _vocabulary(path: Path, keys: Mapping[str, Any]) -> dict[str, bytes]:
    """Return vocab.json, merges.txt and tokenizer_config.json of what the file says of its vocabulary.

    Raises NpgptError for a vocabulary of another kind than GPT-2's.
    """
    for key, known in {"model": ("gpt2",), "pre": SPLITTERS, "add_space_prefix": (False,)}.items():
        value = keys.get(f"tokenizer.ggml.{key}", known[0])
        if isinstance(value, (list, np.ndarray)) or value not in known:
            raise NpgptError(f"{path}: tokenizer.ggml.{key} is {value!r:.60}, and npgpt reads {known[0]!r} alone")
    tokens, merges = keys.get(TOKENS), keys.get(MERGES)
    if not isinstance(tokens, list) or not isinstance(merges, list) or not all(isinstance(t, str) for t in tokens):
        raise NpgptError(f"{path}: {TOKENS} and {MERGES} must be lists of texts")
    types = keys[TOKEN_TYPES].tolist() if isinstance(keys.get(TOKEN_TYPES), np.ndarray) else []
    kinds = dict(enumerate(types[: len(tokens)]))
    ids = {token: number for number, token in enumerate(tokens) if kinds.get(number) != UNUSED}
    added = {
        str(number): {"content": tokens[number], "special": kind == CONTROL, "normalized": False}
        for number, kind in kinds.items()
        if kind in (CONTROL, USER_DEFINED)
    }
    config: dict[str, Any] = {"added_tokens_decoder": added} if added else {}
    for name in ("bos", "eos"):
        adds, number = (keys.get(f"tokenizer.ggml.{key}") for key in (f"add_{name}_token", f"{name}_token_id"))
        if type(number) is int and 0 <= number < len(tokens):
            config[f"{name}_token"] = tokens[number]
        if adds is not None:
            config[f"add_{name}_token"] = adds
        if adds and f"{name}_token" not in config:
            raise NpgptError(f"{path}: add_{name}_token is set, and {name}_token_id is {number!r:.40}, no token's id")
    text = "\n".join(["#version: 0.2", *map(str, merges), ""])
    files = {"vocab.json": json.dumps(ids, ensure_ascii=False).encode(), "merges.txt": text.encode()}
    return files | ({"tokenizer_config.json": json.dumps(config).encode()} if config else {})
