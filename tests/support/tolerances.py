"""Bounds on how far rounding alone can move a correct result from the exact one.

Every rounding changes a value by a factor 1 + d with |d| ≤ u, where u is half the spacing at 1 (2⁻²⁴ in float32,
2⁻⁵³ in float64). Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis" (SIAM J. Sci. Comput. 41,
2019): roundings behave like independent draws of mean zero, so that n of them leave an error of about u √n, not the
worst case's u n. A sum of n products rounds n products and n partial sums; with terms of mixed sign a partial sum of i
terms is √i large, so even naive summation from first to last leaves u √(n / 2 + 1) of the result, and BLAS, with its
many partial sums side by side, less. Counting n for a sum of n products and 1 for an elementwise step, there lie

    N = n_layer (3 C + D + S + F + 40) + 40 + C

roundings between the ids and a logit (c_attn, c_proj and c_fc sum over C; scores over D; values over S; mlp.c_proj over
F; 40 covers two normalisations, the softmax, the activation and the additions). Each block adds its error to the
stream that normalisation keeps in scale, so errors of different blocks add up like independent terms, and

    u √N

bounds the root mean square of the error, relative to the tensor's own, with at least the factor √2 of every sum to
spare for what a block makes of an earlier block's error. The reference here is always float64, whose own error is
nothing beside float32's; two float32 results may be apart by twice as much.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from npgpt.config import Config


def rounding_bound(config: Config, tokens: int, dtype: DTypeLike) -> float:
    """Return the relative root-mean-square error that rounding explains in any intermediate of a model."""
    u = float(np.finfo(dtype).eps) / 2
    C, D, F = config.n_embd, config.head_width, config.inner_width
    roundings = config.n_layer * (3 * C + D + tokens + F + 40) + 40 + C
    return u * math.sqrt(roundings)


def relative_error(theirs: ArrayLike, reference: ArrayLike) -> float:
    """Return the difference's root mean square divided by the reference's; equal infinities do not differ."""
    a, b = np.asarray(theirs, np.float64), np.asarray(reference, np.float64)
    assert a.shape == b.shape, f"shapes differ: {a.shape} and {b.shape}"
    finite = ~(np.isinf(b) & (a == b))
    assert np.isfinite(a[finite]).all()
    return float(_rms(a[finite] - b[finite]) / _rms(b[finite]))


def largest_difference(theirs: ArrayLike, reference: ArrayLike) -> float:
    """Return the largest difference divided by the reference's largest magnitude, the tensor's scale."""
    a, b = np.asarray(theirs, np.float64), np.asarray(reference, np.float64)
    assert a.shape == b.shape, f"shapes differ: {a.shape} and {b.shape}"
    return float(np.abs(a - b).max() / np.abs(b).max())


def _rms(x: np.typing.NDArray[Any]) -> float:
    return math.sqrt(float(np.mean(np.square(x)))) if x.size else 1.0
