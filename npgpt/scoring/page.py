"""Scored texts as one page of HTML: no network, no script, readable in dark and light."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator

from ..language_model import LanguageModel
from .likelihood import Score
from .report import STEP, TINTS, bits, level, named, segments, shown, summary
from .windows import Convention

STYLE = """
:root { color-scheme: light dark; font: 16px/1.7 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
pre { font-size: .85rem; line-height: 1.4; overflow-x: auto; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-serif, Georgia, serif; }
i { font-style: normal; border-radius: .15em; } i:hover { outline: 2px solid CanvasText; }
i.none { opacity: .55; }
"""


def page(texts: Iterable[tuple[str, Score]], model: LanguageModel, rule: Convention) -> Iterator[str]:
    """The page, part by part: every text with its sums, its tokens tinted by surprise, figures where one points."""
    # transparent, so that the text keeps its contrast on dark and on light
    tints = "".join(f".b{n} {{ background: rgb(255 90 0 / {0.09 * n:.2f}); }}\n" for n in range(1, len(TINTS) + 1))
    yield '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>npgpt score</title>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<style>{STYLE}{tints}</style></head><body>\n"
    yield f"<h1>{html.escape(model.name)}, {model.parameters.wte.weight.dtype}</h1><p>{html.escape(str(rule))}.</p>\n"
    yield "<p>Bits of surprise, −log₂ of the probability, from: "
    yield " ".join(f'<i class="b{n}">&nbsp;{STEP * n:.0f}&nbsp;</i>' for n in range(1, len(TINTS) + 1))
    yield ' <i class="none">not scored</i>. Point at a token for its figures.</p>\n'
    for name, score in texts:
        first, *rest = (html.escape(line) for line in summary(name, score.totals))
        yield f"<h2>{first}</h2><pre>{chr(10).join(rest)}</pre>\n"
        yield '<div class="text">'
        for text, tokens in segments(score):
            how = level(score, tokens)
            title = "\n".join(details(score, model, number) for number in tokens)
            kind = "none" if how is None else f"b{how}"
            yield f'<i class="{kind}" title="{html.escape(title)}">{html.escape(text)}</i>'
        yield "</div>\n"
    yield "</body></html>\n"


def details(score: Score, model: LanguageModel, number: int) -> str:
    """One token's figures, and what the model held likeliest in its place."""
    found = score.likelihood
    lines = [f"{shown(score.pieces[number])!r}, id {score.token_ids[number]}, byte {score.byte_offsets[number]}"]
    if not found.ranks[number]:
        return f"{lines[0]}: not scored"
    log_prob = float(found.log_probs[number])
    lines.append(
        f"log-probability {log_prob:.4f}, probability {math.exp(log_prob):.2%}, {bits(log_prob):.2f} bits, "
        f"rank {found.ranks[number]}"
    )
    for token_id, value in zip(found.top_ids[number].tolist(), found.top_log_probs[number].tolist(), strict=True):
        lines.append(f"  {named(model, token_id)} {math.exp(value):.2%}")
    return "\n".join(lines)
