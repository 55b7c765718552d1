"""The user's handle: configuration, parameters and tokenizer held together, called and continued."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import parameters as P
from .cache import KVCache
from .config import Config
from .errors import NpgptError
from .model import forward
from .parameters import Array, Parameters, Record
from .text.generation import Step, generate
from .text.sampling import Sampling
from .text.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A GPT-2 that is ready to run. read_vocabulary gives its tokenizer, or the reason why it has none; origin says
    from which file it was loaded, and as what, where that is another form than the converted one; files hold its
    weights, and again are the arguments with which they were loaded.
    """

    name: str
    config: Config
    parameters: Parameters = field(repr=False)
    read_vocabulary: Callable[[], Tokenizer | str] = field(repr=False)
    origin: str = ""
    files: tuple[Path, ...] = ()
    again: tuple[Any, ...] | None = field(default=None, repr=False)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the configuration and of every parameter's name, dtype and values, at 2 GB a second."""
        import hashlib  # 5 ms that a prompt never needs

        digest = hashlib.sha256(repr(self.config).encode())
        for name, array in P.to_arrays(self.parameters).items():
            digest.update(f"{name} {array.dtype} ".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    @cached_property
    def vocabulary(self) -> Tokenizer | str:
        """The tokenizer, or the reason why there is none; read when it is first asked for, since ids run without."""
        return self.read_vocabulary()

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back. Raises NpgptError, with the reason, where the model has no vocabulary."""
        if isinstance(self.vocabulary, str):
            raise self._no_text()
        return self.vocabulary

    def _no_text(self) -> NpgptError:
        return NpgptError(f"{self.name} has no text: {self.vocabulary}")

    def __call__(
        self,
        token_ids: ArrayLike,
        cache: KVCache | None = None,
        record: Record | None = None,
        *,
        logits_from: int = 0,
    ) -> Array:
        """Logits [B, T, V] of token_ids [T] or [B, T], in the parameters' dtype; see npgpt.forward."""
        return forward(self.parameters, self.config, token_ids, cache, record, logits_from=logits_from)

    def encode_prompt(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of a prompt; an empty one starts from <|endoftext|>, as after every text the model was trained on.

        Raises NpgptError where the model has no text, or no <|endoftext|> to start from.
        """
        ids = self.tokenizer.encode(text, special=special)
        if not ids:
            if self.tokenizer.end_of_text is None:
                raise NpgptError(f"the prompt is empty, and {self.name} has no <|endoftext|> to start from")
            ids = [self.tokenizer.end_of_text]
        return ids

    def generate(
        self,
        prompt: str | ArrayLike,
        *,
        max_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Iterable[str] = (),
        ignore_eos: bool = False,
    ) -> Iterator[str]:
        """Yield the text that follows a prompt (a text or ids [T]), piece by piece as it becomes certain.

        temperature 0 is greedy; a repetition_penalty above 1 makes ids of the prompt and the text less likely; the same
        seed gives the same text; a stop string ends it and is not yielded, nor is <|endoftext|>, which ends it unless
        ignore_eos. Raises NpgptError at once for an argument out of range, a prompt longer than the context, and a
        model without text.
        """
        sampling = Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
        )
        if isinstance(self.vocabulary, str):
            raise self._no_text()
        ids = self.encode_prompt(prompt) if isinstance(prompt, str) else prompt
        stops = [stop] if isinstance(stop, str) else stop
        steps = self.steps(ids, max_tokens=max_tokens, sampling=sampling, seed=seed, stop=stops, ignore_eos=ignore_eos)
        return (step.text for step in steps if step.text)

    def steps(
        self,
        prompt: ArrayLike,
        *,
        max_tokens: int,
        sampling: Sampling,
        seed: int | None = None,
        stop: Iterable[str] = (),
        ignore_eos: bool = False,
        samples: int = 1,
    ) -> Iterator[Step]:
        """Continue prompt ids [T] token by token, with ids, text and why it ended; a model without text runs too.

        Of several samples, which read the prompt once, the steps come in turn, and step.sample tells whose they are.
        See npgpt.text.generation.generate.
        """
        return generate(
            self.parameters,
            self.config,
            prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            seed=seed,
            tokenizer=None if isinstance(self.vocabulary, str) else self.vocabulary,
            stop=stop,
            ignore_eos=ignore_eos,
            samples=samples,
        )
