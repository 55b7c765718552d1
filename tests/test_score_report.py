"""Scores as text, in colour and as HTML."""

from __future__ import annotations

import html.parser
import json
import math
import re
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt.errors import printable
from npgpt.language_model import LanguageModel
from npgpt.scoring import page as pages
from npgpt.scoring import report
from npgpt.scoring.likelihood import Score, figure, unknown
from npgpt.scoring.scoring import score
from npgpt.text.tokenizer import shown
from tests.support.models import random_parameters, small

LN2 = math.log(2)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return npgpt.load(dtype="float64")


def made(pieces: list[bytes], bits: list[float | None]) -> Score:
    """Return a score with literal surprisals."""
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
    heading, first, *rows = report.table(found, 2, colours=False)
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
        f"a\\x1bb.txt: {len(found.pieces)} tokens, {len(found.pieces)} of them scored: 14 bytes, 3"
    )
    numbers = [float(re.findall(r"[\d.,]+", line)[0].replace(",", "")) for line in lines[1:]]
    expected = [found.totals.nll, found.perplexity, found.totals.word_perplexity, found.totals.bits_per_byte]
    assert numbers == pytest.approx(expected, abs=6e-3)


def test_a_token_of_no_text_has_its_number() -> None:
    (found,) = score([[4095, 4094, 1]], npgpt.load(), top=4096, end_of_text=False)
    assert report.named(found, 0) == "'<|endoftext|>'"
    assert len(report.likeliest(found, 1)) == 4096
    (without,) = score(
        [[1, 2, 3]], LanguageModel("bare", small(), random_parameters(small())), top=2, end_of_text=False
    )
    assert report.named(without, 1) == "id 2"
    assert [name.split()[0] for name, _ in report.likeliest(without, 1)] == ["id", "id"]


class Tokens(html.parser.HTMLParser):
    """Kind and text of every token on a page, the figures of each text, and what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.kind, self.script = False, "", ""
        self.tokens: list[tuple[str, str]] = []
        self.figures: list[dict[str, Any]] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        found = dict(attrs)
        assert not found.keys() & {"src", "href", "onclick"}
        self.inside = found.get("class") == "text" or (self.inside and tag == "i")
        self.kind = found["class"] if self.inside and tag == "i" else ""
        self.script = found.get("type", "")
        if self.kind:
            self.tokens.append((self.kind, ""))

    def handle_data(self, data: str) -> None:
        if self.kind:
            kind, text = self.tokens.pop()
            self.tokens.append((kind, text + data))
        if self.script == "application/json":
            self.figures.append(json.loads(data))

    def handle_endtag(self, tag: str) -> None:
        self.kind = self.script = ""


def test_a_page_has_every_token_and_its_figures(model: LanguageModel) -> None:
    text = 'Emma <script>alert("naïve 日本")</script> & \\xc3 was happy\n'
    found, other = score([text, "Emma"], model, convention="huggingface", top=3, end_of_text=True)
    content = "".join(pages.score_page([("<b>.txt", found), ("x", other)], "austen <1>", "huggingface"))
    page = Tokens()
    page.feed(content)
    plain = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "i", "pre", "div", "kbd"}
    assert page.tags == plain | {"script", "output"}
    parts = list(report.segments(found))
    own = page.tokens[: len(parts)]
    assert "".join(shown for _, shown in own) == text
    assert len(page.tokens) - len(own) == len(list(report.segments(other)))
    levels = [report.level(found, numbers) for _, numbers in parts]
    assert [kind for kind, _ in own] == ["none" if level is None else f"b{level}" for level in levels]
    figures, _ = page.figures
    assert figures["lengths"] == [len(numbers) for _, numbers in parts]
    assert figures["ids"] == found.token_ids.tolist()
    assert figures["bytes"] == found.byte_offsets.tolist()
    assert figures["ranks"] == found.ranks.tolist()
    assert figures["top_ids"] == found.likelihood.top_ids.tolist()
    scored = found.ranks > 0
    for name in ("log_probs", "top_log_probs"):
        values = np.array(figures[name], dtype=float)
        np.testing.assert_allclose(values[scored], getattr(found.likelihood, name)[scored], rtol=0, atol=5.1e-7)
    for token_id in {*found.token_ids.tolist(), *np.unique(found.likelihood.top_ids).tolist()}:
        assert figures["pieces"][str(token_id)] == printable(shown(model.tokenizer.piece(token_id)))
    assert "&lt;b&gt;.txt" in content
    assert "<h1>austen &lt;1&gt;</h1><p>huggingface</p>" in content


def test_tokens_that_are_not_scored_have_no_figures() -> None:
    page = Tokens()
    page.feed("".join(pages.score_page([("x", made([b"a", b"\xc3", b"\xa9", b""], [None, 1, 2, 0]))])))
    assert page.tokens == [("none", "a"), ("b1", "é"), ("b0", "3 ")]
    (figures,) = page.figures
    assert figures["log_probs"] == [None, -0.693147, -1.386294, 0]
    assert figures["pieces"] == {"0": "a", "1": "\\xc3", "2": "\\xa9", "3": ""}
    assert "<h1>" not in "".join(pages.score_page([]))


def test_a_score_in_a_notebook() -> None:
    found = made([b"a", b" b"], [None, 1])
    assert (found._repr_html_() or "").startswith("<iframe srcdoc=")
    assert made([b"a"] * (2**14 + 1), [1] * (2**14 + 1))._repr_html_() is None


@pytest.mark.parametrize(
    ("perplexity", "shown"),
    [(1.0, "1.000"), (12345.6789, "12,345.679"), (1.234e46, "1.2e46"), (math.inf, "inf"), (math.nan, "nan")],
)
def test_a_perplexity_is_short_even_if_it_is_absurd(perplexity: float, shown: str) -> None:
    assert figure(perplexity) == shown
