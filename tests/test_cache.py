from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from npgpt.cache import KVCache
from npgpt.errors import NpgptError
from npgpt.model import forward
from tests.models import random_parameters, small


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
    cache.length = 2
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
        (KVCache(small(), 2, 9, "float64"), "2 rows, 3 heads of width 7; block 0 brings 1 rows"),
        (KVCache(small(n_head=7), 1, 9, "float64"), "7 heads of width 3; block 0 brings 1 rows, 3 heads of width 7"),
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


def test_what_a_cache_shows_of_itself() -> None:
    assert repr(KVCache(small(), 1, 9)) == "KVCache(0 of 9 tokens, float32 [2, 1, 3, 9, 7])"
