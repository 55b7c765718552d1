"""Read GGUF files, llama.cpp's format, in versions 2 and 3.

A file is "GGUF", u32 version, u64 tensor count, u64 key count; the keys with their values; each tensor's name, shape
(fastest-varying dimension first, the reverse of NumPy's order), type and offset; padding; data. The specification is
ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import NpgptError
from .tensor import FLOATS, Contents, Cursor, Stated, Tensor, check_shape, map_file

VERSIONS = (2, 3)
NUMBERS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "b1", 10: "u8", 11: "i8", 12: "f8"}
STRING, ARRAY = 8, 9
TYPES = {0: "float32", 1: "float16", 24: "int8", 25: "int16", 26: "int32", 27: "int64", 28: "float64", 30: "bfloat16"}
# ggml's quantised types: name, (values per block, bytes per block); see ggml/src/ggml-common.h
QUANTISED = {
    2: ("Q4_0", (32, 18)),
    3: ("Q4_1", (32, 20)),
    6: ("Q5_0", (32, 22)),
    7: ("Q5_1", (32, 24)),
    8: ("Q8_0", (32, 34)),
    9: ("Q8_1", (32, 40)),
    10: ("Q2_K", (256, 84)),
    11: ("Q3_K", (256, 110)),
    12: ("Q4_K", (256, 144)),
    13: ("Q5_K", (256, 176)),
    14: ("Q6_K", (256, 210)),
    15: ("Q8_K", (256, 292)),
    16: ("IQ2_XXS", (256, 66)),
    17: ("IQ2_XS", (256, 74)),
    18: ("IQ3_XXS", (256, 98)),
    19: ("IQ1_S", (256, 50)),
    20: ("IQ4_NL", (32, 18)),
    21: ("IQ3_S", (256, 110)),
    22: ("IQ2_S", (256, 82)),
    23: ("IQ4_XS", (256, 136)),
    29: ("IQ1_M", (256, 56)),
    34: ("TQ1_0", (256, 54)),
    35: ("TQ2_0", (256, 66)),
    39: ("MXFP4", (32, 17)),
    40: ("NVFP4", (64, 36)),
    41: ("Q1_0", (128, 18)),
}
MOST_ENTRIES = 2**16  # for tensors and for keys; gpt2-xl has 580 tensors
MOST_ITEMS = 2**20  # in all lists of a file's keys together; GPT-2's vocabulary takes 100,258
CONFIG = {
    "gpt2.block_count": "n_layer",
    "gpt2.attention.head_count": "n_head",
    "gpt2.embedding_length": "n_embd",
    "gpt2.context_length": "n_positions",
    "gpt2.feed_forward_length": "n_inner",
    "gpt2.attention.layer_norm_epsilon": "layer_norm_epsilon",
    "gpt2.vocab_size": "vocab_size",
    "tokenizer.ggml.bos_token_id": "bos_token_id",
}
# llama.cpp ends a text at any of these: end of text, end of turn, end of message
ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
TOKENS, MERGES, TOKEN_TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # token types: special; never split; padding of the vocabulary
SPLITTERS = ("gpt-2",)  # GPT-2's pre-tokenizer in tokenizer.ggml.pre, an optional key


def recognises(head: bytes, tail: bytes) -> bool:
    """Return whether a file begins with GGUF's magic number."""
    return head.startswith(b"GGUF")


class Values(Cursor):
    """A cursor over the values of a GGUF file, after its magic number."""

    items = 0  # list items read so far, except numbers; each becomes a Python object

    @functools.cached_property
    def order(self) -> Literal["<", ">"]:
        """Return the byte order; read in the wrong one, the version is 2**16 or more."""
        return "<" if int.from_bytes(self.data[4:8], "little") < 2**16 else ">"

    def number(self, kind: str) -> int:
        """Read an integer of a struct format character."""
        (value,) = struct.unpack(self.order + kind, self.take(struct.calcsize(self.order + kind)))
        return int(value)

    def text(self) -> str:
        """Read a length-prefixed UTF-8 string. Raises NpgptError for invalid UTF-8."""
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise NpgptError(f"{self.source}: the string that ends at byte {self.at} is not UTF-8: {error}") from None

    def value(self, kind: int, depth: int = 0) -> Any:
        """Read a number, bool, string, or list of them, of one of GGUF's value types."""
        if kind == STRING:
            return self.text()
        if kind == ARRAY and depth < 4:
            inner, length = self.number("I"), self.number("Q")
            if inner in NUMBERS:
                dtype = np.dtype(NUMBERS[inner]).newbyteorder(self.order)
                return np.frombuffer(self.take(length * dtype.itemsize), dtype)
            self.items += length
            if length > len(self.data) // 8:  # the length alone of each string takes 8 bytes
                raise NpgptError(f"{self.source} is truncated: the list at byte {self.at} has {length} items")
            if self.items > MOST_ITEMS:
                raise NpgptError(f"{self.source}: its lists have more than {MOST_ITEMS} items, too many for a GPT-2")
            return [self.value(inner, depth + 1) for _ in range(length)]
        if kind not in NUMBERS:
            raise NpgptError(f"{self.source}: the value at byte {self.at} has the unknown type {kind}")
        number = np.frombuffer(self.take(np.dtype(NUMBERS[kind]).itemsize), NUMBERS[kind])
        value = number.view(number.dtype.newbyteorder(self.order))[0]
        # a float32's shortest decimal form recovers 1e-5; its exact value is 9.999999747378752e-06
        return float(str(value)) if NUMBERS[kind] == "f4" else value.item()


def read(path: Path) -> Contents:
    """Map a GGUF file and read its configuration and, when asked for, its vocabulary.

    Quantised tensors are dequantised when they are used. Raises NpgptError, naming the tensor or key, for a malformed
    file, for an architecture other than gpt2, and for tensors that overlap or extend beyond the file.
    """
    data = map_file(path)
    cursor = Values(str(path), data, at=4)
    version, n_tensors, n_keys = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in VERSIONS:
        raise NpgptError(f"{path} is GGUF version {version}, but npgpt reads only {' and '.join(map(str, VERSIONS))}")
    if max(n_tensors, n_keys) > MOST_ENTRIES:
        raise NpgptError(f"{path} has {n_tensors} tensors and {n_keys} keys, but npgpt reads at most {MOST_ENTRIES}")
    keys: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.text()
        if key in keys:
            raise NpgptError(f"{path}: duplicate key {key:.80}")
        keys[key] = cursor.value(cursor.number("I"))
    architecture = keys.get("general.architecture")
    if not isinstance(architecture, str) or architecture != "gpt2":
        raise NpgptError(f"{path}: general.architecture is {architecture!r:.80}, but npgpt runs only 'gpt2'")
    if several := [key for key in (*CONFIG, *ENDS, "split.count") if isinstance(keys.get(key), (list, np.ndarray))]:
        raise NpgptError(f"{path}: {several[0]} is a list, but GPT-2 has a single number there")
    if keys.get("split.count", 1) != 1:
        raise NpgptError(f"{path} is one part of a split file: join the parts with llama-gguf-split --merge")
    tensors = _tensors(path, data, cursor, n_tensors, keys.get("general.alignment", 32))
    fields = {name: keys[key] for key, name in CONFIG.items() if key in keys}
    fields["eos_token_id"] = [*dict.fromkeys(keys[key] for key in ENDS if key in keys)]
    vocabulary = None
    if keys.get("tokenizer.ggml.model", "no_vocab") != "no_vocab" or TOKENS in keys:
        vocabulary = lambda: _vocabulary(path, keys)  # noqa: E731
    return Contents("GGUF", (path,), tensors, Stated(f"the keys of {path}", fields), vocabulary)


def _tensors(path: Path, data: mmap.mmap, cursor: Values, count: int, alignment: object) -> dict[str, Tensor]:
    """Read the tensor directory and check that every tensor is aligned, lies within the file and overlaps no other."""
    if type(alignment) is not int or alignment < 1:
        raise NpgptError(f"{path}: general.alignment must be a positive whole number, not {alignment!r:.40}")
    entries: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(count):
        name, n_dims = cursor.text(), cursor.number("I")
        if name in entries:
            raise NpgptError(f"{path}: duplicate tensor {name:.80}")
        if n_dims > 8:
            raise NpgptError(f"{path}: {name:.80} has {n_dims} dimensions, but ggml allows at most 4")
        shape = tuple(cursor.number("Q") for _ in range(n_dims))[::-1]
        check_shape(path, name, shape)
        entries[name] = cursor.number("I"), shape, cursor.number("Q")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    end, last = 0, ""
    for name, (kind, shape, offset) in sorted(entries.items(), key=lambda item: item[1][2]):
        if offset % alignment:
            raise NpgptError(f"{path}: {name:.80} has offset {offset}, which is not a multiple of {alignment}")
        if offset < end:
            raise NpgptError(f"{path}: {name:.80} at offset {offset} overlaps {last:.80}, which ends at offset {end}")
        dtype, block = QUANTISED.get(kind, (TYPES.get(kind, f"of the unknown type {kind}"), None))
        if block and (not shape or shape[-1] % block[0]):
            raise NpgptError(
                f"{path}: {name:.80} is {dtype}, whose blocks of {block[0]} values do not divide the rows of "
                f"{list(shape)}"
            )
        big_endian = cursor.order == ">"
        tensor = Tensor(path, name, data, dtype, shape, start + offset, big_endian=big_endian, block=block)
        end, last = offset + (tensor.nbytes if block or dtype in FLOATS else 1), name
        if start + end > len(data):
            raise NpgptError(f"{path} is truncated: {name:.80} ends at byte {start + end}, the file at {len(data)}")
        widen = functools.partial(_widened, tensor, kind) if block else None
        tensors[name] = dataclasses.replace(tensor, widen=widen)
    return tensors


def _widened(tensor: Tensor, kind: int) -> NDArray[np.float32]:
    """Return a quantised tensor as float32, dequantised by the package gguf. Raises NpgptError if gguf cannot."""
    if tensor.big_endian:
        raise NpgptError(
            f"{tensor.path}: {tensor.name:.80} is {tensor.dtype} in a big-endian file, but npgpt reads quantised "
            "tensors only from little-endian files: convert it with gguf-convert-endian (package gguf)"
        )
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise NpgptError(
            f"{tensor.path}: {tensor.name:.80} is quantised ({tensor.dtype}), which needs the extra gguf: "
            'pip install "npgpt[gguf]", or use an F16 file'
        ) from None
    values, size = QUANTISED[kind][1]
    rows = (*tensor.shape[:-1], tensor.shape[-1] // values * size)
    stored = np.ndarray(rows, np.uint8, tensor.data, tensor.begin)
    try:
        with np.errstate(all="ignore"):  # a damaged scale may be infinite: inspect reports it
            wide: NDArray[np.float32] = quants.dequantize(stored, GGMLQuantizationType(kind))
    except (NotImplementedError, ValueError):
        raise NpgptError(
            f"{tensor.path}: {tensor.name:.80} is {tensor.dtype}, which the installed package gguf cannot dequantise: "
            "upgrade it (pip install -U gguf), or use an F16 file"
        ) from None
    return wide


def _vocabulary(path: Path, keys: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the file's vocabulary as vocab.json, merges.txt and tokenizer_config.json, by name.

    Raises NpgptError if the vocabulary is not of GPT-2's kind, byte-level BPE.
    """
    for key, known in {"model": ("gpt2",), "pre": SPLITTERS, "add_space_prefix": (False,)}.items():
        value = keys.get(f"tokenizer.ggml.{key}", known[0])
        if isinstance(value, (list, np.ndarray)) or value not in known:
            raise NpgptError(f"{path}: tokenizer.ggml.{key} is {value!r:.60}, but npgpt reads only {known[0]!r}")
    tokens, merges = keys.get(TOKENS), keys.get(MERGES)
    if not isinstance(tokens, list) or not isinstance(merges, list) or not all(isinstance(t, str) for t in tokens):
        raise NpgptError(f"{path}: {TOKENS} and {MERGES} must be lists of strings")
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
            raise NpgptError(f"{path}: add_{name}_token is set, but {name}_token_id is {number!r:.40}, not a token id")
    text = "\n".join(["#version: 0.2", *map(str, merges), ""])
    files = {"vocab.json": json.dumps(ids, ensure_ascii=False).encode(), "merges.txt": text.encode()}
    return files | ({"tokenizer_config.json": json.dumps(config).encode()} if config else {})
