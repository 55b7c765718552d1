"""In the manner of llm.c's train_gpt2.c: the calls of c_kernels.py in their order, forwards and backwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npgpt.config import Config
from npgpt.oracle.arithmetic import rounded
from npgpt.parameters import Array
from tests.support.backward import c_kernels as c

Ids = NDArray[Any]
Store = Callable[..., None]  # rounds buffers to the dtype in which the program keeps them
PER_LAYER = {  # size of a layer's part in C's, and whether it is [OC, C]
    "ln1": 1, "mean1": 0, "rstd1": 0, "qkv": 3, "atty": 1, "attproj": 1, "residual2": 1,
    "ln2": 1, "mean2": 0, "rstd2": 0, "fcproj": 1, "residual3": 1,
}  # fmt: skip


def activations(config: Config, B: int, T: int, dtype: Any) -> Any:
    """All activations, or all their gradients, as zeros: those of layers are [L, …], each of which is a flat buffer."""
    N, C, L, F, V = B * T, config.n_embd, config.n_layer, config.inner_width, config.vocab_size
    sizes = {name: N * (width * C or 1) for name, width in PER_LAYER.items()}
    sizes |= dict.fromkeys(("preatt", "att"), B * config.n_head * T * T) | dict.fromkeys(("fch", "fch_gelu"), N * F)
    acts = {name: np.zeros((L, size), dtype) for name, size in sizes.items()}
    whole = {"encoded": N * C, "lnf": N * C, "meanf": N, "rstdf": N, "logits": N * V, "probs": N * V, "losses": N}
    return SimpleNamespace(**acts, **{name: np.zeros(size, dtype) for name, size in whole.items()})


NAMES = {
    "ln_1.weight": "ln1w", "ln_1.bias": "ln1b", "attn.c_attn.weight": "qkvw", "attn.c_attn.bias": "qkvb",
    "attn.c_proj.weight": "attprojw", "attn.c_proj.bias": "attprojb", "ln_2.weight": "ln2w", "ln_2.bias": "ln2b",
    "mlp.c_fc.weight": "fcw", "mlp.c_fc.bias": "fcb", "mlp.c_proj.weight": "fcprojw", "mlp.c_proj.bias": "fcprojb",
}  # fmt: skip


def parameters(arrays: Mapping[str, Array], config: Config) -> Any:
    """The weights as llm.c holds them: [L, …], matrices [OC, C]; lm_head is wte itself if it is tied."""
    turned = {name: array.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else array
              for name, array in arrays.items()}  # fmt: skip
    p = {short: np.stack([turned[f"h.{layer}.{name}"].ravel() for layer in range(config.n_layer)])
         for name, short in NAMES.items()}  # fmt: skip
    p |= {"wte": arrays["wte.weight"].ravel(), "wpe": arrays["wpe.weight"].ravel()}
    p |= {"lnfw": arrays["ln_f.weight"].ravel(), "lnfb": arrays["ln_f.bias"].ravel()}
    return SimpleNamespace(**p, lm_head=p["wte"] if config.tie_word_embeddings else arrays["lm_head.weight"].ravel())


def gpt2_forward(p: Any, a: Any, config: Config, inputs: Ids, targets: Ids, B: int, T: int, store: Store) -> float:
    C, L, NH, V, F, N = config.n_embd, config.n_layer, config.n_head, config.vocab_size, config.inner_width, B * T
    scale, eps = 1.0 / math.sqrt(C // NH), config.layer_norm_epsilon
    c.encoder_forward(a.encoded, inputs, p.wte, p.wpe, B, T, C)
    store(a.encoded)
    for l in range(L):  # noqa: E741
        residual = a.residual3[l - 1] if l else a.encoded
        c.layernorm_forward(a.ln1[l], a.mean1[l], a.rstd1[l], residual, p.ln1w[l], p.ln1b[l], eps, N, C)
        store(a.ln1[l])
        c.matmul_forward(a.qkv[l], a.ln1[l], p.qkvw[l], p.qkvb[l], N, C, 3 * C)
        store(a.qkv[l])
        c.attention_forward(a.atty[l], a.preatt[l], a.att[l], a.qkv[l], scale, B, T, C, NH)
        store(a.atty[l], a.preatt[l], a.att[l])
        c.matmul_forward(a.attproj[l], a.atty[l], p.attprojw[l], p.attprojb[l], N, C, C)
        store(a.attproj[l])
        c.residual_forward(a.residual2[l], residual, a.attproj[l])
        store(a.residual2[l])
        c.layernorm_forward(a.ln2[l], a.mean2[l], a.rstd2[l], a.residual2[l], p.ln2w[l], p.ln2b[l], eps, N, C)
        store(a.ln2[l])
        c.matmul_forward(a.fch[l], a.ln2[l], p.fcw[l], p.fcb[l], N, C, F)
        store(a.fch[l])
        c.gelu_forward(a.fch_gelu[l], a.fch[l])
        store(a.fch_gelu[l])
        c.matmul_forward(a.fcproj[l], a.fch_gelu[l], p.fcprojw[l], p.fcprojb[l], N, F, C)
        store(a.fcproj[l])
        c.residual_forward(a.residual3[l], a.residual2[l], a.fcproj[l])
        store(a.residual3[l])
    c.layernorm_forward(a.lnf, a.meanf, a.rstdf, a.residual3[L - 1], p.lnfw, p.lnfb, eps, N, C)
    store(a.lnf)
    c.matmul_forward(a.logits, a.lnf, p.lm_head, None, N, C, V)
    store(a.logits)
    c.softmax_forward(a.probs, a.logits, N, V)
    c.crossentropy_forward(a.losses, a.probs, targets, N, V)
    return float(a.losses.sum() / np.count_nonzero(targets != c.IGNORED))


def gpt2_backward(p: Any, g: Any, a: Any, d: Any, config: Config, inputs: Ids, targets: Ids, store: Store) -> None:
    """Add the gradients of parameters to g and those of activations to d."""
    B, T = inputs.shape
    inputs, targets = inputs.ravel(), targets.ravel()
    C, L, NH, V, F, N = config.n_embd, config.n_layer, config.n_head, config.vocab_size, config.inner_width, B * T
    scale = 1.0 / math.sqrt(C // NH)
    d.losses[:] = 1.0 / np.count_nonzero(targets != c.IGNORED)
    c.crossentropy_softmax_backward(d.logits, d.losses, a.probs, targets, N, V)
    store(d.logits)
    c.matmul_backward(d.lnf, g.lm_head, None, d.logits, a.lnf, p.lm_head, N, C, V)
    store(d.lnf, g.lm_head)
    c.layernorm_backward(d.residual3[L - 1], g.lnfw, g.lnfb, d.lnf, a.residual3[L - 1], p.lnfw, a.meanf, a.rstdf, C)
    store(d.residual3[L - 1], g.lnfw, g.lnfb)
    for l in reversed(range(L)):  # noqa: E741
        residual, dresidual = (a.residual3[l - 1], d.residual3[l - 1]) if l else (a.encoded, d.encoded)
        c.residual_backward(d.residual2[l], d.fcproj[l], d.residual3[l])
        c.matmul_backward(d.fch_gelu[l], g.fcprojw[l], g.fcprojb[l], d.fcproj[l], a.fch_gelu[l], p.fcprojw[l], N, F, C)
        store(d.fch_gelu[l], g.fcprojw[l], g.fcprojb[l])
        c.gelu_backward(d.fch[l], a.fch[l], d.fch_gelu[l])
        store(d.fch[l])
        c.matmul_backward(d.ln2[l], g.fcw[l], g.fcb[l], d.fch[l], a.ln2[l], p.fcw[l], N, C, F)
        store(d.ln2[l], g.fcw[l], g.fcb[l])
        c.layernorm_backward(
            d.residual2[l], g.ln2w[l], g.ln2b[l], d.ln2[l], a.residual2[l], p.ln2w[l], a.mean2[l], a.rstd2[l], C
        )
        store(d.residual2[l], g.ln2w[l], g.ln2b[l])
        c.residual_backward(dresidual, d.attproj[l], d.residual2[l])
        c.matmul_backward(d.atty[l], g.attprojw[l], g.attprojb[l], d.attproj[l], a.atty[l], p.attprojw[l], N, C, C)
        store(d.atty[l], g.attprojw[l], g.attprojb[l])
        c.attention_backward(d.qkv[l], d.preatt[l], d.att[l], d.atty[l], a.qkv[l], a.att[l], scale, B, T, NH)
        store(d.qkv[l], d.preatt[l], d.att[l])
        c.matmul_backward(d.ln1[l], g.qkvw[l], g.qkvb[l], d.qkv[l], a.ln1[l], p.qkvw[l], N, C, 3 * C)
        store(d.ln1[l], g.qkvw[l], g.qkvb[l])
        c.layernorm_backward(dresidual, g.ln1w[l], g.ln1b[l], d.ln1[l], residual, p.ln1w[l], a.mean1[l], a.rstd1[l], C)
        store(dresidual, g.ln1w[l], g.ln1b[l])
    c.encoder_backward(g.wte, g.wpe, d.encoded, inputs, B, T, C)
    store(g.wte, g.wpe)


STAGES = {  # by npgpt's name: the buffer of it and of its gradient, and the size of the last axis in C's
    "ln_1": ("ln1", 1), "attn.c_attn": ("qkv", 3), "attn.merged": ("atty", 1), "attn.c_proj": ("attproj", 1),
    "attn.residual": ("residual2", 1), "ln_2": ("ln2", 1), "mlp.c_proj": ("fcproj", 1), "": ("residual3", 1),
}  # fmt: skip


def shown(buffers: Any, prefix: str, config: Config, B: int, T: int) -> dict[str, Array]:
    """Activations or their gradients in their shapes, by npgpt's names."""
    C, F, NH = config.n_embd, config.inner_width, config.n_head
    stages = {"embedding": buffers.encoded.reshape(B, T, C), "ln_f": buffers.lnf.reshape(B, T, C)}
    stages["logits"] = buffers.logits.reshape(B, T, config.vocab_size)
    for l in range(config.n_layer):  # noqa: E741
        for name, (buffer, width) in STAGES.items():
            stages[f"h.{l}.{name}".rstrip(".")] = getattr(buffers, buffer)[l].reshape(B, T, width * C)
        stages |= {
            f"h.{l}.mlp.c_fc": buffers.fch[l].reshape(B, T, F),
            f"h.{l}.mlp.act": buffers.fch_gelu[l].reshape(B, T, F),
        }
        stages[f"h.{l}.attn.scores"] = buffers.preatt[l].reshape(B, NH, T, T)
        stages[f"h.{l}.attn.weights"] = buffers.att[l].reshape(B, NH, T, T)
    return {prefix + name: stage for name, stage in stages.items()}


def canonical(g: Any, config: Config) -> dict[str, Array]:
    """The gradients of parameters by npgpt's names, matrices [in, out]."""
    C, L, F = config.n_embd, config.n_layer, config.inner_width
    outs = {"attn.c_attn.weight": 3 * C, "attn.c_proj.weight": C, "mlp.c_fc.weight": F, "mlp.c_proj.weight": C}
    grads = {"d.wte.weight": g.wte.reshape(-1, C), "d.wpe.weight": g.wpe.reshape(-1, C)}
    grads |= {"d.ln_f.weight": g.lnfw, "d.ln_f.bias": g.lnfb}
    if not config.tie_word_embeddings:
        grads["d.lm_head.weight"] = g.lm_head.reshape(-1, C)
    for l in range(L):  # noqa: E741
        for name, short in NAMES.items():
            grad = getattr(g, short)[l]
            grads[f"d.h.{l}.{name}"] = grad.reshape(outs[name], -1).T if name in outs else grad
    return grads


def run(arrays: Mapping[str, Array], config: Config, ids: Ids, targets: Ids, dtype: str = "float32") -> dict[str, Any]:
    """The loss, stages, and the gradients of both; in bfloat16, every kernel's results are rounded."""

    def store(*buffers: Array) -> None:
        if dtype == "bfloat16":
            for buffer in buffers:
                buffer[:] = rounded(buffer, dtype)

    B, T = ids.shape
    p = parameters({name: rounded(array, dtype) for name, array in arrays.items()}, config)
    g = parameters({name: np.zeros_like(rounded(array, dtype)) for name, array in arrays.items()}, config)
    a, d = (activations(config, B, T, "float64" if dtype == "float64" else "float32") for _ in range(2))
    loss = gpt2_forward(p, a, config, ids.ravel(), targets.ravel(), B, T, store)
    gpt2_backward(p, g, a, d, config, ids, targets, store)
    stages = shown(a, "", config, B, T) | shown(d, "d.", config, B, T)
    return {"loss": np.array([loss], p.wte.dtype), **stages, **canonical(g, config)}
