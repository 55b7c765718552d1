"""How likely a model holds texts, token by token: computed here, or by any executor."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..checkpoints.find import find
from ..errors import NpgptError, whole_number
from ..language_model import LanguageModel, Source, load, open_model
from .likelihood import Ids, Likelihood, Score, likelihood, unknown
from .windows import Convention, Window, windows
from .windows import convention as by_name

GROUP = 16  # contexts of tokens that batches are formed from
AHEAD = 64  # batches handed out and not yet taken back


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


@dataclass(frozen=True, eq=False)
class SharedModel:
    """A model as a piece of work carries it: here the model itself, in another process the file that it came from.

    It is loaded there by the work, and not by unpickling, so that what is wrong with it is an error of the work.
    """

    model: LanguageModel | None
    source: Source | None = None
    fingerprint: str = ""

    def open(self) -> LanguageModel:
        """Return the model, mapped once for all the work. Raises NpgptError for a file that is missing or changed."""
        if self.model is None:
            assert self.source is not None
            return _opened(self.source, self.fingerprint)
        return self.model

    def __reduce__(self) -> tuple[Any, ...]:
        if self.model is None:
            return SharedModel, (None, self.source, self.fingerprint)
        if self.model.source is None:
            raise NpgptError(
                f"{self.model.name} lies in no file that another process could load: npgpt.save, then npgpt.load"
            )
        return SharedModel, (None, self.model.source, self.model.fingerprint)


@lru_cache(maxsize=1)  # every piece of work brings a SharedModel of its own
def _opened(source: Source, fingerprint: str) -> LanguageModel:
    find(source.weights)  # a file that is not there is told as load() tells it
    model = open_model(source)
    if model.fingerprint != fingerprint:
        raise NpgptError(
            f"{source.weights} holds other weights than the model whose work was handed out: it is another file here, "
            "or the model was changed in memory (npgpt.save it, and npgpt.load that)"
        )
    return model


def compute(shared: SharedModel, batch: Batch, top: int) -> Likelihood:
    """Score a batch, row after row: the piece of work that an executor is given."""
    model = shared.open()
    with np.errstate(over="ignore", invalid="ignore"):  # check_finite says in words what is wrong
        logits = model(batch.ids[:, :-1], logits_from=batch.skip)
        rows = zip(logits, batch.ids[:, batch.skip + 1 :], strict=True)
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
    with no more tokens than one context, so that neither the memory nor the result depends on who computes. Ids that
    pad a vocabulary take part in the softmax, as in other programs, though generate never draws them.
    convention, context, stride and end_of_text: see windows.convention. special: read <|endoftext|> in a text as
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
    end_of_text_id = model.tokenizer.end_of_text
    if rule.end_of_text and end_of_text_id is None:
        raise NpgptError(f"{model.name} has no <|endoftext|> to stand before a text: end_of_text=False, --no-bos")
    before = [end_of_text_id] if rule.end_of_text and end_of_text_id is not None else []

    def read() -> Iterator[Text]:
        for number, text in enumerate(texts):
            ids = model.tokenizer.encode(text, special=special)
            yield _text(number, before, ids, rule, names[number] if names else f"text {number}")

    return _scores(model, len(before), _groups(read(), rule.context), rule.context, executor, top, skip, progress)


def _text(number: int, before: list[int], ids: list[int], rule: Convention, name: str) -> Text:
    """A text's windows. Raises NpgptError, with its name, where no token can be scored."""
    if not ids:
        raise NpgptError(f"{name} is empty: there is nothing to score")
    ids = before + ids
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


def _rows(group: Group, context: int) -> list[list[tuple[int, Window]]]:
    """Which texts' windows make a batch: those of equal length, as many as have a context of tokens."""
    alike: dict[tuple[int, int], list[tuple[int, Window]]] = defaultdict(list)
    for index, text in enumerate(group.texts):
        for window in text.windows:
            alike[window.last - window.begin, window.first - window.begin].append((index, window))
    return [
        places[start : start + rows]
        for (length, _), places in alike.items()
        for rows in [max(1, context // (length - 1))]
        for start in range(0, len(places), rows)
    ]


def _batch(group: Group, places: list[tuple[int, Window]]) -> Batch:
    """The windows' ids, side by side; only now, since windows overlap and all of them take many times the text."""
    ids = np.stack([group.texts[index].ids[window.begin : window.last] for index, window in places])
    _, one = places[0]
    return Batch(ids, one.first - one.begin - 1, [(index, window.first) for index, window in places])


def _scores(
    model: LanguageModel,
    begin: int,
    groups: Iterable[Group],
    context: int,
    executor: Executor | None,
    top: int,
    skip: Container[int],
    progress: Callable[[int, int], None] | None,
) -> Iterator[Score]:
    """The scores of every group's texts, less the `begin` ids in front, as soon as its last batch is there."""
    wanted: Iterator[Group] = (group for group in groups if any(text.number not in skip for text in group.texts))
    done = expected = 0
    if progress is not None:
        groups = list(wanted)
        expected = sum(w.last - w.first for group in groups for text in group.texts for w in text.windows)
        wanted = iter(groups)

    def jobs() -> Iterator[tuple[Group, Batch]]:
        for group in wanted:
            group.known = [unknown(len(text.ids), top) for text in group.texts]
            rows = _rows(group, context)
            group.missing = len(rows)
            yield from ((group, _batch(group, places)) for places in rows)

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
        group.known = []


def _computed(
    model: LanguageModel, jobs: Iterator[tuple[Group, Batch]], executor: Executor | None, top: int
) -> Iterator[tuple[Group, Batch, Likelihood]]:
    """Every batch with its result, in their order, whoever finishes first."""
    shared = SharedModel(model)
    if executor is None:
        yield from ((group, batch, compute(shared, batch, top)) for group, batch in jobs)
        return
    waiting: deque[tuple[Group, Batch, Future[Likelihood]]] = deque()

    def earliest() -> tuple[Group, Batch, Likelihood]:
        group, batch, future = waiting.popleft()
        return group, batch, future.result()

    try:
        for group, batch in jobs:
            waiting.append((group, batch, executor.submit(compute, shared, batch, top)))
            if len(waiting) == AHEAD:
                yield earliest()
        while waiting:
            yield earliest()
    except GeneratorExit:  # nobody wants the rest; after an error a pool that breaks trips over what is cancelled
        for _, _, future in waiting:
            future.cancel()
        raise
