"""The generation loop: read the prompt, then draw a token, yield it and feed it back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..cache import KVCache, side_by_side
from ..config import Config
from ..errors import NpgptError, about, numbers, whole_number
from ..model import forward
from ..parameters import Array, Parameters
from .sampling import Sampling, next_token
from .tokenizer import TextDecoder, Tokenizer, check_text

Ids: TypeAlias = NDArray[np.integer[Any]]
ROWS = 32  # prompts in a batch, at most; larger batches are no faster per token
ROWS_BYTES = 2**30  # size of a batch's caches, at most, unless one prompt needs more
MOST_SAMPLES = 1024  # each is a row with its own cache: 75 MB for gpt2's whole context

# Why generation ended: an id that ends a text (<|endoftext|>), a stop string, max_tokens, or the context is full.
Finish: TypeAlias = Literal["end_of_text", "stop", "length", "context"]


class Step(NamedTuple):
    """A generated token and the text that became final with it; only a sample's last step has `finish`."""

    token_id: int | None  # None in a last step that generates no token
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
    """Continue a prompt of ids [T] and yield a step for each token; the same seed gives the same steps.

    Any id in ends ends the text. With a tokenizer, steps have text, and ids without text are drawn only if they are in
    ends. An incomplete UTF-8 sequence and a possible beginning of a stop string are held back. A stop string ends the
    text and is not part of it.

    The steps of several samples alternate, each with its sample's number from 0. The prompt is read once for all of
    them, and the unfinished samples are the rows of one batch. Sample i equals a single sample with seed + i (in
    float32 up to near ties, because the last bits depend on the batch).

    Raises NpgptError at once for a prompt that does not fit (Config.token_rows) or has several rows, a negative
    max_tokens or seed, no samples, and an empty stop string.
    """
    ids = config.token_rows(prompt)
    if len(ids) != 1:
        raise NpgptError(f"the prompt must be one row of ids, not {len(ids)} rows")
    samples = whole_number("samples", samples, high=MOST_SAMPLES)
    drawing = _Drawing(parameters, config, max_tokens, sampling, tokenizer, stop, ends)
    seeds = _seeds(seed, samples, "sample")
    all_samples = [drawing.sample(n, ids, seeds[n]) for n in range(samples)]

    def read() -> tuple[Array, KVCache]:
        return drawing.read(ids, min(config.n_positions, ids.shape[1] + drawing.max_tokens))

    return drawing.draw(all_samples, read)


def generate_many(
    parameters: Parameters,
    config: Config,
    prompts: Iterable[ArrayLike],
    *,
    max_tokens: int | None,
    sampling: Sampling,
    seed: int | None = None,
    tokenizer: Tokenizer | None = None,
    stop: Iterable[str] = (),
    ends: Collection[int] = (),
) -> Iterator[Step]:
    """Continue several prompts of ids, each [T] of any length; step.sample is the prompt's number from 0.

    Prompt i is continued as generate() would continue it with seed + i (in float32 up to near ties, because the last
    bits depend on the batch). Prompts are read one by one. Then up to ROWS of them, or as many as fit into caches of
    ROWS_BYTES, are the rows of one batch, and their steps alternate. The next batch begins when all of them have ended.

    Raises NpgptError at once as generate() does, with the prompt's number, and if there are no prompts.
    """
    rows = [_prompt(number, prompt, config) for number, prompt in enumerate(several(prompts))]
    if not rows:
        raise NpgptError("there are no prompts to continue")
    drawing = _Drawing(parameters, config, max_tokens, sampling, tokenizer, stop, ends)
    seeds = _seeds(seed, len(rows), "prompt")

    def batches() -> Iterator[Step]:
        begin = 0
        while begin < len(rows):
            end, longest = begin, 0
            while end < min(begin + ROWS, len(rows)):
                longer = min(config.n_positions, max(longest, rows[end].size + drawing.max_tokens))
                if end > begin and (end + 1 - begin) * longer * drawing.bytes_of_a_token > ROWS_BYTES:
                    break
                end, longest = end + 1, longer
            batch = [drawing.sample(n, rows[n], seeds[n]) for n in range(begin, end)]
            for row, sample in enumerate(batch):
                sample.row = row
            yield from drawing.draw(batch, partial(read, rows[begin:end], longest))
            begin = end

    def read(batch: Sequence[Ids], capacity: int) -> tuple[Array, KVCache]:
        logits, caches = zip(*(drawing.read(ids, ids.size) for ids in batch), strict=True)
        return np.concatenate(logits), side_by_side(config, caches, capacity)

    return batches()


def several(prompts: Iterable[Any]) -> Iterator[Any]:
    """Return an iterator over prompts. Raises NpgptError for a single prompt, and for a dict (its values are lost)."""
    try:
        if not isinstance(prompts, (str, Mapping)):
            return iter(prompts)
    except TypeError:  # a 0-d array: its type is iterable, the array is not
        pass
    raise NpgptError(f"prompts must be in a list or another iterable, such as [prompt], not {prompts!r:.80}")


def _prompt(number: int, prompt: ArrayLike, config: Config) -> Ids:
    with about(f"prompt {number}"):
        ids = config.token_rows(prompt)
        if len(ids) != 1:
            raise NpgptError(f"it must be one row of ids, not {len(ids)} rows")
    return ids


def _seeds(seed: int | None, count: int, kind: str) -> Sequence[int | None]:
    """Return the seeds of `count` samples or prompts: seed, seed + 1 and so on."""
    if seed is None:
        return [None] * count
    seed = whole_number("a seed", seed, low=0, high=2**64 - 1)
    last = whole_number(f"the last {kind}'s seed, seed + {kind}s − 1,", seed + count - 1, low=0, high=2**64 - 1)
    return range(seed, last + 1)


class _Drawing:
    """Draws tokens for several samples at once; checks the arguments of generate()."""

    def __init__(
        self,
        parameters: Parameters,
        config: Config,
        max_tokens: int | None,
        sampling: Sampling,
        tokenizer: Tokenizer | None,
        stop: Iterable[str],
        ends: Collection[int],
    ) -> None:
        self.parameters, self.config, self.sampling, self.tokenizer = parameters, config, sampling, tokenizer
        self.max_tokens = _most(max_tokens, config)
        self.stop = tuple(stop)
        if self.stop and tokenizer is None:
            raise NpgptError("a stop string needs a model with a vocabulary")
        for text in self.stop:
            check_text(text, "a stop string")
            if not text:
                raise NpgptError("a stop string must not be empty")
        self.ends = ends
        # ends without text, such as a row that pads the vocabulary, may still be drawn
        self.mute = [end for end in ends if tokenizer and not tokenizer.has_text(end) and 0 <= end < config.vocab_size]

    @property
    def bytes_of_a_token(self) -> int:
        """The size in bytes of one token's keys and values."""
        return 2 * self.config.n_layer * self.config.n_embd * self.parameters.wte.weight.itemsize

    def sample(self, number: int, ids: Ids, seed: int | None) -> _Sample:
        """Return the initial state of a sample that continues a prompt [1, T]."""
        seen = ids[0].tolist()
        decoder = TextDecoder(self.tokenizer, seen) if self.tokenizer else None
        return _Sample(number, seen, np.random.default_rng(seed), decoder, self.stop)

    def read(self, ids: Ids, capacity: int) -> tuple[Array, KVCache]:
        """Run the model on a prompt [1, T]; return the logits [1, V] of the next token and the cache."""
        cache = KVCache(self.config, 1, capacity, self.parameters.wte.weight.dtype)
        return self.logits(ids, cache), cache

    def logits(self, ids: ArrayLike, cache: KVCache) -> Array:
        """Return the logits [B, V] of the next tokens after ids [B, T]; next_token reports infinite ones."""
        with np.errstate(over="ignore", invalid="ignore"):
            logits: Array = forward(self.parameters, self.config, ids, cache, logits_from=-1)[:, -1]
        if self.tokenizer:
            of_mute = logits[:, self.mute]
            self.tokenizer.hide_unused(logits)
            logits[:, self.mute] = of_mute
        return logits

    def draw(self, running: list[_Sample], read: Callable[[], tuple[Array, KVCache]]) -> Iterator[Step]:
        """Draw tokens and feed them back until all samples have ended; read() runs the model on the prompts.

        A sample has room for n_positions tokens in the context; one more can be drawn, but not fed back.
        """
        for drawn in range(self.max_tokens):
            full = [sample for sample in running if len(sample.seen) > self.config.n_positions]
            yield from (sample.end("context") for sample in full)
            running = [sample for sample in running if sample.finish is None]
            if not running:
                return
            if drawn == 0:
                logits, cache = read()
            else:
                if [sample.row for sample in running] != [*range(len(logits))]:
                    cache = cache.rows([sample.row for sample in running])
                    for row, sample in enumerate(running):
                        sample.row = row
                logits = self.logits([[sample.seen[-1]] for sample in running], cache)
            for sample in running:
                token_id = next_token(logits[sample.row], self.sampling, sample.generator, sample.seen)
                yield sample.end("end_of_text") if token_id in self.ends else sample.take(token_id)
            running = [sample for sample in running if sample.finish is None]
        for sample in running:
            yield sample.end("length")


def kept_prompt(prompt: ArrayLike, config: Config, max_tokens: int | None) -> NDArray[np.integer[Any]]:
    """Return the last ids [T] of a prompt, leaving room for max_tokens but filling at least half of the context.

    A prompt that fits is returned whole. Raises NpgptError for a negative max_tokens.
    """
    ids = numbers("token ids", prompt)
    if ids.ndim != 1 or len(ids) <= config.n_positions:
        return ids  # generate() reports other shapes
    room = min(max(_most(max_tokens, config) - 1, 0), config.n_positions // 2)
    return ids[room - config.n_positions :]  # the last generated token needs no room


def _most(max_tokens: int | None, config: Config) -> int:
    """Return max_tokens; for None a number that no prompt reaches, because the context is full first."""
    return config.n_positions + 1 if max_tokens is None else whole_number("max_tokens", max_tokens, low=0)


@dataclass(eq=False)
class _Sample:
    """The state of one continuation."""

    number: int
    seen: list[int]  # ids of the prompt and the tokens generated so far
    generator: np.random.Generator
    decoder: TextDecoder | None
    stop: Sequence[str]
    held: str = ""  # text that is not final yet
    row: int = 0  # in the batch; all samples of a prompt start from its one row
    finish: Finish | None = None

    def take(self, token_id: int) -> Step:
        """Return the step of a generated token; the last step if the token completes a stop string."""
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
    """Return the length of the longest suffix of the text that is the beginning of a stop string."""
    longest = max((len(s) - 1 for s in stop), default=0)
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in stop)), 0)


def in_order(steps: Iterable[Step]) -> Iterator[str]:
    """Yield the whole text of each sample in order, as soon as it and all before it have ended."""
    texts: dict[int, str] = {}
    ended, number = set(), 0
    for step in steps:
        texts[step.sample] = texts.get(step.sample, "") + step.text
        if step.finish is not None:
            ended.add(step.sample)
        while number in ended:
            yield texts.pop(number)
            number += 1
