"""What an attention head measurably does with a text: to which keys it gives its weight."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..parameters import Array

# A label needs this mean: of the weight on one key, or of the entropy relative to that of equal weights.
LEAST = {"previous token": 0.4, "first token": 0.4, "own token": 0.4, "even": 0.9}


class Label(NamedTuple):
    """What a head does, one of LEAST, and how much of it, from 0 to 1."""

    name: str
    score: float

    def __str__(self) -> str:
        return f"{self.name} {self.score:.2f}"


def measures(weights: Array) -> dict[str, float]:
    """Return the means of a head's weights [T, T] by the names in LEAST over all queries but the first; none if T is 1.

    They are the weight on the previous token, on the first one, and on the query's own; and how even the weights are:
    their entropy divided by that of equal weights. The first query has only its own key.
    """
    T = len(weights)
    if T == 1:
        return {}
    rows = weights[1:].astype(np.float64)
    entropy = -np.sum(rows * np.log(rows, out=np.zeros_like(rows), where=rows > 0), axis=1)
    each = {
        "previous token": np.diagonal(rows),
        "first token": rows[:, 0],
        "own token": np.diagonal(rows, 1),
        "even": entropy / np.log(np.arange(2, T + 1)),
    }
    return {name: float(values.mean()) for name, values in each.items()}


def label(weights: Array) -> Label | None:
    """Return the largest measure of a head's weights [T, T] among those that reach LEAST, or None."""
    found = [Label(name, value) for name, value in measures(weights).items() if value >= LEAST[name]]
    return max(found, key=lambda one: one.score, default=None)


def most_telling(weights: Array) -> tuple[int, int, int]:
    """Return the layer, the head and the query, as indices into weights [L, H, T, T], that are best to look at first.

    A link is a query's weight on an earlier token, minus the mean weight of later queries on that token: a token that
    all attend to tells nothing about any. The head has the largest mean of its queries' strongest links, and the query
    is the one with the head's strongest link.
    """
    earlier = np.tri(weights.shape[-1], k=-1, dtype=bool)
    received = np.where(earlier, weights, 0)
    means = received.sum(axis=-2, keepdims=True) / np.maximum(earlier.sum(axis=0), 1)
    links = np.where(earlier, received - means, 0).max(axis=-1)  # [L, H, T]
    layer, head = np.unravel_index(np.argmax(links.mean(axis=-1)), links.shape[:2])
    return int(layer), int(head), int(np.argmax(links[layer, head]))
