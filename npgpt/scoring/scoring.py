"""How likely a model holds texts, token by token: computed here, or by any executor."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..checkpoints.find import find
from ..errors import CHECKS, NpgptError, checked, numbers, whole_number
from ..language_model import LanguageModel, Source, load, open_model
from .likelihood import Ids, Likelihood, Score, likelihood, unknown
from .windows import Convention, Window, windows
from .windows import convention as by_name

GROUP = 16  # contexts of tokens in the texts whose windows are batched together
AHEAD = 64  # batches handed out and not yet taken back


class Text(NamedTuple):
    """A text to score: its ids, after <|endoftext|> where the convention puts it there, and its windows."""

    number: int
    ids: Ids
    windows: list[Window]


class Batch(NamedTuple):
    """Windows of equal length from one group of texts, read together as rows.

    known holds what is known so far of each text in the group, by its number. The group's last batch names its texts,
    which are then complete.
    """

    rows: list[tuple[Text, Window]]
    known: dict[int, Likelihood]
    complete: list[Text]

    def ids(self) -> Ids:
        """Return the windows' ids [B, L + 1]. They are not stored: overlapping windows take many times the text."""
        return np.stack([text.ids[window.begin : window.last] for text, window in self.rows])

    def skip(self) -> int:
        """Return how many ids of each row are only read: those from skip + 1 on are scored."""
        _, window = self.rows[0]
        return window.first - window.begin - 1

    def take(self, scored: Likelihood) -> None:
        """Put the batch's tokens into their places."""
        length = len(scored.ranks) // len(self.rows)
        for row, (text, window) in enumerate(self.rows):
            for whole, part in zip(self.known[text.number], scored, strict=True):
                whole[window.first : window.last] = part[row * length : (row + 1) * length]


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
    texts: Iterable[str | ArrayLike],
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

    A text is a str, or its ids [T], which need no vocabulary.
    executor: any concurrent.futures.Executor, such as a process pool or Dask's, which is given the name of the model's
    file; without one the work is done here. Batches hold windows of equal length and no more tokens than one context.
    They are formed before they are handed out, so that neither memory nor result depends on who computes. Ids that pad
    a vocabulary take part in the softmax, as in other programs, though generate never draws them.
    convention, context, stride and end_of_text: see windows.convention. special: read <|endoftext|> in a text as a
    special token. top: how many of the likeliest tokens to name in each place. names: of the texts, for messages.
    skip: numbers of texts whose scores are not wanted; the batches stay the same. progress(tokens scored, of how many)
    is called after every batch; all texts are then read first.

    Raises NpgptError at once for an argument out of range. An empty text, one of which no token can be scored, and one
    that is a str for a model without text raise it when they are read.
    """
    if isinstance(texts, str):
        raise NpgptError("texts are several: put a single one into a list, [text]")
    CHECKS["Iterable[str]"]("texts", texts)
    model = model if isinstance(model, LanguageModel) else load(model)
    rule = convention_of(model, convention, context, stride, end_of_text)
    top = whole_number("top, the number of likeliest tokens to name,", top, low=0, high=model.config.vocab_size)
    before, names = [], tuple(names)
    if rule.end_of_text:
        if not model.begin_ids:
            has = f"has no text ({model.why_no_text}), and so" if model.why_no_text else "has"
            raise NpgptError(f"{model.name} {has} no <|endoftext|> to stand before a text: end_of_text=False, --no-bos")
        before = list(model.begin_ids)

    def ids_of(text: str | ArrayLike, name: str) -> list[int]:
        if isinstance(text, str):
            return model.tokenizer.encode(text, special=special, alone=True)
        return _ids(text, model, name)

    def read() -> Iterator[Text]:
        for number, text in enumerate(texts):
            name = names[number] if number < len(names) else f"text {number}"
            yield _text(number, before, ids_of(text, name), rule, name)

    return _scores(model, len(before), _groups(read(), rule.context), rule.context, executor, top, skip, progress)


def _ids(text: ArrayLike, model: LanguageModel, name: str) -> list[int]:
    """Return a text that is given as ids. Raises NpgptError for what is none of the model's."""
    ids = numbers(name, text)
    if ids.ndim != 1:
        raise NpgptError(f"{name} must be a text or ids [T], not of shape {list(ids.shape)}: [ids] for a single one")
    model.config.check_ids(ids)
    found: list[int] = ids.tolist()
    return found


def _piece(model: LanguageModel, token_id: int) -> bytes:
    """Return a token's bytes, none where the model or the id has no text."""
    return b"" if model.why_no_text or not model.tokenizer.has_text(token_id) else model.tokenizer.piece(token_id)


def convention_of(
    model: LanguageModel, name: str, context: int | None, stride: int | None, end_of_text: bool | None
) -> Convention:
    """Return a convention for a model; what its own tokenizer puts before every text stands there by default."""
    own = () if model.why_no_text else model.tokenizer.before
    end_of_text = True if own and end_of_text is None else end_of_text
    return by_name(name, model.config, context, stride, end_of_text, model.begins_with)


def _text(number: int, before: list[int], ids: list[int], rule: Convention, name: str) -> Text:
    """Return a text with its windows. Raises NpgptError, which gives its name, where no token can be scored."""
    if not ids:
        raise NpgptError(f"{name} is empty: there is nothing to score")
    ids = before + ids
    found = windows(len(ids), rule)
    if not found:
        least = f"a whole window of {rule.context}" if rule.name == "llama.cpp" else "2, or <|endoftext|> before it"
        raise NpgptError(f"{name} has too few tokens, {len(ids)}, to score one of them ({rule.name}): it takes {least}")
    return Text(number, np.array(ids, np.int64), found)


def _groups(texts: Iterable[Text], context: int) -> Iterator[list[Text]]:
    """Yield the texts in their order, as many together as have GROUP contexts of tokens."""
    group: list[Text] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text.ids)
        if size >= GROUP * context:
            yield group
            group, size = [], 0
    yield group


def _batches(group: list[Text], context: int, top: int) -> Iterator[Batch]:
    """Yield the windows of a group of texts by equal length, as many together as have a context of tokens."""
    alike: dict[tuple[int, int], list[tuple[Text, Window]]] = defaultdict(list)
    for text in group:
        for window in text.windows:
            alike[window.last - window.begin, window.first - window.begin].append((text, window))
    *parts, last = (
        rows[start : start + most]
        for (length, _), rows in alike.items()
        for most in [max(1, context // (length - 1))]
        for start in range(0, len(rows), most)
    )
    known = {text.number: unknown(len(text.ids), top) for text in group}
    yield from (Batch(rows, known, complete=[]) for rows in parts)
    yield Batch(last, known, complete=group)


def _scores(
    model: LanguageModel,
    begin: int,
    groups: Iterable[list[Text]],
    context: int,
    executor: Executor | None,
    top: int,
    skip: Container[int],
    progress: Callable[[int, int], None] | None,
) -> Iterator[Score]:
    """Yield the scores of each group's texts, without the `begin` ids in front, once its last batch is computed."""
    groups = (group for group in groups if any(text.number not in skip for text in group))
    done = expected = 0
    if progress is not None:
        groups = list(groups)
        expected = sum(w.last - w.first for group in groups for text in group for w in text.windows)
    batches = (batch for group in groups for batch in _batches(group, context, top))
    for batch, scored in _computed(model, batches, executor, top):
        batch.take(scored)
        done += len(scored.ranks)
        if progress is not None:
            progress(done, expected)
        for text in batch.complete:
            if text.number not in skip:
                ids = text.ids[begin:]
                pieces = tuple(_piece(model, token_id) for token_id in ids.tolist())
                yield Score(ids, pieces, batch.known[text.number].without(begin))


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
