"""Open a checkpoint: recognise its format and names, read its configuration, and check that they agree."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import parameters
from ..config import Config
from ..errors import NpgptError
from ..parameters import Array, Shape
from . import configs, formats, names, strict_json
from .ends import GENERATION_FILE, Ends, ends_of
from .names import HUGGING_FACE, Scheme
from .tensor import Contents, Source, Stated, Tensor, load, same_bits

CONFIG_FILES = ("config.json", "hparams.json")  # Hugging Face's and OpenAI's, beside the weights


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, opened and checked; almost no weights have been read yet.

    sources says how each canonical tensor is made of the stored ones in tensors.
    """

    path: Path
    contents: Contents
    scheme: Scheme
    config: Config
    unknown_keys: list[str]  # keys of the configuration that npgpt does not know
    stated: Mapping[str, Any]  # the configuration as the files state it
    ends: Ends
    shapes: dict[str, Shape]  # of the canonical tensors
    sources: dict[str, Source]
    tensors: dict[str, Tensor]

    @property
    def description(self) -> str:
        """Return the format and naming scheme as detected; CONVERTED for what npgpt writes."""
        return f"{self.contents.format}, {self.scheme.title}"

    def stored(self, name: str) -> tuple[NDArray[Any], str]:
        """Return a canonical tensor's array and dtype as stored, as a view into the mapped file if possible."""
        source = self.sources[name]
        if not source.parts:
            return np.zeros(self.shapes[name], np.float32), "float32"
        return source.stored(self.tensors)

    def load(self, name: str, dtype: str = "float32") -> Array:
        """Return a canonical tensor as float32 or float64, as a view into the mapped file if possible.

        Raises NpgptError for integers, a wrong checksum, and values too large for dtype.
        """
        return load(*self.stored(name), dtype, f"{self.path}: {self.stored_name(name)}")

    def stored_name(self, name: str) -> str:
        """Return the name in the file of the tensor, or of its first part."""
        parts = self.sources[name].parts
        return self.tensors[parts[0]].name if parts else name

    def dtypes(self) -> set[str]:
        """Return the stored dtypes of the tensors that are used."""
        return {self.tensors[part].dtype for source in self.sources.values() for part in source.parts}


def open_checkpoint(
    path: Path, *, n_head: int | None = None, config: Config | None = None, name_scheme: str | None = None
) -> Checkpoint:
    """Open a checkpoint's file and check that names, shapes, heads and a tied head agree with its configuration.

    n_head and config override what the files state. Raises NpgptError with all that is wrong.
    """
    if config is not None and n_head is not None:
        raise NpgptError("give n_head or a whole config, not both")
    if not isinstance(config, Config | None):
        raise NpgptError(f"config must be an npgpt.Config, not {type(config).__name__}")
    contents, scheme, tensors, sources = _named(path, name_scheme)
    shapes = {name: source.shape(tensors) for name, source in sources.items()}
    given = config is not None
    statements = [] if given else _statements(path, contents)
    source, stated, unknown = configs.agreed(statements, n_head, str(path))
    if config is None:
        config = configs.complete({**scheme.assumes, **stated}, shapes, n_head, source)
    if shapes.get("lm_head.weight") == shapes.get("wte.weight") == (config.vocab_size, config.n_embd):
        same = same_bits(*(tensors[sources[name].parts[0]] for name in ("lm_head.weight", "wte.weight")))
        ties = given or "tie_word_embeddings" in stated or (scheme.ties and bool(statements))
        if config.tie_word_embeddings and ties and not same:
            raise NpgptError(
                f"{path}: lm_head.weight differs from wte.weight, but {'the config given' if given else source} ties "
                "them (the default); set tie_word_embeddings to false there to use the head"
            )
        if not given:
            config = dataclasses.replace(config, tie_word_embeddings=same)
        if config.tie_word_embeddings:
            del sources["lm_head.weight"], shapes["lm_head.weight"]
    parameters.check_shapes(config, shapes, f"{path} ({scheme.title})", source if statements else "its own sizes")
    _check_size(path, contents, sources, tensors)
    ends = ends_of(statements, stated, _beside(path, GENERATION_FILE), config.vocab_size)
    schema = parameters.schema(config)
    return Checkpoint(path, contents, scheme, config, unknown, stated, ends, schema, sources, tensors)


def open_vocabulary(path: Path) -> tuple[Contents, int, Mapping[str, Any]]:
    """Return the contents, the number of ids and the stated configuration, without checking the rest.

    Raises NpgptError where there is no wte.weight.
    """
    contents, _, tensors, sources = _named(path, None)
    shape = sources["wte.weight"].shape(tensors) if "wte.weight" in sources else None
    if shape is None or len(shape) != 2:
        raise NpgptError(f"{path} holds no wte.weight [vocab_size, n_embd], and so no GPT-2")
    return contents, shape[0], configs.agreed(_statements(path, contents), None, str(path))[1]


def _named(path: Path, name_scheme: str | None) -> tuple[Contents, Scheme, dict[str, Tensor], dict[str, Source]]:
    """Return a file's contents, naming scheme, unwrapped tensors and how canonical ones are made of them."""
    contents = formats.read(path)
    tensors = names.unwrapped(contents.tensors)
    scheme = names.choose(name_scheme, tensors, str(path))
    return contents, scheme, tensors, scheme.translate(tensors)


CONVERTED = f"safetensors, {HUGGING_FACE.title}"


def _statements(path: Path, contents: Contents) -> list[Stated]:
    """Return what the files state of the configuration, in the checkpoint and beside it."""
    statements = [] if contents.stated is None else [contents.stated]
    return statements + [stated for name in CONFIG_FILES if (stated := _beside(path, name)) is not None]


def _beside(path: Path, name: str) -> Stated | None:
    """Return what a JSON file beside the weights states, or None where it is not there."""
    file = path.with_name(name)
    if file.exists() and not file.is_file():  # a pipe would hang
        raise NpgptError(f"{file} is there but is no regular file")
    if not os.path.lexists(file):  # a dangling link is an OSError
        return None
    return Stated(str(file), strict_json.read_object(file.read_bytes(), str(file)))


def _check_size(path: Path, contents: Contents, sources: Mapping[str, Source], tensors: Mapping[str, Tensor]) -> None:
    """Raise NpgptError where tensors share storage as no model does: they take more than twice their files."""
    parts = {(part, source.entry) for source in sources.values() for part in source.parts}
    claimed = sum(tensors[part].nbytes // (tensors[part].shape[0] if entry is not None else 1) for part, entry in parts)
    held = sum(file.stat().st_size for file in contents.files)
    if claimed > 2 * held:
        raise NpgptError(f"{path}: its tensors take {claimed} bytes, and its files hold {held}: they share storage")
