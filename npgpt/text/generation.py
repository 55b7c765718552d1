"""The generation loop: read the prompt, then draw a token, yield it, feed it back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..cache import KVCache
from ..config import Config
from ..errors import NpgptError, numbers, whole_number
from ..model import forward
from ..parameters import Parameters
from .sampling import Sampling, next_token
from .tokenizer import TextDecoder, Tokenizer, check_text

MOST_SAMPLES = 1024  # rows of a batch, each with a cache of its own: gpt2's whole context takes 75 MB

# Why a generation ended: an id that ends a text (<|endoftext|>), a stop string, max_tokens reached, the context full.
Finish: TypeAlias = Literal["end_of_text", "stop", "length", "context"]


class Step(NamedTuple):
    """A drawn token and the text that became certain with it; only a sample's last step has `finish`."""

    token_id: int | None  # None in a last step that draws nothing more
    text: str
    finish: Finish | None = None
    sample: int = 0


def generate(
    parameters: Parameters,
    config: Config,
    prompt: ArrayLike,
    *,
    max_tokens: int | None,
    sampling: Sampling,
    seed: int | None = None,
    tokenizer: Tokenizer | None = None,
    stop: Iterable[str] = (),
    ends: Collection[int] = (),
    samples: int = 1,
) -> Iterator[Step]:
    """Continue a prompt of ids [T] and yield a step for each token as it is drawn; a seed repeats the same steps.

    Each of the ids in ends ends the text. With a tokenizer, steps have text, and no other ids that stand for no text
    are drawn. An incomplete UTF-8 sequence and a possible beginning of a stop string are held back; a stop
    string ends the text and is not part of it.

    The steps of several samples alternate, each with its sample's number from 0. The prompt is read once for all of
    them; the samples still running are the rows of one batch. Sample i is drawn as a single one with seed + i would be
    (in float32 up to near ties, since the last bits of a batch differ).

    Raises NpgptError at once for a prompt that does not fit (Config.token_rows) or has several rows, a negative
    max_tokens or seed, no samples, and an empty stop string.
    """
    ids = config.token_rows(prompt)
    if len(ids) != 1:
        raise NpgptError(f"one prompt at a time is continued, not {len(ids)} rows")
    max_tokens = _most(max_tokens, config)
    samples = whole_number("samples", samples, high=MOST_SAMPLES)
    seeds: Sequence[int | None] = [None] * samples
    if seed is not None:
        seed = whole_number("a seed", seed, low=0, high=2**64 - 1)
        last = whole_number("the last sample's seed, seed + samples − 1,", seed + samples - 1, low=0, high=2**64 - 1)
        seeds = range(seed, last + 1)
    stop = tuple(stop)
    if stop and tokenizer is None:
        raise NpgptError("a stop string needs a model that has text")
    for text in stop:
        check_text(text, "a stop string")
        if not text:
            raise NpgptError("a stop string must not be empty")
    # ends that stand for no text, such as a row that pads the vocabulary, are drawn all the same
    mute = [end for end in ends if tokenizer and not tokenizer.has_text(end) and 0 <= end < config.vocab_size]
    seen = ids[0].tolist()
    all_samples = [
        _Sample(n, [*seen], np.random.default_rng(seeds[n]), TextDecoder(tokenizer, seen) if tokenizer else None, stop)
        for n in range(samples)
    ]

    def draw(running: list[_Sample], ids: NDArray[np.integer[Any]], cache: KVCache) -> Iterator[Step]:
        """Draw after ids: first the prompt [1, T], then the last token [R, 1] of each running sample.

        The context holds n_positions tokens; one more can be drawn, but not fed back.
        """
        finish: Finish = "length"
        for _ in range(max_tokens):
            if cache.length + ids.shape[1] > config.n_positions:
                finish = "context"
                break
            with np.errstate(over="ignore", invalid="ignore"):  # next_token says in words what is wrong
                logits = forward(parameters, config, ids, cache, logits_from=-1)[:, -1]
            if tokenizer:
                of_mute = logits[:, mute]
                tokenizer.hide_unused(logits)
                logits[:, mute] = of_mute
            for sample in running:
                token_id = next_token(logits[sample.row], sampling, sample.generator, sample.seen)
                yield sample.end("end_of_text") if token_id in ends else sample.take(token_id)
            running = [sample for sample in running if sample.finish is None]
            if not running:
                return
            if len(running) != len(logits):
                cache = cache.rows([sample.row for sample in running])
                for row, sample in enumerate(running):
                    sample.row = row
            ids = np.array([[sample.seen[-1]] for sample in running])
        for sample in running:
            yield sample.end(finish)

    capacity = min(config.n_positions, ids.shape[1] + max_tokens)
    return draw(all_samples, ids, KVCache(config, 1, capacity, parameters.wte.weight.dtype))


def kept_prompt(prompt: ArrayLike, config: Config, max_tokens: int | None) -> NDArray[np.integer[Any]]:
    """Return the last ids [T] of a prompt that leave room for max_tokens, but fill at least half of the context.

    A prompt that fits stays whole. Raises NpgptError for a negative max_tokens.
    """
    ids = numbers("token ids", prompt)
    if ids.ndim != 1 or len(ids) <= config.n_positions:
        return ids  # generate() reports what is wrong with other shapes
    room = min(max(_most(max_tokens, config) - 1, 0), config.n_positions // 2)
    return ids[room - config.n_positions :]  # the last token that is drawn needs no room


def _most(max_tokens: int | None, config: Config) -> int:
    """Return how many tokens are drawn at most; None is no limit, but the context is one."""
    return config.n_positions if max_tokens is None else whole_number("max_tokens", max_tokens, low=0)


@dataclass(eq=False)
class _Sample:
    """One continuation that is being drawn."""

    number: int
    seen: list[int]  # ids of the prompt and what was drawn
    generator: np.random.Generator
    decoder: TextDecoder | None
    stop: Sequence[str]
    held: str = ""  # text that is not certain yet
    row: int = 0  # of the batch; all samples begin with the prompt's one row
    finish: Finish | None = None

    def take(self, token_id: int) -> Step:
        """Return the step of a drawn token; it is the last one where it completes a stop string."""
        self.seen.append(token_id)
        return self._step(token_id, self.decoder.feed(token_id) if self.decoder else "")

    def end(self, finish: Finish) -> Step:
        """Return the last step, with the text that was held back."""
        return self._step(None, self.decoder.flush() if self.decoder else "", finish)

    def _step(self, token_id: int | None, text: str, finish: Finish | None = None) -> Step:
        self.held += text
        if found := [at for s in self.stop if (at := self.held.find(s)) >= 0]:
            finish, certain = "stop", min(found)
        else:
            certain = len(self.held) - (0 if finish else _beginning(self.held, self.stop))
        shown, self.held, self.finish = self.held[:certain], self.held[certain:], finish
        return Step(token_id, shown, finish, self.number)


def _beginning(text: str, stop: Sequence[str]) -> int:
    """Return the length of the longest suffix of text that a stop string begins with."""
    longest = max((len(s) - 1 for s in stop), default=0)
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in stop)), 0)
