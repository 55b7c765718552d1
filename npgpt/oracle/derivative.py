"""Differentiate any formula of the textbook, as a mistake of the forward pass needs: its gradients are those of what it
computes, not of GPT-2. A formula is run with traced stages, each operation notes how a gradient passes back through it,
and the chain rule adds up what comes back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from ..parameters import Array

if TYPE_CHECKING:
    from .textbook import Formula, Scope

Table: TypeAlias = Mapping[str, "Formula"]
Pull: TypeAlias = Callable[[Array], Array]  # from the gradient of a result to that of what it was made from
NUMBERS = count()
MOVES = (np.split, np.stack, np.concatenate, np.hstack, np.roll, np.repeat)  # these move numbers and change none


def fitted(dy: Array, shape: tuple[int, ...]) -> Array:
    """Return a gradient summed over the axes along which an array of this shape was broadcast."""
    dy = dy.sum(axis=tuple(range(dy.ndim - len(shape))))
    wide = tuple(axis for axis, size in enumerate(shape) if size == 1 < dy.shape[axis])
    return dy.sum(axis=wide, keepdims=True)


RULES: dict[np.ufunc, Callable[..., tuple[Pull, ...]]] = {  # of y and the operands
    np.add: lambda y, a, b: (lambda dy: dy, lambda dy: dy),
    np.subtract: lambda y, a, b: (lambda dy: dy, lambda dy: -dy),
    np.multiply: lambda y, a, b: (lambda dy: dy * b, lambda dy: dy * a),
    np.divide: lambda y, a, b: (lambda dy: dy / b, lambda dy: -dy * y / b),
    np.matmul: lambda y, a, b: (lambda dy: dy @ b.swapaxes(-1, -2), lambda dy: a.swapaxes(-1, -2) @ dy),
    np.negative: lambda y, a: (lambda dy: -dy,),
    np.exp: lambda y, a: (lambda dy: dy * y,),
    np.log: lambda y, a: (lambda dy: dy / a,),
    np.sqrt: lambda y, a: (lambda dy: dy / (y * 2),),
    np.tanh: lambda y, a: (lambda dy: dy * (1 - y * y),),
}


class Traced(NDArrayOperatorsMixin):
    """An array that knows from which others it was made. sources: those, each with its Pull."""

    def __init__(self, value: Array, *sources: tuple[Traced, Pull]) -> None:
        self.value, self.sources, self.number = value, sources, next(NUMBERS)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.value.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the array."""
        return self.value.dtype

    @property
    def T(self) -> Traced:
        """The array with its axes reversed."""
        return moved(np.transpose, self)

    def __len__(self) -> int:
        return len(self.value)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        values = [x.value if isinstance(x, Traced) else x for x in inputs]
        y = getattr(ufunc, method)(*values, **options)
        if y.dtype.kind != "f":
            return y
        if method != "__call__" or options:
            raise TypeError(f"{ufunc.__name__}.{method}")
        pulls = RULES[ufunc](y, *values)
        return Traced(y, *((x, pull) for x, pull in zip(inputs, pulls, strict=True) if isinstance(x, Traced)))

    def __array_function__(self, function: Callable[..., Any], types: Any, args: Any, options: Any) -> Any:
        if function is np.ones_like:
            return np.ones_like(self.value)
        if function not in MOVES:
            raise TypeError(function.__name__)
        many = isinstance(args[0], (list, tuple))
        inputs = [x if isinstance(x, Traced) else Traced(x) for x in (args[0] if many else args[:1])]
        return moved(lambda *x: function(list(x) if many else x[0], *args[1:], **options), *inputs)

    def __getitem__(self, at: Any) -> Traced:
        return moved(lambda x: x[at], self)

    def __setitem__(self, at: Any, value: float) -> None:
        before = Traced(self.value, *self.sources)
        self.value = self.value.copy()
        self.value[at] = value
        kept = np.ones(self.shape, bool)
        kept[at] = False
        self.sources, self.number = ((before, lambda dy: dy * kept),), next(NUMBERS)

    def copy(self) -> Traced:
        """Return a copy, which may be written to."""
        return Traced(self.value, (self, lambda dy: dy))

    def astype(self, dtype: Any) -> Traced:
        """Return the array in another dtype, through which a gradient passes as it is."""
        return Traced(self.value.astype(dtype), (self, lambda dy: dy))

    def reshape(self, *shape: Any) -> Traced:
        """Return the array in another shape."""
        return moved(lambda x: x.reshape(*shape), self)

    def transpose(self, *axes: int) -> Traced:
        """Return the array with its axes in another order."""
        return moved(lambda x: x.transpose(*axes), self)

    def swapaxes(self, one: int, other: int) -> Traced:
        """Return the array with two axes exchanged."""
        return moved(lambda x: x.swapaxes(one, other), self)

    def sum(self, axis: int = -1, keepdims: bool = False) -> Traced:
        """Return the sum over an axis."""

        def pull(dy: Array) -> Array:
            return np.broadcast_to(dy if keepdims else np.expand_dims(dy, axis), self.shape)

        return Traced(self.value.sum(axis=axis, keepdims=keepdims), (self, pull))

    def mean(self, axis: int = -1, keepdims: bool = False) -> Traced:
        """Return the mean over an axis."""
        return self.sum(axis, keepdims) / self.shape[axis]

    def var(self, axis: int = -1, keepdims: bool = False) -> Traced:
        """Return the variance over an axis."""
        centred = self - self.mean(axis, keepdims=True)
        return (centred * centred).mean(axis, keepdims)

    def max(self, axis: int = -1, keepdims: bool = False) -> Array:
        """Return the largest numbers. They are constants here: a softmax subtracts them, which changes nothing."""
        return self.value.max(axis=axis, keepdims=keepdims)

    def erf(self, function: Callable[[Array], Array]) -> Traced:
        """Return the error function, as computed by `function`: its derivative is 2 / √π exp(−x²)."""
        slope = np.exp(-(self.value * self.value)) * (2 / math.sqrt(math.pi))
        return Traced(function(self.value), (self, lambda dy: dy * slope))


def moved(move: Callable[..., Any], *inputs: Traced) -> Any:
    """Return what a function makes of arrays if it only moves their numbers: an array, or a list of arrays."""
    begins = np.cumsum([0, *(x.value.size for x in inputs)])
    places = move(*(np.arange(a, b).reshape(x.shape) for a, b, x in zip(begins, begins[1:], inputs, strict=False)))

    def one(value: Array, place: Any) -> Traced:
        def pull(number: int) -> Pull:
            begin, end = begins[number], begins[number + 1]

            def back(dy: Array) -> Array:
                from_here = (place >= begin) & (place < end)
                found = np.zeros(end - begin, dy.dtype)
                np.add.at(found, place[from_here] - begin, np.asarray(dy)[from_here])
                return found.reshape(inputs[number].shape)

            return back

        return Traced(value, *((x, pull(number)) for number, x in enumerate(inputs)))

    values = move(*(x.value for x in inputs))
    if isinstance(values, list):
        return [one(value, place) for value, place in zip(values, places, strict=True)]
    return one(values, places)


class Tracing:
    """A scope whose stages are traced. read: the names of all that was read. leaves: by name, the arrays among it; a
    list where a stage is one.
    """

    def __init__(self, scope: Scope) -> None:
        self.scope, self.leaves, self.read = scope, dict[str, Any](), set[str]()
        self.run, self.config, self.tensor = scope.run, scope.config, scope.tensor

    @property
    def layer(self) -> int:
        """The depth, from 0."""
        return self.scope.layer

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        if name not in self.leaves:
            found = self.scope[name]
            if isinstance(found, list):
                self.leaves[name] = [Traced(x) for x in found]
            elif isinstance(found, np.ndarray) and found.dtype.kind == "f":
                self.leaves[name] = Traced(found)
            else:
                return found
        return self.leaves[name]


def traced(formula: Formula, scope: Scope) -> tuple[Any, Mapping[str, Any]]:
    """Return a formula's result and the stages that it read, both traced. A pass keeps them for its next gradient."""
    kept = scope.run.traces
    tracing: Any
    if (formula, scope.block) in kept:
        result, tracing = kept[formula, scope.block]
        for name in tracing.read:
            scope[name]  # is noted as what this gradient depends on
    else:
        tracing = Tracing(scope)
        result = formula(tracing)
        kept[formula, scope.block] = result, tracing
    return result, tracing.leaves


def gradients(result: Any, leaves: Mapping[str, Any], dy: Any) -> dict[str, Any]:
    """Return by name the gradients of what a formula read, from that of its result."""
    found: dict[int, Array] = {}  # by number

    def add(x: Traced, dx: Array) -> None:
        found[x.number] = found[x.number] + dx if x.number in found else dx

    ends, each = (result, dy) if isinstance(result, list) else ([result], [dy])
    for end, gradient in zip(ends, each, strict=True):
        if isinstance(end, Traced):
            add(end, gradient)
    for y in sorted(origins(ends), key=lambda x: x.number, reverse=True):  # the last made first
        for x, pull in y.sources:
            add(x, fitted(pull(found[y.number]), x.shape))

    def of(leaf: Traced) -> Array:
        return found.get(leaf.number, np.zeros(leaf.shape, leaf.dtype))

    return {name: [of(x) for x in leaf] if isinstance(leaf, list) else of(leaf) for name, leaf in leaves.items()}


def origins(ends: Sequence[Any]) -> Iterator[Traced]:
    """Yield these arrays and all from which they were made, each once."""
    left, known = [end for end in ends if isinstance(end, Traced)], set[int]()
    while left:
        if (x := left.pop()).number not in known:
            known.add(x.number)
            yield x
            left += [source for source, _ in x.sources]


def chained(s: Scope, x: str, changed: Collection[str], table: Table, right: Table, above: Mapping[str, str]) -> Any:
    """Return the gradient of x, the sum of what comes back through each formula of the table that reads it.

    Returns None if no changed formula reads it or did so in the right table, or if one cannot be traced. above: the
    table's stages, each with the name of its gradient.
    """
    try:
        forms = [table[y] for y in changed] + [right[y] for y in changed if right[y] is not table[y]]
        if not any(x in traced(form, s)[1] for form in forms):
            return None
        here = s[x]  # what is not read has no effect
        total = [np.zeros_like(part) for part in here] if isinstance(here, list) else np.zeros_like(here)
        for y, gradient in above.items():
            result, leaves = traced(table[y], s)
            if x in leaves:
                dx = gradients(result, {x: leaves[x]}, s[gradient])[x]
                total = joined(total, dx)
        return total
    except (TypeError, KeyError, AttributeError, ValueError):  # an operation that has no rule
        return None


def joined(one: Any, other: Any) -> Any:
    """Return the sum of two arrays, or of two lists of arrays."""
    return [a + b for a, b in zip(one, other, strict=True)] if isinstance(one, list) else one + other
