"""In the manner of a server's decoder: prompt first, then token by token, with keys and values kept in a cache."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npgpt.config import Config
from npgpt.parameters import Array

CHUNKS = (5, 4, 1, 1, 1)  # tokens at a time


class KVCache:
    """Keys and values [B, H, N, D] of every layer, and how many tokens they hold."""

    def __init__(self, config: Config, rows: int) -> None:
        shape = (config.n_layer, rows, config.n_head, config.n_positions, config.head_width)
        self.k, self.v = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.length = 0

    def update(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        self.length += tokens


class Decoder:
    """Weights and sizes."""

    def __init__(self, weights: Mapping[str, Array], config: Config) -> None:
        self.w, self.config = weights, config

    def norm(self, name: str, x: Array) -> Any:
        x = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5)
        return x / scale * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def project(self, name: str, x: Array) -> Any:
        return x @ self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def attend(self, layer: int, x: Array, cache: KVCache) -> Any:
        B, T, C = x.shape
        H, D = self.config.n_head, self.config.head_width
        qkv = self.project(f"h.{layer}.attn.c_attn", x).reshape(B, T, 3, H, D)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        past = cache.length
        k, v = cache.update(layer, k, v)
        scores = q @ k.swapaxes(2, 3) / math.sqrt(D)
        visible = np.arange(k.shape[2])[None, :] <= past + np.arange(T)[:, None]
        scores = np.where(visible, scores, np.float32(-1e30))
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        out = (p @ v).swapaxes(1, 2).reshape(B, T, C)
        return self.project(f"h.{layer}.attn.c_proj", out)

    def feed(self, layer: int, x: Array) -> Any:
        u = self.project(f"h.{layer}.mlp.c_fc", x)
        u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u * u * u)))
        return self.project(f"h.{layer}.mlp.c_proj", u)

    def step(self, ids: NDArray[Any], cache: KVCache) -> Any:
        positions = cache.length + np.arange(ids.shape[1])
        x = self.w["wte.weight"][ids] + self.w["wpe.weight"][positions]
        for layer in range(self.config.n_layer):
            x = x + self.attend(layer, self.norm(f"h.{layer}.ln_1", x), cache)
            x = x + self.feed(layer, self.norm(f"h.{layer}.ln_2", x))
        cache.advance(ids.shape[1])
        return self.norm("ln_f", x) @ self.w["wte.weight"].T


def run(arrays: Mapping[str, Array], config: Config, ids: NDArray[Any]) -> dict[str, Any]:
    """Logits of every step, side by side."""
    decoder = Decoder(arrays, config)
    cache = KVCache(config, len(ids))
    logits, at = [], 0
    for tokens in CHUNKS if sum(CHUNKS) == ids.shape[1] else (ids.shape[1],):
        logits.append(decoder.step(ids[:, at : at + tokens], cache))
        at += tokens
    return {"logits": np.concatenate(logits, axis=1)}
