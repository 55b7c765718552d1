"""npgpt trace --to llm.c: the three files that llm.c's test_gpt2.c reads, by their documented layout."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import npgpt
from npgpt import parameters, tracing
from npgpt.checkpoints import llmc
from npgpt.errors import NpgptError
from tests.support import writers
from tests.support.austen import AUSTEN
from tests.support.command import here, refused
from tests.support.conversion import listed
from tests.support.models import random_ids, random_parameters, small, speaking

FILES = ["gpt2_124M.bin", "gpt2_124M_debug_state.bin", "gpt2_tokenizer.bin"]


class Read(NamedTuple):
    """What a C program finds in the two files with numbers."""

    header: tuple[int, ...]
    weights: NDArray[np.float32]
    state_header: tuple[int, ...]
    x: NDArray[np.int32]
    y: NDArray[np.int32]
    logits: NDArray[np.float32]
    loss: float
    gradients: NDArray[np.float32]


def read(folder: Path) -> Read:
    """Read the files as test_gpt2.c does, one fread after another."""
    model, state = (folder / FILES[0]).read_bytes(), (folder / FILES[1]).read_bytes()
    header, state_header = struct.unpack("<256i", model[:1024]), struct.unpack("<256i", state[:1024])
    assert not any(header[8:])
    assert not any(state_header[4:])
    V, (B, T) = header[3], state_header[2:4]
    x, y = np.frombuffer(state, "<i4", 2 * B * T, 1024).reshape(2, B, T)
    rest = np.frombuffer(state, "<f4", offset=1024 + 8 * B * T)
    logits, loss, gradients = rest[: B * T * V].reshape(B, T, V), float(rest[B * T * V]), rest[B * T * V + 1 :]
    return Read(header[:8], np.frombuffer(model, "<f4", offset=1024), state_header[:4], x, y, logits, loss, gradients)


def flat(config: npgpt.Config, arrays: Mapping[str, Any], padded: int) -> NDArray[np.float32]:
    """Return parameters in llm.c's order, by the tests' own writer."""
    return np.frombuffer(writers.llmc(config, arrays, padded=padded), "<f4", offset=1024)


def test_every_number_has_its_place(tmp_path: Path) -> None:
    folder = speaking(tmp_path / "m")
    ids = "7,1,9,256,3,3,8,99"  # one more than is used
    arguments = ("--ids", ids, "--model", str(folder), "--to", "llm.c", "d", "--batch", "2", "--length", "3")
    code, out, error = here("trace", *arguments, cwd=tmp_path)
    assert (code, out) == (0, "")
    assert error.splitlines()[-1].startswith("npgpt: d: llm.c's files of the first 7 of 8 tokens, 2 × 3, float32, loss")
    assert listed(tmp_path / "d") == FILES
    found, model = read(tmp_path / "d"), npgpt.load(folder)
    assert found.header == (20240326, 3, 64, 257, 2, 3, 21, 384)
    assert found.state_header == (20240327, 2, 2, 3)
    assert (found.x.tolist(), found.y.tolist()) == ([[7, 1, 9], [256, 3, 3]], [[1, 9, 256], [3, 3, 8]])
    arrays = parameters.to_arrays(model.parameters)
    np.testing.assert_array_equal(found.weights, flat(model.config, arrays, 384))
    assert not found.weights[257 * 21 : 384 * 21].any()
    np.testing.assert_array_equal(found.logits, model(found.x))
    loss, gradients = npgpt.loss_and_gradients(model.parameters, model.config, found.x, found.y)
    assert found.loss == np.float32(loss)
    np.testing.assert_array_equal(found.gradients, flat(model.config, parameters.to_arrays(gradients), 384))
    tokenizer = (tmp_path / "d" / FILES[2]).read_bytes()
    assert struct.unpack("<256i", tokenizer[:1024]) == (20240328, 2, 257, 256, *[0] * 252)
    assert tokenizer[1024:] == b"".join(b"\1" + bytes([byte]) for byte in range(256)) + b"\x0d<|endoftext|>"


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 300), st.integers(1, 3), st.integers(1, 6))
def test_what_is_written_is_loaded_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, n_head: int, n_layer: int, vocab_size: int, B: int, T: int
) -> None:
    config = small(n_head=n_head, n_embd=2 * n_head, n_layer=n_layer, vocab_size=vocab_size, n_positions=6)
    model = npgpt.LanguageModel("a", config, random_parameters(config, dtype="float32"))
    folder = tmp_path_factory.mktemp("llmc") / "d"
    ids = random_ids(config, (B * T + 1,)).tolist()
    loss, why = tracing.write_llmc(folder, model, ids, B, T)
    found, loaded = read(folder), npgpt.load(folder / FILES[0])
    assert (listed(folder), why) == (FILES[:2], "a has no text: it was created without a vocabulary")
    assert loaded.config == config
    expected = parameters.to_arrays(model.parameters)
    for name, array in parameters.to_arrays(loaded.parameters).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    assert found.header[7] % 128 == 0 <= found.header[7] - vocab_size < 128
    assert len(found.gradients) == len(found.weights)
    assert found.loss == np.float32(loss)
    assert [*found.x.reshape(-1), found.y[-1, -1]] == ids


def test_the_embedded_model(tmp_path: Path) -> None:
    text = "It is a truth universally acknowledged, that a single man in possession of a good fortune. " * 20
    assert here("trace", "-", "--to", "llm.c", "d", cwd=tmp_path, stdin=text.encode())[0] == 0
    found, model = read(tmp_path / "d"), npgpt.load(tmp_path / "d" / FILES[0])
    assert (found.header, found.state_header) == ((20240326, 3, 256, 4096, 6, 6, 192, 4096), (20240327, 2, 4, 64))
    ids = AUSTEN.tokenizer.encode(text)
    assert found.x.reshape(-1).tolist() == ids[:256]
    assert found.y.reshape(-1).tolist() == ids[1:257]
    assert model.config == AUSTEN.config
    assert model.tokenizer.pieces == AUSTEN.tokenizer.pieces
    assert model.tokenizer.encode(text) == ids


@pytest.mark.usefixtures("few_mistakes")
def test_check_reads_the_state(tmp_path: Path, bare: Path) -> None:
    sizes = ("--batch", "2", "--length", "3", "--model", str(bare))
    assert here("trace", "--ids", "7,1,9,25,3,3,8", "--to", "llm.c", "d", *sizes, cwd=tmp_path)[0] == 0
    code, out, _ = here("check", "d/gpt2_124M_debug_state.bin", "--model", "d/gpt2_124M.bin", cwd=tmp_path)
    assert (code, out.split(":")[0]) == (0, "Matches")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "logits"], "--only does not go with --to llm.c: test_gpt2.c reads its files whole"),
        (["--loss"], "--loss does not go with --to llm.c: its files hold the loss in any case"),
        (["--gradients"], "--gradients does not go with --to llm.c: its files hold the gradients in any case"),
        (["--dtype", "float64"], "--dtype does not go with --to llm.c: its files hold float32, not float64"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--length", "-3"], "--length must be at least 1"),
        ([], "the text has 4 tokens, and --batch 4 × --length 64 takes 257, the last one as a target"),
        (["--batch", "1", "--length", "4"], "the text has 4 tokens, and --batch 1 × --length 4 takes 5"),
        (["--length", "257"], "--length 257 is longer than the context of 256: give at most that"),
        (["--batch", "8192"], "--batch 8192 × --length 64 make an array of 2,147,483,648 numbers"),
        (["--activation", "gelu"], "its activation_function is gelu, and llm.c has gelu_new alone; --to raw DIR"),
    ],
)
def test_what_is_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    assert message in refused("trace", "It is a truth", "--to", "llm.c", "d", *arguments, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_ids_and_a_folder_that_do_not_fit(tmp_path: Path) -> None:
    form, sizes = ("--to", "llm.c", "d"), ("--batch", "1", "--length", "2")
    assert "token id 4096" in refused("trace", "--ids", "1,2,4096", *form, *sizes, cwd=tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine").touch()
    assert "d exists and is not an empty folder" in refused("trace", "--ids", "1,2,3", *form, *sizes, cwd=tmp_path)
    assert listed(tmp_path / "d") == ["mine"]
    (tmp_path / "d" / "mine").unlink()
    at = ("trace", "--ids", "1,2,3", "--to")  # a shell would be left in a folder that is gone
    for arguments in ((*at, "llm.c", ".", *sizes), (*at, "raw", "../d")):
        assert "d is the current folder" in refused(*arguments, cwd=tmp_path / "d").replace(": . is", ": d is")


@pytest.mark.parametrize(("batch", "length", "count"), [(2**23, 2, 2**31), (2**23, 6, 2**23 * 6 * 128)])
def test_an_array_that_llmc_cannot_count(tmp_path: Path, batch: int, length: int, count: int) -> None:
    """It counts logits with their padding, as int."""
    model = npgpt.LanguageModel("a", small(), random_parameters(small(), dtype="float32"))
    with pytest.raises(NpgptError, match=f"an array of {count:,} numbers"):
        tracing.write_llmc(tmp_path / "d", model, [1, 2, 3], batch, length)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_inner": 83}, "its n_inner is 83, and llm.c has 84 alone"),
        ({"activation_function": "gelu"}, "its activation_function is gelu, and llm.c has gelu_new alone"),
        ({"layer_norm_epsilon": 1e-6}, "its layer_norm_epsilon is 1e-06, and llm.c has 1e-05 alone"),
        ({"tie_word_embeddings": False}, "its tie_word_embeddings is False, and llm.c has True alone"),
        ({"scale_attn_weights": False}, "its scale_attn_weights is False, and llm.c has True alone"),
        ({"scale_attn_by_inverse_layer_idx": True}, "its scale_attn_by_inverse_layer_idx is True, and llm.c has False"),
    ],
)
def test_a_model_that_llmc_does_not_have(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    config = small(**fields)
    model = npgpt.LanguageModel("a", config, random_parameters(config, dtype="float32"))
    with pytest.raises(NpgptError, match=f"llm.c cannot run this model: {message}.*; --to raw DIR"):
        tracing.write_llmc(tmp_path / "d", model, [1, 2, 3], 1, 2)
    assert not list(tmp_path.iterdir())


def test_other_names_of_the_same_formula_are_llmcs(tmp_path: Path) -> None:
    """GGUF states an epsilon in float32, which is llm.c's 1e-5f."""
    epsilon = float(np.float32(1e-5))
    config = small(n_inner=84, activation_function="gelu_pytorch_tanh", layer_norm_epsilon=epsilon)
    model = npgpt.LanguageModel("a", config, random_parameters(config, dtype="float32"))
    tracing.write_llmc(tmp_path / "d", model, [1, 2, 3], 1, 2)
    assert listed(tmp_path / "d") == FILES[:2]


def test_models_without_logits_or_in_float64(tmp_path: Path) -> None:
    config = small()
    double = npgpt.LanguageModel("a", config, random_parameters(config))
    with pytest.raises(NpgptError, match=r"llm\.c's files hold float32, and a is float64"):
        tracing.write_llmc(tmp_path / "d", double, [1, 2, 3], 1, 2)
    body = replace(double, parameters=random_parameters(config, dtype="float32"), no_logits="its head has 2 classes")
    with pytest.raises(NpgptError, match="a gives no logits, and so no loss and no gradients: its head has 2 classes"):
        tracing.write_llmc(tmp_path / "d", body, [1, 2, 3], 1, 2)


BYTES = {byte: bytes([byte]) for byte in range(256)}


@pytest.mark.parametrize(
    ("pieces", "end_of_text", "message"),
    [
        (BYTES, None, "V has no <|endoftext|>, whose id llm.c's tokenizer states"),
        (BYTES | {257: b"ab"}, 257, "id 256 of V has 0 bytes, and llm.c's tokenizer holds 1 to 255"),
        (BYTES | {256: b"a" * 256}, 0, "id 256 of V has 256 bytes"),
        (BYTES | {256: b"a"}, 0, "1 ids of V have the text of another"),
    ],
)
def test_a_vocabulary_that_does_not_fit(
    tmp_path: Path, pieces: dict[int, bytes], end_of_text: int | None, message: str
) -> None:
    with pytest.raises(NpgptError, match=message.replace("|", r"\|")):
        llmc.write_tokenizer(tmp_path / "t.bin", pieces, end_of_text, "V")
    assert not list(tmp_path.iterdir())


def test_a_model_without_text_is_written_without_a_tokenizer_and_that_is_said(tmp_path: Path, bare: Path) -> None:
    arguments = ("--ids", "1,2,3", "--model", str(bare), "--to", "llm.c", "d", "--batch", "1", "--length", "2")
    code, _, error = here("trace", *arguments, cwd=tmp_path)
    assert (code, listed(tmp_path / "d")) == (0, FILES[:2])
    assert "npgpt: d has no gpt2_tokenizer.bin: " in error


def test_the_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(llmc, "write_state", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*d'"):
        tracing.write_llmc(tmp_path / "d", AUSTEN, [1, 2, 3], 1, 2)
    assert not list(tmp_path.iterdir())
