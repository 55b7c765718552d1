"""What a container reader gives, and which reader a file is for: known by its content, never by its name alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .tensor import Stated, Tensor


@dataclass(frozen=True)
class Container:
    """A checkpoint's files, opened and checked; their arrays are mapped.

    stated is what the files themselves say of the configuration. vocabulary gives the vocabulary that lies in them, as
    the files in which Hugging Face keeps one; None where there is none. unchecked says which checksums are not looked
    at, and the way out; None where all are, or the format has none.
    """

    format: str
    files: tuple[Path, ...]
    tensors: Mapping[str, Tensor]
    stated: Stated | None = None
    vocabulary: Callable[[], dict[str, bytes]] | None = field(default=None, repr=False)
    unchecked: str | None = None
