"""What npgpt.load returns: a model with its tokenizer, to call and to generate with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from . import parameters as P
from .cache import KVCache
from .checkpoints.ends import Ends
from .checkpoints.files import is_input
from .checkpoints.find import find
from .checkpoints.open import CONVERTED, open_checkpoint
from .config import Config
from .errors import NpgptError, about, check_kinds, checked, float_dtype, printable
from .model import forward as unchecked_forward
from .parameters import Array, Parameters, Record
from .text.generation import Step, generate, generate_many, kept_prompt, several
from .text.sampling import Sampling
from .text.tokenizer import Tokenizer, shown
from .text.vocabularies import beside, in_folder, tokenizer_of

forward = checked(unchecked_forward)  # npgpt.forward; model.py is formulas, and knows no wrong types


@checked
def load(
    model: str | os.PathLike[str] | None = None,
    *,
    dtype: DTypeLike = "float32",
    n_head: int | None = None,
    activation: str | None = None,
    config: Config | None = None,
    name_scheme: str | None = None,
) -> LanguageModel:
    """Load a model by name or path, in any form that npgpt reads; without one, load the embedded model.

    dtype: float32, or float64 as the ground truth that others are measured against. n_head: states what a checkpoint
    leaves open, or overrides it. activation: the same for the GELU, "gelu" (erf form) or "gelu_new" (tanh form).
    config: replaces the checkpoint's whole configuration, its eos_token_id included (generation_config.json counts all
    the same). name_scheme: whose names the tensors have, where the names do not tell. float32 weights are used in place
    in the mapped file, others are converted. Raises NpgptError for whatever does not fit. What is guessed or left out
    is in the model's notes.
    """
    dtype = float_dtype("a model's dtype", dtype)
    location = find(model)
    return open_model(Source(location.name, location.weights, dtype, n_head, config, name_scheme, activation))


def opened(model: LanguageModel | str | os.PathLike[str] | None = None) -> LanguageModel:
    """Return the model itself, or load it by name or path. Raises NpgptError as load() does."""
    return model if isinstance(model, LanguageModel) else load(model)


@dataclass(frozen=True)
class Source:
    """What opens a model, here or in another process: the file of its weights, and how load() was called."""

    name: str
    weights: Path
    dtype: str
    n_head: int | None
    config: Config | None
    name_scheme: str | None
    activation: str | None = None


def open_model(source: Source) -> LanguageModel:
    """Open a model's file. Raises NpgptError for whatever does not fit."""
    checkpoint = open_checkpoint(
        source.weights,
        n_head=source.n_head,
        activation=source.activation,
        config=source.config,
        name_scheme=source.name_scheme,
    )
    folder = checkpoint.path.parent
    for file in (in_folder(folder) | beside(folder)).values():
        is_input(file)  # though it may never be read: an output may not replace it
    arrays = {name: checkpoint.load(name, source.dtype) for name in checkpoint.sources}
    return LanguageModel(
        source.name,
        checkpoint.config,
        P.from_arrays(checkpoint.config, arrays),
        lambda: tokenizer_of(checkpoint),
        origin="" if checkpoint.description == CONVERTED else f"{checkpoint.base}: {checkpoint.description}",
        notes=checkpoint.notes,
        no_logits=checkpoint.no_logits,
        files=checkpoint.contents.files,
        source=replace(source, weights=source.weights.absolute()),
        ends=checkpoint.ends,
    )


def _no_vocabulary() -> Tokenizer:
    raise NpgptError("it was made without a vocabulary")


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A GPT-2 that is ready to run.

    open_tokenizer returns its tokenizer, or raises NpgptError with the reason why it has none. origin names the file
    it was loaded from and its form, unless that is the converted one. notes say what of it is left out or guessed.
    no_logits is the reason why it gives no logits of ids, as a classifier; empty where it does. files hold its weights;
    source opens it again. ends are the ids that its files state for a text's beginning and end; see begin_ids and
    end_ids.
    """

    name: str
    config: Config
    parameters: Parameters
    open_tokenizer: Callable[[], Tokenizer] = _no_vocabulary
    origin: str = ""
    notes: tuple[str, ...] = ()
    no_logits: str = ""
    files: tuple[Path, ...] = ()
    source: Source | None = None
    ends: Ends = field(default=Ends())

    def __post_init__(self) -> None:
        check_kinds(type(self).__annotations__, vars(self).items())
        P.check_fit(self.config, self.parameters, self.name)

    def __repr__(self) -> str:
        c, origin = self.config, self.origin or next((str(file) for file in self.files), "")
        sizes = f"{c.n_layer} blocks, {c.n_embd} = {c.n_head} × {c.head_width}, {c.n_positions:,} positions"
        ids = f"{c.vocab_size:,} ids, {self.parameters.wte.weight.dtype}"
        notes = f"{len(self.notes)} note{'s' * (len(self.notes) != 1)}" if self.notes else ""
        shown = "; ".join(filter(None, (f"{self.name!r}: {sizes}, {ids}", origin, notes)))
        return printable(f"LanguageModel({shown})")

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of the configuration and of every parameter's name, dtype and values, at 2 GB a second."""
        import hashlib  # 5 ms that a prompt never needs

        digest = hashlib.sha256(repr(self.config).encode())
        for name, array in P.to_arrays(self.parameters).items():
            digest.update(f"{name} {array.dtype} ".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    @cached_property
    def _vocabulary(self) -> tuple[Tokenizer | None, str]:
        """The tokenizer, or the reason why there is none; read when it is first needed, since ids run without."""
        try:
            return self.open_tokenizer(), ""
        except NpgptError as error:
            return None, str(error)

    @property
    def why_no_text(self) -> str:
        """The reason why the model has no text and runs on ids only; empty where it has a vocabulary."""
        return self._vocabulary[1]

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises NpgptError, with the reason, where it has no vocabulary."""
        found, reason = self._vocabulary
        if found is None:
            raise NpgptError(f"{self.name} has no text: {reason}")
        return found

    @cached_property
    def _ends(self) -> Ends:
        return self.ends.completed(None if self.why_no_text else self.tokenizer.end_of_text)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a text: eos_token_id of the model's files, or else <|endoftext|> of its vocabulary."""
        return self._ends.eos

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """The ids before a text: those of its own tokenizer, bos_token_id of its files, or else <|endoftext|>."""
        own = () if self.why_no_text else self.tokenizer.before
        return own or (() if self._ends.bos is None else (self._ends.bos,))

    @property
    def begins_with(self) -> str:
        """The tokens of begin_ids in words, empty where there are none."""

        def word(token_id: int) -> str:
            has_text = not self.why_no_text and self.tokenizer.has_text(token_id)
            return printable(shown(self.tokenizer.piece(token_id))) if has_text else f"id {token_id}"

        return " ".join(map(word, self.begin_ids))

    @checked
    def __call__(
        self,
        token_ids: ArrayLike,
        cache: KVCache | None = None,
        record: Record | None = None,
        *,
        logits_from: int = 0,
    ) -> Array:
        """Return the logits [B, T, V] of token_ids [T] or [B, T], in the parameters' dtype; see npgpt.forward.

        A body without a head for ids can be recorded; its logits are of no use. Raises NpgptError where they alone are
        wanted.
        """
        if record is None:
            self._check_logits()
        return forward(self.parameters, self.config, token_ids, cache, record, logits_from=logits_from)

    def _check_logits(self) -> None:
        if self.no_logits:
            raise NpgptError(f"{self.name} gives no logits: {self.no_logits}")

    @checked
    def encode_prompt(self, text: str, *, special: bool = False) -> list[int]:
        """Return a prompt's ids; an empty one is begin_ids.

        Raises NpgptError where the model has no text, or no id to start from.
        """
        if text == "" and self.begin_ids:
            return [*self.begin_ids]
        if ids := self.tokenizer.encode(text, special=special):
            return ids
        raise NpgptError(f"the prompt is empty, and {self.name} has no <|endoftext|> to start from, or bos_token_id")

    @checked
    def generate(
        self,
        prompt: str | ArrayLike,
        *,
        max_tokens: int | None = 100,
        seed: int | None = None,
        stop: str | Iterable[str] | None = (),
        special: bool = False,
        ignore_eos: bool = False,
        keep_last: bool = False,
        **sampling: Any,
    ) -> Iterator[str]:
        """Yield the text that follows a prompt (a text or ids [T]), piece by piece as it becomes certain.

        max_tokens: None for as many as the context holds. The same seed gives the same text. special: read special
        tokens in a prompt, such as <|endoftext|>, as such and not as plain text. A stop string ends the text, and so
        does each of end_ids unless ignore_eos; none is yielded. keep_last cuts the head of a prompt longer than the
        context. The other keywords are those of Sampling: temperature (0 is greedy), top_k, top_p, min_p,
        repetition_penalty (above 1 makes ids of the prompt and the text less likely); None switches each off. Raises
        NpgptError at once for an argument out of range, a prompt longer than the context, and a model without text.
        """
        self._check_logits()
        settings, _ = Sampling(**sampling), self.tokenizer
        ids = self._prompt_ids(prompt, special, keep_last, max_tokens)
        steps = self.steps(
            ids, max_tokens=max_tokens, sampling=settings, seed=seed, stop=_stops(stop), ignore_eos=ignore_eos
        )
        return (step.text for step in steps if step.text)

    @checked
    def generate_many(
        self,
        prompts: Iterable[str | ArrayLike],
        *,
        max_tokens: int | None = 100,
        seed: int | None = None,
        stop: str | Iterable[str] | None = (),
        special: bool = False,
        ignore_eos: bool = False,
        keep_last: bool = False,
        **sampling: Any,
    ) -> Iterator[str]:
        """Yield the whole text that follows each prompt, in their order: that which generate() gives it alone.

        The prompts run side by side, whatever their lengths; prompt i is drawn with seed + i. The arguments are those
        of generate(), and so are the exceptions.
        """
        self._check_logits()
        settings, _ = Sampling(**sampling), self.tokenizer
        rows = []
        for number, prompt in enumerate(several(prompts)):
            with about(f"prompt {number}"):
                rows.append(self._prompt_ids(prompt, special, keep_last, max_tokens))
        steps = self.steps_many(
            rows, max_tokens=max_tokens, sampling=settings, seed=seed, stop=_stops(stop), ignore_eos=ignore_eos
        )
        return _in_order(steps)

    def prompt_ids(self, prompt: str | ArrayLike, *, special: bool = False) -> list[int]:
        """Return the ids of a prompt, a text or ids [T]. Raises NpgptError where they do not fit the model."""
        ids = self.encode_prompt(prompt, special=special) if isinstance(prompt, str) else prompt
        rows = self.config.token_rows(ids)
        if len(rows) != 1:
            raise NpgptError(f"one row of ids is expected, not {len(rows)}")
        return [int(token_id) for token_id in rows[0]]

    def _prompt_ids(self, prompt: str | ArrayLike, special: bool, keep_last: bool, max_tokens: int | None) -> ArrayLike:
        """Return the ids of a prompt, cut to the context where keep_last asks for it."""
        ids = self.encode_prompt(prompt, special=special) if isinstance(prompt, str) else prompt
        return kept_prompt(ids, self.config, max_tokens) if keep_last else ids

    @checked
    def steps(
        self,
        prompt: ArrayLike,
        *,
        max_tokens: int | None,
        sampling: Sampling,
        seed: int | None = None,
        stop: Iterable[str] = (),
        ignore_eos: bool = False,
        samples: int = 1,
    ) -> Iterator[Step]:
        """Continue prompt ids [T] token by token, with the ids, the text and why it ended; needs no vocabulary.

        Each of end_ids ends it unless ignore_eos; max_tokens=None is no limit but the context.
        Several samples read the prompt once; their steps alternate, and step.sample is the number of the sample.
        See npgpt.text.generation.generate.
        """
        self._check_logits()
        return generate(
            self.parameters,
            self.config,
            prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            seed=seed,
            tokenizer=None if self.why_no_text else self.tokenizer,
            stop=stop,
            ends=() if ignore_eos else self.end_ids,
            samples=samples,
        )

    @checked
    def steps_many(
        self,
        prompts: Iterable[ArrayLike],
        *,
        max_tokens: int | None,
        sampling: Sampling,
        seed: int | None = None,
        stop: Iterable[str] = (),
        ignore_eos: bool = False,
    ) -> Iterator[Step]:
        """Continue several prompts of ids, each [T] of its own length, side by side; step.sample is a prompt's number.

        The options are those of steps(), but for samples. See npgpt.text.generation.generate_many.
        """
        self._check_logits()
        return generate_many(
            self.parameters,
            self.config,
            prompts,
            max_tokens=max_tokens,
            sampling=sampling,
            seed=seed,
            tokenizer=None if self.why_no_text else self.tokenizer,
            stop=stop,
            ends=() if ignore_eos else self.end_ids,
        )


def _stops(stop: str | Iterable[str] | None) -> Iterable[str]:
    """Return stop strings, of which a single one and none may be given as such."""
    return [stop] if isinstance(stop, str) else () if stop is None else stop


def _in_order(steps: Iterable[Step]) -> Iterator[str]:
    """Yield each sample's whole text, in their order, as soon as it and those before have ended."""
    texts: dict[int, str] = {}
    ended, number = set(), 0
    for step in steps:
        texts[step.sample] = texts.get(step.sample, "") + step.text
        if step.finish is not None:
            ended.add(step.sample)
        while number in ended:
            yield texts.pop(number)
            number += 1
