"""Open a checkpoint: recognise its format and naming scheme, read its configuration, and check that they agree."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import parameters
from ..config import Config
from ..errors import NpgptError
from ..parameters import Array, Shape
from . import configs, formats, lora, names, strict_json
from .ends import GENERATION_FILE, Ends, ends_of
from .names import HUGGING_FACE, Scheme
from .tensor import Contents, Source, Stated, Tensor, load, same_bits
from .wrappers import located

CONFIG_FILES = ("config.json", "hparams.json")  # Hugging Face's and OpenAI's, beside the weights


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, opened and checked; almost no weights have been read yet.

    sources describes how to assemble each canonical tensor from the stored tensors; updates are an adapter's low-rank
    updates.
    """

    path: Path  # the file beside the vocabulary
    base: Path  # the file beside the configuration; for an adapter, its base model's
    contents: Contents
    scheme: Scheme
    config: Config
    unknown_keys: list[str]  # keys of the configuration that npgpt does not know
    stated: Mapping[str, Any]  # the merged configuration of the files
    ends: Ends
    shapes: dict[str, Shape]  # of the canonical tensors
    sources: dict[str, Source]
    tensors: Mapping[str, Tensor]
    updates: lora.Updates
    notes: tuple[str, ...] = ()  # shown to the user in every run
    no_logits: str = ""  # why the model cannot compute logits over ids; empty if it can
    guesses_gelu: bool = False  # the activation is a guess

    @property
    def description(self) -> str:
        """Return the format and naming scheme in words; equal to CONVERTED for files that npgpt writes."""
        return f"{self.contents.format}, {self.scheme.title}"

    def stored(self, name: str) -> tuple[NDArray[Any], str]:
        """Return a canonical tensor's array and dtype as stored, as a view of the mapped file if possible."""
        source = self.sources[name]
        if not source.parts:
            return np.zeros(self.shapes[name], np.float32), "float32"
        stored, dtype = source.stored(self.tensors)
        updates = self.updates.get(name)
        return (stored, dtype) if updates is None else lora.updated(stored, dtype, name, updates)

    def load(self, name: str, dtype: str = "float32") -> Array:
        """Return a canonical tensor as float32 or float64, as a view of the mapped file if possible.

        Raises NpgptError for integers, a wrong checksum, and values too large for dtype.
        """
        return load(*self.stored(name), dtype, f"{self.base}: {self.stored_name(name)}")

    def stored_name(self, name: str) -> str:
        """Return the file's name for a canonical tensor, or for its first part."""
        parts = self.sources[name].parts
        return self.tensors[parts[0]].name if parts else name

    def dtypes(self) -> set[str]:
        """Return the stored dtypes of all tensors in use."""
        return {self.tensors[part].dtype for source in self.sources.values() for part in source.parts}


def open_checkpoint(
    path: Path,
    *,
    n_head: int | None = None,
    activation: str | None = None,
    config: Config | None = None,
    name_scheme: str | None = None,
) -> Checkpoint:
    """Open a checkpoint's file and check that names, shapes, n_head and a tied head agree with its configuration.

    n_head, activation and config override the files' statements. Raises NpgptError, which lists all faults of names and
    shapes.
    """
    if config is not None and (n_head is not None or activation is not None):
        raise NpgptError(f"give {'activation' if n_head is None else 'n_head'} or config, not both")
    if not isinstance(config, Config | None):
        raise NpgptError(f"config must be an npgpt.Config, not {type(config).__name__}")
    named = _named(path, name_scheme)
    path, contents, scheme, tensors, sources = named.path, named.contents, named.scheme, named.tensors, named.sources
    notes = [*contents.notes, *named.notes]
    shapes = {name: source.shape(tensors) for name, source in sources.items()}
    if no_logits := _of_classes(shapes):
        notes.append(no_logits)
        for name in {"lm_head.weight", "lm_head.bias"} & sources.keys():
            del sources[name], shapes[name]
    given = config is not None
    statements = [] if given else _statements(path, contents)
    source, stated, unknown = configs.agreed(statements, n_head, str(path), activation)
    told = given or activation is not None or any(configs.tells_gelu(fields) for _, fields in statements)
    if config is None:
        config = configs.complete({**scheme.assumes, **stated}, shapes, n_head, source, activation)
    if "n_ctx" in stated:
        both = f"n_ctx {stated['n_ctx']!r:.80} and n_positions {stated['n_positions']!r:.80}"
        notes.append(f"{source} states {both}: wpe has {config.n_positions} rows")
    if guesses := scheme.guesses_gelu and not told:
        notes.append(configs.guess(config.activation_function))
    if no_logits:
        config = dataclasses.replace(config, tie_word_embeddings=True)
    if shapes.get("lm_head.weight") == shapes.get("wte.weight") == (config.vocab_size, config.n_embd):
        same = same_bits(*(tensors[sources[name].parts[0]] for name in ("lm_head.weight", "wte.weight")))
        ties = given or "tie_word_embeddings" in stated or (scheme.ties and bool(statements))
        if config.tie_word_embeddings and ties and not same:
            raise NpgptError(
                f"{path}: lm_head.weight differs from wte.weight, but {'the given config' if given else source} ties "
                "them (the default): set tie_word_embeddings to false there to use lm_head"
            )
        if not given:
            config = dataclasses.replace(config, tie_word_embeddings=same)
        if config.tie_word_embeddings:
            del sources["lm_head.weight"], shapes["lm_head.weight"]
    parameters.check_shapes(config, shapes, f"{path} ({scheme.title})", source if statements else "its own sizes")
    _check_size(path, contents, sources, tensors)
    return Checkpoint(
        path=contents.home or path,
        base=path,
        contents=contents,
        scheme=scheme,
        config=config,
        unknown_keys=unknown,
        stated=stated,
        ends=ends_of(statements, stated, _beside(path, GENERATION_FILE), config.vocab_size),
        shapes=parameters.schema(config),
        sources=sources,
        tensors=tensors,
        updates=named.updates,
        notes=tuple(notes),
        no_logits=no_logits,
        guesses_gelu=guesses,
    )


def _of_classes(shapes: Mapping[str, Shape | None]) -> str:
    """Return why a classifier cannot compute logits over ids; empty for a language model.

    The head of a classifier, such as LLMs-from-scratch's, has one row per class.
    """
    (rows, *_), (vocab_size, *_) = (shapes.get(name) or (0,) for name in ("lm_head.weight", "wte.weight"))
    if not 0 < 2 * rows <= vocab_size:
        return ""
    return f"its head has {rows} classes, not {vocab_size} ids: npgpt reads the body but cannot generate text"


def open_vocabulary(path: Path) -> tuple[Contents, int, Mapping[str, Any]]:
    """Return a checkpoint's contents, vocabulary size and stated configuration, without checking the rest.

    Raises NpgptError if there is no wte.weight.
    """
    named = _named(path, None)
    shape = named.sources["wte.weight"].shape(named.tensors) if "wte.weight" in named.sources else None
    if shape is None or len(shape) != 2:
        raise NpgptError(f"{path} contains no GPT-2: it has no wte.weight [vocab_size, n_embd]")
    statements = _statements(named.path, named.contents)
    return named.contents, shape[0], configs.agreed(statements, None, str(named.path))[1]


@dataclass(frozen=True)
class Named:
    """The GPT-2 in a file: its tensors, and how to assemble the canonical tensors from them.

    For an adapter, they are its base model's, with the adapter's updates. path is the file beside the configuration.
    """

    path: Path
    contents: Contents
    scheme: Scheme
    tensors: Mapping[str, Tensor]
    sources: dict[str, Source]
    updates: lora.Updates
    notes: Sequence[str]


def _named(path: Path, name_scheme: str | None) -> Named:
    path, contents, adapter = lora.opened(path, formats.read(path))
    found = located(contents.tensors, str(path))
    scheme = names.choose(name_scheme, found.tensors, str(path))
    sources = scheme.translate(found.tensors)
    if adapter is None:
        return Named(path, contents, scheme, found.tensors, sources, {}, found.notes)
    return Named(path, contents, scheme, *adapter.merged(found.tensors, sources), found.notes)


CONVERTED = f"safetensors, {HUGGING_FACE.title}"


def _statements(path: Path, contents: Contents) -> list[Stated]:
    """Return the statements of the configuration in the checkpoint and in the files beside it."""
    statements = [] if contents.stated is None else [contents.stated]
    statements += [stated for name in CONFIG_FILES if (stated := _beside(path, name)) is not None]
    return [
        Stated(source, {key: fields[key] for key in fields if configs.SPELLINGS.get(key, key) not in contents.outdated})
        for source, fields in statements
    ]


def _beside(path: Path, name: str) -> Stated | None:
    """Return the statement of a JSON file beside the weights, or None if it does not exist.

    Raises NpgptError for a dangling link and for invalid JSON.
    """
    file = path.with_name(name)
    return Stated(str(file), strict_json.read_file(file)) if os.path.lexists(file) else None


def _check_size(path: Path, contents: Contents, sources: Mapping[str, Source], tensors: Mapping[str, Tensor]) -> None:
    """Raise NpgptError if the tensors are more than twice as large as their files, because they share storage."""
    parts = {(part, source.entry) for source in sources.values() for part in source.parts}
    claimed = sum(tensors[part].nbytes // (tensors[part].shape[0] if entry is not None else 1) for part, entry in parts)
    held = sum(file.stat().st_size for file in contents.files)
    if claimed > 2 * held:
        raise NpgptError(f"{path}: its tensors take {claimed} bytes, but its files only {held}: they share storage")
