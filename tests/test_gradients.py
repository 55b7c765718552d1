"""The backward pass: literal values, finite differences of every parameter and stage, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npgpt import gradients, parameters
from npgpt.config import Config
from npgpt.errors import NpgptError
from npgpt.gradients import loss, loss_and_gradients
from npgpt.model import forward
from npgpt.oracle.textbook import Pass, textbook
from npgpt.parameters import Array, Kept
from tests.support.models import SHAPES, random_arrays, random_ids, random_parameters, small
from tests.support.thorough import examples

IGNORED = -100


def slope(f: Callable[[float], float], step: float = 1e-4) -> float:
    """Return df/dx at 0.

    Two central differences, whose errors c·step² cancel in (4 d(step / 2) − d(step)) / 3. What is left is of the order
    of step⁴ = 1e-16 and of rounding, 2⁻⁵³ · |f| / step ≈ 4e-12 for a loss near 4.
    """

    def difference(h: float) -> float:
        return (f(h) - f(-h)) / (2 * h)

    return (4 * difference(step / 2) - difference(step)) / 3


def agrees(found: float, expected: float, size: float) -> bool:
    """Return whether a slope is the expected one; size: the largest that the direction could give.

    The fifth derivative, which multiplies step⁴, is many times the first where a LayerNorm has three channels.
    """
    return abs(found - expected) <= 1e-8 * max(size, 1e-2)


configs = st.builds(
    small,
    n_head=st.just(3),
    n_embd=st.sampled_from([3, 12, 21]),
    n_layer=st.integers(1, 3),
    n_inner=st.sampled_from([None, 5]),
    tie_word_embeddings=st.booleans(),
    activation_function=st.sampled_from(["gelu", "gelu_new"]),
    scale_attn_weights=st.booleans(),
    scale_attn_by_inverse_layer_idx=st.booleans(),
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Config, Any, Any]:
    """Return a configuration, ids [B, T], some of them twice, and targets [B, T], some of them ignored."""
    config = draw(configs)
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    ids = np.array(draw(st.lists(st.lists(st.integers(0, 4), min_size=T, max_size=T), min_size=B, max_size=B)))
    targets = random_ids(config, (B, T), seed=draw(st.integers(0, 9)))
    targets[np.random.default_rng(draw(st.integers(0, 9))).random((B, T)) < 0.3] = IGNORED
    targets[0, -1] = 7
    return config, ids, targets


@given(cases(), st.integers(0, 2**31))
@settings(max_examples=examples(8, 60))
def test_gradients_of_parameters_are_slopes(case: tuple[Config, Any, Any], seed: int) -> None:
    config, ids, targets = case
    arrays, rng = random_arrays(config), np.random.default_rng(seed)
    value, found = loss_and_gradients(parameters.from_arrays(config, arrays), config, ids, targets)
    assert value == loss(parameters.from_arrays(config, arrays), config, ids, targets)
    gradient = parameters.to_arrays(found)
    assert {name: array.shape for name, array in gradient.items()} == parameters.schema(config)
    for name, array in arrays.items():
        direction = rng.standard_normal(array.shape)
        direction /= np.sqrt(np.square(direction).sum())

        def along(h: float) -> float:
            moved = parameters.from_arrays(config, arrays | {name: array + h * direction})  # noqa: B023
            return loss(moved, config, ids, targets)

        size = float(np.sqrt(np.square(gradient[name]).sum()))
        assert agrees(slope(along), float((gradient[name] * direction).sum()), size), name


@given(cases(), st.integers(0, 2**31))
@settings(max_examples=examples(8, 60))
def test_gradients_of_stages_are_slopes(case: tuple[Config, Any, Any], seed: int) -> None:
    """The textbook computes the loss from any stage that is given to it."""
    config, ids, targets = case
    arrays, rng = random_arrays(config), np.random.default_rng(seed)
    book, model = textbook(config, arrays), parameters.from_arrays(config, arrays)
    stages: dict[str, Array] = {}
    found: dict[str, Array] = {}
    forward(model, config, ids, record=stages.__setitem__)
    loss_and_gradients(model, config, ids, targets, record=found.__setitem__)
    assert found.keys() == {f"d.{name}" for name in stages}
    for name, array in stages.items():
        gradient = found[f"d.{name}"]
        assert gradient.shape == array.shape
        direction = np.where(np.isfinite(array), rng.standard_normal(array.shape), 0)
        direction /= np.sqrt(np.square(direction).sum())

        def along(h: float) -> float:
            logits = Pass(book, ids, {name: array + h * direction})["logits"]  # noqa: B023
            return gradients.cross_entropy(logits, targets, IGNORED)

        size = float(np.sqrt(np.square(gradient).sum()))
        assert agrees(slope(along), float((gradient * direction).sum()), size), name


def test_literal_cross_entropy() -> None:
    """Two ids of equal logits: the loss is ln 2, and the gradient ½ off the target and −½ at it."""
    logits, targets = np.zeros((1, 2, 2)), np.array([[1, IGNORED]])
    assert gradients.cross_entropy(logits, targets, IGNORED) == pytest.approx(np.log(2), abs=1e-15)
    assert gradients.cross_entropy_backward(logits, targets, IGNORED).tolist() == [[[0.5, -0.5], [0, 0]]]


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[[3e38, -3e38]]], np.float32)
    with np.errstate(over="ignore"):  # −3e38 − 3e38 is −∞, whose exp is 0
        assert gradients.cross_entropy(logits, np.array([[0]]), IGNORED) == 0


def test_literal_softmax() -> None:
    y = np.array([0.25, 0.75])
    assert gradients.softmax_backward(np.array([1.0, 0.0]), y).tolist() == [0.1875, -0.1875]


def test_literal_derivatives_of_gelu() -> None:
    """At 0 both are ½; far out 0 and 1; at 1 those of 50 digits of precision."""
    x = np.array([-30.0, 0.0, 30.0, 1.0])
    assert gradients.gelu_derivative(x).tolist() == pytest.approx([0, 0.5, 1, 1.0829640838457826], abs=1e-15)
    assert gradients.gelu_erf_derivative(x).tolist() == pytest.approx([0, 0.5, 1, 1.0833154705876864], abs=1e-15)


def test_literal_layer_norm() -> None:
    """x = (1, −1) is normalised to itself: what dy changes in it is taken away by the mean and by the variance."""
    dx, d = gradients.layer_norm_backward(np.array([[3.0, 5.0]]), np.array([[1.0, -1.0]]), np.ones(2), 0.0)
    assert dx.tolist() == [[0, 0]]
    assert (d.weight.tolist(), d.bias.tolist()) == ([3, -5], [3, 5])


def test_literal_linear() -> None:
    x, weight, dy = np.array([[1.0, 2], [3, 4]]), np.array([[1.0, 0, 2], [0, 1, 3]]), np.array([[1.0, 0, 0], [0, 1, 1]])
    dx, d = gradients.linear_backward(dy, x, weight)
    assert dx.tolist() == [[1, 0], [2, 4]]
    assert (d.weight.tolist(), d.bias.tolist()) == ([[1, 3, 3], [2, 4, 4]], [1, 1, 1])


def test_a_row_that_is_used_twice_gets_both_gradients() -> None:
    d = gradients.embedding_backward(np.array([[[1.0], [2], [4]]]), np.array([[2, 0, 2]]), np.zeros((3, 1)))
    assert d.weight.tolist() == [[2], [0], [5]]


def test_a_key_bias_has_no_gradient() -> None:
    """A key's bias moves all scores of a query alike, and softmax does not see that."""
    config = SHAPES["3 heads x 7"]
    _, found = loss_and_gradients(random_parameters(config), config, random_ids(config, (2, 9)))
    for block in found.h:
        query, key, value = np.split(block.attn.c_attn.bias, 3)
        assert np.abs(key).max() < 1e-15 < 1e-4 < min(np.abs(query).max(), np.abs(value).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_stays_float32_and_agrees(shape: str) -> None:
    config = SHAPES[shape]
    ids = random_ids(config, (2, 9))
    _, exact = loss_and_gradients(random_parameters(config), config, ids)
    seen: dict[str, Array] = {}
    value, found = loss_and_gradients(random_parameters(config, dtype="float32"), config, ids, record=seen.__setitem__)
    assert type(value) is float
    assert {array.dtype for array in seen.values()} == {np.dtype("float32")}
    reference = parameters.to_arrays(exact)
    for name, array in parameters.to_arrays(found).items():
        assert array.dtype == np.float32
        scale = np.abs(reference[name]).max()
        assert np.abs(array - reference[name]).max() <= 1e-5 * max(scale, 1e-4), name


def test_the_next_token_is_the_target() -> None:
    config = SHAPES["1 head"]
    model, ids = random_parameters(config), random_ids(config, (2, 5))
    targets = np.concatenate([ids[:, 1:], [[IGNORED]] * 2], axis=1)
    assert loss(model, config, ids) == loss(model, config, ids, targets) == loss(model, config, ids, targets - 0)
    assert loss(model, config, ids[0]) == loss(model, config, ids[:1])


def test_ignored_targets_do_not_count() -> None:
    config = SHAPES["1 head"]
    model, ids, targets = random_parameters(config), random_ids(config, (1, 6)), random_ids(config, (1, 6), seed=1)
    targets[:, 4:] = IGNORED
    expected = loss(model, config, ids[:, :4], targets[:, :4])
    assert loss(model, config, ids, targets) == pytest.approx(expected, rel=1e-14)
    assert loss(model, config, ids, np.where(targets < 0, 39, targets), ignore_index=39) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ids", "targets", "message"),
    [
        ([1], None, "no target counts"),
        ([1, 2], [IGNORED, IGNORED], "no target counts"),
        ([1, 2], [1], r"targets are \[1, 1\] and must be as token_ids are, \[1, 2\]"),
        ([1, 2], [1, 40], "token id 40"),
        ([1, 2], [1, -1], "token id -1"),
        ([1, 2], [1.0, 2.0], "targets"),
        ([1, 40], None, "token id 40"),
    ],
)
def test_what_is_refused(ids: Any, targets: Any, message: str) -> None:
    config = SHAPES["1 head"]
    for function in (loss, loss_and_gradients):
        with pytest.raises(NpgptError, match=message):
            function(random_parameters(config), config, ids, targets)


def test_what_is_kept_is_what_the_docstring_says() -> None:
    """10 C + 2 F numbers a token in a block; q, k and v are views of c_attn's output."""
    config = SHAPES["3 heads x 7"]
    kept = Kept()
    forward(random_parameters(config), config, random_ids(config, (2, 9)), record=kept)
    owned = [
        stage
        for name, stage in kept.items()
        if name.startswith("h.0") and name[4:] not in ("attn.q", "attn.k", "attn.v")
    ]
    assert sum(stage.size for stage in owned) == 18 * (10 * config.n_embd + 2 * config.inner_width)
    assert not {name for name in kept if name.endswith(("scores", "weights"))}
    assert all(np.shares_memory(kept[f"h.0.attn.{part}"], kept["h.0.attn.c_attn"]) for part in "qkv")
