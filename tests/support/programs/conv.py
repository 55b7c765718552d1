"""In the manner of transformers: Conv1D, which stores [in, out], attention over an additive mask, an output object."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from npgpt.config import Config
from npgpt.parameters import Array


class Conv1D(nn.Module):  # type: ignore[misc]
    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Any) -> Any:
        size_out = (*x.size()[:-1], self.nf)
        x = torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight)
        return x.view(size_out)


class Attention(nn.Module):  # type: ignore[misc]
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.embed_dim = config.n_head, config.head_width, config.n_embd
        self.c_attn, self.c_proj = Conv1D(3 * self.embed_dim, self.embed_dim), Conv1D(self.embed_dim, self.embed_dim)
        self.resid_dropout = nn.Dropout(0.1)

    def forward(self, hidden_states: Any, attention_mask: Any) -> Any:
        query, key, value = self.c_attn(hidden_states).split(self.embed_dim, dim=2)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = query.view(shape).transpose(1, 2)
        key = key.view(shape).transpose(1, 2)
        value = value.view(shape).transpose(1, 2)
        attn_weights = torch.matmul(query, key.transpose(-1, -2))
        attn_weights = attn_weights / self.head_dim**0.5
        attn_weights = attn_weights + attention_mask
        attn_weights = nn.functional.softmax(attn_weights, dim=-1)
        attn_output = torch.matmul(attn_weights, value)
        attn_output = attn_output.transpose(1, 2).contiguous()
        attn_output = attn_output.view(*hidden_states.shape)
        return self.resid_dropout(self.c_proj(attn_output))


class MLP(nn.Module):  # type: ignore[misc]
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(config.inner_width, config.n_embd), Conv1D(config.n_embd, config.inner_width)
        self.act = nn.GELU(approximate="tanh")
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden_states: Any) -> Any:
        hidden_states = self.c_fc(hidden_states)
        hidden_states = self.act(hidden_states)
        hidden_states = self.c_proj(hidden_states)
        return self.dropout(hidden_states)


class Block(nn.Module):  # type: ignore[misc]
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, hidden_states: Any, attention_mask: Any) -> Any:
        residual = hidden_states
        hidden_states = self.ln_1(hidden_states)
        hidden_states = self.attn(hidden_states, attention_mask) + residual
        residual = hidden_states
        hidden_states = self.ln_2(hidden_states)
        return residual + self.mlp(hidden_states)


class LMHeadModel(nn.Module):  # type: ignore[misc]
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.transformer.drop = nn.Dropout(0.1)
        self.transformer.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.transformer.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        position_ids = (seen.long().cumsum(-1) - 1).clamp(min=0)
        length, parts = input_ids.shape[1], self.transformer
        hidden_states = parts.drop(parts.wte(input_ids) + parts.wpe(position_ids))
        visible = torch.tril(torch.ones(length, length)) * seen[:, None, None, :]
        mask = torch.zeros_like(visible, dtype=hidden_states.dtype)
        mask = mask.masked_fill(visible == 0, torch.finfo(mask.dtype).min)
        for block in parts.h:
            hidden_states = block(hidden_states, mask)
        return SimpleNamespace(logits=self.lm_head(parts.ln_f(hidden_states)))


def build(arrays: Mapping[str, Array], config: Config) -> Any:
    """The model, whose names are those of the arrays."""
    model = LMHeadModel(config)
    state = {f"transformer.{name}": torch.tensor(array) for name, array in arrays.items()}
    model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
    model.lm_head.weight = model.transformer.wte.weight
    return model.eval()
