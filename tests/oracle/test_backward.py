"""The oracle's backward pass: its formulas, its catalogue, and what it says of right and wrong gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from npgpt import parameters
from npgpt.config import Config
from npgpt.errors import NpgptError
from npgpt.gradients import loss_and_gradients
from npgpt.oracle.arithmetic import plain
from npgpt.oracle.backward import backward_stages, is_parameter
from npgpt.oracle.comparison import backward_entries, compare
from npgpt.oracle.mistakes import Mistake, catalogue
from npgpt.oracle.report import Report
from npgpt.oracle.rounding import redraw
from npgpt.oracle.textbook import Pass, Textbook, textbook
from npgpt.oracle.theirs import Case, take
from npgpt.parameters import Array
from tests.support.models import SHAPES, random_arrays, random_ids, small
from tests.support.thorough import examples

TOKENS = 7
ODD = small(n_embd=12, n_head=3)
FEW = ("3 heads x 7", "untied", "erf", "scaled by layer")
Ids = NDArray[np.int64]


def batch(config: Config, rows: int = 2) -> tuple[Ids, Ids]:
    """Return ids and targets, of which some are ignored, one row more than the other. Some ids occur twice."""
    ids = random_ids(config, (rows, TOKENS)) % 9
    targets = random_ids(config, (rows, TOKENS), 1)
    targets[0, 2:4] = -100
    return ids, targets


def run_of(book: Textbook, config: Config, dtype: str = "float64") -> Pass:
    """Return a pass of the batch in this dtype."""
    tensors = {name: array.astype(dtype) for name, array in book.tensors.items()}
    ids, targets = batch(config)
    return Pass(replace(book, tensors=tensors), ids, targets=targets)


def judged(run: Pass, config: Config, names: list[str], entries: list[Mistake] | None = None) -> Report:
    """Return the report on these stages of a pass."""
    ids, targets = batch(config)
    theirs = {name: plain(run[name]) for name in names}
    given = take(theirs, config, ids, None, (), targets).cases
    return compare(config, random_arrays(config), given, "float32", entries=entries)


def entries_of(config: Config) -> list[Mistake]:
    """Return the catalogue of the backward pass for the batch."""
    ids, targets = batch(config)
    return backward_entries(
        config, Case(ids, {}, targets=targets), run_of(textbook(config, random_arrays(config)), config)
    )


@pytest.mark.parametrize("shape", [*FEW, *SHAPES][: examples(4, len(FEW) + len(SHAPES))])
def test_every_gradient_is_that_of_gradients_py(shape: str) -> None:
    """Two derivations in float64, whose sums of some hundred products of size 1 differ by about 1e-15."""
    config = SHAPES[shape]
    arrays, (ids, targets) = random_arrays(config), batch(config)
    found: dict[str, Array] = {}
    model = parameters.from_arrays(config, arrays)
    loss, gradients = loss_and_gradients(model, config, ids, targets, record=found.__setitem__)
    found |= {f"d.{name}": array for name, array in parameters.to_arrays(gradients).items()} | {
        "loss": np.array([loss])
    }
    run = Pass(textbook(config, arrays), ids, targets=targets)
    assert set(found) <= set(backward_stages(config))
    for name in backward_stages(config):
        if name in found:
            mine = run[name][0] if name == "d.wpe" else run[name]
            np.testing.assert_allclose(mine, found[name], rtol=1e-11, atol=1e-14, err_msg=name)
        else:  # heads side by side: the same numbers as in heads of their own
            assert name.endswith(("attn.query", "attn.key", "attn.value", "attn.merged"))


def test_the_loss_of_one_position_by_hand() -> None:
    """With equal logits, each of V ids has probability 1 / V: the loss is log V, its gradient 1 / V, and −1 at the
    target.
    """
    config = small(vocab_size=4)
    ids = np.array([[1, 2]])
    run = Pass(textbook(config, {}), ids, {"logits": np.zeros((1, 2, 4))}, targets=np.array([[-100, 3]]))
    assert run["loss"] == pytest.approx(np.log(4), rel=1e-15)
    np.testing.assert_array_equal(run["d.logits"], [[[0, 0, 0, 0], [0.25, 0.25, 0.25, -0.75]]])


@pytest.mark.parametrize("shape", FEW)
def test_a_redrawn_model_has_the_same_gradients(shape: str) -> None:
    config = SHAPES[shape]
    arrays, (ids, targets) = random_arrays(config), batch(config)
    order = redraw(config, np.random.default_rng(1))
    usual, other = (
        Pass(textbook(config, tensors), ids, targets=targets) for tensors in (arrays, order.tensors(config, arrays))
    )
    for name in backward_stages(config):
        np.testing.assert_allclose(order.restored(name, other[name]), usual[name], rtol=1e-10, atol=1e-13, err_msg=name)
    assert np.abs(other["d.wte.weight"] - usual["d.wte.weight"]).max() > 1e-3  # it is another order


def test_every_entry_changes_a_gradient_and_no_forward_stage() -> None:
    for config in (ODD, small(n_embd=12, n_head=3, tie_word_embeddings=False, activation_function="gelu")):
        book = textbook(config, random_arrays(config))
        right = run_of(book, config)
        names = ["logits", *backward_stages(config)]
        entries = entries_of(config)
        assert len({entry.name for entry in entries}) == len(entries)
        assert all(entry.explanation and entry.source for entry in entries)
        for entry in entries[:: examples(23, 4)]:
            wrong = run_of(entry.change(book), config)
            differs = {name for name in names if not np.allclose(wrong[name], right[name], 1e-9, 1e-12)}
            assert differs, entry.name
            assert "logits" not in differs, entry.name
            assert all(np.shape(wrong[name]) == np.shape(right[name]) for name in names), entry.name


# not those of other tokens, which have other targets, of other layers, and of rounding, which has no derivative
DIFFERENTIABLE = [
    entry
    for entry in catalogue(ODD, TOKENS)
    if not {"token_ids", "layers"} & set(entry.stages) and not entry.name.startswith(("softmax in", "LayerNorm in"))
]


@pytest.mark.parametrize("entry", DIFFERENTIABLE[:: examples(97, 8)], ids=lambda entry: entry.name)
def test_gradients_of_a_wrong_forward_pass_are_its_own(entry: Mistake) -> None:
    """By central differences along a random direction: with steps of 1e-5, their error is about 1e-9 of the loss."""
    book = entry.change(textbook(ODD, random_arrays(ODD)))
    run, rng = run_of(book, ODD), np.random.default_rng(0)
    for name in ("h.0.ln_1", "h.1.attn.q", "h.0.attn.residual", "h.0.attn.c_attn.weight", "ln_f.weight", "wte.weight"):
        x, ids = run[name], run.token_ids
        step = rng.standard_normal(x.shape) * 1e-5
        low, high = (Pass(book, ids, {name: x + by * step}, targets=run.targets)["loss"].item() for by in (-1, 1))
        along = float((run[f"d.{name}"] * step).sum())
        assert along == pytest.approx((high - low) / 2, rel=1e-5, abs=1e-11), name


def parameters_of(config: Config) -> list[str]:
    return [name for name in backward_stages(config) if is_parameter(name, config)]


NAMED = [entry for entry in entries_of(ODD) if entry.layer is None and not {"loss"} >= set(entry.stages)]


@pytest.mark.parametrize("entry", NAMED[:: examples(len(NAMED), 10)], ids=lambda entry: entry.name)
def test_named_from_the_gradients_of_parameters(entry: Mistake) -> None:
    run = run_of(entry.change(textbook(ODD, random_arrays(ODD))), ODD, "float32")
    assert_named(entry, judged(run, ODD, parameters_of(ODD)))


@pytest.mark.parametrize("entry", NAMED[:: examples(len(NAMED), 10)], ids=lambda entry: entry.name)
def test_named_from_the_gradients_of_stages(entry: Mistake) -> None:
    run = run_of(entry.change(textbook(ODD, random_arrays(ODD))), ODD, "float32")
    assert_named(entry, judged(run, ODD, ["logits", *backward_stages(ODD)]))


def assert_named(entry: Mistake, report: Report) -> None:
    """Check that an entry is named, alone or as one of several that are equal in this batch."""
    assert not report.matches
    named = {mistake.name for finding in report.diagnosis.findings for mistake in finding.mistakes}
    assert entry.name in named, str(report)
    assert report.diagnosis.unexplained is None, str(report)


@pytest.mark.parametrize("stages", [True, False][: examples(1, 2)])
def test_right_gradients_match(stages: bool) -> None:
    run = run_of(textbook(ODD, random_arrays(ODD)), ODD, "float32")
    names = ["logits", *backward_stages(ODD)] if stages else parameters_of(ODD)
    report = judged(run, ODD, names, entries=[])
    assert report.matches, str(report)
    assert "no stage after" not in report.verdict


def test_where_a_gradient_differs() -> None:
    run = run_of(textbook(ODD, random_arrays(ODD)), ODD, "float32")
    right = {name: run.compute(f"d.h.1.{name}.weight") for name in ("mlp.c_proj", "mlp.c_fc", "attn.c_proj")}
    run.known |= {
        "d.h.1.mlp.c_proj.weight": right["mlp.c_proj"] * 0,
        "d.h.1.mlp.c_fc.weight": right["mlp.c_fc"] * 2,
        "d.h.1.attn.c_proj.weight": np.r_[right["attn.c_proj"][:1] * 3, right["attn.c_proj"][1:]],
    }
    report = judged(run, ODD, parameters_of(ODD), entries=[])
    assert report.where == {
        "d.h.1.mlp.c_proj.weight": "theirs is 0 everywhere: frozen, detached or never computed?",
        "d.h.1.mlp.c_fc.weight": "theirs = 2 x ours, up to rounding",
        "d.h.1.attn.c_proj.weight": "only row 0 of 12",
    }


@pytest.mark.parametrize("names", [["d.h.1.ln_2"], []])
def test_an_unknown_mistake_asks_for_stages_that_are_missing(names: list[str]) -> None:
    theirs = run_of(textbook(ODD, random_arrays(ODD)), ODD)
    ids, targets = batch(ODD)
    given = {name: plain(theirs[name]) for name in ("loss", "d.h.0.ln_1.weight", *names)}
    given["d.h.0.ln_1.weight"] = given["d.h.0.ln_1.weight"] + np.arange(12)
    report = compare(ODD, random_arrays(ODD), take(given, ODD, ids, None, (), targets).cases, "float32")
    text = " ".join(str(report).split())
    assert "No known mistake explains d.h.0.ln_1.weight." in text
    assert ("would show where it begins" in text) != bool(names)
    assert "experiments" not in text


def test_targets_and_gradients_belong_together() -> None:
    ids, targets = batch(ODD)
    with pytest.raises(NpgptError, match="loss depends on the targets of the loss: give targets="):
        take({"loss": 1.0}, ODD, ids, None, ())
    with pytest.raises(NpgptError, match="pad on the right"):
        take({"loss": 1.0}, ODD, ids, np.tri(2, TOKENS, TOKENS - 2), (), targets)
    with pytest.raises(NpgptError, match=r"d\.ln_f\.bias has shape \[3\] and must be \[12\]"):
        take({"d.ln_f.bias": np.zeros(3)}, ODD, ids, None, (), targets)
