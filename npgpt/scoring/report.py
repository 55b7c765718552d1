"""A score as text: its sums, a table of its tokens, the text itself coloured by surprisal."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Iterator

from ..errors import counted, printable
from ..text.tokenizer import quoted
from .likelihood import Score, Totals, figure

STEP = 2.0  # bits of surprisal between two tints
TINTS = (230, 229, 222, 215, 209, 203, 197)  # xterm's colours from 2 bits on, pale yellow to red
BLACK, DIM, PLAIN = "\x1b[30;48;5;{}m", "\x1b[2m", "\x1b[0m"


def summary(name: str, totals: Totals) -> list[str]:
    """Return the sums, line by line."""
    tokens, bytes_, words = map(counted, (totals.tokens, totals.bytes, totals.words), ("token", "byte", "word"))
    return [
        printable(f"{name}: {tokens}, {totals.scored:,} of them scored: {bytes_}, {words}"),
        f"  negative log-likelihood  {totals.nll:,.2f} nats",
        f"  perplexity per token     {figure(totals.perplexity)}",
        f"  perplexity per word      {figure(totals.word_perplexity) if totals.words else 'no words'}",
        f"  bits per byte            {f'{totals.bits_per_byte:.4f}' if totals.bytes else 'no text'}",
    ]


def bits(log_prob: float) -> float:
    """Return the surprisal of a token: -log2 of its probability."""
    return -log_prob / math.log(2)


def segments(score: Score) -> Iterator[tuple[str, list[int]]]:
    """Yield the text in the smallest parts that are whole characters, each with its tokens' numbers.

    An id without text is written as a number, and bytes of given ids that are not characters as \\xe2.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="backslashreplace")
    held: list[int] = []
    for number, piece in enumerate(score.pieces):
        held.append(number)
        text = decoder.decode(piece, final=not piece or number + 1 == len(score.pieces))
        text += "" if piece else f"{score.token_ids[number]} "
        if text:
            yield text, held
            held = []


def level(score: Score, tokens: list[int]) -> int | None:
    """Return the tint of the most surprising of these tokens, from 0 (no tint) up; None if none of them is scored."""
    known = [bits(value) for value in score.log_probs[tokens].tolist() if not math.isnan(value)]
    return min(int(max(known) / STEP), len(TINTS)) if known else None


def tinted(score: Score) -> Iterator[str]:
    """Yield the text for a terminal, part by part, without control characters other than tabs and line breaks."""
    for text, tokens in segments(score):
        yield _painted(re.sub(r"[^\n\t]+", lambda part: printable(part[0]), text), level(score, tokens))


def _painted(text: str, tint: int | None) -> str:
    """Return the text in a tint, line breaks excepted: a terminal would colour the rest of the line."""
    begin = DIM if tint is None else BLACK.format(TINTS[tint - 1]) if tint else ""
    return re.sub(r"[^\n]+", rf"{begin}\g<0>{PLAIN}", text) if begin else text


def legend() -> str:
    """Return what the tints mean."""
    parts = [f"{BLACK.format(tint)} {int(STEP * number)} {PLAIN}" for number, tint in enumerate(TINTS, 1)]
    return f"surprisal in bits, from: {''.join(parts)}; {DIM}not scored{PLAIN}"


def table(score: Score, top: int, colours: bool) -> Iterator[str]:
    """Yield a line for each token: byte offset, rank, bits, the token, and the `top` most likely ones there."""
    yield f"{'byte':>7} {'rank':>6} {'bits':>6}  token"
    for number, rank in enumerate(score.ranks.tolist()):
        token, offset = named(score, number), f"{score.byte_offsets[number]:>7}"
        if not rank:
            yield f"{offset} {'–':>6} {'–':>6}  {token}"
            continue
        painted = _painted(token, level(score, [number])) if colours else token
        rather = ", ".join(f"{name} {chance:.1%}" for name, chance in likeliest(score, number)[:top])
        yield f"{offset} {rank:>6} {bits(score.log_probs[number]):>6.2f}  {painted}{' ' * (20 - len(token))} {rather}"


def likeliest(score: Score, number: int) -> list[tuple[str, float]]:
    """Return the names and probabilities of the most likely tokens at a token's position."""
    ids, log_probs = (of[number].tolist() for of in (score.likelihood.top_ids, score.likelihood.top_log_probs))
    names = (name_of(token_id, score.top_pieces[token_id]) for token_id in ids)
    return [(name, math.exp(value)) for name, value in zip(names, log_probs, strict=True)]


def named(score: Score, number: int) -> str:
    """Return one of a text's tokens in quotes, or its id if it has no text."""
    return name_of(int(score.token_ids[number]), score.pieces[number])


def name_of(token_id: int, piece: bytes) -> str:
    """Return a token in quotes, or its id if it has no text."""
    return quoted(piece) if piece else f"id {token_id}"
