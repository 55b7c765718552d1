"""The parts that all HTML pages share."""

from __future__ import annotations

import re

import npgpt
from npgpt.language_model import LanguageModel
from npgpt.oracle.page import page as check_page
from npgpt.pictures.attention import attend
from npgpt.pictures.page import STYLE, page
from npgpt.scoring.page import score_page
from npgpt.scoring.scoring import score
from tests.support.austen import AUSTEN
from tests.support.models import no_text, random_parameters, small


def test_every_page_has_the_one_style_and_no_network() -> None:
    model, ids = AUSTEN, [1, 2, 3]
    bare = LanguageModel("bare", small(), random_parameters(small()), no_text("it has none"))
    (found,) = score(["Emma"], model)
    pages = [
        attend(ids, model).page(),
        "".join(score_page([("a.txt", found)], "austen", "rolling")),
        check_page(npgpt.check(bare(ids), ids, bare)),
    ]
    for text in pages:
        assert text.count(STYLE) == 1
        assert "default-src 'none'" in text
        assert not re.search(r"https?:|(?:src|href)=", text)
        own = text.replace(STYLE, "")
        assert "color-scheme: light dark" not in own
        assert set(re.findall(r"var\((--\w+)\)", text)) <= set(re.findall(r"(--\w+):", text))


def test_a_page_is_its_parts_in_order_and_its_title_is_text() -> None:
    text = "".join(page("a <b> & c", "p { color: red; }", ["<p>one", " two</p>"]))
    assert "<title>a &lt;b&gt; &amp; c</title>" in text
    assert text.index(STYLE) < text.index("p { color: red; }") < text.index("</head><body>\n<p>one two</p></body>")
