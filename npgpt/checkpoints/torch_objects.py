"""Rebuild torch's objects from a pickle: storages, tensors as views of storages, and NumPy scalars.

CALLS, NAMES and storage_of are the tables that pickles.read takes. A tensor that needs any other name is Unread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..parameters import Shape
from .pickles import Global, Record
from .tensor import LONGEST_SHAPE

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
REBUILD = "torch._utils._rebuild_tensor_v2"
TENSOR_TYPES = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
DTYPES = ("float16", "bfloat16", "float32", "float64", "int64", "int32", "bool")
NAMES = {f"torch.{name}": dtype for name, dtype in STORAGES.items()} | {f"torch.{name}": name for name in DTYPES}


class Storage(NamedTuple):
    """A one-dimensional array of elements, which tensors are views of."""

    key: str
    dtype: str
    numel: int


class View(NamedTuple):
    """A tensor as the pickle describes it; offset and strides count elements of its storage."""

    storage: Storage
    offset: int
    shape: Shape
    strides: tuple[int, ...]


class Unread(NamedTuple):
    """A tensor or storage that needs a function, named in needs, that npgpt does not run."""

    needs: str


def is_unread(value: object) -> bool:
    """Return whether a value records a call that creates a tensor, such as torch._utils._rebuild_sparse_tensor."""
    return isinstance(value, Record) and re.match(r"torch\._(utils|tensor)\._rebuild_", value.name) is not None


def _whole(*numbers: object) -> bool:
    return all(type(number) is int and 0 <= number < 2**59 for number in numbers)  # a C long, also in bytes


def _needed(*values: object) -> Unread | None:
    """Return an Unread for the first value that needs a function npgpt does not run, or None."""
    inert = next((value for value in values if isinstance(value, Global | Record | Unread)), None)
    return inert if inert is None or isinstance(inert, Unread) else Unread(inert.name)


def storage_of(persistent_id: object) -> Storage | Unread:
    """Return the storage of ("storage", type, key, location, element count). Raises ValueError for any other id."""
    if isinstance(persistent_id, tuple) and len(persistent_id) == 5 and (needed := _needed(*persistent_id)):
        return needed
    match persistent_id:
        case ("storage", str(dtype), str(key), str(), int(numel)) if dtype in STORAGES.values() and _whole(numel):
            return Storage(key, dtype, numel)
    if needed := _needed(persistent_id):
        return needed
    raise ValueError("a persistent id is not a storage")


def _tensor(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    requires_grad: object = False,
    hooks: object = None,
    metadata: object = None,
) -> View | Unread:
    """Implement torch._utils._rebuild_tensor_v2; metadata marks a lazily negated or conjugated tensor."""
    if metadata:
        raise ValueError("a tensor is lazily negated or conjugated: save tensor.resolve_neg()")
    match storage, offset, shape, strides:
        case Storage() | Unread() | Record() | Global(), _, tuple(), tuple() if (
            len(shape) == len(strides) <= LONGEST_SHAPE
        ):
            if needed := _needed(storage, offset, *shape, *strides):
                return needed
            if isinstance(storage, Storage) and _whole(offset, *shape, *strides):
                return View(storage, offset, shape, strides)  # type: ignore[arg-type]
    raise ValueError("a tensor's storage, offset, size or stride is malformed")


def _parameter(view: object, *_: object) -> View | Unread:
    """Implement torch._utils._rebuild_parameter(data, requires_grad, hooks), which returns the data."""
    if is_unread(view):
        view = _needed(view)
    if not isinstance(view, View | Unread):
        raise ValueError("a parameter has no tensor")
    return view


def _of_type(function: object, kind: object, arguments: object, state: object = None) -> View | Unread | Record:
    """Implement torch._tensor._rebuild_from_type_v2 for a tensor with attributes."""
    plain = isinstance(kind, Global) and kind.name in TENSOR_TYPES
    if plain and function == Global(REBUILD) and isinstance(arguments, tuple) and 4 <= len(arguments) <= 7:
        return _tensor(*arguments)
    return _needed(*(kind, function)[plain:]) or Record(REBUILD, (function, kind))


def _ordered_dict() -> dict[Any, Any]:
    """Return an empty dict; takes no arguments, since dict itself could be made to copy a large one repeatedly."""
    return {}


def _bytes(text: object = "", encoding: object = "latin1") -> object:
    """Implement _codecs.encode, the form of bytes before protocol 3; longer bytes than a scalar's become a Record."""
    if isinstance(text, str) and encoding == "latin1" and len(text) <= 16 and all(c < "\u0100" for c in text):
        return text.encode("latin1")
    return Record("_codecs.encode", (text, encoding))


def _scalar(dtype: object = None, content: object = None) -> object:
    """Return a NumPy scalar, such as a loss or a size, as a Python number, or a Record if it is not a number."""
    match dtype, content:
        case Record(name="numpy.dtype", arguments=(str(kind), *_), state=(_, str(order), *_)), bytes():
            if (
                re.fullmatch("[iuf][1248]|b1", kind)
                and order in "<>|"
                and len(content) == int(kind[1])
                and kind != "f1"
            ):
                return np.frombuffer(content, order + kind)[0].item()
    return Record("numpy.core.multiarray.scalar", (dtype, content))


CALLS: Mapping[str, Callable[..., object]] = {
    "collections.OrderedDict": _ordered_dict,
    REBUILD: _tensor,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": lambda sizes: sizes,
    "torch.device": lambda *names: names,
    "_codecs.encode": _bytes,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.multiarray.scalar": _scalar,
}
