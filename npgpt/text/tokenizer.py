"""Convert text to token ids and back, with a vocabulary in local files; nothing is downloaded."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.files import VOCABULARY, read_bytes
from ..config import END_OF_TEXT as END_OF_TEXT
from ..errors import NpgptError, checked, printable, whole_number


class File(Protocol):
    """The part of Path that a vocabulary file needs; str() gives its name for messages."""

    @property
    def name(self) -> str:
        """The file's name without its folder."""

    def read_bytes(self) -> bytes:
        """Return the file's contents."""


def contents(file: File) -> bytes:
    """Return a vocabulary file's contents. Raises NpgptError if it is not a regular file or too large."""
    return read_bytes(file, VOCABULARY) if isinstance(file, Path) else file.read_bytes()


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Converts text to ids and back, by tiktoken, by the package tokenizers or by a table of characters.

    ids_of(text, special) returns the ids of a text; special tells whether special tokens in it are encoded as such or
    as plain text. pieces are the bytes of every id that has text, and files are where they come from. ends_of(text,
    special) returns the offset in the text's UTF-8 at which each token ends. It is None if the pieces of a text always
    join to the text, and if cutting a text before white space does not change its ids.
    """

    ids_of: Callable[[str, bool], list[int]] = field(repr=False)
    pieces: Mapping[int, bytes] = field(repr=False)
    special_tokens: Mapping[str, int] = field(repr=False)
    files: tuple[File, ...]
    before: tuple[int, ...] = ()  # ids that the model's own tokenizer adds before every text, such as BOS
    after: tuple[int, ...] = ()
    beyond: Mapping[int, str] = field(default_factory=dict, repr=False)  # tokens for which the model has no embedding
    leading: bytes = field(default=b"", repr=False)  # removed from the first piece of a text
    beside: tuple[File, ...] = field(default=(), repr=False)  # files with settings of the tokenizer
    ends_of: Callable[[str, bool], list[int]] | None = field(default=None, repr=False)

    @property
    def source(self) -> str:
        """The names of the files, for messages."""
        return " and ".join(map(str, self.files))

    @cached_property
    def n_vocab(self) -> int:
        """The highest id plus one."""
        return max(self.pieces) + 1

    @cached_property
    def holes(self) -> NDArray[np.intp]:
        """The ids below n_vocab that have no text."""
        return np.array(sorted(set(range(self.n_vocab)) - self.pieces.keys()), dtype=np.intp)

    @cached_property
    def ranks(self) -> Mapping[bytes, int]:
        """The id of each piece that is not a special token."""
        special = set(self.special_tokens.values())
        return {piece: token_id for token_id, piece in self.pieces.items() if token_id not in special}

    @property
    def end_of_text(self) -> int | None:
        """The id of <|endoftext|>, or None if the vocabulary does not have it."""
        return self.special_tokens.get(END_OF_TEXT)

    @checked
    def encode(self, text: str, *, special: bool = False, alone: bool = False) -> list[int]:
        """Return the ids of a text, with the ids that the tokenizer adds around every text unless alone=True.

        Special tokens in the text, such as <|endoftext|>, are plain text unless special=True; added tokens that are not
        special are always tokens. Raises NpgptError for a lone surrogate, which is not a character (tiktoken would
        replace it with U+FFFD), for text that the vocabulary cannot represent, and for a run of about a million white
        space characters, on which tiktoken's regular expression fails.
        """
        check_text(text, "the text")
        ids = self.ids_of(text, special)
        ids = ids if alone else [*self.before, *ids, *self.after]
        if self.beyond and (unknown := self.beyond.keys() & set(ids)):
            token_id = min(unknown)
            raise NpgptError(
                f"the token {self.beyond[token_id]!r:.60} has the id {token_id} in {self.source}, but the model has no "
                "embedding for it: wte was not resized when the token was added"
            )
        return ids

    def stretches(self, text: str, special: bool) -> list[bytes]:
        """Return the bytes of a text that each of its tokens covers; joined they are the text.

        They differ from the tokens' pieces if the tokenizer rewrites the text (lower case, a space before it, <unk>).
        A token covers the text from the end of the previous one to its own end; the last token covers the rest.
        """
        if self.ends_of is None:
            return [self.pieces[token_id] for token_id in self.ids_of(text, special)]
        if not (ends := self.ends_of(text, special)):
            return []
        raw = text.encode()
        return [raw[start:end] for start, end in pairwise(accumulate([0, *ends[:-1], len(raw)], max))]

    def has_text(self, token_id: int) -> bool:
        """Return whether an id has text; ids that only pad the vocabulary do not."""
        return whole_number("a token id", token_id, low=-(2**63), high=2**64 - 1) in self.pieces

    def piece(self, token_id: int) -> bytes:
        """Return the bytes of one token, which may be incomplete UTF-8. Raises NpgptError for an id without text."""
        piece = self.pieces.get(whole_number("a token id", token_id, low=0))
        if piece is None:
            ids = f"{self.source} has ids from 0 to {self.n_vocab - 1}"
            raise NpgptError(f"token id {token_id} has no text: {ids}")
        return piece

    @checked
    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of ids, with invalid UTF-8 as U+FFFD. Raises NpgptError for an id without text."""
        whole = b"".join(self.piece(token_id) for token_id in token_ids)
        return whole.removeprefix(self.leading).decode("utf-8", errors="replace")

    def hide_unused(self, logits: NDArray[np.floating[Any]]) -> None:
        """Set the logits [..., V] of ids without text to −inf in place, such as those that pad V to 50304."""
        logits[..., self.holes] = -np.inf
        logits[..., self.n_vocab :] = -np.inf


def utf8_offsets(text: str) -> NDArray[np.intp]:
    """Return the offsets [n + 1] in UTF-8 at which the n characters of a text begin, and that of its end."""
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes)])


def shown(piece: bytes) -> str:
    """Return a token's bytes as text: the one notation of terminals, pages and JSON, from which the bytes can be read.

    A byte that belongs to no whole UTF-8 character is \\xe2 and a backslash is \\\\; every other character is itself.
    Terminals and pages also escape control characters, by printable().
    """
    return piece.replace(b"\\", b"\\\\").decode("utf-8", errors="backslashreplace")


def quoted(piece: bytes) -> str:
    """Return a token as printable text in quotes, so that its spaces show; double quotes if it has a single one."""
    quote = '"' if b"'" in piece else "'"
    return f"{quote}{printable(shown(piece))}{quote}"


class TextDecoder:
    """Decodes tokens one at a time and holds back incomplete UTF-8 sequences.

    after: ids that came before; the first tokens complete a sequence that these leave incomplete.
    """

    def __init__(self, tokenizer: Tokenizer, after: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._leading = tokenizer.leading
        # the text of these ids so far; a prompt may contain padding ids
        self.before = "".join(self.feed(token_id) for token_id in after if tokenizer.has_text(token_id))

    def feed(self, token_id: int) -> str:
        """Return the text that this token completes, which may be empty."""
        piece, self._leading = self._tokenizer.piece(token_id).removeprefix(self._leading), b""
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """Return the text held back at the end: U+FFFD for an incomplete sequence."""
        return self._utf8.decode(b"", final=True)


def check_text(text: object, name: str) -> None:
    """Raise NpgptError if the text is not a str or has a lone surrogate, which cannot be encoded."""
    if not isinstance(text, str):
        raise NpgptError(f"{name} must be a str, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise NpgptError(
            f"{name} has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}: "
            "it is not valid Unicode and has no tokens (was it read in another encoding?)"
        ) from None
