"""The key-value cache: keys and values of the tokens already seen."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .config import Config
from .errors import NpgptError, checked, counted, float_dtype, whole_number

if TYPE_CHECKING:
    from .parameters import Array, Padding


class KVCache:
    """Keys and values of up to `capacity` tokens in every block, allocated once.

    keys and values are [n_layer, batch_size, n_head, capacity, head_width] of `dtype`; the first `length` positions
    are filled. forward() extends every block and then advances the length. Set `length` back to forget later tokens.
    padding: number of left-padding positions in each row, for rows of unequal length. They are masked, and a row's
    position ids start after them, as with attention_mask in transformers.

    Raises NpgptError for a batch size or capacity below 1, a capacity above n_positions, a dtype other than float32
    and float64, and padding that is not a number below the capacity for each row.
    """

    @checked
    def __init__(
        self,
        config: Config,
        batch_size: int,
        capacity: int,
        dtype: DTypeLike = np.float32,
        padding: Sequence[int] = (),
    ) -> None:
        dtype = float_dtype("a cache's dtype", dtype)
        batch_size = whole_number("a cache's batch_size", batch_size)
        capacity = whole_number("a cache's capacity (n_positions at most)", capacity, high=config.n_positions)
        shape = (config.n_layer, batch_size, config.n_head, capacity, config.head_width)
        self.keys: Array = np.empty(shape, dtype)
        self.values: Array = np.empty(shape, dtype)
        self.length = 0
        if len(padding) not in (0, batch_size):
            raise NpgptError(
                f"padding must have one number for each of the cache's {batch_size} rows, not {len(padding)} numbers"
            )
        self._padding = np.zeros((batch_size, 1, 1, 1), np.int64)
        for row, number in enumerate(padding):
            self._padding[row] = whole_number("a row's padding (below the capacity)", number, low=0, high=capacity - 1)

    @property
    def capacity(self) -> int:
        """The number of tokens that fit into the cache."""
        return int(self.keys.shape[3])

    @property
    def padding(self) -> Padding:
        """The number of left-padding keys in each row [B, 1, 1, 1], or 0 if no row is padded."""
        return self._padding if self._padding.any() else 0

    def positions(self, tokens: int) -> NDArray[np.int64]:
        """Return the positions of the next tokens: [T], or [B, T] if rows are padded; padding has position 0."""
        slots = np.arange(self.length, self.length + tokens)
        return np.maximum(slots - self._padding[:, 0, 0], 0) if self._padding.any() else slots

    def __repr__(self) -> str:
        n_layer, rows, n_head, capacity, width = self.keys.shape
        shape = f"{n_layer} blocks, {counted(rows, 'row')}, {n_head} heads × {width}"
        return f"KVCache({self.length} of {capacity} tokens: {shape}, {self.keys.dtype})"

    @checked
    def past(self, config: Config) -> int:
        """Return the number of cached tokens. Raises NpgptError for another number of blocks and a wrong length."""
        if len(self.keys) != config.n_layer:
            raise NpgptError(f"the cache was made for {len(self.keys)} blocks, the model has {config.n_layer}")
        return whole_number("a cache's length", self.length, low=0, high=self.capacity)

    def advance(self, tokens: int) -> None:
        """Add to the length once every block is extended, so that an interrupted pass leaves the cache as it was."""
        self.length += whole_number("tokens", tokens, low=0, high=self.capacity - self.length)

    @checked
    def rows(self, rows: Sequence[int]) -> KVCache:
        """Return a new cache with these rows in this order; a row may be repeated.

        rows([0] * n) continues one prompt in n ways; rows([0, 2]) drops samples that have ended. Padding that all these
        rows share is dropped. Raises NpgptError for an empty list and for a row that does not exist.
        """
        whole_number("a new cache's number of rows", len(rows))
        n_layer, batch_size, *room = self.keys.shape
        new = copy.copy(self)
        new.keys = np.empty((n_layer, len(rows), *room), self.keys.dtype)
        new.values = np.empty_like(new.keys)
        rows = [whole_number("a cache's row", row, low=0, high=batch_size - 1) for row in rows]
        empty = min(int(self._padding[rows].min()), self.length)
        new.length, new._padding = self.length - empty, self._padding[rows] - empty
        for to, row in enumerate(rows):
            new.keys[:, to, :, : new.length] = self.keys[:, row, :, empty : self.length]
            new.values[:, to, :, : new.length] = self.values[:, row, :, empty : self.length]
        return new

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Append k and v [B, H, T, D] to block `layer` and return views [B, H, S, D] of all its keys and values.

        `length` stays the same until advance(). Raises NpgptError for k and v of another shape or dtype, and if they do
        not fit into the capacity.
        """
        whole_number("layer", layer, low=0, high=len(self.keys) - 1)
        for name, x in (("k", k), ("v", v)):
            if not isinstance(x, np.ndarray) or np.ma.isMaskedArray(x) or x.ndim != 4:
                raise NpgptError(f"{name} must be an array [B, H, T, D], not {x!r:.80}")
        if (k.shape, k.dtype) != (v.shape, v.dtype):
            raise NpgptError(
                f"k is {list(k.shape)} {k.dtype} and v {list(v.shape)} {v.dtype}: shape and dtype must agree"
            )
        B, H, T, D = k.shape
        _, batch_size, n_head, capacity, head_width = self.keys.shape
        seen = self.length + T
        if seen > capacity:
            raise NpgptError(f"{T} tokens after {self.length} do not fit into the cache's capacity of {capacity}")
        if k.dtype != self.keys.dtype:
            raise NpgptError(
                f"the cache is {self.keys.dtype} and the model {k.dtype}: use KVCache(…, dtype='{k.dtype}')"
            )
        if (batch_size, n_head, head_width) != (B, H, D):
            raise NpgptError(
                f"the cache was made for {batch_size} rows, {n_head} heads of width {head_width}; "
                f"block {layer} has {B} rows, {H} heads of width {D}"
            )
        self.keys[layer, :, :, self.length : seen] = k
        self.values[layer, :, :, self.length : seen] = v
        return self.keys[layer, :, :, :seen], self.values[layer, :, :, :seen]


def side_by_side(config: Config, caches: Sequence[KVCache], capacity: int) -> KVCache:
    """Return one cache whose rows are the first rows of the given ones, left-padded to the longest."""
    longest = max(cache.length for cache in caches)
    padding = [longest - cache.length for cache in caches]
    joined = KVCache(config, len(caches), capacity, caches[0].keys.dtype, padding)
    for row, (cache, empty) in enumerate(zip(caches, padding, strict=True)):
        for to, of in ((joined.keys, cache.keys), (joined.values, cache.values)):
            to[:, row, :, :empty] = 0  # masked, but multiplied by 0: uninitialised memory may hold NaN
            to[:, row, :, empty:longest] = of[:, 0, :, : cache.length]
    joined.length = longest
    return joined
