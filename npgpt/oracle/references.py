"""The reference of a check: the model that another implementation should be, in float64, and the ids of the prompt."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .. import parameters
from ..config import GPT2_VOCAB_SIZES, Config
from ..errors import NpgptError
from ..language_model import LanguageModel, load
from ..parameters import Array
from ..text.vocabularies import load_tokenizer
from . import modules
from .files import Given
from .running import Ids

Weights = LanguageModel | str | os.PathLike[str] | Mapping[str, Any] | Any  # the last is a module
Prompt = str | ArrayLike


def opened(weights: Weights | None, n_head: int | None = None) -> LanguageModel:
    """Return the model for a name, path, module or state dict; for None the embedded one."""
    if modules.is_module(weights) or isinstance(weights, Mapping):
        return modules.as_language_model(weights, n_head)
    if weights is not None and not isinstance(weights, (str, os.PathLike, LanguageModel)):
        raise NpgptError(f"weights must be a model, its name or path, a module or a state dict, not {weights!r:.80}")
    model = weights if isinstance(weights, LanguageModel) else load(weights, dtype="float64", n_head=n_head)
    if model.no_logits:
        raise NpgptError(f"{model.name} cannot be the reference: {model.no_logits}")
    return model


def in_float64(model: LanguageModel) -> dict[str, Array]:
    """Return the tensors of a model in float64, by canonical name. Raises NpgptError as finite() does."""
    tensors = parameters.to_arrays(model.parameters).items()
    return finite({name: array.astype(np.float64, copy=False) for name, array in tensors}, model.name)


def finite(tensors: Mapping[str, Array], whose: str) -> dict[str, Array]:
    """Return the tensors. Raises NpgptError for NaN or infinity, with which no output could be compared."""
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise NpgptError(f"{whose} cannot be the reference: {name} has values that are not finite")
    return dict(tensors)


def ids_of(prompt: Prompt | None, model: LanguageModel | None, config: Config, theirs: Any = None) -> Ids:
    """Return the ids [B, T] of a prompt. theirs: may be a file that contains ids.

    A text is encoded with the model's vocabulary, or without a model with GPT-2's if the size fits.
    """
    if isinstance(theirs, Given):
        prompt = theirs.ids(None if prompt is None else ids_of(prompt, model, config))
    if prompt is None:
        raise NpgptError("there is no prompt: give the text or ids that theirs was run on")
    if isinstance(prompt, str):
        if model is not None:
            prompt = model.encode_prompt(prompt)
        elif config.vocab_size in GPT2_VOCAB_SIZES:
            prompt = load_tokenizer("gpt2").encode(prompt)
        else:
            raise NpgptError(f"there is no vocabulary: {config.vocab_size} ids are not GPT-2's; give ids")
    return config.token_rows(prompt)
