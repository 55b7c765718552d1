"""Naming schemes map every name, drop only buffers, and are told apart by content."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt import config
from npgpt.checkpoints import formats, safetensors, wrappers
from npgpt.checkpoints import names as naming
from npgpt.checkpoints.llmc import shapes
from npgpt.checkpoints.names import Scheme
from npgpt.checkpoints.tensor import Source
from npgpt.errors import NpgptError
from npgpt.parameters import to_arrays
from tests.support.models import random_arrays, small, stored
from tests.support.namings import NAMINGS, llms_from_scratch, nanogpt, openai, transposed

CONFIG = small()


@pytest.mark.parametrize("scheme", NAMINGS)
def test_every_scheme_is_recognised_in_safetensors_and_gives_the_same_model(tmp_path: Path, scheme: str) -> None:
    arrays = random_arrays(CONFIG, dtype="float32")
    path = stored(tmp_path / "m.safetensors", NAMINGS[scheme](arrays))
    tensors = wrappers.unwrapped(formats.read(path).tensors)
    assert naming.choose(None, tensors, "it").name == scheme
    for name_scheme in (None, scheme):
        found = to_arrays(npgpt.load(path, n_head=3, name_scheme=name_scheme).parameters)
        assert found.keys() == arrays.keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, arrays[name], err_msg=name)


@pytest.mark.parametrize("scheme", NAMINGS)
def test_a_name_too_many_or_too_few_is_reported(tmp_path: Path, scheme: str) -> None:
    arrays = NAMINGS[scheme](random_arrays(CONFIG, dtype="float32"))
    for prefix in ("", "model/"):
        path = stored(tmp_path / "m.safetensors", arrays | {f"{prefix}h.0.attn.rotary": np.ones(3, np.float32)})
        if scheme == "openai" and not prefix:
            continue  # what a training run keeps outside of model/ is none of the model
        with pytest.raises(NpgptError, match=r"h\.0\.attn\.rotary is unexpected"):
            npgpt.load(path, n_head=3)
    lacking = {name: array for name, array in arrays.items() if "wpe" not in name and "pos" not in name}
    if scheme != "llm.c":  # whose names are one set
        with pytest.raises(NpgptError, match=r"lacks n_positions|wpe\.weight is missing|not a GPT-2 that npgpt knows"):
            npgpt.load(stored(tmp_path / "m.safetensors", lacking), n_head=3)


def test_the_activation_travels_with_the_names(tmp_path: Path) -> None:
    """nanoGPT uses the erf form, minGPT the tanh form; minGPT is recognised by its own output head."""
    arrays = random_arrays(CONFIG, dtype="float32")
    nano = nanogpt(arrays) | {"_orig_mod.lm_head.weight": arrays["wte.weight"]}
    assert npgpt.load(stored(tmp_path / "a", nano), n_head=3).config.activation_function == "gelu"
    mini = nanogpt(arrays) | {"_orig_mod.lm_head.weight": 2 * arrays["wte.weight"]}
    model = npgpt.load(stored(tmp_path / "b", mini), n_head=3)
    assert (model.config.activation_function, model.config.tie_word_embeddings) == ("gelu_new", False)
    np.testing.assert_array_equal(model.parameters.lm_head.weight, 2 * arrays["wte.weight"])
    assert npgpt.load(tmp_path / "b", n_head=3, name_scheme="nanogpt").config.activation_function == "gelu"
    for scheme in ("huggingface", "llms-from-scratch", "openai", "llama.cpp", "llm.c"):
        path = stored(tmp_path / "c", NAMINGS[scheme](arrays))
        assert npgpt.load(path, n_head=3).config.activation_function == "gelu_new"


def test_absent_biases_are_zeros_where_there_are_none_at_all(tmp_path: Path) -> None:
    arrays = random_arrays(CONFIG, dtype="float32")
    bare = {name: array for name, array in transposed(arrays).items() if not name.endswith("bias")}
    parts = to_arrays(npgpt.load(stored(tmp_path / "a", bare), n_head=3).parameters)
    for name, array in parts.items():
        expected = np.zeros_like(arrays[name]) if name.endswith("bias") else arrays[name]
        np.testing.assert_array_equal(array, expected, err_msg=name)
        assert array.dtype == np.float32
    some = bare | {"h.0.ln_1.bias": arrays["h.0.ln_1.bias"]}
    with pytest.raises(NpgptError, match=r"h\.\*\.attn\.c_attn\.bias is missing \(in 2 blocks\)"):
        npgpt.load(stored(tmp_path / "b", some), n_head=3)
    book = {name: array for name, array in llms_from_scratch(arrays).items() if "W_" not in name or "weight" in name}
    model = npgpt.load(stored(tmp_path / "c", book), n_head=3)
    assert not model.parameters.h[0].attn.c_attn.bias.any()
    np.testing.assert_array_equal(model.parameters.h[1].attn.c_proj.bias, arrays["h.1.attn.c_proj.bias"])
    path = stored(tmp_path / "d", {name: a for name, a in arrays.items() if not name.endswith("c_attn.bias")})
    with pytest.raises(NpgptError, match=r"c_attn\.bias is missing"):  # in Hugging Face's names a bias is never absent
        npgpt.load(path, n_head=3)


def test_gpt_model_fast_has_one_matrix_for_queries_keys_and_values(tmp_path: Path) -> None:
    arrays = random_arrays(CONFIG, dtype="float32")
    book = {name: array for name, array in llms_from_scratch(arrays).items() if "W_" not in name}
    renamed = {
        name.replace("out_proj", "proj").replace("scale", "weight").replace("shift", "bias"): array
        for name, array in book.items()
    }
    for i in range(2):
        renamed[f"trf_blocks.{i}.att.qkv.weight"] = np.ascontiguousarray(arrays[f"h.{i}.attn.c_attn.weight"].T)
        renamed[f"trf_blocks.{i}.att.qkv.bias"] = arrays[f"h.{i}.attn.c_attn.bias"]
    for name, array in to_arrays(npgpt.load(stored(tmp_path / "a", renamed), n_head=3).parameters).items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)


def test_queries_keys_and_values_of_different_shapes(tmp_path: Path) -> None:
    book = llms_from_scratch(random_arrays(CONFIG, dtype="float32"))
    book["trf_blocks.0.att.W_key.weight"] = np.ones((7, 21), np.float32)
    book["trf_blocks.0.att.W_value.weight"] = np.ones((35, 21), np.float32)  # together they would fit
    with pytest.raises(NpgptError, match=r"W_query\.weight is \[21, 21\], but .*W_key\.weight is \[7, 21\]"):
        npgpt.load(stored(tmp_path / "a", book), n_head=3)


def test_a_stack_where_openai_has_a_1(tmp_path: Path) -> None:
    arrays = openai(random_arrays(CONFIG, dtype="float32"))
    bare = {name: array[0] if name.endswith("/w") else array for name, array in arrays.items()}
    assert npgpt.load(stored(tmp_path / "a", bare), n_head=3).config == CONFIG
    arrays["model/h0/attn/c_attn/w"] = np.repeat(arrays["model/h0/attn/c_attn/w"], 2, axis=0)
    with pytest.raises(NpgptError, match=r"c_attn\.weight is \[2, 21, 63\] and must be \[21, 63\]"):
        npgpt.load(stored(tmp_path / "b", arrays), n_head=3)


def test_wrappers_go_where_names_stay_apart() -> None:
    tensors: dict[str, Any] = dict.fromkeys(
        ("module._orig_mod.a", "h._orig_mod.b", "my_module.c", "d", "module.d", "module"), None
    )
    assert list(wrappers.unwrapped(tensors)) == ["a", "h.b", "my_module.c", "d", "module.d", "module"]


# not: cache_v taken out of the rule that drops buffers
def test_llms_from_scratchs_buffers_are_dropped(tmp_path: Path) -> None:
    arrays = random_arrays(CONFIG, dtype="float32")
    buffers = {f"trf_blocks.1.att.{name}": np.ones((1, 2), np.float32) for name in ("mask", "cache_k", "cache_v")}
    model = npgpt.load(stored(tmp_path / "a", NAMINGS["llms-from-scratch"](arrays) | buffers), n_head=3)
    for name, array in to_arrays(model.parameters).items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)


# not: WRAPPERS without the + after its first group
def test_wrappers_within_wrappers() -> None:
    names = ("module.model.a", "_orig_mod.model.b", "model._orig_mod.module.c", "model.module.d")
    assert list(wrappers.unwrapped(dict.fromkeys(names))) == ["a", "b", "c", "d"]  # type: ignore[arg-type]


# not: the second condition of unwrapped left out: one of two tensors is lost without a word
@pytest.mark.parametrize("names", [("module.a", "a"), ("a", "module.a"), ("module.a", "_orig_mod.a", "a")])
def test_no_tensor_is_lost_where_names_do_not_stay_apart(names: tuple[str, ...]) -> None:
    tensors: dict[str, Any] = {name: object() for name in names}
    found = wrappers.unwrapped(tensors)
    assert len(found) == len(names)
    assert found["a"] is tensors["a"]
    assert set(map(id, found.values())) == set(map(id, tensors.values()))


# not: Source.stored without the comparison of dtypes: float32 parts read as if they were float16 or bfloat16
def test_queries_keys_and_values_of_different_dtypes(tmp_path: Path) -> None:
    arrays = NAMINGS["llms-from-scratch"](random_arrays(CONFIG, dtype="float32"))
    name = "trf_blocks.0.att.W_key.weight"
    path = stored(tmp_path / "a", arrays | {name: arrays[name].astype(np.float16)})
    with pytest.raises(
        NpgptError, match=r"W_query\.weight is float32, but trf_blocks\.0\.att\.W_key\.weight is float16"
    ):
        npgpt.load(path, n_head=3)


def test_a_new_scheme_is_a_table() -> None:
    """A scheme has layers, ends, stacks, dropped names, the order of thirds, and aliases."""
    scheme = Scheme(
        "theirs",
        "Their names",
        layers={
            "d.*.out": "h.*.attn.c_proj",
            "d.*.q": "h.*.attn.query",
            "d.*.k": "h.*.attn.key",
            "norms": "h.*.ln_1",
            "none": "h.*.ln_2",
            "last": "ln_f",
            "final": "ln_f",
        },
        ends={".kernel": ".weight", ".offset": ".bias"},
        dropped=r"d\.\d+\.mask",
        out_in=True,
    )
    names = "d.7.k.kernel d.7.q.kernel d.7.mask d.3.out.kernel d.3.out.offset last.kernel final.kernel".split()
    names += ["d.*.out.kernel", "d.3.x.kernel", "d.3.o*t.kernel"]
    tensors: dict[str, Any] = dict.fromkeys(names, SimpleNamespace(shape=(2, 2)))
    tensors |= {"norms.offset": SimpleNamespace(shape=(2, 5)), "none.offset": SimpleNamespace(shape=(0, 5))}
    assert scheme.translate(tensors) == {
        "h.7.attn.c_attn.weight": Source(("d.7.q.kernel", "d.7.k.kernel"), True),
        "h.3.attn.c_proj.weight": Source(("d.3.out.kernel",), True),
        "h.3.attn.c_proj.bias": Source(("d.3.out.offset",)),
        "ln_f.weight": Source(("last.kernel",)),
        "final.kernel": Source(("final.kernel",)),
        "h.*.attn.c_proj.weight": Source(("d.*.out.kernel",), True),
        "d.3.x.kernel": Source(("d.3.x.kernel",)),
        "d.3.o*t.kernel": Source(("d.3.o*t.kernel",)),
        "h.0.ln_1.bias": Source(("norms.offset",), entry=0),
        "h.1.ln_1.bias": Source(("norms.offset",), entry=1),
        "h.*.ln_2.bias": Source(("none.offset",)),
    }


def test_a_stack_of_more_blocks_than_a_model_may_have_is_not_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (config, naming):
        monkeypatch.setattr(module, "MOST_LAYERS", 100)
    stacks = {name: np.zeros(shape, np.float32) for name, shape in shapes(2, 1, 101, 1).items()}
    with pytest.raises(NpgptError, match="n_layer must be at most 100, not 101"):
        npgpt.load(stored(tmp_path / "a", stacks), n_head=1)


def test_no_scheme_fits_or_the_name_is_none(tmp_path: Path) -> None:
    path = stored(tmp_path / "a", {"model.layers.0.self_attn.q_proj.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(
        NpgptError, match=r"is not a GPT-2 that npgpt knows: it has model\.layers\.0\.self_attn\.q_proj"
    ):
        npgpt.load(path)
    with pytest.raises(NpgptError, match="unknown naming scheme 'keras': give one of mingpt, nanogpt, huggingface"):
        npgpt.load(path, name_scheme="keras")
    safetensors.write(tmp_path / "empty", {})
    with pytest.raises(NpgptError, match="it has no tensors"):
        npgpt.load(tmp_path / "empty")


@pytest.mark.parametrize("scheme", ["huggingface", "nanogpt", "llms-from-scratch", "llama.cpp"])
def test_a_head_of_its_own_is_kept_and_used(tmp_path: Path, scheme: str) -> None:
    config = small(tie_word_embeddings=False)
    arrays = random_arrays(config, dtype="float32")
    model = npgpt.load(stored(tmp_path / "a", NAMINGS[scheme](arrays)), n_head=3)
    assert model.config == config
    np.testing.assert_array_equal(model.parameters.lm_head.weight, arrays["lm_head.weight"])


def test_every_scheme_has_a_writer_here() -> None:
    assert set(NAMINGS) | {"mingpt"} == {scheme.name for scheme in naming.SCHEMES}


def test_a_head_of_another_dtype_is_its_own(tmp_path: Path) -> None:
    """A rounded head is not wte."""
    arrays = random_arrays(small(), dtype="float32")
    arrays["lm_head.weight"] = arrays["wte.weight"].astype("float16")
    model = npgpt.load(stored(tmp_path / "a", arrays), n_head=3)
    assert not model.config.tie_word_embeddings
    np.testing.assert_array_equal(model.parameters.lm_head.weight, arrays["lm_head.weight"])
