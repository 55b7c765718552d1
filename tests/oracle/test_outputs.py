"""Users' callables and arrays: kinds of ids, targets, tuples, foreign arrays, and refusals."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import npgpt
from npgpt import parameters
from npgpt.errors import NpgptError
from npgpt.language_model import LanguageModel
from npgpt.oracle.outputs import as_array, logits_of
from npgpt.oracle.textbook import Pass, textbook
from tests.support.models import no_text, random_arrays, random_ids, small
from tests.support.thorough import examples

pytestmark = pytest.mark.usefixtures("few_mistakes")
CONFIG = small(n_embd=24, n_head=4, n_layer=examples(1, 2))
ARRAYS = random_arrays(CONFIG)
MODEL = LanguageModel("bare", CONFIG, parameters.from_arrays(CONFIG, ARRAYS), no_text("its ids are nobody's"))
IDS = random_ids(CONFIG, (2, 8))


def right(ids: Any) -> NDArray[np.float32]:
    """Return the right logits [B, T, V]."""
    found: NDArray[np.float32] = Pass(textbook(CONFIG, ARRAYS), np.asarray(ids))["logits"].astype(np.float32)
    return found


LOGITS = right(IDS)


class Foreign:
    """A framework's array that converts in one way, or in none."""

    def __init__(self, way: str) -> None:
        self.shape = LOGITS.shape
        if way:
            setattr(type(self), way, lambda *_, **__: LOGITS.tolist() if way == "tolist" else LOGITS)


@pytest.mark.parametrize("way", ["numpy", "__array__", "get", "tolist"])
def test_arrays_of_other_frameworks(way: str) -> None:
    foreign = type("Tensor", (Foreign,), {})(way)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert npgpt.check(foreign, IDS, MODEL).matches
        assert npgpt.check({"logits": foreign}, IDS, MODEL).matches
        assert npgpt.check(lambda ids: foreign, IDS, MODEL).matches


def test_dlpack() -> None:
    class Tensor:
        shape = LOGITS.shape

        def __dlpack__(self, **options: Any) -> Any:
            return LOGITS.__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return LOGITS.__dlpack_device__()

    assert np.array_equal(as_array(Tensor()), LOGITS)


@dataclass
class Output:
    """A program's own output class."""

    loss: Any
    scores: Any


@pytest.mark.parametrize(
    "output",
    [
        (LOGITS, None),
        (LOGITS, np.float32(3)),
        (np.float32(3), LOGITS),
        (None, LOGITS),
        {"loss": 3.0, "logits": LOGITS},
        {"loss": 3.0, "lm": LOGITS, "hidden": np.zeros((2, 8, 24))},
        SimpleNamespace(logits=LOGITS, loss=None),
        Output(None, LOGITS),
        LOGITS.tolist(),
        list(LOGITS),
        [LOGITS],
    ],
)
def test_logits_wherever_they_are(output: Any) -> None:
    assert np.array_equal(logits_of(output, CONFIG.vocab_size), LOGITS)
    assert npgpt.check(lambda ids: output, IDS, MODEL, dtype="float32").matches


def test_ids_are_given_in_the_kind_that_works() -> None:
    def of_lists(ids: Any) -> Any:
        if not isinstance(ids, list):
            raise TypeError("lists alone")
        return right(ids)

    def of_one_row(ids: Any) -> Any:
        if not isinstance(ids[0], (int, np.integer)):
            raise TypeError("one row alone")
        return right(np.asarray(ids)[None])[0]

    for function, kind in ((of_lists, "a list of rows"), (of_one_row, "a NumPy array of int64 [T], row by row")):
        report = npgpt.check(function, IDS, MODEL)
        assert report.matches
        assert (
            f"It was called with ids as {kind}, since it raises an error for a NumPy array of int64 [B, T]."
            in report.notes
        )
    assert not any("called with" in note for note in npgpt.check(right, IDS, MODEL).notes)


def test_what_needs_targets_gets_them() -> None:
    assert npgpt.check(lambda ids, targets: (right(ids), targets), IDS, MODEL).matches
    assert npgpt.check(lambda ids, *, labels: (right(ids), labels), IDS, MODEL).matches
    assert npgpt.check(lambda ids, targets: (right(ids), targets.sum()), IDS, MODEL).matches


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda ids: 1 / 0, "the lambda raises ZeroDivisionError: division by zero"),
        (lambda ids: None, "it returns None: is a return statement missing"),
        (lambda ids: "text", "must be numbers, not <U4"),
        (lambda ids: object(), "an object is not an array of numbers"),
        (
            lambda ids: {"hidden": np.zeros((2, 8, 24))},
            r"there are no logits in its output \(hidden\): is the head missing",
        ),
        (lambda ids: [[1.0], [1.0, 2.0]], "there are no logits in its output"),
        (lambda ids: type("Tensor", (Foreign,), {})(""), r"a Tensor cannot be read as an array: pass its \.numpy\(\)"),
        (
            lambda ids: ids.nothing,
            "for every kind of input: with a NumPy array of int64 .* AttributeError: .*; with a list of rows",
        ),
    ],
)
def test_what_a_callable_does_wrong_is_one_line(function: Any, message: str) -> None:
    with pytest.raises(NpgptError, match=message) as caught:
        npgpt.check(function, IDS, MODEL)
    assert "\n" not in str(caught.value)


def test_drawing_ends_the_check_at_once() -> None:
    """A callable that uses NumPy's or its own random numbers is not searched for mistakes."""
    own = np.random.default_rng(0)
    draw = np.random.standard_normal
    report = npgpt.check(lambda ids: LOGITS + draw(), IDS, MODEL)
    drawn = "its outputs differ from run to run: dropout is on, or something else is random"
    assert (report.verdict, report.rows, report.matches) == (f"differs: {drawn}", [], False)
    assert str(report).splitlines()[0] == f"Differs: {drawn}."
    report = npgpt.check(lambda ids: LOGITS + own.standard_normal(), IDS, MODEL)
    assert report.verdict == (
        "differs: its outputs differ from run to run, even with the same random seed: state is kept between calls (a "
        "cache that is not reset?), or it has its own generator"
    )


def test_a_cache_that_is_kept_is_not_called_dropout() -> None:
    seen: list[Any] = []

    def longer(ids: Any) -> Any:
        seen.append(ids)
        return right(np.concatenate(seen, axis=1))

    report = npgpt.check(longer, IDS, MODEL)
    assert report.problems == [
        "its outputs on the same ids have shapes [2, 8, 40], then [2, 16, 40]: state is kept between calls (a "
        "cache that is not reset?)"
    ]
    seen.clear()

    def shifted(ids: Any) -> Any:
        seen.append(ids)
        return right(np.concatenate(seen, axis=1)[:, :24])[:, -8:]

    assert "state is kept between calls (a cache that is not reset?)" in npgpt.check(shifted, IDS, MODEL).verdict
    seen.clear()

    def full(ids: Any) -> Any:
        seen.append(ids)
        return right(ids) if len(seen) == 1 else [][0]

    assert npgpt.check(full, IDS, MODEL).verdict.startswith(
        "differs: called a second time on the same ids, full raises IndexError: list index out of range: state is kept"
    )


def test_last_bits_that_change_are_rounding() -> None:
    """Threads may sum in another order."""
    rng = np.random.default_rng(0)
    noisy = [LOGITS * (1 + np.float32(1e-7) * rng.standard_normal(LOGITS.shape).astype(np.float32)) for _ in range(9)]
    assert npgpt.check(lambda ids: noisy.pop(), IDS, MODEL).matches


def test_arrays_against_a_fresh_model_say_what_cannot_show() -> None:
    fresh = {k: v * 0 if k.endswith("bias") else v for k, v in ARRAYS.items()}
    model = LanguageModel("fresh", CONFIG, parameters.from_arrays(CONFIG, fresh), no_text("none"))
    report = npgpt.check(Pass(textbook(CONFIG, fresh), IDS)["logits"].astype(np.float32), IDS, model)
    assert report.matches
    assert "A bias that is missing, added twice or added in the wrong place would not show" in report.notes[0]


def test_weights_from_a_state_dict() -> None:
    assert npgpt.check(LOGITS, IDS, ARRAYS, n_head=4).matches
    assert npgpt.check(LOGITS, IDS, {"model": ARRAYS, "step": 3}, n_head=4).matches
    for weights, message in (
        (ARRAYS, "weights does not state n_head, and no shape depends on it"),
        ({"a": np.zeros(3)}, "weights is not a GPT-2 that npgpt knows"),
        (3, "weights must be a model, its name or path, a module or a state dict, not 3"),
    ):
        with pytest.raises(NpgptError, match=message):
            npgpt.check(LOGITS, IDS, weights)
