"""Find the weights and the configuration in the dictionary that a training script saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..config import REQUIRED
from ..errors import NpgptError
from .configs import SPELLINGS
from .pickles import PLAIN, Global, Record, refusal
from .tensor import Stated
from .torch_objects import Unread, View, is_unread

WEIGHTS_KEYS = ("model_state_dict", "model", "state_dict", "module", "weights", "net")
CONFIG_KEYS = ("model_args", "model_config", "config", "cfg", "hparams", "hyper_parameters", "gpt_config", "args")
SIZES = (*REQUIRED, *(theirs for theirs, ours in SPELLINGS.items() if ours in REQUIRED))
CONTAINERS = ("_content", "_fields")  # attributes that hold the items of omegaconf and ml_collections

MOST_PARTS = 100_000  # outputs in lists and tuples


class Chosen(NamedTuple):
    """The tensors of the weights, the statement of the configuration, and notes for the user on the rest."""

    views: dict[str, View | Unread]
    stated: Stated | None = None
    notes: tuple[str, ...] = ()


def weights_and_configuration(path: Path, value: object) -> Chosen:
    """Return the state dict in a pickle's value, which may be the value itself, and the configuration beside it.

    Raises NpgptError if there is no state dict, or if the choice is ambiguous.
    """
    if isinstance(value, Unread) or (isinstance(value, Record | Global) and _items(value) is None):
        raise refusal(f"{path}: its pickle", value.needs if isinstance(value, Unread) else value.name)
    held = _items(value)
    if held is None:
        kind = "tensor" if isinstance(value, View) else type(value).__name__
        raise NpgptError(f"{path} contains a {kind}, not a state dict or a dictionary with one")
    dictionaries = {key: items for key, item in held.items() if (items := _items(item)) is not None}
    distinct = {id(item): item for item in dictionaries.values()}  # one that has many keys is read once
    states_by_id = {key: found for key, item in distinct.items() if 2 * len(found := _views(item)) > len(item)}
    states = {key: states_by_id[id(item)] for key, item in dictionaries.items() if id(item) in states_by_id}
    views = _views(held)  # the weights themselves, or as little as a loss
    taken: object = None
    if known := [key for key in WEIGHTS_KEYS if key in states]:
        taken, views = known[0], states[known[0]]
    elif max(map(len, states.values()), default=0) > len(views):
        if len(states) > 1:
            raise NpgptError(
                f"{path} has several state dicts, {', '.join(map(repr, states)):.300}: save the one to use"
            )
        ((taken, views),) = states.items()
    if not views:
        weights = [held[key] for key in WEIGHTS_KEYS if key in held]
        values = [*weights, *(item for each in weights for item in (_items(each) or {}).values())]
        if inert := [value for value in values if isinstance(value, Record | Global)]:
            raise refusal(f"{path}: its pickle", inert[0].name)
        raise NpgptError(f"{path} has no state dict; its keys are {', '.join(map(repr, list(held)[:20])):.300}")
    others = [repr(key) for key, state in states.items() if key != taken and len(state) >= len(views)]
    is_bare = views is not states.get(taken)
    place = "the file itself" if is_bare else f"{taken!r:.80}"
    notes = [f"the weights are taken from {place}, not from {', '.join(others):.200}"] if others else []
    within = [key for key in held if "." in str(key)[:1000]] if is_bare else dictionaries[taken]
    if left := [f"{key!r:.80}" for key in within if key not in views]:
        notes.append(f"ignored, not a tensor: {', '.join(left):.200}")
    return Chosen(views, _statement(path, held), tuple(notes))


def outputs(path: Path, value: object) -> Chosen:
    """Return the tensors of a pickle's value: a single one, a tuple's, or a dict's with those in its tuples.

    Raises NpgptError for NumPy arrays, which npgpt does not read and which may be the intended outputs.
    """
    if isinstance(value, View):
        return Chosen({"": value})
    if isinstance(value, (tuple, list)):
        value = {f"arr_{place}": item for place, item in enumerate(value)}
    held = _items(value) or {}
    lists = {name: items for name, items in held.items() if isinstance(items, tuple | list)}
    if sum(map(len, lists.values())) > MOST_PARTS:  # one list may have many names
        raise NpgptError(f"{path} contains more than {MOST_PARTS} outputs in lists")
    parts = held | {f"{name}.{place}": item for name, items in lists.items() for place, item in enumerate(items)}
    inert = {str(name): item for name, item in parts.items() if isinstance(item, Record | Global)}
    has_state = any(_views(_items(item) or {}) for item in held.values())
    arrays = [name for name, item in inert.items() if item.name.endswith(".multiarray._reconstruct")]
    if arrays and not has_state:
        raise refusal(f"{path}: {arrays[0]:.200}", inert[arrays[0]].name)
    chosen = weights_and_configuration(path, value)
    if not chosen.views.items() <= _views(held).items():
        return chosen
    views = chosen.views | {name: item for name, item in parts.items() if isinstance(item, View)}
    notes = (f"Ignored, not a tensor: {', '.join(inert):.200}",) if inert else ()
    return chosen._replace(views=views, notes=notes)


def _items(value: object) -> dict[Any, Any] | None:
    """Return a dict, or the items of an instance of a dict subclass; None for anything else."""
    items = value.contents if isinstance(value, Record) else value
    return items if isinstance(items, dict) else None


def _views(mapping: Mapping[Any, Any]) -> dict[str, View | Unread]:
    """Return the tensors in a dictionary under keys that are strings."""
    texts = {key: item for key, item in mapping.items() if isinstance(key, str)}
    return {
        key: Unread(item.name) if isinstance(item, Record) else item
        for key, item in texts.items()
        if isinstance(item, View | Unread) or is_unread(item)
    }


def _statement(path: Path, held: Mapping[Any, Any]) -> Stated | None:
    """Return the statement of the model's sizes: under a usual key or inside its value, else under any other key.

    A value with three sizes counts under any key; under a usual key, one size is enough if no value has three.
    """
    usual = {key: _attributes(held[key]) for key in CONFIG_KEYS if key in held}
    within = {
        f"{key}.{inner}": _attributes(item)
        for key, place in usual.items()
        for inner, item in place.items()
        if isinstance(inner, str)
    }
    others = {key: _attributes(item) for key, item in held.items() if isinstance(key, str) and key not in usual}
    for places, enough in ((usual | within, 3), (usual | within, 1), (others, 3)):
        for name, place in places.items():
            known = enough > 1 or name.rpartition(".")[-1] in CONFIG_KEYS
            sizes = {SPELLINGS.get(key, key) for key in SIZES if _plain(place.get(key)) is not None}
            if known and len(sizes) >= enough:
                texts = {key: _plain(item) for key, item in place.items() if type(key) is str}
                several = {  # the only key in use whose value may be a list
                    key: [_plain(token_id) for token_id in item]
                    for key, item in texts.items()
                    if key == "eos_token_id" and isinstance(item, list | tuple)
                }
                plain = {key: item for key, item in texts.items() if type(item) in PLAIN}
                return Stated(f"{name} in {path}", plain | several)
    return None


def _attributes(value: object) -> Mapping[Any, Any]:
    """Return the items of a dictionary or the attributes of an object; empty for anything else."""
    if isinstance(value, Record):
        has_slots = isinstance(value.state, tuple) and len(value.state) == 2
        state = value.state[1] if has_slots else value.state  # type: ignore[index]
        value = state if isinstance(state, dict) and state else value.contents
        if isinstance(value, dict):
            value = next((value[key] for key in CONTAINERS if isinstance(value.get(key), dict)), value)
    return value if isinstance(value, dict) else {}


def _plain(value: object) -> object:
    """Return the value of an enum member or an omegaconf node; return anything else unchanged."""
    if isinstance(value, Record) and isinstance(value.state, dict):
        return value.state.get("_val", value)
    return value.arguments[0] if isinstance(value, Record) and len(value.arguments) == 1 else value
