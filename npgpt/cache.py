"""The keys and values of tokens already seen."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike

from .config import Config
from .errors import NpgptError, float_dtype, whole_number

if TYPE_CHECKING:
    from .parameters import Array


class KVCache:
    """Room for the keys and values of `capacity` tokens in every block, allocated once.

    keys and values are [n_layer, batch_size, n_head, capacity, head_width] of `dtype`; the first `length` positions
    are filled. forward() extends it block by block and then advances it; setting `length` back forgets what follows.

    Raises NpgptError for a batch size or capacity below 1, a capacity above n_positions, and a dtype other than
    float32 and float64.
    """

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
        """How many tokens it holds at most."""
        return int(self.keys.shape[3])

    def __repr__(self) -> str:
        return f"KVCache({self.length} of {self.capacity} tokens, {self.keys.dtype} {list(self.keys.shape)})"

    def past(self, config: Config) -> int:
        """How many tokens it holds. Raises NpgptError where it was made for another depth, or length is wrong."""
        if len(self.keys) != config.n_layer:
            raise NpgptError(f"the cache was made for {len(self.keys)} blocks, the model has {config.n_layer}")
        return whole_number("a cache's length", self.length, low=0, high=self.capacity)

    def advance(self, tokens: int) -> None:
        """Count `tokens` more as filled, once every block has been extended: a pass broken off leaves no trace."""
        self.length += tokens

    def rows(self, rows: Sequence[int]) -> KVCache:
        """A new cache of these rows in this order, each as often as it is given; what is filled is copied, no more.

        rows([0] * n) takes one prompt on in n ways; rows([0, 2]) drops what is over. Raises NpgptError for no rows at
        all, and for one that is not there.
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
        """Put block `layer`'s new k and v [B, H, T, D] behind the old ones; give back all, views [B, H, S, D].

        `length` stays until advance().
        Raises NpgptError where the new ones are of another model, batch or dtype, or do not fit.
        """
        seen = self.length + k.shape[2]
        if seen > self.capacity:
            raise NpgptError(
                f"{k.shape[2]} tokens after {self.length} do not fit into the cache's capacity of {self.capacity}"
            )
        if k.dtype != self.keys.dtype:
            raise NpgptError(
                f"the cache is {self.keys.dtype} and the model {k.dtype}: make it KVCache(…, dtype='{k.dtype}')"
            )
        _, *room = self.keys.shape
        if [*k.shape[:2], k.shape[3]] != [*room[:2], room[3]]:
            raise NpgptError(
                f"the cache was made for {room[0]} rows, {room[1]} heads of width {room[3]}; "
                f"block {layer} brings {k.shape[0]} rows, {k.shape[1]} heads of width {k.shape[3]}"
            )
        self.keys[layer, :, :, self.length : seen] = k
        self.values[layer, :, :, self.length : seen] = v
        return self.keys[layer, :, :, :seen], self.values[layer, :, :, :seen]
