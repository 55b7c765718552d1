from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from npgpt import config as configuration
from npgpt.checkpoints import configs
from npgpt.config import PUBLISHED, Config
from npgpt.errors import NpgptError
from tests.support.models import from_dict, small

# As published with the 124M weights on the hub.
HUB_GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}


def one_line(error: pytest.ExceptionInfo[NpgptError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_published_table() -> None:
    heads = {name: (c.n_layer, c.n_head, c.n_embd, c.head_width) for name, c in PUBLISHED.items()}
    assert heads == {
        "gpt2": (12, 12, 768, 64),
        "gpt2-medium": (24, 16, 1024, 64),
        "gpt2-large": (36, 20, 1280, 64),
        "gpt2-xl": (48, 25, 1600, 64),
        "distilgpt2": (6, 12, 768, 64),
    }


def test_gpt2_xl_with_its_layers_given_as_heads() -> None:
    with pytest.raises(NpgptError) as error:
        Config(vocab_size=50257, n_positions=1024, n_embd=1600, n_layer=25, n_head=48)
    assert one_line(error) == (
        "n_embd = 1600 is not divisible by n_head = 48: 1600 / 48 = 33.33 is not a whole number; "
        "48 is the n_layer of gpt2-xl (its number of blocks), and its n_head is 25: 1600 = 25 × 64"
    )


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"n_embd": 1024, "n_layer": 16, "n_head": 24}, "24 is the n_layer of gpt2-medium"),
        ({"n_embd": 1280, "n_layer": 20, "n_head": 36}, "its n_head is 20: 1280 = 20 × 64"),
        ({"n_embd": 100, "n_layer": 10, "n_head": 7}, "n_layer = 10 would divide it (100 = 10 × 10)"),
        ({"n_embd": 100, "n_layer": 3, "n_head": 11}, "the nearest n_head that divides it is 10: 100 = 10 × 10"),
        ({"n_embd": 2**31 - 1, "n_layer": 3, "n_head": 2**30}, "that divides it is 1:"),
    ],
)
def test_other_divisions_that_fail_name_the_likely_cause(fields: dict[str, int], hint: str) -> None:
    with pytest.raises(NpgptError) as error:
        small(**fields)
    assert hint in one_line(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(field, value) for field in configuration.REQUIRED for value in (0, -1, 1.0, "12", True, None, 2**31)],
        ("n_layer", 10_001),
        *[("n_inner", value) for value in (0, -3, 2.5, True, "64")],
        *[("layer_norm_epsilon", value) for value in (-1e-5, 1, "1e-5", True, None, float("nan"), float("inf"))],
        *[("activation_function", value) for value in ("relu", "quick_gelu", "gelu_fast", None, 3)],
        *[("tie_word_embeddings", value) for value in (1, None, "true")],
        *[("scale_attn_weights", value) for value in (0, None)],
        *[("scale_attn_by_inverse_layer_idx", value) for value in (0, "false")],
    ],
)
def test_every_field_is_checked(field: str, value: Any) -> None:
    with pytest.raises(NpgptError, match=field):
        small(**{field: value})


def test_numpy_scalars_become_plain_numbers() -> None:
    """A NumPy epsilon would turn float32 into float64 in every LayerNorm."""
    config = small(n_embd=np.int64(21), layer_norm_epsilon=np.float64(1e-5))
    assert type(config.n_embd) is int
    assert type(config.layer_norm_epsilon) is float


def test_sizes_are_never_positional() -> None:
    with pytest.raises(TypeError):
        Config(50257, 1024, 768, 12, 12)  # type: ignore[call-arg]


def test_hub_config_gives_the_published_model_and_no_unknown_key() -> None:
    assert from_dict(HUB_GPT2) == PUBLISHED["gpt2"]
    assert configs.read_fields(HUB_GPT2, "config.json")[1] == []


def test_llms_from_scratch_keys() -> None:
    book = {"vocab_size": 50257, "context_length": 256, "emb_dim": 768, "n_heads": 12, "n_layers": 12}
    config = from_dict(book | {"drop_rate": 0.1, "qkv_bias": False})
    assert (config.n_positions, config.n_embd, config.n_head, config.n_layer) == (256, 768, 12, 12)
    assert config.activation_function == "gelu_new"
    assert not config.tie_word_embeddings  # out_head is a parameter of its own


def test_nanogpt_keys_bring_the_exact_activation() -> None:
    model_args = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "bias": False, "vocab_size": 65}
    config = from_dict(model_args | {"dropout": 0.2})
    assert (config.n_positions, config.activation_function, config.tie_word_embeddings) == (256, "gelu", True)


def test_mingpt_keys_keep_the_tanh_form() -> None:
    config = from_dict(
        {"model_type": "gpt-nano", "n_layer": 3, "n_head": 3, "n_embd": 48, "block_size": 6, "vocab_size": 3}
        | {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1}
    )
    assert (config.n_positions, config.activation_function) == (6, "gelu_new")


def test_build_nanogpts_keys_keep_the_tanh_form() -> None:
    """build-nanogpt's GPTConfig has five fields. nanoGPT's has had `bias` as long as it has used the erf form."""
    config = from_dict({"block_size": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768})
    assert config == PUBLISHED["gpt2"]


@pytest.mark.parametrize(
    ("mapping", "tells"),
    [
        ({}, False),
        ({"n_head": 3, "bias": True}, False),
        ({"block_size": 8}, False),
        ({"block_size": 8, "dropout": 0.0}, False),
        ({"block_size": 8, "bias": False}, True),
        ({"block_size": 8, "embd_pdrop": 0.1}, True),
        ({"activation_function": "gelu_fast"}, True),
    ],
)
def test_which_configurations_tell_the_gelu(mapping: dict[str, Any], tells: bool) -> None:
    assert configs.tells_gelu(mapping) == tells


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("gelu_fast", "gelu_new"),
        ("gelu_accurate", "gelu_new"),
        ("gelu_python_tanh", "gelu_new"),
        ("gelu_python", "gelu"),
        ("gelu_new", "gelu_new"),
        ("gelu_pytorch_tanh", "gelu_pytorch_tanh"),
        ("gelu", "gelu"),
    ],
)
def test_transformers_names_of_the_two_forms(theirs: str, ours: str) -> None:
    assert from_dict(HUB_GPT2 | {"activation_function": theirs}).activation_function == ours


@pytest.mark.parametrize("other", ["gelu_10", "quick_gelu", "GELU", "", None, 3, ["gelu"], {}])
def test_other_activations_are_refused(other: Any) -> None:
    with pytest.raises(NpgptError, match="is not one that GPT-2 uses"):
        from_dict(HUB_GPT2 | {"activation_function": other})


@pytest.mark.parametrize("key", ["n_positions", "max_position_embeddings"])
def test_an_n_ctx_beside_the_context_does_not_count(key: str) -> None:
    """transformers ignores it too. Alone, as in OpenAI's files, it is the context."""
    sizes = {"vocab_size": 9, "n_embd": 8, "n_head": 2, "n_layer": 3}
    for n_ctx in (512, None, "long"):
        mapping = sizes | {"n_ctx": n_ctx, key: 1024}
        assert from_dict(mapping).n_positions == from_dict(dict(reversed(mapping.items()))).n_positions == 1024
    assert from_dict(sizes | {"n_ctx": 512}).n_positions == 512
    assert "n_ctx" not in configs.read_fields(sizes | {"n_ctx": 512, key: 512}, "it")[0]


@pytest.mark.parametrize(
    "changes", [{}, {"vocab_size": 50261}, {"n_positions": 256}, {"vocab_size": 7, "n_positions": 9}]
)
def test_a_swapped_n_head_is_known_by_width_and_depth(changes: dict[str, int]) -> None:
    for name, size in PUBLISHED.items():
        fields = configs.to_dict(size) | changes
        assert from_dict(fields).n_head == size.n_head
        known = "shapes" if not changes else "width and depth"
        for n_head in {size.n_layer, size.n_head * 2} - {size.n_head}:
            if size.n_embd % n_head == 0:
                with pytest.raises(
                    NpgptError, match=rf"says n_head = {n_head}, but the weights have the {known} of {name}"
                ):
                    from_dict(fields | {"n_head": n_head})
                assert configs.complete(fields, {}, n_head, "it").n_head == n_head
    others = configs.to_dict(PUBLISHED["gpt2"]) | {"n_head": 6}
    for other in ({"n_layer": 11}, {"n_embd": 780}, {"n_inner": 2048}):
        assert from_dict(others | other).n_head == 6


def test_openai_hparams() -> None:
    hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
    assert from_dict(hparams) == PUBLISHED["gpt2"]


def test_other_spellings_that_transformers_takes() -> None:
    keys = {"vocab_size": 9, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3}
    assert from_dict(keys | {"max_position_embeddings": 5}) == small(
        vocab_size=9, n_embd=8, n_head=2, n_layer=3, n_positions=5
    )


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "gpt2"),
        ({"n_head": 24}, "gpt2"),  # no shape depends on it
        ({"vocab_size": 50304}, "gpt2"),
        ({"n_inner": 3072}, "gpt2"),
        ({"n_layer": 6}, "distilgpt2"),
        ({"n_layer": 13}, None),
        ({"n_embd": 780}, None),
        ({"n_positions": 512}, None),
        ({"vocab_size": 50258}, None),
        ({"n_inner": 2048}, None),
    ],
)
def test_which_published_model_it_has_the_shapes_of(fields: dict[str, int], name: str | None) -> None:
    assert Config(**{**PUBLISHED["gpt2"].__dict__, **fields}).published_name() == name


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PUBLISHED["gpt2"].n_head = 24  # type: ignore[misc]


def test_keys_of_half_precision_and_an_epsilon_of_zero_are_accepted() -> None:
    assert configs.read_fields(HUB_GPT2 | {"reorder_and_upcast_attn": True}, "config.json")[1] == []
    assert small(layer_norm_epsilon=0).layer_norm_epsilon == 0


def test_to_dict_and_back() -> None:
    for config in (*PUBLISHED.values(), small(n_inner=5, activation_function="gelu", tie_word_embeddings=False)):
        assert from_dict(configs.to_dict(config)) == config


def test_unknown_keys_are_reported() -> None:
    assert configs.read_fields(HUB_GPT2 | {"rope_theta": 10000}, "config.json")[1] == ["rope_theta"]


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"model_type": "gpt_neo"}, "gpt_neo"),
        ({"model_type": "llama"}, "llama"),
        ({"model_type": "llama", "block_size": 1024}, "llama"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"activation_function": "relu"}, "relu"),
        ({"max_position_embeddings": 512}, "max_position_embeddings"),
        ({"hidden_size": 1024}, "hidden_size"),
    ],
)
def test_other_models_and_contradictions_are_refused_by_name(extra: dict[str, Any], named: str) -> None:
    with pytest.raises(NpgptError, match=named):
        from_dict(HUB_GPT2 | extra, "config.json")


def test_missing_sizes_are_listed() -> None:
    with pytest.raises(NpgptError, match="mine lacks vocab_size, n_layer"):
        from_dict({"n_positions": 8, "n_embd": 8, "n_head": 2}, "mine")


def test_the_scale_of_attention() -> None:
    assert PUBLISHED["gpt2"].attention_scale(5) == 0.125
    assert small(scale_attn_weights=False).attention_scale(1) == 1.0
    assert small(n_embd=12, scale_attn_by_inverse_layer_idx=True).attention_scale(2) == 1 / 2 / 3


@pytest.mark.parametrize("ids", [[1, 2], (1, 2), [[1, 2], [3, 4]], np.array([39], np.uint8), np.array([[0]], np.int16)])
def test_token_ids_become_rows(ids: Any) -> None:
    rows = small().token_rows(ids)
    assert rows.ndim == 2
    np.testing.assert_array_equal(rows.ravel(), np.ravel(ids))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 1, -1], r"token id -1 at position \[2\] is out of range: vocab_size is 40, so ids run from 0 to 39"),
        ([[0, 1], [40, 1]], r"token id 40 at position \[1, 0\]"),
        ([], "no token ids"),
        ([[]], "no token ids"),
        ([1.0, 2.0], "must be integers .of 64 bits at most., not float64"),
        ([True], "must be integers .of 64 bits at most., not bool"),
        (["a"], "must be integers"),
        ([None], "must be integers .of 64 bits at most., not object"),
        ([2**70], "must be integers .of 64 bits at most., not object"),
        (np.array([1], "m8[s]"), "must be integers .of 64 bits at most., not timedelta64"),
        ([[1, 2], [3]], "rows of equal length"),
        (3, "must have the shape"),
        ([[[1]]], r"must have the shape .* not \[1, 1, 1\]"),
        (list(range(25)), r"25 tokens do not fit into the context of 24 \(n_positions\)"),
    ],
)
def test_token_ids_that_numpy_would_take_in_silence(ids: Any, message: str) -> None:
    with pytest.raises(NpgptError, match=message) as error:
        small().token_rows(ids)
    one_line(error)


def test_tokens_in_a_cache_count_towards_the_context() -> None:
    assert small().token_rows([1] * 4, past=20).shape == (1, 4)
    with pytest.raises(NpgptError, match="5 tokens after 20 in the cache do not fit into the context of 24"):
        small().token_rows([1] * 5, past=20)
