"""In the manner of the annotated Transformer: clones, sublayer connections, four linears for attention."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from npgpt.config import Config
from npgpt.parameters import Array


def clones(module: Any, N: int) -> Any:
    return nn.ModuleList([copy.deepcopy(module) for _ in range(N)])


class LayerNorm(nn.Module):  # type: ignore[misc]
    def __init__(self, features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.a_2, self.b_2 = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.eps = eps

    def forward(self, x: Any) -> Any:
        mean = x.mean(-1, keepdim=True)
        std = torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + self.eps)
        return self.a_2 * (x - mean) / std + self.b_2


class SublayerConnection(nn.Module):  # type: ignore[misc]
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = LayerNorm(size)

    def forward(self, x: Any, sublayer: Callable[[Any], Any]) -> Any:
        return x + sublayer(self.norm(x))


def attention(query: Any, key: Any, value: Any, mask: Any) -> Any:
    scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(query.size(-1))
    scores = scores.masked_fill(mask == 0, float("-inf"))
    return torch.matmul(scores.softmax(dim=-1), value)


class MultiHeadedAttention(nn.Module):  # type: ignore[misc]
    def __init__(self, h: int, d_model: int) -> None:
        super().__init__()
        self.d_k, self.h = d_model // h, h
        self.linears = clones(nn.Linear(d_model, d_model), 4)

    def forward(self, query: Any, key: Any, value: Any, mask: Any) -> Any:
        n = query.size(0)
        query, key, value = (
            lin(x).view(n, -1, self.h, self.d_k).transpose(1, 2)
            for lin, x in zip(self.linears, (query, key, value), strict=False)
        )
        x = attention(query, key, value, mask)
        x = x.transpose(1, 2).contiguous().view(n, -1, self.h * self.d_k)
        return self.linears[-1](x)


class PositionwiseFeedForward(nn.Module):  # type: ignore[misc]
    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)

    def forward(self, x: Any) -> Any:
        return self.w_2(F.gelu(self.w_1(x), approximate="tanh"))


class DecoderLayer(nn.Module):  # type: ignore[misc]
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self_attn = MultiHeadedAttention(config.n_head, config.n_embd)
        self.feed_forward = PositionwiseFeedForward(config.n_embd, config.inner_width)
        self.sublayer = clones(SublayerConnection(config.n_embd), 2)

    def forward(self, x: Any, mask: Any) -> Any:
        x = self.sublayer[0](x, lambda x: self.self_attn(x, x, x, mask))
        return self.sublayer[1](x, self.feed_forward)


def fill(layer: Any, h: Mapping[str, Any]) -> None:
    for lin, w, b in zip(
        layer.self_attn.linears, h["attn.c_attn.weight"].chunk(3, -1), h["attn.c_attn.bias"].chunk(3), strict=False
    ):
        lin.weight.data, lin.bias.data = w.t(), b
    layer.self_attn.linears[3].weight.data = h["attn.c_proj.weight"].t()
    layer.self_attn.linears[3].bias.data = h["attn.c_proj.bias"]
    layer.feed_forward.w_1.weight.data, layer.feed_forward.w_1.bias.data = h["mlp.c_fc.weight"].t(), h["mlp.c_fc.bias"]
    layer.feed_forward.w_2.weight.data = h["mlp.c_proj.weight"].t()
    layer.feed_forward.w_2.bias.data = h["mlp.c_proj.bias"]
    for number in (0, 1):
        norm = layer.sublayer[number].norm
        norm.a_2.data, norm.b_2.data = h[f"ln_{number + 1}.weight"], h[f"ln_{number + 1}.bias"]


def run(arrays: Mapping[str, Array], config: Config, ids: NDArray[Any]) -> dict[str, Any]:
    """Logits and hidden states, of which the last is after the last norm."""
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    layers, norm = clones(DecoderLayer(config), config.n_layer), LayerNorm(config.n_embd)
    for number, layer in enumerate(layers):
        prefix = f"h.{number}."
        fill(layer, {name.removeprefix(prefix): w for name, w in tensors.items() if name.startswith(prefix)})
    norm.a_2.data, norm.b_2.data = tensors["ln_f.weight"], tensors["ln_f.bias"]
    mask = torch.tril(torch.ones(1, ids.shape[1], ids.shape[1]))
    with torch.no_grad():
        x = tensors["wte.weight"][torch.tensor(ids)] + tensors["wpe.weight"][: ids.shape[1]]
        states = [x]
        for layer in layers:
            states.append(x := layer(x, mask))
        states[-1] = norm(x)
        logits = F.linear(states[-1], tensors["wte.weight"])
    return {f"hidden_states.{n}": np.asarray(state) for n, state in enumerate(states)} | {"logits": np.asarray(logits)}
