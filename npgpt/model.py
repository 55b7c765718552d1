"""GPT-2's forward pass in NumPy, from top to bottom: what is read here is what runs.

    token_ids [B, T] → wte + wpe → n_layer × block → ln_f → output head → logits [B, T, V]

Shapes: B rows, T new tokens, S tokens seen (cached and new), C n_embd, H n_head, D = C / H head width, F inner
width of the MLP, V vocab_size. Names are the checkpoint's. Arrays are all float32 or all float64: constants are
Python floats, which take an array's dtype, while NumPy's own scalars would turn float32 into float64.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; openai/gpt-2, src/model.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from . import kernels
from .special import erf

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from . import parameters as P
    from .cache import KVCache
    from .config import Config
    from .parameters import Array, Record

MLP_BLOCK = 2**16  # elements at a time through the activation, so that they stay in a core's L2 cache


def softmax(x: Array, out: Array | None = None) -> Array:
    """exp(x) / Σ exp(x) over the last axis, any shape; `out` may be x itself.

    Less its maximum a row has the same softmax, and exp cannot overflow.
    """
    out = np.subtract(x, x.max(axis=-1, keepdims=True), out=out)
    np.exp(out, out=out)
    out /= out.sum(axis=-1, keepdims=True)
    return out


def gelu(x: Array, out: Array | None = None) -> Array:
    """GPT-2's activation ½ x (1 + tanh(√(2/π) (x + 0.044715 x³))), any shape; `out` may be x itself.

    The tanh form of Hendrycks & Gimpel 2016, "Gaussian Error Linear Units". Products, since x**3 is 600 times slower.
    """
    inner = x * x
    inner *= 0.044715
    inner += 1
    inner *= x
    inner *= math.sqrt(2 / math.pi)
    np.tanh(inner, out=inner)
    inner += 1
    inner *= x
    return np.multiply(inner, 0.5, out=out)


def gelu_erf(x: Array, out: Array | None = None) -> Array:
    """The exact form ½ x (1 + erf(x / √2)), any shape: nanoGPT's. It differs from GPT-2's by up to 4.7e-4."""
    inner = erf(x * math.sqrt(0.5))
    inner += 1
    inner *= x
    return np.multiply(inner, 0.5, out=out)


ACTIVATIONS = {"gelu_new": gelu, "gelu_pytorch_tanh": gelu, "gelu": gelu_erf}


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
    """weight · (x − mean) / √(variance + epsilon) + bias over the last axis: x [..., C], weight and bias [C].

    The variance is the mean of squares, not divided by C − 1. Ba, Kiros & Hinton 2016, "Layer Normalization".
    """
    out: Array = x - x.mean(axis=-1, keepdims=True)
    variance = np.vecdot(out, out)[..., None] / x.shape[-1]
    out /= np.sqrt(variance + epsilon)
    out *= weight
    out += bias
    return out


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x [..., in] @ weight [in, out] + bias [out] → [..., out], as one product: in 3-D NumPy would do B of them."""
    y = kernels.product(x.reshape(-1, x.shape[-1]), weight)
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], weight.shape[1])


def split_heads(x: Array, n_head: int) -> Array:
    """[B, T, C] → [B, H, T, D]: head h has columns h·D to (h+1)·D of every token.

    The reshape alone would have the right size but hand head 0 the first tokens, whole: the transpose is the split.
    """
    B, T, C = x.shape
    return x.reshape(B, T, n_head, C // n_head).transpose(0, 2, 1, 3)


def merge_heads(x: Array) -> Array:
    """[B, H, T, D] → [B, T, C], the inverse of split_heads."""
    B, H, T, D = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, T, H * D)


def attention(q: Array, k: Array, v: Array, scale: float, record: Record | None = None) -> Array:
    """softmax(scale · q kᵀ) v in every head, where a query sees its own key and those before: [B, H, T, D].

    q is [B, H, T, D], k and v are [B, H, S, D]. The causal mask is aligned to the lower right corner: query t is token
    S − T + t. A long prompt goes through the same formula by tiles (kernels.attention), so that the T × S square is
    never stored, unless it is to be recorded. Vaswani et al. 2017, "Attention Is All You Need", 3.2.1.
    """
    T, S = q.shape[2], k.shape[2]
    if T >= kernels.QUERIES and record is None:
        return kernels.attention(q, k, v, scale)
    scores = q @ k.swapaxes(2, 3)  # [B, H, T, S]
    scores *= scale
    np.copyto(scores, -np.inf, where=~np.tri(T, S, S - T, dtype=bool))
    weights = softmax(tap(record, "attn.scores", scores), out=scores)
    return tap(record, "attn.weights", weights) @ v


def self_attention(
    x: Array, p: P.Attention, config: Config, layer: int, cache: KVCache | None = None, record: Record | None = None
) -> Array:
    """Multi-head causal self-attention of block `layer`, x [B, T, C] → [B, T, C]."""
    c_attn = tap(record, "attn.c_attn", linear(x, *p.c_attn))  # [B, T, 3C]
    C = x.shape[-1]
    q, k, v = (split_heads(c_attn[..., start : start + C], config.n_head) for start in (0, C, 2 * C))
    for name, part in zip("qkv", (q, k, v), strict=True):
        tap(record, f"attn.{name}", part)
    if cache is not None:
        k, v = cache.extend(layer, k, v)  # [B, H, S, D]
    heads = attention(q, k, v, config.attention_scale(layer), record)
    merged = merge_heads(tap(record, "attn.heads", heads))
    return tap(record, "attn.c_proj", linear(merged, *p.c_proj))


def mlp(x: Array, p: P.MLP, activation_function: str, record: Record | None = None) -> Array:
    """Up to F, activation, down again, x [B, T, C] → [B, T, C]."""
    h = tap(record, "mlp.c_fc", linear(x, *p.c_fc))  # [B, T, F]
    rows = h.reshape(-1, h.shape[-1])
    step = max(1, MLP_BLOCK // h.shape[-1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        ACTIVATIONS[activation_function](part, out=part)
    return tap(record, "mlp.c_proj", linear(tap(record, "mlp.act", h), *p.c_proj))


def block(
    x: Array, p: P.Block, config: Config, layer: int, cache: KVCache | None = None, record: Record | None = None
) -> Array:
    """Block `layer`, x [B, T, C] → [B, T, C]: attention and MLP each read a normalised copy and add to the stream."""
    normal = tap(record, "ln_1", layer_norm(x, *p.ln_1, config.layer_norm_epsilon))
    x = tap(record, "attn.residual", x + self_attention(normal, p.attn, config, layer, cache, record))
    normal = tap(record, "ln_2", layer_norm(x, *p.ln_2, config.layer_norm_epsilon))
    return x + mlp(normal, p.mlp, config.activation_function, record)


def forward(
    parameters: P.Parameters,
    config: Config,
    token_ids: ArrayLike,
    cache: KVCache | None = None,
    record: Record | None = None,
    *,
    logits_from: int = 0,
) -> Array:
    """Logits of every next token: token_ids [T] or [B, T] → [B, T, V].

    logits_from: the token from which on they are wanted, as in a slice: -1 for the last alone. cache: holds the tokens
    before these and takes these in. record(name, array) receives a copy of every intermediate, under Hugging Face's
    module paths: "h.0.attn.c_attn". Raises NpgptError for ids or a cache that do not fit (Config.check_token_ids,
    KVCache.extend).
    """
    past = 0 if cache is None else cache.past(config)
    token_ids = config.check_token_ids(token_ids, past)
    T = token_ids.shape[1]
    wte = tap(record, "wte", parameters.wte.weight[token_ids])  # [B, T, C]
    wpe = tap(record, "wpe", parameters.wpe.weight[past : past + T])  # [T, C]
    x = tap(record, "embedding", wte + wpe)
    for layer, p in enumerate(parameters.h):
        x = tap(record, f"h.{layer}", block(x, p, config, layer, cache, within(record, f"h.{layer}.")))
    if cache is not None:
        cache.length += T
    x = tap(record, "ln_f", layer_norm(x[:, logits_from:], *parameters.ln_f, config.layer_norm_epsilon))
    return tap(record, "logits", linear(x, parameters.lm_head.weight.T))


def tap(record: Record | None, name: str, array: Array) -> Array:
    """Hand a copy to record, so that later steps in place do not reach it; give the array itself back."""
    if record is not None:
        record(name, array.copy())
    return array


def within(record: Record | None, prefix: str) -> Record | None:
    """The same record for names that lack the prefix."""
    return None if record is None else lambda name, array: record(prefix + name, array)
