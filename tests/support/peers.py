"""The same model, with the same weights, in the real packages."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from llms_from_scratch import ch04

from npgpt.checkpoints import configs
from npgpt.config import Config
from npgpt.parameters import Array

Ids = np.typing.NDArray[np.int64]


def transformers_model(config: Config, arrays: dict[str, Array]) -> Any:
    """Return GPT2LMHeadModel with these weights in their dtype; eager, because otherwise attentions are empty."""
    theirs = transformers.GPT2Config(**configs.to_dict(config), attn_implementation="eager")
    dtype = {"float32": torch.float32, "float64": torch.float64}[str(next(iter(arrays.values())).dtype)]
    model = transformers.GPT2LMHeadModel(theirs).to(dtype).eval()
    state = {f"transformer.{name}": torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    head = state.pop("transformer.lm_head.weight", state["transformer.wte.weight"])
    model.load_state_dict(state | {"lm_head.weight": head}, strict=True)
    return model


def transformers_outputs(model: Any, ids: Ids) -> dict[str, Array]:
    """Return logits, hidden states and attentions under npgpt's names; the last hidden state follows ln_f."""
    with torch.no_grad():
        out = model(torch.from_numpy(ids), output_hidden_states=True, output_attentions=True, use_cache=False)
    assert len(out.attentions) == model.config.n_layer, "no attentions: not eager?"
    hidden = [state.numpy() for state in out.hidden_states]
    names = ["embedding", *(f"h.{layer}" for layer in range(model.config.n_layer - 1)), "ln_f"]
    outputs = dict(zip(names, hidden, strict=True)) | {"logits": out.logits.numpy()}
    return outputs | {f"h.{i}.attn.weights": weights.numpy() for i, weights in enumerate(out.attentions)}


def llms_from_scratch_model(config: Config, arrays: dict[str, Array]) -> Any:
    """Return LLMs-from-scratch's GPTModel, with qkv_bias, with these weights in their dtype."""
    model = ch04.GPTModel(
        {
            "vocab_size": config.vocab_size,
            "context_length": config.n_positions,
            "emb_dim": config.n_embd,
            "n_heads": config.n_head,
            "n_layers": config.n_layer,
            "drop_rate": 0.1,
            "qkv_bias": True,
        }
    )
    dtype = {"float32": torch.float32, "float64": torch.float64}[str(next(iter(arrays.values())).dtype)]
    model = model.to(dtype).eval()
    state = {"tok_emb.weight": arrays["wte.weight"], "pos_emb.weight": arrays["wpe.weight"]}
    state |= {"final_norm.scale": arrays["ln_f.weight"], "final_norm.shift": arrays["ln_f.bias"]}
    state["out_head.weight"] = arrays.get("lm_head.weight", arrays["wte.weight"])
    for layer in range(config.n_layer):
        ours, theirs = f"h.{layer}.", f"trf_blocks.{layer}."
        for i, name in enumerate(("W_query", "W_key", "W_value")):
            columns = slice(i * config.n_embd, (i + 1) * config.n_embd)
            state[f"{theirs}att.{name}.weight"] = arrays[ours + "attn.c_attn.weight"][:, columns].T
            state[f"{theirs}att.{name}.bias"] = arrays[ours + "attn.c_attn.bias"][columns]
        for name, linear in (
            ("att.out_proj", "attn.c_proj"),
            ("ff.layers.0", "mlp.c_fc"),
            ("ff.layers.2", "mlp.c_proj"),
        ):
            state[f"{theirs}{name}.weight"] = arrays[f"{ours}{linear}.weight"].T
            state[f"{theirs}{name}.bias"] = arrays[f"{ours}{linear}.bias"]
        for name, norm in (("norm1", "ln_1"), ("norm2", "ln_2")):
            state[f"{theirs}{name}.scale"] = arrays[f"{ours}{norm}.weight"]
            state[f"{theirs}{name}.shift"] = arrays[f"{ours}{norm}.bias"]
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
    missing, left_over = model.load_state_dict(tensors, strict=False)
    assert not left_over
    assert all(name.endswith("att.mask") for name in missing), missing
    return model


def llms_from_scratch_logits(model: Any, ids: Ids) -> Array:
    """Return logits [B, T, V]."""
    with torch.no_grad():
        logits: Array = model(torch.from_numpy(ids)).numpy()
    return logits


class Float64GELU(torch.nn.Module):  # type: ignore[misc]
    """LLMs-from-scratch's GELU in the model's dtype; its own rounds √(2/π) to float32 even in a float64 model."""

    def forward(self, x: Any) -> Any:
        return torch.nn.functional.gelu(x, approximate="tanh")
