"""The configuration that files state, gathered and cross-checked, and the choice of a folder's file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt.checkpoints import configs, formats, safetensors
from npgpt.checkpoints.inspect import inspect
from npgpt.checkpoints.open import CONVERTED, open_checkpoint, open_vocabulary
from npgpt.checkpoints.tensor import Contents, Stated
from npgpt.errors import NpgptError
from npgpt.text.vocabularies import load_tokenizer
from tests.support.models import random_arrays, small, stored
from tests.support.namings import NAMINGS

CONFIG = small()
NANOGPT_ARGS = {
    "n_layer": 2,
    "n_head": 3,
    "n_embd": 21,
    "block_size": 24,
    "bias": True,
    "vocab_size": 40,
    "dropout": 0.0,
}


def put(folder: Path, scheme: str = "huggingface", **files: Any) -> Path:
    """Write weights, and JSON files by their stems."""
    folder.mkdir(exist_ok=True)
    safetensors.write(folder / "m.safetensors", NAMINGS[scheme](random_arrays(CONFIG, dtype="float32")))
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder / "m.safetensors"


@pytest.fixture
def within(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a safetensors file state a configuration, as training checkpoints, GGUF and llm.c do."""
    read = formats.read

    def state(fields: dict[str, Any]) -> None:
        def stating(path: Path) -> Contents:
            found = read(path)
            return Contents(found.format, found.files, found.tensors, Stated(f"model_args in {path}", fields))

        monkeypatch.setattr(formats, "read", stating)

    return state


def test_openais_hparams(tmp_path: Path) -> None:
    hparams = {"n_vocab": 40, "n_ctx": 24, "n_embd": 21, "n_head": 3, "n_layer": 2}
    assert npgpt.load(put(tmp_path / "m", "openai", hparams=hparams)).config == CONFIG


def test_llms_from_scratchs_dictionary_beside_its_weights(tmp_path: Path) -> None:
    book = {"vocab_size": 40, "context_length": 24, "emb_dim": 21, "n_heads": 3, "n_layers": 2, "drop_rate": 0.1}
    path = put(tmp_path / "m", "llms-from-scratch", config=book | {"qkv_bias": True})
    assert npgpt.load(path).config == CONFIG
    (path.parent / "config.json").unlink()
    with pytest.raises(NpgptError, match=r"does not state n_head, and no shape depends on it: give it \(--n-head N"):
        npgpt.load(path)


def test_a_contradiction_names_both_sources(tmp_path: Path, within: Any) -> None:
    within(NANOGPT_ARGS | {"n_head": 7})
    path = put(tmp_path / "m", "nanogpt", config={"n_head": 3})
    with pytest.raises(NpgptError) as error:
        npgpt.load(path)
    beside = path.parent / "config.json"
    assert str(error.value) == (
        f"n_head is 7 in model_args in {path}, but 3 in {beside}: correct or remove the wrong one"
    )
    assert npgpt.load(path, n_head=3).config.n_head == 3  # the argument settles it


def test_config_json_and_hparams_json_too(tmp_path: Path) -> None:
    path = put(tmp_path / "m", config={"n_head": 3, "n_ctx": 24}, hparams={"n_head": 3, "n_ctx": 25})
    with pytest.raises(NpgptError, match=r"n_positions is 24 in .*config\.json, but 25 in .*hparams\.json"):
        npgpt.load(path)


@pytest.mark.parametrize(("key", "value"), [("n_layer", 3), ("block_size", 25), ("vocab_size", 41), ("n_embd", 24)])
def test_what_is_stated_and_the_shapes_are_told_together(tmp_path: Path, within: Any, key: str, value: int) -> None:
    within(NANOGPT_ARGS | {key: value})
    path = put(tmp_path / "m", "nanogpt")
    with pytest.raises(NpgptError, match=r"m\.safetensors \(nanoGPT's names\) does not fit model_args in .*m\.safeten"):
        npgpt.load(path)


def test_nanogpts_arguments(tmp_path: Path, within: Any) -> None:
    within(NANOGPT_ARGS)
    checkpoint = open_checkpoint(put(tmp_path / "m", "nanogpt"))
    assert checkpoint.config == small(activation_function="gelu")
    assert checkpoint.description == "safetensors, nanoGPT's names"
    assert checkpoint.unknown_keys == []


def test_an_older_nanogpt_says_beside_it_that_its_activation_is_the_tanh_form(tmp_path: Path, within: Any) -> None:
    """The keys only suggest the erf form; config.json states the tanh form of early versions and forks."""
    within(NANOGPT_ARGS)
    checkpoint = open_checkpoint(put(tmp_path / "m", "nanogpt", config={"activation_function": "gelu_new"}))
    assert checkpoint.config == CONFIG


GUESS = (
    "the checkpoint does not state its GELU, and the {} is a guess: "
    "choose with --activation gelu (erf) or gelu_new (tanh)"
)
ERF, TANH = GUESS.format("erf form (nanoGPT's)"), GUESS.format("tanh form (build-nanogpt's, minGPT's)")
BUILD_NANOGPT = {key: value for key, value in NANOGPT_ARGS.items() if key not in ("bias", "dropout")}


@pytest.mark.parametrize(
    ("fields", "activation", "note"),
    [
        ({"n_head": 3}, "gelu", ERF),
        (BUILD_NANOGPT, "gelu_new", TANH),
        (NANOGPT_ARGS, "gelu", ""),
        ({"n_head": 3, "activation_function": "gelu_new"}, "gelu_new", ""),
        (NANOGPT_ARGS | {"activation_function": "gelu_fast"}, "gelu_new", ""),
        (BUILD_NANOGPT | {"activation_function": "gelu_python"}, "gelu", ""),
    ],
)
def test_a_guessed_gelu_is_said_until_it_is_stated(
    tmp_path: Path, within: Any, fields: dict[str, Any], activation: str, note: str
) -> None:
    within(fields)
    path = put(tmp_path / "m", "nanogpt")
    model = npgpt.load(path)
    assert model.config.activation_function == activation
    assert [line.startswith(note) for line in model.notes] == [True] * bool(note)
    assert repr(model).endswith("; 1 note)") == bool(note)
    assert open_checkpoint(path).guesses_gelu == inspect(path).guesses_gelu == bool(note)
    for stated in ("gelu", "gelu_new"):  # the argument settles it, and overrides what is stated
        model = npgpt.load(path, activation=stated)
        assert (model.config.activation_function, model.notes) == (stated, ())
        assert inspect(path, activation=stated).config.activation_function == stated
        opened = npgpt.load(path, config=small(activation_function=stated))
        assert (opened.config.activation_function, opened.notes) == (stated, ())


@pytest.mark.parametrize("scheme", [name for name in NAMINGS if name != "nanogpt"])
def test_only_nanogpts_names_leave_the_gelu_open(tmp_path: Path, scheme: str) -> None:
    path = put(tmp_path / "m", scheme)
    assert npgpt.load(path, n_head=3).notes == ()
    assert npgpt.load(path, n_head=3, activation="gelu").config.activation_function == "gelu"


def test_an_activation_that_is_none(tmp_path: Path) -> None:
    path = put(tmp_path / "m", "nanogpt", config={"n_head": 3})
    assert npgpt.load(path, activation="gelu_python").config.activation_function == "gelu"
    for other in ("relu", "", 3, ["gelu"]):
        with pytest.raises(
            NpgptError, match=r"activation_function .* is not one that GPT-2 uses|activation must be a str"
        ):
            npgpt.load(path, activation=other)  # type: ignore[arg-type]
    with pytest.raises(NpgptError, match="give activation or config, not both"):
        npgpt.load(path, activation="gelu", config=CONFIG)
    with pytest.raises(NpgptError, match="give n_head or config, not both"):
        npgpt.load(path, n_head=3, activation="gelu", config=CONFIG)


@pytest.mark.parametrize(("n_ctx", "n_positions"), [(12, 24), (24, 12), (1024, 24)])
def test_wpe_decides_between_two_contexts(tmp_path: Path, n_ctx: int, n_positions: int) -> None:
    path = put(tmp_path / "m", config={"n_head": 3, "n_ctx": n_ctx, "n_positions": n_positions})
    model = npgpt.load(path)
    assert model.config == CONFIG
    config = path.parent / "config.json"
    assert model.notes == (f"{config} states n_ctx {n_ctx} and n_positions {n_positions}: wpe has 24 rows",)
    put(tmp_path / "m", config={"n_head": 3, "n_ctx": 24, "n_positions": 24})
    assert npgpt.load(path).notes == ()
    put(tmp_path / "m", config={"n_head": 3, "n_ctx": 12, "n_positions": 13})
    with pytest.raises(NpgptError, match=r"wpe\.weight is \[24, 21\] and must be \[13, 21\]"):
        npgpt.load(path)


def test_mingpts_arguments_mean_the_tanh_form(tmp_path: Path, within: Any) -> None:
    within(NANOGPT_ARGS | {"embd_pdrop": 0.1, "model_type": None})
    arrays = random_arrays(small(tie_word_embeddings=False), dtype="float32")
    safetensors.write(tmp_path / "m", NAMINGS["nanogpt"](arrays))
    assert open_checkpoint(tmp_path / "m").config == small(tie_word_embeddings=False)


def test_an_inner_width_of_four_times_the_width_is_none_at_all(tmp_path: Path, within: Any) -> None:
    """GGUF always states it, config.json only if it is another."""
    within({"n_inner": 84, "n_embd": 21, "n_head": 3, "layer_norm_epsilon": 1e-5})
    assert open_checkpoint(put(tmp_path / "m", config={"n_inner": None})).config == CONFIG


def test_a_differing_head_where_a_configuration_ties_it(tmp_path: Path) -> None:
    """transformers ties the head by default; other programs' files leave it open."""
    arrays = random_arrays(small(tie_word_embeddings=False), dtype="float32")
    for scheme, fields in (("huggingface", {"n_head": 3}), ("llama.cpp", {"n_head": 3, "tie_word_embeddings": True})):
        path = put(tmp_path / scheme, config=fields)
        safetensors.write(path, NAMINGS[scheme](arrays))
        with pytest.raises(NpgptError, match=r"lm_head\.weight differs from wte\.weight, but .*config\.json ties them"):
            npgpt.load(path)
    (tmp_path / "llama.cpp" / "config.json").write_text('{"n_head": 3}')
    assert not npgpt.load(tmp_path / "llama.cpp").config.tie_word_embeddings


def test_the_padded_vocabulary_keeps_its_rows_and_never_draws_them(tmp_path: Path) -> None:
    """nanoGPT has 50304 rows for 50257 ids, and here the padding has the largest logits."""
    config = small(vocab_size=50304, n_embd=4, n_head=2, n_layer=1)
    arrays = random_arrays(config, dtype="float32")
    arrays["ln_f.bias"] = np.full(4, 3, np.float32)
    arrays["wte.weight"][50257:] = 100
    safetensors.write(tmp_path / "m", NAMINGS["nanogpt"](arrays))
    npgpt.convert(tmp_path / "m", tmp_path / "out", n_head=2)
    for model in (npgpt.load(tmp_path / "m", n_head=2), npgpt.load(tmp_path / "out")):
        assert model.parameters.wte.weight.shape == (50304, 4)
        assert int(model([5])[0, -1].argmax()) >= 50257
        for temperature in (0.0, 3.0):
            sampling = npgpt.Sampling(temperature=temperature)
            steps = list(model.steps([5], max_tokens=20, sampling=sampling, seed=0, ignore_eos=True))
            assert all(step.token_id is None or step.token_id < 50257 for step in steps)


# not: same_bits comparing values instead of bits
def test_a_head_is_tied_by_its_bits_and_not_by_its_values(tmp_path: Path) -> None:
    """0 and -0 are equal but differ in bits; a NaN equals nothing but has the same bits."""
    arrays = random_arrays(CONFIG, dtype="float32")
    arrays["wte.weight"][3, :2] = 0.0, np.nan
    head = arrays["wte.weight"].copy()
    path = stored(tmp_path / "same", arrays | {"lm_head.weight": head})
    assert open_checkpoint(path, n_head=3).config.tie_word_embeddings
    head = head.copy()
    head[3, 0] = -0.0
    path = stored(tmp_path / "differs", arrays | {"lm_head.weight": head})
    assert not open_checkpoint(path, n_head=3).config.tie_word_embeddings


# not: one key left out of the search for contradictions
@pytest.mark.parametrize(
    ("key", "inside", "beside"),
    [
        ("n_layer", 2, 3),
        ("n_embd", 21, 24),
        ("n_positions", 24, 25),
        ("vocab_size", 40, 41),
        ("layer_norm_epsilon", 1e-5, 1e-6),
        ("activation_function", "gelu_new", "gelu"),
        ("tie_word_embeddings", True, False),
        ("scale_attn_weights", True, False),
        ("scale_attn_by_inverse_layer_idx", False, True),
        ("bos_token_id", 3, 4),
        ("eos_token_id", 3, 4),
        ("pad_token_id", 3, 4),
    ],
)
def test_every_key_may_contradict(tmp_path: Path, within: Any, key: str, inside: object, beside: object) -> None:
    within({"n_head": 3, key: inside})
    path = put(tmp_path / "m", config={key: beside})
    with pytest.raises(NpgptError, match=rf"{key} is .* in model_args in .*, but .* in .*config\.json"):
        open_checkpoint(path)
    put(tmp_path / "m", config={key: inside})
    assert open_checkpoint(path).config == CONFIG


# not: what a scheme assumes put above what is stated
def test_what_is_stated_counts_for_more_than_what_a_scheme_assumes(tmp_path: Path) -> None:
    """nanoGPT's names come with the tanh form of its early versions."""
    path = put(tmp_path / "m", "nanogpt", config={"n_head": 3, "activation_function": "gelu_new"})
    assert open_checkpoint(path).config == CONFIG


# --- which file ---


def test_a_file_is_known_by_its_content_and_not_by_its_name(tmp_path: Path) -> None:
    path = put(tmp_path / "m", config={"n_head": 3})
    for name in ("weights.gguf", "pytorch_model.bin", "ckpt.pt", "model.ckpt.index", "noextension"):
        renamed = path.rename(path.with_name(name))
        assert npgpt.load(path.parent).config == CONFIG
        assert open_checkpoint(renamed).description == CONVERTED
        path = renamed


def test_the_usual_names_come_first_and_several_others_are_asked_about(tmp_path: Path) -> None:
    path = put(tmp_path / "m", config={"n_head": 3})
    (tmp_path / "m" / "notes.txt").write_text("nothing")
    (tmp_path / "m" / "empty").touch()
    assert formats.find(path.parent) == path
    (tmp_path / "m" / "b.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(NpgptError, match=r"has several checkpoints: b\.safetensors, m\.safetensors; give one of them"):
        npgpt.load(tmp_path / "m")
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(path.read_bytes())
    assert formats.find(path.parent) == path.parent / "pytorch_model.bin"
    (tmp_path / "m" / "model.safetensors").write_bytes(path.read_bytes())
    assert formats.find(path.parent) == path.parent / "model.safetensors"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer, not the file itself"),
        (b"\x89HDF\r\n\x1a\n", "is HDF5"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "is in torch.save's format before PyTorch 1.6"),
        (b"\x80\x04\x95", "is a bare pickle"),
        (b"\x1f\x8b\x08", "is compressed with gzip"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"abcdefghijkl", r"is not a checkpoint that npgpt reads \(.*\): it begins with b'abcdefgh'"),
        (b'{"a": 1}', "is JSON but not a checkpoint index"),
        (b"{", "is not valid JSON"),
        (b"PK\x03\x04", "is not a valid ZIP archive"),
    ],
)
def test_files_that_are_no_checkpoint_are_told_what_they_are(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    for model in (path, tmp_path):
        with pytest.raises(NpgptError, match=message) as error:
            npgpt.load(model)
        assert str(path) in str(error.value)
    with pytest.raises(NpgptError, match=message):
        open_vocabulary(path)


# not: a folder with the name of a checkpoint taken for one
def test_a_folder_with_a_checkpoints_name_is_none(tmp_path: Path) -> None:
    path = put(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").mkdir()
    assert formats.find(tmp_path / "m") == path


# --- several files ---


def put_shards(folder: Path) -> tuple[Path, dict[str, str]]:
    """Write two files and their index."""
    folder.mkdir()
    arrays = random_arrays(CONFIG, dtype="float32")
    names = list(arrays)
    parts = {"one.safetensors": names[:10], "two.safetensors": names[10:]}
    for file, held in parts.items():
        safetensors.write(folder / file, {name: arrays[name] for name in held})
    weight_map = {name: file for file, held in parts.items() for name in held}
    (folder / "config.json").write_text(json.dumps(configs.to_dict(CONFIG)))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index, weight_map


def test_a_sharded_checkpoint_is_one_model(tmp_path: Path) -> None:
    index, _ = put_shards(tmp_path / "m")
    for path in (index, index.parent):
        model = npgpt.load(path)
        assert model.config == CONFIG
        assert model.origin.endswith("safetensors in 2 files, Hugging Face's names")
    arrays = random_arrays(CONFIG, dtype="float32")
    np.testing.assert_array_equal(model.parameters.h[1].mlp.c_proj.weight, arrays["h.1.mlp.c_proj.weight"])
    found = inspect(index)
    assert [path.name for path in found.files] == ["model.safetensors.index.json", "one.safetensors", "two.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"ln_f.bias": "three.safetensors"}, "lists ln_f.bias in 'three.safetensors', but that file is"),
        (
            lambda m: m | {"ln_f.bias": "../one.safetensors"},
            r"in '\.\./one\.safetensors', but that file is not beside it",
        ),
        (lambda m: m | {"ln_f.bias": ""}, "in '', but that file is not beside it"),
        (lambda m: m | {"ln_f.bias": "one.safetensors"}, "does not list ln_f.bias, which two.safetensors contains"),
        (
            lambda m: m | {"lm_head.weight": "two.safetensors"},
            "lm_head.weight in two.safetensors, but that file does not",
        ),
        (lambda m: {k: v for k, v in m.items() if k != "ln_f.bias"}, "does not list ln_f.bias"),
        (lambda m: m | {"ln_f.bias": 3}, "has no weight_map"),
        (lambda m: m | {"ln_f.bias": "model.safetensors.index.json"}, "is not a checkpoint that npgpt reads"),
    ],
)
def test_an_index_and_files_that_do_not_agree(tmp_path: Path, change: Any, message: str) -> None:
    index, weight_map = put_shards(tmp_path / "m")
    index.write_text(json.dumps({"weight_map": change(weight_map)}))
    with pytest.raises(NpgptError, match=message):
        npgpt.load(index)


def test_a_missing_shard_is_an_error_and_no_smaller_model(tmp_path: Path) -> None:
    index, _ = put_shards(tmp_path / "m")
    (tmp_path / "m" / "two.safetensors").unlink()
    with pytest.raises(NpgptError, match=r"in 'two\.safetensors', but that file is not beside it"):
        npgpt.load(index)


# not: another name within a shard, which no index lists, taken for a tensor too many
def test_another_name_within_a_shard(tmp_path: Path) -> None:
    """safetensors' save_model notes the alias in the file's metadata."""
    arrays = random_arrays(CONFIG, dtype="float32")
    safetensors.write(tmp_path / "a.safetensors", arrays, {"lm_head.weight": "wte.weight"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(arrays, "a.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(tmp_path / "model.safetensors.index.json", n_head=3)
    assert checkpoint.config.tie_word_embeddings


# not: other names that stand in the index's metadata not looked at
def test_another_name_in_an_index(tmp_path: Path) -> None:
    arrays = random_arrays(CONFIG, dtype="float32")
    safetensors.write(tmp_path / "a.safetensors", arrays)
    weight_map = dict.fromkeys(arrays, "a.safetensors")
    index = {"metadata": {"total_size": 3, "lm_head.weight": "wte.weight"}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = formats.read(tmp_path / "model.safetensors.index.json").tensors
    assert tensors["lm_head.weight"] is tensors["wte.weight"]


def test_an_index_of_shards_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(b"{")
    os.truncate(path, 16_000_001)
    with pytest.raises(
        NpgptError, match="is too large for a checkpoint index: 16000001 bytes exceed the limit of 16000000"
    ):
        npgpt.load(tmp_path)


def test_a_vocabulary_is_wanted_of_what_is_no_model(tmp_path: Path) -> None:
    arrays = random_arrays(small(), dtype="float32")
    del arrays["wte.weight"]
    with pytest.raises(NpgptError, match=r"contains no GPT-2: it has no wte\.weight \[vocab_size, n_embd\]"):
        load_tokenizer(stored(tmp_path / "model.safetensors", arrays))
