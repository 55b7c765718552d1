"""What a naming scheme is: how the names of one program become the canonical ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...errors import NpgptError
from ...parameters import Shape
from ..tensor import Tensor


class Source(NamedTuple):
    """How a canonical tensor is made of stored ones.

    parts stand side by side in the last axis, as queries, keys and values do; no parts are zeros, for a bias that the
    program leaves out. entry takes one of a stack; transposed is for matrices that are stored [out, in].
    """

    parts: tuple[str, ...]
    transposed: bool = False
    entry: int | None = None

    def shape(self, tensors: Mapping[str, Tensor]) -> Shape | None:
        """The shape that it has, None for zeros (any). Raises NpgptError for parts of different shapes."""
        if not self.parts:
            return None
        first, *others = (tensors[name] for name in self.parts)
        if unlike := [tensor for tensor in others if tensor.shape != first.shape]:
            raise NpgptError(
                f"{first.path}: {first.name} is {list(first.shape)} and {unlike[0].name} {list(unlike[0].shape)}: "
                "queries, keys and values have the same shape"
            )
        shape = first.shape if self.entry is None else first.shape[1:]
        shape = shape[::-1] if self.transposed else shape
        return (*shape[:-1], shape[-1] * len(self.parts)) if others and shape else shape

    def stored(self, tensors: Mapping[str, Tensor]) -> tuple[NDArray[Any], str]:
        """The array as it is stored, a view into the file where it is one part, and its dtype; not for zeros.

        Raises NpgptError as Tensor.stored does, and for parts of different dtypes.
        """
        first, *others = (tensors[name] for name in self.parts)
        if unlike := [tensor for tensor in others if tensor.dtype != first.dtype]:
            raise NpgptError(f"{first.path}: {first.name} is {first.dtype} and {unlike[0].name} {unlike[0].dtype}")
        arrays = [tensor.stored() for tensor in (first, *others)]
        arrays = [array if self.entry is None else array[self.entry] for array in arrays]
        arrays = [array.T if self.transposed else array for array in arrays]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1), first.dtype


@dataclass(frozen=True)
class Scheme:
    """One program's names.

    recognises tells from a checkpoint's tensors whether they are named so, translate gives {canonical name: Source},
    less buffers and optimizer state; a name that the scheme does not know stays itself, so that loading reports it.
    assumes holds what is true of the program's models where no configuration says otherwise. ties: a configuration that
    says nothing of the output head means that it is wte.
    """

    name: str
    title: str
    recognises: Callable[[Mapping[str, Tensor]], bool]
    translate: Callable[[Mapping[str, Tensor]], dict[str, Source]]
    assumes: Mapping[str, Any] = field(default_factory=dict)
    ties: bool = False


class Rule(NamedTuple):
    """Names of a pattern become a canonical name, which may repeat the pattern's groups (\\1); None drops them.

    Several rules that lead to one canonical name give its parts, in the rules' order.
    """

    pattern: str
    canonical: str | None
    transposed: bool = False
    entry: int | None = None


def translated(names: Iterable[str], rules: Sequence[Rule]) -> dict[str, Source]:
    """Sources by rules; the first that matches a whole name counts."""
    found: dict[str, dict[int, tuple[str, Rule]]] = {}
    compiled = [re.compile(rule.pattern) for rule in rules]
    for name in names:
        place, match = next(
            ((i, m) for i, pattern in enumerate(compiled) if (m := pattern.fullmatch(name))), (-1, None)
        )
        canonical = match.expand(rules[place].canonical or "") if match else name
        if not canonical:
            continue
        if place in found.get(canonical, {}):  # with a prefix and without: strict loading reports the second
            canonical, place = name, -1
        found.setdefault(canonical, {})[place] = (name, rules[place] if place >= 0 else Rule("", None))
    return {
        canonical: Source(
            tuple(name for _, (name, _) in sorted(parts.items())),
            next(iter(parts.values()))[1].transposed,
            next(iter(parts.values()))[1].entry,
        )
        for canonical, parts in found.items()
    }


def with_absent_biases(sources: dict[str, Source], pattern: str) -> dict[str, Source]:
    """The same with zeros for the biases whose canonical names match, where the checkpoint has none of them at all."""
    if any(re.fullmatch(pattern, name) for name in sources):
        return sources
    weights = (name.removesuffix("weight") + "bias" for name in sources if name.endswith(".weight"))
    return sources | {name: Source(()) for name in weights if re.fullmatch(pattern, name)}
