"""In the manner of JAX: pure functions over a tree of parameters, written for one sequence and mapped over rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from npgpt.config import Config
from npgpt.parameters import Array


class Affine(NamedTuple):
    """A kernel or scale, and a bias."""

    scale: Array
    bias: Array


class Layer(NamedTuple):
    """One block's parameters."""

    norm_1: Affine
    qkv: Affine
    out: Affine
    norm_2: Affine
    up: Affine
    down: Affine


class Params(NamedTuple):
    """The tree."""

    tokens: Array
    positions: Array
    layers: list[Layer]
    norm: Affine


def tree(arrays: Mapping[str, Array], config: Config) -> Params:
    def affine(name: str) -> Affine:
        return Affine(arrays[f"{name}.weight"], arrays[f"{name}.bias"])

    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    layers = [Layer(*(affine(f"h.{i}.{part}") for part in parts)) for i in range(config.n_layer)]
    return Params(arrays["wte.weight"], arrays["wpe.weight"], layers, affine("ln_f"))


def vmap(function: Callable[[Any], tuple[Any, Any]], rows: NDArray[Any]) -> tuple[Any, Any]:
    outputs = [function(row) for row in rows]
    return np.stack([logits for logits, _ in outputs]), [np.stack(each) for each in zip(*(s for _, s in outputs))]  # noqa: B905


def dense(p: Affine, x: Array) -> Any:
    return np.dot(x, p.scale) + p.bias


def layer_norm(p: Affine, x: Array, eps: float = 1e-5) -> Any:
    mean = np.mean(x, axis=-1, keepdims=True)
    mean2 = np.mean(x * x, axis=-1, keepdims=True)
    rstd = 1 / np.sqrt(mean2 - mean * mean + eps)
    return (x - mean) * rstd * p.scale + p.bias


def gelu(x: Array) -> Any:
    c = np.asarray(np.sqrt(2 / np.pi), x.dtype)
    return x * (np.asarray(1, x.dtype) + np.tanh(c * (x + 0.044715 * (x * x * x)))) / 2


def softmax(x: Array) -> Any:
    unnormalized = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return unnormalized / np.sum(unnormalized, axis=-1, keepdims=True)


def self_attention(p: Layer, x: Array, n_head: int) -> Any:
    length, width = x.shape
    q, k, v = np.split(dense(p.qkv, x), 3, axis=-1)
    q, k, v = (a.reshape(length, n_head, width // n_head) for a in (q, k, v))
    logits = np.einsum("thd,Thd->htT", q, k) * np.asarray((width // n_head) ** -0.5, x.dtype)
    causal = np.tri(length, dtype=bool)
    logits = np.where(causal, logits, np.asarray(-1e30, x.dtype))
    attn = np.einsum("htT,Thd->thd", softmax(logits), v)
    return dense(p.out, attn.reshape(length, width))


def apply_block(p: Layer, x: Array, n_head: int) -> Any:
    x = x + self_attention(p, layer_norm(p.norm_1, x), n_head)
    hidden = gelu(dense(p.up, layer_norm(p.norm_2, x)))
    return x + dense(p.down, hidden)


def forward(params: Params, n_head: int, tokens: NDArray[Any]) -> tuple[Any, list[Any]]:
    h = params.tokens[tokens] + params.positions[np.arange(tokens.shape[0])]
    states = [h]
    for p in params.layers:
        h = apply_block(p, h, n_head)
        states.append(h)
    h = layer_norm(params.norm, h)
    return np.einsum("tc,vc->tv", h, params.tokens), [*states, h]


def run(arrays: Mapping[str, Array], config: Config, ids: NDArray[Any]) -> dict[str, Any]:
    """Logits and the stream between blocks."""
    logits, states = vmap(partial(forward, tree(arrays, config), config.n_head), ids)
    names = ["embedding", *(f"h.{layer}" for layer in range(len(states) - 2)), "ln_f"]
    return dict(zip(names, states, strict=True)) | {"logits": logits}
