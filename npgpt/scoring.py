"""How likely a model holds texts, token by token: computed here, or by any executor."""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .config import whole_number
from .errors import NpgptError
from .language_model import LanguageModel
from .loading import load
from .parameters import Array
from .sampling import check_finite
from .windows import Convention, Window, windows
from .windows import convention as by_name

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]
BLOCK = 2**18  # logits at a time on their way to probabilities, so that they stay in a core's L2 cache
GROUP = 16  # contexts of tokens that batches are formed from
AHEAD = 64  # batches handed out and not yet taken back


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


class Text(NamedTuple):
    """A text on its way: its ids, <|endoftext|> in front where the convention has it, and its windows."""

    number: int
    ids: Ids
    windows: list[Window]


class Batch(NamedTuple):
    """Windows of equal length, read together: all ids [B, L + 1] but each row's last are read, and those from skip + 1
    on are scored. places: of which text of the group a row is, and where its first scored id stands there.
    """

    ids: Ids
    skip: int
    places: list[tuple[int, int]]


@dataclass
class Group:
    """Texts whose windows are batched together, what is known of each id so far, and how many batches are missing."""

    texts: list[Text]
    known: list[Likelihood] = field(default_factory=list)
    missing: int = 0

    def take(self, batch: Batch, scored: Likelihood) -> None:
        """Put a batch's tokens into their places."""
        length = len(scored.ranks) // len(batch.places)
        for row, (index, first) in enumerate(batch.places):
            for whole, part in zip(self.known[index], scored, strict=True):
                whole[first : first + length] = part[row * length : (row + 1) * length]
        self.missing -= 1


def compute(model: LanguageModel, batch: Batch, top: int) -> Likelihood:
    """What is scored of a batch, row after row: the piece of work that an executor is given."""
    with np.errstate(over="ignore", invalid="ignore"):  # check_finite says in words what is wrong
        logits = model(batch.ids[:, :-1])
        rows = zip(logits[:, batch.skip :], batch.ids[:, batch.skip + 1 :], strict=True)
        parts = [likelihood(row, ids, top) for row, ids in rows]
    return Likelihood(*map(np.concatenate, zip(*parts, strict=True)))


def score(
    texts: Iterable[str],
    model: LanguageModel | str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    *,
    convention: str = "rolling",
    context: int | None = None,
    stride: int | None = None,
    end_of_text: bool | None = None,
    special: bool = False,
    top: int = 0,
    names: Sequence[str] = (),
    skip: Container[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Score]:
    """Yield each text's Score, in order: of every token the log-probability and the rank that the model gives it.

    executor: any concurrent.futures.Executor, a process pool's or Dask's, to which the model goes as the name of its
    file; without one it is computed here. Batches are formed before they are handed out, of windows of equal length and
    with no more tokens than one context, so that neither the memory nor the result depends on who computes.
    convention, context, stride and end_of_text: see npgpt.windows.convention. special: read <|endoftext|> in a text as
    such. top: how many of the likeliest tokens to name in each place. names: of the texts, for messages. skip: numbers
    of texts whose scores are not wanted; the batches stay as they were. progress(tokens scored, of how many) is called
    as it goes; all texts are read first, then.

    Raises NpgptError at once for an argument out of range and a model without text; for an empty text, and one of which
    no token can be scored, as it is read.
    """
    if isinstance(texts, str):
        raise NpgptError("texts are several: put a single one into a list, [text]")
    model = model if isinstance(model, LanguageModel) else load(model)
    rule = by_name(convention, model.config, context, stride, end_of_text)
    top = whole_number("top, the number of likeliest tokens to name,", top, low=0, high=model.config.vocab_size)
    if rule.end_of_text and model.tokenizer.end_of_text is None:
        raise NpgptError(f"{model.name} has no <|endoftext|> to stand before a text: end_of_text=False, --no-bos")
    read = (_text(model, rule, number, text, names, special) for number, text in enumerate(texts))
    return _scores(model, rule, _groups(read, rule.context), executor, top, skip, progress)


def _text(model: LanguageModel, rule: Convention, number: int, text: str, names: Sequence[str], special: bool) -> Text:
    name = names[number] if names else f"text {number}"
    ids = model.tokenizer.encode(text, special=special)
    if not ids:
        raise NpgptError(f"{name} is empty: there is nothing to score")
    if rule.end_of_text:
        assert model.tokenizer.end_of_text is not None  # or score has refused
        ids = [model.tokenizer.end_of_text, *ids]
    found = windows(len(ids), rule)
    if not found:
        least = f"a whole window of {rule.context}" if rule.name == "llama.cpp" else "2, or <|endoftext|> before it"
        raise NpgptError(f"{name} has too few tokens, {len(ids)}, to score one of them ({rule.name}): it takes {least}")
    return Text(number, np.array(ids, np.int64), found)


def _groups(texts: Iterable[Text], context: int) -> Iterator[Group]:
    """Texts in their order, as many together as have GROUP contexts of tokens."""
    gathered: list[Text] = []
    size = 0
    for text in texts:
        gathered.append(text)
        size += len(text.ids)
        if size >= GROUP * context:
            yield Group(gathered)
            gathered, size = [], 0
    yield Group(gathered)


def _batches(group: Group, context: int) -> list[Batch]:
    """A group's windows, those of equal length side by side."""
    alike: dict[tuple[int, int], list[tuple[int, Window]]] = defaultdict(list)
    for index, text in enumerate(group.texts):
        for window in text.windows:
            alike[window.last - window.begin, window.first - window.begin - 1].append((index, window))
    found = []
    for (length, skip), places in alike.items():
        rows = max(1, context // (length - 1))
        for start in range(0, len(places), rows):
            some = places[start : start + rows]
            ids = np.stack([group.texts[index].ids[window.begin : window.last] for index, window in some])
            found.append(Batch(ids, skip, [(index, window.first) for index, window in some]))
    return found


def _scores(
    model: LanguageModel,
    rule: Convention,
    groups: Iterable[Group],
    executor: Executor | None,
    top: int,
    skip: Container[int],
    progress: Callable[[int, int], None] | None,
) -> Iterator[Score]:
    """The scores of every group's texts, as soon as its last batch is there."""
    wanted: Iterator[Group] = (group for group in groups if any(text.number not in skip for text in group.texts))
    done = expected = 0
    if progress is not None:
        groups = list(wanted)
        expected = sum(w.last - w.first for group in groups for text in group.texts for w in text.windows)
        wanted = iter(groups)

    def jobs() -> Iterator[tuple[Group, Batch]]:
        for group in wanted:
            group.known = [unknown(len(text.ids), top) for text in group.texts]
            pieces = _batches(group, rule.context)
            group.missing = len(pieces)
            yield from ((group, piece) for piece in pieces)

    begin = 1 if rule.end_of_text else 0  # <|endoftext|> in front is none of the text's tokens
    for group, batch, scored in _computed(model, jobs(), executor, top):
        group.take(batch, scored)
        done += len(scored.ranks)
        if progress is not None:
            progress(done, expected)
        if group.missing:
            continue
        for text, known in zip(group.texts, group.known, strict=True):
            if text.number not in skip:
                ids = text.ids[begin:]
                pieces = tuple(model.tokenizer.piece(token_id) for token_id in ids.tolist())
                yield Score(ids, pieces, known.without(begin))


def _computed(
    model: LanguageModel, jobs: Iterator[tuple[Group, Batch]], executor: Executor | None, top: int
) -> Iterator[tuple[Group, Batch, Likelihood]]:
    """Every batch with its result, in their order, whoever finishes first."""
    if executor is None:
        yield from ((group, batch, compute(model, batch, top)) for group, batch in jobs)
        return
    waiting: deque[tuple[Group, Batch, Future[Likelihood]]] = deque()
    try:
        for group, batch in jobs:
            waiting.append((group, batch, executor.submit(compute, model, batch, top)))
            if len(waiting) == AHEAD:
                earlier, its, future = waiting.popleft()
                yield earlier, its, future.result()
        while waiting:
            earlier, its, future = waiting.popleft()
            yield earlier, its, future.result()
    except GeneratorExit:  # nobody wants the rest; after an error a pool that breaks trips over what is cancelled
        for _, _, future in waiting:
            future.cancel()
        raise
