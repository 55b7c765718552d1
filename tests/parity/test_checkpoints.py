"""Checkpoints written by the real programs load with the same bits and give the saved model's logits."""

from __future__ import annotations

import copy
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import npgpt
from npgpt.checkpoints import find, torch_zip
from npgpt.checkpoints import gguf as npgpt_gguf
from npgpt.config import Config
from npgpt.errors import NpgptError
from npgpt.language_model import LanguageModel
from npgpt.parameters import Array, to_arrays
from npgpt.text import vocabularies
from npgpt.text.sampling import Sampling
from npgpt.text.tokenizer import END_OF_TEXT
from tests.support.models import random_arrays, random_ids, small
from tests.support.tolerances import largest_difference, relative_error, rounding_bound
from tests.support.verification import Report

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="extra parity is not installed")
transformers = pytest.importorskip("transformers", reason="extra parity is not installed")
safetensors = pytest.importorskip("safetensors.torch", reason="extra parity is not installed")
ch04 = pytest.importorskip("llms_from_scratch.ch04", reason="llms-from-scratch 1.0.19 is not installed")
cached = pytest.importorskip("llms_from_scratch.kv_cache.gpt2", reason="llms-from-scratch 1.0.19 is not installed")
peers = pytest.importorskip("tests.support.peers", reason="llms-from-scratch 1.0.19 is not installed")
nanogpt = pytest.importorskip("tests.support.nanogpt", reason="extra parity is not installed")

FLOAT64 = 1e-10  # relative to a tensor's largest absolute value
Arrays = dict[str, Array]
TIED, UNTIED = small(), small(n_embd=12, n_head=2, tie_word_embeddings=False)
CONFIGS = pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])


# Checks shared by all checkpoints


def logits(model: Any, ids: np.typing.NDArray[np.int64]) -> Array:
    """Return a PyTorch model's logits [B, T, V]."""
    with torch.no_grad():
        out = model(torch.from_numpy(ids))
    array: Array = (out[0] if isinstance(out, tuple) else getattr(out, "logits", out)).numpy()
    return array


def in_float64(model: Any) -> Any:
    """Return a float64 copy, with torch's GELU for LLMs-from-scratch's, which keeps a float32 constant."""
    double = copy.deepcopy(model).double()
    for module in double.modules():
        for name, child in module.named_children():
            if isinstance(child, (ch04.GELU, cached.GELU)):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
    return double


def assert_same_bits(found: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype == np.float32, name
        assert array.shape == expected[name].shape, name
        assert array.tobytes() == expected[name].tobytes(), f"{name} differs"


def assert_no_keys_left(info: Mapping[str, Any]) -> None:
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info


class Saved(NamedTuple):
    """A saved checkpoint and the model, configuration and arrays expected from it."""

    path: Path
    model: Any  # the saved model, in float32
    config: Config
    arrays: Arrays


def check(saved: Saved, package: str, difference: Report, **options: Any) -> LanguageModel:
    """Check that a file and its conversion have the expected configuration, bits and logits; return the loaded model.

    The conversion's logits are compared in transformers too. options are npgpt.load's.
    """
    path, model, config, arrays = saved
    ids = random_ids(config, (2, min(24, config.n_positions)))
    bound = rounding_bound(config, ids.shape[1], "float32")
    theirs, truth = logits(model, ids), logits(in_float64(model), ids)
    assert theirs.dtype == np.float32
    assert relative_error(theirs, truth) < bound
    folder = path.parent / "converted"
    npgpt.convert(path, folder, **options)
    assert {file.name for file in folder.iterdir()} >= {"model.safetensors", "config.json"}
    for source, given in ((path, options), (folder, {})):
        mine = npgpt.load(source, **given)
        assert mine.config == config
        assert_same_bits(to_arrays(mine.parameters), arrays)
        assert relative_error(mine(ids), truth) < bound
        difference("checkpoints", package, "float32", largest_difference(theirs, mine(ids)))
        error = largest_difference(truth, npgpt.load(source, dtype="float64", **given)(ids))
        difference("checkpoints", package, "float64", error)
        assert error < FLOAT64
    converted, info = transformers.GPT2LMHeadModel.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert_no_keys_left(info)
    assert converted.config.activation_function == config.activation_function
    assert relative_error(logits(converted, ids), truth) < bound
    assert largest_difference(truth, logits(in_float64(converted), ids)) < FLOAT64
    return npgpt.load(path, **options)


def refused(path: Path, match: str, **options: Any) -> None:
    """Check that load and convert both reject a path with a one-line message."""
    for attempt in (lambda: npgpt.load(path, **options), lambda: npgpt.convert(path, path.parent / "no", **options)):
        with pytest.raises(NpgptError, match=match) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert not (path.parent / "no").exists()


# transformers


def of_transformers(state: Mapping[str, Any]) -> Arrays:
    """Return a tied model's state dict under the canonical names, without buffers."""
    return {
        name.removeprefix("transformer."): tensor.numpy()
        for name, tensor in state.items()
        if name != "lm_head.weight" and not re.search(r"\.attn\.(masked_)?bias$", name)
    }


@CONFIGS
def test_transformers_state_dict(tmp_path: Path, config: Config, difference: Report) -> None:
    arrays = random_arrays(config, dtype="float32")
    model = peers.transformers_model(config, arrays)
    state = model.state_dict()
    shares = state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
    assert shares == config.tie_word_embeddings
    torch.save(state, tmp_path / "model.pt")
    mine = check(
        Saved(tmp_path / "model.pt", model, config, arrays),
        "transformers: torch.save",
        difference,
        n_head=config.n_head,
    )
    assert mine.origin == f"{tmp_path / 'model.pt'}: torch zip, Hugging Face's names"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_transformers_state_dict_in_half_precision(tmp_path: Path, dtype: str, difference: Report) -> None:
    model = peers.transformers_model(TIED, random_arrays(TIED, dtype="float32")).to(getattr(torch, dtype))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    model = model.float()
    arrays = of_transformers(model.state_dict())
    check(
        Saved(tmp_path / "model.pt", model, TIED, arrays), f"transformers: torch.save in {dtype}", difference, n_head=3
    )
    npgpt.convert(tmp_path / "model.pt", tmp_path / dtype, n_head=3, dtype=dtype)
    assert_same_bits(to_arrays(npgpt.load(tmp_path / dtype).parameters), arrays)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_to_half_precision_is_torchs(tmp_path: Path, dtype: str) -> None:
    """The weights include ties, subnormals and values that round to zero."""
    arrays = random_arrays(TIED, dtype="float32")
    rng = np.random.default_rng(1)
    arrays["wte.weight"] *= np.exp2(rng.integers(-40, 14, arrays["wte.weight"].shape)).astype(np.float32)
    halfway = rng.integers(0, 2**15, arrays["wpe.weight"].shape).astype(np.float32) + 0.5
    arrays["wpe.weight"] = halfway / 64 if dtype == "float16" else halfway
    model = peers.transformers_model(TIED, arrays)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    npgpt.convert(tmp_path / "model.pt", tmp_path / "half", n_head=3, dtype=dtype)
    found = safetensors.load_file(tmp_path / "half" / "model.safetensors")
    for name in arrays:
        rounded = model.state_dict()[f"transformer.{name}"].to(getattr(torch, dtype))
        assert torch.equal(found[name].view(torch.int16), rounded.view(torch.int16)), name


def test_transformers_in_many_shards(tmp_path: Path, difference: Report) -> None:
    arrays = random_arrays(UNTIED, dtype="float32")
    model = peers.transformers_model(UNTIED, arrays)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    shards = list(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 3
    assert not (tmp_path / "model.safetensors").exists()
    saved = Saved(tmp_path / "model.safetensors.index.json", model, UNTIED, arrays)
    mine = check(saved, "transformers: save_pretrained, in shards", difference)
    assert f"safetensors in {len(shards)} files" in mine.origin
    assert_same_bits(to_arrays(npgpt.load(tmp_path).parameters), arrays)
    shards[1].unlink()
    refused(tmp_path, rf"in '{shards[1].name}', but that file is not beside it")


def test_transformers_pytorch_model_bin(tmp_path: Path) -> None:
    """A folder with config.json and the older pytorch_model.bin needs no further arguments."""
    arrays = random_arrays(TIED, dtype="float32")
    model = peers.transformers_model(TIED, arrays)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    mine = npgpt.load(tmp_path)
    assert mine.config == TIED
    assert_same_bits(to_arrays(mine.parameters), arrays)


# LLMs-from-scratch


def book(config: Config, qkv_bias: bool) -> dict[str, Any]:
    """Return a configuration under the book's keys."""
    sizes = {"vocab_size": config.vocab_size, "context_length": config.n_positions, "emb_dim": config.n_embd}
    heads = {"n_heads": config.n_head, "n_layers": config.n_layer}
    return sizes | heads | {"drop_rate": 0.1, "qkv_bias": qkv_bias}


def book_model(kind: str, config: Config, arrays: Arrays, qkv_bias: bool) -> Any:
    """Return GPTModel, its KV-cache version, or GPTModelFast, which fuses queries, keys and values in one layer."""
    state = peers.llms_from_scratch_model(config, arrays).state_dict()
    state = {name: tensor for name, tensor in state.items() if qkv_bias or not re.search(r"W_\w+\.bias", name)}
    model = {"ch04": ch04.GPTModel, "kv_cache": cached.GPTModel, "fast": ch04.GPTModelFast}[kind](
        book(config, qkv_bias)
    )
    if kind != "ch04":
        state = {name: tensor for name, tensor in state.items() if not name.endswith("att.mask")}
    if kind == "fast":
        for name in [name for name in state if "W_query" in name]:
            parts = [state.pop(name.replace("query", part)) for part in ("query", "key", "value")]
            state[name.replace("W_query", "qkv")] = torch.cat(parts)
        for new, old in (("proj", "out_proj"), ("weight", "scale"), ("bias", "shift")):
            state = {re.sub(rf"\b{old}\b", new, name): tensor for name, tensor in state.items()}
    model.load_state_dict(state, strict=True)
    return model.eval()


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("kind", ["ch04", "kv_cache", "fast"])
@CONFIGS
def test_the_book(tmp_path: Path, kind: str, config: Config, qkv_bias: bool, difference: Report) -> None:
    """Tied means that the head, a separate parameter, equals tok_emb."""
    arrays = random_arrays(config, dtype="float32")
    model = book_model(kind, config, arrays, qkv_bias)
    if not qkv_bias:
        arrays |= {name: np.zeros_like(array) for name, array in arrays.items() if name.endswith("c_attn.bias")}
    assert all(parameter.any() for parameter in model.parameters())
    path = tmp_path / "model.pth"
    torch.save(model.state_dict(), path)
    refused(path, rf"does not state n_head.*give it \(--n-head N.*must divide n_embd = {config.n_embd}")
    saved = Saved(path, model, config, arrays)
    mine = check(saved, "LLMs-from-scratch: torch.save", difference, n_head=config.n_head)
    assert mine.origin == f"{path}: torch zip, LLMs-from-scratch's names"
    (tmp_path / "config.json").write_text(json.dumps(book(config, qkv_bias)))
    assert npgpt.load(path).config == config
    (tmp_path / "config.json").write_text(json.dumps(book(config, qkv_bias) | {"emb_dim": 48}))
    misfit = rf"does not fit .*config\.json: wte\.weight is \[40, {config.n_embd}\] and must be \[40, 48\]"
    refused(path, misfit)


@pytest.mark.parametrize("stated", [False, True])
def test_the_books_training_checkpoint(tmp_path: Path, stated: bool, difference: Report) -> None:
    """The checkpoint is saved as in chapter 5, alone or with its configuration as other scripts add it."""
    config = small(tie_word_embeddings=False)
    model = book_model("ch04", config, random_arrays(config, dtype="float32"), qkv_bias=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
    before = model.tok_emb.weight.detach().clone()
    nanogpt.step(model, optimizer, config)
    assert not torch.equal(before, model.tok_emb.weight)
    whole = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
    torch.save(whole | ({"config": book(config, True)} if stated else {}), tmp_path / "model_and_optimizer.pth")
    torch.save(model.state_dict(), tmp_path / "model.pth")
    arrays = to_arrays(npgpt.load(tmp_path / "model.pth", n_head=3).parameters)
    saved = Saved(tmp_path / "model_and_optimizer.pth", model, config, arrays)
    check(saved, "LLMs-from-scratch: torch.save", difference, **({} if stated else {"n_head": 3}))


# nanoGPT and minGPT

ERF = small(n_embd=12, n_head=2, activation_function="gelu")


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_training_checkpoint(tmp_path: Path, bias: bool, mask: bool, difference: Report) -> None:
    """A model that was compiled and trained for a step is saved with its optimizer."""
    model = nanogpt.filled(ERF, random_arrays(ERF, dtype="float32"), bias=bias, mask=mask)
    compiled = torch.compile(model)
    whole = nanogpt.checkpoint(compiled, ERF, bias)
    assert all(name.startswith("_orig_mod.") for name in whole["model"])
    assert any(name.endswith(".attn.bias") for name in whole["model"]) == mask
    assert whole["best_val_loss"].shape == ()
    torch.save(whole, tmp_path / "ckpt.pt")
    arrays = nanogpt.canonical(ERF, model)
    saved = Saved(tmp_path / "ckpt.pt", model, ERF, arrays)
    mine = check(saved, "nanoGPT: torch.save", difference)
    assert mine.origin == f"{tmp_path / 'ckpt.pt'}: torch zip, nanoGPT's names"
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["activation_function"] == "gelu"


def test_the_tolerance_tells_the_forms_of_gelu_apart(tmp_path: Path) -> None:
    """The bound that nanoGPT's exact GELU meets is too tight for the tanh form."""
    model = nanogpt.filled(ERF, random_arrays(ERF, dtype="float32"))
    torch.save(nanogpt.checkpoint(model, ERF, True), tmp_path / "ckpt.pt")
    mine, ids = npgpt.load(tmp_path / "ckpt.pt"), random_ids(ERF, (2, 24))
    tanh = npgpt.load(tmp_path / "ckpt.pt", config=small(n_embd=12, n_head=2))
    bound, truth = rounding_bound(ERF, 24, "float32"), logits(in_float64(model), ids)
    assert relative_error(mine(ids), truth) < bound
    assert relative_error(tanh(ids), truth) > 20 * bound


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "bare": lambda model: model,
    "compiled": lambda model: torch.compile(model),
    "parallel": lambda model: torch.nn.DataParallel(model),  # DistributedDataParallel prefixes names the same way
    "compiled, then parallel": lambda model: torch.nn.DataParallel(torch.compile(model)),
    "parallel, then compiled": lambda model: torch.compile(torch.nn.DataParallel(model)),
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_wrappers_of_a_bare_state_dict(tmp_path: Path, wrapped: str) -> None:
    arrays = random_arrays(ERF, dtype="float32")
    model = WRAPPED[wrapped](nanogpt.filled(ERF, arrays))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    mine = npgpt.load(tmp_path / "model.pt", n_head=2)
    assert mine.config == ERF
    assert_same_bits(to_arrays(mine.parameters), arrays)


def test_blocks_compiled_one_by_one(tmp_path: Path) -> None:
    arrays = random_arrays(ERF, dtype="float32")
    model = nanogpt.filled(ERF, arrays)
    for layer, block in enumerate(model.transformer["h"]):
        model.transformer["h"][layer] = torch.compile(block)
    assert "transformer.h.1._orig_mod.attn.c_attn.bias" in model.state_dict()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert_same_bits(to_arrays(npgpt.load(tmp_path / "model.pt", n_head=2).parameters), arrays)


def test_renamed_as_distributed_data_parallel_does(tmp_path: Path) -> None:
    arrays = random_arrays(UNTIED, dtype="float32")
    for kind, state in (
        ("hf", peers.transformers_model(UNTIED, arrays).state_dict()),
        ("book", book_model("ch04", UNTIED, arrays, True).state_dict()),
    ):
        torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / kind)
        assert_same_bits(to_arrays(npgpt.load(tmp_path / kind, n_head=2).parameters), arrays)


@pytest.fixture(scope="module")
def padded() -> tuple[Config, Arrays]:
    """Return nanoGPT's 50304-row vocabulary, with the largest logits in the last 47 rows."""
    config = small(vocab_size=50304, n_embd=12, n_head=2, activation_function="gelu")
    arrays = random_arrays(config, dtype="float32")
    arrays["wte.weight"][50257:] *= 1000
    return config, arrays


@pytest.mark.parametrize("bias", [True, False])
def test_a_padded_vocabulary(tmp_path: Path, padded: tuple[Config, Arrays], bias: bool, difference: Report) -> None:
    config, arrays = padded
    model = nanogpt.filled(config, arrays, bias=bias)
    whole = nanogpt.checkpoint(torch.compile(model), config, bias)
    torch.save(whole, tmp_path / "ckpt.pt")
    arrays = nanogpt.canonical(config, model)
    mine = check(Saved(tmp_path / "ckpt.pt", model, config, arrays), "nanoGPT: torch.save, 50304 ids", difference)
    assert mine.parameters.wte.weight.shape == (50304, 12)
    for source in (tmp_path / "ckpt.pt", tmp_path / "converted"):
        mine = npgpt.load(source)
        assert (mine.tokenizer.n_vocab, mine.tokenizer.end_of_text) == (50257, 50256)
        prompt = mine.tokenizer.encode("It is a truth")
        assert mine.tokenizer.decode(prompt) == "It is a truth"
        assert mine(prompt)[0, -1].argmax() >= 50257  # padding, which is never sampled
        for sampling in (Sampling(temperature=0), Sampling(temperature=1), Sampling(temperature=1000)):
            drawn = [step.token_id for step in mine.steps(prompt, max_tokens=18, sampling=sampling, seed=5)]
            ids = [token_id for token_id in drawn if token_id is not None]
            assert len(ids) > 10
            assert max(ids) < 50257


@CONFIGS
def test_mingpt(tmp_path: Path, config: Config, difference: Report) -> None:
    """minGPT's head is a separate parameter; if it equals wte, names suggest nanoGPT, so the scheme is given."""
    arrays = random_arrays(config, dtype="float32")
    head = {"lm_head.weight": arrays["wte.weight"]}
    model = nanogpt.filled(config, head | arrays, mingpt=True)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert any(name.endswith(".attn.bias") for name in model.state_dict())
    options: dict[str, Any] = {"n_head": config.n_head}
    if config.tie_word_embeddings:
        assert npgpt.load(tmp_path / "model.pt", **options).config.activation_function == "gelu"
        options["name_scheme"] = "mingpt"
    mine = check(Saved(tmp_path / "model.pt", model, config, arrays), "minGPT: torch.save", difference, **options)
    assert mine.origin == f"{tmp_path / 'model.pt'}: torch zip, minGPT's names"


# safetensors, written by its own package


@CONFIGS
def test_safetensors_of_transformers_and_the_book(tmp_path: Path, config: Config, difference: Report) -> None:
    arrays = random_arrays(config, dtype="float32")
    models = {
        "hf": peers.transformers_model(config, arrays),
        "book": book_model("ch04", config, arrays, True),
        "fast": book_model("fast", config, arrays, True),
    }
    for name, model in models.items():
        (tmp_path / name).mkdir()
        path = tmp_path / name / "weights.safetensors"
        safetensors.save_file({key: tensor.clone() for key, tensor in model.state_dict().items()}, path)
        mine = check(
            Saved(path, model, config, arrays),
            "safetensors: save_file of several programs' models",
            difference,
            n_head=config.n_head,
        )
        assert mine.origin == ("" if name == "hf" else f"{path}: safetensors, LLMs-from-scratch's names")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("head", [True, False])
def test_safetensors_of_nanogpt(tmp_path: Path, bias: bool, head: bool, difference: Report) -> None:
    """save_file refuses tensors that share storage, so the head is either copied or omitted."""
    arrays = random_arrays(ERF, dtype="float32")
    model = nanogpt.filled(ERF, arrays, bias=bias, mask=True)
    arrays = nanogpt.canonical(ERF, model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items() if head or key != "lm_head.weight"}
    safetensors.save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(nanogpt.model_args(ERF, bias)))
    check(
        Saved(tmp_path / "model.safetensors", model, ERF, arrays),
        "safetensors: save_file of several programs' models",
        difference,
    )


@pytest.mark.parametrize("kind", ["hf, tied", "hf, untied", "nanogpt", "nanogpt, compiled", "book"])
def test_safetensors_save_model(tmp_path: Path, kind: str, difference: Report) -> None:
    """save_model keeps the alphabetically first of the tensors that share storage and notes the others.

    The note in __metadata__ is {"transformer.wte.weight": "lm_head.weight"}.
    """
    config = ERF if "nanogpt" in kind else TIED if kind == "hf, tied" else UNTIED
    arrays = random_arrays(config, dtype="float32")
    path = tmp_path / "saved.safetensors"
    if "nanogpt" in kind:
        model = nanogpt.filled(config, arrays)
    else:
        model = book_model("ch04", config, arrays, True) if kind == "book" else peers.transformers_model(config, arrays)
    safetensors.save_model(torch.compile(model) if "compiled" in kind else model, path)
    check(
        Saved(path, model, config, arrays),
        "safetensors: save_model of several programs' models",
        difference,
        n_head=config.n_head,
    )


@pytest.mark.parametrize("shard", ["10KB", "1GB"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "torch.save"])
def test_save_torch_model_of_huggingface_hub(tmp_path: Path, safe: bool, shard: str) -> None:
    """Single and sharded files in both formats load under the hub's file names.

    Of the tied head and wte, safetensors keeps the first by name and notes the other in __metadata__ or in the index.
    """
    hub = pytest.importorskip("huggingface_hub", reason="extra parity is not installed")
    arrays = random_arrays(TIED, dtype="float32")
    model = peers.transformers_model(TIED, arrays)
    hub.save_torch_model(model, tmp_path, max_shard_size=shard, safe_serialization=safe)
    assert len(list(tmp_path.iterdir())) == (1 if shard == "1GB" else 8)
    assert_same_bits(to_arrays(npgpt.load(tmp_path, n_head=3).parameters), arrays)


# GGUF

TEXTS = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want",
    " a  b\tc\r\n\n d",
    "naïve café — „Grüße“ 😀\x00",
    "I'll say it's 1813",
    "",
]
PADDING = 5  # rows without a token


class Vocabulary(NamedTuple):
    """A byte-level BPE in llama.cpp's form, and the tokenizer that it was made from."""

    trained: Any
    tokens: list[str]
    merges: list[str]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    """Return a trained vocabulary of 256 bytes and a few merges, with <|endoftext|> and padding."""
    tokenizers = pytest.importorskip("tokenizers", reason="extra parity is not installed")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(TEXTS * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    assert len(tokens) == 290
    padding = [f"[PAD{291 + n}]" for n in range(PADDING)]
    return Vocabulary(trained, [*tokens, END_OF_TEXT, *padding], [" ".join(pair) for pair in model["merges"]])


def gguf_package() -> Any:
    return pytest.importorskip("gguf", reason="gguf 0.19 is not installed")


def write_gguf(
    path: Path, config: Config, arrays: Arrays, dtype: str, vocabulary: Vocabulary | None = None, big: bool = False
) -> dict[str, Any]:
    """Write a GGUF file as llama.cpp's converter does; return the written arrays under our names.

    Vectors and positions are float32, matrices are [out, in] in dtype.
    """
    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, "gpt2", endianess=gguf.GGUFEndian.BIG if big else gguf.GGUFEndian.LITTLE)
    writer.add_name("a small one")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.inner_width)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    if dtype in ("F32", "F16", "BF16"):
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "F32" else f"MOSTLY_{dtype}"])
    if vocabulary is not None:
        types = [gguf.TokenType.NORMAL] * len(vocabulary.trained.get_vocab()) + [gguf.TokenType.CONTROL]
        types += [gguf.TokenType.UNUSED] * PADDING
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(vocabulary.tokens)
        writer.add_token_types(types)
        writer.add_token_merges(vocabulary.merges)
        writer.add_bos_token_id(vocabulary.tokens.index(END_OF_TEXT))
        writer.add_eos_token_id(vocabulary.tokens.index(END_OF_TEXT))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    written: dict[str, Any] = {}
    for name, array in arrays.items():
        theirs = names.get_name(name if name.startswith("lm_head") else f"transformer.{name}", (".weight", ".bias"))
        array = array.T if re.search(r"\.c_\w+\.weight", name) else array
        kind = gguf.GGMLQuantizationType[dtype if array.ndim == 2 and name != "wpe.weight" else "F32"]
        try:
            data = gguf.quants.quantize(np.ascontiguousarray(array), kind)
        except NotImplementedError:
            data = random_blocks(dtype, array.shape, 0x1F)
        if kind == gguf.GGMLQuantizationType.BF16:
            data = data.view(np.uint16)  # the writer swaps elements' bytes and leaves uint8 alone
        written[name] = data
        writer.add_tensor(theirs, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def rounded(arrays: Arrays, dtype: str) -> Arrays:
    """Return the arrays with all matrices except the positions rounded to dtype."""
    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    return {
        name: torch.from_numpy(array).to(kind).float().numpy() if array.ndim == 2 and name != "wpe.weight" else array
        for name, array in arrays.items()
    }


@pytest.mark.parametrize("big", [False, True], ids=["little", "big"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gguf(tmp_path: Path, vocabulary: Vocabulary, tied: bool, dtype: str, big: bool, difference: Report) -> None:
    config = small(vocab_size=291 + PADDING, tie_word_embeddings=tied, n_inner=None if tied else 50)
    arrays = rounded(random_arrays(config, dtype="float32"), dtype)
    path = tmp_path / "model.gguf"
    write_gguf(path, config, arrays, dtype, vocabulary, big)
    model = peers.transformers_model(config, arrays)
    mine = check(Saved(path, model, config, arrays), f"gguf: {dtype}", difference)
    assert mine.config.layer_norm_epsilon == 1e-5
    assert mine.origin == f"{path}: GGUF, llama.cpp's names"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert isinstance(theirs, transformers.GPT2TokenizerFast)
    for tokenizer in (mine.tokenizer, npgpt.load(tmp_path / "converted").tokenizer, vocabularies.load_tokenizer(path)):
        assert (tokenizer.end_of_text, tokenizer.n_vocab) == (290, 291)
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert ids == vocabulary.trained.encode(text).ids == theirs(text)["input_ids"]
            assert tokenizer.decode(ids) == text == theirs.decode(ids, clean_up_tokenization_spaces=False)
        ids = tokenizer.encode(f"a{END_OF_TEXT}b", special=True)
        assert ids[1] == 290
        assert ids == theirs(f"a{END_OF_TEXT}b")["input_ids"]
    assert theirs.eos_token_id == 290
    stated = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert stated["bos_token_id"] == stated["eos_token_id"] == 290
    drawn = mine.steps([1, 2], max_tokens=20, sampling=Sampling(temperature=100), seed=3, ignore_eos=True)
    assert max(step.token_id or 0 for step in drawn) < 291


def test_gguf_without_a_vocabulary(tmp_path: Path, difference: Report) -> None:
    arrays = random_arrays(TIED, dtype="float32")
    write_gguf(tmp_path / "model.gguf", TIED, arrays, "F32")
    model = peers.transformers_model(TIED, arrays)
    mine = check(Saved(tmp_path / "model.gguf", model, TIED, arrays), "gguf: F32", difference)
    with pytest.raises(NpgptError, match="its 40 ids are not GPT-2's 50257"):
        _ = mine.tokenizer


def random_blocks(kind: str, shape: tuple[int, ...], mask: int = 0xFF) -> Any:
    """Return blocks of random bytes; a mask of 0x1F keeps every scale below 2^-7."""
    values, size = gguf_package().GGML_QUANT_SIZES[gguf_package().GGMLQuantizationType[kind]]
    row = shape[-1] // values * size
    return np.random.default_rng(0).integers(0, 256, (*shape[:-1], row), np.uint8) & mask


def dequantised_types() -> list[str]:
    """Return the quantised types that the package gguf can dequantise."""
    package = pytest.importorskip("gguf", reason="gguf 0.19 is not installed")
    return [kind.name for kind in package.quants._type_traits if kind.name != "BF16"]


def test_blocks_have_the_packages_sizes_and_every_type_that_it_widens_is_known() -> None:
    package = gguf_package()
    for number, (name, sizes) in npgpt_gguf.QUANTISED.items():
        assert package.GGMLQuantizationType(number).name == name
        assert sizes == package.GGML_QUANT_SIZES[package.GGMLQuantizationType(number)]
    assert {name for name, *_ in npgpt_gguf.QUANTISED.values()} >= set(dequantised_types())


def test_every_quantised_type_is_widened_as_the_package_does_it(tmp_path: Path) -> None:
    """Random blocks are dequantised to the same bits, and GGUFReader finds the same bytes."""
    package = gguf_package()
    writer = package.GGUFWriter(tmp_path / "m.gguf", "gpt2")
    for kind in dequantised_types():
        writer.add_tensor(kind, random_blocks(kind, (20, 512)), raw_dtype=package.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = npgpt_gguf.read(tmp_path / "m.gguf").tensors
    for theirs in package.GGUFReader(tmp_path / "m.gguf").tensors:
        mine = tensors[theirs.name]
        assert (mine.dtype, mine.shape) == (theirs.name, (20, 512))
        with np.errstate(all="ignore"):
            expected = package.quants.dequantize(theirs.data, theirs.tensor_type)
        assert_same_bits({"w": mine.load()}, {"w": expected})


@pytest.mark.parametrize("dtype", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ2_0", "Q4_K", "Q6_K"])
def test_gguf_quantised(tmp_path: Path, dtype: str, difference: Report) -> None:
    """Weights come from the package's quantiser, or from random blocks if it has none for the type."""
    config = small(n_embd=256, n_head=4, n_layer=1)
    arrays = random_arrays(config, dtype="float32")
    written = write_gguf(tmp_path / "model.gguf", config, arrays, dtype)
    assert sum(array.dtype == np.uint8 for array in written.values()) == 5  # wte and four matrices
    for name, array in written.items():
        if array.dtype == np.uint8:
            kind = gguf_package().GGMLQuantizationType[dtype]
            wide = gguf_package().quants.dequantize(array, kind)
            arrays[name] = np.ascontiguousarray(wide.T if ".c_" in name else wide)
    model = peers.transformers_model(config, arrays)
    check(Saved(tmp_path / "model.gguf", model, config, arrays), f"gguf: {dtype}", difference)


# The real third-party checkpoint

WHEEL = os.environ.get("NPGPT_MICROFORMER_WHEEL", "")


@pytest.fixture
def microformer(tmp_path: Path) -> Path:
    """Return microformer-mgm's unpacked GPT-2; its wheel is never installed."""
    if not WHEEL:
        pytest.skip("NPGPT_MICROFORMER_WHEEL does not name the wheel of microformer-mgm 0.5.8")
    folder = tmp_path / "general_model"
    folder.mkdir()
    with zipfile.ZipFile(WHEEL) as wheel:
        for name in ("pytorch_model.bin", "config.json"):
            (folder / name).write_bytes(wheel.read(f"mgm/resources/general_model/{name}"))
    return folder


def test_microformer(microformer: Path, difference: Report) -> None:
    model, info = transformers.GPT2LMHeadModel.from_pretrained(
        microformer, dtype=torch.float32, output_loading_info=True
    )
    assert_no_keys_left(info)
    path = microformer / "pytorch_model.bin"
    arrays = of_transformers(torch.load(path, map_location="cpu", weights_only=True))
    config = Config(vocab_size=9669, n_positions=512, n_embd=256, n_layer=8, n_head=8)
    mine = check(
        Saved(path, model.eval(), config, arrays), "microformer-mgm 0.5.8: its GPT-2, run by transformers", difference
    )
    assert mine.origin == f"{path}: torch zip, Hugging Face's names"
    assert find.find(microformer).weights == path
    stated = json.loads((microformer / "converted" / "config.json").read_text())
    assert (stated["bos_token_id"], stated["eos_token_id"], stated["pad_token_id"]) == (2, 3, 0)


# Files that are not checkpoints of weights


def whole_module(path: Path) -> None:
    torch.save(nanogpt.GPT(ERF), path)


def legacy(path: Path) -> None:
    torch.save(nanogpt.GPT(ERF).state_dict(), path, _use_new_zipfile_serialization=False)


def torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(3, 2), torch.ones(1, 3)), path)


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(torch.nn.Linear(3, 2), (torch.ones(1, 3),)), path)


def npz(path: Path) -> None:
    with path.open("wb") as file:
        arrays: dict[str, Any] = {**random_arrays(ERF)}
        np.savez(file, **arrays)


def compressed_npz(path: Path) -> None:
    with path.open("wb") as file:
        arrays: dict[str, Any] = {**random_arrays(ERF)}
        np.savez_compressed(file, **arrays)


def optimizer_alone(path: Path) -> None:
    torch.save(torch.optim.AdamW(nanogpt.GPT(ERF).parameters()).state_dict(), path)


REFUSED: dict[Callable[[Path], None], str] = {
    whole_module: r"its pickle asks for tests\.support\.nanogpt\.GPT.*torch\.save\(model\.state_dict\(\), …\)",
    legacy: r"torch\.save's format before PyTorch 1\.6: load it in PyTorch and save it",
    torchscript: r"is a TorchScript program, not a checkpoint: save model\.state_dict\(\) instead",
    exported: r"is a ZIP archive but not a checkpoint of torch\.save",
    npz: r"is a ZIP archive but not a checkpoint of torch\.save: .*\.npy",
    compressed_npz: r"is a ZIP archive but not a checkpoint of torch\.save: .*\.npy",
    optimizer_alone: r"has no state dict; its keys are 'state', 'param_groups'",
}


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize("write", REFUSED, ids=lambda write: write.__name__)
def test_refused_with_the_reason(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "model.pt")
    refused(tmp_path / "model.pt", REFUSED[write], n_head=2)


# Oddities of torch.save


def read(path: Path, tensors: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """Save a state dict with torch.save and return the tensors that torch_zip finds."""
    torch.save(dict(tensors), path, **options)
    return dict(torch_zip.read(path).tensors)


def assert_exact(found: Mapping[str, Any], tensors: Mapping[str, Any], dtype: str = "float32") -> None:
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = tensor.detach().to(getattr(torch, dtype)).numpy()
        array = found[name].load(dtype)
        assert array.dtype == expected.dtype, name
        assert array.shape == found[name].shape == expected.shape, name
        assert array.tobytes() == expected.tobytes(), f"{name}: {array} and not {expected}"


def views() -> dict[str, Any]:
    base = torch.randn(6, 10, 4)
    matrix, line = base[0], torch.arange(100.0)
    return {
        "whole": base,
        "first": base[0],
        "transposed": matrix.T,
        "permuted": base.permute(2, 0, 1),
        "offset": base[3:, 2:5],
        "columns": matrix[:, 1:3],
        "every other": line[1::2],
        "steps": line[5:95].view(9, 10)[::3, ::4],
        "one column": matrix[:, 2],
        "diagonal": torch.diagonal(matrix),
        "one number": line[7],
        "last": line[99:],
        "empty slice": line[100:],
        "expanded within": line[:3].unsqueeze(1).expand(3, 20),
        "windows": line.unfold(0, 9, 10),
    }


def empty() -> dict[str, Any]:
    shapes = [(0,), (0, 3), (3, 0), (2, 0, 5)]
    return {str(shape): torch.zeros(shape) for shape in shapes} | {"number": torch.tensor(1.5)}


def parameters_and_modules() -> dict[str, Any]:
    layer = torch.nn.Linear(4, 3)
    gradient = (torch.ones(3, requires_grad=True) * 2).detach().requires_grad_()
    return {
        "parameter": torch.nn.Parameter(torch.randn(3, 5)),
        "frozen": torch.nn.Parameter(torch.randn(3), requires_grad=False),
        "transposed parameter": torch.nn.Parameter(torch.randn(3, 5).T),
        "with gradient": gradient,
        **dict(layer.named_parameters()),
    }


TENSORS: dict[str, Callable[[], dict[str, Any]]] = {
    "views": views,
    "empty": empty,
    "parameters": parameters_and_modules,
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", TENSORS)
def test_views_and_parameters(tmp_path: Path, kind: str, protocol: int) -> None:
    tensors = TENSORS[kind]()
    found = read(tmp_path / "x.pt", tensors, pickle_protocol=protocol)
    assert_exact(found, tensors)
    assert_exact(found, tensors, "float64")


def test_shared_storage_is_stored_once(tmp_path: Path) -> None:
    big = torch.randn(1000, 100)
    tensors = {"a": big, "b": big, "c": big[500:], "d": big.T, "e": big.view(-1)[:1000]}
    found = read(tmp_path / "x.pt", tensors)
    assert (tmp_path / "x.pt").stat().st_size < 1.1 * big.nbytes
    assert_exact(found, tensors)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_float_loads_exactly(tmp_path: Path, dtype: str) -> None:
    """16-bit floats are tested exhaustively, others with extremes, infinities and numbers of every magnitude."""
    kind = getattr(torch, dtype)
    if kind.itemsize == 2:
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(kind)
        every = every[~every.isnan()]
    else:
        info = torch.finfo(kind)
        ends = [info.max, info.min, info.tiny, info.eps, info.tiny * info.eps, 0.0, -0.0, np.inf, -np.inf]
        sizes = np.exp2(np.arange(-120, 120)) * np.random.default_rng(0).standard_normal(240)
        every = torch.tensor([*ends, *sizes], dtype=torch.float64).to(kind)
    found = read(tmp_path / "x.pt", {"every": every, "again": every[::3]})
    assert found["every"].dtype == dtype
    assert_exact(found, {"every": every, "again": every[::3]}, "float64")
    if dtype != "float64":
        assert_exact(found, {"every": every, "again": every[::3]}, "float32")


def test_integers_are_refused_when_asked_for(tmp_path: Path) -> None:
    names = ["int64", "int32", "int16", "int8", "uint8", "bool"]
    tensors = {f"a.{name}": torch.ones(3).to(getattr(torch, name)) for name in names}
    found = read(tmp_path / "x.pt", tensors | {"weight": torch.ones(3)})
    assert_exact({"weight": found["weight"]}, {"weight": torch.ones(3)})
    for name in names:
        assert found[f"a.{name}"].dtype == name
        with pytest.raises(NpgptError, match=rf"x\.pt: a\.{name} is {name}, not one of float16") as caught:
            found[f"a.{name}"].load()
        assert "\n" not in str(caught.value)


def test_an_expanded_tensor_is_refused(tmp_path: Path) -> None:
    """A stride of 0 is refused because a tiny file could claim a tensor of any size."""
    for tensor in (torch.ones(1).expand(5, 5), torch.ones(3, 1).expand(3, 100), torch.tensor(1.0).expand(2, 2)):
        with pytest.raises(NpgptError, match=r"x\.pt: mask, \[.*\] with strides \[.*0\] from 0, does not fit into its"):
            read(tmp_path / "x.pt", {"weight": torch.ones(2), "mask": tensor})


@pytest.fixture
def save_options() -> Iterator[Any]:
    """Return torch.utils.serialization.config.save, and restore it afterwards."""
    serialization = pytest.importorskip("torch.utils.serialization", reason="PyTorch is older than 2.7")
    save = serialization.config.save
    before = (save.compute_crc32, save.storage_alignment)
    yield save
    save.compute_crc32, save.storage_alignment = before


@pytest.mark.parametrize("alignment", [64, 4096])
@pytest.mark.parametrize("crc32", [True, False])
def test_options_of_torch_save(tmp_path: Path, save_options: Any, crc32: bool, alignment: int) -> None:
    save_options.compute_crc32, save_options.storage_alignment = crc32, alignment
    tensors = views()
    found = read(tmp_path / "x.pt", tensors)
    assert_exact(found, tensors)
    assert found["whole"].begin % alignment == 0
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[found["whole"].begin] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    damaged = torch_zip.read(tmp_path / "x.pt").tensors["whole"]
    if crc32:
        with pytest.raises(NpgptError, match="data/0 is damaged: its CRC-32"):
            damaged.load()
    else:
        damaged.load()  # torch stored no checksum to compare with


@pytest.mark.parametrize("name", ["modèle (1).pt", "no suffix", "a.b.c.pt", "data.pkl", "ünï/ 重み.bin"])
def test_names_of_files(tmp_path: Path, name: str) -> None:
    """torch.save names the archive's folder after the file."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    tensors = views()
    assert_exact(read(tmp_path / name, tensors), tensors)
    with (tmp_path / "open").open("wb") as file:
        torch.save(tensors, file)
    assert_exact(torch_zip.read(tmp_path / "open").tensors, tensors)


def test_a_negated_view_has_its_sign(tmp_path: Path) -> None:
    """torch keeps "negative" as a bit beside the tensor and saves it as metadata."""
    tensors = {"negated": torch.complex(torch.ones(3), torch.arange(3.0) + 1).conj().imag}
    assert tensors["negated"].is_neg()
    torch.save(tensors, tmp_path / "x.pt")
    try:
        found = torch_zip.read(tmp_path / "x.pt").tensors["negated"].load()
    except NpgptError as error:
        assert "negated" in str(error) or "malformed" in str(error)  # noqa: PT017 - to refuse it is right too
    else:
        np.testing.assert_array_equal(found, tensors["negated"].resolve_neg().numpy())


def test_plain_values_beside_the_weights(tmp_path: Path) -> None:
    """A training script may save any value that torch.load(weights_only=True) accepts."""
    arrays = random_arrays(ERF, dtype="float32")
    values = {"epoch": 3, "lr": 1e-3, "name": "naïve", "none": None, "big": 2**70, "list": [1, (2.5, True)]}
    values |= {"size": torch.Size([1, 2]), "device": torch.device("cpu"), "loss": torch.tensor(0.5)}
    values |= {"rng": torch.get_rng_state(), "half": torch.ones(2).half()}
    torch.save(values | {"model": nanogpt.filled(ERF, arrays).state_dict()}, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", weights_only=True)["epoch"] == 3
    assert_same_bits(to_arrays(npgpt.load(tmp_path / "x.pt", n_head=2).parameters), arrays)
