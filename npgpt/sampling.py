"""From the logits of one next token to its id: plain functions on an array [V].

Each filter sets what it takes away to −inf and returns a new array; what is left keeps its logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .config import whole_number
from .errors import NpgptError
from .model import softmax
from .parameters import Array


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw: temperature, then top_k, top_p, min_p, each None where it is not wanted.

    Raises NpgptError for a value out of range.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise NpgptError(f"temperature must be 0 (greedy) or above, not {self.temperature}")
        if self.top_k is not None:
            whole_number("top-k, the number of tokens to keep,", self.top_k)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise NpgptError(f"top-p is a probability above 0 and up to 1, not {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise NpgptError(f"min-p is a fraction from 0 to 1 of the likeliest token's probability, not {self.min_p}")


def next_token(logits: Array, sampling: Sampling, generator: np.random.Generator) -> int:
    """Draw one id from logits [V]; temperature 0 takes the likeliest, of equals the lowest id, and draws nothing.

    Worked in float64, so that a float32 and a float64 model's close logits draw alike. Raises NpgptError where logits
    are NaN or have no finite maximum: the weights are broken.
    """
    check_finite(logits.max())
    if sampling.temperature == 0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # a tiny temperature may push all but the likeliest to −inf
        kept = (logits.astype(np.float64) - logits.max()) / sampling.temperature
    if sampling.top_k is not None:
        kept = top_k(kept, sampling.top_k)
    if sampling.top_p is not None:
        kept = top_p(kept, sampling.top_p)
    if sampling.min_p is not None:
        kept = min_p(kept, sampling.min_p)
    cumulative = np.cumsum(softmax(kept))
    return int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))


def check_finite(largest: Array) -> None:
    """Raise NpgptError where the maximum of logits, or one of several, is NaN or infinite."""
    if not np.isfinite(largest).all():
        raise NpgptError(
            "the logits are not finite: the weights hold NaN or infinity (npgpt inspect names them), "
            "or values far too large"
        )


def top_k(logits: Array, k: int) -> Array:
    """Keep the k likeliest, and whatever equals the last of them."""
    if k >= len(logits):
        return logits.copy()
    return np.where(logits < np.partition(logits, -k)[-k], -np.inf, logits)


def top_p(logits: Array, p: float) -> Array:
    """Keep the likeliest until their probabilities reach p, the one that crosses it included.

    Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration": the smallest set of at least p. (OpenAI's
    gpt-2 sampled without the one that crosses.)
    """
    if p >= 1:
        return logits.copy()  # a sum of rounded probabilities may reach 1 early
    order = np.argsort(-logits, kind="stable")
    cumulative = np.cumsum(softmax(logits)[order])
    kept = int(np.searchsorted(cumulative, p)) + 1  # the first place where the sum reaches p
    filtered = np.full_like(logits, -np.inf)
    filtered[order[:kept]] = logits[order[:kept]]
    return filtered


def min_p(logits: Array, p: float) -> Array:
    """Keep what is at least p times as probable as the likeliest (Nguyen et al. 2024, "Turning Up the Heat")."""
    probabilities = softmax(logits)
    return np.where(probabilities < p * probabilities.max(), -np.inf, logits)
