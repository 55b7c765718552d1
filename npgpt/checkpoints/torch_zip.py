"""torch.save's container (PyTorch ≥ 1.6): a ZIP that holds a pickle and, stored and aligned, each storage's bytes.

    <stem>/data.pkl  <stem>/byteorder  <stem>/data/0 …  <stem>/version

pytorch/pytorch, docs/source/notes/serialization.rst and torch/_weights_only_unpickler.py. The pickle is read by
pickles.py, which runs nothing; storages are mapped, so that what is not used, an optimizer's state, costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from ..config import REQUIRED
from ..errors import NpgptError
from ..parameters import Shape
from . import pickles, stored_zip
from .configs import SPELLINGS
from .tensor import LONGEST_SHAPE, Contents, Stated, Tensor, check_shape, itemsize

LARGEST_PICKLE = 2**24  # bytes; GPT-2's is 60 KB, with an optimizer's state 200 KB
STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
# where a training checkpoint keeps the weights, and where the configuration
WEIGHTS_KEYS = ("model_state_dict", "model", "state_dict", "module", "weights", "net")
CONFIG_KEYS = ("model_args", "model_config", "config", "cfg", "hparams", "hyper_parameters", "gpt_config")


class Storage(NamedTuple):
    """A run of elements of one type, which tensors are views of."""

    key: str
    dtype: str
    numel: int


class View(NamedTuple):
    """A tensor as the pickle describes it; offset and strides count elements of its storage."""

    storage: Storage
    offset: int
    shape: Shape
    strides: tuple[int, ...]


def recognises(head: bytes, tail: bytes) -> bool:
    """Whether a file begins as a ZIP does."""
    return head.startswith(b"PK\x03\x04")


def read(path: Path) -> Contents:
    """Read the pickle and map the storages that its tensors lie in.

    Raises NpgptError, naming the file and the tensor, for whatever is malformed or not plainly stored, and for a pickle
    that asks for more than tensors and plain values.
    """
    return _mapped(path, _weights_and_configuration)


def read_outputs(path: Path) -> Contents:
    """Read tensors that are no model: one alone, which has no name; those of a tuple, arr_0 and so on; or a
    dictionary's, in which those of a tuple are numbered. Raises NpgptError as read does.
    """
    return _mapped(path, _outputs)


def _mapped(path: Path, chosen: Callable[[Path, object], tuple[dict[str, View], Stated | None]]) -> Contents:
    """What is chosen of a file's tensors, where they lie."""
    entries = stored_zip.directory(path)
    stem = _stem(path, [entry.filename for entry in entries])
    archive = stored_zip.read(path, entries)
    if (size := archive.members[f"{stem}/data.pkl"].size) > LARGEST_PICKLE:
        raise NpgptError(f"{path}: its data.pkl takes {size} bytes, above {LARGEST_PICKLE}")
    order = f"{stem}/byteorder"
    byteorder = archive.contents(order) if order in archive.members else b"little"  # older ones do not say
    if byteorder not in (b"little", b"big"):
        raise NpgptError(f"{path}: its byteorder is {byteorder!r:.40}, neither little nor big")
    value = pickles.read(archive.contents(f"{stem}/data.pkl"), f"{path}: its pickle", CALLS, NAMES, _storage)
    views, stated = chosen(path, value)
    tensors = {name: _in_place(archive, stem, name, view, byteorder == b"big") for name, view in views.items()}
    return Contents("torch zip", (path,), tensors, stated)


def _in_place(archive: stored_zip.Archive, stem: str, name: str, view: View, big_endian: bool) -> Tensor:
    """The view with its place in the file, checked against the member that is its storage."""
    path, (key, dtype, numel) = archive.path, view.storage
    storage = f"{stem}/data/{key}"
    if storage not in archive.members:
        raise NpgptError(f"{path}: {name} lies in {storage:.200}, which is not there")
    member, size = archive.members[storage], itemsize(dtype)
    if member.size != numel * size:
        raise NpgptError(
            f"{path}: {name} lies in {storage}, which has {member.size} bytes and must have {numel * size}: "
            f"{numel} × {dtype}"
        )
    check_shape(path, name, view.shape)
    last = view.offset + sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))
    if prod(view.shape) and max(last + 1, prod(view.shape)) > numel:
        raise NpgptError(
            f"{path}: {name}, {list(view.shape)} with strides {list(view.strides)} from {view.offset}, does not fit "
            f"into its storage of {numel} elements"
        )
    begin, verify = member.begin + size * view.offset, functools.partial(archive.verify, storage)
    return Tensor(path, name, archive.data, dtype, view.shape, begin, view.strides, big_endian, verify)


def _whole(*numbers: object) -> bool:
    return all(type(number) is int and 0 <= number < 2**59 for number in numbers)  # in bytes, still a C long


def _storage(persistent_id: object) -> Storage:
    """("storage", type, key, location, number of elements)."""
    match persistent_id:
        case ("storage", str(dtype), str(key), str(), int(numel)) if dtype in STORAGES.values() and _whole(numel):
            return Storage(key, dtype, numel)
    raise ValueError("a persistent id is no storage")


def _tensor(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    requires_grad: object = False,
    hooks: object = None,
    metadata: object = None,
) -> View:
    """torch._utils._rebuild_tensor_v2; metadata says that the values are to be negated or conjugated when read."""
    if metadata:
        raise ValueError("a tensor is kept negated or conjugated: save tensor.resolve_neg()")
    match storage, offset, shape, strides:
        case Storage(), int(), tuple(), tuple() if len(shape) == len(strides) <= LONGEST_SHAPE:
            if _whole(offset, *shape, *strides):
                return View(storage, offset, shape, strides)
    raise ValueError("a tensor's storage, offset, size or stride is malformed")


def _parameter(view: object, *_: object) -> View:
    """torch._utils._rebuild_parameter(data, requires_grad, hooks): the data."""
    if not isinstance(view, View):
        raise ValueError("a parameter without a tensor")
    return view


def _ordered_dict() -> dict[Any, Any]:
    """Without arguments, as pickle makes one; dict itself could be made to copy a large one over and over."""
    return {}


# what a training loop keeps beside the weights, a loss of NumPy's for one
SCALARS = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar")
READ_OVER = (*SCALARS, "numpy.dtype", "_codecs.encode", "__builtin__.bytes")
CALLS: Mapping[str, Callable[..., object]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": lambda sizes: sizes,
    "torch.device": lambda *names: names,
    **dict.fromkeys(READ_OVER, lambda *_: pickles.OPAQUE),
}
DTYPES = ("float16", "bfloat16", "float32", "float64", "int64", "int32", "bool")
NAMES = {f"torch.{name}": dtype for name, dtype in STORAGES.items()} | {f"torch.{name}": name for name in DTYPES}


def _weights_and_configuration(path: Path, value: object) -> tuple[dict[str, View], Stated | None]:
    """A bare state dict, or the one of a training checkpoint with the configuration that lies beside it there."""
    if not isinstance(value, dict):
        kind = "tensor" if isinstance(value, View) else type(value).__name__
        raise NpgptError(f"{path} holds a {kind}, not a state dict or a dictionary with one")
    dictionaries = {key: item for key, item in value.items() if isinstance(item, dict)}
    distinct = {id(item): item for item in dictionaries.values()}  # one that stands under many keys is read once
    held = {key: found for key, item in distinct.items() if (found := _views(item)) and len(found) == len(item)}
    states = {key: held[id(item)] for key, item in dictionaries.items() if id(item) in held}
    views = _views(value)  # the weights themselves, or no more than a loss
    if known := [key for key in WEIGHTS_KEYS if key in states]:
        views = states[known[0]]
    elif max(map(len, states.values()), default=0) > len(views):
        if len(states) > 1:
            raise NpgptError(
                f"{path} has several state dicts, {', '.join(map(repr, states)):.300}: save the one to use"
            )
        (views,) = states.values()
    if not views:
        raise NpgptError(f"{path} has no state dict; its keys are {', '.join(map(repr, list(value)[:20])):.300}")
    for key in CONFIG_KEYS:
        fields = {k: v for k, v in dictionaries.get(key, {}).items() if type(k) is str and type(v) in pickles.PLAIN}
        if any(SPELLINGS.get(name, name) in REQUIRED for name in fields):
            return views, Stated(f"{key} in {path}", fields)
    return views, None


def _outputs(path: Path, value: object) -> tuple[dict[str, View], Stated | None]:
    """A tensor alone, those of a tuple, and a dictionary's tensors with those in its tuples."""
    if isinstance(value, View):
        return {"": value}, None
    if isinstance(value, (tuple, list)):
        value = {f"arr_{place}": item for place, item in enumerate(value)}
    views, stated = _weights_and_configuration(path, value)
    if not isinstance(value, dict) or not views.items() <= _views(value).items():
        return views, stated
    for name, items in value.items():
        if isinstance(items, (tuple, list)):
            views |= {f"{name}.{place}": item for place, item in enumerate(items) if isinstance(item, View)}
    return views, stated


def _views(mapping: Mapping[Any, Any]) -> dict[str, View]:
    return {key: item for key, item in mapping.items() if isinstance(key, str) and isinstance(item, View)}


def _stem(path: Path, members: Sequence[str]) -> str:
    """The folder in the archive that has the pickle."""
    stems = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(stems) != 1:
        held = ", ".join(members[:4])
        raise NpgptError(
            f"{path} is a ZIP but no checkpoint of torch.save: it has {len(stems)} data.pkl, and holds {held:.200}"
        )
    if f"{stems[0]}/constants.pkl" in members:
        raise NpgptError(f"{path} is a TorchScript program, not a checkpoint: save model.state_dict() instead")
    return stems[0]
