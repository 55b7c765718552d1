"""Labels that say what an attention head measurably does with a text."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npgpt.parameters import Array
from npgpt.pictures.heads import LEAST, Label, label, measures, most_telling

EVEN = np.tri(5) / np.arange(1, 6)[:, None]


def one_key(*keys: int) -> Array:
    """Return weights [T, T] in which each query gives all its weight to one key."""
    weights: Array = np.eye(len(keys))[list(keys)]
    return weights


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (one_key(0, 0, 1, 2, 3), "previous token 1.00"),
        (one_key(0, 0, 0, 0, 0), "first token 1.00"),
        (one_key(0, 1, 2, 3, 4), "own token 1.00"),
        (EVEN, "even 1.00"),
        (0.6 * one_key(0, 0, 1, 2, 3) + 0.4 * one_key(0, 1, 2, 3, 4), "previous token 0.60"),
        (0.75 * one_key(0, 0, 1, 2, 3) + 0.25 * one_key(0, 0, 0, 0, 0), "previous token 0.81"),  # in row 1 they are one
        (one_key(0, 1, 0, 1, 2), "None"),
        (one_key(0), "None"),
    ],
)
def test_literal_labels(weights: Array, expected: str) -> None:
    assert str(label(weights)) == expected
    assert str(label(weights.astype(np.float32))) == expected


def test_literal_measures() -> None:
    found = measures(np.array([[1, 0, 0], [0.25, 0.75, 0], [0.5, 0.25, 0.25]]))
    entropies = (-0.25 * math.log(0.25) - 0.75 * math.log(0.75)) / math.log(2), 1.5 * math.log(2) / math.log(3)
    expected = {"previous token": 0.25, "first token": 0.375, "own token": 0.5, "even": sum(entropies) / 2}
    assert found == pytest.approx(expected)
    assert found.keys() == LEAST.keys()


@given(st.integers(2, 12), st.integers(0, 99), st.floats(0, 30))
def test_a_label_is_the_largest_measure_that_is_large_enough(T: int, seed: int, sharpness: float) -> None:
    scores = np.where(np.tri(T, dtype=bool), sharpness * np.random.default_rng(seed).standard_normal((T, T)), -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    found = measures(weights)
    assert all(-1e-12 <= value <= 1 + 1e-12 for value in found.values())
    enough = [Label(name, value) for name, value in found.items() if value >= LEAST[name]]
    chosen = label(weights)
    assert (chosen is None) == (not enough)
    assert chosen is None or (chosen in enough and chosen.score == max(one.score for one in enough))


def test_the_page_opens_on_a_head_that_links_tokens() -> None:
    """A head in which tokens attend to other tokens is preferred to one with a single target or even weights."""
    weights = np.stack(
        [np.stack([one_key(0, 1, 1, 1, 1), EVEN]), np.stack([one_key(0, 1, 2, 3, 1), one_key(*[0] * 5)])]
    )
    assert most_telling(weights)[:2] == (1, 0)
    assert most_telling(one_key(0, 0, 1, 2, 3)[None, None])[:2] == (0, 0)
    assert most_telling(np.ones((1, 2, 1, 1))) == (0, 0, 0)
    sharp = 0.5 * EVEN + 0.5 * one_key(0, 1, 2, 2, 4)
    assert most_telling(sharp[None, None]) == (0, 0, 3)
