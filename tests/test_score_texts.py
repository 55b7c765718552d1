"""A text that arrives in parts has the ids of the whole text."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import npgpt
from npgpt.errors import NpgptError
from npgpt.scoring import texts
from npgpt.scoring.likelihood import Score
from npgpt.scoring.scoring import totals
from npgpt.text import byte_pairs
from npgpt.text.added_tokens import AddedToken
from npgpt.text.byte_pairs import PIECES
from npgpt.text.vocabularies import open_tokenizer
from tests.support.austen import AUSTEN
from tests.support.models import small, store
from tests.support.tokenizer_folders import VOCAB_SIZE, cases
from tests.support.tokenizer_table import texts as several_texts
from tests.support.vocabularies import opened, put, small_pair

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
    """Return the ids of a text that arrives in these parts."""
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
    """In every alternative of the pattern, white space comes first or is all there is."""
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
    assert tokenizer.ends_of is not None
    assert AUSTEN.tokenizer.ends_of is None


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


CASES = [case for case in cases() if case.honoured]


@pytest.mark.parametrize("special", [False, True])
def test_every_tokenizers_tokens_cover_the_text(tmp_path: Path, special: bool) -> None:
    """For every kind of folder, the tokens' stretches joined give the text, one stretch for each id."""
    rewriting = 0
    for number, case in enumerate(CASES):
        put(tmp_path / str(number), case.files)
        try:
            tokenizer = open_tokenizer(tmp_path / str(number) / "model.safetensors", VOCAB_SIZE)
        except NpgptError as error:
            if "needs the package tokenizers" in str(error):
                continue  # the extra is not installed
            raise
        for text in several_texts(30):
            stretches = tokenizer.stretches(text, special)
            assert len(stretches) == len(tokenizer.encode(text, special=special, alone=True))
            assert b"".join(stretches).decode() == (text if stretches else ""), case.setting
        rewriting += tokenizer.ends_of is not None
    assert rewriting > 5


def test_stretches_of_added_tokens_literally(tmp_path: Path) -> None:
    """If two tokens claim the same white space, the second covers nothing."""
    tokens = {"261": {"content": "<x>", "lstrip": True, "rstrip": True}, "262": {"content": " "}}
    settings = {"tokenizer_config.json": {"added_tokens_decoder": tokens, "add_prefix_space": True}}
    tokenizer = opened(put(tmp_path, small_pair() | settings))
    assert tokenizer.encode("the\n<x>  é") == [258, 261, 262, 262, 220, 127, 102]
    assert tokenizer.stretches("the\n<x>  é", False) == [b"the", b"\n<x>  ", b"", b"", b"", b"\xc3", b"\xa9"]


def test_totals_are_the_texts_own_under_every_convention(tmp_path: Path) -> None:
    """Bytes and words are the text's own despite lower-casing, dropped accents and spaces, and unknown words."""
    pytest.importorskip("tokenizers", reason="extra tokenizers is not installed")
    words = {word: number for number, word in enumerate(["<unk>", "emma", "was", "glad", "<|endoftext|>"])}
    strip = {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}, {"type": "Lowercase"}]}
    files = {
        "tokenizer.json": {
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
            "normalizer": strip,
            "pre_tokenizer": {"type": "Whitespace"},
            "added_tokens": [],
        },
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"},
    }
    model = npgpt.load(put(store(tmp_path / "m", small(vocab_size=300)), files))
    text = "  Émma   was İndeed GLAD \n"
    raw = text.encode()
    for found in score_all(text, model):
        assert found.token_ids.tolist() == [1, 2, 0, 3]
        assert found.byte_offsets.tolist() == [0, 7, 13, 21]
    rolling, huggingface, llama = score_all(text, model)
    assert (rolling.totals.bytes, rolling.totals.words) == (len(raw), 4)
    assert (huggingface.totals.bytes, huggingface.totals.words) == (len(raw) - 7, 3)
    assert (llama.totals.bytes, llama.totals.words) == (
        7,
        1,
    )  # the second half of a window of 4, without its first token
    whole = list(totals([text], model))
    assert whole == [rolling.totals]
    (of_ids,) = npgpt.score([[1, 2]], model)
    assert of_ids.totals.bytes == sum(map(len, of_ids.pieces))


def score_all(text: str, model: npgpt.LanguageModel) -> list[Score]:
    """Return the text's score under each convention."""
    options: list[dict[str, Any]] = [{}, {"end_of_text": False}, {"context": 4}]
    return [
        next(npgpt.score([text], model, convention=name, **more))
        for name, more in zip(("rolling", "huggingface", "llama.cpp"), options, strict=True)
    ]
