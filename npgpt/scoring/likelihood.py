"""What is known of a scored text: log-probabilities and ranks token by token, their sums, perplexity."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..parameters import Array
from ..text.sampling import check_finite

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]
BLOCK = 2**18  # logits at a time on their way to probabilities, so that they stay in a core's L2 cache


class Totals(NamedTuple):
    """Sums over the tokens that were scored. A word is what lies between white space, and counts where the token that
    it begins in does; nll is the negative log-likelihood in nats.
    """

    tokens: int
    scored: int
    words: int
    bytes: int
    nll: float

    @property
    def perplexity(self) -> float:
        """exp(nll / scored)."""
        return _exp_mean(self.nll, self.scored)

    @property
    def word_perplexity(self) -> float:
        """exp(nll / words)."""
        return _exp_mean(self.nll, self.words)

    @property
    def bits_per_byte(self) -> float:
        """nll / (bytes · ln 2)."""
        return self.nll / self.bytes / math.log(2) if self.bytes else math.nan


def _exp_mean(nll: float, count: int) -> float:
    """exp(nll / count), infinite where that is beyond float64."""
    mean = nll / count if count else math.nan
    return math.inf if mean > 700 else math.exp(mean)


def total(parts: Iterable[Totals]) -> Totals:
    """The sums over several texts."""
    tokens, scored, words, size, nll = zip(*parts, strict=True)
    return Totals(sum(tokens), sum(scored), sum(words), sum(size), math.fsum(nll))


class Likelihood(NamedTuple):
    """Of N tokens: natural logarithms of their probabilities [N]; their ranks [N] from 1, the likeliest; the K tokens
    that were held likeliest in their places and the logarithms of those, in order [N, K].
    """

    log_probs: Floats
    ranks: Ids
    top_ids: Ids
    top_log_probs: Floats

    def without(self, first: int) -> Likelihood:
        """All but the first so many tokens."""
        a, b, c, d = self
        return Likelihood(a[first:], b[first:], c[first:], d[first:])


def unknown(n: int, top: int) -> Likelihood:
    """Of n tokens nothing is known yet: NaN and 0."""
    return Likelihood(
        np.full(n, np.nan), np.zeros(n, np.int64), np.zeros((n, top), np.int64), np.full((n, top), np.nan)
    )


@dataclass(frozen=True, eq=False)
class Score:
    """A text of n tokens as the model sees it. pieces are the tokens' bytes, which joined are the text's; likelihood
    has NaN and rank 0 for a token that the convention does not score.
    """

    token_ids: Ids
    pieces: tuple[bytes, ...]
    likelihood: Likelihood

    @property
    def log_probs(self) -> Floats:
        """Natural logarithms of the tokens' probabilities [n]; NaN for those that are not scored."""
        return self.likelihood.log_probs

    @property
    def ranks(self) -> Ids:
        """[n], from 1, the likeliest; 0 for tokens that are not scored."""
        return self.likelihood.ranks

    @cached_property
    def byte_offsets(self) -> Ids:
        """Where each token begins in the text's UTF-8 [n]."""
        return np.cumsum([0, *map(len, self.pieces[:-1])])

    @cached_property
    def totals(self) -> Totals:
        """The sums over the text."""
        scored = ~np.isnan(self.log_probs)
        text, begins, at, byte = b"".join(self.pieces).decode(), [], 0, 0
        for word in re.finditer(r"\S+", text):
            byte += len(text[at : word.start()].encode())
            at = word.start()
            begins.append(byte)
        begun_in = np.searchsorted(self.byte_offsets, begins, side="right") - 1
        sizes = np.array([len(piece) for piece in self.pieces])
        return Totals(
            tokens=len(self.pieces),
            scored=int(scored.sum()),
            words=int(scored[begun_in].sum()),
            bytes=int(sizes[scored].sum()),
            nll=-math.fsum(self.log_probs[scored]),
        )

    @property
    def perplexity(self) -> float:
        """By token; see Totals for that by word, and for bits per byte."""
        return self.totals.perplexity


def likelihood(logits: Array, token_ids: Ids, top: int = 0) -> Likelihood:
    """Of the tokens that came [N], given the logits before each [N, V]; top: how many of the likeliest to name.

    log softmax, whose exponentials are taken in the logits' dtype and summed in float64, so that a float32 one is off
    by the logits' own rounding and some 1e-7 more. Equally likely tokens share a rank. Raises NpgptError where logits
    are not finite.
    """
    found = unknown(len(token_ids), top)
    rows = max(1, BLOCK // logits.shape[1])
    room = np.empty((rows, logits.shape[1]), logits.dtype)
    for start in range(0, len(logits), rows):
        some = slice(start, start + rows)
        part = logits[some]
        largest = part.max(axis=1, keepdims=True)
        check_finite(largest)
        exponentials = np.subtract(part, largest, out=room[: len(part)])
        np.exp(exponentials, out=exponentials)
        norm = largest + np.log(exponentials.sum(axis=1, keepdims=True, dtype=np.float64))
        own = np.take_along_axis(part, token_ids[some, None], axis=1)
        found.log_probs[some] = (own - norm)[:, 0]
        found.ranks[some] = [
            1 + np.count_nonzero(row) for row in part > own
        ]  # along an axis it takes five times as long
        if top:
            ids = np.argpartition(part, -top, axis=1)[:, -top:]
            order = np.lexsort((ids, -np.take_along_axis(part, ids, axis=1)))  # of equals the lowest id first
            found.top_ids[some] = ids = np.take_along_axis(ids, order, axis=1)
            found.top_log_probs[some] = np.take_along_axis(part, ids, axis=1) - norm
    return found
