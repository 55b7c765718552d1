"""Text to token ids and back: tiktoken over a vocabulary that lies in local files, never a network call."""

from __future__ import annotations

import base64
import binascii
import codecs
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiktoken

from .config import GPT2_VOCAB_SIZES
from .errors import NpgptError

END_OF_TEXT = "<|endoftext|>"

# How GPT-2 cuts text into pieces before any merging: contractions; a run of letters, of digits, or of other signs, each
# with the space before it; white space, less the last space of a run, which belongs to the next piece.
# After openai/gpt-2, src/encoder.py; possessive, so that no run is walked back over.
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


@dataclass(frozen=True)
class Tokenizer:
    """A byte-pair vocabulary: the merging is tiktoken's, files are those that the ranks came from."""

    encoding: tiktoken.Encoding
    ranks: Mapping[bytes, int]
    special_tokens: Mapping[str, int]
    files: tuple[Path, ...]

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

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of a text. <|endoftext|> in it is ordinary characters, or with special=True the special token.

        Raises NpgptError for a lone surrogate, which is no character (tiktoken would put U+FFFD in its place).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise NpgptError(
                f"the text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}: "
                "it is not valid Unicode and has no tokens (was it read from a file in another encoding?)"
            ) from None
        return self.encoding.encode(text, allowed_special="all" if special else set(), disallowed_special=())

    def piece(self, token_id: int) -> bytes:
        """The bytes of one token; they need not be whole UTF-8. Raises NpgptError for an id without a token."""
        try:
            return self.encoding.decode_single_token_bytes(token_id)
        except (KeyError, OverflowError):
            raise NpgptError(
                f"token id {token_id} has no text: {self.source} has ids from 0 to {self.n_vocab - 1}"
            ) from None

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD. Raises NpgptError for an id without a token."""
        return b"".join(self.piece(int(token_id)) for token_id in token_ids).decode("utf-8", errors="replace")

    def unused_ids(self, vocab_size: int) -> list[int]:
        """The model's ids that stand for no text, such as the rows that pad a vocabulary to 50304."""
        used = {*self.ranks.values(), *self.special_tokens.values()}
        return [token_id for token_id in range(vocab_size) if token_id not in used]


class TextDecoder:
    """Bytes of one token after another to text, holding back a UTF-8 sequence until it is whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The text that is certain once this token is known; perhaps none."""
        return self._utf8.decode(self._tokenizer.piece(token_id))

    def flush(self) -> str:
        """What is left at the end: a broken sequence becomes U+FFFD."""
        return self._utf8.decode(b"", final=True)


def find(folder: Path, vocab_size: int, gpt2_ranks: Path) -> Tokenizer | str:
    """The tokenizer of a model in folder, or the reason why there is none.

    A vocabulary in the folder always wins: vocab.tiktoken, vocab.json + merges.txt, encoder.json + vocab.bpe, or
    tokenizer.json. Without one, a model of 50257 ids (or 50304, padded) has GPT-2's, from gpt2_ranks.
    Raises NpgptError for a vocabulary that is broken or has ids beyond the model's vocab_size.
    """
    here = {name for name in ("vocab.tiktoken", *PAIRS[0], *PAIRS[1], "tokenizer.json") if (folder / name).is_file()}
    if "vocab.tiktoken" in here:
        tokenizer = from_ranks(folder / "vocab.tiktoken", vocab_size)
    elif pair := next((pair for pair in PAIRS if here.issuperset(pair)), None):
        tokenizer = from_vocabulary_and_merges(folder / pair[0], folder / pair[1])
    elif "tokenizer.json" in here:
        tokenizer = from_tokenizer_json(folder / "tokenizer.json")
    elif here:
        return (
            f"{folder} has {' and '.join(sorted(here))} without its other half ({' or '.join(map(' + '.join, PAIRS))})"
        )
    elif vocab_size in GPT2_VOCAB_SIZES:
        tokenizer = from_ranks(gpt2_ranks, vocab_size)
    else:
        wanted = "vocab.tiktoken, vocab.json + merges.txt, encoder.json + vocab.bpe or tokenizer.json"
        return (
            f"its {vocab_size} ids are not GPT-2's 50257 and {folder} brings no vocabulary ({wanted}); it runs on ids"
        )
    if tokenizer.n_vocab > vocab_size:
        raise NpgptError(
            f"{tokenizer.source} has ids up to {tokenizer.n_vocab - 1}, the model's vocab_size is {vocab_size}"
        )
    return tokenizer


PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def from_ranks(path: Path, vocab_size: int) -> Tokenizer:
    """A tokenizer from tiktoken's form, a line of base64 bytes and rank each; <|endoftext|> is the id after the last,
    where the model's vocab_size has room for it.

    Raises NpgptError for a line of another form, a rank or token given twice, or a byte that has no token.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise NpgptError(f"{path}, line {number}: not a base64 token and its rank: {line!r:.60}") from None
        if len(ranks) != number:
            raise NpgptError(f"{path}, line {number}: the token stands twice")
    end_of_text = max(ranks.values(), default=0) + 1
    return _build((path,), ranks, {END_OF_TEXT: end_of_text} if end_of_text < vocab_size else {})


def from_vocabulary_and_merges(vocabulary: Path, merges: Path) -> Tokenizer:
    """A tokenizer from Hugging Face's vocab.json + merges.txt or OpenAI's encoder.json + vocab.bpe.

    Raises NpgptError where they are malformed or do not belong together.
    """
    lines = _text(merges).split("\n")
    if lines[0].startswith("#version"):
        del lines[0]
    return _from_merges((vocabulary, merges), _json(vocabulary), [line.rstrip("\r") for line in lines if line.strip()])


def from_tokenizer_json(path: Path) -> Tokenizer:
    """A tokenizer from Hugging Face's tokenizer.json, where that is byte-level BPE as GPT-2 has it.

    Raises NpgptError for another kind: a wrong tokenizer would give fluent nonsense.
    """
    whole = _json(path)
    model, splitter = whole.get("model"), whole.get("pre_tokenizer")
    if (
        not (isinstance(model, dict) and model.get("type", "BPE") == "BPE")
        or not (isinstance(splitter, dict) and splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True))
        or splitter.get("add_prefix_space")
        or whole.get("normalizer")
    ):
        raise NpgptError(f"{path} is not GPT-2's kind of tokenizer: byte-level BPE, no normalizer, no prefix space")
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        raise NpgptError(f"{path}: its model must have a vocab and merges")
    try:
        pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        added = {token["content"]: token["id"] for token in whole.get("added_tokens") or []}
    except (TypeError, KeyError):
        raise NpgptError(f"{path}: its merges or added_tokens are malformed") from None
    return _from_merges((path,), vocabulary | added, pairs)


def _from_merges(files: tuple[Path, ...], vocabulary: Mapping[str, Any], merges: Iterable[str]) -> Tokenizer:
    """tiktoken has one number for a token's id and for its turn in merging, so ids must rise in the order of merges."""
    path = files[0]
    characters = byte_characters()
    ids = {token: token_id for token, token_id in vocabulary.items() if type(token_id) is int and token_id >= 0}
    if len(ids) != len(vocabulary) or len(set(ids.values())) != len(ids):
        raise NpgptError(f"{path}: its ids must be whole numbers, each given once")
    missing = [byte for character, byte in characters.items() if character not in ids]
    if missing:
        raise NpgptError(f"{path} is no byte-level vocabulary: it has no token for the byte 0x{missing[0]:02X}")
    ranks = {bytes([byte]): ids[character] for character, byte in characters.items()}
    last = max(ranks.values())
    for merge in merges:
        left, _, right = merge.partition(" ")
        rank = ids.get(left + right, -1)
        if not left or not right or not set(left + right) <= characters.keys() or rank <= last:
            raise NpgptError(
                f"{path} and its merges do not belong together, or not in tiktoken's order: merge {merge!r:.60}"
            )
        ranks[bytes(characters[c] for c in left + right)] = last = rank
    mergeable = set(ranks.values())
    special = {token: token_id for token, token_id in ids.items() if token_id not in mergeable}
    return _build(files, ranks, special)


def _build(files: tuple[Path, ...], ranks: dict[bytes, int], special: dict[str, int]) -> Tokenizer:
    path = files[0]
    if len(set(ranks.values())) != len(ranks) or min(ranks.values(), default=-1) < 0:
        raise NpgptError(f"{path}: ranks must be whole numbers from 0, each given once")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise NpgptError(f"{path} is no byte-level vocabulary: it has no token for the byte 0x{missing[0]:02X}")
    encoding = tiktoken.Encoding(path.name, pat_str=PIECES, mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer(encoding, ranks, special, files)


def byte_characters() -> dict[str, int]:
    """The printable character by which vocab.json and merges.txt stand for each byte, with that byte.

    Printable Latin-1 stands for itself; the 68 others, in order, are shifted to U+0100 and up (openai/gpt-2,
    src/encoder.py), so that a space is written Ġ.
    """
    printable = {byte for byte in range(256) if chr(byte).isprintable() and byte != 0x20}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise NpgptError(f"{path} is not UTF-8: {error}") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise NpgptError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise NpgptError(f"{path} must be a JSON object")
    return value
