"""The functions of which the textbook's formulas are made. textbook.py describes the shapes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..erf import erf
from ..parameters import Array
from .arithmetic import once


def gelu(x: Array, cubic: float = 0.044715, half: float = 0.5, root: float = math.sqrt(2 / math.pi)) -> Array:
    """Return GELU in its tanh form."""
    return x * half * (np.tanh((x * x * x * cubic + x) * root) + 1)


def gelu_erf(x: Array) -> Array:
    """Return GELU in its exact form."""
    return x * 0.5 * (once(erf, x * math.sqrt(0.5)) + 1)


def softmax(x: Array, axis: int = -1) -> Array:
    """Return exp(x) / Σ exp(x)."""
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


def log_softmax(x: Array) -> Array:
    """Return log(softmax(x)) over the last axis."""
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float, axis: int = -1) -> Array:
    """Return x normalised over an axis, with gain and bias."""
    centred = x - x.mean(axis=axis, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(axis=axis, keepdims=True) + epsilon) * weight + bias


def split(x: Array, n_head: int) -> Array:
    """Split channels into heads: [B, T, C] → [B, H, T, D]."""
    return np.stack(np.split(x, n_head, axis=-1), axis=1)


def merge(x: Array) -> Array:
    """Merge heads into channels: [B, H, T, D] → [B, T, C]."""
    return np.concatenate([x[:, head] for head in range(x.shape[1])], axis=-1)


def masked(scores: Array, visible: NDArray[np.bool_], hidden: float = -math.inf) -> Array:
    """Return scores [B, H, T, T] with those of keys that are not visible [T, T] set to hidden."""
    scores = scores.copy()
    scores[..., ~visible] = hidden
    return scores
