"""In the manner of OpenAI's TensorFlow model, in NumPy: variable scopes, conv1d, states split and merged, a past."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npgpt.config import Config
from npgpt.parameters import Array

ROUNDS = "float32"


class Scope:
    """A place in the tree of variables, which keeps what is computed there by the name of the place."""

    def __init__(self, variables: Mapping[str, Array], kept: dict[str, Any], path: str = "") -> None:
        self.variables, self.kept, self.path = variables, kept, path

    def __call__(self, name: str) -> Scope:
        return Scope(self.variables, self.kept, f"{self.path}.{name}".lstrip("."))

    def get(self, name: str) -> Any:
        return self.variables[f"{self.path}.{name}"]

    def keep(self, x: Any) -> Any:
        self.kept[self.path] = x
        return x


def gelu(x: Array) -> Any:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def softmax(x: Array, axis: int = -1) -> Any:
    x = x - x.max(axis=axis, keepdims=True)
    ex = np.exp(x)
    return ex / ex.sum(axis=axis, keepdims=True)


def norm(x: Array, scope: Scope, epsilon: float = 1e-5) -> Any:
    u = x.mean(axis=-1, keepdims=True)
    s = np.square(x - u).mean(axis=-1, keepdims=True)
    x = (x - u) * (1 / np.sqrt(s + epsilon))
    return scope.keep(x * scope.get("weight") + scope.get("bias"))


def split_states(x: Array, n: int) -> Array:
    *start, m = x.shape
    return x.reshape(*start, n, m // n)


def merge_states(x: Array) -> Array:
    *start, a, b = x.shape
    return x.reshape(*start, a * b)


def split_heads(x: Array, n_head: int) -> Array:
    return split_states(x, n_head).transpose(0, 2, 1, 3)


def merge_heads(x: Array) -> Array:
    return merge_states(x.transpose(0, 2, 1, 3))


def conv1d(x: Array, scope: Scope) -> Any:
    *start, nx = x.shape
    w, b = scope.get("weight"), scope.get("bias")
    return scope.keep((x.reshape(-1, nx) @ w + b).reshape(*start, w.shape[-1]))


def attention_mask(nd: int, ns: int) -> Array:
    i, j = np.arange(nd)[:, None], np.arange(ns)
    return (i >= j - ns + nd).astype(np.float32)


def attn(x: Array, scope: Scope, n_head: int) -> Any:
    q, k, v = (split_heads(part, n_head) for part in np.split(conv1d(x, scope("c_attn")), 3, axis=2))
    w = q @ k.transpose(0, 1, 3, 2)
    w = w * (1 / math.sqrt(v.shape[-1]))
    b = attention_mask(w.shape[2], w.shape[3])
    w = scope("scores").keep(w * b - 1e10 * (1 - b))
    a = scope("weights").keep(softmax(w)) @ v
    return conv1d(merge_heads(scope("heads").keep(a)), scope("c_proj"))


def mlp(x: Array, scope: Scope) -> Any:
    h = scope("act").keep(gelu(conv1d(x, scope("c_fc"))))
    return conv1d(h, scope("c_proj"))


def block(x: Array, scope: Scope, n_head: int) -> Any:
    a = attn(norm(x, scope("ln_1")), scope("attn"), n_head)
    x = scope("attn")("residual").keep(x + a)
    m = mlp(norm(x, scope("ln_2")), scope("mlp"))
    return scope.keep(x + m)


def run(arrays: Mapping[str, Array], config: Config, ids: NDArray[Any]) -> dict[str, Any]:
    """Logits and every scope's output."""
    kept: dict[str, Any] = {}
    model = Scope(arrays, kept)
    wpe, wte = model("wpe").get("weight"), model("wte").get("weight")
    h = model("embedding").keep(wte[ids] + wpe[np.arange(ids.shape[1])])
    for layer in range(config.n_layer):
        h = block(h, model("h")(str(layer)), config.n_head)
    h = norm(h, model("ln_f"))
    return kept | {"logits": np.matmul(h, wte.T)}
