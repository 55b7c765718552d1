from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npgpt import gradients, kernels, model
from npgpt.kernels import attention_by_tiles, in_threads
from npgpt.parameters import Array
from tests.support.thorough import examples

U32, U64 = 2.0**-24, 2.0**-53


def plain(q: Array, k: Array, v: Array, scale: float) -> Array:
    """Return attention by the formula that attention_by_tiles replaces."""
    return model.attention_weights(q, k, scale) @ v


@given(
    B=st.integers(1, 2),
    H=st.integers(1, 5),
    T=st.integers(1, 140),
    D=st.sampled_from([1, 7, 64, 130, 5000]),
    past=st.integers(0, 130),
    piece=st.sampled_from([1, 5000, 2**18]),
    shared=st.sampled_from([1, 2**17]),
    threads=st.integers(1, 4),
)
@settings(max_examples=examples(30, 60))
def test_attention_by_tiles_is_attention(
    B: int, H: int, T: int, D: int, past: int, piece: int, shared: int, threads: int
) -> None:
    if D == 5000:
        B, H = 1, 1
    rng = np.random.default_rng(B * T + D)
    q, k, v = (rng.standard_normal((B, H, n, D)) for n in (T, T + past, T + past))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "PIECE", piece)
        patch.setattr(kernels, "MIN_SHARED_SCORES", shared)
        patch.setattr(kernels, "thread_count", lambda: threads)
        heads = attention_by_tiles(q, k, v, 0.3)
    assert heads.dtype == np.float64
    # weights sum to 1; a score, of size √D, is a sum of D products and reaches a weight as a relative error
    np.testing.assert_allclose(heads, plain(q, k, v, 0.3), rtol=0, atol=8 * (T + past + D) * U64)
    assert heads.transpose(0, 2, 1, 3).flags.c_contiguous  # merge_heads then copies nothing


@given(
    B=st.integers(1, 2),
    H=st.integers(1, 3),
    T=st.integers(1, 80),
    D=st.sampled_from([1, 7, 64]),
    threads=st.integers(1, 3),
)
@settings(max_examples=examples(20, 60))
def test_attentions_backward_by_tiles_is_its_formula(B: int, H: int, T: int, D: int, threads: int) -> None:
    rng = np.random.default_rng(B * T + D)
    dy, q, k, v = rng.standard_normal((4, B, H, T, D))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "MIN_SHARED_SCORES", 2**60)
        expected = gradients.attention_backward(dy, q, k, v, 0.3)
        patch.setattr(kernels, "MIN_SHARED_SCORES", 1)
        patch.setattr(kernels, "thread_count", lambda: threads)
        found = gradients.attention_backward(dy, q, k, v, 0.3)
    for name, x, y in zip(("dq", "dk", "dv"), found, expected, strict=True):
        assert x.transpose(0, 2, 1, 3).flags.c_contiguous, name  # merge_heads then copies nothing
        # a sum over T keys or queries of products with a sum over D, each number of size 1 or less but for √D
        np.testing.assert_allclose(x, y, rtol=0, atol=8 * (T + D) * D * U64, err_msg=name)


@pytest.mark.parametrize("shape", [(3, 3, 5), (1, 4, 5), (2, 3, 4, 5), (4, 5)])
def test_rows_in_threads_are_rows(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    """Each row of numbers is computed once, two at a time, and the result is that of the formula on the whole."""
    x = np.random.default_rng(0).standard_normal(shape)
    sizes: list[int] = []

    def formula(x: Array) -> Array:
        sizes.append(len(x))
        return np.cumsum(x, axis=-1)

    monkeypatch.setattr(kernels, "PIECE", 2 * shape[-1])
    monkeypatch.setattr(kernels, "thread_count", lambda: 2)
    np.testing.assert_array_equal(kernels.by_row(formula)(x), formula(x))
    lines = x.size // shape[-1]
    assert sizes[:-1] == ([2] * (lines // 2) + [1] * (lines % 2) if len(shape) > 2 and len(x) > 1 else [len(x)])


@given(
    B=st.integers(1, 2),
    H=st.integers(1, 3),
    T=st.integers(1, 150),
    D=st.sampled_from([1, 7, 64]),
    past=st.integers(0, 70),
    threads=st.integers(1, 3),
)
@settings(max_examples=examples(20, 60))
def test_scores_and_weights_by_queries_are_their_formulas(
    B: int, H: int, T: int, D: int, past: int, threads: int
) -> None:
    rng = np.random.default_rng(B * T + D)
    q, k = (rng.standard_normal((B, H, n, D)) for n in (T, T + past))
    for formula in (model.attention_scores, model.attention_weights):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "MAX_WHOLE_QUERIES", 1000)
            expected = formula(q, k, 0.3)
            patch.setattr(kernels, "MAX_WHOLE_QUERIES", 1)
            patch.setattr(kernels, "thread_count", lambda: threads)
            found = formula(q, k, 0.3)
        # a score is a sum of D products of size 1; the softmax makes of its error a relative one
        np.testing.assert_allclose(found, expected, rtol=0, atol=8 * (T + past + D) * U64)
        np.testing.assert_array_equal(found == 0, expected == 0)
        np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))


def test_large_scores_and_hidden_rubbish_do_no_harm() -> None:
    """Scores exceed exp's range, and hidden keys and values, even infinite ones, have no effect."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 2, 100, 8)).astype(np.float32)
    q *= 1000
    heads = attention_by_tiles(q, k, v, 1.0)
    assert np.isfinite(heads).all()
    # scores near 3000 are off by 8 u of that, and so are their exponentials, relatively
    truth = plain(q.astype(np.float64), k.astype(np.float64), v.astype(np.float64), 1.0)
    np.testing.assert_allclose(heads, truth, atol=8 * 4e3 * U32 * 4)
    spoiled = k.copy()
    spoiled[:, :, 70:] = np.inf
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(attention_by_tiles(q, spoiled, v, 1.0)[:, :, :70], heads[:, :, :70])


@given(
    rows=st.integers(1, 20),
    n_in=st.integers(1, 40),
    n_out=st.integers(1, 700),
    order=st.sampled_from("CF"),
    dtype=st.sampled_from(["float32", "float64"]),
    small=st.sampled_from([1, 5000, 10**6]),
    cached=st.sampled_from([1, 900, 2**20]),
    threads=st.integers(1, 3),
)
def test_a_product_is_a_product(
    rows: int, n_in: int, n_out: int, order: str, dtype: str, small: int, cached: int, threads: int
) -> None:
    rng = np.random.default_rng(rows + n_in)
    x = rng.standard_normal((rows, n_in)).astype(dtype)
    weight = np.asarray(rng.standard_normal((n_in, n_out)), dtype, order=order)  # type: ignore[call-overload]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "MIN_SHARED_WEIGHTS", 1)
        patch.setattr(kernels, "MAX_SMALL_PRODUCT", small)
        patch.setattr(kernels, "CACHED_WEIGHTS", cached)
        patch.setattr(kernels, "thread_count", lambda: threads)
        y = kernels.product(x, weight)
    assert y.dtype == dtype
    assert y.shape == (rows, n_out)
    assert y.flags.c_contiguous
    expected = x.astype(np.float64) @ weight.astype(np.float64)
    slack = 4 * n_in * np.finfo(dtype).eps * (np.abs(x) @ np.abs(weight)).max()  # n_in roundings of the largest sum
    np.testing.assert_allclose(y, expected, rtol=0, atol=slack)


@pytest.fixture(scope="module")
def wte() -> Array:
    """Return an embedding of 50257 rows, a number that no block size divides."""
    return np.random.default_rng(0).standard_normal((50257, 192), np.float32)


@pytest.mark.parametrize(
    ("rows", "threads", "shared_out"),
    [(1, 2, False), (2, 1, True), (6, 1, True), (7, 1, False), (7, 2, True), (17, 2, False)],
)
def test_the_head_of_a_real_size_is_shared_out(
    monkeypatch: pytest.MonkeyPatch, wte: Array, rows: int, threads: int, shared_out: bool
) -> None:
    x = np.random.default_rng(1).standard_normal((rows, 192), np.float32)
    assert wte.size >= kernels.MIN_SHARED_WEIGHTS
    shared: list[int] = []

    def in_turn(threads: int, run: Callable[[int], None], jobs: Iterable[int]) -> None:
        for job in jobs:
            shared.append(job)
            run(job)

    monkeypatch.setattr(kernels, "in_threads", in_turn)
    monkeypatch.setattr(kernels, "thread_count", lambda: threads)
    y = kernels.product(x, wte.T)
    assert bool(shared) == shared_out
    assert len(shared) in (0, 4 * threads)
    np.testing.assert_allclose(y, x.astype(np.float64) @ wte.T, rtol=0, atol=192 * U32 * 192)


def test_a_few_rows_are_multiplied_as_one_row_is() -> None:
    """If the weight fits the cache, each of a few rows equals the vector product to the last bit."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((6, 300), np.float32), rng.standard_normal((300, 500), np.float32)
    one_by_one = np.concatenate([row[None] @ weight for row in x])
    for rows in (2, 3, 6):
        np.testing.assert_array_equal(kernels.product(x[:rows], weight), one_by_one[:rows])


@pytest.mark.parametrize("T", [1, 16, 64, 65, 150])
def test_the_decorated_attention_is_the_formula_or_the_tiles(T: int) -> None:
    """Up to MAX_WHOLE_QUERIES queries the result is the formula's, beyond that the tiles', to the last bit."""
    q, k, v = np.random.default_rng(T).standard_normal((3, 2, 3, T, 8), np.float32)
    expected = (plain if kernels.MAX_WHOLE_QUERIES >= T else attention_by_tiles)(q, k, v, 0.3)
    np.testing.assert_array_equal(model.attention(q, k, v, 0.3), expected)


@given(
    shape=st.lists(st.integers(1, 9), min_size=0, max_size=4),
    piece=st.sampled_from([1, 7, 64, 2**18]),
    threads=st.integers(1, 3),
    dtype=st.sampled_from(["float32", "float64"]),
    activation=st.sampled_from(["gelu_new", "gelu"]),
    contiguous=st.booleans(),
)
def test_pieces_are_the_formula(
    shape: list[int], piece: int, threads: int, dtype: str, activation: str, contiguous: bool
) -> None:
    """An element's value does not depend on the piece in which it is computed, to the last bit."""
    x = np.asarray(np.random.default_rng(0).standard_normal(shape), dtype)
    x = x if contiguous else x.T
    formula = model.ACTIVATIONS[activation].__wrapped__  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "PIECE", piece)
        patch.setattr(kernels, "thread_count", lambda: threads)
        y = model.ACTIVATIONS[activation](x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    np.testing.assert_array_equal(y, formula(x))


def test_large_arrays_go_in_pieces_and_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 MB are cut into three pieces; half of that is not cut."""
    seen: list[tuple[int, list[int]]] = []
    monkeypatch.setattr(kernels, "in_threads", lambda threads, run, jobs: seen.append((threads, list(jobs))))
    monkeypatch.setattr(kernels, "thread_count", lambda: 2)
    model.gelu(np.zeros((3, 2**18 - 1), np.float32))
    model.gelu(np.zeros((3, 2**16), np.float32))
    assert seen == [(2, [0, 2**18, 2**19])]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_job_is_done_once_and_nothing_outlives_the_call(threads: int) -> None:
    for jobs in (0, 1, 2, 100):
        before, done, ran_in = threading.active_count(), [], set()

        def run(job: int) -> None:
            ran_in.add(threading.get_ident())  # noqa: B023
            done.append(job)  # noqa: B023

        in_threads(threads, run, range(jobs))
        assert sorted(done) == list(range(jobs))
        assert len(ran_in) <= min(threads, max(jobs, 1))
        assert threading.active_count() == before


def test_jobs_run_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=30)  # passes only when three threads wait at it
    in_threads(3, lambda _: together.wait(), range(3))


@pytest.mark.parametrize("threads", [1, 3])
def test_an_exception_and_the_callers_error_state_cross_over(threads: int) -> None:
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        in_threads(threads, lambda job: np.float32(1e38) * job, [np.float32(1), np.float32(1), np.float32(1000)])
    with np.errstate(over="ignore"):
        in_threads(threads, lambda job: np.float32(1e38) * job, [np.float32(1000)] * 50)
