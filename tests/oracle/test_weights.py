"""Comparing two sets of weights: every tensor is accounted for, and each kind of difference has its message."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from npgpt.oracle.ways import LEAST
from npgpt.oracle.weights import compare_weights, listed, what_cannot_show
from npgpt.parameters import Array
from tests.support.models import random_arrays, small

CONFIG = small(n_embd=32, n_head=4, n_layer=3)
ARRAYS = random_arrays(CONFIG)
RNG = np.random.default_rng(1)
Change = Callable[[Array], Array]
UP, DOWN, C_ATTN, GAIN = "h.1.mlp.c_fc.weight", "h.1.mlp.c_proj.weight", "h.1.attn.c_attn.weight", "h.2.ln_1.weight"


def problems(name: str, change: Change, dtype: str = "float32") -> list[str]:
    """Return the messages about arrays with one changed, stored in a module's dtype."""
    theirs = ARRAYS | {name: change(ARRAYS[name].copy()).astype(np.float32).astype(np.float64)}
    found = compare_weights(theirs, ARRAYS, dtype)
    assert found.notes == []
    return found.problems


def on_a_grid(bits: int, size: int, across: bool, uneven: bool = False) -> Change:
    """Return numbers that are whole multiples of a scale per group, in a row or across rows."""

    def change(x: Array) -> Array:
        turned = x.T if across else x
        groups = turned.reshape(-1, size)
        low = groups.min(axis=1, keepdims=True) if uneven else 0.0
        most = np.abs(groups - low).max(axis=1, keepdims=True)
        step = most / (2**bits - 1 if uneven else 2 ** (bits - 1) - 1)
        rough = (low + np.round((groups - low) / step) * step).reshape(turned.shape)
        return np.asarray(rough.T if across else rough)

    return change


@pytest.mark.parametrize(
    ("name", "change", "how"),
    [
        (GAIN, lambda x: x * 0, "is all 0: dropped, or never loaded"),
        (GAIN, np.ones_like, "is all 1: never loaded?"),
        ("wte.weight", lambda x: np.where(np.arange(len(x))[:, None] == 3, np.nan, x), "is NaN or infinite in row 3"),
        ("h.0.attn.c_proj.weight", lambda x: x.T, "is transposed"),
        (UP, lambda x: x.reshape(x.shape[::-1]).T, "is reshaped instead of transposed"),
        (
            C_ATTN,
            lambda x: np.concatenate([p.T for p in np.split(x, 3, axis=1)], axis=1),
            "transposed in each of q, k, v",
        ),
        (C_ATTN, lambda x: np.roll(x, 32, axis=1), "permuted: v, q, k instead of q, k, v"),
        (
            C_ATTN,
            lambda x: np.c_[x[:, :32] / 8**0.5, x[:, 32:]],
            "0.353553 times the reference's (only in its queries)",
        ),
        ("h.0.attn.c_attn.bias", lambda x: np.r_[x[:32], x[32:64] * 0, x[64:]], "or never loaded (only in its keys)"),
        (UP, lambda x: x * 1.0001, "is 1.0001 times the reference's"),
        (UP, lambda x: -x, "is -1 times the reference's"),
        ("ln_f.weight", lambda x: x - 1, "is the reference's plus -1"),
        ("wpe.weight", lambda x: np.roll(x, 1, axis=0), "is shifted by +1 rows: row 4 is the reference's row 3"),
        ("wpe.weight", lambda x: np.roll(x, -2, axis=0), "is shifted by -2 rows: row 1 is the reference's row 3"),
        ("wte.weight", lambda x: x[RNG.permutation(len(x))], "the reference's with its rows in a different order"),
        (UP, lambda x: x[:, RNG.permutation(x.shape[1])], "the reference's with its columns in a different order"),
        (
            UP,
            lambda x: RNG.permutation(x.ravel()).reshape(x.shape),
            "is made of the reference's numbers in a different order",
        ),
        (
            UP,
            lambda x: RNG.normal(0, 0.02, x.shape),
            "never loaded: still the initial values (mean 0, standard deviation 0.02)",
        ),
        (UP, lambda x: RNG.uniform(-(32**-0.5), 32**-0.5, x.shape), "the initial values (uniform within 1/sqrt(32))"),
        ("wpe.weight", lambda x: RNG.normal(0, 1, x.shape), "still the initial values (mean 0, standard deviation 1)"),
        (UP, lambda x: RNG.normal(0, 0.1, x.shape), "is unrelated to the reference's (correlation"),
        (
            GAIN,
            lambda x: ARRAYS["h.0.ln_1.weight"],
            "is from another block (h.0 instead of h.2): the blocks are in the wrong order",
        ),
        (GAIN, lambda x: ARRAYS["h.2.ln_2.weight"], "is the reference's h.2.ln_2.weight"),
        ("wte.weight", lambda x: np.r_[x[:30], x[30:] * 0], "is 0 in rows 30 to 39 and correct elsewhere"),
        (UP, lambda x: np.c_[x[:, :8] * 0, x[:, 8:]], "is 0 in columns 0 to 7 and correct elsewhere"),
        (UP, lambda x: np.r_[x[:3], x[3:4] + 0.01, x[4:]], "is different in row 3, by up to 0.01"),
        (UP, lambda x: x + RNG.normal(0, 1e-3, x.shape), "is different, by up to 0.00"),
        (UP, lambda x: x.astype(np.float16), "is rounded to float16"),
        (DOWN, on_a_grid(8, 128, across=True), "is quantised: 8 bits, one scale for each column"),
        (DOWN, on_a_grid(8, 32, across=True), "is quantised: 8 bits, one scale for each 32 numbers of a column"),
        (
            DOWN,
            on_a_grid(4, 32, across=True, uneven=True),
            "is quantised: 4 bits, one scale for each 32 numbers of a column",
        ),
        (DOWN, on_a_grid(8, 32, across=False), "is quantised: 8 bits, one scale for each row"),
        (DOWN, on_a_grid(8, 32 * 128, across=False), "is quantised: 8 bits, one scale for the whole tensor"),
    ],
)
def test_which_tensor_differs_and_how(name: str, change: Change, how: str) -> None:
    (problem,) = problems(name, change)
    assert problem.startswith(f"{name} is ")
    assert how in problem


def test_names_are_grouped() -> None:
    biases = {name: array * 0 for name, array in ARRAYS.items() if name.endswith("c_attn.bias")}
    assert compare_weights(ARRAYS | biases, ARRAYS, "float32").problems == [
        "h.*.attn.c_attn.bias are all 0: dropped, or never loaded"
    ]
    assert listed(["wte.weight", "h.0.ln_1.bias", "h.2.ln_1.bias", "ln_f.bias"], 3) == (
        "wte.weight, h.0.ln_1.bias, h.2.ln_1.bias and 1 more"
    )


def test_both_sides_are_looked_at() -> None:
    """A head, blocks or a tensor may exist on one side only."""
    head = RNG.uniform(-(32**-0.5), 32**-0.5, ARRAYS["wte.weight"].shape)
    more = random_arrays(small(n_embd=32, n_head=4, n_layer=4)) | ARRAYS
    cases: list[tuple[dict[str, Array], dict[str, Array], str]] = [
        (
            ARRAYS | {"lm_head.weight": head},
            ARRAYS,
            "never loaded: still the initial values (uniform within 1/sqrt(32)); the",
        ),
        (ARRAYS | {"lm_head.weight": head}, ARRAYS, "the reference's output head is its wte.weight (tied)"),
        (ARRAYS | {"lm_head.weight": ARRAYS["wte.weight"].reshape(32, 40).T}, ARRAYS, "reshaped instead of transposed"),
        (
            ARRAYS,
            ARRAYS | {"lm_head.weight": head},
            "lm_head.weight is wte.weight itself (tied), but the reference has its own",
        ),
        (more, ARRAYS, "the model has 4 blocks, the reference has 3"),
        (ARRAYS, more, "the model has 3 blocks, the reference has 4"),
        (ARRAYS | {"value.weight": head}, ARRAYS, "value.weight is not in the reference"),
        ({k: v for k, v in ARRAYS.items() if k != "ln_f.bias"}, ARRAYS, "ln_f.bias is missing"),
    ]
    for theirs, reference, problem in cases:
        (found,) = compare_weights(theirs, reference, "float32").problems
        assert problem in found
    tied = ARRAYS | {"lm_head.weight": ARRAYS["wte.weight"]}
    for one, other in ((tied, ARRAYS), (ARRAYS, tied), (tied, tied)):
        assert compare_weights(one, other, "float32").problems == []


def test_what_is_other_but_right_is_a_note() -> None:
    """A padded vocabulary, a shorter context and half precision are notes, not faults."""
    padded = ARRAYS | {
        "wte.weight": np.r_[ARRAYS["wte.weight"], np.zeros((8, 32))],
        "wpe.weight": ARRAYS["wpe.weight"][:16],
    }
    found = compare_weights(padded, ARRAYS, "float32")
    assert found.problems == []
    assert found.notes == [
        "wte.weight is of shape [48, 32], not [40, 32]: the first 40 rows are equal.",
        "wpe.weight is of shape [16, 32], not [24, 32]: the first 16 rows are equal.",
    ]
    wrong = compare_weights(padded | {"wte.weight": np.zeros((48, 32))}, ARRAYS, "float32").problems
    assert wrong == ["wte.weight is of shape [48, 32], not [40, 32]: the first 40 rows are different"]
    (few,) = compare_weights(ARRAYS | {"wte.weight": ARRAYS["wte.weight"][:30]}, ARRAYS, "float32").problems
    assert few.endswith("the first 30 rows are equal")
    half = {name: array.astype(np.float16).astype(np.float64) for name, array in ARRAYS.items()}
    assert compare_weights(half, ARRAYS, "float16").problems == []
    assert (
        "13 more are the reference's, rounded to the stored dtype, float16"
        in compare_weights(half, ARRAYS, "float16").notes[0]
    )
    assert "13 more are rounded to float16" in compare_weights(half, ARRAYS, "float32").problems[0]


@pytest.mark.parametrize("seed", range(100))
def test_noise_is_never_taken_for_a_grid_or_a_scale(seed: int) -> None:
    """This includes an outlier that dwarfs everything else."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(LEAST, 4 * LEAST))
    base = rng.standard_normal((size, 32)) * np.where(rng.random((size, 32)) < 0.02, 50, 1)
    reference = {"wte.weight": base}
    noisy = base + rng.normal(0, 10 ** rng.uniform(-5, -1), base.shape)
    (problem,) = compare_weights({"wte.weight": noisy}, reference, "float32").problems
    assert problem.startswith("wte.weight is different, by up to")


def test_parameters_that_hide_mistakes_are_told() -> None:
    assert what_cannot_show(ARRAYS, 3) == []
    fresh = {k: v * 0 if k.endswith("bias") else v**0 if v.ndim == 1 else v for k, v in ARRAYS.items()}
    assert what_cannot_show(fresh, 3) == [
        "h.*.ln_1.bias, h.*.attn.c_attn.bias, h.*.attn.c_proj.bias and 4 more: all 0 in the reference. A bias that is "
        "missing, added twice or added in the wrong place would not show there.",
        "h.*.ln_1.weight, h.*.ln_2.weight, ln_f.weight: all 1 in the reference. A LayerNorm without its gain, or with "
        "the gain of another, would not show there.",
    ]
