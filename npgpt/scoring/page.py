"""Scored texts as one page of HTML, coloured by surprisal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from html import escape

from ..language_model import LanguageModel
from ..pictures import page
from .likelihood import Score
from .report import STEP, TINTS, bits, level, likeliest, named, segments, summary
from .windows import Convention

STYLE = """
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 16px/1.7 ui-serif, Georgia, serif; max-width: 62rem; }
i { font-style: normal; border-radius: .15em; } i:hover { outline: 2px solid var(--ink); }
i.none { color: var(--faint); }
"""


def score_page(texts: Iterable[tuple[str, Score]], model: LanguageModel, rule: Convention) -> Iterator[str]:
    """Yield the page part by part: each text with its name and sums; a token's figures show under the pointer."""
    # transparent, so that the text keeps its contrast on dark and on light
    tints = "".join(f".b{n} {{ background: rgb(255 90 0 / {0.09 * n:.2f}); }}\n" for n in range(1, len(TINTS) + 1))
    return page.page("npgpt score", STYLE + tints, _body(texts, model, rule))


def _body(texts: Iterable[tuple[str, Score]], model: LanguageModel, rule: Convention) -> Iterator[str]:
    yield f"<h1>{escape(model.name)}, {model.parameters.wte.weight.dtype}</h1><p>{escape(str(rule))}.</p>\n"
    yield "<p>Bits of surprise, −log₂ of the probability, from: "
    yield " ".join(f'<i class="b{n}">&nbsp;{STEP * n:.0f}&nbsp;</i>' for n in range(1, len(TINTS) + 1))
    yield ' <i class="none">not scored</i>. Point at a token for its figures.</p>\n'
    for name, score in texts:
        first, *rest = map(escape, summary(name, score.totals))
        yield f'<h2>{first}</h2><pre>{chr(10).join(rest)}</pre>\n<div class="text">'
        for text, tokens in segments(score):
            tint = level(score, tokens)
            title = escape("\n".join(_figures(score, model, number) for number in tokens))
            yield f'<i class="{"none" if tint is None else f"b{tint}"}" title="{title}">{escape(text)}</i>'
        yield "</div>\n"


def _figures(score: Score, model: LanguageModel, number: int) -> str:
    """Return one token's figures, and what the model held likeliest in its place."""
    token_id = int(score.token_ids[number])
    token = f"{named(model, token_id)}, id {token_id}, byte {score.byte_offsets[number]}"
    rank, log_prob = score.ranks[number], float(score.log_probs[number])
    if not rank:
        return f"{token}: not scored"
    figures = f"log-probability {log_prob:.4f}, probability {math.exp(log_prob):.2%}, {bits(log_prob):.2f} bits"
    rather = (f"  {name} {chance:.2%}" for name, chance in likeliest(score, model, number))
    return "\n".join([token, f"{figures}, rank {rank}", *rather])
