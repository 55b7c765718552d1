"""The log-probabilities and ranks of a text's tokens, their sums, and perplexity."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import counted
from ..parameters import Array
from ..pictures.page import in_notebook
from ..text.sampling import check_finite

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]
PIECES = 2**14  # tokens whose words are counted at a time
LONGEST, FRAME = 2**14, 400  # tokens that a notebook shows, and pixels of the page's height there
BLOCK = 2**18  # logits normalised at a time, so that they stay in a core's L2 cache


class Totals(NamedTuple):
    """Sums over the scored tokens; nll is the negative log-likelihood in nats, and `tokens` counts all tokens.

    Words are separated by white space. A word is counted if the token in which it begins is scored.
    """

    tokens: int
    scored: int
    words: int
    bytes: int
    nll: float

    @property
    def perplexity(self) -> float:
        """The perplexity per token, exp(nll / scored)."""
        return _exp_mean(self.nll, self.scored)

    @property
    def word_perplexity(self) -> float:
        """The perplexity per word, exp(nll / words)."""
        return _exp_mean(self.nll, self.words)

    @property
    def bits_per_byte(self) -> float:
        """The negative log-likelihood in bits per byte of text, nll / (bytes · ln 2)."""
        return self.nll / self.bytes / math.log(2) if self.bytes else math.nan


def figure(perplexity: float) -> str:
    """Return a perplexity with three decimals, or in short if it is astronomical: 1.2e46."""
    return f"{perplexity:,.3f}" if perplexity < 1e9 else f"{perplexity:.2g}".replace("e+", "e")


def _exp_mean(nll: float, count: int) -> float:
    """Return exp(nll / count), or infinity if it overflows."""
    mean = nll / count if count else math.nan
    return math.inf if mean > 700 else math.exp(mean)


class Sums:
    """A running sum of the Totals of texts."""

    def __init__(self) -> None:
        self.texts = 0
        self._counts = [0, 0, 0, 0]
        self._nll: list[float] = []

    def add(self, part: Totals) -> None:
        """Add one text's totals."""
        *counts, nll = part
        self.texts += 1
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)]
        self._nll = exact([*self._nll, nll])

    def totals(self) -> Totals:
        """Return the sums so far; the order of the texts does not change them."""
        return Totals._make([*self._counts, math.fsum(self._nll)])


def total(parts: Iterable[Totals]) -> Totals:
    """Return the sums over several texts."""
    sums = Sums()
    for part in parts:
        sums.add(part)
    return sums.totals()


def exact(values: list[float]) -> list[float]:
    """Return a few numbers whose exact sum equals the exact sum of the values.

    math.fsum rounds the exact sum once. Its rounding error is again a sum, which is rounded, and so on until it is 0.
    """
    found: list[float] = []
    while left := math.fsum(values):
        found.append(left)
        if not math.isfinite(left):
            break  # nothing added to it changes it
        values = [*values, -left]
    return found


class Likelihood(NamedTuple):
    """The log-probabilities and ranks of N tokens, and the K most likely tokens at the position of each.

    log_probs [N] are natural logarithms. ranks [N] count from 1, the most likely token. top_ids and top_log_probs [N,
    K] are in descending order of probability.
    """

    log_probs: Floats
    ranks: Ids
    top_ids: Ids
    top_log_probs: Floats


def unknown(n: int, top: int) -> Likelihood:
    """Return the Likelihood of n tokens that are not scored: NaN and rank 0."""
    ranks, top_ids = np.zeros(n, np.int64), np.zeros((n, top), np.int64)
    return Likelihood(np.full(n, np.nan), ranks, top_ids, np.full((n, top), np.nan))


class Figures:
    """The Likelihood of a text of unknown length, which grows as tokens are scored."""

    def __init__(self, top: int) -> None:
        self._known = unknown(0, top)

    def put(self, first: int, part: Likelihood) -> None:
        """Store the likelihood of the tokens from `first` on."""
        last = first + len(part.ranks)
        self._make_room(last, last // 8)
        for whole, some in zip(self._known, part, strict=True):
            whole[first:last] = some

    def between(self, first: int, last: int) -> Likelihood:
        """Return the likelihood of the tokens first to last − 1."""
        self._make_room(last)
        return Likelihood._make(figures[first:last] for figures in self._known)

    def _make_room(self, length: int, more: int = 0) -> None:
        if length > len(self._known.ranks):
            larger = unknown(length + more, self._known.top_ids.shape[1])
            for new, old in zip(larger, self._known, strict=True):
                new[: len(old)] = old
            self._known = larger


def measured(pieces: Sequence[bytes]) -> tuple[Ids, Ids]:
    """Return the size of each token in bytes and the number of words that begin in it; joined, the pieces are a text.

    A piece need not be whole characters. Words are counted in at least PIECES tokens at a time, up to a token that
    begins with white space.
    """
    sizes, words = np.fromiter(map(len, pieces), np.int64, len(pieces)), np.zeros(len(pieces), np.int64)
    begin = 0
    while begin < len(pieces):
        end = begin + PIECES
        while end < len(pieces) and pieces[end][:1] not in (b" ", b"\n", b"\r", b"\t"):
            end += 1
        text, begins, at, byte = b"".join(pieces[begin:end]).decode(errors="surrogateescape"), [], 0, 0
        for word in re.finditer(r"\S+", text):
            byte += len(text[at : word.start()].encode(errors="surrogateescape"))
            at = word.start()
            begins.append(byte)
        begun_in = np.searchsorted(np.cumsum(sizes[begin:end]), begins, side="right")
        words[begin:end] = np.bincount(begun_in, minlength=len(words[begin:end]))
        begin = end
    return sizes, words


@dataclass(frozen=True, eq=False)
class Score:
    """A scored text of n tokens.

    pieces are the bytes of the tokens, empty for ids without text. likelihood has NaN and rank 0 for tokens that the
    convention does not score. measures are the number of bytes [n] that each token covers in the text (see
    Tokenizer.stretches) and the number of words [n] that begin there; None if the pieces joined are the text.
    """

    token_ids: Ids
    pieces: tuple[bytes, ...]
    likelihood: Likelihood
    measures: tuple[Ids, Ids] | None = None
    top_pieces: Mapping[int, bytes] = field(default_factory=dict)  # the bytes of the likelihood's top_ids, as in pieces

    def __repr__(self) -> str:
        """Return the sums in short."""
        t = self.totals
        sums = f"perplexity {figure(t.perplexity)}, {t.bits_per_byte:.4f} bits per byte" if t.scored else "no sums"
        return f"Score({counted(t.tokens, 'token')}, {t.scored:,} scored: {sums})"

    def _repr_html_(self) -> str | None:
        """Return the page of npgpt score --html for a notebook, or None, so that it shows the repr, of a long text."""
        from .page import score_page  # it shows scores

        if len(self.pieces) > LONGEST:
            return None
        return in_notebook("".join(score_page([("text", self)])), FRAME)

    @property
    def log_probs(self) -> Floats:
        """The natural logarithm of each token's probability [n]; NaN for tokens that are not scored."""
        return self.likelihood.log_probs

    @property
    def ranks(self) -> Ids:
        """The rank of each token [n] from 1, the most likely; 0 for tokens that are not scored."""
        return self.likelihood.ranks

    @cached_property
    def byte_offsets(self) -> Ids:
        """The offset of each token [n] in the text's UTF-8."""
        sizes, _ = self.measures or measured(self.pieces)
        return np.cumsum(sizes) - sizes

    @cached_property
    def totals(self) -> Totals:
        """The sums over the scored tokens."""
        scored = ~np.isnan(self.log_probs)
        sizes, words = self.measures or measured(self.pieces)
        return Totals(
            tokens=len(self.pieces),
            scored=int(scored.sum()),
            words=int(words[scored].sum()),
            bytes=int(sizes[scored].sum()),
            nll=-math.fsum(self.log_probs[scored]),
        )

    @property
    def perplexity(self) -> float:
        """The perplexity per token; see totals for perplexity per word and bits per byte."""
        return self.totals.perplexity


def likelihood(logits: Array, token_ids: Ids, top: int = 0) -> Likelihood:
    """Return the Likelihood of tokens [N], given the logits [N, V] that predict them; top is K.

    Exponentials have the logits' dtype and are summed in float64, which adds about 1e-7 to the rounding of float32
    logits. Equally likely tokens share a rank. Raises NpgptError if the logits are not finite.
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
        # row by row: count_nonzero along an axis takes five times as long
        found.ranks[some] = [1 + np.count_nonzero(row) for row in part > own]
        if top:
            ids = np.argpartition(part, -top, axis=1)[:, -top:]
            order = np.lexsort((ids, -np.take_along_axis(part, ids, axis=1)))  # the lowest id first on a tie
            found.top_ids[some] = ids = np.take_along_axis(ids, order, axis=1)
            found.top_log_probs[some] = np.take_along_axis(part, ids, axis=1) - norm
    return found
