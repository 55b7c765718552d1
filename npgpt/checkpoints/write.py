"""Write a model as model.safetensors, config.json and a vocabulary, in a folder that appears complete or not at all."""

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
# files that a folder may contain to be overwritten
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
    """Convert any checkpoint that npgpt reads to model.safetensors, config.json and its vocabulary.

    source is a name or a path; dtype is float32, float16 or bfloat16. The folder loads in npgpt and in transformers; it
    appears complete or not at all. Tensors are streamed, so the model may be larger than memory. generation_config.json
    is copied unchanged. overwrite replaces a folder that contains only a converted model, with a warning if it cannot
    be deleted. progress(bytes written, total bytes) is called after each block. Returns the checkpoint that was read.
    Raises NpgptError if it cannot be read or converted, OSError if the folder cannot be written.
    """
    location, folder = find(source), expanded(folder)
    replaceable = REPLACEABLE if overwrite else None
    check_destination(folder, location.weights, replaceable)
    checkpoint = open_checkpoint(location.weights, n_head=n_head, activation=activation, name_scheme=name_scheme)
    if checkpoint.no_logits:
        raise NpgptError(f"{checkpoint.base} cannot be converted: {checkpoint.no_logits}")
    if dtype not in DTYPES:
        raise NpgptError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r:.80}")
    layout = {name: (dtype, shape) for name, shape in checkpoint.shapes.items()}
    parts = _converted(checkpoint, dtype, progress)
    files = _vocabulary_files(checkpoint) | _generation_file(checkpoint.base)
    stated = {key: checkpoint.stated[key] for key in IDS if key in checkpoint.stated}
    ids = _ids(lambda: vocabularies.tokenizer_of(checkpoint)) | stated
    outside = files and checkpoint.contents.vocabulary is None  # not one embedded in GGUF
    if outside and (tokenizer_class := vocabularies.stated_class(checkpoint.path.parent)) is not None:
        ids["tokenizer_class"] = tokenizer_class
    write_folder(folder, checkpoint.config, ids, files, layout, parts, replaceable)
    return checkpoint


@checked
def save(model: LanguageModel, folder: str | os.PathLike[str]) -> None:
    """Write model.safetensors, config.json and the model's own vocabulary, if any, into a new or empty folder.

    The folder loads in npgpt and in transformers; it appears complete or not at all. Raises NpgptError if the folder is
    not empty, OSError if it cannot be written.
    """
    folder = expanded(folder)
    check_destination(folder, None)
    if model.no_logits:
        raise NpgptError(f"{model.name} cannot be saved: {model.no_logits}")
    used = () if model.why_no_text else (*model.tokenizer.files, *model.tokenizer.beside)
    own = [file for file in used if file != GPT2_RANKS]
    files = {file.name: contents(file) for file in own}
    if model.source is not None:
        weights = model.source.weights
        base = model.files[0] if weights.name in ADAPTERS else weights  # the base's files come first
        files |= _generation_file(base, model)
    arrays = parameters.to_arrays(model.parameters)
    layout = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
    ids = _ids(model.open_tokenizer) | model.ends.stated()
    for place in {
        file.parent for file in own if isinstance(file, Path)
    }:  # determines how transformers reads the vocabulary
        if (tokenizer_class := vocabularies.stated_class(place)) is not None:
            ids["tokenizer_class"] = tokenizer_class
    write_folder(folder, model.config, ids, files, layout, lambda name: [arrays[name]])


def _vocabulary_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the vocabulary's files unchanged, whether npgpt can read them or not, under transformers' names."""
    if checkpoint.contents.vocabulary is not None:
        return checkpoint.contents.vocabulary()
    here = vocabularies.in_folder(checkpoint.path.parent)
    here = {name: file for name, file in here.items() if file not in checkpoint.contents.files}
    hugging_face, openai = vocabularies.PAIRS
    renamed = dict(zip(openai, hugging_face, strict=True)) if not here.keys() & set(hugging_face) else {}
    text = here or checkpoint.config.vocab_size in GPT2_VOCAB_SIZES
    beside = vocabularies.beside(checkpoint.path.parent) if text else {}
    # a file that cannot be copied is an error, not omitted silently
    return {
        renamed.get(name, name): stand_ins.refuse(contents(file), str(file)) for name, file in (here | beside).items()
    }


def _generation_file(weights: Path, model: LanguageModel | None = None) -> dict[str, bytes]:
    """Return generation_config.json from beside the weights, if there is one, with the special ids of model, if given.

    The model's ids may have been changed in Python, and this file takes precedence over config.json.
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
    """Return config.json's bos and eos ids, both the vocabulary's <|endoftext|>, or None without a vocabulary."""
    try:
        end_of_text = open_tokenizer().end_of_text
    except NpgptError:
        end_of_text = None
    return {"bos_token_id": end_of_text, "eos_token_id": end_of_text}


def _converted(
    checkpoint: Checkpoint, dtype: str, progress: Callable[[int, int], None] | None
) -> Callable[[str], Iterator[NDArray[Any]]]:
    """Return a function that yields a tensor of the checkpoint in dtype, in blocks of rows, and calls progress.

    The function raises NpgptError for a finite value that is too large for dtype.
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
    """Raise NpgptError if a folder is not a valid destination.

    It must not be a file, the source's folder, the current folder or a mount point. It may contain only replaceable
    files, none of which this run may read.
    """
    real = Path(os.path.realpath(folder))
    if Path.cwd().is_relative_to(real) or os.path.ismount(real):
        raise NpgptError(f"{folder} is the current folder, its parent, or a mount point: choose a new folder inside it")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        raise NpgptError(f"{folder} cannot be a folder: {above} is a file")
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise NpgptError(f"{folder} exists and is not a folder: choose another name")
    if source is not None and real in (source.absolute().parent.resolve(), source.resolve().parent):
        raise NpgptError(f"{folder} contains the source, {source.name}: convert into another folder")
    _check_contents(folder, folder, replaceable)
    for path in folder.iterdir():  # a file of the source may be a link to one of these
        is_output(path, str(path))


def _check_contents(folder: Path, shown: Path, replaceable: Set[str] | None) -> None:
    """Raise NpgptError if the folder contains anything that must not be lost; messages call the folder `shown`."""
    held = sorted(folder.iterdir())
    if not held:
        return
    if replaceable is None:
        raise NpgptError(
            f"{shown} is not empty: choose a new folder; npgpt convert --overwrite replaces a converted one"
        )
    others = [path.name for path in held if path.name not in replaceable or not path.is_file()]
    if others or not (folder / WEIGHTS_FILE).is_file():
        what = f"contains {others[0]}" if others else f"has no {WEIGHTS_FILE}"
        raise NpgptError(f"{shown} {what}, so it is not just a converted model and will not be overwritten")


def write_folder(
    folder: Path,
    config: Config,
    ids: Mapping[str, Any],
    vocabulary: Mapping[str, bytes],
    layout: Mapping[str, tuple[str, Shape]],
    parts: safetensors.Parts,
    replaceable: Set[str] | None = None,
) -> None:
    """Write a folder that loads in npgpt and in transformers, replacing an empty or replaceable one.

    ids: the ids of bos, eos and pad, and other additions to config.json; vocabulary: files by name; layout, parts: see
    safetensors.write_parts; replaceable: see check_destination. A temporary folder is written and renamed; the replaced
    folder is removed last. Raises NpgptError if another program put files into the folder meanwhile, OSError if it
    cannot be written.
    """
    shown, folder = folder, Path(os.path.realpath(folder))  # follow links
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
            folder.rename(old)  # checked only after the rename, when nobody can add files under its name
            _check_contents(old, shown, replaceable)
        unfinished.rename(folder)
        sync_folder(folder.parent)
    except BaseException as error:
        if not unfinished.exists():  # already renamed
            _remove(old)
        elif old.is_dir() and not folder.exists():
            old.rename(folder)  # if something else has taken the name, the old folder stays beside it
        shutil.rmtree(unfinished, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # it may be in use by now
                parent.rmdir()
        inside = isinstance(error, OSError) and (not error.filename or str(unfinished) in str(error.filename))
        if isinstance(error, OSError) and error.errno and inside:  # replace a temporary name, or add a missing one
            raise OSError(error.errno, error.strerror, str(shown)) from None
        raise
    _remove(old)
    if old.exists():
        warnings.warn(f"{shown} is written, but the folder it replaced cannot be deleted: {old} remains", stacklevel=2)


def _remove(folder: Path) -> None:
    """Remove a folder as far as possible, even when interrupted."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
