from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt import parameters, tracing
from npgpt.checkpoints import configs, raw
from npgpt.checkpoints.places import EMBEDDED_WEIGHTS
from npgpt.errors import NpgptError
from npgpt.oracle import files
from tests.support.austen import AUSTEN
from tests.support.command import here, refused
from tests.support.models import random_arrays, random_ids, random_parameters, small
from tests.support.thorough import examples

TEXT = "It is a truth"
WEIGHTS = EMBEDDED_WEIGHTS / "austen" / "model.safetensors"


def recorded(dtype: str = "float32") -> dict[str, Any]:
    model = npgpt.load(dtype=dtype)
    stages: dict[str, Any] = {}
    model(model.encode_prompt(TEXT), record=stages.__setitem__)
    return stages


def test_a_trace_is_what_the_forward_pass_records() -> None:
    model, expected = AUSTEN, recorded()
    found = tracing.trace(TEXT, model)
    assert list(found) == list(expected)
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])
        assert array.dtype == np.float32


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["logits"], ["logits"]),
        (["h.3"], ["h.3"]),
        (["*.attn.weights"], [f"h.{layer}.attn.weights" for layer in range(6)]),
        (["logits", "h.0.mlp.*"], ["h.0.mlp.c_fc", "h.0.mlp.act", "h.0.mlp.c_proj", "logits"]),
        (["h.[01].ln_?", "wte"], ["wte", "h.0.ln_1", "h.0.ln_2", "h.1.ln_1", "h.1.ln_2"]),
    ],
)
def test_only_what_fits_a_pattern(patterns: list[str], names: list[str]) -> None:
    assert list(tracing.trace([1, 2], AUSTEN, only=patterns)) == names


@pytest.mark.parametrize("pattern", ["logitz", "LOGITS", "h.6.*", ""])
def test_a_pattern_that_fits_nothing_is_told(pattern: str) -> None:
    with pytest.raises(
        NpgptError, match=r"no intermediate is called .*wte, wpe, embedding, h\.0\.ln_1, .*, h\.0, ln_f,"
    ):
        tracing.trace([1, 2], only=["logits", pattern])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_files_hold_names_ids_and_what_it_was_computed_from(tmp_path: Path, suffix: str, dtype: str) -> None:
    path, expected = tmp_path / f"trace{suffix}", recorded(dtype)
    code, out, error = here("trace", TEXT, "-o", str(path), "--dtype", dtype, cwd=tmp_path)
    size = sum(array.nbytes for array in expected.values())
    assert (code, out) == (0, "")
    assert error == f"npgpt: {path}: {len(expected)} intermediates of 4 tokens, {dtype}, {size:,} bytes\n"
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
            assert archive.files == ["metadata", "token_ids", *expected]
        about = json.loads(bytes(arrays.pop("metadata")))
    else:
        given = files.read(path)
        assert given.token_ids is not None
        arrays = dict(given.arrays) | {"token_ids": given.token_ids}
        texts = header(path)
        assert texts.pop("format") == "pt"
        plain = ("npgpt", "model", "dtype", "text")
        about = {key: text if key in plain else json.loads(text) for key, text in texts.items()}
    ids = arrays.pop("token_ids")
    assert (ids.dtype, ids.tolist()) == (np.int64, [about["token_ids"]])
    assert list(arrays) == list(expected) or suffix == ".safetensors"
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, expected[name])
    assert about == {
        "npgpt": npgpt.__version__,
        "model": "austen",
        "weights": {"model.safetensors": hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()},
        "config": configs.to_dict(AUSTEN.config),
        "dtype": dtype,
        "text": TEXT,
        "token_ids": AUSTEN.encode_prompt(TEXT),
    }
    assert [path.name for path in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_the_backward_pass(tied: bool) -> None:
    config = small(tie_word_embeddings=tied)
    model = npgpt.LanguageModel("a", config, random_parameters(config))
    ids = random_ids(config, (5,)).tolist()
    recorded: dict[str, Any] = {}
    loss, expected = npgpt.loss_and_gradients(model.parameters, config, ids, record=recorded.__setitem__)
    found = npgpt.trace(ids, model, loss=True, gradients=True)
    stages, derivatives = npgpt.trace(ids, model), parameters.to_arrays(expected)
    assert list(found) == [*stages, "loss", *recorded, *(f"d.{name}" for name in derivatives)]
    assert (found["loss"].shape, str(found["loss"].dtype), float(found["loss"])) == ((), "float64", loss)
    for name, stage in stages.items():
        np.testing.assert_array_equal(found[name], stage)
        np.testing.assert_array_equal(found[f"d.{name}"], recorded[f"d.{name}"])
        assert found[f"d.{name}"].shape == stage.shape
    for name, array in derivatives.items():
        np.testing.assert_array_equal(found[f"d.{name}"], array)
    assert (found["d.wte"].shape, found["d.wte.weight"].shape) == ((1, 5, 21), (40, 21))  # a stage and a parameter
    assert ("d.lm_head.weight" in found) is not tied
    # the mean of −log p of ids 1 … 4, each after those before it, from the logits alone
    logits = found["logits"][0, :-1]
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    # a loss near 4 from float64's logits and 40 terms: a few hundred times 2⁻⁵³ at most
    assert loss == pytest.approx(-np.log(p[np.arange(4), ids[1:]]).mean(), rel=1e-13)


def test_a_step_against_the_gradient_lowers_the_loss_by_its_square() -> None:
    """The derivative along −g is −|g|². A step of 1e-6 leaves a relative error of its order, and 2⁻⁵³ · 4 / 1e-6."""
    config = small()
    arrays = random_arrays(config)
    ids = random_ids(config, (5,)).tolist()

    def loss(weights: dict[str, Any]) -> dict[str, Any]:
        model = npgpt.LanguageModel("a", config, parameters.from_arrays(config, weights))
        return npgpt.trace(ids, model, only=["loss", "d.*"], loss=True, gradients=True)

    found = loss(arrays)
    g = {name: found[f"d.{name}"] for name in arrays}
    square = sum(float(np.square(array).sum()) for array in g.values())
    there, back = (loss({name: arrays[name] + h * g[name] for name in arrays})["loss"] for h in (1e-6, -1e-6))
    assert (there - back) / 2e-6 == pytest.approx(square, rel=1e-6)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("loss", ["loss"]),
        ("d.ln_f*", ["d.ln_f", "d.ln_f.weight", "d.ln_f.bias"]),
        ("d.wte", ["d.wte"]),
        ("*wpe", ["wpe", "d.wpe"]),
        ("d.h.1.attn.c_proj.bias", ["d.h.1.attn.c_proj.bias"]),
    ],
)
def test_only_applies_to_loss_and_gradients(pattern: str, names: list[str]) -> None:
    assert list(npgpt.trace([1, 2], AUSTEN, only=[pattern], loss=True, gradients=True)) == names


def test_gradients_that_are_not_asked_for_are_no_names() -> None:
    for pattern in ("d.*", "d.wte.weight"):
        with pytest.raises(NpgptError, match=r"no intermediate is called 'd\..*; d\.NAME needs --gradients"):
            npgpt.trace([1, 2], AUSTEN, only=[pattern], loss=True)
    with pytest.raises(NpgptError, match=r"called 'd\.h\.6.*, ln_f, logits, loss; d\.NAME of each and of each param"):
        npgpt.trace([1, 2], AUSTEN, only=["d.h.6.*"], loss=True, gradients=True)


@pytest.mark.parametrize("place", [["-o", "t.npz"], ["-o", "t.safetensors"], ["--to", "raw", "t"]])
def test_loss_and_gradients_in_files(tmp_path: Path, place: list[str]) -> None:
    only = ("loss", "logits", "d.h.0", "d.h.0.ln_1.weight")
    patterns = [option for name in only for option in ("--only", name)]
    assert here("trace", TEXT, "--loss", "--gradients", *place, *patterns, cwd=tmp_path)[0] == 0
    path = tmp_path / place[-1]
    expected = npgpt.trace(TEXT, AUSTEN, only=only, loss=True, gradients=True)
    about: dict[str, Any]
    if path.is_dir():
        arrays, about = raw.read(path)
    elif path.suffix == ".npz":
        with np.load(path) as archive:
            arrays = dict(archive)
        about = json.loads(bytes(arrays.pop("metadata")))
    else:
        about, arrays = dict(header(path)), dict(files.read(path).arrays)
    for name, array in expected.items():
        assert (arrays[name].dtype, arrays[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(arrays[name], array)
    assert about["loss"] == "the mean cross-entropy of the next token, in nats a token; the last token has none"
    assert about["gradients"].startswith("d.NAME is the derivative of the loss")


@pytest.mark.parametrize("asked", [{"loss": True}, {"gradients": True}])
def test_what_has_no_loss(asked: dict[str, Any]) -> None:
    with pytest.raises(NpgptError, match="the text has one token, and none after it to predict"):
        npgpt.trace([1], AUSTEN, **asked)
    body = replace(AUSTEN, no_logits="its head has 2 classes")
    with pytest.raises(NpgptError, match="gives no logits, and so no loss and no gradients: its head has 2 classes"):
        npgpt.trace([1, 2], body, **asked)


def header(path: Path) -> dict[str, str]:
    """Return a safetensors file's metadata without using npgpt."""
    content = path.read_bytes()
    found: dict[str, str] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    return found


@pytest.mark.usefixtures("few_mistakes")
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"][: examples(1, 2)])
def test_check_reads_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"trace{suffix}"
    assert here("trace", TEXT, "-o", str(path), "--only", "logits", "--only", "h.2.attn.*")[0] == 0
    code, out, _ = here("check", str(path))
    assert (code, out.splitlines()[0]) == (0, "Matches: rounding in float32 explains every difference, in 10 stages.")


def test_a_model_without_text(bare: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    assert here("trace", "--ids", "3,39", "--model", str(bare), "-o", str(path))[0] == 0
    with np.load(path) as archive:
        assert archive["token_ids"].tolist() == [[3, 39]]
        assert json.loads(bytes(archive["metadata"]))["text"] is None
        assert archive["logits"].shape == (1, 2, 40)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([TEXT], "-o"),
        ([TEXT, "-o", "trace.txt"], "trace.txt must end in .npz or .safetensors, or give --to raw"),
        ([TEXT, "-o", "no/trace.npz"], "-o no/trace.npz: there is no folder no"),
        ([TEXT, "-o", "old.npz", "--only", "h.9.*"], "no intermediate is called 'h.9.*'"),
        (["", "-o", "old.npz"], "the text is empty"),
        (["-o", "old.npz"], "there is no text"),
        (["--ids", "1,4096", "-o", "old.npz"], "4096"),
        (["--ids", "one", "-o", "old.npz"], "--ids takes whole numbers"),
        (["truth " * 300, "-o", "old.npz"], "the context holds 256"),
        (["--ids", "1", "-o", "old.npz", "--loss"], "the text has one token, and none after it to predict"),
        (["--ids", "1", "-o", "old.npz", "--gradients"], "a loss needs two or more"),
        ([TEXT, "-o", "old.npz", "--only", "loss"], "logits; loss needs --loss; d.NAME needs --gradients"),
        ([TEXT, "-o", "old.npz", "--batch", "2"], "--batch 2 goes with --to llm.c only"),
        ([TEXT, "--to", "raw", "d", "--length", "2"], "--length 2 goes with --to llm.c only"),
    ],
)
def test_bad_input_is_one_line_and_the_old_file_stays(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "old.npz").write_bytes(b"old")
    assert message in refused("trace", *arguments, cwd=tmp_path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("old.npz", b"old")]


def test_a_disk_that_is_full_is_told_with_the_file_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace.npz"
    path.write_bytes(b"old")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    model = AUSTEN
    with pytest.raises(OSError, match=r"No space left on device: '.*trace\.npz'"):
        tracing.write(path, tracing.trace([1], model), tracing.metadata(model, [1], None))
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("trace.npz", b"old")]


@pytest.mark.parametrize("function", [npgpt.trace, npgpt.attend, npgpt.explain])
def test_functions_of_a_text_take_special_tokens_and_refuse_no_text(function: Any) -> None:
    plain, special = (len(AUSTEN.text_ids("<|endoftext|>", special=special)) for special in (False, True))
    assert (plain > 1, special) == (True, 1)
    function("<|endoftext|>", AUSTEN, special=True)
    with pytest.raises(NpgptError, match="the text is empty, and at least one token is needed"):
        function("", AUSTEN)
    with pytest.raises(NpgptError, match="one row of ids is expected, not 2"):
        function([[1], [2]], AUSTEN)
