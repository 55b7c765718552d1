"""Write a model as model.safetensors, config.json and a vocabulary, in a folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from .. import parameters
from ..config import GPT2_VOCAB_SIZES, Config
from ..errors import NpgptError, checked
from ..parameters import Shape
from ..text import vocabularies
from ..text.tokenizer import Tokenizer, contents
from . import configs, safetensors, stand_ins
from .atomic import sync_folder, writing
from .ends import GENERATION_FILE, IDS, ends_of
from .files import CONFIGURATION, is_output, one_run, read_bytes
from .find import find
from .formats import ADAPTERS, WEIGHTS_FILE
from .open import CONFIG_FILES, Checkpoint, open_checkpoint
from .places import GPT2_RANKS, expanded
from .strict_json import read_object
from .tensor import Stated, cast, itemsize, row_blocks

if TYPE_CHECKING:
    from ..language_model import LanguageModel

CONFIG_FILE = CONFIG_FILES[0]
DTYPES = ("float32", "float16", "bfloat16")
# what a folder may hold to be overwritten
REPLACEABLE = {WEIGHTS_FILE, CONFIG_FILE, GENERATION_FILE, *vocabularies.FILES}


@checked
@one_run()
def convert(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    n_head: int | None = None,
    activation: str | None = None,
    name_scheme: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Checkpoint:
    """Write any checkpoint that npgpt reads, by name or path, as model.safetensors, config.json and its vocabulary.

    The folder loads here and in transformers; it appears whole or not at all. generation_config.json is kept as it is.
    Tensors are streamed, so a model larger than memory can be converted. dtype: float32, float16 or bfloat16.
    overwrite: replace a folder that holds a converted model and nothing else; what of it cannot be deleted is named in
    a warning. progress(bytes written, bytes in all) is called after each block. Returns the checkpoint that was read.
    Raises NpgptError for whatever does not fit, OSError where it cannot be written.
    """
    location, folder = find(source), expanded(folder)
    replaceable = REPLACEABLE if overwrite else None
    check_destination(folder, location.weights, replaceable)
    checkpoint = open_checkpoint(location.weights, n_head=n_head, activation=activation, name_scheme=name_scheme)
    if checkpoint.no_logits:
        raise NpgptError(f"{checkpoint.base} is no language model to write: {checkpoint.no_logits}")
    if dtype not in DTYPES:
        raise NpgptError(f"written are {', '.join(DTYPES)}, not {dtype!r:.80}")
    layout = {name: (dtype, shape) for name, shape in checkpoint.shapes.items()}
    parts = _converted(checkpoint, dtype, progress)
    files = _vocabulary_files(checkpoint) | _generation_file(checkpoint.base)
    stated = {key: checkpoint.stated[key] for key in IDS if key in checkpoint.stated}
    ids = _ids(lambda: vocabularies.tokenizer_of(checkpoint)) | stated
    outside = files and checkpoint.contents.vocabulary is None  # config.json says nothing of one in GGUF
    if outside and (tokenizer_class := vocabularies.stated_class(checkpoint.path.parent)) is not None:
        ids["tokenizer_class"] = tokenizer_class
    write_folder(folder, checkpoint.config, ids, files, layout, parts, replaceable)
    return checkpoint


@checked
def save(model: LanguageModel, folder: str | os.PathLike[str]) -> None:
    """Write model.safetensors, config.json and a vocabulary of the model's own into a new or empty folder.

    The folder then loads here and in transformers alike, and appears whole or not at all. Raises NpgptError for a
    folder that holds anything, OSError where it cannot be written.
    """
    folder = expanded(folder)
    check_destination(folder, None)
    if model.no_logits:
        raise NpgptError(f"{model.name} is no language model to write: {model.no_logits}")
    used = () if model.why_no_text else (*model.tokenizer.files, *model.tokenizer.beside)
    own = [file for file in used if file != GPT2_RANKS]
    files = {file.name: contents(file) for file in own}
    if model.source is not None:
        weights = model.source.weights
        base = model.files[0] if weights.name in ADAPTERS else weights  # whose files come first
        files |= _generation_file(base, model)
    arrays = parameters.to_arrays(model.parameters)
    layout = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
    ids = _ids(model.open_tokenizer) | model.ends.stated()
    for place in {file.parent for file in own if isinstance(file, Path)}:  # how the vocabulary is to be read
        if (tokenizer_class := vocabularies.stated_class(place)) is not None:
            ids["tokenizer_class"] = tokenizer_class
    write_folder(folder, model.config, ids, files, layout, lambda name: [arrays[name]])


def _vocabulary_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the vocabulary's files as they are, readable or not, under the names that transformers knows."""
    if checkpoint.contents.vocabulary is not None:
        return checkpoint.contents.vocabulary()
    here = vocabularies.in_folder(checkpoint.path.parent)
    here = {name: file for name, file in here.items() if file not in checkpoint.contents.files}
    hugging_face, openai = vocabularies.PAIRS
    renamed = dict(zip(openai, hugging_face, strict=True)) if not here.keys() & set(hugging_face) else {}
    text = here or checkpoint.config.vocab_size in GPT2_VOCAB_SIZES
    beside = vocabularies.beside(checkpoint.path.parent) if text else {}
    # a file that cannot be copied is an error, not left out silently
    return {
        renamed.get(name, name): stand_ins.refuse(contents(file), str(file)) for name, file in (here | beside).items()
    }


def _generation_file(weights: Path, model: LanguageModel | None = None) -> dict[str, bytes]:
    """Return generation_config.json as it lies beside the weights, if it does; with a model's ids, where it has others.

    They may have been replaced in Python, and this file would take the place of config.json.
    """
    file = weights.with_name(GENERATION_FILE)
    if not file.is_file():
        return {}
    content = read_bytes(file, CONFIGURATION)
    if model is not None:
        fields = read_object(content, str(file))
        states = ends_of([], {}, Stated(str(file), fields), model.config.vocab_size)
        if states.eos != model.ends.eos or states.bos not in (None, model.ends.bos):
            fields = {key: value for key, value in fields.items() if key not in IDS} | model.ends.stated()
            content = json.dumps(fields, indent=2).encode() + b"\n"
    return {GENERATION_FILE: content}


def _ids(open_tokenizer: Callable[[], Tokenizer]) -> dict[str, Any]:
    """Return config.json's ids of the text's beginning and end: None where the model has no vocabulary."""
    try:
        end_of_text = open_tokenizer().end_of_text
    except NpgptError:
        end_of_text = None
    return {"bos_token_id": end_of_text, "eos_token_id": end_of_text}


def _converted(
    checkpoint: Checkpoint, dtype: str, progress: Callable[[int, int], None] | None
) -> Callable[[str], Iterator[NDArray[Any]]]:
    """Return a function that yields a tensor of the checkpoint in dtype, by blocks of rows, and calls progress.

    Raises NpgptError while streaming for a finite value that is too large for dtype.
    """
    done, total = 0, itemsize(dtype) * sum(map(prod, checkpoint.shapes.values()))

    def parts(name: str) -> Iterator[NDArray[Any]]:
        nonlocal done
        stored, stored_dtype = checkpoint.stored(name)
        for rows in row_blocks(stored):
            part = cast(rows, stored_dtype, dtype, f"{checkpoint.base}: {checkpoint.stored_name(name)}")
            yield part
            done += part.nbytes
            if progress is not None:
                progress(done, total)

    return parts


def check_destination(folder: Path, source: Path | None, replaceable: Set[str] | None = None) -> None:
    """Raise NpgptError where a folder cannot be written.

    It may not be a file, the source's own folder, the current one or a mount point, nor hold anything but files that
    may be replaced, none of which this run may read.
    """
    real = Path(os.path.realpath(folder))
    if Path.cwd().is_relative_to(real) or os.path.ismount(real):
        raise NpgptError(f"{folder} is the current folder, one above it, or a mount point: choose a new one in it")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        raise NpgptError(f"{folder} cannot be a folder: {above} is a file")
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise NpgptError(f"{folder} is there and not a folder: choose another name")
    if source is not None and real in (source.absolute().parent.resolve(), source.resolve().parent):
        raise NpgptError(f"{folder} holds the source, {source.name}: convert into another folder")
    _check_contents(folder, folder, replaceable)
    for path in folder.iterdir():  # a file of the source may be a link to one of these
        is_output(path, str(path))


def _check_contents(folder: Path, shown: Path, replaceable: Set[str] | None) -> None:
    """Raise NpgptError where the folder, which messages call `shown`, holds what must not be lost."""
    held = sorted(folder.iterdir())
    if not held:
        return
    if replaceable is None:
        raise NpgptError(f"{shown} is there and not an empty folder: choose a new one, or overwrite it (--overwrite)")
    others = [path.name for path in held if path.name not in replaceable or not path.is_file()]
    if others or not (folder / WEIGHTS_FILE).is_file():
        what = f"holds {others[0]}, which" if others else f"has no {WEIGHTS_FILE}, and so"
        raise NpgptError(f"{shown} {what} is no part of a converted model: it is not overwritten")


def write_folder(
    folder: Path,
    config: Config,
    ids: Mapping[str, Any],
    vocabulary: Mapping[str, bytes],
    layout: Mapping[str, tuple[str, Shape]],
    parts: safetensors.Parts,
    replaceable: Set[str] | None = None,
) -> None:
    """Write a folder that loads here and in transformers, in place of one that is empty or may be replaced.

    ids: of bos, eos and pad, and what else config.json gets; vocabulary: files by name; layout, parts: as
    safetensors.write_parts; replaceable: as check_destination. The folder is written beside its place and renamed;
    what was there is removed last. Raises NpgptError where something came into the folder meanwhile, OSError where it
    cannot be written.
    """
    shown, folder = folder, Path(os.path.realpath(folder))  # of a link, the folder that it leads to
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = os.urandom(4).hex()
    unfinished, old = (folder.with_name(f".{folder.name}.{mark}.{kind}") for kind in ("part", "old"))
    try:
        unfinished.mkdir()
        for name, content in vocabulary.items():
            with writing(unfinished / name) as copy:
                copy.write(content)
        with writing(unfinished / CONFIG_FILE) as stated:
            stated.write(json.dumps({**configs.to_dict(config), **ids}, indent=2).encode() + b"\n")
        safetensors.write_parts(unfinished / WEIGHTS_FILE, layout, parts)
        if folder.is_dir():
            folder.rename(old)  # and only then looked into: nothing can come into it any more by its name
            _check_contents(old, shown, replaceable)
        unfinished.rename(folder)
        sync_folder(folder.parent)
    except BaseException as error:
        if not unfinished.exists():  # it has been renamed already
            _remove(old)
        elif old.is_dir() and not folder.exists():
            old.rename(folder)  # and where something else took its place, it stays beside it
        shutil.rmtree(unfinished, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # of those that others use by now
                parent.rmdir()
        inside = isinstance(error, OSError) and (not error.filename or str(unfinished) in str(error.filename))
        if isinstance(error, OSError) and error.errno and inside:  # a name that nobody knows, or none
            raise OSError(error.errno, error.strerror, str(shown)) from None
        raise
    _remove(old)
    if old.exists():
        warnings.warn(f"{shown} is written, but what it replaced cannot be deleted: {old} is left", stacklevel=2)


def _remove(folder: Path) -> None:
    """Remove a folder as far as possible, even if interrupted."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
