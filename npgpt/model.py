"""GPT-2's forward pass in NumPy, to be read from top to bottom. This is the code that runs.

    token_ids [B, T] → wte + wpe → n_layer × block → ln_f → output head → logits [B, T, V]

Shapes: B batch rows, T new tokens, S tokens in all (cached and new), C n_embd, H n_head, D = C / H head width,
F inner width of the MLP, V vocab_size. Names follow the checkpoint. Arrays are all float32 or all float64. Constants
are Python floats because NumPy's float64 scalars would promote float32 arrays to float64.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; openai/gpt-2, src/model.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from . import kernels
from .erf import erf
from .parameters import recorder

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from .cache import KVCache
    from .config import Config
    from .parameters import Array, Block, Padding, Parameters, Record, StageRecord


@kernels.by_row
def softmax(x: Array) -> Array:
    """Return exp(x) / Σ exp(x) over the last axis of x [..., n].

    Subtracting the row's maximum leaves softmax unchanged and keeps exp from overflowing.
    """
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@kernels.elementwise
def gelu(x: Array) -> Array:
    """Return GPT-2's activation ½ x (1 + tanh(√(2/π) (x + 0.044715 x³))), elementwise.

    The tanh form of Hendrycks & Gimpel 2016, "Gaussian Error Linear Units". x**3 would be 600 times slower.
    """
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


@kernels.elementwise
def gelu_erf(x: Array) -> Array:
    """Return the exact form ½ x (1 + erf(x / √2)), elementwise, as in nanoGPT. It differs by up to 4.7e-4."""
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


ACTIVATIONS = {"gelu_new": gelu, "gelu_pytorch_tanh": gelu, "gelu": gelu_erf}


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
    """Return weight · (x − mean) / √(variance + epsilon) + bias over the last axis: x [..., C], weight and bias [C].

    The sum of squares is divided by C, not by C − 1. Ba, Kiros & Hinton 2016, "Layer Normalization".
    """
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    return weight * (centred / np.sqrt(variance + epsilon)) + bias


def linear(x: Array, weight: Array, bias: Array) -> Array:
    """Return x [..., in] @ weight [in, out] + bias [out] → [..., out]."""
    return kernels.product(x, weight) + bias


def split_heads(x: Array, n_head: int) -> Array:
    """Split x [B, T, C] into heads [B, H, T, D]: head h gets columns h·D to (h+1)·D of every token.

    A reshape straight to [B, H, T, D] has the right shape but the wrong content: it gives head 0 the first tokens.
    """
    B, T, C = x.shape
    return x.reshape(B, T, n_head, C // n_head).transpose(0, 2, 1, 3)


def merge_heads(x: Array) -> Array:
    """Merge heads x [B, H, T, D] into [B, T, C], the inverse of split_heads."""
    B, H, T, D = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, T, H * D)


@kernels.by_queries(hidden=-np.inf)
def attention_scores(q: Array, k: Array, scale: float, padding: Padding = 0) -> Array:
    """Return scale · q kᵀ, or −∞ where a key comes after the query: q [B, H, T, D], k [B, H, S, D] → [B, H, T, S].

    The causal mask is aligned to the lower right corner: query t is token S − T + t. padding, 0 or [B, 1, 1, 1], is the
    number of padding keys on the left of each row. They are masked, too, except that a padded query sees its own key.
    """
    T, S = q.shape[2], k.shape[2]
    queries, keys = np.arange(S - T, S)[:, None], np.arange(S)
    visible = (np.minimum(padding, queries) <= keys) & (keys <= queries)
    return np.where(visible, scale * q @ k.swapaxes(2, 3), -np.inf)


@kernels.by_queries(hidden=0)
def attention_weights(q: Array, k: Array, scale: float, padding: Padding = 0) -> Array:
    """Return the weights [B, H, T, S] that each query gives the keys; they sum to 1."""
    return softmax(attention_scores(q, k, scale, padding))


@kernels.tiled
def attention(q: Array, k: Array, v: Array, scale: float, padding: Padding = 0) -> Array:
    """Return softmax(scale · q kᵀ) v in every head: q [B, H, T, D], k and v [B, H, S, D] → [B, H, T, D].

    A query attends to its own key and those before it. Vaswani et al. 2017, "Attention Is All You Need", 3.2.1.
    """
    return attention_weights(q, k, scale, padding) @ v


def block(x: Array, p: Block, config: Config, layer: int, cache: KVCache | None, record: StageRecord) -> Array:
    """Apply block `layer` to x [B, T, C]: attention and MLP each read a normalised copy and add their output to x."""
    activation, epsilon = ACTIVATIONS[config.activation_function], config.layer_norm_epsilon
    scale, padding = config.attention_scale(layer), 0 if cache is None else cache.padding
    h = record("ln_1", layer_norm(x, *p.ln_1, epsilon))
    h = record("attn.c_attn", linear(h, *p.attn.c_attn))  # [B, T, 3C]: queries, keys and values side by side
    q, k, v = (split_heads(part, config.n_head) for part in np.split(h, 3, axis=-1))
    record("attn.q", q), record("attn.k", k), record("attn.v", v)
    keys, values = (k, v) if cache is None else cache.extend(layer, k, v)  # [B, H, S, D]
    record("attn.scores", lambda: attention_scores(q, keys, scale, padding))  # computed only if recorded
    record("attn.weights", lambda: attention_weights(q, keys, scale, padding))
    h = record("attn.heads", attention(q, keys, values, scale, padding))
    h = record("attn.c_proj", linear(merge_heads(h), *p.attn.c_proj))
    x = record("attn.residual", x + h)
    h = record("ln_2", layer_norm(x, *p.ln_2, epsilon))
    h = record("mlp.c_fc", linear(h, *p.mlp.c_fc))  # [B, T, F]
    h = record("mlp.act", activation(h))
    h = record("mlp.c_proj", linear(h, *p.mlp.c_proj))
    return x + h


def forward(
    parameters: Parameters,
    config: Config,
    token_ids: ArrayLike,
    cache: KVCache | None = None,
    record: Record | None = None,
    *,
    logits_from: int = 0,
) -> Array:
    """Return the logits of every next token: token_ids [T] or [B, T] → [B, T, V].

    logits_from: index of the first token whose logits are returned; -1 for the last one only. cache: holds the tokens
    before these, and is extended with these. record(name, array) gets a copy of every intermediate under Hugging Face's
    name ("h.0.attn.c_attn"). Raises NpgptError for ids, logits_from or a cache that do not fit (see Config, KVCache).
    """
    past = 0 if cache is None else cache.past(config)
    token_ids = config.token_rows(token_ids, past)
    T = token_ids.shape[1]
    first = config.first_of(T, logits_from)
    stage = recorder(record)
    wte = stage("wte", parameters.wte.weight[token_ids])  # [B, T, C]
    positions = np.arange(T) if cache is None else cache.positions(T)
    wpe = stage("wpe", parameters.wpe.weight[positions])  # [T, C], or [B, T, C] if rows are padded
    x = stage("embedding", wte + wpe)
    for layer, p in enumerate(parameters.h):
        x = stage(f"h.{layer}", block(x, p, config, layer, cache, recorder(record, f"h.{layer}.")))
    if cache is not None:
        cache.advance(T)
    x = stage("ln_f", layer_norm(x[:, first:], *parameters.ln_f, config.layer_norm_epsilon))
    return stage("logits", kernels.product(x, parameters.lm_head.weight.T))
