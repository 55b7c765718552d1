from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from npgpt import config as configuration
from npgpt import model
from npgpt.cache import KVCache
from npgpt.config import Config
from npgpt.errors import NpgptError
from npgpt.model import attention, forward, gelu, gelu_erf, layer_norm, linear, softmax
from npgpt.parameters import Array, Record
from tests.support.models import SHAPES, random_ids, random_parameters, small
from tests.support.thorough import examples
from tests.support.tolerances import relative_error, rounding_bound

U32, U64 = 2.0**-24, 2.0**-53
DTYPES = ["float32", "float64"]


def rows(low: float, high: float) -> st.SearchStrategy[Array]:
    shapes = st.tuples(st.integers(1, 4), st.integers(1, 40))
    elements = st.floats(low, high, width=32)
    return hnp.arrays(np.float64, shapes, elements=elements)


# --- the plain functions ---------------------------------------------------------------------------------------------


@given(rows(-1e4, 1e4), st.sampled_from(DTYPES))
def test_softmax_is_a_distribution_and_survives_large_scores(x: Array, dtype: str) -> None:
    p = softmax(x.astype(dtype))
    assert p.dtype == dtype
    assert (p >= 0).all()
    # n additions and n divisions, each within u
    np.testing.assert_allclose(p.sum(axis=-1), 1, atol=2 * x.shape[-1] * float(np.finfo(dtype).eps))


def test_softmax_literal_values() -> None:
    np.testing.assert_allclose(softmax(np.array([0.0, math.log(3)])), [0.25, 0.75], rtol=4 * U64)
    np.testing.assert_array_equal(softmax(np.array([5.0, -np.inf, 5.0])), [0.5, 0, 0.5])
    np.testing.assert_array_equal(softmax(np.array([1e4, -1e4], np.float32)), [1, 0])


@given(rows(-50, 50), st.floats(-1e3, 1e3))
def test_softmax_does_not_see_a_constant(x: Array, constant: float) -> None:
    # x + constant is rounded to within u |x + constant|, and exp turns that into a relative error
    np.testing.assert_allclose(softmax(x + constant), softmax(x), rtol=4e-13, atol=1e-300)


@given(rows(-30, 30))
def test_gelu_is_the_tanh_form(x: Array) -> None:
    expected = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x.ravel()]
    # 1 + tanh cancels for negative x: what is left of it is right to within u, an absolute error of u |x| and a little
    np.testing.assert_allclose(gelu(x).ravel(), expected, rtol=8 * U64, atol=4 * 30 * U64)
    np.testing.assert_allclose(gelu(x.astype(np.float32)).ravel(), expected, rtol=8 * U32, atol=4 * 30 * U32)


@given(rows(-30, 30))
def test_gelu_erf_is_the_exact_form(x: Array) -> None:
    expected = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.ravel()]
    np.testing.assert_allclose(gelu_erf(x).ravel(), expected, rtol=8 * U64, atol=8 * 30 * U64)
    np.testing.assert_allclose(gelu_erf(x.astype(np.float32)).ravel(), expected, rtol=8 * U32, atol=8 * 30 * U32)


def test_the_two_gelus_differ_where_it_is_known() -> None:
    x = np.linspace(-6, 6, 120_001)
    difference = np.abs(gelu(x) - gelu_erf(x))
    assert difference.max() == pytest.approx(4.73e-4, rel=1e-2)
    assert abs(x[difference.argmax()]) == pytest.approx(2.7, abs=0.05)


def test_gelu_literal_values() -> None:
    """The values at 1 come from tanh(0.7978845608 × 1.044715) and erf(1/√2), to ten digits."""
    one = np.array([1.0, 0.0, -100.0])
    np.testing.assert_allclose(gelu(one), [0.8411919906, 0, 0], atol=5e-11)
    np.testing.assert_allclose(gelu_erf(one), [0.8413447461, 0, 0], atol=5e-11)


@given(rows(-100, 100), st.sampled_from(DTYPES))
def test_layer_norm_against_float64_statistics(x: Array, dtype: str) -> None:
    C = x.shape[-1]
    rng = np.random.default_rng(C)
    weight, bias = rng.standard_normal((2, C)).astype(dtype)
    mean = np.array([math.fsum(row) / C for row in x])[:, None]
    variance = np.array([math.fsum((row - m) ** 2) / C for row, m in zip(x, mean, strict=True)])[:, None]
    deviation = np.sqrt(variance + 1e-5)
    result = layer_norm(x.astype(dtype), weight, bias, 1e-5)
    assert result.dtype == dtype
    # the mean is wrong by up to u C max|x|; every element and the deviation inherit that, divided by the deviation
    slack = 4 * (C + 4) * float(np.finfo(dtype).eps) * (np.abs(x).max() / deviation + 1) * np.abs(weight).max()
    assert (np.abs(result - ((x - mean) / deviation * weight + bias)) <= slack + 4 * np.finfo(dtype).eps * 5).all()


def test_layer_norm_literal_values() -> None:
    x = np.array([[1.0, 3.0, 5.0, 7.0]])  # mean 4, variance 5 (not 20/3)
    one, zero = np.ones(4), np.zeros(4)
    np.testing.assert_allclose(layer_norm(x, one, zero, 0.0), [[-3, -1, 1, 3] / np.sqrt(5)], rtol=1e-15)
    np.testing.assert_allclose(layer_norm(x, 2 * one, one, 4.0), [[-1, 1 / 3, 5 / 3, 3]], rtol=1e-15)


def test_names_of_activations() -> None:
    assert {"gelu_new": gelu, "gelu_pytorch_tanh": gelu, "gelu": gelu_erf} == model.ACTIVATIONS
    assert set(model.ACTIVATIONS) == set(configuration.ACTIVATIONS)


def test_linear_is_x_times_weight_in_out() -> None:
    x = np.array([[[1.0, 2.0]], [[3.0, 4.0]]])
    weight, bias = np.array([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]]), np.array([0.0, 1.0, 2.0])
    np.testing.assert_array_equal(linear(x, weight, bias), [[[5, 51, 502]], [[11, 111, 1102]]])


def naive_attention(q: Array, k: Array, v: Array, scale: float) -> Array:
    """Return attention computed one query and one head at a time, over visible keys only."""
    (B, H, T, D), S = q.shape, k.shape[2]
    heads = np.empty((B, H, T, D))
    for b, h, t in np.ndindex(B, H, T):
        seen = S - T + t + 1
        e = np.exp(scale * (k[b, h, :seen] @ q[b, h, t]))
        heads[b, h, t] = (e / e.sum()) @ v[b, h, :seen]
    return heads


@given(
    B=st.integers(1, 3),
    H=st.integers(1, 4),
    T=st.integers(1, 150),
    D=st.integers(1, 9),
    past=st.integers(0, 80),
)
@settings(max_examples=examples(30, 60))
def test_attention_is_the_sum_over_earlier_keys_however_long(B: int, H: int, T: int, D: int, past: int) -> None:
    rng = np.random.default_rng(B * T + D)
    q, k, v = (rng.standard_normal((B, H, n, D)) for n in (T, T + past, T + past))
    # weights sum to 1, so that S + D roundings leave less than this on values near 1
    slack = 8 * (T + past + D) * U64
    np.testing.assert_allclose(attention(q, k, v, 0.3), naive_attention(q, k, v, 0.3), rtol=0, atol=slack)


# --- the whole pass --------------------------------------------------------------------------------------------------

NAMES = ["wte", "wpe", "embedding"]
IN_A_BLOCK = ["ln_1", "attn.c_attn", "attn.q", "attn.k", "attn.v", "attn.scores", "attn.weights", "attn.heads"]
IN_A_BLOCK += ["attn.c_proj", "attn.residual", "ln_2", "mlp.c_fc", "mlp.act", "mlp.c_proj"]


def recorded(config: Config, ids: Any, cache: KVCache | None = None, seed: int = 0) -> dict[str, Array]:
    record: dict[str, Array] = {}
    forward(random_parameters(config, seed), config, ids, cache, record.__setitem__)
    return record


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_and_shape(shape: str, dtype: str) -> None:
    config = SHAPES[shape]
    parameters = random_parameters(config, dtype=dtype)
    record: dict[str, Array] = {}
    logits = forward(parameters, config, random_ids(config, (2, 9)), record=record.__setitem__)
    assert logits.shape == (2, 9, config.vocab_size)
    assert {name: str(array.dtype) for name, array in record.items()} == dict.fromkeys(record, dtype)
    assert forward(parameters, config, random_ids(config, (9,))).shape == (1, 9, config.vocab_size)
    assert forward(parameters, config, [1, 2], logits_from=-1).shape == (1, 1, config.vocab_size)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_within_rounding_of_float64(shape: str) -> None:
    config = SHAPES[shape]
    ids = random_ids(config, (3, 20))
    truth: dict[str, Array] = {}
    single: dict[str, Array] = {}
    forward(random_parameters(config), config, ids, record=truth.__setitem__)
    forward(random_parameters(config, dtype="float32"), config, ids, record=single.__setitem__)
    bound = rounding_bound(config, 20, "float32")
    assert {
        name: relative_error(single[name], truth[name])
        for name in truth
        if relative_error(single[name], truth[name]) > bound
    } == {}


def test_the_float32_bound_can_fail() -> None:
    """The smallest well-known mistake, the other GELU, exceeds the bound."""
    config, other = small(), small(activation_function="gelu")
    parameters, ids = random_parameters(config), random_ids(config, (3, 20))
    error = relative_error(forward(parameters, other, ids), forward(parameters, config, ids))
    assert error > 5 * rounding_bound(config, 20, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("changed", [0, 1, 63, 64, 65, 149])
def test_a_later_token_changes_no_bit_of_an_earlier_position(dtype: str, changed: int) -> None:
    config = small(n_positions=150)
    parameters, ids = random_parameters(config, dtype=dtype), random_ids(config, (1, 150))
    before = forward(parameters, config, ids)
    ids[0, changed] = (ids[0, changed] + 1) % config.vocab_size
    after = forward(parameters, config, ids)
    np.testing.assert_array_equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed:] != after[:, changed:]).any(axis=-1).all()


def test_no_more_is_computed_than_the_logits_that_are_wanted() -> None:
    record: dict[str, Array] = {}
    forward(random_parameters(small()), small(), [[1, 2, 3]] * 2, record=record.__setitem__, logits_from=-1)
    assert (record["h.1"].shape, record["ln_f"].shape, record["logits"].shape) == ((2, 3, 21), (2, 1, 21), (2, 1, 40))


@pytest.mark.parametrize(("logits_from", "first"), [(-1, 10), (0, 0), (4, 4), (10, 10), (-3, 8), (-11, 0)])
def test_logits_of_the_last_tokens_are_the_last_of_all(logits_from: int, first: int) -> None:
    config, ids = small(), random_ids(small(), (2, 11))
    parameters = random_parameters(config)
    np.testing.assert_allclose(
        forward(parameters, config, ids, logits_from=logits_from),
        forward(parameters, config, ids)[:, first:],
        rtol=1e-12,
        atol=1e-13,
    )


@given(st.lists(st.integers(1, 100), min_size=1, max_size=8), st.integers(1, 3), st.sampled_from(list(SHAPES)))
@settings(max_examples=examples(30, 60))
def test_prefill_in_any_chunks_is_prefill_in_one(chunks: list[int], B: int, shape: str) -> None:
    fields = {field: getattr(SHAPES[shape], field) for field in SHAPES[shape].__dataclass_fields__}
    config = Config(**fields | {"n_positions": 800})
    parameters, ids = random_parameters(config), random_ids(config, (B, sum(chunks)))
    cache = KVCache(config, B, sum(chunks), "float64")
    ends = np.cumsum(chunks)
    parts = [forward(parameters, config, ids[:, end - n : end], cache) for n, end in zip(chunks, ends, strict=True)]
    assert cache.length == sum(chunks)
    whole = forward(parameters, config, ids)
    assert relative_error(np.concatenate(parts, axis=1), whole) < rounding_bound(config, sum(chunks), "float64")


@pytest.mark.parametrize("logits_from", [3, -4, 2**40, 1.0, True, None])
def test_logits_from_a_token_that_is_not_there(logits_from: Any) -> None:
    """A slice would give no logits or those of every token. The cache stays unchanged."""
    cache = KVCache(small(), 1, 9, "float64")
    with pytest.raises(NpgptError, match="logits_from must be"):
        forward(random_parameters(small()), small(), [1, 2, 3], cache, logits_from=logits_from)
    assert cache.length == 0


def test_cache_forgets_when_its_length_is_set_back() -> None:
    config = small()
    parameters, cache = random_parameters(config), KVCache(config, 1, 10, "float64")
    forward(parameters, config, [1, 2, 3], cache)
    once = forward(parameters, config, [4, 5], cache)
    cache.length = 3
    np.testing.assert_array_equal(forward(parameters, config, [4, 5], cache), once)


def test_a_full_context_is_refused_and_the_cache_stays() -> None:
    config = small()
    parameters, cache = random_parameters(config), KVCache(config, 1, 24, "float64")
    forward(parameters, config, [1] * 23, cache)
    with pytest.raises(NpgptError, match="2 tokens after 23 in the cache do not fit into the context of 24"):
        forward(parameters, config, [1, 2], cache)
    assert cache.length == 23
    forward(parameters, config, [1], cache)


def test_temporaries_stay_small() -> None:
    """No square of scores is stored, and at most two arrays of the MLP's width exist at a time."""
    config = small(n_embd=8, n_head=8, n_positions=2048, n_inner=1024, n_layer=1)
    parameters, ids = random_parameters(config, dtype="float32"), random_ids(config, (2048,))
    forward(parameters, config, ids[:9])
    tracemalloc.start()
    forward(parameters, config, ids, logits_from=-1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    wide, square = 2048 * 1024 * 4, 8 * 2048 * 2048 * 4
    assert peak < 2.6 * wide < square


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_in_a_batch_is_the_row_alone(dtype: str) -> None:
    config = small()
    parameters, ids = random_parameters(config, dtype=dtype), random_ids(config, (5, 24))
    together = forward(parameters, config, ids)
    for row, alone in zip(ids, together, strict=True):
        assert relative_error(alone, forward(parameters, config, row)[0]) < rounding_bound(config, 24, dtype)


def test_untied_head_is_used() -> None:
    config = SHAPES["untied"]
    parameters = random_parameters(config)
    record = recorded(config, [3, 4])
    np.testing.assert_allclose(record["logits"], record["ln_f"] @ parameters.lm_head.weight.T, rtol=1e-12)
    assert not np.allclose(record["logits"], record["ln_f"] @ parameters.wte.weight.T)


# --- recording -------------------------------------------------------------------------------------------------------


def test_record_names_and_shapes() -> None:
    config = small(n_inner=17)
    B, T, past = 2, 5, 3
    cache = KVCache(config, B, T + past, "float64")
    forward(random_parameters(config), config, random_ids(config, (B, past)), cache)
    record = recorded(config, random_ids(config, (B, T)), cache)
    blocks = [f"h.{layer}.{name}" for layer in range(2) for name in IN_A_BLOCK]
    assert sorted(record) == sorted([*NAMES, *blocks, "h.0", "h.1", "ln_f", "logits"])
    C, H, D, S, F = 21, 3, 7, T + past, 17
    shapes = {name: record[name].shape for name in record}
    assert {n: s for n, s in shapes.items() if n.startswith("h.1.")} == {
        "h.1.ln_1": (B, T, C),
        "h.1.attn.c_attn": (B, T, 3 * C),
        "h.1.attn.q": (B, H, T, D),
        "h.1.attn.k": (B, H, T, D),
        "h.1.attn.v": (B, H, T, D),
        "h.1.attn.scores": (B, H, T, S),
        "h.1.attn.weights": (B, H, T, S),
        "h.1.attn.heads": (B, H, T, D),
        "h.1.attn.c_proj": (B, T, C),
        "h.1.attn.residual": (B, T, C),
        "h.1.ln_2": (B, T, C),
        "h.1.mlp.c_fc": (B, T, F),
        "h.1.mlp.act": (B, T, F),
        "h.1.mlp.c_proj": (B, T, C),
    }
    assert [shapes[n] for n in ("wte", "wpe", "embedding", "h.1", "ln_f", "logits")] == [
        *[(B, T, C), (T, C), (B, T, C), (B, T, C), (B, T, C), (B, T, 40)]
    ]


def test_what_is_recorded_hangs_together() -> None:
    """Each stage follows from earlier ones by the textbook formula; T spans several tiles of queries."""
    config = small(n_positions=200)
    p, ids = random_parameters(config), random_ids(config, (2, 150))
    r = recorded(config, ids)
    close: Any = {"rtol": 1e-9, "atol": 1e-11}
    np.testing.assert_array_equal(r["wte"], p.wte.weight[ids])
    np.testing.assert_array_equal(r["wpe"], p.wpe.weight[:150])
    np.testing.assert_array_equal(r["embedding"], r["wte"] + r["wpe"])
    x = r["embedding"]
    for layer, block in enumerate(p.h):
        stage = {name: r[f"h.{layer}.{name}"] for name in IN_A_BLOCK}
        np.testing.assert_allclose(
            stage["attn.c_attn"], stage["ln_1"] @ block.attn.c_attn.weight + block.attn.c_attn.bias, **close
        )
        for index, name in enumerate(("attn.q", "attn.k", "attn.v")):
            part = stage["attn.c_attn"][:, :, 21 * index : 21 * (index + 1)]
            np.testing.assert_array_equal(stage[name][1, 2, 5], part[1, 5, 14:21])
        scores = stage["attn.q"] @ stage["attn.k"].swapaxes(2, 3) / math.sqrt(7)
        future = np.triu(np.ones((150, 150), bool), 1)
        assert (stage["attn.scores"][:, :, future] == -np.inf).all()
        np.testing.assert_allclose(stage["attn.scores"][:, :, ~future], scores[:, :, ~future], **close)
        np.testing.assert_allclose(stage["attn.weights"], softmax(stage["attn.scores"]), **close)
        assert (stage["attn.weights"][:, :, future] == 0).all()
        np.testing.assert_allclose(stage["attn.heads"], stage["attn.weights"] @ stage["attn.v"], **close)
        merged = np.concatenate([stage["attn.heads"][:, h] for h in range(3)], axis=-1)
        np.testing.assert_allclose(
            stage["attn.c_proj"], merged @ block.attn.c_proj.weight + block.attn.c_proj.bias, **close
        )
        np.testing.assert_array_equal(stage["attn.residual"], x + stage["attn.c_proj"])
        np.testing.assert_allclose(
            stage["mlp.c_fc"], stage["ln_2"] @ block.mlp.c_fc.weight + block.mlp.c_fc.bias, **close
        )
        np.testing.assert_array_equal(stage["mlp.act"], gelu(stage["mlp.c_fc"]))
        x = r[f"h.{layer}"]
        np.testing.assert_array_equal(x, stage["attn.residual"] + stage["mlp.c_proj"])
    np.testing.assert_allclose(r["logits"], r["ln_f"] @ p.wte.weight.T, **close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("past", [None, 0, 7])
@pytest.mark.parametrize("T", [1, 2, 5, 16, 31, 32, 33, 64, 65, 128, 200])
def test_recording_changes_no_bit_and_what_is_handed_over_stays(dtype: str, B: int, past: int | None, T: int) -> None:
    """Recording changes nothing without a cache, with an empty one, and with one that holds tokens."""
    config = small(n_positions=207)
    parameters, ids = random_parameters(config, dtype=dtype), random_ids(config, (B, T + (past or 0)))
    kept: list[tuple[Array, Array]] = []

    def run(record: Record | None) -> Array:
        if past is None:
            return forward(parameters, config, ids, record=record)
        cache = KVCache(config, B, ids.shape[1], dtype)
        if past:
            forward(parameters, config, ids[:, :past], cache)
        return forward(parameters, config, ids[:, past:], cache, record)

    logits = run(lambda name, array: kept.append((array, array.copy())))
    np.testing.assert_array_equal(run(None), logits)
    for array, copy in kept:
        np.testing.assert_array_equal(array, copy)


def test_a_recorder_may_write_into_what_it_gets() -> None:
    config, ids = small(), [1, 2, 3]
    parameters = random_parameters(config)

    def spoil(name: str, array: Array) -> None:
        array[...] = np.nan

    np.testing.assert_array_equal(forward(parameters, config, ids, record=spoil), forward(parameters, config, ids))


def test_parameters_and_ids_are_only_read() -> None:
    config, ids = small(), random_ids(small(), (2, 8))
    parameters = random_parameters(config)
    for block in parameters.h:
        for array in (
            *block.ln_1,
            *block.attn.c_attn,
            *block.attn.c_proj,
            *block.ln_2,
            *block.mlp.c_fc,
            *block.mlp.c_proj,
        ):
            array.flags.writeable = False
    ids.flags.writeable = False
    for array in (parameters.wte.weight, parameters.wpe.weight, *parameters.ln_f):
        array.flags.writeable = False
    forward(parameters, config, ids)


def test_plain_functions_leave_their_input_alone() -> None:
    x = np.linspace(-2, 2, 12).reshape(1, 3, 4)
    x.flags.writeable = False
    softmax(x), gelu(x), gelu_erf(x), layer_norm(x, np.ones(4), np.zeros(4), 1e-5), linear(x, np.eye(4), np.ones(4))
