"""Single parts as functions; tests/parity has modules."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt import model
from npgpt.errors import NpgptError
from npgpt.parameters import Array
from tests.support.models import random_arrays, small

CONFIG = small(n_embd=24, n_head=4, n_layer=1)
WEIGHTS = {name.removeprefix("h.0."): array for name, array in random_arrays(CONFIG).items() if name.startswith("h.0.")}


def attention(x: Array, scale: float = 6**-0.5, merge: bool = True, heads: int = 4) -> Array:
    c_attn = x @ WEIGHTS["attn.c_attn.weight"] + WEIGHTS["attn.c_attn.bias"]
    q, k, v = (model.split_heads(part, heads) for part in np.split(c_attn, 3, axis=-1))
    out = model.attention(q, k, v, scale)
    return (model.merge_heads(out) if merge else out.reshape(x.shape)) @ WEIGHTS["attn.c_proj.weight"] + WEIGHTS[
        "attn.c_proj.bias"
    ]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, ""),
        ({"scale": 1.0}, "attention scale missing"),
        ({"scale": 24**-0.5}, "attention scaled by C"),
        ({"merge": False}, "heads merged without transpose"),
        ({"heads": 2}, "n_head 2"),
    ],
)
def test_attention(options: Any, name: str) -> None:
    if "heads" in options:
        options = options | {"scale": 12**-0.5}
    report = npgpt.check_part("attention", lambda x: attention(x, **options), weights=WEIGHTS, n_head=4)
    assert report.names == ([name] if name else []), str(report)
    assert report.matches == (not name)


def test_attention_with_another_width_of_input() -> None:
    """The book's third chapter has attention from width 3 to width 2."""
    rng = np.random.default_rng(0)
    weights = {"attn.c_attn.weight": rng.standard_normal((3, 6)), "attn.c_proj.weight": rng.standard_normal((2, 2))}
    weights |= {"attn.c_attn.bias": rng.standard_normal(6), "attn.c_proj.bias": rng.standard_normal(2)}

    def small_attention(x: Array, scale: float = 1.0) -> Array:
        c_attn = x @ weights["attn.c_attn.weight"] + weights["attn.c_attn.bias"]
        q, k, v = (model.split_heads(part, 2) for part in np.split(c_attn, 3, axis=-1))
        merged = model.merge_heads(model.attention(q, k, v, scale))
        return merged @ weights["attn.c_proj.weight"] + weights["attn.c_proj.bias"]

    assert npgpt.check_part("attention", small_attention, weights=weights, n_head=2).matches
    report = npgpt.check_part("attention", lambda x: small_attention(x, 2**-0.5), weights=weights, n_head=2)
    assert report.names == ["attention scaled by C"]


def norm(x: Array, epsilon: float = 1e-5, ddof: int = 0) -> Array:
    root = np.sqrt(x.var(axis=-1, keepdims=True, ddof=ddof) + epsilon)
    result: Array = (x - x.mean(axis=-1, keepdims=True)) / root * WEIGHTS["ln_1.weight"] + WEIGHTS["ln_1.bias"]
    return result


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, ""),
        ({"epsilon": 1e-6}, "LayerNorm epsilon 1e-6"),
        ({"epsilon": 1e-12}, "LayerNorm epsilon 1e-12"),
        ({"ddof": 1}, "unbiased variance"),
    ],
)
def test_layer_norm(options: Any, name: str) -> None:
    report = npgpt.check_part("layer_norm", lambda x: norm(x, **options), weights=WEIGHTS)
    assert report.names == ([name] if name else []), str(report)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (model.gelu, ""),
        (model.gelu_erf, "erf GELU"),
        (lambda x: x / (1 + np.exp(-1.702 * x)), "quick GELU"),
        (lambda x: np.maximum(x, 0), "ReLU"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gelu(function: Any, name: str, dtype: str) -> None:
    assert npgpt.check_part("gelu", function, dtype=dtype).names == ([name] if name else [])


def test_only_what_a_part_can_have_is_not_excluded() -> None:
    assert not npgpt.check_part("gelu", model.gelu).diagnosis.left  # no other formula comes near, and it has no scores
    left = {entry.name for entry in npgpt.check_part("attention", attention, weights=WEIGHTS, n_head=4).diagnosis.left}
    assert "key bias dropped" in left
    assert not left & {"erf GELU", "final LayerNorm missing", "positions missing", "LayerNorm gain and bias swapped"}


def mlp(x: Array, activation: Any = model.gelu) -> Array:
    h = activation(x @ WEIGHTS["mlp.c_fc.weight"] + WEIGHTS["mlp.c_fc.bias"])
    result: Array = h @ WEIGHTS["mlp.c_proj.weight"] + WEIGHTS["mlp.c_proj.bias"]
    return result


def test_mlp_and_block() -> None:
    assert npgpt.check_part("mlp", mlp, weights=WEIGHTS).matches
    assert npgpt.check_part("mlp", lambda x: mlp(x, model.gelu_erf), weights=WEIGHTS).names == ["erf GELU"]

    def block(x: Array, residual: bool = True) -> Array:
        x = x * residual + attention(norm(x))
        centred = x - x.mean(axis=-1, keepdims=True)
        normal = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
        return x + mlp(normal * WEIGHTS["ln_2.weight"] + WEIGHTS["ln_2.bias"])

    assert npgpt.check_part("block", block, weights=WEIGHTS, n_head=4).matches
    wrong = npgpt.check_part("block", lambda x: block(x, residual=False), weights=WEIGHTS, n_head=4)
    assert wrong.names == ["attention residual missing"]


def test_an_input_in_another_order_of_memory() -> None:
    """Reordering units once misread such an array, which made every tolerance a thousand times too wide."""
    x = np.linspace(-6, 6, 768).reshape(64, 12).T
    report = npgpt.check_part("gelu", model.gelu_erf, x=x)
    assert report.names == ["erf GELU"], str(report)


def of_rows(x: Array) -> Array:
    if x.ndim != 2:
        raise ValueError("one row, please")
    found: Array = attention(x[None])[0]
    return found


def of_lists(x: Any) -> Any:
    if not isinstance(x, list):
        raise TypeError("lists")
    return mlp(np.array(x)).tolist()


def of_single_precision(x: Array) -> Array:
    if x.dtype != np.float32:
        raise TypeError("float32, please")
    return mlp(x).astype(np.float32)


def of_a_short_context(x: Array) -> Array:
    mask = np.zeros((6, 6))
    found: Array = attention(x) + 0 * (mask[: x.shape[1], : x.shape[1]] + np.zeros((x.shape[1], x.shape[1]))).sum()
    return found


@pytest.mark.parametrize(
    ("part", "function", "how"),
    [
        (
            "attention",
            of_rows,
            "a NumPy array of [T, C], row by row, since otherwise it raises ValueError: one row, please",
        ),
        ("mlp", of_lists, "lists, since otherwise it raises TypeError: lists"),
        ("mlp", of_single_precision, "a NumPy array of float32, since otherwise it raises TypeError: float32, please"),
        ("attention", of_a_short_context, "6 tokens in a NumPy array, since otherwise it raises ValueError: operands"),
    ],
)
def test_the_input_that_a_function_takes(part: str, function: Any, how: str) -> None:
    report = npgpt.check_part(part, function, weights=WEIGHTS, n_head=4)
    assert report.matches, str(report)
    assert any(note.startswith(f"It was given {how}") for note in report.notes), report.notes


def test_a_function_of_one_number() -> None:
    def gelu(x: float) -> float:
        return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    assert npgpt.check_part("gelu", gelu).matches
    assert npgpt.check_part("gelu", lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))).names == ["erf GELU"]


def test_weights_by_whole_names() -> None:
    whole = {f"h.3.{name}": array for name, array in WEIGHTS.items()}
    assert npgpt.check_part("mlp", mlp, weights=whole).matches
    assert npgpt.check_part("gelu", model.gelu, weights=whole).matches


def test_degenerate_weights_of_a_function_are_told() -> None:
    zero = WEIGHTS | {name: array * 0 for name, array in WEIGHTS.items() if name.startswith("mlp") and "bias" in name}
    report = npgpt.check_part("gelu", model.gelu)
    assert report.notes == []
    report = npgpt.check_part(
        "mlp", lambda x: model.gelu(x @ zero["mlp.c_fc.weight"]) @ zero["mlp.c_proj.weight"], weights=zero
    )
    assert report.matches
    assert "all 0 in the reference. A bias that is missing" in str(report)


def test_what_is_refused() -> None:
    for arguments, message in (
        ({"part": "head", "theirs": norm}, "'head' is not a part that npgpt checks"),
        ({"part": "attention", "theirs": attention, "n_head": 4}, "needs its weights"),
        ({"part": "attention", "theirs": attention, "weights": WEIGHTS}, "needs n_head="),
        ({"part": "mlp", "theirs": lambda x: mlp(x)[:, :1], "weights": WEIGHTS}, "mlp returns the shape"),
        ({"part": "mlp", "theirs": mlp, "weights": WEIGHTS, "x": np.ones((1, 2, 7))}, "takes an input of width 24"),
        (
            {"part": "mlp", "theirs": mlp, "weights": WEIGHTS | {"mlp.c_proj.bias": np.ones(5)}},
            r"mlp\.c_proj\.bias is \[5\] and must be \[24\]",
        ),
        ({"part": "gelu", "theirs": lambda x: 1 / 0}, "gelu raises ZeroDivisionError"),
        (
            {"part": "gelu", "theirs": lambda x: "text"},
            r"gelu returns the shape \[\] for an input of shape \[2, 12, 64\], not",
        ),
        ({"part": "gelu", "theirs": lambda x: None}, "gelu raises NpgptError: a NoneType is not an array of numbers"),
    ):
        with pytest.raises(NpgptError, match=message):
            npgpt.check_part(**arguments)  # type: ignore[arg-type]
