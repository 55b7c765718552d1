"""A name or a path becomes a LanguageModel, or a checkpoint in the one converted form: model, tokenizer and all."""

from __future__ import annotations

import os
from collections.abc import Callable
from math import prod
from pathlib import Path

from numpy.typing import DTypeLike

from . import config as configuration
from . import parameters, tokenizer
from .checkpoints import conversion
from .checkpoints.container import Container
from .checkpoints.opening import CONVERTED, IDS, Checkpoint, open_checkpoint, open_vocabulary
from .config import PUBLISHED, Config
from .errors import NpgptError
from .finding import GPT2_RANKS, expanded, find
from .language_model import LanguageModel
from .tokenizer import Inside, Tokenizer

# what transformers keeps beside a vocabulary
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# what a folder may hold to be overwritten
REPLACEABLE = {conversion.WEIGHTS_FILE, conversion.CONFIG_FILE, *tokenizer.READABLE, *tokenizer.FOREIGN, *COMPANIONS}


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
    dtype = configuration.float_dtype("a model's dtype", dtype)
    location = find(model)
    checkpoint = open_checkpoint(location.weights, n_head=n_head, config=config, name_scheme=name_scheme)
    arrays = {name: checkpoint.load(name, dtype) for name in checkpoint.sources}
    weights = parameters.from_arrays(checkpoint.config, arrays)
    form = checkpoint.description
    origin = "" if form == CONVERTED else f"{checkpoint.path}: {form}"
    return LanguageModel(location.name, checkpoint.config, weights, vocabulary(checkpoint), origin)


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
    conversion.check_destination(folder, location.weights, overwrite=overwrite, replaceable=REPLACEABLE)
    checkpoint = open_checkpoint(location.weights, n_head=n_head, name_scheme=name_scheme)
    layout, parts = conversion.converted(checkpoint, dtype)
    if progress is not None:
        size = 4 if dtype == "float32" else 2
        parts = conversion.with_progress(parts, size * sum(prod(shape) for _, shape in layout.values()), progress)
    files = _vocabulary_files(checkpoint)
    ids = _ids(vocabulary(checkpoint)) | {key: checkpoint.stated[key] for key in IDS if key in checkpoint.stated}
    conversion.write_folder(folder, checkpoint.config, ids, files, layout, parts)
    return checkpoint


def save(model: LanguageModel, folder: str | os.PathLike[str]) -> None:
    """Write model.safetensors, config.json and a vocabulary of the model's own into a new or empty folder.

    The folder then loads here and in transformers alike, and appears whole or not at all. Raises NpgptError for a
    folder that holds anything, OSError where it cannot be written.
    """
    folder = expanded(folder)
    conversion.check_destination(folder, None, overwrite=False)
    own = [] if isinstance(model.vocabulary, str) else [file for file in model.vocabulary.files if file != GPT2_RANKS]
    files = {file.name: file.read_bytes() for file in own}
    arrays = parameters.to_arrays(model.parameters)
    layout = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
    conversion.write_folder(folder, model.config, _ids(model.vocabulary), files, layout, lambda name: [arrays[name]])


def load_tokenizer(model: str | os.PathLike[str] | None = None) -> Tokenizer:
    """A model's tokenizer without its weights; GPT-2's own for a published name whose weights are not here.

    Raises NpgptError, with the reason, where the model has no vocabulary.
    """
    try:
        location = find(model)
    except NpgptError:
        if model not in PUBLISHED:
            raise
        return tokenizer.from_ranks(GPT2_RANKS, PUBLISHED[str(model)].vocab_size)
    container, vocab_size, stated = open_vocabulary(location.weights)
    eos_token_id = stated.get("eos_token_id")
    found = tokenizer.find(location.folder, vocab_size, GPT2_RANKS, eos_token_id, _inside(location.weights, container))
    if isinstance(found, str):
        raise NpgptError(f"{location.name} has no text: {found}")
    return found


def vocabulary(checkpoint: Checkpoint) -> Tokenizer | str:
    """A checkpoint's tokenizer, or the reason why it has none."""
    inside, eos_token_id = _inside(checkpoint.path, checkpoint.container), checkpoint.stated.get("eos_token_id")
    return tokenizer.find(checkpoint.path.parent, checkpoint.config.vocab_size, GPT2_RANKS, eos_token_id, inside)


def _inside(path: Path, container: Container) -> Callable[[], list[Inside]] | None:
    """The vocabulary within a checkpoint's own file."""
    contents = container.vocabulary
    return contents and (lambda: [Inside(name, path, content) for name, content in contents().items()])


def _vocabulary_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The vocabulary's files as they are, readable or not, under the names by which transformers knows them."""
    if checkpoint.container.vocabulary is not None:
        return checkpoint.container.vocabulary()
    here = tokenizer.in_folder(checkpoint.path.parent)
    for name in COMPANIONS if here else ():
        if (file := checkpoint.path.with_name(name)).is_file():
            here[name] = file
    hugging_face, openai = tokenizer.PAIRS
    renamed = dict(zip(openai, hugging_face, strict=True)) if not here.keys() & set(hugging_face) else {}
    return {renamed.get(name, name): file.read_bytes() for name, file in here.items()}


def _ids(found: Tokenizer | str) -> dict[str, int | None]:
    """What config.json says of the text's ends."""
    end_of_text = None if isinstance(found, str) else found.end_of_text
    return {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
