from __future__ import annotations

from npgpt.checkpoints.huggingface import canonical_names


def test_the_prefix_and_the_mask_buffers_go_and_nothing_else() -> None:
    names = [
        "transformer.wte.weight",
        "transformer.h.0.attn.bias",
        "transformer.h.11.attn.masked_bias",
        "lm_head.weight",
    ]
    names += ["transformer.h.0.attn.c_attn.bias", "transformer.h.0.attn.c_proj.bias", "transformer.h.0.attn.biases"]
    names += ["x.h.0.attn.bias"]
    assert canonical_names(names) == {
        "wte.weight": "transformer.wte.weight",
        "lm_head.weight": "lm_head.weight",
        "h.0.attn.c_attn.bias": "transformer.h.0.attn.c_attn.bias",
        "h.0.attn.c_proj.bias": "transformer.h.0.attn.c_proj.bias",
        "h.0.attn.biases": "transformer.h.0.attn.biases",
        "x.h.0.attn.bias": "x.h.0.attn.bias",
    }


def test_names_without_a_prefix_stay() -> None:
    assert canonical_names(["wte.weight", "h.3.attn.bias"]) == {"wte.weight": "wte.weight"}


def test_a_tensor_given_twice_is_not_lost() -> None:
    assert canonical_names(["wte.weight", "transformer.wte.weight"]) == {
        "wte.weight": "wte.weight",
        "transformer.wte.weight": "transformer.wte.weight",
    }
