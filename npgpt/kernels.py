"""Steps of the forward pass in the order that a CPU's caches and cores like; their formulas are model.py's.

NumPy uses several cores in large matrix products alone. The rest is shared out among threads here, which works since
NumPy lets other threads run while it computes. OpenBLAS hands a large product to threads of its own, for one caller at
a time, so that ours would wait for each other: products within threads are kept small. What a step buys was measured
with OpenBLAS 0.3.31 on two cores, with its AVX-512 and its AVX2 kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .threads import in_threads, thread_count

if TYPE_CHECKING:
    from .parameters import Array

QUERIES, KEYS = 32, 64  # a tile of scores
TILE = 2**17  # multiplications in a tile's product
SCORES = 2**17  # scores at a time in a thread
LONG = 2**17  # scores of a head below which threads take longer to start than they save
FEW, MANY = 4, 16  # rows above which OpenBLAS's copy of a weight pays: for all, and for a large one stored [out, in]
CACHED = 2**20  # weights at a time that a few rows share
LARGE = 2**23  # weights below which threads take longer to start than they save
SMALL = 2**18 - 1  # multiplications in a product that OpenBLAS leaves to the thread that calls it


def attention(q: Array, k: Array, v: Array, scale: float) -> Array:
    """model.attention for long prompts: q [B, H, T, D], k and v [B, H, S, D] → [B, H, T, D].

    The T × S square is never stored, and what lies above its diagonal hardly computed. It goes by tiles, whose products
    are so small that OpenBLAS copies nothing for them. A prompt of 1024 tokens takes 29 % less time than with the whole
    square (AVX2: 19 %), and with two threads 35 % (27 %).
    """
    (B, H, T, D), S = q.shape, k.shape[2]
    heads = np.empty((B, T, H, D), q.dtype).transpose(0, 2, 1, 3)  # in memory as merge_heads wants it
    threads = thread_count() if B * T * S >= LONG else 1
    shares = min(H, threads)
    bounds = [H * share // shares for share in range(shares + 1)]

    def run(job: tuple[int, int]) -> None:
        b, share = job
        some = slice(bounds[share], bounds[share + 1])
        _attend(q[b, some], k[b, some], v[b, some], scale, heads[b, some])

    in_threads(threads, run, [(b, share) for b in range(B) for share in range(shares)])
    return heads


def _attend(q: Array, k: Array, v: Array, scale: float, out: Array) -> None:
    """The same for some heads of one row: q and out [n, T, D], k and v [n, S, D]."""
    (n, T, D), S = q.shape, k.shape[1]
    queries = max(1, min(QUERIES, TILE // (KEYS * D)))
    q, keys, values = q * scale, _tiles(k).swapaxes(2, 3).copy(), _tiles(v)
    for start in range(0, T, queries):
        stop = min(start + queries, T)
        first, last = (S - T + start) // KEYS, -(-(S - T + stop) // KEYS)  # tiles: from `first` on keys may be hidden
        places = np.arange(first * KEYS, last * KEYS).reshape(-1, 1, KEYS)
        hidden = places > np.arange(S - T + start, S - T + stop)[:, None]  # [last − first, stop − start, KEYS]
        step = max(1, SCORES // ((stop - start) * last * KEYS))
        for h in range(0, n, step):
            scores = q[h : h + step, None, start:stop] @ keys[h : h + step, :last]  # [step, last, stop − start, KEYS]
            np.copyto(scores[:, first:], -np.inf, where=hidden)
            # softmax over the keys of all tiles, whose division waits for the sums
            largest = scores.max(axis=1).max(axis=-1, keepdims=True)
            rows = scores.reshape(len(scores), last, -1)
            rows -= np.repeat(largest, KEYS, axis=-1).reshape(len(scores), 1, -1)
            np.exp(scores, out=scores)
            total = scores.sum(axis=1).sum(axis=-1, keepdims=True)
            sums = (scores @ values[h : h + step, :last]).sum(axis=1)
            np.divide(sums, total, out=out[h : h + step, start:stop])


def _tiles(x: Array) -> Array:
    """[n, S, D] → [n, tiles, KEYS, D]; the last tile is filled up with zeros, which are always hidden."""
    n, S, D = x.shape
    tiles = np.zeros((n, -(-S // KEYS), KEYS, D), x.dtype)
    tiles.reshape(n, -1, D)[:, :S] = x
    return tiles


def product(x: Array, weight: Array) -> Array:
    """x [rows, in] @ weight [in, out] → [rows, out].

    For several rows OpenBLAS copies all of a weight before it multiplies, so that two take three times as long as one.
    Up to FEW rows are multiplied one after another instead, by as much of the weight at a time as a cache holds. With
    what _by_output does for the head, a step of 2 sequences takes 32 % less time, of 4 sequences 15 % (AVX2: 36, 23 %).
    """
    rows, (n_in, n_out) = len(x), weight.shape
    if 1 < rows <= MANY and weight.size >= LARGE and weight.flags.f_contiguous and (rows <= FEW or thread_count() > 1):
        return _by_output(x, weight.T)
    if not 1 < rows <= FEW:
        y: Array = x @ weight
        return y
    y = np.zeros((rows, n_out), x.dtype)
    step = max(1, CACHED // n_out)
    for start in range(0, n_in, step):
        y += (x[:, None, start : start + step] @ weight[start : start + step])[:, 0]
    return y


def _by_output(x: Array, weight: Array) -> Array:
    """product() for a large weight that is stored [out, in], as wte is for the head: x [rows, in] → [rows, out].

    Up to FEW rows are inner products with one output's weights after another; more rows go by blocks of outputs, each
    so small that the thread which calls OpenBLAS does it alone. With two threads a step of 16 sequences takes 15 % less
    time (AVX2: no less).
    """
    (rows, n_in), n_out, threads = x.shape, len(weight), thread_count()
    by_output, columns = np.empty((n_out, rows), x.dtype), np.ascontiguousarray(x.T)
    block = max(1, SMALL // (rows * n_in))
    share = -(-n_out // (4 * threads))

    def run(start: int) -> None:
        some, sums = weight[start : start + share], by_output[start : start + share]
        if rows <= FEW:
            np.vecdot(some[:, None], x, out=sums)
            return
        whole = len(some) - len(some) % block
        np.matmul(some[:whole].reshape(-1, block, n_in), columns, out=sums[:whole].reshape(-1, block, rows))
        np.matmul(some[whole:], columns, out=sums[whole:])

    in_threads(threads, run, range(0, n_out, share))
    return np.ascontiguousarray(by_output.T)
