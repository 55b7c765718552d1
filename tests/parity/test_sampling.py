"""npgpt's penalty and filters, compared with transformers' logits processors.

Both must keep the same tokens, with bit-identical logits, since a filter does not change them. The definitions
differ in two points, which the test cases avoid:

- At the threshold of top-p and min-p, both compare rounded sums and ratios. Here thresholds lie midway between two
  tokens whose probabilities differ by orders of magnitude more than float32's rounding error.
- If tokens tie at top-p's threshold, npgpt takes the lowest ids, while transformers (which sums from below) depends
  on its sort. Here nothing ties with the last token kept. Both keep ties of top-k, which are compared.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

import npgpt
from npgpt.checkpoints import find
from npgpt.model import softmax
from npgpt.parameters import Array
from npgpt.text.sampling import Sampling, adjusted, min_p, repetition_penalty, top_k, top_p
from tests.support.tolerances import largest_difference
from tests.support.verification import Report

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="extra parity is not installed")
transformers = pytest.importorskip("transformers", reason="extra parity is not installed")

CASES = [(V, dtype, seed) for V in (2, 7, 40, 1000, 50257) for dtype in ("float64", "float32") for seed in range(3)]
GAP = 1e-3  # minimum distance in probability or ratio from the threshold to the tokens on either side


def random_logits(V: int, dtype: str, seed: int) -> Array:
    """Return logits [V] around −3, of both signs, a few of them much likelier than the rest."""
    return (4 * np.random.default_rng(seed).standard_normal(V) - 3).astype(dtype)


def theirs(
    processors: list[str], arguments: list[float], logits: Array, seen: NDArray[np.int64] | None = None
) -> Array:
    """Return logits [V] after transformers' processors of these names, applied in order."""
    ids = torch.from_numpy(np.zeros(1, np.int64) if seen is None else seen)[None]
    scores = torch.from_numpy(logits)[None]
    for name, argument in zip(processors, arguments, strict=True):
        scores = getattr(transformers, name)(argument)(ids, scores)
    array: Array = scores[0].numpy()
    assert array.dtype == logits.dtype
    return array


def p_midway(logits: Array) -> tuple[float, int]:
    """Return a top-p midway between two cumulative probabilities, and the number of tokens that it keeps."""
    chances = np.sort(softmax(logits.astype(np.float64)))[::-1]
    n = int(np.count_nonzero(chances > 2 * GAP))  # the last of them crosses p by more than GAP
    cumulative = np.cumsum(chances)
    return float(cumulative[n - 1] - chances[n - 1] / 2), n


def ratio_midway(logits: Array) -> tuple[float, int]:
    """Return a min-p midway in the widest gap among the 20 likeliest tokens, and the number of tokens that it keeps."""
    chances = np.sort(softmax(logits.astype(np.float64)))[::-1][:20]
    ratios = chances[chances > 0] / chances[0]
    n = int(np.argmax(ratios[1:-1] / ratios[2:])) + 2 if len(ratios) > 2 else 1
    low, high = float(ratios[n]), float(ratios[n - 1])
    assert high / low > 1 + 2 * GAP
    return (low * high) ** 0.5, n


@pytest.mark.parametrize(("V", "dtype", "seed"), CASES)
def test_repetition_penalty(V: int, dtype: str, seed: int, difference: Report) -> None:
    logits = random_logits(V, dtype, seed)
    logits[1], logits[V // 2] = 0, -np.inf
    rng = np.random.default_rng(seed)
    some = rng.integers(0, V, min(V, 700))
    beyond = np.array([0, 1, V // 2, V // 2, V, V + 5])  # a vocabulary may be larger than the head
    for seen in (some, np.repeat(some, 3), np.concatenate([some, beyond]), some[:1]):
        for penalty in (1.2, 0.7, 1.0, 100.0):
            mine = repetition_penalty(logits, seen, penalty)
            assert mine.dtype == dtype
            np.testing.assert_array_equal(
                mine, theirs(["RepetitionPenaltyLogitsProcessor"], [penalty], logits, seen), strict=True
            )
    difference("sampling", "transformers: repetition penalty", dtype, 0)


@pytest.mark.parametrize(("V", "dtype", "seed"), CASES)
def test_temperature(V: int, dtype: str, seed: int, difference: Report) -> None:
    """npgpt subtracts the maximum in float64 first and transformers does not, so probabilities are compared."""
    logits = random_logits(V, dtype, seed)
    for temperature in (0.1, 0.8, 1.0, 1.7, 50.0):
        mine = adjusted(logits, Sampling(temperature=temperature))
        compare(mine, theirs(["TemperatureLogitsWarper"], [temperature], logits), 1, difference)


@pytest.mark.parametrize(("V", "dtype", "seed"), CASES)
def test_top_k(V: int, dtype: str, seed: int, difference: Report) -> None:
    logits = random_logits(V, dtype, seed)
    for array in (logits, np.round(logits)):  # the second has many ties
        for k in (1, 2, 5, 50, V - 1, V, V + 1):
            np.testing.assert_array_equal(top_k(array, k), theirs(["TopKLogitsWarper"], [k], array), strict=True)
    difference("sampling", "transformers: top-k", dtype, 0)


@pytest.mark.parametrize(("V", "dtype", "seed"), CASES)
def test_top_p(V: int, dtype: str, seed: int, difference: Report) -> None:
    for scale in (1.0, 0.5, 2.0):
        logits = (scale * random_logits(V, dtype, seed)).astype(dtype)
        p, n = p_midway(logits)
        mine = top_p(logits, p)
        assert np.isfinite(mine).sum() == n
        np.testing.assert_array_equal(mine, theirs(["TopPLogitsWarper"], [p], logits), strict=True)
    np.testing.assert_array_equal(top_p(logits, 1), theirs(["TopPLogitsWarper"], [1.0], logits), strict=True)
    difference("sampling", "transformers: top-p", dtype, 0)


@pytest.mark.parametrize(("V", "dtype", "seed"), CASES)
def test_min_p(V: int, dtype: str, seed: int, difference: Report) -> None:
    for scale in (1.0, 0.5, 2.0):
        logits = (scale * random_logits(V, dtype, seed)).astype(dtype)
        p, n = ratio_midway(logits)
        mine = min_p(logits, p)
        assert np.isfinite(mine).sum() == n
        np.testing.assert_array_equal(mine, theirs(["MinPLogitsWarper"], [p], logits), strict=True)
    np.testing.assert_array_equal(min_p(logits, 0), theirs(["MinPLogitsWarper"], [0.0], logits), strict=True)
    ties = np.array([1, 1, 0], dtype)
    np.testing.assert_array_equal(min_p(ties, 1), theirs(["MinPLogitsWarper"], [1.0], ties), strict=True)
    difference("sampling", "transformers: min-p", dtype, 0)


@pytest.mark.parametrize(("V", "dtype", "seed"), CASES)
@pytest.mark.parametrize(("penalty", "temperature", "k"), [(1.3, 0.8, 50), (0.9, 1.5, 12), (2.0, 0.3, 3)])
def test_all_of_them(
    V: int, dtype: str, seed: int, penalty: float, temperature: float, k: int, difference: Report
) -> None:
    """The filters run in transformers' order; float64 arithmetic puts each threshold midway in what is left."""
    logits = random_logits(V, dtype, seed)
    seen = np.random.default_rng(seed).integers(0, V, V // 2 + 1)
    left = repetition_penalty(logits.astype(np.float64), seen, penalty) / temperature
    left = top_k(left, k)
    p, _ = p_midway(left)
    left = top_p(left, p)
    ratio, n = ratio_midway(left) if np.isfinite(left).sum() > 1 else (0.5, 1)
    sampling = Sampling(temperature=temperature, top_k=k, top_p=p, min_p=ratio, repetition_penalty=penalty)
    mine = adjusted(logits, sampling, seen)
    assert np.isfinite(mine).sum() == n
    steps = {
        "RepetitionPenaltyLogitsProcessor": penalty,
        "TemperatureLogitsWarper": temperature,
        "TopKLogitsWarper": k,
        "TopPLogitsWarper": p,
        "MinPLogitsWarper": ratio,
    }
    compare(mine, theirs([*steps], [*steps.values()], logits, seen), 2, difference)


def compare(mine: Array, theirs: Array, roundings: int, difference: Report) -> None:
    """Check that the same tokens are kept, with probabilities that differ only by rounding.

    Each rounding of a logit x adds an absolute error of u |x|; exp turns that into the same relative error, and the sum
    in the denominator adds it again. Both add a few roundings of their own, the sum up to √V.
    """
    np.testing.assert_array_equal(np.isfinite(mine), np.isfinite(theirs))
    kept = np.isfinite(mine)
    u = float(np.finfo(theirs.dtype).eps) / 2
    a, b = softmax(mine)[kept], softmax(theirs.astype(np.float64))[kept]
    error = float(np.max(np.abs(a / b - 1)))
    row = f"transformers: {'temperature' if roundings == 1 else 'all of them together'}"
    difference("sampling", row, str(theirs.dtype), largest_difference(b, a))
    own = float(np.finfo(np.float64).eps) * (float(np.abs(mine[kept]).max()) + len(mine) ** 0.5 + 4)
    assert error <= 2 * roundings * u * float(np.abs(theirs[kept]).max()) + 2 * own


def test_greedy_text_with_a_penalty(difference: Report) -> None:
    mine = npgpt.load()
    model = transformers.GPT2LMHeadModel.from_pretrained(find.find().weights.parent, dtype=torch.float32).eval()
    prompt = mine.tokenizer.encode("It is a truth universally acknowledged")
    for penalty in (1.1, 1.3, 2.0):
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=60, do_sample=False, repetition_penalty=penalty, pad_token_id=4095
        )
        sampling = Sampling(temperature=0, repetition_penalty=penalty)
        drawn = [step.token_id for step in mine.steps(prompt, max_tokens=60, sampling=sampling, ignore_eos=True)]
        assert drawn[:-1] == out[0, len(prompt) :].tolist()
    difference("text", "transformers: greedy text with a repetition penalty", "ids", 0)
