"""LoRA adapters written by hand: updates to each matrix, and refusals. tests/parity has the real peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt.checkpoints.inspect import inspect
from npgpt.errors import NpgptError
from npgpt.parameters import Array, to_arrays
from npgpt.text.vocabularies import load_tokenizer
from tests.support import writers
from tests.support.command import here
from tests.support.models import random_arrays, small
from tests.support.namings import llamacpp, llms_from_scratch, nanogpt
from tests.support.places import VARIABLES

CONFIG = small(vocab_size=5, n_positions=3, n_embd=2, n_layer=1, n_head=1)
ARRAYS = random_arrays(CONFIG, dtype="float32")
PREFIX = "base_model.model.transformer."
SETTINGS: dict[str, Any] = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 1, "lora_alpha": 3}
A = np.array([[1.0, 2.0]])
B = np.array([[1.0], [10.0], [100.0], [0.0], [0.0], [-1.0]])
FACTORS = {f"{PREFIX}h.0.attn.c_attn.lora_A.weight": A, f"{PREFIX}h.0.attn.c_attn.lora_B.weight": B}
ADDED = 3.0 * np.array([[1.0, 10.0, 100.0, 0.0, 0.0, -1.0], [2.0, 20.0, 200.0, 0.0, 0.0, -2.0]])  # [in, out]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use an empty working folder and home, without environment variables."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def put_base(folder: str, arrays: dict[str, Array] = ARRAYS, **fields: Any) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    writers.write(Path(folder), {"model.safetensors": writers.safetensors(arrays)})
    stated = {"n_head": 1, "model_type": "gpt2"} | fields
    Path(folder, "config.json").write_text(json.dumps(stated))


def put(tensors: dict[str, Any] = FACTORS, folder: str = "mine", **settings: Any) -> Path:
    writers.write(Path(folder), {"adapter_model.safetensors": writers.safetensors(tensors)})
    Path(folder, "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    return Path(folder)


def loaded(path: str | Path, **options: Any) -> dict[str, Array]:
    return to_arrays(npgpt.load(path, dtype="float64", **options).parameters)


def differs_in_c_attn(found: dict[str, Array], added: Array, arrays: dict[str, Array] = ARRAYS) -> None:
    for name, array in found.items():
        expected = arrays[name] + (added if name == "h.0.attn.c_attn.weight" else 0)
        np.testing.assert_array_equal(array, expected, err_msg=name)


def test_alpha_over_r_times_b_a_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    put_base("base")
    differs_in_c_attn(loaded(put()), ADDED)
    differs_in_c_attn(loaded("mine/adapter_model.safetensors"), ADDED)
    model = npgpt.load("mine")
    assert model.origin.startswith("base/model.safetensors: safetensors with the LoRA adapter mine/adapter_model")
    assert {path.name for path in inspect("mine").files} == {
        "model.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    assert inspect("mine").dtypes == {"float32": 15, "float32 + LoRA": 1}
    npgpt.convert("mine", "out")
    assert npgpt.load("out").origin == ""
    out = to_arrays(npgpt.load("out").parameters)
    np.testing.assert_array_equal(
        out["h.0.attn.c_attn.weight"], (ARRAYS["h.0.attn.c_attn.weight"] + ADDED).astype("f4")
    )


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"lora_alpha": 8}, 4),
        ({"use_rslora": True, "lora_alpha": 2**0.5}, 1),
        ({"alpha_pattern": {"c_attn": 1}}, 0.5),
        ({"alpha_pattern": {"attn": 1, "h.0.attn.c_attn": 6, "c_attn": 2}}, 3),
        ({"alpha_pattern": {"^transformer.h.0.attn.c_attn": 6}}, 3),
        ({"alpha_pattern": {"^h.0.attn.c_attn": 6, "c_proj": 1}}, 1.5),
        ({"rank_pattern": {"c_attn": 2}, "r": 16}, 1.5),
        ({"unknown": None, "another": {}, "loftq_config": {}, "target_modules": ["c_attn"]}, 1.5),
    ],
)
def test_the_scale_is_what_the_settings_say(settings: dict[str, Any], scale: float) -> None:
    put_base("base")
    a, b = np.array([[1.0, 0.0], [0.0, 1.0]]), np.arange(12.0).reshape(6, 2)
    factors = dict(zip(FACTORS, (a, b), strict=True))
    found = loaded(put(factors, **{"r": 2} | settings))
    np.testing.assert_allclose(
        found["h.0.attn.c_attn.weight"] - ARRAYS["h.0.attn.c_attn.weight"], scale * b.T, rtol=1e-15, atol=1e-14
    )


# not: a matrix that is stored [out, in] in the base takes the product the other way round
@pytest.mark.parametrize("form", ["nanogpt", "llama.cpp", "llms-from-scratch"])
def test_the_base_may_have_any_form(form: str) -> None:
    """attn.c_proj is square, so no shape reveals a transpose."""
    factors = {f"{PREFIX}h.0.attn.c_proj.lora_{letter}.weight": x for letter, x in (("A", A), ("B", B[:2]))}
    put(factors)
    namings = {"nanogpt": nanogpt, "llms-from-scratch": llms_from_scratch}
    if form == "llama.cpp":
        content = writers.gguf(llamacpp(ARRAYS), writers.gguf_keys(CONFIG))
        writers.write(Path("base"), {"model.gguf": content})
    else:
        put_base("base", namings[form](ARRAYS))
    found = loaded("mine", n_head=1)["h.0.attn.c_proj.weight"]
    np.testing.assert_array_equal(found, ARRAYS["h.0.attn.c_proj.weight"] + 3 * np.array([[1, 10], [2, 20]]))


# not: the values' third taken for the queries'
@pytest.mark.parametrize(("letter", "third"), [("query", 0), ("key", 1), ("value", 2)])
def test_queries_keys_and_values_apart(letter: str, third: int) -> None:
    put_base("base", llms_from_scratch(ARRAYS), n_heads=1)
    layer = f"base_model.model.trf_blocks.0.att.W_{letter}"
    put({f"{layer}.lora_A.weight": A, f"{layer}.lora_B.weight": B[:2]})
    added = np.zeros((2, 6))
    added[:, 2 * third : 2 * third + 2] = 3 * np.array([[1, 10], [2, 20]])
    found = loaded("mine", n_head=1)["h.0.attn.c_attn.weight"]
    np.testing.assert_array_equal(found, ARRAYS["h.0.attn.c_attn.weight"] + added)


def test_biases_and_layer_norms_are_replaced() -> None:
    put_base("base")
    own = {"h.0.attn.c_attn.base_layer.bias": np.arange(6.0), "ln_f.weight": np.array([7.0, 8.0])}
    found = loaded(put(FACTORS | {PREFIX + name: array for name, array in own.items()}))
    assert found["h.0.attn.c_attn.bias"].tolist() == [0, 1, 2, 3, 4, 5]
    assert found["ln_f.weight"].tolist() == [7, 8]


# not: base's vocab_size, which its config.json states, taken for the adapted model's
def test_new_tokens_enlarge_embeddings_and_head_together() -> None:
    put_base("base", vocab_size=5)
    wte = np.arange(14.0).reshape(7, 2)
    put(FACTORS | {f"{PREFIX}wte.weight": wte, "base_model.model.lm_head.weight": wte})
    model = npgpt.load("mine")
    assert model.config.vocab_size == 7
    assert model.config.tie_word_embeddings
    assert loaded("mine")["wte.weight"].tolist() == wte.tolist()
    put(FACTORS | {f"{PREFIX}wte.weight": wte, "base_model.model.lm_head.weight": wte + 1})
    with pytest.raises(NpgptError, match=r"lm_head\.weight differs from wte\.weight, but .* ties them"):
        npgpt.load("mine")


def test_a_merged_adapter_is_said_to_be_rounded() -> None:
    put_base("base")
    put()
    for source, rounded in (("base", False), ("mine", True)):
        out = here("convert", source, f"{source}.out", "--n-head", "1")[1]
        assert (" float32, rounded" in out) == rounded


# not: the base replaced by what was made of it
def test_the_base_is_not_converted_into() -> None:
    put_base("base")
    put()
    for folder in ("base", "mine"):
        with pytest.raises(NpgptError, match=rf"^{folder}.* (contains the source|would replace)"):
            npgpt.convert("mine", folder, overwrite=True)


def test_settings_that_are_too_long(tmp_path: Path) -> None:
    put_base("base")
    with (put() / "adapter_config.json").open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(
        NpgptError,
        match=r"adapter_config\.json is too large for a configuration: 1099511627776 bytes exceed",
    ):
        npgpt.load("mine")


def unmerged(**changes: Any) -> dict[str, Any]:
    """Return a whole state dict with an adapted c_attn."""
    factors = {name.replace(".weight", ".default.weight"): factor for name, factor in FACTORS.items()}
    whole = {name.replace("c_attn.", "c_attn.base_layer."): array for name, array in ARRAYS.items()}
    return {PREFIX + name: array for name, array in whole.items()} | factors | changes


def test_a_state_dict_that_was_not_merged() -> None:
    tensors = unmerged(**{f"{PREFIX}ln_f.original_module.weight": np.zeros(2)})
    del tensors[f"{PREFIX}ln_f.weight"]
    tensors[f"{PREFIX}ln_f.modules_to_save.default.weight"] = ARRAYS["ln_f.weight"]
    path = writers.write(Path("mine"), {"pytorch_model.bin": writers.torch_zip(tensors)})
    message = r"pytorch_model\.bin is an unmerged adapter \(base_model.*adapter_config\.json, which states alpha"
    with pytest.raises(NpgptError, match=message):
        npgpt.load(path)
    Path("mine/adapter_config.json").write_text(json.dumps(SETTINGS))
    differs_in_c_attn(loaded("mine", n_head=1), ADDED)
    npgpt.convert("mine", "out", n_head=1)
    assert npgpt.load("out").origin == ""


def test_the_base_is_looked_for_by_name_and_beside_the_adapter(tmp_path: Path) -> None:
    put(base_model_name_or_path="/data/elsewhere/model")
    with pytest.raises(NpgptError) as error:
        npgpt.load("mine")
    assert str(error.value) == (
        "mine/adapter_model.safetensors is a LoRA adapter whose base model is missing: /data/elsewhere/model does not "
        "exist; or put it into mine/model/"
    )
    put_base("mine/model")
    differs_in_c_attn(loaded("mine"), ADDED)
    put(base_model_name_or_path="somebody/model", folder="other")
    with pytest.raises(
        NpgptError, match=r"no model 'somebody/model' here.*npgpt download somebody/model.*other/model/"
    ):
        npgpt.load("other")
    put_base("weights/somebody/model")
    differs_in_c_attn(loaded("other"), ADDED)


def test_the_vocabulary_is_the_bases_or_the_adapters_own() -> None:
    characters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 256 + 68))]
    config = small(vocab_size=258, n_positions=3, n_embd=2, n_layer=1, n_head=1)
    put_base("base", random_arrays(config, dtype="float32"))
    texts = [*characters, "<|endoftext|>"]
    Path("base/vocab.json").write_text(json.dumps({text: number for number, text in enumerate(texts)}))
    Path("base/merges.txt").write_text("#version: 0.2\n")
    put()
    assert npgpt.load("mine").tokenizer.encode("!") == [0]
    assert load_tokenizer("mine").encode("!") == [0]
    npgpt.convert("mine", "out")
    assert npgpt.load("out").tokenizer.encode("!") == [0]
    Path("mine/vocab.json").write_text(json.dumps({text: 257 - number for number, text in enumerate(texts)}))
    Path("mine/merges.txt").write_text("#version: 0.2\n")
    assert npgpt.load("mine").tokenizer.encode("!") == [257]
    assert load_tokenizer("mine").encode("!") == [257]


# not: generation_config.json looked for beside the vocabulary
def test_convert_keeps_the_bases_ends_whoever_brings_the_vocabulary() -> None:
    put_base("base", eos_token_id=1)
    Path("base/generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    put()
    Path("mine/generation_config.json").write_text('{"eos_token_id": 2}')
    npgpt.convert("mine", "first")
    Path("mine/vocab.json").write_text("{}")
    npgpt.convert("mine", "second")
    for folder in ("mine", "first", "second"):
        assert npgpt.load(folder).ends.eos == (3, 4), folder
    # not: the adapter, beside which the vocabulary lies, named as what was read
    assert npgpt.load("mine").origin.startswith("base/model.safetensors: safetensors with the LoRA adapter mine/")


# not: generation_config.json looked for beside the adapter
def test_save_keeps_the_bases_settings_of_generation() -> None:
    put_base("base")
    Path("base/generation_config.json").write_text('{"eos_token_id": 3, "temperature": 0.5}')
    put()
    Path("mine/generation_config.json").write_text('{"temperature": 2.0}')
    npgpt.save(npgpt.load("mine"), "out")
    kept = json.loads(Path("out/generation_config.json").read_text())
    assert kept == {"eos_token_id": 3, "temperature": 0.5}


# not: a class that makes the vocabulary another one left behind with the base, or that of a vocabulary not taken
def test_convert_keeps_the_class_of_the_vocabulary_that_is_taken() -> None:
    put_base("base", tokenizer_class="BertTokenizer")
    Path("base/vocab.json").write_text("{}")
    put()
    npgpt.convert("mine", "first")
    assert json.loads(Path("first/config.json").read_text())["tokenizer_class"] == "BertTokenizer"
    Path("mine/vocab.json").write_text("{}")
    npgpt.convert("mine", "second")
    assert "tokenizer_class" not in json.loads(Path("second/config.json").read_text())


# not: a vocabulary within the base's own file taken before the adapter's
def test_an_adapters_vocabulary_wins_over_one_within_a_gguf() -> None:
    characters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 256 + 68))]
    config = small(vocab_size=258, n_positions=3, n_embd=2, n_layer=1, n_head=1)
    texts = [*characters, "<|endoftext|>", "<|user|>"]
    keys = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": texts, "tokenizer.ggml.merges": ["! !"]}
    arrays = llamacpp(random_arrays(config, dtype="float32"))
    writers.write(Path("base"), {"model.gguf": writers.gguf(arrays, writers.gguf_keys(config) | keys)})
    put()
    with pytest.raises(NpgptError, match=r"vocab\.json in base/model\.gguf"):
        _ = npgpt.load("mine").tokenizer
    Path("mine/vocab.json").write_text(json.dumps({text: 257 - number for number, text in enumerate(texts)}))
    Path("mine/merges.txt").write_text("#version: 0.2\n")
    npgpt.convert("mine", "out")
    for folder in ("mine", "out"):
        assert npgpt.load(folder).tokenizer.encode("!") == [257]
    assert load_tokenizer("mine").encode("!") == [257]


def test_a_folder_with_a_model_and_an_adapter_is_ambiguous() -> None:
    put_base("mine")
    put()
    with pytest.raises(NpgptError, match=r"mine has a model, model\.safetensors, and an adapter, .*; give one of them"):
        npgpt.load("mine")


NAMED = "merge it in peft (model.merge_and_unload()) and save the complete model"
LAYER = f"{PREFIX}h.0.attn.c_attn"


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({}, {"peft_type": "IA3"}, "mine/adapter_config.json: peft_type is 'IA3', which npgpt does not support"),
        ({}, {"use_dora": True}, "use_dora is True"),
        ({}, {"lora_bias": True}, "lora_bias is True"),
        ({}, {"use_rslora": "false"}, "use_rslora is 'false'"),
        ({}, {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({}, {"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({}, {"init_lora_weights": ["pissa"]}, "init_lora_weights is ['pissa']"),
        ({}, {"layer_replication": [[0, 1]]}, "layer_replication is [[0, 1]]"),
        ({}, {"revision": "v2"}, "revision is 'v2'"),
        ({}, {"a_later_one": 1}, "a_later_one is 1"),
        ({}, {"alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern is {'(a+)+$': 1}"),
        ({}, {"rank_pattern": ["c_attn"]}, "rank_pattern is ['c_attn']"),
        ({f"{LAYER}.lora_magnitude_vector": np.ones(6)}, {}, "c_attn.lora_magnitude_vector, which"),
        ({f"{PREFIX}wpe.lora_embedding_A": np.ones((1, 3))}, {}, "wpe.lora_embedding_A"),
        ({f"{LAYER}.lora_B.bias": np.ones(6)}, {}, "c_attn.lora_B.bias, which npgpt cannot merge"),
        ({f"{LAYER}.lora_A.other.weight": A}, {}, "several LoRA adapters, default, other, but npgpt merges"),
        ({f"{PREFIX}h.0.mlp.c_fc.lora_A.weight": A}, {}, "has only factor A of base_model"),
        ({f"{PREFIX}h.7.mlp.c_fc.lora_A.weight": A}, {}, "h.7.mlp.c_fc, which is not a matrix of its base"),
        ({f"{PREFIX}ln_f.lora_A.weight": A}, {}, "ln_f, which is not a matrix of its base"),
        ({"base_model.model.lm_head.lora_A.weight": A}, {}, "adapts base_model.model.lm_head, which is not a matrix"),
        ({"base_model.model.score.weight": A}, {}, "contains base_model.model.score.weight, which npgpt cannot merge"),
        ({f"{PREFIX}h.0.attn.c_proj.weight": np.eye(2)}, {}, "h.0.attn.c_proj.weight, which npgpt cannot merge"),
        ({f"{PREFIX}wte.weight": ARRAYS["wte.weight"] + 1}, {}, "changes only wte, but the base ties lm_head to wte"),
        ({f"{PREFIX}wte.weight": np.ones((6, 3))}, {}, "wte.weight is [6, 3], but its base and settings need [6, 2]"),
        ({f"{PREFIX}wte.weight": np.ones((6, 2))}, {}, "changes only wte, but the base ties lm_head to wte"),
        ({k.replace("transformer.", ""): x for k, x in FACTORS.items()}, {}, "adapts h.0.attn.c_attn.weight twice"),
        ({f"{LAYER}.lora_A.weight": np.ones((2, 2))}, {}, "A.weight is [2, 2], but its base and settings need [1, 2]"),
        ({f"{LAYER}.lora_B.weight": np.ones((5, 1))}, {}, "B.weight is [5, 1], but its base and settings need [6, 1]"),
    ],
)  # fmt: skip
def test_what_is_not_merged_is_refused_by_name(tensors: Any, settings: dict[str, Any], message: str) -> None:
    put_base("base")
    with pytest.raises(NpgptError) as error:
        npgpt.load(put(FACTORS | tensors, **settings))
    assert message in str(error.value)
    assert NAMED in str(error.value) or "only factor" in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"base_model_name_or_path": None},
            "base_model_name_or_path is None: set it to a folder, or to a name such as",
        ),
        ({"base_model_name_or_path": "mine"}, r"its base mine/adapter_model\.safetensors is an adapter too"),
        ({"base_model_name_or_path": "../.."}, r"base_model_name_or_path is '\.\./\.\.'"),
        ({"lora_alpha": "16"}, "c_attn has alpha '16' and r 1, which give no scale"),
        ({"lora_alpha": None}, "c_attn has alpha None"),
        ({"lora_alpha": 10**400}, "c_attn has alpha 10+ and r 1, which give no scale"),
        ({"r": 1.5}, r"lora_A.weight is \[1, 2\], but its base and settings need \[1.5, 2\]"),
    ],
)
def test_settings_that_are_none(settings: dict[str, Any], message: str) -> None:
    put_base("base")
    with pytest.raises(NpgptError, match=message):
        npgpt.load(put(**settings))


def test_an_adapter_without_its_settings_and_one_without_lora() -> None:
    put_base("base")
    put()
    Path("mine/adapter_config.json").unlink()
    with pytest.raises(NpgptError, match=r"is an unmerged adapter .*adapter_config\.json, which states alpha"):
        npgpt.load("mine")
    put({"base_model.model.x": A})
    with pytest.raises(NpgptError, match=r"contains no LoRA adapter, but npgpt merges exactly one"):
        npgpt.load("mine")
    put({"base_model.model.transformer.h.0.attn.c_attn.ia3_l": A})
    with pytest.raises(NpgptError, match=r"contains base_model\.model\.transformer\.h\.0\.attn\.c_attn\.ia3_l, which"):
        npgpt.load("mine")


def test_the_books_own_lora_is_named() -> None:
    arrays = {name.replace("W_query.", "W_query.linear."): a for name, a in llms_from_scratch(ARRAYS).items()}
    arrays |= {"trf_blocks.0.att.W_query.lora.A": A.T, "trf_blocks.0.att.W_query.lora.B": B[:2].T}
    path = writers.write(Path("m"), {"model.pth": writers.torch_zip(arrays)})
    message = r"unmerged [a-zA-Z ]+ \(trf_blocks\.0\.att\.W_query\.lora\.A\), and no file states alpha: add alpha"
    with pytest.raises(NpgptError, match=message):
        npgpt.load(path, n_head=1)
    with pytest.raises(NpgptError, match=message):
        npgpt.check(np.zeros((1, 3, 5)), [0, 1, 2], weights=arrays)


def test_a_module_that_was_not_merged_is_named_for_what_it_is() -> None:
    with pytest.raises(NpgptError, match=r"weights has an unmerged adapter \(.*give model\.merge_and_unload"):
        npgpt.check(np.zeros((1, 3, 5)), [0, 1, 2], weights=unmerged())


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.model"])
def test_a_vocabulary_of_another_kind_beside_an_adapter_is_not_passed_over(name: str) -> None:
    put_base("base")
    (put() / name).write_bytes(b"\n\x0e")
    assert f"mine has {name}, which alone is not a vocabulary" in npgpt.load("mine").why_no_text
