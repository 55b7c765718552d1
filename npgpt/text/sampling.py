"""Sample the next token's id from its logits [V].

The filters return a new array, in which the logits of excluded tokens are −inf and the others unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import NpgptError, real_number, whole_number
from ..model import softmax
from ..parameters import Array


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings for sampling, applied in the order repetition_penalty, temperature, top_k, top_p, min_p.

    None switches a setting off, and so does top_k 0. temperature 0 is greedy; None and 1 leave the logits unchanged.
    Raises NpgptError for a value out of range.
    """

    temperature: float | None = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        for key in ("temperature", "top_p", "min_p", "repetition_penalty"):
            if (value := getattr(self, key)) is not None:
                object.__setattr__(self, key, real_number(key, value))
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise NpgptError(f"temperature must be 0 (greedy) or above, not {self.temperature}")
        if self.top_k is not None:
            whole_number("top-k, the number of tokens to keep,", self.top_k, low=0)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise NpgptError(f"top-p must be a probability above 0 and at most 1, not {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise NpgptError(f"min-p must be from 0 to 1, a fraction of the largest probability, not {self.min_p}")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < float("inf"):
            raise NpgptError(f"repetition-penalty must be a finite number above 0, not {self.repetition_penalty}")


def next_token(logits: Array, sampling: Sampling, generator: np.random.Generator, seen: ArrayLike = ()) -> int:
    """Draw one id from logits [V].

    temperature 0 returns the most likely id (the lowest one on a tie) without using the generator. seen: the ids [S] of
    prompt and continuation, for the repetition penalty. Raises NpgptError as adjusted() does.
    """
    kept = adjusted(logits, sampling, seen)
    if sampling.temperature == 0:
        return int(kept.argmax())
    cumulative = np.cumsum(softmax(kept))
    return int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))


def adjusted(logits: Array, sampling: Sampling, seen: ArrayLike = ()) -> Array:
    """Return the logits [V] after penalty, temperature, top-k, top-p and min-p, in transformers' order.

    They are float64 with their maximum subtracted, so that a float32 and a float64 model with close logits draw the
    same tokens. Raises NpgptError if the maximum is not finite, because of broken weights or of the penalty.
    """
    check_finite(logits.max())
    kept: Array = logits.astype(np.float64)
    if sampling.repetition_penalty is not None:
        kept = repetition_penalty(kept, seen, sampling.repetition_penalty)
        if not np.isfinite(kept.max()):
            raise NpgptError(
                f"repetition-penalty {sampling.repetition_penalty} makes the logits overflow: use a value near 1"
            )
    kept -= kept.max()  # after the penalty, which depends on the signs of the logits
    if sampling.temperature:
        with np.errstate(over="ignore"):  # a tiny temperature may push all logits except the largest to −inf
            kept /= sampling.temperature
    if sampling.top_k:
        kept = top_k(kept, sampling.top_k)
    if sampling.top_p is not None:
        kept = top_p(kept, sampling.top_p)
    if sampling.min_p is not None:
        kept = min_p(kept, sampling.min_p)
    return kept


def repetition_penalty(logits: Array, seen: ArrayLike, penalty: float) -> Array:
    """Divide the positive logits of the ids in seen [S] by the penalty, and multiply the negative ones by it.

    Keskar et al. 2019, "CTRL: A Conditional Transformer Language Model for Controllable Generation", as implemented in
    transformers. The paper divides negative logits, too, which would make their tokens more likely. The penalty applies
    once to each id, however often it was seen; ids beyond the logits are ignored.
    """
    ids = np.asarray(seen, np.int64)
    ids = ids[(ids >= 0) & (ids < len(logits))]  # a negative id would count from the end
    old, penalised = logits[ids], logits.copy()
    with np.errstate(over="ignore"):
        penalised[ids] = np.where(old > 0, old / penalty, old * penalty)
    return penalised


def check_finite(largest: Array) -> None:
    """Raise NpgptError if the maximum of the logits, or of any row of them, is NaN or infinite."""
    if not np.isfinite(largest).all():
        raise NpgptError(
            "the logits are not finite: the weights contain NaN or infinity (npgpt inspect names the tensors), "
            "or values that are far too large"
        )


def top_k(logits: Array, k: int) -> Array:
    """Keep the k most likely tokens and any that tie with the last of them."""
    if k >= len(logits):
        return logits.copy()
    return np.where(logits < np.partition(logits, -k)[-k], -np.inf, logits)


def top_p(logits: Array, p: float) -> Array:
    """Keep the most likely tokens until their probabilities sum to p, including the token that reaches it.

    This is the smallest set with probability p or more of Holtzman et al. 2019, "The Curious Case of Neural Text
    Degeneration". (OpenAI's gpt-2 leaves out the token that reaches p.)
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
    """Keep the tokens that are at least p times as probable as the most likely one.

    Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs".
    """
    probabilities = softmax(logits)
    return np.where(probabilities < p * probabilities.max(), -np.inf, logits)
