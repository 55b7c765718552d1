"""Scoring conventions: how a text longer than the context is cut into windows, and which tokens are scored.

The module imports no NumPy, because the command line's help states the defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..config import END_OF_TEXT, Config
from ..errors import NpgptError, nearest, whole_number


class Default(NamedTuple):
    """A convention's defaults, and its rule in words."""

    context: int | None  # of a window; None is the model's
    per_window: int  # how many strides make a window
    end_of_text: bool  # whether it stands before the text
    counted: str


DEFAULTS = {
    "rolling": Default(None, 1, True, "every token with a predecessor is scored once"),
    "huggingface": Default(None, 2, False, "new tokens with a predecessor in their window are scored"),
    "llama.cpp": Default(512, 1, False, "the second half of every full window is scored"),
}
NAMES = tuple(DEFAULTS)


class Window(NamedTuple):
    """The ids begin to last − 1 of a text: the model reads all except the last; those from `first` on are scored."""

    begin: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Convention:
    """A window holds up to `context` ids; the next one begins `stride` ids later and scores only new ids.

    rolling: the rolling log-likelihood of lm-evaluation-harness. A window also predicts the id after it, and the last
    window is shifted back to be full. Every token is scored once.
    huggingface: the perplexity guide of transformers. A window predicts only its own ids, so its first id is not scored
    unless an earlier window scored it.
    llama.cpp: the program llama-perplexity. Windows do not overlap, and only the second half of full ones is scored.
    end_of_text: <|endoftext|>, or what else the model's texts begin with (before), precedes the text, so that its first
    token is scored too.
    """

    name: str
    context: int
    stride: int
    end_of_text: bool
    before: str = END_OF_TEXT

    def __str__(self) -> str:
        before = f"{self.before} before the text" if self.end_of_text else "nothing before the text"
        counted = DEFAULTS[self.name].counted
        return f"{self.name}: windows of {self.context} tokens, stride {self.stride}, {before}; {counted}"


def convention(
    name: str,
    config: Config,
    context: int | None = None,
    stride: int | None = None,
    end_of_text: bool | None = None,
    before: str = END_OF_TEXT,
) -> Convention:
    """Return a convention by name. None selects its default; before names the tokens that precede a text.

    Raises NpgptError for an unknown name, a context below 2 (llama.cpp: 3) or above the model's, and a stride above the
    context.
    """
    if name not in NAMES:
        raise NpgptError(f"unknown convention {name!r:.80}{nearest(name, NAMES)}; choose {', '.join(NAMES)}")
    default = DEFAULTS[name]
    if context is None:
        context = min(default.context or config.n_positions, config.n_positions)
    low = 3 if name == "llama.cpp" else 2  # a window of 2 has no token after the first of its second half
    context = whole_number(f"the context of a window (n_positions = {config.n_positions} at most)", context, low=low)
    if context > config.n_positions:
        raise NpgptError(f"a window of {context} tokens is longer than the model's context, {config.n_positions}")
    if stride is None:
        stride = max(1, context // default.per_window)
    stride = whole_number("the stride", stride)
    if stride > context:
        raise NpgptError(f"a stride of {stride} skips tokens: use at most {context}, the size of a window")
    if name == "llama.cpp" and stride != context:
        raise NpgptError(f"llama.cpp's windows do not overlap: the stride must be {context}, not {stride}")
    return Convention(
        name=name,
        context=context,
        stride=stride,
        end_of_text=default.end_of_text if end_of_text is None else end_of_text,
        before=before,
    )


def windows(length: int, c: Convention) -> list[Window]:
    """Return the windows of `length` ids, including <|endoftext|>; none if no token can be scored."""
    return list(sliding(lambda most: min(most, length), c))


def sliding(known: Callable[[int], int], c: Convention) -> Iterator[Window]:
    """Yield the windows while the ids are read: known(most) returns how many ids there are, up to `most`."""
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
