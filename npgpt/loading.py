"""A name or a path becomes a LanguageModel, or a checkpoint in the one converted form: model, tokenizer and all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from numpy.typing import DTypeLike

from . import parameters
from .checkpoints import write
from .checkpoints.find import GPT2_RANKS, expanded, find
from .checkpoints.formats import WEIGHTS_FILE
from .checkpoints.open import CONVERTED, IDS, Checkpoint, open_checkpoint, open_vocabulary
from .checkpoints.tensor import Contents as Container
from .checkpoints.tensor import check_file
from .config import PUBLISHED, Config
from .errors import NpgptError, float_dtype
from .language_model import LanguageModel
from .text import vocabularies as vocabularies
from .text.tokenizer import Tokenizer
from .text.vocabularies import Inside

# what a folder may hold to be overwritten
REPLACEABLE = {WEIGHTS_FILE, write.CONFIG_FILE, *vocabularies.FILES}


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    dtype: DTypeLike = "float32",
    n_head: int | None = None,
    config: Config | None = None,
    name_scheme: str | None = None,
) -> LanguageModel:
    """Load a model by name or path, in any form that npgpt reads; without one, the embedded model.

    dtype: float32, or float64 as the ground truth that others are measured against. n_head: states what a checkpoint
    leaves open, or overrides it. config: takes the place of the checkpoint's whole configuration. name_scheme: whose
    names the tensors have, where that is not to be told from them. float32 weights are used where they lie in the
    mapped file, others are converted. Raises NpgptError for whatever does not fit.
    """
    dtype = float_dtype("a model's dtype", dtype)
    location = find(model)
    checkpoint = open_checkpoint(location.weights, n_head=n_head, config=config, name_scheme=name_scheme)
    arrays = {name: checkpoint.load(name, dtype) for name in checkpoint.sources}
    weights = parameters.from_arrays(checkpoint.config, arrays)
    form = checkpoint.description
    return LanguageModel(
        location.name,
        checkpoint.config,
        weights,
        lambda: vocabulary(checkpoint),
        origin="" if form == CONVERTED else f"{checkpoint.path}: {form}",
        files=checkpoint.container.files,
        again=(location.weights.absolute(), dtype, n_head, config, name_scheme),
    )


@dataclass(frozen=True, eq=False)
class Handed:
    """A model as it is handed to whoever computes: here itself, to another process the arguments that load it. It is
    loaded there by the work, and not by unpickling, so that what is wrong with it is an error of the work.
    """

    model: LanguageModel

    def open(self) -> LanguageModel:
        """The model."""
        return self.model

    def __reduce__(self) -> tuple[Any, ...]:
        if self.model.again is None:
            raise NpgptError(
                f"{self.model.name} lies in no file that another process could load: npgpt.save, then npgpt.load"
            )
        return Elsewhere, (self.model.again, self.model.fingerprint)


@dataclass(frozen=True)
class Elsewhere:
    """The same where it arrives: the arguments that load it, and what its fingerprint has to be."""

    again: tuple[Any, ...]
    fingerprint: str

    def open(self) -> LanguageModel:
        """The model, mapped once for all the work. Raises NpgptError where its file is not there, or not the same."""
        return _load_again(self)


@lru_cache(maxsize=1)  # every piece of work brings an Elsewhere of its own
def _load_again(one: Elsewhere) -> LanguageModel:
    path, dtype, n_head, config, name_scheme = one.again
    model = load(path, dtype=dtype, n_head=n_head, config=config, name_scheme=name_scheme)
    if model.fingerprint != one.fingerprint:
        raise NpgptError(
            f"{path} holds other weights than the model whose work was handed out: it is another file here, or the "
            "model was changed in memory (npgpt.save it, and npgpt.load that)"
        )
    return model


def convert(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    n_head: int | None = None,
    name_scheme: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Checkpoint:
    """Write any checkpoint that npgpt reads, by name or path, as model.safetensors, config.json and its vocabulary.

    The folder then loads here and in transformers alike; it appears whole or not at all. Tensors are streamed, so that
    a model larger than the memory can be converted. dtype: float32, float16 or bfloat16. overwrite: replace a folder
    that holds a converted model and nothing else. progress(bytes written, bytes in all) is called as it goes. Returns
    the checkpoint that was read. Raises NpgptError for whatever does not fit, OSError where it cannot be written.
    """
    location, folder = find(source), expanded(folder)
    replaceable = REPLACEABLE if overwrite else None
    write.check_destination(folder, location.weights, replaceable)
    checkpoint = open_checkpoint(location.weights, n_head=n_head, name_scheme=name_scheme)
    layout, parts = write.converted(checkpoint, dtype)
    if progress is not None:
        size = 4 if dtype == "float32" else 2
        parts = write.with_progress(parts, size * sum(prod(shape) for _, shape in layout.values()), progress)
    files = _vocabulary_files(checkpoint)
    ids = _ids(vocabulary(checkpoint)) | {key: checkpoint.stated[key] for key in IDS if key in checkpoint.stated}
    write.write_folder(folder, checkpoint.config, ids, files, layout, parts, replaceable)
    return checkpoint


def save(model: LanguageModel, folder: str | os.PathLike[str]) -> None:
    """Write model.safetensors, config.json and a vocabulary of the model's own into a new or empty folder.

    The folder then loads here and in transformers alike, and appears whole or not at all. Raises NpgptError for a
    folder that holds anything, OSError where it cannot be written.
    """
    folder = expanded(folder)
    write.check_destination(folder, None)
    own = [] if isinstance(model.vocabulary, str) else [file for file in model.vocabulary.files if file != GPT2_RANKS]
    files = {file.name: file.read_bytes() for file in own}
    arrays = parameters.to_arrays(model.parameters)
    layout = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
    write.write_folder(folder, model.config, _ids(model.vocabulary), files, layout, lambda name: [arrays[name]])


def load_tokenizer(model: str | os.PathLike[str] | None = None) -> Tokenizer:
    """A model's tokenizer without its weights; GPT-2's own for a published name whose weights are not here.

    Raises NpgptError, with the reason, where the model has no vocabulary.
    """
    try:
        location = find(model)
    except NpgptError:
        if model not in PUBLISHED:
            raise
        return vocabularies.from_ranks(GPT2_RANKS, PUBLISHED[str(model)].vocab_size)
    found = _tokenizer(location.weights, *open_vocabulary(location.weights))
    if isinstance(found, str):
        raise NpgptError(f"{location.name} has no text: {found}")
    return found


def vocabulary(checkpoint: Checkpoint) -> Tokenizer | str:
    """A checkpoint's tokenizer, or the reason why it has none."""
    return _tokenizer(checkpoint.path, checkpoint.container, checkpoint.config.vocab_size, checkpoint.stated)


def _tokenizer(path: Path, container: Container, vocab_size: int, stated: Mapping[str, Any]) -> Tokenizer | str:
    contents = container.vocabulary

    def inside() -> list[Inside]:
        return [Inside(name, path, content) for name, content in (contents() if contents else {}).items()]

    eos_token_id = stated.get("eos_token_id")
    return vocabularies.find(path.parent, vocab_size, GPT2_RANKS, eos_token_id, inside if contents else None)


def _vocabulary_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The vocabulary's files as they are, readable or not, under the names by which transformers knows them."""
    if checkpoint.container.vocabulary is not None:
        return checkpoint.container.vocabulary()
    here = vocabularies.in_folder(checkpoint.path.parent)
    for file in here.values():
        check_file(file)  # what cannot be taken along is no reason to leave it behind unsaid
    hugging_face, openai = vocabularies.PAIRS
    renamed = dict(zip(openai, hugging_face, strict=True)) if not here.keys() & set(hugging_face) else {}
    beside = vocabularies.in_folder(checkpoint.path.parent, vocabularies.COMPANIONS) if here else {}
    return {renamed.get(name, name): file.read_bytes() for name, file in (here | beside).items()}


def _ids(found: Tokenizer | str) -> dict[str, int | None]:
    """What config.json says of the text's ends."""
    end_of_text = None if isinstance(found, str) else found.end_of_text
    return {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
