"""llm.c's files, compared byte by byte with the documented layout (karpathy/llm.c, train_gpt2.py: write_model)."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

import npgpt
from npgpt.checkpoints import formats, llmc
from npgpt.config import Config
from npgpt.errors import NpgptError
from npgpt.parameters import Array, to_arrays
from tests.support import writers
from tests.support.models import random_arrays, random_ids, small

CONFIG = small()
PADDED = 64


def model_file(arrays: dict[str, Array], version: int = 3, config: Config = CONFIG) -> bytes:
    """Return a model file: 16 stacks in order, written without the module under test."""
    numbers = [config.n_positions, config.vocab_size, config.n_layer, config.n_head, config.n_embd, PADDED]
    content = struct.pack("<256i", 20240326, version, *numbers, *[0] * 248)

    def put(array: Array) -> bytes:
        if version == 5:
            return (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        return array.astype("<f4").tobytes()

    wte = np.zeros((PADDED, config.n_embd))
    wte[: config.vocab_size] = arrays["wte.weight"]
    content += put(wte) + put(arrays["wpe.weight"])
    for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for kind in ("weight", "bias"):
            for layer in range(config.n_layer):
                content += put(arrays[f"h.{layer}.{name}.{kind}"].T)
    return content + put(arrays["ln_f.weight"]) + put(arrays["ln_f.bias"])


def test_a_model_of_literal_bytes(tmp_path: Path) -> None:
    """With 1 id padded to 2, 1 position, 1 block, 1 head and width 1, every number's offset is known."""
    header = struct.pack("<8i", 20240326, 3, 1, 1, 1, 1, 1, 2) + bytes(1024 - 32)
    # wte 2, wpe 1, ln1w 1, ln1b 1, qkvw 3, qkvb 3, attprojw 1, attprojb 1, ln2w 1, ln2b 1, fcw 4, fcb 4, fcprojw 4,
    # fcprojb 1, lnfw 1, lnfb 1
    path = tmp_path / "tiny.bin"
    path.write_bytes(header + struct.pack("<30f", *range(30)))
    tensors = npgpt.load(path).parameters
    found = {name: array.tolist() for name, array in to_arrays(tensors).items()}
    assert found == {
        "wte.weight": [[0]],
        "wpe.weight": [[2]],
        "h.0.ln_1.weight": [3],
        "h.0.ln_1.bias": [4],
        "h.0.attn.c_attn.weight": [[5, 6, 7]],
        "h.0.attn.c_attn.bias": [8, 9, 10],
        "h.0.attn.c_proj.weight": [[11]],
        "h.0.attn.c_proj.bias": [12],
        "h.0.ln_2.weight": [13],
        "h.0.ln_2.bias": [14],
        "h.0.mlp.c_fc.weight": [[15, 16, 17, 18]],
        "h.0.mlp.c_fc.bias": [19, 20, 21, 22],
        "h.0.mlp.c_proj.weight": [[23], [24], [25], [26]],
        "h.0.mlp.c_proj.bias": [27],
        "ln_f.weight": [28],
        "ln_f.bias": [29],
    }


def test_gpt2s_size_is_the_documented_one() -> None:
    size = sum(int(np.prod(shape)) for shape in llmc.shapes(50304, 1024, 12, 768).values())
    assert 1024 + 4 * size == 497_904_640


def test_the_whole_model_and_only_the_rows_that_it_has(tmp_path: Path) -> None:
    arrays = random_arrays(CONFIG, dtype="float32")
    (tmp_path / "model.bin").write_bytes(model_file(arrays))
    model = npgpt.load(tmp_path / "model.bin")
    assert model.config == CONFIG
    for name, array in to_arrays(model.parameters).items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)
    assert not model.parameters.h[1].attn.c_attn.weight.flags.owndata  # mapped, transposed
    assert model(random_ids(CONFIG, (1, 5))).shape == (1, 5, 40)


def test_bfloat16(tmp_path: Path) -> None:
    arrays = {n: (np.round(a * 8) / 8).astype(np.float32) for n, a in random_arrays(CONFIG).items()}  # few bits: exact
    (tmp_path / "model.bin").write_bytes(model_file(arrays, version=5))
    for name, array in to_arrays(npgpt.load(tmp_path / "model.bin").parameters).items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: 2}, "version 2 of .* but npgpt reads only 3 .* and 5"),
        ({1: 1}, "version 1"),
        ({7: 39}, "vocab_size 40 padded to 39"),
        ({4: 0}, "n_layer 0"),
        ({6: -21}, "n_embd -21"),
        ({2: 25}, "by its header it should have .* bytes, but it has"),
        ({2: 2**31 - 1, 6: 2**31 - 1, 4: 2**31 - 1}, "by its header it should have"),
        ({5: 2}, "n_embd = 21 is not divisible by n_head = 2"),
    ],
)
def test_a_header_that_cannot_be(tmp_path: Path, change: dict[int, int], message: str) -> None:
    content = bytearray(model_file(random_arrays(CONFIG)))
    for place, value in change.items():
        struct.pack_into("<i", content, 4 * place, value)
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(NpgptError, match=message):
        npgpt.load(tmp_path / "model.bin")


# not: a file that is longer than its header says taken for whole
def test_a_byte_too_many(tmp_path: Path) -> None:
    content = writers.llmc(CONFIG, random_arrays(CONFIG, dtype="float32"))
    path = writers.write(tmp_path, {"m.bin": content + b"\0"})
    with pytest.raises(
        NpgptError, match=rf"by its header it should have {len(content)} bytes, but it has {len(content) + 1}"
    ):
        formats.read(path)


@pytest.mark.parametrize(("magic", "kind"), [(20240327, "reference state"), (20240328, "tokenizer")])
def test_its_other_files_are_no_models(tmp_path: Path, magic: int, kind: str) -> None:
    path = tmp_path / "other.bin"
    path.write_bytes(struct.pack("<256i", magic, *[2] * 255))
    with pytest.raises(NpgptError, match=f"is llm.c's {kind}.*not a model"):
        formats.read(path)


def tokenizer_file(tokens: list[bytes], version: int = 2) -> bytes:
    """Return a tokenizer file: 256 int32, then each token's length and bytes."""
    header = struct.pack("<256i", 20240328, version, len(tokens), len(tokens) - 1, *[0] * 252)
    return header + b"".join(bytes([len(token)]) + token for token in tokens)


def test_its_tokenizer_beside_it(tmp_path: Path) -> None:
    config = small(vocab_size=258)
    arrays = random_arrays(config, dtype="float32")
    numbers = [config.n_positions, 258, config.n_layer, config.n_head, config.n_embd, 320]
    content = bytearray(model_file(arrays | {"wte.weight": np.zeros((40, 21))}))
    padding = np.zeros((320, 21), "<f4")
    padding[:258] = arrays["wte.weight"]
    content[:1024] = struct.pack("<256i", 20240326, 3, *numbers, *[0] * 248)
    content[1024 : 1024 + 4 * PADDED * 21] = padding.tobytes()
    (tmp_path / "model.bin").write_bytes(content)
    tokens = [*(bytes([byte]) for byte in range(256)), b"ab", b"<|endoftext|>"]
    (tmp_path / "gpt2_tokenizer.bin").write_bytes(tokenizer_file(tokens))
    tokenizer = npgpt.load(tmp_path).tokenizer
    assert tokenizer.encode("xab") == [120, 256]
    assert tokenizer.end_of_text == 257
    assert tokenizer.decode([97, 256]) == "aab"
    (tmp_path / "gpt2_tokenizer.bin").write_bytes(tokenizer_file(tokens)[:-3])
    with pytest.raises(NpgptError, match=r"not a tokenizer of llm\.c's or is truncated: 258 tokens of 258"):
        npgpt.load(tmp_path).generate("a")


# not: a tokenizer cut at the end of a token, fewer than its header counts
def test_a_tokenizer_with_fewer_tokens_than_it_counts(tmp_path: Path) -> None:
    tokens = [bytes([n]) for n in range(256)] + [b"ab"]
    (tmp_path / "gpt2_tokenizer.bin").write_bytes(tokenizer_file(tokens)[:-3])
    with pytest.raises(NpgptError, match=r"is not a tokenizer of llm\.c's or is truncated: 256 tokens of 257"):
        npgpt.text.byte_pairs.from_llmc(tmp_path / "gpt2_tokenizer.bin", 300)
