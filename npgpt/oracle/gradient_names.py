"""Gradients among the arrays of another implementation: told from stages by their names, and brought to npgpt's.

A gradient is called d.NAME or NAME.grad, stands in a mapping "gradients", or has the name of a parameter, since a check
has no other use for one. Parameters have any scheme's names (checkpoints/names.py), with that program's shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.names import BLOCK, SCHEMES, Scheme
from ..checkpoints.tensor import Source, Tensor
from ..checkpoints.wrappers import located
from ..config import Config
from ..errors import NpgptError
from ..parameters import Array, schema
from .modules import array_tensor
from .naming import is_known
from .outputs import as_array
from .weights import HEAD, WTE, listed

NESTED = ("gradients.", "grads.")
PARAMETERS = {name for scheme in SCHEMES for name in scheme.tensors}  # of every program, with * for the block
TABLES = (WTE, "wpe.weight", HEAD)  # one row per id or position


@dataclass
class Gradients:
    """Parameters' gradients "d.NAME" by canonical name, notes and problems. frozen: canonical names without one."""

    arrays: dict[str, Array] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    frozen: set[str] = field(default_factory=set)


def told_apart(theirs: Mapping[str, Any], config: Config, backward: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what has npgpt's names already (stages, "d." gradients, the loss), and gradients by a parameter's name.

    backward: whether a parameter's name alone means its gradient. Raises NpgptError if two names mean the same one.
    """
    known, own = schema(config), dict[str, Any]()
    parameters: dict[str, Any] = {}
    for name, value in theirs.items():
        bare, nested = name.removesuffix(".grad"), name.startswith(NESTED)
        bare = bare.split(".", 1)[1] if nested else bare
        marked = nested or bare != name
        bare, marked = (bare[2:], True) if bare.startswith("d.") else (bare, marked)
        is_stage = is_known(bare, config) and not (nested and is_parameter(bare))
        if marked and value is not None and (is_stage or (bare in known and name.startswith("d."))):
            meant, into = f"d.{bare}", own
        elif marked or (backward and is_parameter(name) and not is_stage):
            meant, into = bare, parameters
        else:
            meant, into = name, own
        if meant in into:
            raise NpgptError(f"{name} is the gradient of {bare}, which was given before under another name")
        into[meant] = value
    return own, parameters


def is_parameter(name: str) -> bool:
    """Return whether the end of a name is a parameter's in some program."""
    parts = name.split(".")
    return any(BLOCK.sub("*", ".".join(parts[place:]), count=1) in PARAMETERS for place in range(len(parts)))


def translated(gradients: Mapping[str, Any], config: Config) -> Gradients:
    """Bring gradients by any program's names to npgpt's names and shapes.

    None, as of a frozen parameter, is a problem. Raises NpgptError for what is no gradient of floats, for names that
    are no parameter's, for a wrong shape, and where neither names nor shapes tell [in, out] from [out, in].
    """
    found = Gradients()
    frozen = [name for name, value in gradients.items() if value is None]
    if frozen:
        found.problems.append(f"no gradient (None) for {listed(frozen, 0)}: frozen, or detached from the loss")
    held: dict[str, Tensor] = {}
    for name, value in gradients.items():
        array = as_array(value) if value is not None else None
        if array is not None and array.dtype.kind != "f":
            raise NpgptError(f"the gradient of {name} must be floats, not {array.dtype}")
        if array is not None:
            held[name] = array_tensor(Path("theirs"), name, array)
    if not held:
        return found
    place = located(held, "theirs")
    if beside := [tensor.name for tensor in (*place.heads, *place.beside)]:
        found.notes.append(f"Gradients ignored, since GPT-2 has no such parameters: {listed(beside, 0)}.")
    sources, found.frozen = in_scheme(place.tensors, config, {part for name in frozen for part in _ends(name)})
    wanted = dict(schema(config))
    for name, source in sources.items():
        array = source.stored(place.tensors)[0]
        shape = wanted.get(name, wanted[WTE])
        found.arrays[f"d.{name}"] = fitted(name, array, shape, found)
    head, wte = (found.arrays.get(f"d.{name}") for name in (HEAD, WTE))
    if (
        head is not None
        and wte is not None
        and config.tie_word_embeddings
        and np.array_equal(head, wte, equal_nan=True)
    ):
        del found.arrays[f"d.{HEAD}"]  # one tensor under two names
    missing = [name for name in wanted if f"d.{name}" not in found.arrays and name not in found.frozen]
    if missing:
        found.notes.append(f"No gradient was given for {listed(missing, config.n_layer)}.")
    return found


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[place:]) for place in range(len(parts))]


def in_scheme(tensors: Mapping[str, Tensor], config: Config, frozen: set[str]) -> tuple[dict[str, Source], set[str]]:
    """Return the sources of gradients by canonical name, under the scheme whose names and shapes they have.

    frozen: names that are left out; the canonical tensors of which they are a part are left out, too, and returned.
    """
    tried = [(scheme, *fits(scheme, tensors, config, frozen)) for scheme in SCHEMES]
    fewest = min(len(wrong) for *_, wrong in tried)
    best = [found for found in tried if len(found[-1]) == fewest]
    scheme, sources, cut, wrong = best[0]
    if wrong:
        raise NpgptError(f"gradients ({scheme.title}): {'; '.join(wrong[:3])}{' …' if len(wrong) > 3 else ''}")
    others = [other for other, found, *_ in best if found != sources]
    if others:
        raise NpgptError(
            f"gradients: {listed(sources, config.n_layer)} may have {scheme.title} or {others[0].title}, one of them "
            "[out, in], and square shapes do not tell: give all of them, or npgpt's own, d.NAME [in, out]"
        )
    return sources, cut


def fits(
    scheme: Scheme, tensors: Mapping[str, Tensor], config: Config, frozen: set[str]
) -> tuple[dict[str, Source], set[str], list[str]]:
    """Return the sources of gradients under a scheme, what is frozen, and what is wrong with names and shapes."""
    wanted = schema(config)
    wanted = wanted | {HEAD: wanted[WTE]}
    sources: dict[str, Source] = {}
    wrong = []
    parts = {theirs: ours for theirs, (ours, _) in scheme.tensors.items()}
    cut = {_numbered(parts[star], name) for name in frozen if (star := BLOCK.sub("*", name, count=1)) in parts}
    made = scheme.translate(tensors)
    dropped = tensors.keys() - {part for source in made.values() for part in source.parts}
    wrong += [f"{tensors[name].name} is not the name of a parameter" for name in sorted(dropped)]
    for name, source in made.items():
        if name in cut or not source.parts:
            continue
        shape, own = source.shape(tensors), tensors[source.parts[0]].name
        if name not in wanted:
            wrong.append(f"{own} is not the name of a parameter")
        elif shape != wanted[name] and not (name in TABLES and shape is not None and shape[1:] == wanted[name][1:]):
            turned = wanted[name][::-1] if source.transposed else wanted[name]
            wrong.append(f"{own} is {list(tensors[source.parts[0]].shape)} and must be {list(turned)}")
        else:
            sources[name] = source
    return sources, cut, wrong


def _numbered(canonical: str, name: str) -> str:
    block = BLOCK.search(name)
    return canonical.replace("*", block[0]) if block else canonical


def fitted(name: str, array: Array, shape: Sequence[int], found: Gradients) -> Array:
    """Return a table's gradient with as many rows as the reference has; others, of a padded vocabulary, should be 0."""
    rows = shape[0]
    if name not in TABLES or len(array) == rows:
        return array
    if np.any(array[rows:] != 0):
        what = "a softmax over all columns" if name != "wpe.weight" else "positions that no token has"
        found.problems.append(f"the rows of the gradient of {name} beyond the {rows} of the model are not 0: {what}")
    elif len(array) > rows:
        found.notes.append(f"The {len(array) - rows} rows of the gradient of {name} beyond the model's {rows} are 0.")
    return np.concatenate([array[:rows], np.zeros((max(0, rows - len(array)), *array.shape[1:]), array.dtype)])
