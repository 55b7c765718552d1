"""Splitting into heads and merging, for every width and every number of heads that divides it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npgpt.config import PUBLISHED, Config
from npgpt.errors import NpgptError
from npgpt.model import merge_heads, split_heads
from npgpt.parameters import Array
from tests.support.thorough import examples

WIDTHS = [range(first, first + 64) for first in range(1, 257, 64)]  # every width up to 256


def divisors(n_embd: int) -> list[int]:
    return [n_head for n_head in range(1, n_embd + 1) if n_embd % n_head == 0]


def numbered(shape: tuple[int, ...], dtype: str = "float64") -> Array:
    """Return an array of distinct elements, exact in both dtypes (below 2**24)."""
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def check_split(x: Array, n_head: int) -> None:
    """Check both round trips and the place of each element; a round trip alone would pass without the transpose."""
    B, T, D = *x.shape[:2], x.shape[2] // n_head
    heads = split_heads(x, n_head)
    assert heads.shape == (B, n_head, T, D)
    assert heads.dtype == x.dtype
    b, h, t, d = np.indices(heads.shape)
    np.testing.assert_array_equal(heads, x[b, t, h * D + d])
    np.testing.assert_array_equal(merge_heads(heads), x)
    contiguous = np.ascontiguousarray(heads)
    np.testing.assert_array_equal(split_heads(merge_heads(contiguous), n_head), contiguous)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_every_divisor_of_every_width_up_to_256(widths: range) -> None:
    """Plain runs try every third width."""
    for n_embd, n_head in ((width, n_head) for width in widths[:: examples(3, 1)] for n_head in divisors(width)):
        check_split(numbered((2, 3, n_embd)), n_head)
        check_split(numbered((1, 1, n_embd), "float32"), n_head)
        check_split(numbered((2, 3, 3 * n_embd), "float32")[:, :, n_embd : 2 * n_embd], n_head)  # as q, k and v lie


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_every_other_number_of_heads_is_refused(widths: range) -> None:
    """Plain runs try every third width."""
    for n_embd in widths[:: examples(3, 1)]:
        for n_head in set(range(1, n_embd + 9)) - set(divisors(n_embd)):
            with pytest.raises(NpgptError) as error:  # a pattern for each number would be compiled
                Config(vocab_size=9, n_positions=9, n_layer=1, n_embd=n_embd, n_head=n_head)
            assert f"n_embd = {n_embd} is not divisible by n_head = {n_head}" in str(error.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    config = PUBLISHED[name]
    assert config.head_width == 64
    assert config.n_embd == config.n_head * 64
    check_split(numbered((1, 5, config.n_embd)), config.n_head)


@st.composite
def splits(draw: st.DrawFn) -> tuple[Array, int]:
    n_head, D = draw(st.integers(1, 64)), draw(st.integers(1, 64))
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 5)), n_head * D
    dtype = draw(st.sampled_from(["float32", "float64"]))
    layout = draw(st.sampled_from(["contiguous", "part of a row", "every other token", "transposed"]))
    if layout == "part of a row":  # as q lies in the output of c_attn
        return numbered((*shape[:2], 3 * shape[2]), dtype)[:, :, shape[2] : 2 * shape[2]], n_head
    if layout == "every other token":
        return numbered((shape[0], 2 * shape[1], shape[2]), dtype)[:, ::2], n_head
    if layout == "transposed":
        return numbered(shape[::-1], dtype).T, n_head
    return numbered(shape, dtype), n_head


@given(splits())
def test_any_layout_batch_length_and_dtype(case: tuple[Array, int]) -> None:
    check_split(*case)


@given(st.integers(257, 20_000), st.data())
def test_wide_models(n_embd: int, data: Any) -> None:
    n_head = data.draw(st.sampled_from(divisors(n_embd)))
    check_split(numbered((1, 2, n_embd)), n_head)


def test_the_check_sees_a_missing_transpose() -> None:
    """A bare reshape has the right shape and round-trips, but is not a split."""
    x = numbered((1, 4, 6))
    wrong = x.reshape(1, 2, 4, 3)
    assert wrong.shape == split_heads(x, 2).shape
    assert not np.array_equal(wrong, split_heads(x, 2))
    assert split_heads(x, 2)[0, 1, 0].tolist() == [3.0, 4.0, 5.0]
