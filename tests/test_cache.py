from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npgpt.cache import KVCache
from npgpt.errors import NpgptError
from npgpt.model import forward
from tests.support.models import random_parameters, small


def test_arrays_are_allocated_once() -> None:
    config = small()
    cache = KVCache(config, 2, 10)
    assert cache.keys.shape == cache.values.shape == (2, 2, 3, 10, 7)
    assert (cache.capacity, cache.length) == (10, 0)
    assert (str(cache.keys.dtype), str(cache.values.dtype)) == ("float32", "float32")
    keys, parameters = cache.keys, random_parameters(config, dtype="float32")
    for _ in range(5):
        forward(parameters, config, [[1, 2], [3, 4]], cache)
    assert cache.keys is keys
    assert cache.length == 10


def test_extend_gives_all_that_was_seen() -> None:
    cache = KVCache(small(), 1, 5, "float64")
    first, second = (np.random.default_rng(n).standard_normal((1, 3, n, 7)) for n in (2, 3))
    cache.extend(1, first, -first)
    assert cache.length == 0
    cache.advance(2)
    k, v = cache.extend(1, second, -second)
    np.testing.assert_array_equal(k, np.concatenate([first, second], axis=2))
    np.testing.assert_array_equal(v, -k)
    assert np.shares_memory(k, cache.keys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"capacity": 0}, "capacity .n_positions at most. must be at least 1, not 0"),
        ({"capacity": 25}, "capacity .n_positions at most. must be at most 24, not 25"),
        ({"capacity": 25.0}, "capacity .* must be a whole number, not 25.0"),
        ({"batch_size": True}, "batch_size must be a whole number, not True"),
        ({"dtype": "float16"}, "float32 or float64, not float16"),
        ({"dtype": None}, "float32 or float64, not None"),
        ({"dtype": "foo"}, "float32 or float64, not foo"),
    ],
)
def test_an_impossible_cache_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(NpgptError, match=message):
        KVCache(small(), **{"batch_size": 1, "capacity": 5} | arguments)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (KVCache(small(), 1, 2, "float64"), "3 tokens after 0 do not fit into the cache's capacity of 2"),
        (KVCache(small(), 1, 9, "float32"), "cache is float32 and the model float64"),
        (KVCache(small(), 2, 9, "float64"), "2 rows, 3 heads of width 7; block 0 has 1 rows"),
        (KVCache(small(n_head=7), 1, 9, "float64"), "7 heads of width 3; block 0 has 1 rows, 3 heads of width 7"),
        (KVCache(small(n_layer=1), 1, 9, "float64"), "made for 1 blocks, the model has 2"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused_and_stays_as_it_was(cache: KVCache, message: str) -> None:
    with pytest.raises(NpgptError, match=message):
        forward(random_parameters(small()), small(), [1, 2, 3], cache)
    assert cache.length == 0


def test_a_cache_for_more_blocks_is_refused_and_a_length_that_cannot_be() -> None:
    with pytest.raises(NpgptError, match="made for 3 blocks, the model has 2"):
        forward(random_parameters(small()), small(), [1], KVCache(small(n_layer=3), 1, 9, "float64"))
    cache = KVCache(small(), 1, 9, "float64")
    cache.length = -1
    with pytest.raises(NpgptError, match="length must be at least 0, not -1"):
        forward(random_parameters(small()), small(), [1], cache)


def filled(batch_size: int, length: int) -> KVCache:
    """Return a full cache of 5 positions in which all numbers differ."""
    cache = KVCache(small(), batch_size, 5, "float64")
    k = np.random.default_rng(0).standard_normal((2, batch_size, 3, length, 7))
    for layer in range(2):
        cache.extend(layer, k[layer], -k[layer])
    cache.length = length
    return cache


def test_rows_of_a_cache() -> None:
    cache = filled(3, 4)
    cache.keys[..., 4:, :] = cache.values[..., 4:, :] = 12345
    new = cache.rows([2, 0, 2])
    assert (new.keys.shape, new.capacity, new.length, str(new.values.dtype)) == ((2, 3, 3, 5, 7), 5, 4, "float64")
    np.testing.assert_array_equal(new.keys[:, 1, :, :4], cache.keys[:, 0, :, :4])
    np.testing.assert_array_equal(new.values[:, 2, :, :4], cache.values[:, 2, :, :4])
    assert not np.shares_memory(new.keys, cache.keys)
    assert not np.shares_memory(new.values, cache.values)
    assert not (new.keys[..., 4:, :] == 12345).any()  # what is not filled is not copied
    assert not (new.values[..., 4:, :] == 12345).any()
    new.length = 1
    assert cache.length == 4
    assert cache.rows([0] * 4).keys.shape == (2, 4, 3, 5, 7)
    assert cache.rows([1]).keys.shape == (2, 1, 3, 5, 7)


@given(st.data())
def test_any_rows_go_on_as_they_would_have_gone_on_alone(data: st.DataObject) -> None:
    config = small()
    parameters = random_parameters(config)
    batch_size, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    rows = data.draw(st.lists(st.integers(0, batch_size - 1), min_size=1, max_size=6))
    ids = np.random.default_rng(1).integers(0, 40, (batch_size, length))
    following = np.random.default_rng(2).integers(0, 40, (len(rows), 1))
    cache = KVCache(config, batch_size, 5, "float64")
    forward(parameters, config, ids, cache)
    new = cache.rows(rows)
    logits = forward(parameters, config, following, new)
    expected = forward(parameters, config, np.concatenate([ids[rows], following], axis=1))[:, -1:]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12)
    assert (new.length, cache.length) == (length + 1, length)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "a new cache's number of rows must be at least 1, not 0"),
        ([0, 2], "a cache's row must be at most 1, not 2"),
        ([-1], "a cache's row must be at least 0, not -1"),
        ([1.0], "a cache's row must be a whole number, not 1.0"),
        ([True], "a cache's row must be a whole number, not True"),
    ],
)
def test_rows_that_are_not_there(rows: list[Any], message: str) -> None:
    with pytest.raises(NpgptError, match=message):
        filled(2, 1).rows(rows)


def test_what_a_cache_shows_of_itself() -> None:
    assert repr(KVCache(small(), 1, 9)) == "KVCache(0 of 9 tokens: 2 blocks, 1 row, 3 heads × 7, float32)"
