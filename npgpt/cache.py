"""The keys and values of tokens already seen."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike

from .config import Config
from .errors import NpgptError, checked, float_dtype, whole_number

if TYPE_CHECKING:
    from .parameters import Array


class KVCache:
    """Room for the keys and values of `capacity` tokens in every block, allocated once.

    keys and values are [n_layer, batch_size, n_head, capacity, head_width] of `dtype`; the first `length` positions
    are filled. forward() extends it block by block and then advances it; setting `length` back forgets what follows.

    Raises NpgptError for a batch size or capacity below 1, a capacity above n_positions, and a dtype other than
    float32 and float64.
    """

    @checked
    def __init__(self, config: Config, batch_size: int, capacity: int, dtype: DTypeLike = np.float32) -> None:
        dtype = float_dtype("a cache's dtype", dtype)
        batch_size = whole_number("a cache's batch_size", batch_size)
        capacity = whole_number("a cache's capacity (n_positions at most)", capacity, high=config.n_positions)
        shape = (config.n_layer, batch_size, config.n_head, capacity, config.head_width)
        self.keys: Array = np.empty(shape, dtype)
        self.values: Array = np.empty(shape, dtype)
        self.length = 0

    @property
    def capacity(self) -> int:
        """The number of tokens it has room for."""
        return int(self.keys.shape[3])

    def __repr__(self) -> str:
        return f"KVCache({self.length} of {self.capacity} tokens, {self.keys.dtype} {list(self.keys.shape)})"

    @checked
    def past(self, config: Config) -> int:
        """Return how many tokens it holds. Raises NpgptError where its depth is another model's, or length is wrong."""
        if len(self.keys) != config.n_layer:
            raise NpgptError(f"the cache was made for {len(self.keys)} blocks, the model has {config.n_layer}")
        return whole_number("a cache's length", self.length, low=0, high=self.capacity)

    def advance(self, tokens: int) -> None:
        """Count `tokens` more as filled, once every block has been extended; a pass that breaks off leaves no trace."""
        self.length += whole_number("tokens", tokens, low=0, high=self.capacity - self.length)

    @checked
    def rows(self, rows: Sequence[int]) -> KVCache:
        """Return a new cache of these rows in this order, repeated where they are; only the filled part is copied.

        rows([0] * n) continues one prompt in n ways; rows([0, 2]) drops samples that have ended. Raises NpgptError for
        an empty list and for a row that does not exist.
        """
        whole_number("a new cache's number of rows", len(rows))
        n_layer, batch_size, *room = self.keys.shape
        new = copy.copy(self)
        new.keys = np.empty((n_layer, len(rows), *room), self.keys.dtype)
        new.values = np.empty_like(new.keys)
        for to, row in enumerate(rows):
            row = whole_number("a cache's row", row, low=0, high=batch_size - 1)
            new.keys[:, to, :, : self.length] = self.keys[:, row, :, : self.length]
            new.values[:, to, :, : self.length] = self.values[:, row, :, : self.length]
        return new

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Append k and v [B, H, T, D] to those of block `layer`; return views [B, H, S, D] of all of them.

        `length` stays the same until advance(). Raises NpgptError where k is of another model, batch size or dtype, or
        does not fit.
        """
        whole_number("layer", layer, low=0, high=len(self.keys) - 1)
        for name, x in (("k", k), ("v", v)):
            if not isinstance(x, np.ndarray) or np.ma.isMaskedArray(x) or x.ndim != 4:
                raise NpgptError(f"{name} must be an array [B, H, T, D], not {x!r:.80}")
        if (k.shape, k.dtype) != (v.shape, v.dtype):
            raise NpgptError(f"k is {list(k.shape)} {k.dtype} and v {list(v.shape)} {v.dtype}: they must be alike")
        B, H, T, D = k.shape
        _, batch_size, n_head, capacity, head_width = self.keys.shape
        seen = self.length + T
        if seen > capacity:
            raise NpgptError(f"{T} tokens after {self.length} do not fit into the cache's capacity of {capacity}")
        if k.dtype != self.keys.dtype:
            raise NpgptError(
                f"the cache is {self.keys.dtype} and the model {k.dtype}: make it KVCache(…, dtype='{k.dtype}')"
            )
        if (batch_size, n_head, head_width) != (B, H, D):
            raise NpgptError(
                f"the cache was made for {batch_size} rows, {n_head} heads of width {head_width}; "
                f"block {layer} brings {B} rows, {H} heads of width {D}"
            )
        self.keys[layer, :, :, self.length : seen] = k
        self.values[layer, :, :, self.length : seen] = v
        return self.keys[layer, :, :, :seen], self.values[layer, :, :, :seen]
