"""The oracle on a backward pass in the manner of llm.c, right and altered. tests/parity has PyTorch's beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt import parameters
from npgpt.gradients import loss_and_gradients
from npgpt.language_model import LanguageModel
from npgpt.oracle.report import Report
from tests.support import backward
from tests.support.models import no_text, random_arrays, random_ids, small
from tests.support.thorough import examples
from tests.support.tolerances import relative_error, rounding_bound

CONFIG = small(n_layer=1, tie_word_embeddings=False)
ARRAYS = random_arrays(CONFIG)
TOKENS = random_ids(CONFIG, (2, 10))
IDS, TARGETS = TOKENS[:, :-1], TOKENS[:, 1:].copy()
TARGETS[0, 6:] = TARGETS[1, :2] = -100
MODEL = parameters.from_arrays(CONFIG, dict(ARRAYS))
# a mistake for each part of the pass
NAMED = (
    "targets shifted twice",
    "GELU's derivative after the activation",
    "LayerNorm's backward without the variance term",
    "softmax's backward without the sum",
    "q and k exchanged in their gradients",
    "c_fc's weight gradient from ln_1",
    "gradients not reset, twice",
)
TRIED = NAMED[:: examples(4, 1)]


def shown(*edits: tuple[str, str]) -> dict[str, Any]:
    """Return what the program shows with these edits."""
    found: dict[str, Any] = backward.load("c_like", edits).run(ARRAYS, CONFIG, IDS, TARGETS)
    return found


def report(theirs: Mapping[str, Any]) -> Report:
    """Return the report on a program's loss, stages and gradients."""
    reference = LanguageModel("reference", CONFIG, MODEL, no_text("none"))
    return npgpt.check(theirs, IDS, reference, targets=TARGETS)


def test_the_backward_pass_in_the_manner_of_llm_c_is_npgpts() -> None:
    record: dict[str, Any] = {}
    loss, gradients = loss_and_gradients(MODEL, CONFIG, IDS, TARGETS, record=record.__setitem__)
    theirs = backward.load("c_like").run(ARRAYS, CONFIG, IDS, TARGETS, "float64")
    ours = record | {f"d.{name}": array for name, array in parameters.to_arrays(gradients).items()}
    # a backward pass has twice the forward pass's roundings, after those; a weight's sum over tokens adds 2 × 9
    bound = 2 * rounding_bound(CONFIG, IDS.size, np.float64)
    assert abs(theirs["loss"][0] - loss) <= bound * loss
    for name in theirs.keys() & ours.keys():
        hidden = name.endswith("attn.weights")  # the program does not compute what reaches a hidden key
        seen = np.tri(IDS.shape[1]) if hidden else 1.0
        assert relative_error(theirs[name] * seen, ours[name] * seen) <= bound, name


def test_the_right_program_matches() -> None:
    assert report(shown()).matches


@pytest.mark.parametrize("truth", TRIED)
def test_a_mistake_is_named(truth: str) -> None:
    edits = next(each.edits for each in backward.read()["c_like"] if each.truth == truth)
    assert report(shown(*edits)).names == [truth]


def test_an_edits_old_text_stands_once_in_its_program() -> None:
    for each in [*backward.mistakes(), *backward.rewrites()]:
        backward.altered(each.program, each.edits)
        assert all(before != after for before, after in each.edits), each.truth
