"""Added tokens, which are cut out of a text before any merging, as in the package tokenizers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import NpgptError

# Unicode's White_Space; Python's isspace() also accepts four control characters.
SPACES = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B))))
# Word characters whose category is not a letter's: circled and squared letters, and the two joiners.
LETTERS = re.compile("[\u24b6-\u24e9\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189\u200c\u200d]")
FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
KEYS = {"content", "id", "__type", *FLAGS}


@dataclass(frozen=True)
class AddedToken:
    """An added token with its flags, which have the same meaning as in tokenizers.

    special: plain text unless special tokens are encoded. lstrip, rstrip: white space on that side becomes part of it.
    single_word: never matches inside a word. normalized: searched for after the tokens that are not.
    """

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True


def token(value: object, source: str, **defaults: bool) -> AddedToken:
    """Return an added token from JSON, a string or an object. Raises NpgptError for anything else."""
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        raise NpgptError(f"{source}: an added token must be a string or an object with content, not {value!r:.80}")
    if unknown := sorted(value.keys() - KEYS):
        raise NpgptError(
            f"{source}: the added token {value['content']!r:.40} has the unknown setting {unknown[0]!r:.40}"
        )
    flags = {key: value[key] for key in FLAGS if value.get(key) is not None} | defaults
    if wrong := [key for key, flag in flags.items() if type(flag) is not bool]:
        raise NpgptError(f"{source}: {wrong[0]} of the added token {value['content']!r:.40} must be true or false")
    return AddedToken(value["content"], **{"normalized": not flags.get("special", False)} | flags)


def numbered(
    added: Iterable[AddedToken], id_of: Callable[[str], int | None], size: int
) -> dict[str, tuple[AddedToken, int]]:
    """Return {content: (added token, its id)}; the id is the vocabulary's own, or the next free one from `size` on.

    If two tokens have the same content, the flags of the later one count, as in tokenizers.
    """
    found: dict[str, tuple[AddedToken, int]] = {}
    for new in added:
        if new.content:
            known = found[new.content][1] if new.content in found else id_of(new.content)
            if known is None:
                known, size = size, size + 1
            found[new.content] = new, known
    return found


class Span(NamedTuple):
    """The characters start to end − 1 of a text: an added token or, with token_id None, text for the vocabulary.

    A span starts before the end of the previous one if both tokens claim the same white space.
    """

    start: int
    end: int
    token_id: int | None


class Splitter:
    """Cuts a text at its added tokens."""

    def __init__(self, tokens: Mapping[str, tuple[AddedToken, int]]) -> None:
        self._tokens = tokens
        self._patterns = [
            re.compile("|".join(map(re.escape, sorted(some, key=len, reverse=True))))  # the longest match wins
            for normalized in (False, True)
            if (some := [content for content, (token, _) in tokens.items() if token.normalized == normalized])
        ]

    def spans(self, text: str, special: bool) -> list[Span]:
        """Return the spans of a text in order: its added tokens and the text between them. No span is empty."""
        spans = [Span(0, len(text), None)] if text else []
        for pattern in self._patterns:
            spans = [
                part
                for span in spans
                for part in ([span] if span.token_id is not None else self._cut(text, span, pattern, special))
            ]
        return spans

    def _cut(self, text: str, span: Span, pattern: re.Pattern[str], special: bool) -> Iterator[Span]:
        done, last = span.start, span.end
        for match in pattern.finditer(text, span.start, span.end):
            (token, token_id), start, end = self._tokens[match[0]], *match.span()
            if token.special and not special:
                continue
            if token.single_word and (
                _is_word(text[max(start - 1, span.start) : start]) or _is_word(text[end : min(end + 1, last)])
            ):
                continue
            while token.lstrip and start > done and text[start - 1] in SPACES:
                start -= 1
            while token.rstrip and end < last and text[end] in SPACES:
                end += 1
            if token.lstrip and start < done:  # the previous token claimed this white space
                if done > end:
                    raise NpgptError(
                        f"the added token {token.content!r:.60} lies in white space that another one claims"
                    )
                start = done
            if start > done:
                yield Span(done, start, None)
            if start < end:
                yield Span(start, end, token_id)
            done = end
        if done < last:
            yield Span(done, last, None)


def _is_word(character: str) -> bool:
    """Return whether a character belongs to a word; the empty string does not."""
    if not character:
        return False
    category = unicodedata.category(character)
    return category[0] in "LM" or category in ("Nd", "Nl", "Pc") or LETTERS.match(character) is not None


def check_stated(
    tokens: Mapping[str, tuple[AddedToken, int]], stated: Iterable[tuple[str, Any, int | None]], winner: str
) -> None:
    """Raise NpgptError if a file states a token that does not exist, or another id or flag than the token has.

    stated: (file, the token or only its content, its id or None). winner: the file whose tokens count.
    """
    for source, said, said_id in stated:
        content = said if isinstance(said, str) else said.content
        if not content:
            continue
        if content not in tokens:
            raise NpgptError(f"{source} has the token {content!r:.60}, but {winner}, which transformers uses, does not")
        token, token_id = tokens[content]
        if said_id not in (None, token_id):
            raise NpgptError(
                f"{source} says that {content!r:.60} is {said_id}, but transformers, which numbers added tokens from "
                f"the end of the vocabulary, makes it {token_id}"
            )
        flags = ("lstrip", "rstrip", "single_word") if isinstance(said, AddedToken) else ()
        for flag in flags:
            if getattr(said, flag) != getattr(token, flag):
                raise NpgptError(
                    f"{source} says that {flag} of {content!r:.60} is {str(getattr(said, flag)).lower()}, but {winner} "
                    f"says {str(getattr(token, flag)).lower()}"
                )
