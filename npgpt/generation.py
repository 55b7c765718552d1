"""The loop: read the prompt, then draw a token, hand it on, feed it back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .cache import KVCache
from .config import Config, whole_number
from .errors import NpgptError
from .model import forward
from .parameters import Parameters
from .sampling import Sampling, next_token
from .tokenizer import TextDecoder, Tokenizer, check_text

# Why a generation ended: <|endoftext|>, a stop string, max_tokens reached, or the context full.
Finish: TypeAlias = Literal["end_of_text", "stop", "length", "context"]


class Step(NamedTuple):
    """One token drawn and the text that became certain with it; the last step, and only that, has finish."""

    token_id: int | None  # None in a last step that draws nothing more
    text: str
    finish: Finish | None = None


def generate(
    parameters: Parameters,
    config: Config,
    prompt: ArrayLike,
    *,
    max_tokens: int,
    sampling: Sampling,
    seed: int | None = None,
    tokenizer: Tokenizer | None = None,
    stop: Iterable[str] = (),
    ignore_eos: bool = False,
) -> Iterator[Step]:
    """Continue a prompt of ids [T], a step for each token as it is drawn; the same seed gives the same steps.

    With a tokenizer <|endoftext|> ends it, unless ignore_eos, ids that stand for no text are never drawn, and steps
    have text. Held back are a UTF-8 sequence that is not whole and what may be the beginning of a stop string; a stop
    string ends it and is not in the text. The cache is allocated once. Raises NpgptError at once for a prompt that does
    not fit (Config.check_token_ids) or has several rows, a negative max_tokens or seed, and an empty stop string.
    """
    ids = config.check_token_ids(prompt)
    if len(ids) != 1:
        raise NpgptError(f"one prompt at a time is continued, not {len(ids)} rows")
    max_tokens = whole_number("max_tokens", max_tokens, low=0)
    seed = None if seed is None else whole_number("a seed", seed, low=0, high=2**64 - 1)
    stop = tuple(stop)
    if stop and tokenizer is None:
        raise NpgptError("a stop string needs a model that has text")
    for text in stop:
        check_text(text, "a stop string")
        if not text:
            raise NpgptError("a stop string must not be empty")
    cache = KVCache(config, 1, min(config.n_positions, ids.shape[1] + max_tokens), parameters.wte.weight.dtype)
    end_of_text = tokenizer.end_of_text if tokenizer and not ignore_eos else None
    generator = np.random.default_rng(seed)

    def draw(ids: NDArray[np.integer[Any]]) -> Iterator[Step]:
        """Steps without text. The context holds n_positions tokens; one more can be drawn, and not fed."""
        finish: Finish = "length"
        for _ in range(max_tokens):
            if cache.length + ids.shape[1] > config.n_positions:
                finish = "context"
                break
            with np.errstate(over="ignore", invalid="ignore"):  # next_token says in words what is wrong
                logits = forward(parameters, config, ids, cache, last_only=True)[0, -1]
            if tokenizer:
                tokenizer.hide_unused(logits)
            token_id = next_token(logits, sampling, generator)
            if token_id == end_of_text:
                finish = "end_of_text"
                break
            yield Step(token_id, "")
            ids = np.array([[token_id]])
        yield Step(None, "", finish)

    return _with_text(draw(ids), TextDecoder(tokenizer, ids[0].tolist()), stop) if tokenizer else draw(ids)


def _with_text(steps: Iterator[Step], decoder: TextDecoder, stop: Sequence[str]) -> Iterator[Step]:
    """The same steps with their text, up to the first stop string."""
    held = ""
    for step in steps:
        held += decoder.flush() if step.token_id is None else decoder.feed(step.token_id)
        if found := [at for text in stop if (at := held.find(text)) >= 0]:
            yield Step(step.token_id, held[: min(found)], "stop")
            return
        certain = len(held) if step.finish else len(held) - _beginning(held, stop)
        yield step._replace(text=held[:certain])
        held = held[certain:]


def _beginning(text: str, stop: Sequence[str]) -> int:
    """The length of the longest end of text with which a stop string begins."""
    longest = max((len(s) - 1 for s in stop), default=0)
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in stop)), 0)
