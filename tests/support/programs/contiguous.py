"""In the manner of candle, from Rust: a struct per layer, reshape, transpose, contiguous, all in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from npgpt.config import Config
from npgpt.parameters import Array


class VarBuilder(NamedTuple):
    """Tensors under a prefix."""

    tensors: Mapping[str, Array]
    prefix: str = ""

    def pp(self, name: str) -> VarBuilder:
        return VarBuilder(self.tensors, f"{self.prefix}{name}.")

    def get(self, shape: tuple[int, ...], name: str) -> Array:
        tensor = self.tensors[self.prefix + name]
        if tensor.shape != shape:
            raise ValueError(f"shape mismatch for {self.prefix}{name}: {tensor.shape}, expected {shape}")
        return tensor


def linear(n: int, m: int, vb: VarBuilder, x: Array) -> Any:
    return np.add(np.matmul(x, vb.get((n, m), "weight")), vb.get((m,), "bias"))


def layer_norm(size: int, eps: float, vb: VarBuilder, x: Array) -> Any:
    hidden_size = np.float32(x.shape[-1])
    x = x - x.sum(axis=-1, keepdims=True) / hidden_size
    norm_x = (x * x).sum(axis=-1, keepdims=True) / hidden_size
    x_normed = x / np.sqrt(norm_x + np.float32(eps))
    return x_normed * vb.get((size,), "weight") + vb.get((size,), "bias")


def new_gelu(xs: Array) -> Any:
    inner = np.float32(0.79788456) * (xs + np.float32(0.044715) * (xs * xs * xs))
    return np.float32(0.5) * xs * (np.float32(1.0) + np.tanh(inner))


def contiguous(xs: Array) -> Array:
    return np.ascontiguousarray(xs)


def attention(cfg: Config, vb: VarBuilder, xs: Array) -> tuple[Any, Any]:
    b_sz, seq_len, n_embd = xs.shape
    head_dim = n_embd // cfg.n_head
    qkv = linear(n_embd, 3 * n_embd, vb.pp("c_attn"), xs)
    query, key, value = (contiguous(qkv[:, :, i * n_embd : (i + 1) * n_embd]) for i in range(3))
    query = contiguous(query.reshape(b_sz, seq_len, cfg.n_head, head_dim).transpose(0, 2, 1, 3))
    key = contiguous(key.reshape(b_sz, seq_len, cfg.n_head, head_dim).transpose(0, 2, 1, 3))
    value = contiguous(value.reshape(b_sz, seq_len, cfg.n_head, head_dim).transpose(0, 2, 1, 3))
    attn_weights = np.matmul(query, key.transpose(0, 1, 3, 2)) * np.float32(1.0 / head_dim**0.5)
    mask = np.array([[j > i for j in range(seq_len)] for i in range(seq_len)])
    attn_weights = np.where(mask, np.float32(-np.inf), attn_weights)
    attn_weights = np.exp(attn_weights - attn_weights.max(axis=-1, keepdims=True))
    attn_weights = attn_weights / attn_weights.sum(axis=-1, keepdims=True)
    attn_output = contiguous(np.matmul(attn_weights, value).transpose(0, 2, 1, 3))
    attn_output = attn_output.reshape(b_sz, seq_len, n_embd)
    return linear(n_embd, n_embd, vb.pp("c_proj"), attn_output), attn_output


def mlp(cfg: Config, vb: VarBuilder, xs: Array) -> Any:
    xs = linear(cfg.n_embd, cfg.inner_width, vb.pp("c_fc"), xs)
    return linear(cfg.inner_width, cfg.n_embd, vb.pp("c_proj"), new_gelu(xs))


def run(arrays: Mapping[str, Array], config: Config, ids: NDArray[Any]) -> dict[str, Any]:
    """Logits, and what was printed on the way: each sublayer's input, attention's heads and output, the stream."""
    cfg, vb, seen = config, VarBuilder(arrays), {}
    _, seq_len = ids.shape
    wte = vb.pp("wte").get((cfg.vocab_size, cfg.n_embd), "weight")
    wpe = vb.pp("wpe").get((cfg.n_positions, cfg.n_embd), "weight")
    xs = wte[ids] + wpe[np.arange(seq_len)]
    seen["embedding"] = xs
    for i in range(cfg.n_layer):
        block = vb.pp("h").pp(str(i))
        residual = xs
        xs = layer_norm(cfg.n_embd, cfg.layer_norm_epsilon, block.pp("ln_1"), xs)
        seen[f"h.{i}.ln_1"] = xs
        xs, seen[f"h.{i}.attn.merged"] = attention(cfg, block.pp("attn"), xs)
        seen[f"h.{i}.attn.c_proj"] = xs
        xs = residual + xs
        residual = xs
        xs = layer_norm(cfg.n_embd, cfg.layer_norm_epsilon, block.pp("ln_2"), xs)
        seen[f"h.{i}.ln_2"] = xs
        xs = residual + mlp(cfg, block.pp("mlp"), xs)
        seen[f"h.{i}"] = xs
    xs = layer_norm(cfg.n_embd, cfg.layer_norm_epsilon, vb.pp("ln_f"), xs)
    return seen | {"ln_f": xs, "logits": np.matmul(xs, wte.T)}
