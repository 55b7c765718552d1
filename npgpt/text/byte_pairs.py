"""Byte-level BPE, GPT-2's kind of vocabulary, read from ranks or merges and encoded by tiktoken."""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import tiktoken

from ..checkpoints import stand_ins, strict_json
from ..errors import NpgptError
from .added_tokens import AddedToken, Splitter
from .tokenizer import END_OF_TEXT, File, Tokenizer, check_text, contents, utf8_offsets

# The pattern that cuts text into pieces before merging: contractions; a run of letters, of digits or of other symbols,
# each with the space before it; white space except the last space of a run, which belongs to the next piece.
# From openai/gpt-2, src/encoder.py, with possessive quantifiers to avoid backtracking.
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
MOST_HOLES = 2**20  # unused ids below the highest one, at most
# The sha256 of GPT-2's own merges, which are known to be valid.
GPT2_MERGES = "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0"


@dataclass(frozen=True)
class BytePairs:
    """A vocabulary as its files state it: the ranks of merged tokens, and the ids of other tokens."""

    ranks: Mapping[bytes, int] = field(repr=False)
    others: Mapping[str, int]
    files: tuple[File, ...]

    def id_of(self, content: str) -> int | None:
        """Return the id of a token in vocab.json's spelling, or None."""
        if content in self.others or not content:
            return self.others.get(content)
        characters = byte_characters()
        return self.ranks.get(bytes(characters[c] for c in content)) if set(content) <= characters.keys() else None

    def __len__(self) -> int:
        return len(self.ranks) + len(self.others)


def from_ranks(path: File, vocab_size: int) -> BytePairs:
    """Read tiktoken's format, which has one line per token: its bytes in base64 and its rank.

    <|endoftext|> gets the id after the last one, if that is below vocab_size. Raises NpgptError for a malformed line,
    a duplicate rank or token, and a byte without a token.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(stand_ins.refuse(contents(path), str(path)).splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise NpgptError(f"{path}, line {number}: not a base64 token and its rank: {line!r:.60}") from None
        if len(ranks) != number:
            raise NpgptError(f"{path}, line {number}: duplicate token")
    end_of_text = max(ranks.values(), default=0) + 1
    return _checked((path,), ranks, {END_OF_TEXT: end_of_text} if end_of_text < vocab_size else {}, vocab_size)


def from_llmc(path: File, vocab_size: int) -> BytePairs:
    """Read llm.c's gpt2_tokenizer.bin.

    A header of 256 int32, the third of which is the number of tokens, is followed by each token: one byte for its
    length and its bytes. A token's id is its rank; <|endoftext|> is one of the tokens. Raises NpgptError for a
    malformed file.
    """
    content = contents(path)
    count = int.from_bytes(content[8:12], "little")
    tokens: list[bytes] = []
    at = 1024
    while at < len(content):
        tokens.append(content[at + 1 : at + 1 + content[at]])
        at += 1 + content[at]
    if not content.startswith((20240328).to_bytes(4, "little")) or at != len(content) or len(tokens) != count:
        raise NpgptError(f"{path} is not a tokenizer of llm.c's or is truncated: {len(tokens)} tokens of {count}")
    ranks = {token: number for number, token in enumerate(tokens) if token != END_OF_TEXT.encode()}
    special = {END_OF_TEXT: tokens.index(END_OF_TEXT.encode())} if END_OF_TEXT.encode() in tokens else {}
    return _checked((path,), ranks, special, vocab_size)


def from_pair(vocabulary: File, merges: File, vocab_size: int, added: Collection[str] = ()) -> BytePairs:
    """Read Hugging Face's vocab.json + merges.txt or OpenAI's encoder.json + vocab.bpe; see from_merges."""
    lines = merge_lines(merges)
    ids = strict_json.read_object(contents(vocabulary), str(vocabulary))
    return from_merges((vocabulary, merges), ids, lines, added, vocab_size)


def merge_lines(merges: File) -> list[str]:
    """Return the merges of merges.txt or vocab.bpe, one per line, without the version line."""
    try:
        lines = stand_ins.refuse(contents(merges), str(merges)).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise NpgptError(f"{merges} is not UTF-8: {error}") from None
    if lines[0].startswith("#version"):
        del lines[0]
    return [line.rstrip("\r") for line in lines if line.strip()]


def from_merges(
    files: tuple[File, ...],
    vocabulary: Mapping[str, Any],
    merges: Sequence[str],
    added: Collection[str],
    vocab_size: int,
) -> BytePairs:
    """Return the vocabulary of {token: id} and of merges, whose ids must increase in order, as tiktoken requires.

    Tokens that no merge makes must be added ones or look like <this> or [this]. Raises NpgptError if ids and merges do
    not belong together, and for a merge that merging by rank never reaches.
    """
    path, characters = files[0], byte_characters()
    ids = {token: token_id for token, token_id in vocabulary.items() if type(token_id) is int and type(token) is str}
    if len(ids) != len(vocabulary) or len(set(ids.values())) != len(ids):
        raise NpgptError(f"{path}: tokens must be strings and ids whole numbers, without duplicates")
    ranks = {bytes([byte]): ids[character] for character, byte in characters.items() if character in ids}
    last = max(ranks.values(), default=-1)
    known = hashlib.sha256("\n".join(merges).encode("utf-8", "surrogatepass")).hexdigest() == GPT2_MERGES
    parts: dict[bytes, tuple[bytes, bytes]] = {}
    for merge in merges:
        left, _, right = merge.partition(" ")
        rank = ids.get(left + right, -1)
        if not left or not right or not set(left + right) <= characters.keys() or rank <= last:
            raise NpgptError(
                f"{path} and its merges do not belong together, or are not in order of ids: merge {merge!r:.60}"
            )
        first, second = bytes(characters[c] for c in left), bytes(characters[c] for c in right)
        if not known and not _comes_apart(first, second, ranks, parts):
            raise NpgptError(
                f"{path} and its merges do not belong together: earlier merges never lead to {merge!r:.60}"
            )
        parts[first + second] = first, second
        ranks[first + second] = last = rank
    merged = set(ranks.values())
    rest = {token: token_id for token, token_id in ids.items() if token_id not in merged}
    if strange := sorted(token for token in rest if token not in added and not _looks_special(token)):
        example = f"{len(strange)} tokens that no merge makes, such as {strange[0]!r:.40}"
        raise NpgptError(f"{path} has {example}: are merges missing?")
    return _checked(files, ranks, rest, vocab_size)


def _looks_special(token: str) -> bool:
    return len(token) > 2 and token[0] + token[-1] in ("<>", "[]")


def _comes_apart(
    left: bytes, right: bytes, ranks: Mapping[bytes, int], parts: Mapping[bytes, tuple[bytes, bytes]]
) -> bool:
    """Return whether merging the bytes left + right by the ranks so far gives exactly these two tokens.

    It does unless, while the two are being built, the piece at the end of left merges with the piece at the beginning
    of right. Those pieces are the last parts of left and the first parts of right; each exists until the rank of the
    next larger part. If two ranks are equal, the pair further left merges first.
    """
    if (left not in ranks) or (right not in ranks):
        return False
    ends, begins = [left], [right]
    while ends[-1] in parts:
        ends.append(parts[ends[-1]][1])
    while begins[-1] in parts:
        begins.append(parts[begins[-1]][0])
    last, first = ends.pop(), begins.pop()
    never = len(ranks) + max(ranks[left], ranks[right]) + 1
    while True:
        until_last = ranks[ends[-1]] if ends else never
        until_first = ranks[begins[-1]] if begins else never
        rank = ranks.get(last + first)
        if rank is not None and rank < until_last and rank <= until_first:
            return False
        if not ends and not begins:
            return True
        if until_last <= until_first:
            last = ends.pop()
        else:
            first = begins.pop()


def _checked(files: tuple[File, ...], ranks: dict[bytes, int], others: dict[str, int], vocab_size: int) -> BytePairs:
    """Return a vocabulary after the checks that every format needs."""
    path, used = files[0], {*ranks.values(), *others.values()}
    if len(used) != len(ranks) + len(others) or min(used, default=-1) < 0:
        raise NpgptError(f"{path}: ranks must be whole numbers from 0 without duplicates")
    if max(used) >= vocab_size:
        raise NpgptError(f"{path} has ids up to {max(used)}, but the model's vocab_size is {vocab_size}")
    if (holes := max(used) + 1 - len(used)) > MOST_HOLES:
        raise NpgptError(f"{path} has {len(used)} tokens with ids up to {max(used)}: {holes} ids are unused")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise NpgptError(f"{path} is not a byte-level vocabulary: it has no token for the byte 0x{missing[0]:02X}")
    for token in others:
        check_text(token, f"{path}: a special token")
        if not token:
            raise NpgptError(f"{path}: a token is empty")
    return BytePairs(ranks, others, files)


def tokenizer(
    pairs: BytePairs, tokens: Mapping[str, tuple[AddedToken, int]], vocab_size: int, prefix_space: bool = False
) -> Tokenizer:
    """Return the tokenizer of a vocabulary and added tokens; prefix_space adds a space before a text without one.

    Raises NpgptError if an added token has the id of another token.
    """
    path = pairs.files[0]
    by_id = {token_id: content for content, token_id in pairs.others.items()}
    pieces = {rank: piece for piece, rank in pairs.ranks.items()}
    pieces |= {token_id: content.encode() for token_id, content in by_id.items()}
    for content, (_, token_id) in tokens.items():
        check_text(content, f"{path}: an added token")
        if token_id in pieces and pairs.id_of(content) != token_id:
            taken = pieces[token_id].decode("utf-8", "backslashreplace")
            raise NpgptError(
                f"{path}: the added token {content!r:.60} would get the id {token_id}, which belongs to {taken!r:.60}"
            )
        pieces[token_id] = content.encode()
    beyond = {token_id: content for content, (_, token_id) in tokens.items() if token_id >= vocab_size}
    encode = _encoder(path.name, pairs.ranks, Splitter(tokens), prefix_space)

    def ids_of(text: str, special: bool) -> list[int]:
        return [token_id for _, ids in encode(text, special) for token_id in ids]

    def ends_of(text: str, special: bool) -> list[int]:
        offsets, ends = utf8_offsets(text), []
        for end, ids in encode(text, special):
            sizes = [len(pieces[token_id]) for token_id in ids]
            start = offsets[end] - sum(sizes)
            ends += [start + size for size in accumulate(sizes)]
        return ends

    cuttable = not prefix_space and not any(_minds_space(token) for token, _ in tokens.values())
    return Tokenizer(
        ids_of,
        {token_id: piece for token_id, piece in pieces.items() if token_id not in beyond} if beyond else pieces,
        {content: token_id for content, (token, token_id) in tokens.items() if token.special},
        pairs.files,
        beyond=beyond,
        ends_of=None if cuttable else ends_of,
    )


def _minds_space(token: AddedToken) -> bool:
    """Return whether cutting a text before white space could change what an added token matches."""
    return token.lstrip or token.rstrip or token.single_word or any(map(str.isspace, token.content))


def _encoder(
    name: str, ranks: Mapping[bytes, int], splitter: Splitter, prefix_space: bool
) -> Callable[[str, bool], Iterator[tuple[int, list[int]]]]:
    """Return a function that cuts a text at its added tokens and yields the end and the ids of each part."""
    encoding = tiktoken.Encoding(name, pat_str=PIECES, mergeable_ranks=dict(ranks), special_tokens={})

    def encode(text: str, special: bool) -> Iterator[tuple[int, list[int]]]:
        for start, end, token_id in splitter.spans(text, special):
            if token_id is not None:
                yield end, [token_id]
                continue
            space = " " if prefix_space and text[start] != " " else ""
            try:
                yield end, encoding.encode(space + text[start:end], disallowed_special=())
            except ValueError as error:
                what = f"{error} (a very long run of white space?)"
                raise NpgptError(f"the text cannot be split into tokens: {what}") from None

    return encode


@functools.cache
def byte_characters() -> dict[str, int]:
    """Return {character: byte} for the printable characters that represent bytes in vocab.json and merges.txt.

    Printable Latin-1 characters represent themselves; the 68 other bytes are U+0100 and up in order, so a space is Ġ
    (openai/gpt-2, src/encoder.py).
    """
    printable = {byte for byte in range(256) if chr(byte).isprintable() and byte != 0x20}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
