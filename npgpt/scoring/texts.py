"""Read texts for scoring part by part, so that only what the next windows need is in memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import ArrayLike

from ..errors import NpgptError, about, numbers, printable
from ..language_model import LanguageModel
from ..text.tokenizer import check_text, shown
from .likelihood import Figures, Ids, Likelihood, Score, Totals, exact, measured
from .windows import Convention, Window, convention, sliding

PART = 2**16  # characters tokenized at a time
LAST_CUT = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)


def convention_of(
    model: LanguageModel, name: str, context: int | None, stride: int | None, end_of_text: bool | None
) -> Convention:
    """Return a convention for a model. Ids that its own tokenizer adds before a text precede it by default."""
    tokenizer = None if model.why_no_text else model.tokenizer
    end_of_text = True if end_of_text is None and tokenizer and tokenizer.before else end_of_text

    before = " ".join(printable(shown(model.piece(one))) or f"id {one}" for one in model.begin_ids)
    return convention(name, model.config, context, stride, end_of_text, before)


class Tokens(NamedTuple):
    """Tokens [n] of a text: ids, bytes of text that each covers, and words that begin in each."""

    ids: Ids
    sizes: Ids
    words: Ids

    def after(self, first: int) -> Tokens:
        """Return the tokens from index `first` on."""
        return Tokens._make(column[first:] for column in self)


NO_TOKENS = Tokens(*np.zeros((3, 0), np.int64))


def _joined(parts: Iterable[Tokens]) -> Tokens:
    return Tokens._make(map(np.concatenate, zip(*parts, strict=True)))


def tokens(
    text: str | Iterator[str] | ArrayLike, model: LanguageModel, special: bool, pieces: dict[int, bytes], name: str
) -> Iterator[Tokens]:
    """Yield the tokens of a text part by part; they are the same as those of the whole text.

    The text is a str, an iterator of its parts, or ids. pieces is updated with the bytes of every id. name is the
    text's name in messages. Raises NpgptError for text that Tokenizer.encode rejects and for invalid ids.
    """
    for ids, stretches in _encoded(text, model, special, name):
        pieces.update((token_id, model.piece(token_id)) for token_id in {*ids} - pieces.keys())
        yield Tokens(np.array(ids, np.int64), *measured(stretches or [pieces[token_id] for token_id in ids]))


def _encoded(
    text: str | Iterator[str] | ArrayLike, model: LanguageModel, special: bool, name: str
) -> Iterator[tuple[list[int], list[bytes]]]:
    """Yield ids and the bytes of text that each covers, or an empty list if those are the tokens' own bytes."""
    if not isinstance(text, (str, Iterator)):
        array = numbers(name, text)
        if array.ndim != 1:
            shape = list(array.shape)
            raise NpgptError(
                f"{name} must be a text or ids [T], not an array of shape {shape}; for one text of ids, pass [ids]"
            )
        with about(name):
            model.config.check_ids(array)
        yield array.tolist(), []
        return
    tokenizer = model.tokenizer
    if isinstance(text, str):
        check_text(text, "the text")  # the whole text, so that an error gives the position in it
        text = iter([text])
    for part in cut(text) if tokenizer.ends_of is None else ["".join(_checked(text))]:
        with about(name):
            ids = tokenizer.encode(part, special=special, alone=True)
            stretches = [] if tokenizer.ends_of is None else tokenizer.stretches(part, special)
        yield ids, stretches


def cut(parts: Iterable[str]) -> Iterator[str]:
    """Yield a text in parts of about PART characters whose ids, joined, are those of the whole text.

    A cut is made before white space that follows another character. In the tokenizer's pattern such white space always
    begins a piece: every alternative has white space only at its beginning, or consists of it, and none looks behind,
    or ahead past the white space at its end.
    """
    held: list[str] = []
    size = 0
    for part in _checked(parts):
        for some in (part[at : at + PART] for at in range(0, len(part), PART)):
            held.append(some)
            size += len(some)
            if size >= PART and (found := LAST_CUT.match(some)):
                yield "".join([*held[:-1], found[0]])
                held = [some[found.end() :]]
                size = len(held[0])
    if size:
        yield "".join(held)


def _checked(parts: Iterable[str]) -> Iterator[str]:
    """Yield the parts of a text. Raises NpgptError for a part that is not text, such as an id or bytes."""
    for part in parts:
        check_text(part, "a part of a text")
        yield part


@dataclass(eq=False)
class Text:
    """The state of a text that is being scored.

    parts yields its tokens. before are the ids that the convention puts before it. figures keeps the likelihood of its
    tokens, or is None if only totals are needed. left is the number of windows still to be scored, plus 1 until the
    text is read.
    """

    number: int
    name: str
    wanted: bool
    parts: Iterator[Tokens]
    before: Ids
    figures: Figures | None
    left: int = 1
    _held: Tokens = NO_TOKENS  # tokens in memory, from index `_base` on
    _base: int = 0
    _kept: list[Tokens] = field(default_factory=list)  # all tokens, if figures are kept
    _counts: Ids = field(default_factory=lambda: np.zeros(3, np.int64))  # scored, words, bytes
    _log_probs: list[float] = field(default_factory=list)  # a few numbers with the same exact sum

    def __post_init__(self) -> None:
        nothing = np.zeros_like(self.before)
        self.parts = chain([Tokens(self.before, nothing, nothing)], self.parts)

    def __len__(self) -> int:
        """Return the number of ids read so far, including those before the text."""
        return self._base + len(self._held.ids)

    def known(self, most: int) -> int:
        """Read until there are `most` ids or the text ends; return how many there are, up to `most`."""
        while len(self) < most:
            part = next(self.parts, None)
            if part is None:
                return len(self)
            if self.figures:
                self._kept.append(part)
            self._held = _joined([self._held, part])
        return most

    def rows(self, rule: Convention) -> Iterator[Row]:
        """Yield the windows while the text is read. Raises NpgptError if no token can be scored."""
        waiting, before = None, 0
        for window in sliding(self.known, rule):
            if waiting:
                yield waiting
            self._held, self._base = self._held.after(window.begin - self._base), window.begin
            ids, sizes, words = (column[: window.last - window.begin] for column in self._held)
            scored = slice(window.first - window.begin, None)
            self._counts += (window.last - window.first, words[scored].sum(), sizes[scored].sum())
            self.left += 1
            waiting = Row(self, window, ids, int(sizes[before - window.begin :].sum()))
            before = window.last
        if waiting is None:
            self._refuse(rule)
        self.left -= 1  # before the last row is yielded: the text is complete once that is scored
        yield waiting

    def _refuse(self, rule: Convention) -> NoReturn:
        if len(self) == len(self.before):
            raise NpgptError(f"{self.name} is empty: there is nothing to score")
        least = f"a full window of {rule.context}" if rule.name == "llama.cpp" else "2, or <|endoftext|> before it"
        raise NpgptError(f"{self.name} has too few tokens to score any, {len(self)}: {rule.name} needs {least}")

    def take(self, window: Window, scored: Likelihood) -> None:
        """Store the likelihood of a window's tokens."""
        if self.figures:
            self.figures.put(window.first, scored)
        else:
            self._log_probs = exact([*self._log_probs, *scored.log_probs.tolist()])
        self.left -= 1

    def totals(self) -> Totals:
        """Return the sums over the text, once all its windows are scored."""
        return Totals._make([len(self) - len(self.before), *self._counts.tolist(), -math.fsum(self._log_probs)])

    def score(self, model: LanguageModel, pieces: dict[int, bytes]) -> Score:
        """Return the Score, once all windows are scored, if figures are kept. pieces: the bytes of each id read."""
        assert self.figures is not None
        ids, sizes, words = _joined(self._kept).after(len(self.before))
        known = self.figures.between(len(self.before), len(self))
        own = tuple(pieces[int(token_id)] for token_id in ids)
        top = {token_id: model.piece(token_id) for token_id in np.unique(known.top_ids).tolist()}
        return Score(ids, own, known, (sizes, words), top)


class Row(NamedTuple):
    """A window with its ids [L + 1] and the number of bytes of text since the end of the previous window."""

    text: Text
    window: Window
    ids: Ids
    bytes: int
