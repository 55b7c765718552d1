"""Text to token ids and back: tiktoken over a vocabulary in local files, never a network call."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import tiktoken
from numpy.typing import NDArray

from ..errors import NpgptError, checked, whole_number

END_OF_TEXT = "<|endoftext|>"


class File(Protocol):
    """What a vocabulary needs of a file, as a Path has it; str() names it in messages."""

    @property
    def name(self) -> str:
        """The last part of its path."""

    def read_bytes(self) -> bytes:
        """Its contents."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A byte-pair vocabulary: tiktoken does the merging; files are those that the ranks came from."""

    encoding: tiktoken.Encoding
    ranks: Mapping[bytes, int] = field(repr=False)
    special_tokens: Mapping[str, int] = field(repr=False)
    holes: NDArray[np.intp] = field(repr=False)  # ids below n_vocab that stand for no text
    files: tuple[File, ...]

    @property
    def source(self) -> str:
        """The files, for a message."""
        return " and ".join(map(str, self.files))

    @property
    def n_vocab(self) -> int:
        """One more than the highest id."""
        return self.encoding.n_vocab

    @property
    def end_of_text(self) -> int | None:
        """The id of <|endoftext|>, or None where the vocabulary has none."""
        return self.special_tokens.get(END_OF_TEXT)

    @checked
    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the ids of a text; special tokens in it, such as <|endoftext|>, are plain text unless special=True.

        Raises NpgptError for a lone surrogate, which is not a character (tiktoken would replace it by U+FFFD), and for
        a run of white space so long (about a million) that tiktoken's pattern gives up.
        """
        check_text(text, "the text")
        try:
            return self.encoding.encode(text, allowed_special="all" if special else set(), disallowed_special=())
        except ValueError as error:
            raise NpgptError(f"the text cannot be cut into tokens: {error} (a very long run of white space?)") from None

    def has_text(self, token_id: int) -> bool:
        """Tell whether an id stands for text; ids that pad the vocabulary do not."""
        token_id = whole_number("a token id", token_id, low=-(2**63), high=2**64 - 1)
        return 0 <= token_id < self.n_vocab and token_id not in self.holes

    def piece(self, token_id: int) -> bytes:
        """Return the bytes of one token, which need not be whole UTF-8. Raises NpgptError for an id without a token."""
        try:
            return self.encoding.decode_single_token_bytes(whole_number("a token id", token_id, low=0))
        except KeyError:
            ids = f"{self.source} has ids from 0 to {self.n_vocab - 1}"
            raise NpgptError(f"token id {token_id} has no text: {ids}") from None

    @checked
    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of ids, bytes that are not UTF-8 as U+FFFD. Raises NpgptError for an id without a token."""
        return b"".join(self.piece(token_id) for token_id in token_ids).decode("utf-8", errors="replace")

    def hide_unused(self, logits: NDArray[np.floating[Any]]) -> None:
        """Set to −inf, in place, the logits [..., V] that stand for no text, such as the rows that pad V to 50304."""
        logits[..., self.holes] = -np.inf
        logits[..., self.n_vocab :] = -np.inf


def shown(piece: bytes) -> str:
    """Return a token's bytes as text, in which bytes that are not whole UTF-8 are written as \\xe2."""
    return piece.decode("utf-8", errors="backslashreplace")


class TextDecoder:
    """Decode tokens to text one at a time, holding back a UTF-8 sequence until it is whole.

    after: ids that came before; the next tokens complete a sequence that these leave incomplete.
    """

    def __init__(self, tokenizer: Tokenizer, after: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # the text of these ids as far as it is certain; a prompt may hold padding ids
        self.before = "".join(self.feed(token_id) for token_id in after if tokenizer.has_text(token_id))

    def feed(self, token_id: int) -> str:
        """Return the text that is certain once this token is known, which may be empty."""
        return self._utf8.decode(self._tokenizer.piece(token_id))

    def flush(self) -> str:
        """Return the text that is left at the end; an incomplete sequence becomes U+FFFD."""
        return self._utf8.decode(b"", final=True)


def check_text(text: object, name: str) -> None:
    """Raise NpgptError where the text is not a str, or has a lone surrogate and so cannot be encoded."""
    if not isinstance(text, str):
        raise NpgptError(f"{name} must be a str, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise NpgptError(
            f"{name} has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}: "
            "it is not valid Unicode and has no tokens (was it read in another encoding?)"
        ) from None
