"""In the manner of tinygrad and MLX: small classes that are called, on arrays of any library, here NumPy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npgpt.config import Config
from npgpt.parameters import Array


class Linear:
    def __init__(self, weight: Array, bias: Array | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Array) -> Any:
        x = x @ self.weight.T
        return x if self.bias is None else x + self.bias


class LayerNorm:
    def __init__(self, weight: Array, bias: Array, eps: float = 1e-5) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x: Array) -> Any:
        y = x - x.mean(-1, keepdims=True)
        y = y * (1 / np.sqrt((y * y).mean(-1, keepdims=True) + self.eps))
        return y * self.weight + self.bias


def gelu(x: Array) -> Any:
    return x * 0.5 * (1 + np.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)))


def softmax(x: Array) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Attention:
    def __init__(self, w: Mapping[str, Array], dim: int, n_heads: int) -> None:
        self.c_attn = Linear(w["attn.c_attn.weight"].T, w["attn.c_attn.bias"])
        self.c_proj = Linear(w["attn.c_proj.weight"].T, w["attn.c_proj.bias"])
        self.n_heads, self.dim, self.head_dim = n_heads, dim, dim // n_heads

    def __call__(self, x: Array, mask: Array) -> Any:
        bsz, seqlen, _ = x.shape
        xqkv = self.c_attn(x).reshape(bsz, seqlen, 3, self.n_heads, self.head_dim)
        xq, xk, xv = (xqkv[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
        scores = xq @ xk.swapaxes(-1, -2) / math.sqrt(self.head_dim)
        out = softmax(scores + mask) @ xv
        return self.c_proj(out.transpose(0, 2, 1, 3).reshape(bsz, seqlen, self.dim))


class FeedForward:
    def __init__(self, w: Mapping[str, Array]) -> None:
        self.c_fc = Linear(w["mlp.c_fc.weight"].T, w["mlp.c_fc.bias"])
        self.c_proj = Linear(w["mlp.c_proj.weight"].T, w["mlp.c_proj.bias"])

    def __call__(self, x: Array) -> Any:
        return self.c_proj(gelu(self.c_fc(x)))


class TransformerBlock:
    def __init__(self, w: Mapping[str, Array], dim: int, n_heads: int) -> None:
        self.attn, self.mlp = Attention(w, dim, n_heads), FeedForward(w)
        self.ln_1, self.ln_2 = (LayerNorm(w[f"ln_{n}.weight"], w[f"ln_{n}.bias"]) for n in (1, 2))

    def __call__(self, x: Array, mask: Array) -> Any:
        h = x + self.attn(self.ln_1(x), mask)
        return h + self.mlp(self.ln_2(h))


class Transformer:
    def __init__(self, w: Mapping[str, Array], dim: int, n_heads: int, n_layers: int) -> None:
        self.wte, self.wpe = w["wte.weight"], w["wpe.weight"]
        self.h = []
        for i in range(n_layers):
            own = {k.removeprefix(f"h.{i}."): v for k, v in w.items() if k.startswith(f"h.{i}.")}
            self.h.append(TransformerBlock(own, dim, n_heads))
        self.ln_f = LayerNorm(w["ln_f.weight"], w["ln_f.bias"])
        self.lm_head = Linear(self.wte)

    def __call__(self, tokens: NDArray[Any], start_pos: int = 0) -> Any:
        seqlen = tokens.shape[1]
        h = self.wte[tokens] + self.wpe[start_pos : start_pos + seqlen]
        mask = np.triu(np.full((seqlen, seqlen), -np.inf, h.dtype), k=start_pos + 1)
        for layer in self.h:
            h = layer(h, mask)
        return self.lm_head(self.ln_f(h))


def run(arrays: Mapping[str, Array], config: Config, ids: NDArray[Any]) -> dict[str, Any]:
    """Logits alone: such programs keep nothing else."""
    return {"logits": Transformer(arrays, config.n_embd, config.n_head, config.n_layer)(ids)}
