"""A score in words: sums, a table of tokens, the text tinted by surprise, a record for JSON."""

from __future__ import annotations

import codecs
import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

from ..errors import printable
from ..language_model import LanguageModel
from .likelihood import Score, Totals
from .windows import Convention

STEP = 2.0  # bits of surprise between two tints
TINTS = (230, 229, 222, 215, 209, 203, 197)  # xterm's colours, from 2 bits on: from pale yellow to red
BLACK, DIM, PLAIN = "\x1b[30;48;5;{}m", "\x1b[2m", "\x1b[0m"


def settings(model: LanguageModel, rule: Convention, top: int, special: bool) -> dict[str, Any]:
    """All that a score depends on but the text."""
    cut = asdict(rule)
    return {"weights": model.fingerprint, "convention": cut.pop("name"), **cut, "special": special, "top": top}


def fingerprint(text: str) -> str:
    """sha256 of its UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def record(name: str, text: str, score: Score, its_settings: dict[str, Any]) -> dict[str, Any]:
    """A JSON object: totals, and of every token what another engine's output can be joined by and compared with."""
    totals, found = score.totals, score.likelihood
    pieces = [shown(piece) for piece in score.pieces]
    tokens: dict[str, Any] = {
        "token_ids": score.token_ids.tolist(),
        "pieces": pieces,
        "byte_offsets": score.byte_offsets.tolist(),
        "log_probs": [_number(value) for value in found.log_probs.tolist()],
        "ranks": [rank or None for rank in found.ranks.tolist()],
    }
    if found.top_ids.shape[1]:
        tokens["top_ids"] = [
            ids if rank else None for ids, rank in zip(found.top_ids.tolist(), tokens["ranks"], strict=True)
        ]
        tokens["top_log_probs"] = [None if math.isnan(some[0]) else some for some in found.top_log_probs.tolist()]
    sums = {**totals._asdict(), "perplexity": _number(totals.perplexity)}
    sums |= {"word_perplexity": _number(totals.word_perplexity), "bits_per_byte": _number(totals.bits_per_byte)}
    return {"text": name, "sha256": fingerprint(text), "settings": its_settings, **sums, **tokens}


class Whole(NamedTuple):
    """What a record has to have, to go on behind it."""

    text: str
    sha256: str
    settings: dict[str, Any]
    totals: Totals


def read(found: dict[str, Any]) -> Whole | None:
    """The same of a record; None for an object that is none."""
    sums = [found.get(name) for name in Totals._fields]
    text, sha256, settings = (found.get(name) for name in ("text", "sha256", "settings"))
    counts = all(type(value) is int for value in sums[:-1]) and isinstance(sums[-1], float)
    if not (isinstance(text, str) and isinstance(sha256, str) and isinstance(settings, dict) and counts):
        return None
    return Whole(text, sha256, settings, Totals(*sums))  # type: ignore[arg-type]


def _number(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def shown(piece: bytes) -> str:
    """A piece as text, bytes that are no whole UTF-8 as \\xe2."""
    return piece.decode("utf-8", errors="backslashreplace")


def summary(name: str, totals: Totals) -> list[str]:
    """The sums, line by line."""
    rows = [
        ("negative log-likelihood", f"{totals.nll:,.2f} nats"),
        ("perplexity per token", f"{totals.perplexity:,.3f}"),
        ("perplexity per word", f"{totals.word_perplexity:,.3f}" if totals.words else "no words"),
        ("bits per byte", f"{totals.bits_per_byte:.4f}"),
    ]
    counts = (
        f"{totals.tokens:,} tokens; scored are {totals.scored:,}, of {totals.bytes:,} bytes and {totals.words:,} words"
    )
    return [printable(f"{name}: {counts}"), *(f"  {label:<25}{value}" for label, value in rows)]


def bits(log_prob: float) -> float:
    """Surprise: −log2 of the probability."""
    return -log_prob / math.log(2)


def segments(score: Score) -> Iterator[tuple[str, list[int]]]:
    """The text in the smallest parts that are whole characters, and each one's tokens."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    held: list[int] = []
    for number, piece in enumerate(score.pieces):
        held.append(number)
        if text := decoder.decode(piece):
            yield text, held
            held = []


def level(score: Score, tokens: list[int]) -> int | None:
    """The surprise of the most surprising of some tokens, 0 to len(TINTS) by STEP bits; None where none is scored."""
    known = [bits(value) for value in score.log_probs[tokens].tolist() if not math.isnan(value)]
    return min(int(max(known) / STEP), len(TINTS)) if known else None


def tinted(score: Score) -> Iterator[str]:
    """The text for a terminal, part by part."""
    for text, tokens in segments(score):
        yield from _coloured(text, level(score, tokens))


def _coloured(text: str, how: int | None) -> Iterator[str]:
    """Line breaks stay outside, since a terminal would colour the rest of the line."""
    begin = DIM if how is None else BLACK.format(TINTS[how - 1]) if how else ""
    for number, part in enumerate(text.split("\n")):
        if number:
            yield "\n"
        if part:
            safe = "\t".join(map(printable, part.split("\t")))
            yield f"{begin}{safe}{PLAIN}" if begin else safe


def legend() -> str:
    """What the tints mean."""
    parts = [f"{BLACK.format(tint)} {int(STEP * number)} {PLAIN}" for number, tint in enumerate(TINTS, 1)]
    return f"bits of surprise, from: {''.join(parts)}; {DIM}not scored{PLAIN}"


def table(score: Score, model: LanguageModel, colours: bool) -> Iterator[str]:
    """A line for each token: byte offset, rank, bits, the token, and what the model held likeliest there."""
    yield f"{'byte':>7} {'rank':>6} {'bits':>6}  token"
    found = score.likelihood
    for number, piece in enumerate(score.pieces):
        begin = f"{score.byte_offsets[number]:>7} "
        own = repr(shown(piece))
        if not found.ranks[number]:
            yield f"{begin}{'–':>6} {'–':>6}  {own}"
            continue
        tint = level(score, [number])
        painted = f"{BLACK.format(TINTS[tint - 1])}{own}{PLAIN}" if tint and colours else own
        rather = ", ".join(
            f"{named(model, token_id)} {math.exp(value):.1%}"
            for token_id, value in zip(
                found.top_ids[number].tolist(), found.top_log_probs[number].tolist(), strict=True
            )
        )
        padding = " " * max(0, 20 - len(own))
        yield f"{begin}{found.ranks[number]:>6} {bits(found.log_probs[number]):>6.2f}  {painted}{padding} {rather}"


def named(model: LanguageModel, token_id: int) -> str:
    """A token in quotes, or its number where it stands for no text."""
    tokenizer = model.tokenizer
    return repr(shown(tokenizer.piece(token_id))) if tokenizer.has_text(token_id) else f"id {token_id}"
