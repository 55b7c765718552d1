from __future__ import annotations

import math

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from npgpt.erf import erf


def test_erf_is_right_to_the_last_digits_over_the_whole_range() -> None:
    """Points cover the smallest to the largest numbers, densely where erf bends and at the formula's ends."""
    dense = np.linspace(-7, 7, 400_001)
    seam = 0.5 + np.linspace(-0.04, 0.04, 80_001)
    scales = np.concatenate([sign * np.logspace(-320, 308, 5000) for sign in (1, -1)])
    x = np.concatenate([dense, seam, -seam, scales, [0.0, -0.0, 5.921587195794508, 6, 26.6]])
    truth = np.array([math.erf(value) for value in x])
    assert (np.abs(erf(x) - truth) <= 4 * np.spacing(np.abs(truth))).all()


@given(st.floats(allow_nan=False))
@example(math.inf)
@example(-math.inf)
def test_erf_anywhere(x: float) -> None:
    value = float(erf(np.array([x]))[0])
    assert abs(value - math.erf(x)) <= 4 * np.spacing(abs(math.erf(x)))
    assert value == -float(erf(np.array([-x]))[0])


def test_erf_in_float32() -> None:
    x = np.linspace(-7, 7, 100_001, dtype=np.float32)
    assert erf(x).dtype == np.float32
    assert np.abs(erf(x) - np.array([math.erf(value) for value in x])).max() < 2e-7


def test_erf_literals() -> None:
    """Abramowitz and Stegun, table 7.1."""
    table = {0.0: 0.0, 0.5: 0.5204998778, 1.0: 0.8427007929, 1.5: 0.9661051465, 2.0: 0.9953222650}
    np.testing.assert_allclose(erf(np.array(list(table))), list(table.values()), atol=5e-11)
    assert math.isnan(float(erf(np.array([math.nan]))[0]))
    assert math.copysign(1, float(erf(np.array([-0.0]))[0])) == -1
