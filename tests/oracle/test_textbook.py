"""The second derivation of GPT-2, its arithmetic and its symmetries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npgpt import parameters
from npgpt.model import forward
from npgpt.oracle.arithmetic import UNIT, as_computed, plain, rounded
from npgpt.oracle.rounding import redraw
from npgpt.oracle.textbook import Pass, stages, textbook
from npgpt.parameters import Array
from tests.support.models import SHAPES, random_arrays, random_ids, small


def recorded(shape: str) -> tuple[dict[str, Array], Pass]:
    config = SHAPES[shape]
    arrays, ids = random_arrays(config), random_ids(config, (2, 9))
    found: dict[str, Array] = {}
    forward(parameters.from_arrays(config, arrays), config, ids, record=found.__setitem__)
    return found, Pass(textbook(config, arrays), ids)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_stage_is_the_models(shape: str) -> None:
    """In float64, two derivations' sums of a few hundred products of size 1 differ by about 1e-15."""
    found, run = recorded(shape)
    assert set(found) <= set(stages(SHAPES[shape].n_layer))
    for stage, mine in found.items():
        theirs = run[stage][0] if stage == "wpe" else run[stage]  # [T, C] there
        assert theirs.dtype == np.float64
        np.testing.assert_allclose(theirs, mine, rtol=1e-12, atol=1e-13, err_msg=stage)


def test_a_pass_needs_no_deep_stack() -> None:
    config = small(n_layer=400, n_embd=2, n_head=1, vocab_size=3)
    assert np.isfinite(Pass(textbook(config, random_arrays(config)), random_ids(config, (1, 3)))["logits"]).all()


def test_a_known_stage_is_taken_as_given() -> None:
    found, run = recorded("3 heads x 7")
    again = Pass(run.book, run.token_ids, {"h.0": found["h.0"] + np.arange(21)})
    other = Pass(run.book, run.token_ids, {"h.0": found["h.0"]})
    np.testing.assert_allclose(other["logits"], found["logits"], atol=1e-12)
    assert np.abs(again["logits"] - found["logits"]).max() > 1e-3
    assert np.abs(again.compute("h.0") - found["h.0"]).max() < 1e-12


@given(st.lists(st.floats(-60000, 60000, width=32), min_size=1))
def test_float16_is_numpys_own(values: list[float]) -> None:
    x = np.array(values, np.float32)
    np.testing.assert_array_equal(rounded(x, "float16"), x.astype(np.float16).astype(np.float32))


def test_bfloat16_by_hand() -> None:
    """With 8 significant bits, the tie 1 + 1/256 rounds to 1, 1 + 3/256 to 1 + 4/256; infinity and NaN stay."""
    x = np.array([1, 1 + 1 / 256, 1 + 3 / 256, -1 - 1 / 128, 3.4e38, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(
        rounded(x, "bfloat16"), np.array([1, 1, 1 + 4 / 256, -1 - 1 / 128, np.inf, np.inf, np.nan], np.float32)
    )


@given(st.floats(-(2.0**100), 2.0**100, width=32))
def test_bfloat16_is_the_nearest(value: float) -> None:
    x = np.array([value], np.float32)
    assert abs(float(rounded(x, "bfloat16")[0]) - value) <= UNIT["bfloat16"] * abs(value) + 1e-38


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_operation_is_rounded(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, y = (as_computed(rng.standard_normal((5, 5)), dtype) for _ in range(2))
    for result in (x + y, x @ y, np.exp(x), x.sum(axis=-1), x.mean(axis=0), x / 3, x.max(axis=1), x[1:].T * y[:, 1:]):
        assert type(result) is type(x)
        np.testing.assert_array_equal(plain(result), plain(rounded(np.asarray(result).view(np.ndarray), dtype)))
    exact = plain(x) @ plain(y)
    assert 0 < np.abs(plain(x @ y) - exact).max() <= 2 * UNIT[dtype] * np.abs(exact).max()
    x += y
    np.testing.assert_array_equal(plain(x), plain(rounded(plain(x).astype(np.float32), dtype)))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_redrawn_model_is_the_same_function(shape: str) -> None:
    """Each of its stages equals the model's after restoring the order."""
    config = SHAPES[shape]
    arrays, ids = random_arrays(config), random_ids(config, (2, 7))
    order = redraw(config, np.random.default_rng(1))
    usual, other = Pass(textbook(config, arrays), ids), Pass(textbook(config, order.tensors(config, arrays)), ids)
    for stage in stages(config.n_layer):
        np.testing.assert_allclose(
            order.restored(stage, other[stage]), usual[stage], rtol=1e-11, atol=1e-12, err_msg=stage
        )
        np.testing.assert_array_equal(order.restored(stage, order.drawn(stage, usual[stage])), usual[stage])
    assert np.abs(other["h.0"] - usual["h.0"]).max() > 1e-3  # it is another order
