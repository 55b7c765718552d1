"""How likely a model holds texts, token by token: computed here, or by any executor."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..checkpoints.find import find
from ..errors import CHECKS, NpgptError, checked, whole_number
from ..language_model import LanguageModel, Source, open_model, opened
from .likelihood import Figures, Ids, Likelihood, Score, Totals, likelihood
from .texts import Row, Text, tokens
from .windows import Convention, convention_of

GROUP = 16  # contexts of tokens in the texts whose windows are batched together
AHEAD = 64  # batches handed out and not yet taken back


class Batch(NamedTuple):
    """Windows of equal length, and with as many tokens to score, from one group of texts, read together as rows."""

    rows: list[Row]

    def ids(self) -> Ids:
        """Return the windows' ids [B, L + 1]."""
        return np.stack([row.ids for row in self.rows])

    def skip(self) -> int:
        """Return how many ids of each row are only read: those from skip + 1 on are scored."""
        window = self.rows[0].window
        return window.first - window.begin - 1

    def take(self, scored: Likelihood) -> tuple[int, int]:
        """Hand each row's figures to its text, if that is wanted. Return the numbers of tokens and of bytes of such."""
        length = len(scored.ranks) // len(self.rows)
        tokens = read = 0
        for number, (text, window, _, covered) in enumerate(self.rows):
            if text.wanted:
                some = slice(number * length, (number + 1) * length)
                text.take(window, Likelihood._make(figures[some] for figures in scored))
                tokens, read = tokens + length, read + covered
        return tokens, read


@dataclass(frozen=True, eq=False)
class SharedModel:
    """A model as a piece of work carries it: the model itself here, a StoredModel in another process."""

    model: LanguageModel

    def open(self) -> LanguageModel:
        """Return the model."""
        return self.model

    def __reduce__(self) -> tuple[Any, ...]:
        name, source = self.model.name, self.model.source
        if source is None:
            raise NpgptError(f"{name} lies in no file that another process could load: npgpt.save, then npgpt.load")
        return StoredModel, (source, self.model.fingerprint)


class StoredModel(NamedTuple):
    """A model's file and the fingerprint it must have.

    The work opens it, not the unpickling, so that a fault in the file is an error of the work.
    """

    source: Source
    fingerprint: str

    def open(self) -> LanguageModel:
        """Return the model, mapped once for all the work. Raises NpgptError for a file that is missing or changed."""
        return _opened(self)


@lru_cache(maxsize=1)
def _opened(stored: StoredModel) -> LanguageModel:
    weights = stored.source.weights
    find(weights)  # reports a missing file as load() does
    model = open_model(stored.source)
    if model.fingerprint != stored.fingerprint:
        raise NpgptError(
            f"{weights} holds other weights than the model whose work was handed out: it is another file here, "
            "or the model was changed in memory (npgpt.save it, and npgpt.load that)"
        )
    return model


def compute(shared: SharedModel | StoredModel, ids: Ids, skip: int, top: int) -> Likelihood:
    """Score the ids [B, L + 1] of a batch from skip + 1 on, row by row: the piece of work that an executor is given."""
    model = shared.open()
    with np.errstate(over="ignore", invalid="ignore"):  # check_finite says in words what is wrong
        logits = model(ids[:, :-1], logits_from=skip)
        parts = [likelihood(*row, top) for row in zip(logits, ids[:, skip + 1 :], strict=True)]
    return Likelihood(*map(np.concatenate, zip(*parts, strict=True)))


@checked
def score(
    texts: Iterable[str | Iterator[str] | ArrayLike],
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
    """Yield each text's Score in order: the log-probability and the rank that the model gives every token.

    A text is a str, or its ids [T], which need no vocabulary. Texts are read as they are scored; a long one may be an
    iterator of its parts, such as an open file.
    executor: any concurrent.futures.Executor, such as a process pool or Dask's, which is given the name of the model's
    file; without one the work is done here. Batches hold windows of equal length and no more tokens than one context.
    They are formed before they are handed out, so that neither memory nor result depends on who computes. Ids that pad
    a vocabulary take part in the softmax, as in other programs, though generate never draws them.
    convention, context, stride and end_of_text: see windows.convention. special: read <|endoftext|> in a text as a
    special token. top: how many of the likeliest tokens to name in each place. names: of the texts, for messages.
    skip: numbers of texts whose scores are not wanted; the batches stay the same. progress(tokens scored, bytes of text
    read for that) is called after every batch.

    Raises NpgptError at once for an argument out of range. An empty text, one of which no token can be scored, and one
    that is a str for a model without text raise it when they are read.
    """
    pieces: dict[int, bytes] = {}
    complete = _complete(
        texts,
        model,
        executor,
        pieces,
        top,
        convention=convention,
        context=context,
        stride=stride,
        end_of_text=end_of_text,
        special=special,
        names=names,
        skip=skip,
        progress=progress,
    )
    return (text.score(pieces) for text in complete)


@checked
def totals(
    texts: Iterable[str | Iterator[str] | ArrayLike],
    model: LanguageModel | str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    **options: Any,
) -> Iterator[Totals]:
    """Yield each text's Totals in order: those of its Score, without keeping any token's figures.

    The options are those of score(), but for top. Raises NpgptError as score() does.
    """
    return (text.totals() for text in _complete(texts, model, executor, {}, None, **options))


@checked
def _complete(
    texts: Iterable[str | Iterator[str] | ArrayLike],
    model: LanguageModel | str | os.PathLike[str] | None,
    executor: Executor | None,
    pieces: dict[int, bytes],
    top: int | None,
    *,
    convention: str = "rolling",
    context: int | None = None,
    stride: int | None = None,
    end_of_text: bool | None = None,
    special: bool = False,
    names: Sequence[str] = (),
    skip: Container[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Text]:
    """Check the arguments of score(), then yield the texts that are wanted, in order, each once all of it is scored.

    pieces: takes in the bytes of every id. top: None where no token's figures are to be kept.
    """
    if isinstance(texts, str):
        raise NpgptError("texts are several: put a single one into a list, [text]")
    CHECKS["Iterable[str]"]("texts", texts)
    model = opened(model)
    rule = convention_of(model, convention, context, stride, end_of_text)
    keep, high = top is not None, model.config.vocab_size
    top = whole_number("top, the number of likeliest tokens to name,", top if keep else 0, low=0, high=high)
    before = np.array(model.begin_ids if rule.end_of_text else [], np.int64)
    if rule.end_of_text and not before.size:
        has = f"has no text ({model.why_no_text}), and so" if model.why_no_text else "has"
        raise NpgptError(f"{model.name} {has} no <|endoftext|> to stand before a text: end_of_text=False, --no-bos")
    names = tuple(names)
    waiting: deque[Text] = deque()  # the texts that are wanted, from the first one that is not complete

    def read() -> Iterator[Text]:
        for number, text in enumerate(texts):
            name, wanted = names[number] if number < len(names) else f"text {number}", number not in skip
            parts = tokens(text, model, special, pieces, name)
            found = Text(number, name, wanted, parts, before, Figures(top) if keep and wanted else None)
            if wanted:
                waiting.append(found)
            yield found

    batches = _computed(model, _batches(read(), rule), executor, top)

    def complete() -> Iterator[Text]:
        scored = covered = 0
        for batch, figures in batches:
            more, further = batch.take(figures)
            scored, covered = scored + more, covered + further
            if progress is not None:
                progress(scored, covered)
            while waiting and not waiting[0].left:
                yield waiting.popleft()

    return complete()


def _batches(texts: Iterable[Text], rule: Convention) -> Iterator[Batch]:
    """Yield the texts' windows by equal length, as many together as have a context of tokens.

    Windows of different texts come together within a group: as many texts, in their order, as have GROUP contexts of
    tokens. Batches of which nothing is wanted are left out.
    """
    group: list[Text] = []  # whose windows are not read, since nothing of the group is wanted so far
    alike: dict[tuple[int, int], list[Row]] = {}
    size, wanted = 0, False
    for text in texts:
        group.append(text)
        if wanted or text.wanted:
            size, wanted = size if wanted else 0, True
            for one in group:
                yield from _full(one.rows(rule), alike, rule.context)
                size += len(one)
            group = []
        else:
            text.known(GROUP * rule.context)  # its size, as far as that decides where the group ends
            size += len(text)
        if size >= GROUP * rule.context:
            yield from _wanted(alike.values())
            group, alike, size, wanted = [], {}, 0, False
    yield from _wanted(alike.values())


def _full(rows: Iterable[Row], alike: dict[tuple[int, int], list[Row]], context: int) -> Iterator[Batch]:
    """Put rows beside those that are alike, and yield each batch that is full."""
    for row in rows:
        key = len(row.ids), row.window.first - row.window.begin
        batch = alike.setdefault(key, [])
        batch.append(row)
        if len(batch) == max(1, context // (len(row.ids) - 1)):
            yield from _wanted([alike.pop(key)])


def _wanted(batches: Iterable[list[Row]]) -> Iterator[Batch]:
    return (Batch(rows) for rows in batches if any(row.text.wanted for row in rows))


def _computed(
    model: LanguageModel, batches: Iterator[Batch], executor: Executor | None, top: int
) -> Iterator[tuple[Batch, Likelihood]]:
    """Yield every batch with its result, in their order, whoever finishes first."""
    shared = SharedModel(model)
    if executor is None:
        yield from ((batch, compute(shared, batch.ids(), batch.skip(), top)) for batch in batches)
        return
    waiting: deque[tuple[Batch, Future[Likelihood]]] = deque()

    def earliest() -> tuple[Batch, Likelihood]:
        batch, future = waiting.popleft()
        return batch, future.result()

    try:
        for batch in batches:
            waiting.append((batch, executor.submit(compute, shared, batch.ids(), batch.skip(), top)))
            if len(waiting) == AHEAD:
                yield earliest()
        while waiting:
            yield earliest()
    except GeneratorExit:  # nobody wants the rest; after an error a pool that breaks trips over what is cancelled
        for _, future in waiting:
            future.cancel()
        raise
