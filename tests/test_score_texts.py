"""How a text that comes in parts is read: its ids are those of the whole."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import npgpt
from npgpt.errors import NpgptError
from npgpt.scoring import texts
from npgpt.text import byte_pairs
from npgpt.text.added_tokens import AddedToken
from npgpt.text.byte_pairs import PIECES
from tests.support.austen import AUSTEN

# letters of several scripts, digits, contractions, marks, and all that somebody calls white space
LETTERS = [
    "a",
    "Emma",
    "é",
    "e\u0301",
    "日本",
    "한",
    "א",
    "😀",
    "'s",
    "'",
    "ll",
    "7",
    "½",
    "—",
    "-",
    "\u200b",
    "\ufeff",
    "\x1c",
]
SPACES = [" ", "  ", "\n", "\r\n", "\t", "\x0b", "\x0c", "\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u3000"]
TEXTS = st.lists(st.sampled_from([*LETTERS, *SPACES, *SPACES[:4]]), max_size=40).map("".join)


def read(parts: list[Any], special: bool = False, model: npgpt.LanguageModel = AUSTEN) -> list[int]:
    """The ids of a text that comes in these parts."""
    found = list(texts.tokens(iter(parts), model, special, {}, "the text"))
    return [token_id for part in found for token_id in part.ids.tolist()]


@given(TEXTS, st.integers(1, 9), st.integers(1, 9))
def test_ids_are_those_of_the_whole_text(text: str, part: int, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "PART", size)
        given = [text[at : at + part] for at in range(0, len(text), part)]
        assert "".join(texts.cut(given)) == text
        assert read(given) == AUSTEN.tokenizer.encode(text)


@given(st.text(max_size=30), st.integers(1, 5))
def test_any_characters(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "PART", size)
        assert read([text]) == AUSTEN.tokenizer.encode(text)


def test_cuts_literally(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PART", 4)
    assert list(texts.cut(["It is a truth.\n\nEmma"])) == ["It", " is a", " truth.", "\n\nEmma"]
    assert list(texts.cut(["a\u3000b\xa0c\u2028d"])) == ["a\u3000b\xa0c\u2028d"]  # white space, but not for certain
    assert list(texts.cut(["日" * 9])) == ["日" * 9]
    assert list(texts.cut([" " * 9, "a", " " * 9])) == [" " * 9 + "a" + " " * 9]
    assert list(texts.cut([])) == list(texts.cut([""])) == []


def test_the_pattern_is_the_one_that_the_cuts_are_shown_for() -> None:
    """In every alternative white space is at the beginning, or all there is."""
    alternatives = [
        r"'(?:[sdmt]|ll|ve|re)",
        r" ?\p{L}++",
        r" ?\p{N}++",
        r" ?[^\s\p{L}\p{N}]++",
        r"\s++$",
        r"\s+(?!\S)",
        r"\s",
    ]
    assert "|".join(alternatives) == PIECES


@pytest.mark.parametrize("special", [False, True])
def test_special_tokens_are_never_cut(special: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PART", 1)
    text = "Emma <|endoftext|> was<|endoftext|>  glad \n<|endoftext|>\n"
    assert read([*text], special) == AUSTEN.tokenizer.encode(text, special=special)


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("was glad"),
        AddedToken("\n"),
        AddedToken("<a>", lstrip=True),
        AddedToken("<a>", rstrip=True),
        AddedToken("<a>", single_word=True),
    ],
)
def test_a_text_is_whole_where_tokens_mind_white_space(token: AddedToken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PART", 1)
    pairs = byte_pairs.BytePairs(AUSTEN.tokenizer.ranks, {}, AUSTEN.tokenizer.files)
    tokenizer = byte_pairs.tokenizer(pairs, {token.content: (token, 5000)}, 5001)
    model = replace(AUSTEN, open_tokenizer=lambda: tokenizer)
    text = "She was glad \n <a> indeed; 1 <a>\nof it"
    assert read([*text], model=model) == tokenizer.encode(text)
    assert 5000 in tokenizer.encode(text)
    assert not tokenizer.by_parts
    assert AUSTEN.tokenizer.by_parts


def test_a_space_before_a_text_is_put_there_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PART", 1)
    pairs = byte_pairs.BytePairs(AUSTEN.tokenizer.ranks, {}, AUSTEN.tokenizer.files)
    tokenizer = byte_pairs.tokenizer(pairs, {}, 5000, prefix_space=True)
    model = replace(AUSTEN, open_tokenizer=lambda: tokenizer)
    assert read([*"Emma\nwas"], model=model) == tokenizer.encode("Emma\nwas") == AUSTEN.tokenizer.encode(" Emma\nwas")


@pytest.mark.parametrize("prefix_space", [False, True])
@pytest.mark.parametrize("part", [1, b"Emma"])
def test_parts_that_are_no_text_are_refused_however_a_text_is_read(part: Any, prefix_space: bool) -> None:
    pairs = byte_pairs.BytePairs(AUSTEN.tokenizer.ranks, {}, AUSTEN.tokenizer.files)
    tokenizer = byte_pairs.tokenizer(pairs, {}, 5000, prefix_space=prefix_space)
    model = replace(AUSTEN, open_tokenizer=lambda: tokenizer)
    with pytest.raises(NpgptError, match="a part of a text must be a str, not"):
        read(["Emma", part], model=model)


def test_words_are_counted_where_they_begin() -> None:
    rng = random.Random(0)
    text = "".join(rng.choice([*LETTERS, *SPACES]) for _ in range(3000))
    found = list(texts.tokens(text, AUSTEN, False, {}, "the text"))
    assert sum(int(part.words.sum()) for part in found) == len(re.findall(r"\S+", text))
    assert sum(int(part.sizes.sum()) for part in found) == len(text.encode())
