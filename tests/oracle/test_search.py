"""The oracle's answers if no catalogue entry is the truth, or only a part of it."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npgpt.oracle.arithmetic import plain
from npgpt.oracle.comparison import compare
from npgpt.oracle.mistakes import Mistake, catalogue
from npgpt.oracle.report import Report
from npgpt.oracle.rounding import CLEAR
from npgpt.oracle.textbook import COMPARED, Pass, Textbook, stages, textbook
from npgpt.oracle.theirs import cases
from npgpt.oracle.where import where
from npgpt.parameters import Array
from tests.support.models import random_arrays, random_ids, small
from tests.support.reports import said
from tests.support.thorough import THOROUGH, examples

CONFIG = small(n_embd=24, n_head=4, n_layer=examples(2, 3))
ARRAYS = random_arrays(CONFIG)
SINGLE = {name: array.astype(np.float32) for name, array in ARRAYS.items()}
IDS = random_ids(CONFIG, (2, 12))
ENTRIES = {entry.name: entry for entry in catalogue(CONFIG, 12)}
BOOK = textbook(CONFIG, SINGLE)
# what modules of Hugging Face's, LLMs-from-scratch's or nanoGPT's own show
HOOKS = ("ln_1", "attn.c_attn", "attn.merged", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.act", "mlp.c_proj", "")


def shown(book: Textbook, local: tuple[str, ...] = HOOKS) -> dict[str, Array]:
    """Return all that a float32 program gives, or only these stages of its blocks."""
    run = Pass(book, IDS)
    wanted = [f"h.{n}.{name}".rstrip(".") for n in range(CONFIG.n_layer) for name in local]
    return {stage: plain(run[stage]) for stage in ("embedding", *wanted, "ln_f", "logits")}


def judged(theirs: dict[str, Array], dtype: str = "float32", entries: list[Mistake] | None = None) -> Report:
    """Return the oracle's report."""
    return compare(CONFIG, ARRAYS, cases(theirs, CONFIG, IDS), dtype, entries=entries)


def logits(change: Mistake | None = None) -> Array:
    """Return float32 logits of a program with or without a mistake."""
    return plain(Pass(BOOK if change is None else change.change(BOOK), IDS)["logits"])


RNG = np.random.default_rng(3)
NOISE = RNG.standard_normal((2, 12, CONFIG.vocab_size))


@pytest.mark.usefixtures("few_pairs")
@pytest.mark.parametrize("size", [5e-6, 1e-4, 3e-5, 1e-5, 1e-3, 0.1][: examples(2, 6)])
def test_noise_on_logits_has_no_name(size: float) -> None:
    report = judged({"logits": logits() + size * NOISE})
    assert report.code == 1
    assert not report.names
    assert report.diagnosis.unexplained == "logits"


@pytest.mark.usefixtures("few_pairs")
@pytest.mark.parametrize(
    ("stage", "size"),
    [*product(["h.0.ln_1", "ln_f", "h.1.attn.c_proj", f"h.{CONFIG.n_layer - 1}.mlp.act"], [1e-5, 1e-3])][
        :: examples(3, 1)
    ],
)
def test_noise_is_located_and_has_no_name(stage: str, size: float) -> None:
    theirs = shown(BOOK)
    theirs[stage] = theirs[stage] + size * np.random.default_rng(4).standard_normal(theirs[stage].shape)
    report = judged(theirs)
    assert not report.names
    assert report.diagnosis.unexplained == stage


@pytest.mark.usefixtures("few_pairs")
@pytest.mark.parametrize("factor", [1.0001, 1.25][: examples(1, 2)])
def test_a_scale_is_no_half_precision(factor: float) -> None:
    theirs = shown(BOOK.altered({"attn.c_proj": lambda s: s["attn.merged"] @ s["attn.c_proj.weight"] * factor}))
    assert not judged({"logits": theirs["logits"]}).names
    report = judged(shown(BOOK, ()) | {"logits": factor * logits()})
    assert (report.names, report.diagnosis.unexplained) == ([], "logits")
    assert f"theirs = {factor:g} x ours, up to rounding" in report.where["logits"]
    assert "random" not in str(report)


@pytest.mark.parametrize(
    "name", ["softmax in float16", "LayerNorm in bfloat16", "softmax in bfloat16"][: examples(2, 3)]
)
def test_half_precision_itself_is_named(name: str) -> None:
    assert judged(shown(ENTRIES[name].change(BOOK))).names == [name]
    assert name in " ".join(judged({"logits": logits(ENTRIES[name])}).names)


def test_what_later_stages_contradict_is_not_named() -> None:
    report = judged(shown(BOOK.altered({"ln_1": lambda s: s["input"]})))
    assert "post-norm order" not in " ".join(report.names)
    for finding in report.diagnosis.findings:
        assert finding.stage.endswith("ln_1")


def test_queries_and_keys_exchanged_behind_their_hooks() -> None:
    swapped = BOOK.altered({"attn.q": BOOK.block["attn.k"], "attn.k": BOOK.block["attn.q"]})
    report = judged(shown(swapped, ("attn.query", "attn.key", "attn.value", "attn.merged", "")))
    assert report.names == ["q, k, v read as k, q, v"]
    assert report.diagnosis.unexplained is None
    assert "is right as given, but later stages use something else" in said(report)


def test_an_embedding_scaled_behind_its_hook() -> None:
    theirs = shown(ENTRIES["embedding scaled"].change(BOOK))
    theirs["wte"] = plain(Pass(BOOK, IDS)["wte"])
    assert judged(theirs).names == ["embedding scaled"]


def test_positions_left_out_behind_the_hooks_of_both_embeddings() -> None:
    theirs = shown(ENTRIES["positions missing"].change(BOOK))
    theirs |= {name: plain(Pass(BOOK, IDS)[name]) for name in ("wte", "wpe")}
    assert judged(theirs).names == ["positions missing"]


def test_a_stage_that_only_looks_like_a_mistake_is_not_named() -> None:
    """In a parallel block, the input of ln_2 is the stream itself, and no part is missing."""
    beside = {
        "attn.residual": lambda s: s["input"],
        "": lambda s: s["input"] + s["attn.c_proj"] + np.tanh(s["mlp.c_proj"]),
    }
    report = judged(shown(BOOK.altered(beside), (*HOOKS, "attn.residual")))
    assert not report.names
    assert {"h.0.attn.residual", "h.0"} <= set(report.diagnosis.unknown)


KNOWN = ["ReLU", "causal mask missing", "attention scale missing", "MLP residual missing"]
PAST = list(product(KNOWN, ["embedding", "h.0.attn.c_proj", "h.1", "ln_f"]))


@pytest.mark.usefixtures("few_pairs")
@pytest.mark.parametrize(("known", "unknown"), PAST[:: examples(11, 1)])
def test_what_is_known_is_named_past_what_is_not(known: str, unknown: str) -> None:
    theirs = shown(ENTRIES[known].change(BOOK))
    theirs[unknown] = theirs[unknown] + np.random.default_rng(5).standard_normal(theirs[unknown].shape)
    later = [stage for stage in stages(CONFIG.n_layer) if stage in theirs]
    report = judged(theirs)
    assert known in report.names
    assert unknown in report.diagnosis.unknown
    # what reads the changed stage follows what the program computed from its own, which is right
    assert later.index(report.diagnosis.unknown[0]) >= min(later.index(unknown), later.index("h.0.mlp.act"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: 1.25 * x, "theirs = 1.25 x ours, up to rounding"),
        (lambda x: x + 3, "theirs = ours + one constant, up to rounding"),
        (lambda x: x + np.arange(12)[:, None], "theirs = ours + a constant for each position"),
        (lambda x: x * np.arange(1, 13)[:, None], "theirs = ours times a factor for each position"),
        (lambda x: np.roll(x, 1, axis=1), "each position has the correct numbers of the position before it"),
        (lambda x: x[::-1], "the rows are in a different order"),
        (lambda x: x[..., ::-1], "each position has the right numbers in a different order"),
        (lambda x: np.where(np.arange(12)[:, None] >= 6, x + NOISE, x), "0 to 5 agree, all from 6 on differ"),
        (lambda x: np.where(np.arange(12)[:, None] < 3, x + NOISE, x), "positions 0 to 2 differ, all from 3 on agree"),
        (lambda x: np.where(np.arange(12)[:, None] == 7, x + NOISE, x), "only position 7 of 12"),
        (lambda x: np.where(np.arange(2)[:, None, None] == 1, x + NOISE, x), "only row 1 of 2"),
        (lambda x: np.where(np.arange(12)[:, None] % 4 == 1, np.nan, x), "3 and 9 of 12"),
        (lambda x: np.where(x < np.sort(x)[..., -5:-4], -np.inf, x), "all other numbers agree"),
    ],
)  # fmt: skip
def test_where_and_how_logits_differ(change: object, says: str) -> None:
    theirs = change(logits())  # type: ignore[operator]
    report = judged({"logits": theirs}, entries=[])
    if says == "3 and 9 of 12":
        says = "positions 1, 5 and 9 of 12"
    assert says in report.where["logits"], report.where
    assert says in said(report)


def test_heads_and_channels() -> None:
    x = RNG.standard_normal((2, 5, 24))
    one = x.copy()
    one[..., 6:12] += 1
    assert where("h.0.attn.merged", [one], [x], 1e-6, 4).startswith("at all 5 positions; only head 1 of 4")
    assert "only channels 6 to 11 of 24" in where("h.0.mlp.c_proj", [one], [x], 1e-6, 4)
    scores = RNG.standard_normal((2, 4, 5, 5))
    other = scores.copy()
    other[:, 2:] *= 2
    assert where("h.0.attn.weights", [other], [scores], 1e-6, 4).startswith(
        "only heads 2 to 3 of 4; at all 5 positions"
    )


def test_padded_rows_are_told_with_nan_and_where_none_differs_by_itself() -> None:
    ours = [np.ones((1, 5, 4)), np.ones((1, 3, 4))]
    spoilt = [ours[0], np.full((1, 3, 4), np.nan)]
    assert where("ln_f", spoilt, ours, 1e-6, 2) == "row 1 of 2 differs"
    assert where("ln_f", [x + 1 for x in ours], ours, 1e-6, 2) == "rows 0 to 1 of 2 differ"
    assert where("ln_f", ours, ours, 1e-6, 2) == "no single row differs by more than a tolerance"


@given(st.sets(st.integers(0, 11), min_size=1), st.integers(0, 2**32 - 1))
def test_positions_are_those_that_differ(bad: set[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    ours = rng.standard_normal((2, 12, 8))
    theirs = ours.copy()
    theirs[:, sorted(bad)] += rng.standard_normal((2, len(bad), 8)) + 3
    said = where("ln_f", [theirs], [ours], 1e-3, 4)
    ends = sorted(bad)
    if len(bad) == 12:
        assert said.startswith("at all 12 positions")
    elif len(bad) == 1:
        assert said.startswith(f"only position {ends[0]} of 12")
    elif ends[-1] - ends[0] + 1 == len(bad) and ends[-1] == 11:
        assert f"all from {ends[0]} on differ" in said
    else:
        assert "only" in said or f"all from {ends[-1] + 1} on agree" in said


def test_float64_that_is_right_to_float32() -> None:
    """A float64 scalar, such as np.sqrt of an int in NumPy 2, widens numbers that were computed in float32."""
    theirs, few = {"logits": logits()}, None if THOROUGH else [ENTRIES[name] for name in ("erf GELU", "ReLU", "SiLU")]
    assert judged(theirs, "float64", few).code == 1
    report = compare(CONFIG, ARRAYS, cases(theirs, CONFIG, IDS), "float64", coarser="float32", entries=few)
    assert (report.code, report.dtype) == (0, "float32")
    assert "judged in float32, whose rounding explains every difference" in said(report)
    for wrong in ({"logits": logits(ENTRIES["erf GELU"])}, shown(ENTRIES["erf GELU"].change(BOOK))):
        report = compare(CONFIG, ARRAYS, cases(wrong, CONFIG, IDS), "float64", coarser="float32", entries=few)
        assert (report.code, report.dtype, report.names) == (1, "float32", ["erf GELU"])
        assert "The numbers are float64, but were judged in float32" in said(report)


def test_it_is_said_what_was_not_compared() -> None:
    report = judged({"wte": ARRAYS["wte.weight"][IDS]})
    assert report.matches
    assert report.verdict.endswith("in 1 stage; no stage after wte was given")
    assert not judged({"logits": logits()}).verdict.endswith("was given")


def test_the_columns_are_explained_and_clear_is_one_number() -> None:
    assert CLEAR == 5
    assert "1 tolerance is 6 times" in said(judged({"logits": logits()}))
    assert set(HOOKS) <= set(COMPARED)
