"""Load a model with its tokenizer, call it and generate text with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike, DTypeLike

from . import parameters as P
from .cache import KVCache
from .checkpoints.ends import Ends
from .checkpoints.files import is_input
from .checkpoints.find import find
from .checkpoints.open import CONVERTED, open_checkpoint
from .config import Config
from .errors import NpgptError, about, check_kinds, checked, counted, float_dtype, printable
from .model import forward as unchecked_forward
from .parameters import Array, Parameters, Record
from .text.generation import Step, generate, generate_many, in_order, kept_prompt, several
from .text.sampling import Sampling
from .text.tokenizer import Tokenizer
from .text.vocabularies import beside, in_folder, tokenizer_of

forward = checked(unchecked_forward)  # npgpt.forward; model.py holds formulas and does not check types


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
    """Load a model by name or path, in any format that npgpt reads; the default is the embedded model.

    dtype: float32, or float64 to measure other implementations against. n_head, activation ("gelu_new" is the tanh
    form, "gelu" the erf form): set or override what the checkpoint states. config: replaces its whole configuration,
    including eos_token_id (generation_config.json still counts). name_scheme: the naming scheme of the tensors, needed
    only where names are ambiguous. float32 weights are memory-mapped, others converted. The model's notes list what was
    guessed or ignored. Raises NpgptError for anything that does not fit.
    """
    dtype = float_dtype("a model's dtype", dtype)
    location = find(model)
    return open_model(Source(location.name, location.weights, dtype, n_head, config, name_scheme, activation))


def opened(model: LanguageModel | str | os.PathLike[str] | None = None) -> LanguageModel:
    """Return a model that is already loaded, or load it by name or path. Raises NpgptError as load() does."""
    return model if isinstance(model, LanguageModel) else load(model)


@dataclass(frozen=True)
class Source:
    """Everything needed to open a model, also in another process: its weights file and the arguments of load()."""

    name: str
    weights: Path
    dtype: str
    n_head: int | None
    config: Config | None
    name_scheme: str | None
    activation: str | None = None


def open_model(source: Source) -> LanguageModel:
    """Open a model's file. Raises NpgptError for anything that does not fit."""
    checkpoint = open_checkpoint(
        source.weights,
        n_head=source.n_head,
        activation=source.activation,
        config=source.config,
        name_scheme=source.name_scheme,
    )
    folder = checkpoint.path.parent
    for file in (in_folder(folder) | beside(folder)).values():
        is_input(file)  # even if it is never read: no output may replace it
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
    raise NpgptError("it was created without a vocabulary")


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A GPT-2 that is ready to run.

    open_tokenizer returns its tokenizer, or raises NpgptError with the reason why there is none. origin names the file
    it was loaded from and its format, or is empty for Hugging Face's safetensors. notes list what was guessed or
    ignored. no_logits is the reason why it predicts no tokens (as a classifier), or empty. files hold its weights;
    source opens it again. ends are the ids that its files state for the beginning and end of a text; see begin_ids and
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
        notes = counted(len(self.notes), "note") if self.notes else ""
        shown = "; ".join(filter(None, (f"{self.name!r}: {sizes}, {ids}", origin, notes)))
        return printable(f"LanguageModel({shown})")

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of the configuration and the parameters; it takes half a second per gigabyte."""
        return P.sha256(self.config, self.parameters)

    @cached_property
    def _vocabulary(self) -> tuple[Tokenizer | None, str]:
        """The tokenizer, or the reason why there is none; opened on first use, since ids run without it."""
        try:
            return self.open_tokenizer(), ""
        except NpgptError as error:
            return None, str(error)

    @property
    def why_no_text(self) -> str:
        """The reason why the model runs on ids only; empty if it has a vocabulary."""
        return self._vocabulary[1]

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises NpgptError with the reason if there is no vocabulary."""
        found, reason = self._vocabulary
        if found is None:
            raise NpgptError(f"{self.name} has no text: {reason}")
        return found

    @cached_property
    def _ends(self) -> Ends:
        return self.ends.completed(None if self.why_no_text else self.tokenizer.end_of_text)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a text: the model's eos_token_id, or else <|endoftext|> in its vocabulary."""
        return self._ends.eos

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """The ids before a text: those its tokenizer adds, or else its bos_token_id, or else <|endoftext|>."""
        own = () if self.why_no_text else self.tokenizer.before
        return own or (() if self._ends.bos is None else (self._ends.bos,))

    @checked
    def __call__(
        self, token_ids: ArrayLike, cache: KVCache | None = None, record: Record | None = None, *, logits_from: int = 0
    ) -> Array:
        """Return the logits [B, T, V] of token_ids [T] or [B, T], in the parameters' dtype; see npgpt.forward.

        Raises NpgptError for a model that gives no logits (such as a classifier) unless its stages are recorded.
        """
        if record is None:
            self._check_logits()
        return forward(self.parameters, self.config, token_ids, cache, record, logits_from=logits_from)

    def _check_logits(self) -> None:
        if self.no_logits:
            raise NpgptError(f"{self.name} gives no logits: {self.no_logits}")

    @checked
    def encode_prompt(self, text: str, *, special: bool = False) -> list[int]:
        """Return the ids of a prompt; those of an empty one are begin_ids.

        Raises NpgptError if the model has no text, or the prompt is empty and there is no id to start from.
        """
        if text == "" and self.begin_ids:
            return [*self.begin_ids]
        if ids := self.tokenizer.encode(text, special=special):
            return ids
        raise NpgptError(f"the prompt is empty, and {self.name} has no <|endoftext|> or bos_token_id to start from")

    def text_ids(self, text: str | ArrayLike, *, special: bool = False) -> list[int]:
        """Return the ids of a text, or ids [T] themselves. Raises NpgptError if it is empty or does not fit."""
        if isinstance(text, str) and not text:
            raise NpgptError("the text is empty, and at least one token is needed")
        rows = self.config.token_rows(self.encode_prompt(text, special=special) if isinstance(text, str) else text)
        if len(rows) != 1:
            raise NpgptError(f"one row of ids is expected, not {len(rows)}")
        return [int(token_id) for token_id in rows[0]]

    def piece(self, token_id: int) -> bytes:
        """Return the bytes of a token; empty if the model or the id has no text."""
        return b"" if self.why_no_text or not self.tokenizer.has_text(token_id) else self.tokenizer.piece(token_id)

    @checked
    def generate(
        self,
        prompt: str | ArrayLike,
        *,
        max_tokens: int | None = 100,
        special: bool = False,
        keep_last: bool = False,
        seed: int | None = None,
        stop: str | Iterable[str] | None = (),
        ignore_eos: bool = False,
        **sampling: Any,
    ) -> Iterator[str]:
        """Yield the text that follows a prompt (a text or ids [T]), piece by piece.

        max_tokens: None for as many as the context holds. special: encode special tokens in the prompt, such as
        <|endoftext|>, as such and not as plain text. keep_last: drop the beginning of a prompt longer than the context.
        seed: the same seed gives the same text. stop: strings that end the text and are not part of it. ignore_eos: do
        not stop at end_ids. sampling: keywords of Sampling (temperature, top_k, top_p, min_p, repetition_penalty).
        Raises NpgptError at once for an argument out of range, a prompt that is too long, and a model without text.
        """
        options = self._step_options(seed=seed, stop=stop, ignore_eos=ignore_eos, **sampling)
        ids = self._kept_ids(prompt, max_tokens, special, keep_last)
        return (step.text for step in self.steps(ids, max_tokens=max_tokens, **options) if step.text)

    @checked
    def generate_many(
        self,
        prompts: Iterable[str | ArrayLike],
        *,
        max_tokens: int | None = 100,
        special: bool = False,
        keep_last: bool = False,
        **options: Any,
    ) -> Iterator[str]:
        """Yield the whole text that follows each prompt, in order: the text that generate() gives for it alone.

        The prompts are continued in batches, whatever their lengths; prompt i uses seed + i. The options are those of
        generate(), and so are the exceptions.
        """
        options, rows = self._step_options(**options), []
        for number, prompt in enumerate(several(prompts)):
            with about(f"prompt {number}"):
                rows.append(self._kept_ids(prompt, max_tokens, special, keep_last))
        return in_order(self.steps_many(rows, max_tokens=max_tokens, **options))

    @checked
    def _step_options(
        self, *, seed: int | None = None, stop: str | Iterable[str] | None = (), ignore_eos: bool = False, **others: Any
    ) -> dict[str, Any]:
        """Return the options of steps() for those of generate(). Raises NpgptError for a model without text."""
        self._check_logits()
        settings, _ = Sampling(**others), self.tokenizer
        stops = [stop] if isinstance(stop, str) else () if stop is None else stop
        return {"sampling": settings, "seed": seed, "stop": stops, "ignore_eos": ignore_eos}

    def _kept_ids(self, prompt: str | ArrayLike, max_tokens: int | None, special: bool, keep_last: bool) -> ArrayLike:
        """Return the ids of a prompt, cut to the context if keep_last is set."""
        ids = self.encode_prompt(prompt, special=special) if isinstance(prompt, str) else prompt
        return kept_prompt(ids, self.config, max_tokens) if keep_last else ids

    def steps(self, prompt: ArrayLike, *, samples: int = 1, **options: Any) -> Iterator[Step]:
        """Continue prompt ids [T] token by token; each Step has the id, the text and why the text ended.

        This needs no vocabulary. The options are max_tokens (None for as many as the context holds), sampling, seed,
        stop (strings) and ignore_eos. Several samples read the prompt once; their steps alternate, and step.sample is
        the sample's number. See npgpt.text.generation.generate.
        """
        return generate(self.parameters, self.config, prompt, samples=samples, **self._loop_options(**options))

    @checked
    def steps_many(self, prompts: Iterable[ArrayLike], **options: Any) -> Iterator[Step]:
        """Continue several prompts of ids, each [T] of any length, in batches; step.sample is the prompt's number.

        The options are those of steps(), except samples. See npgpt.text.generation.generate_many.
        """
        return generate_many(self.parameters, self.config, prompts, **self._loop_options(**options))

    @checked
    def _loop_options(
        self, *, sampling: Sampling, stop: Iterable[str] = (), ignore_eos: bool = False, **options: Any
    ) -> dict[str, Any]:
        """Return the arguments of text.generation's functions for the options of steps()."""
        self._check_logits()
        tokenizer, ends = None if self.why_no_text else self.tokenizer, () if ignore_eos else self.end_ids
        return options | {"sampling": sampling, "stop": stop, "tokenizer": tokenizer, "ends": ends}
