"""In the manner of picoGPT: a few functions on one sequence, nested dictionaries, and NumPy's stray float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npgpt.config import Config
from npgpt.parameters import Array

ROUNDS = "float32"
Params = dict[str, Any]


def nested(arrays: Mapping[str, Array]) -> Params:
    """Turn h.0.attn.c_attn.weight into params["h"]["0"]["attn"]["c_attn"]["weight"]."""
    params: Params = {}
    for name, array in arrays.items():
        *path, last = name.split(".")
        place = params
        for key in path:
            place = place.setdefault(key, {})
        place[last] = array
    return params


def gelu(x: Array) -> Any:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x: Array) -> Any:
    exp_x = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return exp_x / np.sum(exp_x, axis=-1, keepdims=True)


def layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Any:
    mean = np.mean(x, axis=-1, keepdims=True)
    variance = np.var(x, axis=-1, keepdims=True)
    return weight * ((x - mean) / np.sqrt(variance + eps)) + bias


def linear(x: Array, weight: Array, bias: Array) -> Any:
    return x @ weight + bias


def ffn(x: Array, c_fc: Params, c_proj: Params) -> Any:
    return linear(gelu(linear(x, **c_fc)), **c_proj)


def attention(q: Array, k: Array, v: Array, mask: Array) -> Any:
    return softmax(q @ k.T / np.sqrt(q.shape[-1]) + mask) @ v


def mha(x: Array, c_attn: Params, c_proj: Params, n_head: int) -> Any:
    x = linear(x, **c_attn)
    heads = [np.split(part, n_head, axis=-1) for part in np.split(x, 3, axis=-1)]
    causal_mask = (1 - np.tri(len(x), dtype=x.dtype)) * -1e10
    out_heads = [attention(q, k, v, causal_mask) for q, k, v in zip(*heads, strict=True)]
    return linear(np.hstack(out_heads), **c_proj)


def block(x: Array, mlp: Params, attn: Params, ln_1: Params, ln_2: Params, n_head: int) -> Any:
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head)
    return x + ffn(layer_norm(x, **ln_2), **mlp)


def gpt2(inputs: NDArray[Any], params: Params, n_head: int) -> tuple[Any, list[Any]]:
    x = params["wte"]["weight"][inputs] + params["wpe"]["weight"][range(len(inputs))]
    states = [x]
    for layer in sorted(params["h"], key=int):
        x = block(x, **params["h"][layer], n_head=n_head)
        states.append(x)
    states[-1] = layer_norm(x, **params["ln_f"])
    return states[-1] @ params["wte"]["weight"].T, states


def run(arrays: Mapping[str, Array], config: Config, ids: NDArray[Any]) -> dict[str, Any]:
    """Logits and hidden_states.N, row by row."""
    rows = [gpt2(row, nested(arrays), config.n_head) for row in ids]
    states = {f"hidden_states.{n}": np.stack([row[1][n] for row in rows]) for n in range(len(rows[0][1]))}
    return states | {"logits": np.stack([logits for logits, _ in rows])}
