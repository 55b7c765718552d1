"""Attention weights as one page of HTML, explored by mouse or keyboard: a template and its data."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import NpgptError
from ..language_model import LanguageModel
from ..parameters import Array
from .attention import AttentionWeights, attention_weights, selected
from .page import filled

TEMPLATE = Path(__file__).with_name("attention_page.html")
LARGEST = 64 * 2**20  # bytes; a browser opens a page of this size without delay
# a weight is stored as a whole number of 1 / 65535 ≈ 1.5e-5, so to within 7.6e-6; 4 decimals are shown
STEPS = 2**16 - 1


def page_of(
    model: LanguageModel, token_ids: Sequence[int], *, layer: int | None = None, head: int | None = None
) -> str:
    """Return a text's page. Raises NpgptError, before the forward pass, where the page would be too large."""
    layers = selected("layer", layer, model.config.n_layer, model.name)
    heads = selected("head", head, model.config.n_head, model.name)
    check_size(len(layers), len(heads), len(token_ids))
    return attention_page(attention_weights(model, token_ids, layer=layer, head=head))


def attention_page(attention: AttentionWeights) -> str:
    """Return the page that shows attention weights."""
    data = {
        "model": attention.model,
        "n_layer": attention.n_layer,
        "n_head": attention.n_head,
        "layers": attention.layers,
        "heads": attention.heads,
        "ids": attention.token_ids,
        "pieces": attention.texts,
        "weights": base64.b64encode(packed(attention.weights)).decode(),
    }
    return filled(TEMPLATE, data)


def packed(weights: Array) -> bytes:
    """Return the lower triangles of weights [L, H, T, T], row by row, as uint16 with the low byte first."""
    query, key = np.tril_indices(weights.shape[-1])
    return np.rint(np.multiply(weights[:, :, query, key], STEPS, dtype=np.float64)).astype("<u2").tobytes()


def check_size(layers: int, heads: int, tokens: int) -> None:
    """Raise NpgptError where the weights of so many layers, heads and tokens make a page too large."""
    size = layers * heads * tokens * (tokens + 1) // 2 * 2 * 4 // 3
    if size > LARGEST:
        raise NpgptError(
            f"a page of {layers} layers × {heads} heads × {tokens} tokens would take {size / 2**20:.0f} MiB, "
            f"and may take {LARGEST // 2**20}: give one layer (--layer), one head (--head) or a shorter text"
        )
