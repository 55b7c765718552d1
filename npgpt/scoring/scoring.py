"""Score texts token by token, in this process or with any executor."""

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
from .texts import Row, Text, convention_of, tokens
from .windows import Convention

GROUP = 16  # size, in contexts, of a group of texts whose windows are batched together
AHEAD = 64  # batches submitted ahead of the one awaited


class Batch(NamedTuple):
    """Windows from one group of texts with the same length and the same number of scored tokens, as rows."""

    rows: list[Row]

    def ids(self) -> Ids:
        """Return the ids of the windows [B, L + 1]."""
        return np.stack([row.ids for row in self.rows])

    def skip(self) -> int:
        """Return the index before the first scored id of each row: ids from skip + 1 on are scored."""
        window = self.rows[0].window
        return window.first - window.begin - 1

    def take(self, scored: Likelihood) -> tuple[int, int]:
        """Store the likelihood of the rows whose texts are wanted; return their numbers of tokens and bytes."""
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
    """A model in a task for an executor. Pickling turns it into a StoredModel."""

    model: LanguageModel

    def open(self) -> LanguageModel:
        """Return the model."""
        return self.model

    def __reduce__(self) -> tuple[Any, ...]:
        name, source = self.model.name, self.model.source
        if source is None:
            raise NpgptError(
                f"{name} is not in a file that another process can load: npgpt.save it, then npgpt.load it"
            )
        return StoredModel, (source, self.model.fingerprint)


class StoredModel(NamedTuple):
    """The file of a model and the fingerprint it must have.

    The task opens the file, not the unpickling, so that a fault in the file is an error of the task.
    """

    source: Source
    fingerprint: str

    def open(self) -> LanguageModel:
        """Return the model, opened once for all tasks. Raises NpgptError for a missing or changed file."""
        return _opened(self)


@lru_cache(maxsize=1)
def _opened(stored: StoredModel) -> LanguageModel:
    weights = stored.source.weights
    find(weights)  # raises for a missing file as load() does
    model = open_model(stored.source)
    if model.fingerprint != stored.fingerprint:
        raise NpgptError(
            f"{weights} does not have the weights of the model to be used: the file differs on this machine, "
            "or the model was changed in memory (npgpt.save it, then npgpt.load it)"
        )
    return model


def compute(shared: SharedModel | StoredModel, ids: Ids, skip: int, top: int) -> Likelihood:
    """Score the ids [B, L + 1] of a batch from index skip + 1 on, row by row. This is the task of an executor."""
    model = shared.open()
    with np.errstate(over="ignore", invalid="ignore"):  # check_finite reports it
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
    """Yield each text's Score in order: the log-probability and rank that the model gives every token.

    A text is a str, an iterator of its parts such as an open file, or ids [T], which need no vocabulary. Texts are read
    as they are scored. executor: any concurrent.futures.Executor, such as a process pool or Dask's; its workers open
    the model's file. The default is to compute here. A batch holds windows of equal length and at most one context of
    tokens. Batches do not depend on the executor, so neither do memory and results. Ids that only pad a vocabulary take
    part in the softmax, as in other programs, although generate never draws them. convention, context, stride,
    end_of_text: see windows.convention. special: encode <|endoftext|> in a text as a special token. top: number of most
    likely tokens to return at each position. names: the texts' names in messages. skip: numbers of texts that are not
    scored; the batches stay the same. progress(tokens scored, bytes read) is called after every batch.

    Raises NpgptError at once for an argument out of range, and when reading a text that is empty or too short to score,
    or a str if the model has no vocabulary.
    """
    pieces: dict[int, bytes] = {}
    model = opened(model)
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
    return (text.score(model, pieces) for text in complete)


@checked
def totals(
    texts: Iterable[str | Iterator[str] | ArrayLike],
    model: LanguageModel | str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    **options: Any,
) -> Iterator[Totals]:
    """Yield each text's Totals in order, equal to those of its Score, without keeping figures of tokens.

    The options are those of score() except top. Raises NpgptError as score() does.
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
    """Check the arguments of score(), then yield the wanted texts in order as soon as they are scored.

    pieces is updated with the bytes of every id. top: None if the figures of tokens are not kept.
    """
    if isinstance(texts, str):
        raise NpgptError("texts must be in a list or another iterable: pass a single one as [text]")
    CHECKS["Iterable[str]"]("texts", texts)
    model = opened(model)
    rule = convention_of(model, convention, context, stride, end_of_text)
    keep, high = top is not None, model.config.vocab_size
    top = whole_number("top, the number of most likely tokens,", top if keep else 0, low=0, high=high)
    before = np.array(model.begin_ids if rule.end_of_text else [], np.int64)
    if rule.end_of_text and not before.size:
        has = f"has no text ({model.why_no_text}), and so" if model.why_no_text else "has"
        raise NpgptError(f"{model.name} {has} no <|endoftext|> to put before a text: use end_of_text=False or --no-bos")
    names = tuple(names)
    waiting: deque[Text] = deque()  # wanted texts from the first incomplete one on

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
    """Yield batches of windows of equal length, each with at most one context of tokens.

    Windows of different texts share a batch within a group: consecutive texts with GROUP contexts of tokens. Batches
    without a wanted text are skipped.
    """
    group: list[Text] = []  # whose windows are not read while no text of the group is wanted
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
            text.known(GROUP * rule.context)  # read far enough to know where the group ends
            size += len(text)
        if size >= GROUP * rule.context:
            yield from _wanted(alike.values())
            group, alike, size, wanted = [], {}, 0, False
    yield from _wanted(alike.values())


def _full(rows: Iterable[Row], alike: dict[tuple[int, int], list[Row]], context: int) -> Iterator[Batch]:
    """Add rows to the batch of their kind, and yield each batch that is full."""
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
    """Yield every batch with its result, in the order of the batches."""
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
    except GeneratorExit:  # no more results are wanted; after an error, a broken pool fails on cancelled futures
        for _, future in waiting:
            future.cancel()
        raise
