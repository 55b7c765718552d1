"""Known mistakes in attention, from its scale to its mask; rows and shapes as mistakes.py has them."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..parameters import Array
from .rows import Table, rows
from .textbook import BLOCK, Formula, Pass, Scope, masked, softmax, textbook

SCALES = rows(
    "attention scale missing: scores are not divided by √D (known from: left out)",
    {"attn.scale": lambda s: 1.0},
    "attention scaled by C: scores are divided by √C, the whole width, in place of √D, a head's "
    "(known from: single-head code made multi-head)",
    {"attn.scale": lambda s: 1 / math.sqrt(s.config.n_embd)},
    "attention scaled twice: scores are divided by √D twice "
    "(known from: a scale in the code and again in scaled_dot_product_attention)",
    {"attn.scale": lambda s: 1 / s.config.head_width},
    "attention scaled up: scores are multiplied by √D (known from: * for /)",
    {"attn.scale": lambda s: math.sqrt(s.config.head_width)},
    "attention scaled by 8: scores are divided by 8, which is √D in the published models alone "
    "(known from: a constant)",
    {"attn.scale": lambda s: 1 / 8},
    "attention scaled by T: scores are divided by √T, T the number of tokens (known from: another axis's size)",
    {"attn.scale": lambda s: 1 / math.sqrt(len(s["visible"]))},
    "attention scaled by H: scores are divided by √H, H the number of heads (known from: another axis's size)",
    {"attn.scale": lambda s: 1 / math.sqrt(s.config.n_head)},
)


def scales(config: Config, tokens: int) -> Table:
    """Return every wrong scale; of equal ones the first."""
    block = Scope(Pass(textbook(config, {}), np.zeros((1, tokens), int)), 0)
    found: Table = {}
    numbers = {1 / math.sqrt(config.head_width), config.attention_scale(0)}
    for text, formulas in SCALES.items():
        if (number := formulas["attn.scale"](block)) not in numbers:
            numbers.add(number)
            found[text] = formulas
    return found


SCALES_BY_LAYER = rows(
    "attention scaled by layer: scores are divided by layer + 1 as well "
    "(known from: transformers' scale_attn_by_inverse_layer_idx, Mistral's GPT-2)",
    {"attn.scale": lambda s: 1 / math.sqrt(s.config.head_width) / (s.layer + 1)},
    "attention scaled as in GPT-2: scores are divided by √D, and by nothing else "
    "(known from: scale_attn_weights and scale_attn_by_inverse_layer_idx not read)",
    {"attn.scale": lambda s: 1 / math.sqrt(s.config.head_width)},
)


def reshaped(keys: Array) -> Array:
    """[B, H, T, D] → [B, H, D, T], each number in its place of the memory."""
    return keys.reshape(*keys.shape[:2], *keys.shape[:1:-1])


ATTENTION = rows(
    "scale after the softmax: the weights are divided by √D, not the scores (known from: a bracket)",
    {
        "attn.scale": lambda s: 1.0,
        "attn.weights": lambda s: s["softmax"](s["attn.scores"]) * s.config.attention_scale(s.layer),
    },
    "softmax over queries: the softmax runs over the queries (dim=-2), so that a query's weights do not add up to 1 "
    "(known from: softmax(dim=2), or a legacy default axis)",
    {"attn.weights": lambda s: softmax(masked(s["attn.products"], s["visible"]), axis=2)},
    "softmax over heads: the softmax runs over the heads (dim=1) (known from: softmax(dim=1) written for three axes)",
    {"attn.weights": lambda s: softmax(masked(s["attn.products"], s["visible"], -1e30), axis=1) * s["visible"]},
    "keys reshaped: keys [B, H, T, D] are reshaped to [B, H, D, T], not transposed (known from: view for transpose)",
    {"attn.products": lambda s: s["attn.q"] @ reshaped(s["attn.k"]) * s["attn.scale"]},
    "keys used as values: the weights are applied to the keys (known from: one name for another)",
    {"attn.v": lambda s: s["attn.k"]},
    "queries used as keys: queries are multiplied with themselves (known from: one name for another)",
    {"attn.k": lambda s: s["attn.q"]},
)


def viewed(columns: str) -> Formula:
    """Return the formula of heads [B, H, T, D] that are a reshape of the columns [B, T, C]."""
    return lambda s: s[columns].reshape(s[columns].shape[0], s.config.n_head, s[columns].shape[1], -1)


def strided(columns: str) -> Formula:
    """Return the formula of heads of which each has every H-th of the columns."""
    return lambda s: s[columns].reshape(*s[columns].shape[:2], -1, s.config.n_head).transpose(0, 3, 1, 2)


def interleaved(s: Scope) -> list[Array]:
    """Return queries, keys and values, each of which is a third of every head's columns."""
    x = s["attn.c_attn"]
    by_head = x.reshape(*x.shape[:2], s.config.n_head, 3, -1)
    return [by_head[..., number, :].reshape(*x.shape[:2], -1) for number in range(3)]


COLUMNS = {"q": "attn.query", "k": "attn.key", "v": "attn.value"}
VIEWED = (
    "[B, T, C] is reshaped to [B, H, T, D] at once; it has to become [B, T, H, D] and then be transposed "
    "(known from: view(B, H, T, D))"
)
STRIDED = {f"attn.{letter}": strided(columns) for letter, columns in COLUMNS.items()}
HEADS: Table = {
    f"{what} split without transpose: {which}: {VIEWED}": {
        f"attn.{letter}": viewed(COLUMNS[letter]) for letter in letters
    }
    for what, which, letters in (
        ("heads", "queries, keys and values", "qkv"),
        ("queries", "the queries alone", "q"),
        ("keys", "the keys alone", "k"),
        ("values", "the values alone", "v"),
    )
} | rows(
    "heads merged without transpose: [B, H, T, D] is reshaped to [B, T, C] at once; it has to be transposed to "
    "[B, T, H, D] first (known from: view after attention, contiguous() without transpose(1, 2))",
    {"attn.merged": lambda s: s["attn.heads"].reshape(s["attn.query"].shape)},
    "heads split as [D, H]: a head has every H-th column, not D columns side by side (known from: view(B, T, D, H))",
    STRIDED,
    "heads split and merged as [D, H]: a head has every H-th column, and is put back there "
    "(known from: einops' (d h) for (h d))",
    STRIDED | {"attn.merged": lambda s: s["attn.heads"].transpose(0, 2, 3, 1).reshape(s["attn.query"].shape)},
    "heads interleaved: c_attn's 3C columns are split into heads first and into q, k, v within each; in GPT-2 q, k, v "
    "come first (known from: GPT-NeoX, BLOOM, Megatron)",
    {"attn.thirds": interleaved},
)
THIRDS: Table = {
    f"q, k, v read as {', '.join(order)}: c_attn's columns are queries, keys, values in this order, and were taken as "
    f"{', '.join(order)} (known from: unpacking c_attn.chunk(3))": {
        COLUMNS[letter]: BLOCK[columns]
        for letter, columns in zip(order, COLUMNS.values(), strict=True)
        if COLUMNS[letter] != columns
    }
    for order in permutations("qkv")
    if order != ("q", "k", "v")
}


def triangle(s: Scope, diagonal: int = 0) -> NDArray[np.bool_]:
    """Return [T, T], true up to that diagonal."""
    return np.tri(len(s["visible"]), k=diagonal, dtype=bool)


def seen(s: Scope, visible: NDArray[np.bool_], hidden: float = -1e30) -> Array:
    """Return scores hidden by a number: by a large one a query that sees nothing looks at all keys alike."""
    return masked(s["attn.products"], visible, hidden)


MASKS = rows(
    "causal mask missing: every token sees those that follow it (known from: is_causal left out, BERT's attention)",
    {"attn.scores": lambda s: seen(s, np.ones_like(triangle(s)))},
    "mask hides the own token: a token sees those before it, but not itself (known from: triu(diagonal=0))",
    {"attn.scores": lambda s: seen(s, triangle(s, -1))},
    "mask shows the next token: a token sees itself, those before it and the next one (known from: triu(diagonal=2))",
    {"attn.scores": lambda s: seen(s, triangle(s, 1))},
    "mask transposed: a token sees itself and those that follow it (known from: triu for tril)",
    {"attn.scores": lambda s: seen(s, triangle(s).T)},
    "mask of -1e4: hidden scores get −10000 added and still take part "
    "(known from: TensorFlow's GPT-2 and early transformers; too little in low precision or beside large scores)",
    {"attn.scores": lambda s: s["attn.products"] + np.where(s["visible"], 0, -1e4).astype(np.float32)},
    "mask of 0: hidden scores are 0 and still take part "
    "(known from: scores multiplied by the mask, masked_fill with -1e-9 for -1e9)",
    {"attn.scores": lambda s: seen(s, s["visible"], 0.0)},
    "mask after the softmax: hidden weights are set to 0 and the others not divided by their sum "
    "(known from: weights multiplied by the mask)",
    {
        "attn.scores": lambda s: s["attn.products"],
        "attn.weights": lambda s: s["softmax"](s["attn.products"]) * s["visible"],
    },
)


def windows(tokens: int) -> Table:
    """Return sliding windows of 2, 4, 8, … tokens, as long as they hide something."""

    def formula(width: int) -> Formula:
        return lambda s: seen(s, s["visible"] & ~triangle(s, -width))

    return {
        f"sliding window of {width}: a token sees itself and the {width - 1} before it "
        "(known from: GPT-Neo's and Mistral's local attention)": {"attn.scores": formula(width)}
        for width in (2**power for power in range(1, tokens.bit_length()))
        if width < tokens
    }
