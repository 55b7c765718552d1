"""LoRA adapters written by peft, compared with peft's own model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt.errors import NpgptError
from tests.support.models import random_arrays, random_ids, small
from tests.support.tolerances import largest_difference
from tests.support.verification import Report

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="extra parity is not installed")
peft = pytest.importorskip("peft", reason="extra parity is not installed")
peers = pytest.importorskip("tests.support.peers", reason="extra parity is not installed")

CONFIG = small()
UNTIED = small(tie_word_embeddings=False)
IDS = random_ids(CONFIG, (2, 20))


def trained(folder: Path, config: npgpt.Config = CONFIG, **settings: Any) -> Any:
    """Return a float64 peft model with every parameter changed; its base is saved in folder/base."""
    arrays = random_arrays(config, dtype="float64")
    npgpt.save(npgpt.LanguageModel("m", config, npgpt.parameters.from_arrays(config, arrays)), folder / "base")
    base = peers.transformers_model(config, arrays)
    base.name_or_path = str(folder / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(**{"task_type": "CAUSAL_LM"} | settings)).double().eval()
    drawn = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=drawn, dtype=torch.float64)
            parameter.data = parameter.data + 0.1 * noise
    return model


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.numpy()


HONOURED: dict[str, dict[str, Any]] = {
    "the default": {"r": 4},
    "every matrix": {"r": 3, "lora_alpha": 7, "target_modules": ["c_attn", "c_proj", "c_fc"]},
    "rslora": {"r": 5, "lora_alpha": 2.5, "use_rslora": True},
    "all biases": {"bias": "all"},
    "its biases": {"bias": "lora_only"},
    "patterns": {
        "r": 4,
        "target_modules": ["c_attn", "c_proj"],
        "rank_pattern": {"h.0.attn.c_attn": 2, "mlp.c_proj": 3},
        "alpha_pattern": {"^transformer.h.1.attn.c_proj": 5, "c_attn": 32},
    },
    "some layers": {"layers_to_transform": [1], "layers_pattern": "h"},
    "layer norms and positions": {"modules_to_save": ["ln_f", "ln_1", "wpe"]},
    "gaussian": {"init_lora_weights": "gaussian", "fan_in_fan_out": True, "lora_dropout": 0.5},
    "a rank above the width": {"r": 40, "target_modules": "all-linear"},
}


@pytest.mark.parametrize("kind", HONOURED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_gives_pefts_logits(tmp_path: Path, kind: str, difference: Report) -> None:
    model = trained(tmp_path, **HONOURED[kind])
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter", safe_serialization=kind != "patterns")
    mine = npgpt.load(tmp_path / "adapter", dtype="float64")
    assert largest_difference(expected, logits(model.base_model.model.eval())) == 0
    error = largest_difference(expected, mine(IDS))
    difference("model", "peft: logits with LoRA adapters", "float64", error)
    assert error < 1e-14
    plain = npgpt.load(tmp_path / "base", dtype="float64")(IDS)
    assert largest_difference(expected, plain) > 1e-3  # the adapter's effect is large
    npgpt.convert(tmp_path / "adapter", tmp_path / "out")
    assert largest_difference(expected, npgpt.load(tmp_path / "out")(IDS)) < 2e-6
    converted = peers.transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert largest_difference(expected, logits(converted)) < 2e-6
    assert (tmp_path / "adapter" / "adapter_model.bin").exists() == (kind == "patterns")
    merged = model.merge_and_unload().state_dict()
    for name, array in npgpt.parameters.to_arrays(mine.parameters).items():
        theirs = merged[name if name.startswith("lm_head") else f"transformer.{name}"].numpy()
        np.testing.assert_allclose(array, theirs, rtol=0, atol=1e-15 * np.abs(theirs).max(), err_msg=name)
    torch.save({"logits": torch.from_numpy(expected), "input_ids": torch.from_numpy(IDS)}, tmp_path / "t.pt")
    assert npgpt.check(tmp_path / "t.pt", weights=tmp_path / "adapter", dtype="float64").matches


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["every matrix", "layer norms and positions"])
def test_a_state_dict_that_was_not_merged(tmp_path: Path, kind: str) -> None:
    model = trained(tmp_path, **HONOURED[kind])
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(NpgptError, match=r"model\.pt is an unmerged adapter .*adapter_config\.json, which"):
        npgpt.load(tmp_path / "model.pt")
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").rename(tmp_path / "adapter_config.json")
    mine = npgpt.load(tmp_path / "model.pt", dtype="float64", n_head=CONFIG.n_head)
    assert largest_difference(logits(model), mine(IDS)) < 1e-14


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_head_of_its_own_is_adapted(tmp_path: Path) -> None:
    model = trained(tmp_path, UNTIED, target_modules=["lm_head", "c_attn"])
    model.save_pretrained(tmp_path / "adapter")
    mine = npgpt.load(tmp_path / "adapter", dtype="float64")
    assert largest_difference(logits(model), mine(IDS)) < 1e-14


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_enlarged_vocabulary(tmp_path: Path) -> None:
    trained(tmp_path)  # its base
    base = peers.transformers_model(CONFIG, random_arrays(CONFIG))
    base.resize_token_embeddings(42)
    base.name_or_path = str(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path / "adapter")
    mine = npgpt.load(tmp_path / "adapter", dtype="float64")
    assert mine.config.vocab_size == 42
    assert largest_difference(logits(model), mine(IDS)) < 1e-14


def test_the_books_own_lora_and_the_way_out(tmp_path: Path) -> None:
    book = pytest.importorskip("llms_from_scratch.appendix_e", reason="llms-from-scratch is not installed")
    model = peers.llms_from_scratch_model(UNTIED, random_arrays(UNTIED))
    book.replace_linear_with_lora(model, rank=2, alpha=3)
    layers = [module for module in model.modules() if isinstance(module, book.LinearWithLoRA)]
    for layer in layers:
        torch.nn.init.normal_(layer.lora.B)
    model = model.double().eval()
    expected = peers.llms_from_scratch_logits(model, IDS)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    with pytest.raises(
        NpgptError, match=r"lora\.A\), and no file states alpha: add alpha \* \(lora\.A @ lora\.B\)\.T to"
    ):
        npgpt.load(tmp_path / "model.pth", n_head=UNTIED.n_head)
    with pytest.raises(NpgptError, match="no file states alpha"):
        npgpt.check(model, IDS)
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, book.LinearWithLoRA):
            layer.linear.weight.data += 3 * (layer.lora.A @ layer.lora.B).T
            model.set_submodule(name, layer.linear)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    mine = npgpt.load(tmp_path / "model.pth", n_head=UNTIED.n_head, dtype="float64")
    assert largest_difference(expected, mine(IDS)) < 1e-7  # its GELU has a float32 constant


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora is True"),
    "biases of LoRA's own": ({"lora_bias": True}, "lora_bias is True"),
    "embeddings": ({"target_modules": ["wpe", "c_attn"]}, "lora_embedding_A"),
    "the tied head": ({"target_modules": ["lm_head"]}, "changes only lm_head, but the base ties lm_head to wte"),
    "tied embeddings": ({"modules_to_save": ["wte"]}, "changes only wte, but the base ties lm_head to wte"),
    "a matrix": ({"modules_to_save": ["c_fc"]}, r"mlp\.c_fc\.weight, which npgpt cannot merge"),
    "some tokens": ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices is \{'wte': \[1, 2\]\}|is \[1, 2\]"),
    "an activated LoRA": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_not_merged_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    settings, message = REFUSED[kind]
    model = trained(tmp_path, **settings)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(NpgptError, match=message) as error:
        npgpt.load(tmp_path / "adapter")
    assert "merge_and_unload()" in str(error.value)


def test_every_setting_is_honoured_without_effect_or_refused(tmp_path: Path) -> None:
    """Settings of a later peft that npgpt does not know are refused unless they are empty."""
    model = trained(tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"a_new_one": {"x": 1}}))
    with pytest.raises(NpgptError, match=re.escape("a_new_one is {'x': 1}, which npgpt does not support")):
        npgpt.load(tmp_path / "adapter")
