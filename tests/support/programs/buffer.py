"""In the manner of llm.c: one flat buffer of parameters, offsets into it, and loops over rows and positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npgpt.config import Config
from npgpt.parameters import Array

ROUNDS = "float32"
ORDER = ["ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight"]
ORDER += ["attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias"]
ORDER += ["mlp.c_proj.weight", "mlp.c_proj.bias"]
GELU_SCALING_FACTOR = math.sqrt(2.0 / math.pi)


def flattened(arrays: Mapping[str, Array], L: int) -> tuple[Array, dict[str, tuple[int, tuple[int, ...]]]]:
    """The buffer, and by name the offset and shape; every kind of tensor lies layer after layer, matrices [OC, C]."""
    names = ["wte.weight", "wpe.weight", *(f"h.{layer}.{name}" for name in ORDER for layer in range(L))]
    parts, offsets, at = [], {}, 0
    for name in [*names, "ln_f.weight", "ln_f.bias"]:
        array = arrays[name].T if ".c_" in name and name.endswith("weight") else arrays[name]
        offsets[name] = (at, array.shape)
        parts.append(np.ascontiguousarray(array).ravel())
        at += array.size
    return np.concatenate(parts).astype(np.float32), offsets


def layernorm_forward(out: Array, inp: Array, weight: Array, bias: Array) -> None:
    eps = np.float32(1e-5)
    for b in range(inp.shape[0]):
        for t in range(inp.shape[1]):
            x = inp[b, t]
            m = x.sum() / len(x)
            v = ((x - m) * (x - m)).sum() / len(x)
            s = 1 / np.sqrt(v + eps)
            out[b, t] = s * (x - m) * weight + bias


def matmul_forward(out: Array, inp: Array, weight: Array, bias: Array | None) -> None:
    for b in range(inp.shape[0]):
        for t in range(inp.shape[1]):
            out[b, t] = (weight * inp[b, t]).sum(axis=1)
            if bias is not None:
                out[b, t] += bias


def attention_forward(out: Array, att: Array, inp: Array, NH: int) -> None:
    B, T, C3 = inp.shape
    C, hs = C3 // 3, C3 // 3 // NH
    scale = np.float32(1.0 / math.sqrt(hs))
    for b in range(B):
        for t in range(T):
            for h in range(NH):
                query_t = inp[b, t, h * hs : (h + 1) * hs]
                keys = inp[b, : t + 1, C + h * hs : C + (h + 1) * hs]
                values = inp[b, : t + 1, 2 * C + h * hs : 2 * C + (h + 1) * hs]
                preatt = (keys * query_t).sum(axis=1) * scale
                expv = np.exp(preatt - preatt.max())
                att[b, h, t, : t + 1] = expv / expv.sum()
                out[b, t, h * hs : (h + 1) * hs] = (values * att[b, h, t, : t + 1, None]).sum(axis=0)


def gelu_forward(out: Array, inp: Array) -> None:
    cube = np.float32(0.044715) * inp * inp * inp
    out[...] = np.float32(0.5) * inp * (1 + np.tanh(np.float32(GELU_SCALING_FACTOR) * (inp + cube)))


def run(arrays: Mapping[str, Array], config: Config, ids: NDArray[Any]) -> dict[str, Any]:
    """Logits and all activations, which are allocated before."""
    (B, T), C, L, NH, V = ids.shape, config.n_embd, config.n_layer, config.n_head, config.vocab_size
    buffer, offsets = flattened(arrays, L)

    def param(name: str) -> Array:
        offset, shape = offsets[name]
        return buffer[offset : offset + math.prod(shape)].reshape(shape)

    def alloc(*shape: int) -> Array:
        return np.zeros(shape, np.float32)

    acts: dict[str, Any] = {"embedding": param("wte.weight")[ids] + param("wpe.weight")[:T]}
    residual = acts["embedding"]
    for layer in range(L):
        h = f"h.{layer}"
        acts |= {f"{h}.{name}": alloc(B, T, C) for name in ("ln_1", "attn.merged", "attn.c_proj", "ln_2", "mlp.c_proj")}
        acts |= {f"{h}.attn.c_attn": alloc(B, T, 3 * C), f"{h}.attn.weights": alloc(B, NH, T, T)}
        acts |= {f"{h}.mlp.c_fc": alloc(B, T, config.inner_width), f"{h}.mlp.act": alloc(B, T, config.inner_width)}
        layernorm_forward(acts[f"{h}.ln_1"], residual, param(f"{h}.ln_1.weight"), param(f"{h}.ln_1.bias"))
        qkvw, qkvb = param(f"{h}.attn.c_attn.weight"), param(f"{h}.attn.c_attn.bias")
        matmul_forward(acts[f"{h}.attn.c_attn"], acts[f"{h}.ln_1"], qkvw, qkvb)
        attention_forward(acts[f"{h}.attn.merged"], acts[f"{h}.attn.weights"], acts[f"{h}.attn.c_attn"], NH)
        attprojw, attprojb = param(f"{h}.attn.c_proj.weight"), param(f"{h}.attn.c_proj.bias")
        matmul_forward(acts[f"{h}.attn.c_proj"], acts[f"{h}.attn.merged"], attprojw, attprojb)
        acts[f"{h}.attn.residual"] = residual2 = residual + acts[f"{h}.attn.c_proj"]
        layernorm_forward(acts[f"{h}.ln_2"], residual2, param(f"{h}.ln_2.weight"), param(f"{h}.ln_2.bias"))
        fcw, fcb = param(f"{h}.mlp.c_fc.weight"), param(f"{h}.mlp.c_fc.bias")
        matmul_forward(acts[f"{h}.mlp.c_fc"], acts[f"{h}.ln_2"], fcw, fcb)
        gelu_forward(acts[f"{h}.mlp.act"], acts[f"{h}.mlp.c_fc"])
        fcprojw, fcprojb = param(f"{h}.mlp.c_proj.weight"), param(f"{h}.mlp.c_proj.bias")
        matmul_forward(acts[f"{h}.mlp.c_proj"], acts[f"{h}.mlp.act"], fcprojw, fcprojb)
        acts[h] = residual = residual2 + acts[f"{h}.mlp.c_proj"]
    acts["ln_f"], acts["logits"] = alloc(B, T, C), alloc(B, T, V)
    layernorm_forward(acts["ln_f"], residual, param("ln_f.weight"), param("ln_f.bias"))
    matmul_forward(acts["logits"], acts["ln_f"], param("wte.weight"), None)
    return acts
