"""A checkpoint opened: container and names told from its content, its configuration gathered and cross-checked."""

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
from ..config import PUBLISHED, REQUIRED, Config
from ..errors import NpgptError
from ..parameters import Array, Shape
from . import configs, formats, strict_json
from . import names as naming
from .names import HUGGING_FACE, Scheme
from .tensor import Contents as Container
from .tensor import Source, Stated, Tensor, load, same_bits

CONFIG_FILES = ("config.json", "hparams.json")  # Hugging Face's and OpenAI's, beside the weights


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, opened and found consistent; hardly a weight has been read yet.

    sources tells how each canonical tensor is made of the stored ones, tensors.
    """

    path: Path
    container: Container
    scheme: Scheme
    config: Config
    unknown_keys: list[str]  # keys of the configuration that nobody knows
    stated: Mapping[str, Any]  # the configuration as the files state it
    shapes: dict[str, Shape]  # of the canonical tensors
    sources: dict[str, Source]
    tensors: dict[str, Tensor]

    @property
    def description(self) -> str:
        """What was detected: container and naming scheme; CONVERTED for the form that npgpt writes."""
        return f"{self.container.format}, {self.scheme.title}"

    def stored(self, name: str) -> tuple[NDArray[Any], str]:
        """A canonical tensor's array and dtype as stored, a view into the mapped file where that can be."""
        source = self.sources[name]
        if not source.parts:
            return np.zeros(self.shapes[name], np.float32), "float32"
        return source.stored(self.tensors)

    def load(self, name: str, dtype: str = "float32") -> Array:
        """A canonical tensor as float32 or float64, where it lies in the file if that can be.

        Raises NpgptError for what is no float, is damaged by its checksum, or has values too large for dtype.
        """
        return load(*self.stored(name), dtype, f"{self.path}: {self.stored_name(name)}")

    def stored_name(self, name: str) -> str:
        """The name in the file, of the first part."""
        parts = self.sources[name].parts
        return self.tensors[parts[0]].name if parts else name

    def dtypes(self) -> set[str]:
        """Of the tensors that are used."""
        return {self.tensors[part].dtype for source in self.sources.values() for part in source.parts}


def open_checkpoint(
    path: Path, *, n_head: int | None = None, config: Config | None = None, name_scheme: str | None = None
) -> Checkpoint:
    """Open a checkpoint's file, tell its names, gather its configuration and compare: names, shapes, heads, tied head.

    n_head and config take the place of what the files state. Raises NpgptError with all that is wrong.
    """
    if config is not None and n_head is not None:
        raise NpgptError("give n_head or a whole config, not both")
    if not isinstance(config, Config | None):
        raise NpgptError(f"config must be an npgpt.Config, not {type(config).__name__}")
    container, scheme, tensors, sources = _named(path, name_scheme)
    shapes = {name: source.shape(tensors) for name, source in sources.items()}
    given = config is not None
    statements = [] if given else _statements(path, container)
    source, stated, unknown = _agreed(statements, n_head, str(path))
    if config is None:
        fields = {key: value for key, value in stated.items() if key in _FIELDS}
        known = {name: shape for name, shape in shapes.items() if shape is not None}
        config = complete({**scheme.assumes, **fields}, known, n_head, source)
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
    _check_size(path, container, sources, tensors)
    return Checkpoint(path, container, scheme, config, unknown, stated, parameters.schema(config), sources, tensors)


def open_vocabulary(path: Path) -> tuple[Container, int, Mapping[str, Any]]:
    """The container, how many ids the model has, and what is stated, without asking whether the rest is in order.

    Raises NpgptError where there is no wte.weight.
    """
    container, _, tensors, sources = _named(path, None)
    shape = sources["wte.weight"].shape(tensors) if "wte.weight" in sources else None
    if shape is None or len(shape) != 2:
        raise NpgptError(f"{path} holds no wte.weight [vocab_size, n_embd], and so no GPT-2")
    return container, shape[0], _agreed(_statements(path, container), None, str(path))[1]


def _named(path: Path, name_scheme: str | None) -> tuple[Container, Scheme, dict[str, Tensor], dict[str, Source]]:
    """The container and the canonical names of what is in it."""
    container = formats.read(path)
    tensors = naming.unwrapped(container.tensors)
    scheme = naming.choose(name_scheme, tensors, str(path))
    return container, scheme, tensors, scheme.translate(tensors)


_FIELDS = {field.name for field in dataclasses.fields(Config)}
CONVERTED = f"safetensors, {HUGGING_FACE.title}"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _statements(path: Path, container: Container) -> list[Stated]:
    """What the files say of the configuration: within the checkpoint, and beside it."""
    statements = [] if container.stated is None else [container.stated]
    for name in CONFIG_FILES:
        beside = path.with_name(name)
        if os.path.lexists(beside):
            statements.append(Stated(str(beside), read_config(beside)))
    return statements


def read_config(path: Path) -> dict[str, Any]:
    """Raises OSError for a dangling link, NpgptError for what is no regular file or no JSON object."""
    if path.exists() and not path.is_file():
        raise NpgptError(f"{path} is there but is no regular file")
    return strict_json.read_object(path.read_bytes(), str(path))


def _agreed(statements: Sequence[Stated], n_head: int | None, path: str) -> tuple[str, dict[str, Any], list[str]]:
    """The statements' sources in words, their fields together, and the keys that nobody knows.

    What a statement only implies, as nanoGPT's keys imply its activation, gives way to what another one says. Raises
    NpgptError where two contradict each other, but for n_head where that is given.
    """
    agreed: dict[str, Any] = {}
    implied: dict[str, Any] = {}
    origin: dict[str, str] = {}
    unknown: list[str] = []
    for statement in statements:
        fields, strange = configs.read_fields(statement.fields, statement.source)
        unknown += strange
        if type(fields.get("n_embd")) is int and fields.get("n_inner") == 4 * fields["n_embd"]:
            fields["n_inner"] = None
        ids = {key: statement.fields[key] for key in IDS if type(statement.fields.get(key)) is int}
        said = {configs.SPELLINGS.get(key, key) for key in statement.fields}
        for key, value in (fields | ids).items():
            if key not in said:
                implied[key] = value
                continue
            if key == "n_head" and n_head is not None:
                continue
            if key in agreed and agreed[key] != value:
                raise NpgptError(
                    f"{origin[key]} says that {key} is {agreed[key]!r:.80}, and {statement.source} that it is "
                    f"{value!r:.80}: correct or remove the wrong one"
                )
            agreed[key], origin[key] = value, statement.source
    return " and ".join(statement.source for statement in statements) or path, implied | agreed, unknown


def complete(stated: Mapping[str, Any], shapes: Mapping[str, Shape], n_head: int | None, source: str) -> Config:
    """A Config from what is stated and what the shapes tell.

    No shape depends on n_head, so that is taken from the argument, else from what is stated, else from the published
    model of this shape. A stated n_head that contradicts a published shape is refused: it is the mistake that loads
    without complaint and writes nonsense. The argument may contradict, since somebody may have trained such a model.
    """
    fields = _sizes(shapes) | dict(stated)
    missing = [key for key in REQUIRED if key not in fields and key != "n_head"]
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


def _check_size(path: Path, container: Container, sources: Mapping[str, Source], tensors: Mapping[str, Tensor]) -> None:
    """Raises NpgptError where the tensors together are more than twice the files: so much shared is no model."""
    parts = {(part, source.entry) for source in sources.values() for part in source.parts}
    claimed = sum(tensors[part].nbytes // (tensors[part].shape[0] if entry is not None else 1) for part, entry in parts)
    held = sum(file.stat().st_size for file in container.files)
    if claimed > 2 * held:
        raise NpgptError(f"{path}: its tensors take {claimed} bytes, and its files hold {held}: they share storage")
