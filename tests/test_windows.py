"""How texts are cut into windows; tests/parity/test_scoring.py compares with the real programs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npgpt.errors import NpgptError
from npgpt.scoring.windows import NAMES, Convention, Window, convention, windows
from tests.support.models import small


def rule(name: str, context: int, stride: int) -> Convention:
    return Convention(name=name, context=context, stride=stride, end_of_text=False)


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, int]:
    """Return cases of length, context and stride."""
    context = draw(st.integers(2, 30))
    return draw(st.integers(0, 150)), context, draw(st.integers(1, context))


@given(cases())
def test_rolling_scores_every_id_but_the_first_once_and_with_the_context_it_can_have(
    case: tuple[int, int, int],
) -> None:
    length, context, stride = case
    found = windows(length, rule("rolling", context, stride))
    assert [i for w in found for i in range(w.first, w.last)] == list(range(1, length))
    for w in found:
        assert 0 <= w.begin < w.first < w.last <= length
        assert w.last - 1 - w.begin <= context  # the last one is not read
        for i in range(w.first, w.last):
            assert i - w.begin >= min(i, context - stride + 1)
    if length > context:
        assert found[-1].last - 1 - found[-1].begin == context  # the last one is full


@given(cases())
def test_huggingface_by_the_guides_own_words(case: tuple[int, int, int]) -> None:
    """begin, end and trg_len are counted as in the guide; the shift excludes a window's first id."""
    length, context, stride = case
    expected, previous = [], 0
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        targets = [i for i in range(end - (end - previous), end) if i > begin]
        expected += [(begin, i) for i in targets]
        previous = end
        if end == length:
            break
    found = windows(length, rule("huggingface", context, stride))
    assert [(w.begin, i) for w in found for i in range(w.first, w.last)] == expected


@given(st.integers(0, 150), st.integers(2, 30))
def test_llama_cpp_by_its_own_words(length: int, context: int) -> None:
    """Only whole chunks count; logits from n_ctx / 2 to n_ctx − 2 predict the next tokens."""
    chunks = range(length // context)
    expected = [(c * context, c * context + j + 1) for c in chunks for j in range(context // 2, context - 1)]
    found = windows(length, rule("llama.cpp", context, context))
    assert [(w.begin, i) for w in found for i in range(w.first, w.last)] == expected


def test_literals() -> None:
    assert windows(11, rule("rolling", 4, 4)) == [Window(0, 1, 5), Window(4, 5, 9), Window(6, 9, 11)]
    assert windows(11, rule("rolling", 4, 3)) == [Window(0, 1, 5), Window(3, 5, 8), Window(6, 8, 11)]
    assert windows(9, rule("huggingface", 4, 2)) == [Window(0, 1, 4), Window(2, 4, 6), Window(4, 6, 8), Window(6, 8, 9)]
    assert windows(9, rule("huggingface", 4, 4)) == [Window(0, 1, 4), Window(4, 5, 8)]
    assert windows(9, rule("llama.cpp", 4, 4)) == [Window(0, 3, 4), Window(4, 7, 8)]
    assert windows(1, rule("rolling", 4, 4)) == windows(0, rule("rolling", 4, 4)) == []


def test_each_convention_has_its_own_customs() -> None:
    big = small(n_positions=1024)
    found = {name: convention(name, big) for name in NAMES}
    assert {name: (c.context, c.stride, c.end_of_text) for name, c in found.items()} == {
        "rolling": (1024, 1024, True),
        "huggingface": (1024, 512, False),
        "llama.cpp": (512, 512, False),
    }
    assert convention("huggingface", big, context=10, end_of_text=True).stride == 5
    for name, c in found.items():
        assert f"{name}: windows of {c.context} tokens, stride {c.stride}, " in str(c)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "paper"}, "unknown convention 'paper'; choose rolling, huggingface, llama.cpp"),
        ({"context": 25}, "a window of 25 tokens is longer than the model's context, 24"),
        ({"context": 1}, "context .* at least 2, not 1"),
        ({"name": "llama.cpp", "context": 2}, "context .* at least 3, not 2"),
        ({"stride": 0}, "the stride must be at least 1, not 0"),
        ({"stride": 25}, "a stride of 25 skips tokens: use at most 24, the size of a window"),
        ({"context": 8, "stride": 9}, "a stride of 9 skips tokens: use at most 8"),
        ({"name": "llama.cpp", "stride": 3}, "the stride must be 24, not 3"),
        ({"stride": 2.5}, "the stride must be a whole number, not 2.5"),
    ],
)
def test_what_cannot_be(arguments: dict[str, Any], message: str) -> None:
    all_of_them: dict[str, Any] = {"name": "rolling", "config": small(n_positions=24)} | arguments
    with pytest.raises(NpgptError, match=message):
        convention(**all_of_them)
