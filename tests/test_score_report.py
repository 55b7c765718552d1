"""Scores in words, colours and HTML."""

from __future__ import annotations

import html.parser
import math
import re
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt.language_model import LanguageModel
from npgpt.scoring import page as pages
from npgpt.scoring import report, windows
from npgpt.scoring.likelihood import Score, unknown
from npgpt.scoring.scoring import score

LN2 = math.log(2)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return npgpt.load(dtype="float64")


def made(pieces: list[bytes], bits: list[float | None]) -> Score:
    """A score of literal surprises."""
    log_probs = np.array([math.nan if value is None else -value * LN2 for value in bits])
    ranks = np.array([0 if value is None else 1 for value in bits])
    return Score(
        np.arange(len(pieces)), tuple(pieces), unknown(len(pieces), 0)._replace(log_probs=log_probs, ranks=ranks)
    )


def test_tints_by_surprise() -> None:
    parts = list(report.tinted(made([b"a", b" b", b" c\n", b"\nd", b"e"], [None, 1.9, 2.1, 5, 100])))
    yellow, orange, red = (f"\x1b[30;48;5;{report.TINTS[n]}m" for n in (0, 1, -1))
    assert "".join(parts) == f"\x1b[2ma\x1b[0m b{yellow} c\x1b[0m\n\n{orange}d\x1b[0m{red}e\x1b[0m"


def test_characters_stay_whole_and_take_the_larger_surprise() -> None:
    found = made([b"x\xc3", b"\xa9", b"y", b"\xe6", b"\x97", b"\xa5"], [0, 8.5, 1, None, None, 3])
    assert list(report.segments(found)) == [("x", [0]), ("é", [1]), ("y", [2]), ("日", [3, 4, 5])]
    assert [report.level(found, tokens) for _, tokens in report.segments(found)] == [0, 4, 0, 1]
    assert "".join(text for text, _ in report.segments(found)) == "xéy日"


def test_no_control_character_of_a_text_reaches_a_terminal() -> None:
    found = made([b"a\x1b[2J", b"\x07\tb\r\n"], [0, 0])
    assert "".join(report.tinted(found)) == "a\\x1b[2J\\x07\tb\\r\n"


def test_a_line_for_each_token(model: LanguageModel) -> None:
    (found,) = score(["Emma was happy"], model, top=2, end_of_text=False)
    heading, first, *rows = report.table(found, model, colours=False)
    assert heading.split() == ["byte", "rank", "bits", "token"]
    assert first.split() == ["0", "–", "–", "'Emma'"] or first.split()[:3] == ["0", "–", "–"]
    for number, row in enumerate(rows, 1):
        ids = found.likelihood.top_ids[number].tolist()
        chances = np.exp(found.likelihood.top_log_probs[number])
        own = repr(found.pieces[number].decode())
        bits = f"{-found.log_probs[number] / LN2:.2f}"
        assert row.split()[:3] == [str(found.byte_offsets[number]), str(found.ranks[number]), bits]
        rather = ", ".join(f"{model.tokenizer.piece(i).decode()!r} {p:.1%}" for i, p in zip(ids, chances, strict=True))
        assert own in row
        assert row.endswith(rather)


def test_a_summary(model: LanguageModel) -> None:
    (found,) = score(["Emma was happy"], model)
    lines = report.summary("a\x1bb.txt", found.totals)
    assert lines[0].startswith(
        f"a\\x1bb.txt: {len(found.pieces)} tokens; scored are {len(found.pieces)}, of 14 bytes and 3"
    )
    numbers = [float(re.findall(r"[\d.,]+", line)[0].replace(",", "")) for line in lines[1:]]
    expected = [found.totals.nll, found.perplexity, found.totals.word_perplexity, found.totals.bits_per_byte]
    assert numbers == pytest.approx(expected, abs=6e-3)


def test_a_token_of_no_text_has_its_number() -> None:
    model = npgpt.load()
    assert report.named(model, 5000) == "id 5000"
    assert report.named(model, 4095) == "'<|endoftext|>'"


class Tokens(html.parser.HTMLParser):
    """Kind, title and text of every token on a page, and what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = False
        self.tokens: list[tuple[str, str, str]] = []
        self.tags: set[str] = set()
        self.open: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        found = dict(attrs)
        assert not found.keys() & {"src", "href", "onclick"}
        self.inside = self.inside or found.get("class") == "text"
        if tag == "i" and self.inside:
            self.tokens.append((found["class"], found["title"], ""))
            self.open = found

    def handle_data(self, data: str) -> None:
        if self.open:
            kind, title, text = self.tokens.pop()
            self.tokens.append((kind, title, text + data))

    def handle_endtag(self, tag: str) -> None:
        if tag == "i":
            self.open = {}


def test_a_page_shows_every_token_and_its_figures(model: LanguageModel) -> None:
    text = 'Emma <script>alert("naïve 日本")</script> & was happy\n'
    rule = windows.convention("huggingface", model.config)
    (found,) = score([text], model, convention="huggingface", top=3)
    content = "".join(pages.score_page([("<b>.txt", found)], model, rule))
    page = Tokens()
    page.feed(content)
    assert page.tags <= {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "i", "pre", "div"}
    assert "".join(shown for _, _, shown in page.tokens) == text
    parts = list(report.segments(found))
    assert len(parts) == len(page.tokens)
    for (kind, title, _), (_, numbers) in zip(page.tokens, parts, strict=True):
        level = report.level(found, numbers)
        assert kind == ("none" if level is None else f"b{level}")
        for number in numbers:
            assert f"id {found.token_ids[number]}, byte {found.byte_offsets[number]}" in title
            if found.ranks[number]:
                assert f"log-probability {found.log_probs[number]:.4f}" in title
                assert f"rank {found.ranks[number]}" in title
                assert report.named(model, int(found.likelihood.top_ids[number, 2])) in title
    assert str(rule).split(":")[0] in content
    assert "&lt;b&gt;.txt" in content


@pytest.mark.parametrize(
    ("perplexity", "shown"),
    [(1.0, "1.000"), (12345.6789, "12,345.679"), (1.234e46, "1.2e46"), (math.inf, "inf"), (math.nan, "nan")],
)
def test_a_perplexity_is_short_even_if_it_is_absurd(perplexity: float, shown: str) -> None:
    assert report.figure(perplexity) == shown
