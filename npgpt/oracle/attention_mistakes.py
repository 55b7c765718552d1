"""Known mistakes in attention, from its scale to its mask. mistakes.py describes the rows, textbook.py the shapes."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..parameters import Array
from .functions import masked, softmax
from .rows import Table, rows
from .textbook import BLOCK, Formula, Pass, Scope, textbook

SCALES = rows(
    "attention scale missing: scores are not divided by √D (known from: an omission)",
    {"attn.scale": lambda s: 1.0},
    "attention scaled by C: scores are divided by √C, C the width of the model, instead of √D, D the width of a head "
    "(known from: single-head code extended to several heads)",
    {"attn.scale": lambda s: 1 / math.sqrt(s.config.n_embd)},
    "attention scaled twice: scores are divided by √D twice "
    "(known from: an explicit scale besides that of scaled_dot_product_attention)",
    {"attn.scale": lambda s: 1 / s.config.head_width},
    "attention scaled up: scores are multiplied by √D (known from: * instead of /)",
    {"attn.scale": lambda s: math.sqrt(s.config.head_width)},
    "attention scaled by 8: scores are divided by 8, which is √D only in the published models "
    "(known from: a hard-coded constant)",
    {"attn.scale": lambda s: 1 / 8},
    "attention scaled by T: scores are divided by √T, T the number of tokens (known from: the size of the wrong axis)",
    {"attn.scale": lambda s: 1 / math.sqrt(len(s["visible"]))},
    "attention scaled by H: scores are divided by √H, H the number of heads (known from: the size of the wrong axis)",
    {"attn.scale": lambda s: 1 / math.sqrt(s.config.n_head)},
)


def scales(config: Config, tokens: int) -> Table:
    """Return every wrong scale. Scales that are equal in this model are listed once, under the first name."""
    block = Scope(Pass(textbook(config, {}), np.zeros((1, tokens), int)), 0)
    found: Table = {}
    numbers = {1 / math.sqrt(config.head_width), config.attention_scale(0)}
    for text, formulas in SCALES.items():
        if (number := formulas["attn.scale"](block)) not in numbers:
            numbers.add(number)
            found[text] = formulas
    return found


SCALES_BY_LAYER = rows(
    "attention scaled by layer: scores are also divided by layer + 1 "
    "(known from: scale_attn_by_inverse_layer_idx in transformers, Mistral's GPT-2)",
    {"attn.scale": lambda s: 1 / math.sqrt(s.config.head_width) / (s.layer + 1)},
    "attention scaled as in GPT-2: scores are divided by √D only, as in the published models "
    "(known from: scale_attn_weights and scale_attn_by_inverse_layer_idx ignored)",
    {"attn.scale": lambda s: 1 / math.sqrt(s.config.head_width)},
)


def reshaped(keys: Array) -> Array:
    """Return keys [B, H, T, D] reshaped to [B, H, D, T] without moving a number in memory."""
    return keys.reshape(*keys.shape[:2], *keys.shape[:1:-1])


ATTENTION = rows(
    "scale after the softmax: the weights are divided by √D, not the scores (known from: a misplaced parenthesis)",
    {
        "attn.scale": lambda s: 1.0,
        "attn.weights": lambda s: s["softmax"](s["attn.scores"]) * s.config.attention_scale(s.layer),
    },
    "softmax over queries: the softmax runs over the queries (dim=-2), so the weights of a query do not sum to 1 "
    "(known from: softmax(dim=2), a legacy default axis)",
    {"attn.weights": lambda s: softmax(masked(s["attn.products"], s["visible"]), axis=2)},
    "softmax over heads: the softmax runs over the heads (dim=1) (known from: softmax(dim=1) for arrays of three axes)",
    {"attn.weights": lambda s: softmax(masked(s["attn.products"], s["visible"], -1e30), axis=1) * s["visible"]},
    "keys reshaped: [B, H, T, D] is reshaped to [B, H, D, T], not transposed (known from: view instead of transpose)",
    {"attn.products": lambda s: s["attn.q"] @ reshaped(s["attn.k"]) * s["attn.scale"]},
    "keys used as values: the attention weights are applied to the keys (known from: a mixed-up name)",
    {"attn.v": lambda s: s["attn.k"]},
    "queries used as keys: the scores are products of queries with queries (known from: a mixed-up name)",
    {"attn.k": lambda s: s["attn.q"]},
)


def viewed(columns: str) -> Formula:
    """Return the formula of heads that are columns [B, T, C] reshaped to [B, H, T, D] without a transpose."""
    return lambda s: s[columns].reshape(s[columns].shape[0], s.config.n_head, s[columns].shape[1], -1)


def strided(columns: str) -> Formula:
    """Return the formula of heads that each take every H-th column."""
    return lambda s: s[columns].reshape(*s[columns].shape[:2], -1, s.config.n_head).transpose(0, 3, 1, 2)


def interleaved(s: Scope) -> list[Array]:
    """Return queries, keys and values taken from columns in which every head has its q, k and v side by side."""
    x = s["attn.c_attn"]
    by_head = x.reshape(*x.shape[:2], s.config.n_head, 3, -1)
    return [by_head[..., number, :].reshape(*x.shape[:2], -1) for number in range(3)]


COLUMNS = {"q": "attn.query", "k": "attn.key", "v": "attn.value"}
VIEWED = (
    "[B, T, C] is reshaped directly to [B, H, T, D]; it must be reshaped to [B, T, H, D] and then transposed "
    "(known from: view(B, H, T, D))"
)
STRIDED = {f"attn.{letter}": strided(columns) for letter, columns in COLUMNS.items()}
HEADS: Table = {
    f"{what} split without transpose: {which}: {VIEWED}": {
        f"attn.{letter}": viewed(COLUMNS[letter]) for letter in letters
    }
    for what, which, letters in (
        ("heads", "queries, keys and values", "qkv"),
        ("queries", "only the queries", "q"),
        ("keys", "only the keys", "k"),
        ("values", "only the values", "v"),
    )
} | rows(
    "heads merged without transpose: [B, H, T, D] is reshaped directly to [B, T, C]; it must be transposed to "
    "[B, T, H, D] first (known from: view after attention, contiguous() without transpose(1, 2))",
    {"attn.merged": lambda s: s["attn.heads"].reshape(s["attn.query"].shape)},
    "heads split as [D, H]: a head takes every H-th column, not D adjacent columns (known from: view(B, T, D, H))",
    STRIDED,
    "heads split and merged as [D, H]: a head takes every H-th column and writes its output to the same columns "
    "(known from: (d h) instead of (h d) in einops)",
    STRIDED | {"attn.merged": lambda s: s["attn.heads"].transpose(0, 2, 3, 1).reshape(s["attn.query"].shape)},
    "heads interleaved: c_attn's 3C columns are split into heads first, and each head into q, k, v; GPT-2 splits them "
    "into q, k, v first (known from: GPT-NeoX, BLOOM, Megatron)",
    {"attn.thirds": interleaved},
)
THIRDS: Table = {
    f"q, k, v read as {', '.join(order)}: c_attn's columns are queries, keys, values in this order, but were read as "
    f"{', '.join(order)} (known from: unpacking c_attn.chunk(3) in the wrong order)": {
        COLUMNS[letter]: BLOCK[columns]
        for letter, columns in zip(order, COLUMNS.values(), strict=True)
        if COLUMNS[letter] != columns
    }
    for order in permutations("qkv")
    if order != ("q", "k", "v")
}


def triangle(s: Scope, diagonal: int = 0) -> NDArray[np.bool_]:
    """Return a [T, T] mask that is true up to that diagonal."""
    return np.tri(len(s["visible"]), k=diagonal, dtype=bool)


def seen(s: Scope, visible: NDArray[np.bool_], hidden: float = -1e30) -> Array:
    """Return scores with hidden ones set to a number. If it is finite, a query that sees no key weighs all alike."""
    return masked(s["attn.products"], visible, hidden)


MASKS = rows(
    "causal mask missing: every token also sees later tokens (known from: is_causal omitted, BERT's attention)",
    {"attn.scores": lambda s: seen(s, np.ones_like(triangle(s)))},
    "mask hides the token itself: a token sees earlier tokens, but not itself (known from: triu(diagonal=0))",
    {"attn.scores": lambda s: seen(s, triangle(s, -1))},
    "mask shows the next token: a token sees earlier tokens, itself and the next one (known from: triu(diagonal=2))",
    {"attn.scores": lambda s: seen(s, triangle(s, 1))},
    "mask transposed: a token sees itself and later tokens, not earlier ones (known from: triu instead of tril)",
    {"attn.scores": lambda s: seen(s, triangle(s).T)},
    "mask of -1e4: −10000 is added to hidden scores, which does not always suffice to hide them "
    "(known from: GPT-2 in TensorFlow, early versions of transformers)",
    {"attn.scores": lambda s: s["attn.products"] + np.where(s["visible"], 0, -1e4).astype(np.float32)},
    "mask of 0: hidden scores are set to 0, not to minus infinity, so their keys still get weight "
    "(known from: scores multiplied by the mask, masked_fill with -1e-9 instead of -1e9)",
    {"attn.scores": lambda s: seen(s, s["visible"], 0.0)},
    "mask after the softmax: hidden weights are set to 0, but the others are not rescaled to sum to 1 "
    "(known from: weights multiplied by the mask)",
    {
        "attn.scores": lambda s: s["attn.products"],
        "attn.weights": lambda s: s["softmax"](s["attn.products"]) * s["visible"],
    },
)


def windows(tokens: int) -> Table:
    """Return sliding windows of 2, 4, 8, … tokens, up to the largest that hides a token."""

    def formula(width: int) -> Formula:
        return lambda s: seen(s, s["visible"] & ~triangle(s, -width))

    return {
        f"sliding window of {width}: a token sees only itself and the {width - 1} before it "
        "(known from: local attention in GPT-Neo and Mistral)": {"attn.scores": formula(width)}
        for width in (2**power for power in range(1, tokens.bit_length()))
        if width < tokens
    }
