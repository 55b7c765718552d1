"""In the manner of minGPT: GELU written out, an MLP in a dictionary, an output head of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from npgpt.config import Config
from npgpt.parameters import Array


class NewGELU(nn.Module):  # type: ignore[misc]
    def forward(self, x: Any) -> Any:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class CausalSelfAttention(nn.Module):  # type: ignore[misc]
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.register_buffer("bias", torch.tril(torch.ones(config.n_positions, config.n_positions))[None, None])
        self.n_head, self.n_embd = config.n_head, config.n_embd

    def forward(self, x: Any) -> Any:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k, q, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in (k, q, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = F.softmax(att, dim=-1)
        y = (att @ v).transpose(1, 2).contiguous().view(B, T, C)
        return self.c_proj(y)


class Block(nn.Module):  # type: ignore[misc]
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        parts = {"c_fc": nn.Linear(config.n_embd, config.inner_width), "act": NewGELU()}
        self.mlp = nn.ModuleDict(parts | {"c_proj": nn.Linear(config.inner_width, config.n_embd)})

    def mlpf(self, x: Any) -> Any:
        return self.mlp.c_proj(self.mlp.act(self.mlp.c_fc(x)))

    def forward(self, x: Any) -> Any:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlpf(self.ln_2(x))


class GPT(nn.Module):  # type: ignore[misc]
    def __init__(self, config: Config) -> None:
        super().__init__()
        parts = {"wte": nn.Embedding(config.vocab_size, config.n_embd)}
        parts |= {"wpe": nn.Embedding(config.n_positions, config.n_embd), "drop": nn.Dropout(0.0)}
        parts["h"] = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.transformer = nn.ModuleDict(parts | {"ln_f": nn.LayerNorm(config.n_embd)})
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx: Any) -> Any:
        pos = torch.arange(0, idx.size(1), dtype=torch.long).unsqueeze(0)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        return self.lm_head(x), None


def build(arrays: Mapping[str, Array], config: Config) -> Any:
    """The model; its head is a copy."""
    model = GPT(config)
    state = {f"transformer.{name}": torch.tensor(array) for name, array in arrays.items()}
    state = {name: w.t() if ".c_" in name and name.endswith("weight") else w for name, w in state.items()}
    state["lm_head.weight"] = torch.tensor(arrays["wte.weight"])
    missing, _ = model.load_state_dict(state, strict=False)
    assert all(name.endswith("attn.bias") for name in missing)
    return model.eval()
