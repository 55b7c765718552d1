"""A name or a path becomes a LanguageModel: configuration, parameters and tokenizer, checked against one another."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from . import config as configuration
from . import parameters, strict_json, tokenizer
from .checkpoints import huggingface, safetensors
from .checkpoints.atomic import writing
from .config import PUBLISHED, Config
from .errors import NpgptError
from .finding import GPT2_RANKS, WEIGHTS_FILE, Location, expanded, find
from .language_model import LanguageModel
from .parameters import Shape

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, opened and found consistent; hardly a weight has been read yet."""

    location: Location
    config: Config
    unknown_keys: list[str]  # keys of config.json that nobody knows
    file: safetensors.SafetensorsFile
    names: dict[str, str]  # canonical name -> name in the file
    eos_token_id: object  # what config.json says of it, if anything

    def vocabulary(self) -> tokenizer.Tokenizer | str:
        """The model's tokenizer, or the reason why it has none."""
        return tokenizer.find(self.location.folder, self.config.vocab_size, GPT2_RANKS, self.eos_token_id)


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    dtype: DTypeLike = "float32",
    n_head: int | None = None,
    config: Config | None = None,
) -> LanguageModel:
    """Load a model by name or path; without one, the embedded model.

    dtype: float32, or float64 as the ground truth that others are measured against. n_head: states what a checkpoint
    leaves open, or overrides it. config: takes the place of the checkpoint's whole configuration. float32 weights are
    used where they lie in the mapped file, others are converted. Raises NpgptError for whatever does not fit.
    """
    dtype = configuration.float_dtype("a model's dtype", dtype)
    checkpoint = open_checkpoint(find(model), n_head=n_head, config=config)
    arrays = {canonical: checkpoint.file.load(stored, dtype) for canonical, stored in checkpoint.names.items()}
    weights = parameters.from_arrays(checkpoint.config, arrays)
    return LanguageModel(checkpoint.location.name, checkpoint.config, weights, checkpoint.vocabulary())


def open_checkpoint(location: Location, *, n_head: int | None = None, config: Config | None = None) -> Checkpoint:
    """Read configuration and header and compare them: names, shapes, the number of heads, the tied head.

    Raises NpgptError with all that is wrong.
    """
    if config is not None and n_head is not None:
        raise NpgptError("give n_head or a whole config, not both")
    if not isinstance(config, Config | None):
        raise NpgptError(f"config must be an npgpt.Config, not {type(config).__name__}")
    file = safetensors.read(location.weights)
    names = huggingface.canonical_names(file.tensors)
    shapes = {name: file.tensors[stored].shape for name, stored in names.items()}
    path = location.folder / CONFIG_FILE
    given = config is not None
    stated = _read_config(path) if os.path.lexists(path) and not given else None
    unknown: list[str] = []
    if config is None:
        source = str(location.weights if stated is None else path)
        found, unknown = configuration.read_fields(stated or {}, source)
        config = _complete(found, shapes, n_head, source)
    if shapes.get("lm_head.weight") == shapes.get("wte.weight") == (config.vocab_size, config.n_embd):
        same = _same_bytes(file, names["lm_head.weight"], names["wte.weight"])
        if config.tie_word_embeddings and not same and (given or stated is not None):
            ties = "the config given" if given else str(path)
            raise NpgptError(
                f"{location.weights}: lm_head.weight differs from wte.weight, but {ties} ties them (the default); "
                "set tie_word_embeddings to false there to use the head"
            )
        if not given:
            config = dataclasses.replace(config, tie_word_embeddings=same)
        if config.tie_word_embeddings:
            del names["lm_head.weight"], shapes["lm_head.weight"]
    parameters.check_shapes(config, shapes, str(location.weights))
    return Checkpoint(location, config, unknown, file, names, (stated or {}).get("eos_token_id"))


def _complete(stated: Mapping[str, Any], shapes: Mapping[str, Shape], n_head: int | None, source: str) -> Config:
    """A Config from what is stated and what the shapes tell.

    No shape depends on n_head, so that is taken from the argument, else from what is stated, else from the published
    model of this shape. A stated n_head that contradicts a published shape is refused: it is the mistake that loads
    without complaint and writes nonsense. The argument may contradict, since somebody may have trained such a model.
    """
    fields = _sizes(shapes) | dict(stated)
    missing = [key for key in configuration.REQUIRED if key not in fields and key != "n_head"]
    if missing:
        raise NpgptError(f"{source} lacks {', '.join(missing)}, and the weights' names and shapes do not tell")
    published = _config(fields | _sizes(shapes) | {"n_head": 1}, source).published_name()
    size = PUBLISHED[published] if published else None
    if n_head is not None:
        fields["n_head"] = n_head
    elif "n_head" not in fields:
        if size is None:
            raise NpgptError(
                f"{source} states no n_head, and no shape tells it: give it (--n-head N, or load(…, n_head=N)); "
                f"it divides n_embd = {fields['n_embd']}"
            )
        fields["n_head"] = size.n_head
    config = _config(fields, source if n_head is None else f"{source}, with n_head = {n_head} as given")
    if size is not None and n_head is None and config.n_head != size.n_head:
        swapped = f" ({config.n_head} is its n_layer)" if config.n_head == size.n_layer else ""
        raise NpgptError(
            f"{source} says n_head = {config.n_head}, but the weights have the shapes of {published}, whose n_head is "
            f"{size.n_head}{swapped}: {size.n_embd} = {size.n_head} × {size.head_width}; "
            f"correct it, or insist with --n-head {config.n_head} (load(…, n_head={config.n_head}))"
        )
    return config


def _config(fields: Mapping[str, Any], source: str) -> Config:
    try:
        return Config(**fields)
    except NpgptError as error:
        raise NpgptError(f"{source}: {error}") from None


def _sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What the shapes tell of a configuration; nothing where a tensor is missing or has another rank."""
    sizes: dict[str, Any] = {}
    if len(wte := shapes.get("wte.weight", ())) == 2:
        sizes["vocab_size"], sizes["n_embd"] = wte
    if len(wpe := shapes.get("wpe.weight", ())) == 2:
        sizes["n_positions"] = wpe[0]
    if len(c_fc := shapes.get("h.0.mlp.c_fc.weight", ())) == 2 and c_fc[1] != 4 * c_fc[0]:
        sizes["n_inner"] = c_fc[1]
    if n_layer := parameters.count_blocks(shapes):
        sizes["n_layer"] = n_layer
    return {key: size for key, size in sizes.items() if size}


def _same_bytes(file: safetensors.SafetensorsFile, one: str, other: str) -> bool:
    return np.array_equal(file.stored(one).view(np.uint8), file.stored(other).view(np.uint8))


def _read_config(path: Path) -> dict[str, Any]:
    """Raises OSError for a dangling link, NpgptError for what is no regular file or no JSON object."""
    if path.exists() and not path.is_file():
        raise NpgptError(f"{path} is there but is no regular file")
    return strict_json.read_object(path.read_bytes(), str(path))


def save(model: LanguageModel, folder: str | os.PathLike[str]) -> None:
    """Write model.safetensors, config.json and a vocabulary of the model's own into a new or empty folder.

    The folder then loads here and in transformers alike, and appears whole or not at all. Raises NpgptError for a
    folder that holds anything, OSError where it cannot be written.
    """
    folder = expanded(folder)
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise NpgptError(f"{folder} is there and not an empty folder: save into a new one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    unfinished.mkdir()
    try:
        _write_model(model, unfinished)
        if folder.is_dir():
            folder.rmdir()
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished)
        raise


def _write_model(model: LanguageModel, folder: Path) -> None:
    end_of_text = None
    if isinstance(model.vocabulary, tokenizer.Tokenizer):
        end_of_text = model.vocabulary.end_of_text
        for file in set(model.vocabulary.files) - {GPT2_RANKS}:
            with writing(folder / file.name) as copy:
                copy.write(file.read_bytes())
    stated = configuration.to_dict(model.config) | {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    with writing(folder / CONFIG_FILE) as stated_file:
        stated_file.write(json.dumps(stated, indent=2).encode() + b"\n")
    safetensors.write(folder / WEIGHTS_FILE, parameters.to_arrays(model.parameters))


def load_tokenizer(model: str | os.PathLike[str] | None = None) -> tokenizer.Tokenizer:
    """A model's tokenizer without its weights; GPT-2's own for a published name whose weights are not here.

    Raises NpgptError, with the reason, where the model has no vocabulary.
    """
    try:
        location = find(model)
    except NpgptError:
        if model not in PUBLISHED:
            raise
        return tokenizer.from_ranks(GPT2_RANKS, PUBLISHED[str(model)].vocab_size)
    file = safetensors.read(location.weights)
    wte = huggingface.canonical_names(file.tensors).get("wte.weight")
    if wte is None or len(file.tensors[wte].shape) != 2:
        raise NpgptError(f"{location.weights} holds no wte.weight [vocab_size, n_embd], and so no GPT-2")
    path = location.folder / CONFIG_FILE
    eos_token_id = _read_config(path).get("eos_token_id") if os.path.lexists(path) else None
    vocabulary = tokenizer.find(location.folder, file.tensors[wte].shape[0], GPT2_RANKS, eos_token_id)
    if isinstance(vocabulary, str):
        raise NpgptError(f"{location.name} has no text: {vocabulary}")
    return vocabulary
