"""In the manner of TransformerLens: a matrix for each head, einsum everywhere, and hooks on all that passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npgpt.config import Config
from npgpt.parameters import Array

ROUNDS = "float32"


def convert(arrays: Mapping[str, Array], config: Config) -> dict[str, Any]:
    """Weights by head: W_Q [H, C, D], b_Q [H, D], W_O [H, D, C]."""
    n, d = config.n_head, config.head_width
    state: dict[str, Any] = {"W_E": arrays["wte.weight"], "W_pos": arrays["wpe.weight"]}
    for layer in range(config.n_layer):
        ours, theirs = f"h.{layer}", f"blocks.{layer}"
        W, b = arrays[f"{ours}.attn.c_attn.weight"], arrays[f"{ours}.attn.c_attn.bias"]
        for letter, w, bias in zip("QKV", np.split(W, 3, axis=1), np.split(b, 3), strict=True):
            state[f"{theirs}.W_{letter}"] = w.reshape(-1, n, d).transpose(1, 0, 2)
            state[f"{theirs}.b_{letter}"] = bias.reshape(n, d)
        state[f"{theirs}.W_O"] = arrays[f"{ours}.attn.c_proj.weight"].reshape(n, d, -1)
        state[f"{theirs}.b_O"] = arrays[f"{ours}.attn.c_proj.bias"]
        for side, name in (("in", "c_fc"), ("out", "c_proj")):
            state[f"{theirs}.W_{side}"] = arrays[f"{ours}.mlp.{name}.weight"]
            state[f"{theirs}.b_{side}"] = arrays[f"{ours}.mlp.{name}.bias"]
        for number in (1, 2):
            state[f"{theirs}.ln{number}.w"] = arrays[f"{ours}.ln_{number}.weight"]
            state[f"{theirs}.ln{number}.b"] = arrays[f"{ours}.ln_{number}.bias"]
    return state | {"ln_final.w": arrays["ln_f.weight"], "ln_final.b": arrays["ln_f.bias"], "W_U": state["W_E"].T}


def gelu_new(x: Array) -> Any:
    return np.float32(0.5) * x * (1 + np.tanh(np.float32(np.sqrt(2.0 / np.pi)) * (x + 0.044715 * x * x * x)))


def layer_norm(x: Array, w: Array, b: Array, eps: float) -> Any:
    x = x - x.mean(-1, keepdims=True)
    scale = np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return x / scale * w + b


def attention(x: Array, state: dict[str, Any], block: str, config: Config, cache: dict[str, Any]) -> Any:
    q = np.einsum("bpm,hmd->bphd", x, state[f"{block}.W_Q"]) + state[f"{block}.b_Q"]
    k = np.einsum("bpm,hmd->bphd", x, state[f"{block}.W_K"]) + state[f"{block}.b_K"]
    v = np.einsum("bpm,hmd->bphd", x, state[f"{block}.W_V"]) + state[f"{block}.b_V"]
    cache |= {f"{block}.attn.hook_{letter}": part for letter, part in zip("qkv", (q, k, v), strict=True)}
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.float32(config.head_width**0.5)
    scores = np.where(np.tri(x.shape[1], dtype=bool), scores, -np.inf)
    pattern = np.exp(scores - scores.max(-1, keepdims=True))
    pattern = pattern / pattern.sum(-1, keepdims=True)
    z = np.einsum("bhqk,bkhd->bqhd", pattern, v)
    cache |= {f"{block}.attn.hook_attn_scores": scores, f"{block}.attn.hook_pattern": pattern}
    cache[f"{block}.attn.hook_z"] = z
    return np.einsum("bphd,hdm->bpm", z, state[f"{block}.W_O"]) + state[f"{block}.b_O"]


def run(arrays: Mapping[str, Array], config: Config, ids: NDArray[Any]) -> dict[str, Any]:
    """Logits and the cache of activations."""
    state, eps = convert(arrays, config), config.layer_norm_epsilon
    cache: dict[str, Any] = {"hook_embed": state["W_E"][ids], "hook_pos_embed": state["W_pos"][None, : ids.shape[1]]}
    resid = cache["hook_embed"] + cache["hook_pos_embed"]
    for layer in range(config.n_layer):
        block = f"blocks.{layer}"
        cache[f"{block}.hook_resid_pre"] = resid
        normed = layer_norm(resid, state[f"{block}.ln1.w"], state[f"{block}.ln1.b"], eps)
        attn_out = attention(normed, state, block, config, cache)
        resid = resid + attn_out
        cache |= {f"{block}.hook_attn_out": attn_out, f"{block}.hook_resid_mid": resid}
        normed = layer_norm(resid, state[f"{block}.ln2.w"], state[f"{block}.ln2.b"], eps)
        pre = normed @ state[f"{block}.W_in"] + state[f"{block}.b_in"]
        post = gelu_new(pre)
        mlp_out = post @ state[f"{block}.W_out"] + state[f"{block}.b_out"]
        resid = resid + mlp_out
        cache |= {f"{block}.mlp.hook_pre": pre, f"{block}.mlp.hook_post": post, f"{block}.hook_mlp_out": mlp_out}
    resid = layer_norm(resid, state["ln_final.w"], state["ln_final.b"], eps)
    del cache[f"blocks.{config.n_layer - 1}.hook_resid_pre"]  # the output of the block before, which has no other hook
    return cache | {"logits": resid @ state["W_U"]}
