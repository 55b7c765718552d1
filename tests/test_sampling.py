from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npgpt.errors import NpgptError
from npgpt.parameters import Array
from npgpt.text.sampling import Sampling, adjusted, min_p, next_token, repetition_penalty, top_k, top_p
from tests.support.thorough import examples

LOGITS = st.lists(st.floats(-20, 20), min_size=1, max_size=30).map(np.array)
SPREAD = np.log([0.5, 0.25, 0.15, 0.06, 0.04])


def kept(filtered: Array) -> set[int]:
    return set(np.flatnonzero(np.isfinite(filtered)).tolist())


def probabilities(logits: Array) -> list[float]:
    e = [math.exp(float(v) - float(logits.max())) for v in logits]
    return [v / math.fsum(e) for v in e]


@given(LOGITS, st.integers(1, 40))
def test_top_k_by_brute_force(logits: Array, k: int) -> None:
    expected = {i for i, v in enumerate(logits) if sum(w > v for w in logits) < k}  # equals of the last are kept
    assert kept(top_k(logits, k)) == expected


@given(LOGITS, st.floats(0.001, 1))
def test_top_p_is_the_smallest_set_that_reaches_p(logits: Array, p: float) -> None:
    chances, result = probabilities(logits), kept(top_p(logits, p))
    assert math.fsum(chances[i] for i in result) >= p - 1e-12
    least = min(result, key=lambda i: chances[i])
    assert p == 1 or math.fsum(chances[i] for i in result - {least}) < p + 1e-12
    assert all(logits[i] >= logits[j] for i in result for j in set(range(len(logits))) - result)


def test_top_p_keeps_the_token_that_crosses_the_threshold() -> None:
    assert kept(top_p(SPREAD, 0.6)) == {0, 1}  # 0.5 is below 0.6; 0.75 crosses it
    assert kept(top_p(SPREAD, 0.0001)) == {0}
    assert kept(top_p(SPREAD, 0.8)) == {0, 1, 2}
    assert kept(top_p(SPREAD, 1)) == {0, 1, 2, 3, 4}
    assert len(kept(top_p(np.array([0.0, -50.0, -60.0]), 1))) == 3  # their rounded sum is 1 after the first


@given(LOGITS, st.floats(0, 1))
def test_min_p_by_brute_force(logits: Array, p: float) -> None:
    chances = probabilities(logits)
    threshold = p * max(chances)
    result = kept(min_p(logits, p))
    assert {i for i, c in enumerate(chances) if c > threshold * (1 + 1e-9)} <= result
    assert result <= {i for i, c in enumerate(chances) if c >= threshold * (1 - 1e-9)}
    assert int(logits.argmax()) in result


def test_float32_logits_are_drawn_from_as_float64() -> None:
    """The error of a float32 cumulative sum over 50,000 probabilities would exceed this token's share."""
    logits = np.zeros(50_000, np.float32)
    counts = np.zeros(50_000, int)
    generator, probe = np.random.default_rng(3), np.random.default_rng(3)
    for _ in range(200):
        counts[next_token(logits, Sampling(temperature=1), generator)] += 1
    expected = np.bincount((np.floor(probe.random(200) * 50_000 + 1e-9)).astype(int), minlength=50_000)
    np.testing.assert_array_equal(counts, expected)


def test_min_p_literal() -> None:
    assert kept(min_p(np.array([0.0, 0.0, -1.0]), 1)) == {0, 1}
    assert kept(min_p(SPREAD, 0.2)) == {0, 1, 2}
    assert kept(min_p(SPREAD, 0)) == {0, 1, 2, 3, 4}


@given(LOGITS, st.lists(st.integers(-40, 40)), st.floats(0.01, 100))
def test_repetition_penalty_by_brute_force(logits: Array, seen: list[int], penalty: float) -> None:
    expected = [
        value if i not in seen else value / penalty if value > 0 else value * penalty
        for i, value in enumerate(logits.tolist())
    ]
    assert repetition_penalty(logits, seen, penalty).tolist() == expected


def test_repetition_penalty_literal() -> None:
    logits = np.array([3.0, -3.0, 0.0, 5.0, -np.inf, 4.0])
    for array in (logits, logits.astype(np.float32)):
        array.flags.writeable = False
        penalised = repetition_penalty(array, [0, 1, 2, 4, 0, 0, -1, 6, 2**40], 1.5)
        assert penalised.tolist() == [2.0, -4.5, 0.0, 5.0, -np.inf, 4.0]
        assert penalised.dtype == array.dtype
        assert repetition_penalty(array, [], 1.5).tolist() == array.tolist()
        assert not np.shares_memory(repetition_penalty(array, [], 1.5), array)


def test_the_penalty_comes_first_and_to_greedy_too() -> None:
    """The penalty applies to the model's own logits; after subtracting the maximum none would be positive."""
    logits, generator = np.array([6.0, 5.0, 2.0, -1.0]), np.random.default_rng(0)
    for temperature in (0, 1e-6):
        sampling = Sampling(temperature=temperature, repetition_penalty=2)
        assert next_token(logits, sampling, generator, [0]) == 1
        assert next_token(logits, sampling, generator, [0, 1]) == 0
        assert next_token(logits, sampling, generator, np.array([0, 0, 1, 1, 2])) == 0
        assert next_token(logits, sampling, generator) == 0
    shown = adjusted(logits, Sampling(temperature=2, repetition_penalty=2, top_k=3), [0, 3])
    assert shown.tolist() == [-1.0, 0.0, -1.5, -np.inf]
    likelier = adjusted(logits, Sampling(temperature=1, repetition_penalty=0.5), [1, 3])
    assert likelier.tolist() == [-4.0, 0.0, -8.0, -10.5]


def test_a_penalty_that_no_number_holds_is_refused() -> None:
    for logits, penalty in ((np.array([9.0, 1.0]), 5e-324), (np.array([-9.0, -np.inf]), 1e308)):
        with pytest.raises(NpgptError, match="makes the logits overflow: use a value near 1"):
            next_token(logits, Sampling(repetition_penalty=penalty), np.random.default_rng(0), [0])
    assert next_token(np.array([-9.0, -1.0]), Sampling(repetition_penalty=1e308), np.random.default_rng(0), [0]) == 1


@given(LOGITS, st.floats(0.05, 50))
def test_temperature_by_brute_force(logits: Array, temperature: float) -> None:
    """The id drawn is the one in whose share of the cumulative softmax(logits / T) the random number falls."""
    chances = probabilities(logits / temperature)
    e = np.exp(adjusted(logits, Sampling(temperature=temperature)))
    np.testing.assert_allclose(
        e / e.sum(), chances, rtol=1e-10, atol=1e-300
    )  # exp(x) is off by x's rounding, |x| ≤ 800
    random = float(np.random.default_rng(5).random())
    token_id = next_token(logits, Sampling(temperature=temperature), np.random.default_rng(5))
    assert math.fsum(chances[:token_id]) - 1e-10 <= random <= math.fsum(chances[: token_id + 1]) + 1e-10


@given(LOGITS)
def test_filters_leave_their_input_and_what_they_keep_alone(logits: Array) -> None:
    logits.flags.writeable = False
    for filtered in (top_k(logits, 3), top_p(logits, 0.7), min_p(logits, 0.1)):
        np.testing.assert_array_equal(filtered[np.isfinite(filtered)], logits[np.isfinite(filtered)])


def test_greedy_takes_the_first_of_equals_and_draws_nothing() -> None:
    generator = np.random.default_rng(0)
    state = generator.bit_generator.state
    assert next_token(np.array([1.0, 3.0, 3.0], np.float32), Sampling(temperature=0), generator) == 1
    assert generator.bit_generator.state == state


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1), [0.5, 0.25, 0.15, 0.06, 0.04]),
        (Sampling(temperature=0.5), [0.25, 0.0625, 0.0225, 0.0036, 0.0016]),
        (Sampling(temperature=1, top_k=2), [2, 1, 0, 0, 0]),
        (Sampling(temperature=1, top_p=0.6), [2, 1, 0, 0, 0]),
        (Sampling(temperature=1, min_p=0.2), [50, 25, 15, 0, 0]),
        (Sampling(temperature=2, top_k=3, top_p=0.5), [math.sqrt(2), 1, 0, 0, 0]),
        (Sampling(temperature=0.8), [0.5**1.25, 0.25**1.25, 0.15**1.25, 0.06**1.25, 0.04**1.25]),
        (Sampling(temperature=2), [0.5**0.5, 0.25**0.5, 0.15**0.5, 0.06**0.5, 0.04**0.5]),
        (Sampling(temperature=1e9), [1, 1, 1, 1, 1]),
        (Sampling(temperature=1e-9), [1, 0, 0, 0, 0]),
        (Sampling(temperature=1e-320), [1, 0, 0, 0, 0]),
    ],
)
def test_frequencies(sampling: Sampling, expected: list[float]) -> None:
    n, generator = examples(2_500, 20_000), np.random.default_rng(7)
    drawn = np.bincount([next_token(SPREAD, sampling, generator) for _ in range(n)], minlength=5)
    chances = np.array(expected) / sum(expected)
    # five standard deviations of a binomial count: the seed is fixed, so this passes or fails for ever
    assert (np.abs(drawn - n * chances) <= 5 * np.sqrt(n * chances * (1 - chances))).all()


def test_what_is_filtered_out_is_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf])

    class Ends(np.random.Generator):
        def __init__(self, value: float) -> None:
            super().__init__(np.random.PCG64(0))
            self.value = value

        def random(self, *arguments: Any, **keywords: Any) -> Any:
            return self.value

    for value in (0.0, 1 - 2**-53):
        assert next_token(logits, Sampling(temperature=1), Ends(value)) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_refused(bad: float) -> None:
    for logits in (np.array([0.0, bad]), np.full(2, -np.inf)):
        with pytest.raises(NpgptError, match="logits are not finite"):
            next_token(logits, Sampling(), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 .* not -0.1"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top-k, .* must be at least 0, not -1"),
        ({"top_p": 0}, "top-p .* not 0"),
        ({"top_p": 1.01}, "top-p .* not 1.01"),
        ({"min_p": -0.1}, "min-p .* not -0.1"),
        ({"min_p": math.nan}, "min-p"),
        ({"repetition_penalty": 0}, "repetition-penalty must be a finite number above 0, not 0"),
        ({"repetition_penalty": -1.5}, "repetition-penalty .* not -1.5"),
        ({"repetition_penalty": math.inf}, "repetition-penalty .* not inf"),
        ({"repetition_penalty": math.nan}, "repetition-penalty .* not nan"),
    ],
)
def test_values_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(NpgptError, match=message):
        Sampling(**fields)
