"""Scored texts as one page of HTML, coloured by surprisal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from ..errors import printable
from ..pictures import page
from ..text.tokenizer import shown
from .likelihood import Score
from .report import STEP, TINTS, level, segments, summary

SCRIPT = Path(__file__).with_name("page.js")
VALUES = 2**12  # tokens whose figures are written at a time
TOP = 5  # likely tokens to show at each position where a caller has no other wish
STYLE = """
html { scroll-padding-bottom: 9rem; } /* what the panel covers */
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 17px/1.75 ui-serif, Georgia, serif; max-width: 62rem;
  cursor: default; }
i { font-style: normal; border-radius: .15em; } .text i:hover { outline: 1px solid var(--line); }
i.none { color: var(--faint); } .text i.chosen, .text i:focus { outline: 2px solid var(--ink); }
.key i { padding: 0 .5em; } dl { margin: 0; display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; }
dt { color: var(--faint); } dd { margin: 0; }
"""


def score_page(texts: Iterable[tuple[str, Score]], heading: str = "", remark: str = "") -> Iterator[str]:
    """Yield the page part by part: each text with its name and sums, and a panel for the figures of a chosen token."""
    # transparent, so that the text keeps its contrast on dark and on light
    tints = "".join(
        f".b{n} {{ background: color-mix(in srgb, var(--heat) {9 * n}%, transparent); }}\n"
        for n in range(1, len(TINTS) + 1)
    )
    return page.page("npgpt score", STYLE + tints, _body(texts, heading, remark), SCRIPT.read_text("utf-8"))


def _body(texts: Iterable[tuple[str, Score]], heading: str, remark: str) -> Iterator[str]:
    if heading:
        yield f"<h1>{escape(printable(heading))}</h1><p>{escape(printable(remark))}</p>\n"
    yield '<p class="key">Surprisal in bits, −log₂ of the probability, from: '
    yield " ".join(f'<i class="b{n}">{STEP * n:.0f}</i>' for n in range(1, len(TINTS) + 1))
    yield ' <i class="none">not scored</i></p>\n'
    for name, score in texts:
        first, *rest = map(escape, summary(name, score.totals))
        yield f'<h2>{first}</h2><pre>{chr(10).join(rest)}</pre>\n<div class="text" role="group" aria-label="{first}">'
        lengths = []
        for text, tokens in segments(score):
            tint = level(score, tokens)
            yield f'<i class="{"none" if tint is None else f"b{tint}"}">{escape(text)}</i>'
            lengths.append(len(tokens))
        yield '</div>\n<script type="application/json">{'
        yield from _figures(score, lengths)
        yield "}</script>\n"
    yield '<output class="panel" aria-live="polite">Point at a token, tap it, or press <kbd>Tab</kbd> and arrow keys '
    yield "for its figures.</output>\n"


def _figures(score: Score, lengths: list[int]) -> Iterator[str]:
    """Yield the figures of the tokens as JSON, part by part; lengths: the number of tokens in each part of the text."""
    known = score.likelihood
    pieces = dict(zip(score.token_ids.tolist(), score.pieces, strict=True)) | dict(score.top_pieces)
    yield f'"pieces": {page.json_of({key: printable(shown(piece)) for key, piece in pieces.items()})}'
    columns: dict[str, Any] = {
        "lengths": lengths,
        "ids": score.token_ids,
        "bytes": score.byte_offsets,
        "ranks": known.ranks,  # 0: not scored
        "log_probs": known.log_probs,
        "top_ids": known.top_ids,
        "top_log_probs": known.top_log_probs,
    }
    for key, column in columns.items():
        yield f', "{key}": ['
        for start in range(0, len(column), VALUES):
            some = column[start : start + VALUES]
            values = some if isinstance(some, list) else some.round(6).tolist()
            yield (", " if start else "") + json.dumps(values)[1:-1].replace("NaN", "null")
        yield "]"
