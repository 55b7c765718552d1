"""In the manner of those who take torch's own layers: nn.TransformerEncoderLayer(norm_first=True) and a mask."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from npgpt.config import Config
from npgpt.parameters import Array


class GPT(nn.Module):  # type: ignore[misc]
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.n_positions, config.n_embd)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.n_embd,
                config.n_head,
                config.inner_width,
                dropout=0.0,
                activation=partial(F.gelu, approximate="tanh"),
                layer_norm_eps=1e-5,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.n_layer)
        )
        self.norm = nn.LayerNorm(config.n_embd, eps=1e-5)

    def forward(self, ids: Any) -> Any:
        states = [self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))]
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        for layer in self.layers:
            states.append(layer(states[-1], src_mask=mask, is_causal=True))
        states[-1] = self.norm(states[-1])
        return F.linear(states[-1], self.tokens.weight), states


def load(model: Any, arrays: Mapping[str, Array]) -> None:
    """Give torch's layers their weights, all of them transposed."""
    w = {name: torch.tensor(array) for name, array in arrays.items()}
    state = {"tokens.weight": w["wte.weight"], "positions.weight": w["wpe.weight"]}
    state |= {f"norm.{kind}": w[f"ln_f.{kind}"] for kind in ("weight", "bias")}
    names = {"attn.c_proj": "self_attn.out_proj", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}
    for n in range(len(model.layers)):
        state[f"layers.{n}.self_attn.in_proj_weight"] = w[f"h.{n}.attn.c_attn.weight"].T
        state[f"layers.{n}.self_attn.in_proj_bias"] = w[f"h.{n}.attn.c_attn.bias"]
        for ours, theirs in names.items():
            state[f"layers.{n}.{theirs}.weight"] = w[f"h.{n}.{ours}.weight"].T
            state[f"layers.{n}.{theirs}.bias"] = w[f"h.{n}.{ours}.bias"]
        for number in (1, 2):
            for kind in ("weight", "bias"):
                state[f"layers.{n}.norm{number}.{kind}"] = w[f"h.{n}.ln_{number}.{kind}"]
    model.load_state_dict(state)


def run(arrays: Mapping[str, Array], config: Config, ids: NDArray[Any]) -> dict[str, Any]:
    """Logits and hidden states, of which the last is after the norm."""
    model = GPT(config).eval()
    load(model, arrays)
    with torch.no_grad():
        logits, states = model(torch.tensor(ids))
    found = {f"hidden_states.{n}": np.asarray(state) for n, state in enumerate(states)}
    return found | {"logits": np.asarray(logits)}
