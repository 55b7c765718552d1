"""The keys and values of tokens already seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike

from .config import Config
from .errors import NpgptError

if TYPE_CHECKING:
    from .parameters import Array


class KVCache:
    """Room for the keys and values of `capacity` tokens in every block, allocated once.

    keys and values are [n_layer, batch_size, n_head, capacity, head_width] of `dtype`; the first `length` positions
    are filled. forward() reads and extends it; setting `length` back forgets the tokens after it.

    Raises NpgptError for a batch size or capacity below 1, a capacity above n_positions, and a dtype other than
    float32 and float64.
    """

    def __init__(self, config: Config, batch_size: int, capacity: int, dtype: DTypeLike = np.float32) -> None:
        if np.dtype(dtype) not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise NpgptError(f"a cache is float32 or float64, not {np.dtype(dtype)}")
        if batch_size < 1:
            raise NpgptError(f"a cache's batch_size must be at least 1, not {batch_size}")
        if not 1 <= capacity <= config.n_positions:
            raise NpgptError(f"a cache's capacity must be from 1 to n_positions = {config.n_positions}, not {capacity}")
        shape = (config.n_layer, batch_size, config.n_head, capacity, config.head_width)
        self.keys: Array = np.empty(shape, dtype)
        self.values: Array = np.empty(shape, dtype)
        self.length = 0

    @property
    def capacity(self) -> int:
        """How many tokens it holds at most."""
        return int(self.keys.shape[3])

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Put block `layer`'s new k and v [B, H, T, D] behind the old ones; give back all, views [B, H, S, D].

        `length` stays: it advances once every block has been extended, so that a pass broken off leaves no trace.
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
        n_layer, *room = self.keys.shape
        if layer >= n_layer or [*k.shape[:2], k.shape[3]] != [*room[:2], room[3]]:
            raise NpgptError(
                f"the cache was made for {n_layer} blocks, {room[0]} rows, {room[1]} heads of width {room[3]}; "
                f"block {layer} brings {k.shape[0]} rows, {k.shape[1]} heads of width {k.shape[3]}"
            )
        self.keys[layer, :, :, self.length : seen] = k
        self.values[layer, :, :, self.length : seen] = v
        return self.keys[layer, :, :, :seen], self.values[layer, :, :, :seen]
