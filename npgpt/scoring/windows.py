"""How a text longer than the context is cut into windows, and which tokens count; published numbers differ by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..config import Config
from ..errors import NpgptError, printable, whole_number
from ..text.tokenizer import END_OF_TEXT, shown

if TYPE_CHECKING:
    from ..language_model import LanguageModel

NAMES = ("rolling", "huggingface", "llama.cpp")


class Window(NamedTuple):
    """The ids begin to last − 1 of a text: those from `first` on are scored, and all but the last one are read."""

    begin: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Convention:
    """A window reads up to `context` ids; the next one begins `stride` ids later and scores what is new in it.

    rolling: lm-evaluation-harness's rolling log-likelihood. A window also predicts the id after it, and the last window
    begins early enough to be full, so that every token is scored once.
    huggingface: the perplexity guide of transformers. A window predicts only its own ids, so that its first id is not
    scored unless an earlier window had it.
    llama.cpp: its program perplexity. Windows stand side by side, only full ones count, and of each the second half.
    end_of_text: <|endoftext|>, or whatever the model's texts begin with (before), stands before the text, so that the
    text's first token is scored too.
    """

    name: str
    context: int
    stride: int
    end_of_text: bool
    before: str = END_OF_TEXT

    def __str__(self) -> str:
        before = f"{self.before} before the text" if self.end_of_text else "nothing before the text"
        counted = {
            "rolling": "every token that has one before it counts, once",
            "huggingface": "what is new in a window counts, if it has one before it there",
            "llama.cpp": "the second half of every full window counts",
        }
        return f"{self.name}: windows of {self.context} tokens, stride {self.stride}, {before}; {counted[self.name]}"


def convention(
    name: str,
    config: Config,
    context: int | None = None,
    stride: int | None = None,
    end_of_text: bool | None = None,
    before: str = END_OF_TEXT,
) -> Convention:
    """Return a convention by name; None stands for its own default. before: what a text begins with, in words.

    Raises NpgptError for an unknown name, a context below 2 (llama.cpp: 3) or beyond the model's, and a stride
    above the context.
    """
    if name not in NAMES:
        raise NpgptError(f"no convention is called {name!r:.80}; there are {', '.join(NAMES)}")
    if context is None:
        context = min(512, config.n_positions) if name == "llama.cpp" else config.n_positions
    low = 3 if name == "llama.cpp" else 2  # the second half of 2, but for the token that begins it, is nothing
    context = whole_number(f"the context of a window (n_positions = {config.n_positions} at most)", context, low=low)
    if context > config.n_positions:
        raise NpgptError(f"a window of {context} tokens is longer than the model's context, {config.n_positions}")
    if stride is None:
        stride = max(1, context // 2) if name == "huggingface" else context
    stride = whole_number("the stride", stride)
    if stride > context:
        raise NpgptError(f"a stride of {stride} above the window of {context} would leave tokens out: up to {context}")
    if name == "llama.cpp" and stride != context:
        raise NpgptError(f"llama.cpp's windows stand side by side: a stride of {context}, not {stride}")
    return Convention(
        name=name,
        context=context,
        stride=stride,
        end_of_text=name == "rolling" if end_of_text is None else end_of_text,
        before=before,
    )


def convention_of(
    model: LanguageModel, name: str, context: int | None, stride: int | None, end_of_text: bool | None
) -> Convention:
    """Return a convention for a model. By default the ids that its own tokenizer adds stand before the text."""
    tokenizer = None if model.why_no_text else model.tokenizer
    end_of_text = True if end_of_text is None and tokenizer and tokenizer.before else end_of_text

    def word(token_id: int) -> str:
        known = tokenizer and tokenizer.has_text(token_id)
        return printable(shown(model.tokenizer.piece(token_id))) if known else f"id {token_id}"

    before = " ".join(map(word, model.begin_ids))
    return convention(name, model.config, context, stride, end_of_text, before)


def windows(length: int, c: Convention) -> list[Window]:
    """Return the windows of `length` ids, <|endoftext|> included; none where no token can be scored."""
    return list(sliding(lambda most: min(most, length), c))


def sliding(known: Callable[[int], int], c: Convention) -> Iterator[Window]:
    """Yield the windows of ids that are read meanwhile: known(most) returns how many there are, up to so many."""
    span = c.context + 1 if c.name == "rolling" else c.context  # ids read, and the last one predicted
    begin, scored = 0, 1  # the first id is never scored
    while scored < (last := known(begin + span)):
        if c.name == "llama.cpp":
            if last - begin < span:
                break
            yield Window(begin, begin + c.context // 2 + 1, last)
        elif c.name == "rolling":
            yield Window(max(0, last - span), scored, last)
        elif last > max(scored, begin + 1):
            yield Window(begin, max(scored, begin + 1), last)
        begin, scored = begin + c.stride, last
