"""Every known mistake made in the textbook's own pass is named, and rounding is not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from npgpt import parameters
from npgpt.config import Config
from npgpt.model import forward
from npgpt.oracle.arithmetic import as_computed, plain
from npgpt.oracle.comparison import compare
from npgpt.oracle.mistakes import Mistake, catalogue
from npgpt.oracle.report import Report
from npgpt.oracle.rounding import CLEAR
from npgpt.oracle.textbook import BLOCK, COMPARED, MODEL, Pass, Textbook, textbook
from npgpt.oracle.theirs import cases
from npgpt.parameters import Array
from tests.support.models import SHAPES, random_arrays, random_ids, small
from tests.support.reports import said
from tests.support.thorough import examples

TOKENS = 8
TWO = small(n_embd=24, n_head=4)
THREE = small(n_embd=24, n_head=4, n_layer=3)
OTHER = small(n_embd=20, n_head=5, n_layer=2, n_inner=36)
SEEN = ("ln_1", "attn.c_attn", "attn.merged", "attn.c_proj", "attn.residual", "mlp.c_fc", "mlp.act", "mlp.c_proj", "")


def given(book: Textbook, config: Config, logits_only: bool, tokens: int = TOKENS, seed: int = 0) -> Report:
    """Return a report that compares this book in float32 with the correct model."""
    arrays, ids = random_arrays(config), random_ids(config, (1, tokens), seed)
    single = {name: array.astype(np.float32) for name, array in arrays.items()}
    run = Pass(Textbook(book.config, single, book.layers, book.model, book.block), ids)
    with np.errstate(invalid="ignore"):
        return compare(config, arrays, cases(taken(run, config, logits_only), config, ids), "float32")


def taken(run: Pass, config: Config, logits_only: bool) -> dict[str, Array]:
    """Return what an implementation would give."""
    theirs: dict[str, Array] = {"logits": plain(run["logits"])}
    if not logits_only:
        theirs |= {
            f"h.{n}.{name}".rstrip("."): plain(run[f"h.{n}.{name}".rstrip(".")])
            for n in range(min(config.n_layer, len(run.book.layers)))
            for name in SEEN
        }
        theirs |= {"embedding": plain(run["embedding"]), "ln_f": plain(run["ln_f"])}
    return theirs


def names(report: Report) -> list[list[str]]:
    return [[entry.name for entry in finding.mistakes] for finding in report.diagnosis.findings]


def everything(report: Report) -> set[str]:
    return {name for group in names(report) for name in group}


def judged(mistake: Mistake, report: Report) -> None:
    """Check that a mistake is named, alone or in a class, if the evidence is clear, and else not excluded."""
    strongest = max(row.difference.ratio for row in report.rows)
    left = [entry.name for entry in report.diagnosis.left]
    given = {row.stage for row in report.rows}
    if mistake.stages == ("log_probabilities",) and "log_probabilities" not in given:
        assert mistake.name not in left  # what could not have touched any stage that was given is not spoken of
    elif strongest >= CLEAR:
        named = everything(report)  # in one block alone it may not be told from the same mistake in all of them
        assert {mistake.name, mistake.of} & named, (strongest, str(report))
        assert report.code == 1
        assert report.diagnosis.unexplained is None
    elif mistake.layer is None:  # of one block alone: not listed, since none is tried where nothing differs
        assert mistake.name in left, (strongest, str(report))
    else:
        assert not report.names


@pytest.mark.parametrize("mistake", catalogue(TWO, TOKENS)[:: examples(61, 1)], ids=lambda mistake: mistake.name)
def test_named_from_logits(mistake: Mistake) -> None:
    judged(mistake, given(mistake.change(textbook(TWO, random_arrays(TWO))), TWO, logits_only=True))


def test_layers_reversed() -> None:
    (entry,) = (entry for entry in catalogue(THREE, TOKENS) if entry.name == "layers reversed")
    judged(entry, given(entry.change(textbook(THREE, random_arrays(THREE))), THREE, logits_only=True))


# stages of other tokens are refused before anything is compared; the rest differs in a number alone
SAME = (
    "BOS prepended",
    "EOS appended",
    "first token missing",
    "last token missing",
    "layer ",
    "layers ",
    "n_head",
    "q, k, v read as",
)


@pytest.mark.parametrize(
    "mistake",
    [entry for entry in catalogue(OTHER, TOKENS) if not entry.name.startswith(SAME)][:: examples(43, 1)],
    ids=lambda mistake: mistake.name,
)
def test_named_from_stages(mistake: Mistake) -> None:
    judged(mistake, given(mistake.change(textbook(OTHER, random_arrays(OTHER))), OTHER, logits_only=False))


def test_names_are_unique_and_explained() -> None:
    config = small(n_embd=24, n_head=4, n_layer=12, n_positions=24)
    entries = catalogue(config, 8, (5, 1, 2), padded=True)
    assert len({entry.name for entry in entries}) == len(entries)
    assert all(entry.explanation and entry.source for entry in entries)
    assert {stage for entry in entries for stage in entry.stages} <= {*BLOCK, *MODEL, "layers", "config"}
    assert all(entry.stages for entry in entries)
    assert {"layers sorted as text", "cache not extended", "positions count the padding"} <= {e.name for e in entries}
    assert "n_head 12" in {e.name for e in entries if "n_layer" in e.explanation}


def test_what_cannot_be_made_in_a_model_is_left_out() -> None:
    entries = catalogue(small(n_layer=12, tie_word_embeddings=False), 2, padded=True)
    least = catalogue(small(n_layer=1, n_positions=1, vocab_size=64), 1)
    made_in_some = {
        "positions off by one",
        "positions off by two",
        "layers reversed",
        "layers sorted as text",
        "layer 0 missing",
        "BOS prepended",
        "last token missing",
        "logits of the previous position",
        "vocabulary padded and not masked",
        "output head tied",
        "positions count the padding",
    }
    assert made_in_some <= {entry.name for entry in entries}
    assert not made_in_some & {entry.name for entry in least}


DTYPES = ("float32", "float16", "bfloat16", "float64")


@pytest.mark.parametrize(("shape", "dtype"), [*itertools.product(SHAPES, DTYPES)][:: examples(5, 1)])
def test_rounding_alone_is_no_mistake(shape: str, dtype: str) -> None:
    config = SHAPES[shape]
    for seed in range(examples(1, 2)):
        arrays, ids = random_arrays(config, seed), random_ids(config, (2, 7), seed)
        run = Pass(textbook(config, {k: as_computed(v, dtype) for k, v in arrays.items()}), ids)
        stages = [f"h.{n}.{name}".rstrip(".") for n in range(config.n_layer) for name in COMPARED]
        theirs = {name: plain(run[name]) for name in ("embedding", *stages, "ln_f", "logits")}
        report = compare(config, arrays, cases(theirs, config, ids), dtype, entries=[])
        assert report.matches, str(report)


def naive(x: np.typing.NDArray[np.float32], weight: np.typing.NDArray[np.float32]) -> np.typing.NDArray[np.float32]:
    """Return x @ weight, summed one product after another."""
    total = np.zeros((*x.shape[:-1], weight.shape[1]), np.float32)
    for k in range(x.shape[-1]):
        total += x[..., k : k + 1] * weight[k]
    return total


def test_naive_sums_are_no_mistake() -> None:
    config = small(n_embd=96, n_head=3, n_layer=4, n_inner=384)
    arrays, ids = random_arrays(config), random_ids(config, (1, 9))
    single = {name: array.astype(np.float32) for name, array in arrays.items()}

    def sequential(name: str, source: str):  # type: ignore[no-untyped-def]
        return lambda s: naive(s[source], s[f"{name}.weight"]) + s[f"{name}.bias"]

    book = textbook(config, single).altered(
        {
            "attn.c_attn": sequential("attn.c_attn", "ln_1"),
            "attn.c_proj": sequential("attn.c_proj", "attn.merged"),
            "mlp.c_fc": sequential("mlp.c_fc", "ln_2"),
            "mlp.c_proj": sequential("mlp.c_proj", "mlp.act"),
            "unembedded": lambda s: naive(s["ln_f"], s["lm_head.weight"].T),
        }
    )
    report = compare(config, arrays, cases({"logits": Pass(book, ids)["logits"]}, config, ids), entries=[])
    assert report.matches, str(report)


def pair(first: str, second: str, logits_only: bool, config: Config = TWO) -> Report:
    entries = {entry.name: entry for entry in catalogue(config, TOKENS)}
    book = textbook(config, random_arrays(config))
    return given(entries[second].change(entries[first].change(book)), config, logits_only)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("erf GELU", "heads merged without transpose"),
        ("unbiased variance", "attention scale missing"),
        ("positions off by one", "ReLU"),
        ("c_attn bias dropped", "q, k, v read as k, q, v"),
    ][:: examples(4, 1)],
)
@pytest.mark.parametrize("logits_only", [True, False][: examples(1, 2)])
def test_two_mistakes_are_both_named(first: str, second: str, logits_only: bool) -> None:
    found = everything(pair(first, second, logits_only))
    assert {first, second} <= set(found)


def test_three_mistakes_one_after_another() -> None:
    entries = {entry.name: entry for entry in catalogue(TWO, TOKENS)}
    book = textbook(TWO, random_arrays(TWO))
    for name in ("embedding scaled", "causal mask missing", "quick GELU"):
        book = entries[name].change(book)
    found = names(given(book, TWO, logits_only=False))
    assert [group[0] for group in found] == ["embedding scaled", "causal mask missing", "quick GELU"]


def test_one_token_leaves_a_class() -> None:
    """At T = 1 the softmax has one entry, so scale, mask and split have no effect and some mistakes look alike."""
    entries = {entry.name: entry for entry in catalogue(TWO, 1)}
    book = textbook(TWO, random_arrays(TWO))
    report = given(entries["attention scale missing"].change(book), TWO, logits_only=True, tokens=1)
    assert report.matches
    left = {entry.name for entry in report.diagnosis.left}
    assert {"attention scale missing", "causal mask missing", "heads merged without transpose", "n_head 2"} <= left
    report = given(entries["q, k, v read as v, q, k"].change(book), TWO, logits_only=True, tokens=1)
    (group,) = names(report)
    assert set(group) >= {"q, k, v read as v, q, k"}
    assert len(group) > 1  # the values are what first stood for keys, whatever the others are
    assert "a prompt of several tokens" in str(report)


def test_with_one_head_scaling_by_the_width_is_no_mistake() -> None:
    assert "attention scaled by C" not in {entry.name for entry in catalogue(SHAPES["1 head"], TOKENS)}


@pytest.mark.usefixtures("few_pairs")
def test_what_nobody_knows_is_unexplained() -> None:
    book = textbook(TWO, random_arrays(TWO)).altered({"mlp.act": lambda s: np.sin(s["mlp.c_fc"])})
    for logits_only in (True, False):
        report = given(book, TWO, logits_only)
        assert names(report) == []
        assert report.diagnosis.unexplained == ("logits" if logits_only else "h.0.mlp.act")
        assert "no known mistake explains" in report.verdict


def test_nan_always_fails_and_zeros_are_no_nan() -> None:
    ids, arrays = random_ids(TWO, (1, 4)), random_arrays(TWO)
    logits = Pass(textbook(TWO, arrays), ids)["logits"].copy()
    logits[0, 1, 2] = np.nan
    report = compare(TWO, arrays, cases({"logits": logits}, TWO, ids), entries=[])
    assert report.code == 1
    assert report.rows[0].difference.ratio == np.inf
    zero = {name: np.zeros_like(array) for name, array in arrays.items()}
    logits = Pass(textbook(TWO, zero), ids)["logits"]
    assert compare(TWO, zero, cases({"logits": logits}, TWO, ids)).matches


def test_a_correct_float32_run_of_the_model_matches_at_every_stage() -> None:
    arrays, ids = random_arrays(TWO, dtype="float32"), random_ids(TWO, (3, 9))
    found: dict[str, np.typing.NDArray[np.floating]] = {}
    forward(parameters.from_arrays(TWO, arrays), TWO, ids, record=found.__setitem__)
    report = compare(TWO, random_arrays(TWO), cases(found, TWO, ids))
    assert report.matches, str(report)
    assert all(row.alone is None or row.alone <= 1 for row in report.rows)
    left = {entry.name for entry in report.diagnosis.left}
    assert {"key bias dropped", "mask of -1e4"} & left == {"mask of -1e4"}  # c_attn is there, and shows a key bias


def test_a_head_of_other_weights_has_its_own_sign() -> None:
    head = np.random.default_rng(5).standard_normal((TWO.vocab_size, TWO.n_embd))
    book = textbook(TWO, random_arrays(TWO)).altered({"lm_head.weight": lambda s: head.astype(np.float32)})
    report = given(book, TWO, logits_only=False)
    assert report.diagnosis.unexplained == "logits"
    assert "check the output head, its weights, and what is done with its logits" in said(report)


def test_a_tied_head_where_the_model_has_its_own() -> None:
    config = SHAPES["untied"]
    (entry,) = (entry for entry in catalogue(config, TOKENS) if entry.name == "output head tied")
    assert names(given(entry.change(textbook(config, random_arrays(config))), config, True)) == [["output head tied"]]


def test_a_padded_vocabulary_shows_in_log_probabilities_alone() -> None:
    (entry,) = (entry for entry in catalogue(TWO, TOKENS) if entry.name == "vocabulary padded and not masked")
    arrays, ids = random_arrays(TWO), random_ids(TWO, (1, TOKENS))
    run = Pass(entry.change(textbook(TWO, arrays)), ids)
    rows = run["logits"][0]
    by_hand = rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True) + 24)  # 40 ids and 24 zeros
    np.testing.assert_allclose(run["log_probabilities"][0], by_hand, atol=1e-12)
    assert names(compare(TWO, arrays, cases({"log_probabilities": by_hand}, TWO, ids))) == [[entry.name]]
