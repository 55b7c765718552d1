"""Cache-friendly, multithreaded versions of the formulas in model.py.

A decorator runs its formula on pieces of a large array, or replaces it by the same sum in another order. NumPy uses
several cores for large matrix products only. Other work is divided here among Python threads, which run in parallel
because NumPy releases the interpreter lock while it computes. OpenBLAS serves one caller at a time with its own
threads, so products inside Python threads are kept so small that OpenBLAS computes them in the calling thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextvars import copy_context
from functools import wraps
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from .process import thread_count

if TYPE_CHECKING:
    from .parameters import Array, Padding

    QKV = tuple[Array, Array, Array]
    Formula = Callable[..., Array]

Job = TypeVar("Job")

# Measured on two cores of a Zen 4 with OpenBLAS 0.3.31, with its AVX-512 and its AVX2 kernels.
PIECE = 2**18  # elements in a piece: 1 MB of float32 fits a core's L2 cache, and NumPy reuses such temporaries
MAX_WHOLE_QUERIES = 64  # queries up to which the whole matrix of scores is no slower than tiles
TILE_QUERIES, TILE_KEYS = 64, 64
FEW_QUERIES = 32  # queries whose weights or gradients are computed together
MAX_SMALL_PRODUCT = 2**18  # multiplications up to which OpenBLAS computes in the calling thread
MIN_SHARED_SCORES = 2**16  # scores per head below which starting threads takes longer than it saves
MIN_SHARED_WEIGHTS = 2**23  # elements of a weight below which starting threads takes longer than it saves
MAX_SERIAL_ROWS = 6  # rows above which OpenBLAS's packed copy of a weight pays off
MAX_SHARED_ROWS = 16  # rows above which it pays off for a large weight stored [out, in]
CACHED_WEIGHTS = 2**20  # elements of a weight that stay in the cache while a few rows use them


def elementwise(formula: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Decorate an elementwise formula so that a large array goes through it piece by piece, in several threads."""

    @wraps(formula)
    def run(x: Array) -> Array:
        if x.size < 2 * PIECE:
            return formula(x)
        y = np.empty(x.shape, x.dtype)
        in_pieces(lambda some, results: np.copyto(results, formula(some)), x, y)
        return y

    return run


def in_pieces(run: Callable[..., object], *arrays: Array) -> None:
    """Call run on the same piece of each of these arrays, for every piece, in threads; run may write to its pieces.

    The arrays are of one size. Those that are written to are contiguous.
    """
    flat = [x.reshape(-1) for x in arrays]
    size, threads = flat[0].size, thread_count()
    step = min(PIECE, max(PIECE // 4, -(-size // threads)))
    in_threads(threads, lambda start: run(*(x[start : start + step] for x in flat)), range(0, size, step))


def by_row(formula: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Decorate a formula over the last axis of x [B, …, n] so that a large batch is computed in pieces, in threads."""

    @wraps(formula)
    def run(x: Array) -> Array:
        if x.ndim < 3 or len(x) == 1 or x.size < 2 * PIECE or thread_count() == 1:
            return formula(x)
        lines = x.reshape(-1, x.shape[-1])
        step = max(1, PIECE // x.shape[-1])
        first = formula(lines[:step])
        y = np.empty((*x.shape[:-1], first.shape[-1]), x.dtype)
        results = y.reshape(len(lines), -1)
        results[:step] = first

        def piece(start: int) -> None:
            results[start : start + step] = formula(lines[start : start + step])

        in_threads(thread_count(), piece, range(step, len(lines), step))
        return y

    return run


def tiled(attention: Callable[..., Array]) -> Callable[..., Array]:
    """Decorate attention(q, k, v, scale, padding) so that attention_by_tiles computes it for many queries.

    The results are equal up to rounding. Padded rows use the formula itself.
    """

    @wraps(attention)
    def run(q: Array, k: Array, v: Array, scale: float, padding: Padding = 0) -> Array:
        if q.shape[2] <= MAX_WHOLE_QUERIES or np.any(padding):
            return attention(q, k, v, scale, padding)
        return attention_by_tiles(q, k, v, scale)

    return run


def attention_by_tiles(q: Array, k: Array, v: Array, scale: float) -> Array:
    """Compute model.attention without storing T × S scores: q [B, H, T, D], k and v [B, H, S, D] → [B, H, T, D].

    Scores are computed in tiles of queries and keys; tiles that lie above the diagonal are skipped. Tiles are so small
    that OpenBLAS multiplies them in the calling thread. Each thread takes some heads of a row.
    """
    (B, H, T, D), S = q.shape, k.shape[2]
    heads = np.empty((B, T, H, D), q.dtype).transpose(0, 2, 1, 3)  # laid out in memory as merge_heads returns them
    threads = thread_count() if B * T * S >= MIN_SHARED_SCORES else 1
    queries = max(1, min(TILE_QUERIES, MAX_SMALL_PRODUCT // (TILE_KEYS * D)))

    def run(job: tuple[int, slice]) -> None:
        out, scaled, keys, values = heads[job], q[job] * scale, _tiles(k[job]).swapaxes(2, 3).copy(), _tiles(v[job])
        for start in range(0, T, queries):
            stop = min(start + queries, T)
            # tiles of visible keys; in those from `first` on some keys are hidden
            first, last = (S - T + start) // TILE_KEYS, -(-(S - T + stop) // TILE_KEYS)
            places = np.arange(first * TILE_KEYS, last * TILE_KEYS).reshape(-1, 1, TILE_KEYS)
            hidden = places > np.arange(S - T + start, S - T + stop)[:, None]  # [last − first, queries, TILE_KEYS]
            step = max(1, PIECE // ((stop - start) * last * TILE_KEYS))
            for h in range(0, len(out), step):
                scores = scaled[h : h + step, None, start:stop] @ keys[h : h + step, :last]
                np.copyto(scores[:, first:], -np.inf, where=hidden)  # [step, last, queries, TILE_KEYS]
                # softmax over the keys of all tiles; the division comes after the weighted sums
                largest = scores.max(axis=1).max(axis=-1, keepdims=True)
                rows = scores.reshape(len(scores), last, -1)
                rows -= np.repeat(largest, TILE_KEYS, axis=-1).reshape(len(scores), 1, -1)
                np.exp(scores, out=scores)
                total = scores.sum(axis=1).sum(axis=-1, keepdims=True)
                sums = (scores @ values[h : h + step, :last]).sum(axis=1)
                np.divide(sums, total, out=out[h : h + step, start:stop])

    in_threads(threads, run, _shares(B, H, threads))
    return heads


def _tiles(x: Array) -> Array:
    """Copy [n, S, D] → [n, tiles, TILE_KEYS, D]; zeros, which are always masked, pad the last tile."""
    n, S, D = x.shape
    tiles = np.zeros((n, -(-S // TILE_KEYS), TILE_KEYS, D), x.dtype)
    tiles.reshape(n, -1, D)[:, :S] = x
    return tiles


def tiled_backward(attention_backward: Callable[..., QKV]) -> Callable[..., QKV]:
    """Decorate attention_backward(dy, q, k, v, scale) to be computed for a few queries at a time, in threads.

    dy, q, k, v [B, H, T, D] → dq, dk, dv. A few queries give a gradient to the keys up to the last of them; a key's
    gradient is the sum over all queries.
    """

    @wraps(attention_backward)
    def run(dy: Array, q: Array, k: Array, v: Array, scale: float) -> QKV:
        B, H, T, D = q.shape
        if B * H * T * T < MIN_SHARED_SCORES:
            return attention_backward(dy, q, k, v, scale)
        dq, dk, dv = np.zeros((3, B, T, H, D), q.dtype).swapaxes(2, 3)  # laid out as merge_heads returns them

        def some_heads(job: tuple[int, slice]) -> None:
            b, heads = slice(job[0], job[0] + 1), job[1]
            for start in range(0, T, FEW_QUERIES):
                some, seen = slice(start, start + FEW_QUERIES), slice(start + FEW_QUERIES)
                tile = dy[b, heads, some], q[b, heads, some], k[b, heads, seen], v[b, heads, seen]
                dq[b, heads, some], dk_some, dv_some = attention_backward(*tile, scale)
                dk[b, heads, seen] += dk_some
                dv[b, heads, seen] += dv_some

        threads = _threads(FEW_QUERIES, T, D)
        in_threads(threads, some_heads, _shares(B, H, threads))
        return dq, dk, dv

    return run


def by_queries(hidden: float) -> Callable[[Formula], Formula]:
    """Decorate a formula of q [B, H, T, D] and k [B, H, S, D] → [B, H, T, S], a number for every query and key.

    It is computed in threads, for a few queries at a time and the keys up to the last of them. `hidden` is its value
    for the keys that come later.
    """

    def decorate(formula: Formula) -> Formula:
        @wraps(formula)
        def run(q: Array, k: Array, scale: float, padding: Padding = 0) -> Array:
            (B, H, T, D), S = q.shape, k.shape[2]
            if T <= MAX_WHOLE_QUERIES or np.any(padding):
                return formula(q, k, scale, padding)
            y = np.full((B, H, T, S), hidden, q.dtype)

            def some_heads(job: tuple[int, slice]) -> None:
                for start in range(0, T, FEW_QUERIES):
                    queries, seen = slice(start, start + FEW_QUERIES), slice(S - T + min(start + FEW_QUERIES, T))
                    y[job][:, queries, seen] = formula(q[job][None, :, queries], k[job][None, :, seen], scale)[0]

            threads = _threads(FEW_QUERIES, S, D)
            in_threads(threads, some_heads, _shares(B, H, threads))
            return y

        return run

    return decorate


def _threads(queries: int, keys: int, width: int) -> int:
    """Return how many threads may multiply queries by keys: one if OpenBLAS itself divides so large a product."""
    return thread_count() if queries * keys * width <= MAX_SMALL_PRODUCT else 1


def _shares(B: int, H: int, threads: int) -> list[tuple[int, slice]]:
    """Return for every row of a batch all its heads, or in fewer rows than threads as many shares as threads."""
    share = -(-H // threads) if threads > B else H
    return [(b, slice(h, h + share)) for b in range(B) for h in range(0, H, share)]


def product(x: Array, weight: Array) -> Array:
    """Return x [..., in] @ weight [in, out] → [..., out], computed by the fastest method for the number of rows.

    | rows    | weight                              | method                                              |
    |---------|-------------------------------------|-----------------------------------------------------|
    | 1       | any                                 | OpenBLAS's matrix-vector product                    |
    | 2 to 6  | any                                 | row by row, in parts of the weight that fit a cache |
    | 2 to 6  | large, stored [out, in] (the head)  | inner products, outputs divided among threads       |
    | 7 to 16 | large, stored [out, in], 2+ threads | small products, blocks of outputs among threads     |
    | more    | any                                 | OpenBLAS's matrix product, which packs the weight   |
    """
    rows = x.reshape(-1, x.shape[-1])  # of all sequences together; in 3-D NumPy would compute B products
    large = weight.size >= MIN_SHARED_WEIGHTS and weight.flags.f_contiguous
    if not 1 < len(rows) <= (MAX_SHARED_ROWS if large and thread_count() > 1 else MAX_SERIAL_ROWS):
        y: Array = rows @ weight
    elif large:
        y = _by_outputs(rows, weight.T)
    else:
        y = _by_cached_parts(rows, weight)
    return y.reshape(*x.shape[:-1], weight.shape[1])


def _by_cached_parts(x: Array, weight: Array) -> Array:
    """Compute x [rows, in] @ weight [in, out] for a few rows, in parts of the weight that stay in the cache."""
    y = np.zeros((len(x), weight.shape[1]), x.dtype)
    step = max(1, CACHED_WEIGHTS // weight.shape[1])
    for start in range(0, len(weight), step):
        y += (x[:, None, start : start + step] @ weight[start : start + step])[:, 0]
    return y


def _by_outputs(x: Array, weight: Array) -> Array:
    """Compute x [rows, in] @ weight [out, in].T → [rows, out], with the outputs divided among threads."""
    (rows, n_in), n_out, threads = x.shape, len(weight), thread_count()
    y, columns = np.empty((n_out, rows), x.dtype), np.ascontiguousarray(x.T)
    block = max(1, MAX_SMALL_PRODUCT // (rows * n_in))
    share = -(-n_out // (4 * threads))

    def run(start: int) -> None:
        some, sums = weight[start : start + share], y[start : start + share]
        if rows <= MAX_SERIAL_ROWS:
            np.vecdot(some[:, None], x, out=sums)
            return
        whole = len(some) - len(some) % block
        np.matmul(some[:whole].reshape(-1, block, n_in), columns, out=sums[:whole].reshape(-1, block, rows))
        np.matmul(some[whole:], columns, out=sums[whole:])

    in_threads(threads, run, range(0, n_out, share))
    return np.ascontiguousarray(y.T)


def in_threads(threads: int, run: Callable[[Job], object], jobs: Iterable[Job]) -> None:
    """Call run(job) for every job in up to `threads` threads, including the calling one.

    All threads end before the function returns, so that a later fork is safe. They run in the caller's context, which
    holds np.errstate. An exception in run is raised here once every thread has ended.
    """
    waiting = deque(jobs)  # popleft is atomic, also in free-threaded Python
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while True:
                try:
                    job = waiting.popleft()
                except IndexError:
                    return
                run(job)
        except BaseException as failure:  # raised again below, in the calling thread
            failures.append(failure)

    helpers = [Thread(target=copy_context().run, args=(work,)) for _ in range(min(threads, len(waiting)) - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]
