"""Read a tokenizer from a model's vocabulary files, in any of their forms, or from GPT-2's own."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray

from ..checkpoints import stand_ins, strict_json
from ..checkpoints.files import VOCABULARY, read_bytes
from ..checkpoints.find import GPT2_RANKS, find
from ..checkpoints.open import Checkpoint, open_vocabulary
from ..config import GPT2_VOCAB_SIZES, PUBLISHED
from ..errors import NpgptError
from .tokenizer import END_OF_TEXT, File, Tokenizer, check_text

# How GPT-2 cuts text into pieces before any merging: contractions; a run of letters, of digits, or of other signs, each
# with the space before it; white space without the last space of a run, which belongs to the next piece.
# After openai/gpt-2, src/encoder.py, with possessive quantifiers to avoid backtracking.
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


@dataclass(frozen=True)
class Inside:
    """A file within a checkpoint's own, such as GGUF's vocabulary."""

    name: str
    checkpoint: Path
    content: bytes = field(repr=False)

    def read_bytes(self) -> bytes:
        """Return its contents."""
        return self.content

    def __str__(self) -> str:
        return f"{self.name} in {self.checkpoint}"


def load_tokenizer(model: str | os.PathLike[str] | None = None) -> Tokenizer:
    """Load a model's tokenizer without its weights; GPT-2's own for a published name whose weights are not here.

    Raises NpgptError, with the reason, where the model has no vocabulary.
    """
    try:
        location = find(model)
    except NpgptError:
        if model not in PUBLISHED:
            raise
        return from_ranks(GPT2_RANKS, PUBLISHED[str(model)].vocab_size)
    contents, vocab_size, stated = open_vocabulary(location.weights)
    try:
        return open_tokenizer(
            contents.home or location.weights, vocab_size, stated.get("eos_token_id"), contents.vocabulary
        )
    except NpgptError as error:
        raise NpgptError(f"{location.name} has no text: {error}") from None


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """Return an opened checkpoint's tokenizer; see open_tokenizer."""
    eos_token_id = checkpoint.stated.get("eos_token_id")
    return open_tokenizer(checkpoint.path, checkpoint.config.vocab_size, eos_token_id, checkpoint.contents.vocabulary)


def open_tokenizer(
    weights: Path,
    vocab_size: int,
    eos_token_id: object = None,
    within: Callable[[], Mapping[str, bytes]] | None = None,
) -> Tokenizer:
    """Return the tokenizer of the model whose weights are the given file.

    A vocabulary within the checkpoint's own file (within) wins, then one beside it: vocab.tiktoken, vocab.json +
    merges.txt, encoder.json + vocab.bpe, tokenizer.json, or llm.c's gpt2_tokenizer.bin. Without any, a model of 50257
    ids (or 50304, padded) has GPT-2's. A ranks file is checked against eos_token_id, which config.json states.

    Raises NpgptError where there is none, and for one that is broken, incomplete, of another kind, or has ids beyond
    vocab_size: GPT-2's in its place would give fluent nonsense. The model then runs on ids.
    """
    folder = weights.parent
    try:
        if within:
            here: dict[str, File] = {name: Inside(name, weights, content) for name, content in within().items()}
        else:
            here = dict(in_folder(folder))
        return _from_files(here, folder, vocab_size, eos_token_id)
    except OSError as error:
        raise NpgptError(str(error)) from None


def _from_files(here: Mapping[str, File], folder: Path, vocab_size: int, eos_token_id: object) -> Tokenizer:
    if "vocab.tiktoken" in here:
        tokenizer = from_ranks(here["vocab.tiktoken"], vocab_size)
        # an end among the tokens themselves, such as a line break, says nothing of their number
        if isinstance(eos_token_id, int) and (tokenizer.end_of_text or vocab_size) < eos_token_id < vocab_size:
            raise NpgptError(
                f"{tokenizer.source} has {len(tokenizer.ranks)} ranks, so that <|endoftext|> is "
                f"{tokenizer.end_of_text}, and config.json says that eos_token_id is {eos_token_id}"
            )
        return tokenizer
    if pair := next((pair for pair in PAIRS if here.keys() >= set(pair)), None):
        return from_vocabulary_and_merges(here[pair[0]], here[pair[1]], vocab_size)
    if "tokenizer.json" in here:
        return from_tokenizer_json(here["tokenizer.json"], vocab_size)
    if LLMC in here:
        return from_llmc(here[LLMC], vocab_size)
    if here:
        wanted = " or ".join(map(" + ".join, PAIRS))
        raise NpgptError(
            f"{folder} has {' and '.join(sorted(here))}, which alone is no vocabulary that npgpt reads ({wanted})"
        )
    if vocab_size in GPT2_VOCAB_SIZES:
        return from_ranks(GPT2_RANKS, vocab_size)
    wanted = "vocab.tiktoken, vocab.json + merges.txt, encoder.json + vocab.bpe or tokenizer.json"
    raise NpgptError(
        f"its {vocab_size} ids are not GPT-2's 50257 and {folder} brings no vocabulary ({wanted}); it runs on ids"
    )


PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
LLMC = "gpt2_tokenizer.bin"
READABLE = ("vocab.tiktoken", *PAIRS[0], *PAIRS[1], "tokenizer.json", LLMC)
FOREIGN = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "vocab.txt")  # other kinds, which are not read
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")  # transformers' own
MOST_HOLES = 2**20  # ids without a token
FILES = (*READABLE, *FOREIGN, *COMPANIONS)


def in_folder(folder: Path, names: Iterable[str] = (*READABLE, *FOREIGN)) -> dict[str, Path]:
    """Return a vocabulary's files that are in a folder, by name, readable or not."""
    return {name: folder / name for name in names if os.path.lexists(folder / name)}


def contents(file: File) -> bytes:
    """Return a vocabulary file's contents. Raises NpgptError where it is no regular file, too large, or a web page."""
    return stand_ins.refuse(read_bytes(file, VOCABULARY) if isinstance(file, Path) else file.read_bytes(), str(file))


def from_ranks(path: File, vocab_size: int) -> Tokenizer:
    """Return a tokenizer from tiktoken's form, which has a line with base64 bytes and a rank for each token.

    <|endoftext|> is the id after the last, if it is below the model's vocab_size. Raises NpgptError for a line of
    another form, a rank or token given twice, or a byte that has no token.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(contents(path).splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise NpgptError(f"{path}, line {number}: not a base64 token and its rank: {line!r:.60}") from None
        if len(ranks) != number:
            raise NpgptError(f"{path}, line {number}: the token stands twice")
    end_of_text = max(ranks.values(), default=0) + 1
    return _build((path,), ranks, {END_OF_TEXT: end_of_text} if end_of_text < vocab_size else {}, vocab_size)


def from_vocabulary_and_merges(vocabulary: File, merges: File, vocab_size: int) -> Tokenizer:
    """Return a tokenizer from Hugging Face's vocab.json + merges.txt or OpenAI's encoder.json + vocab.bpe.

    Tokens that no merge makes must look special: <…> or […]. Raises NpgptError where the files are malformed or do not
    belong together.
    """
    lines = _text(merges).split("\n")
    if lines[0].startswith("#version"):
        del lines[0]
    ids = strict_json.read_object(contents(vocabulary), str(vocabulary))
    special = {token for token in ids if len(token) > 2 and token[0] + token[-1] in ("<>", "[]")}
    pairs = [line.rstrip("\r") for line in lines if line.strip()]
    return _from_merges((vocabulary, merges), ids, pairs, special, vocab_size)


def from_tokenizer_json(path: File, vocab_size: int) -> Tokenizer:
    """Return a tokenizer from Hugging Face's tokenizer.json, if that is byte-level BPE like GPT-2's.

    Raises NpgptError for another kind.
    """
    whole = strict_json.read_object(contents(path), str(path))
    model, splitter = whole.get("model"), whole.get("pre_tokenizer")
    if (
        not (isinstance(model, dict) and model.get("type", "BPE") == "BPE")
        or not (isinstance(splitter, dict) and splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True))
        or splitter.get("add_prefix_space")
        or whole.get("normalizer")
    ):
        raise NpgptError(f"{path} is not GPT-2's kind of tokenizer: byte-level BPE, no normalizer, no prefix space")
    try:
        pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        added = {token["content"]: token["id"] for token in whole.get("added_tokens") or []}
        ids = dict(model["vocab"]) | added
    except (TypeError, KeyError, ValueError):
        raise NpgptError(f"{path}: its vocab, merges or added_tokens are malformed") from None
    return _from_merges((path,), ids, pairs, set(added), vocab_size)


def from_llmc(path: File, vocab_size: int) -> Tokenizer:
    """Return a tokenizer from llm.c's gpt2_tokenizer.bin.

    It has 256 int32, the third of which is the number of tokens, then for each token a byte with its length, and its
    bytes. A token's id is its rank in merging; <|endoftext|> is one of them. Raises NpgptError for a malformed file.
    """
    content = contents(path)
    count = int.from_bytes(content[8:12], "little")
    tokens: list[bytes] = []
    at = 1024
    while at < len(content):
        tokens.append(content[at + 1 : at + 1 + content[at]])
        at += 1 + content[at]
    if not content.startswith((20240328).to_bytes(4, "little")) or at != len(content) or len(tokens) != count:
        raise NpgptError(f"{path} is no tokenizer of llm.c's, or cut short: {len(tokens)} tokens of {count}")
    ranks = {token: number for number, token in enumerate(tokens) if token != END_OF_TEXT.encode()}
    special = {END_OF_TEXT: tokens.index(END_OF_TEXT.encode())} if END_OF_TEXT.encode() in tokens else {}
    return _build((path,), ranks, special, vocab_size)


def _from_merges(
    files: tuple[File, ...], vocabulary: Mapping[str, Any], merges: Iterable[str], special: Set[str], vocab_size: int
) -> Tokenizer:
    """Return a tokenizer whose ids rise in the order of merges, since tiktoken has one number for id and rank."""
    path, characters = files[0], byte_characters()
    ids = {token: token_id for token, token_id in vocabulary.items() if type(token_id) is int and type(token) is str}
    if len(ids) != len(vocabulary) or len(set(ids.values())) != len(ids):
        raise NpgptError(f"{path}: its tokens must be text, and its ids whole numbers, each given once")
    ranks = {bytes([byte]): ids[character] for character, byte in characters.items() if character in ids}
    last = max(ranks.values(), default=-1)
    for merge in merges:
        left, _, right = merge.partition(" ")
        rank = ids.get(left + right, -1)
        if not left or not right or not set(left + right) <= characters.keys() or rank <= last:
            raise NpgptError(
                f"{path} and its merges do not belong together, or not in tiktoken's order: merge {merge!r:.60}"
            )
        ranks[bytes(characters[c] for c in left + right)] = last = rank
    merged = set(ranks.values())
    rest = {token: token_id for token, token_id in ids.items() if token_id not in merged}
    if strange := sorted(rest.keys() - special):
        example = f"{len(strange)} tokens that no merge makes, {strange[0]!r:.40} for one"
        raise NpgptError(f"{path} has {example}: are merges missing?")
    return _build(files, ranks, rest, vocab_size)


def _build(files: tuple[File, ...], ranks: dict[bytes, int], special: dict[str, int], vocab_size: int) -> Tokenizer:
    """Return a tokenizer, after the checks that hold for every form."""
    path, used = files[0], {*ranks.values(), *special.values()}
    if len(used) != len(ranks) + len(special) or min(used, default=-1) < 0:
        raise NpgptError(f"{path}: ranks must be whole numbers from 0, each given once")
    if max(used) >= vocab_size:
        raise NpgptError(f"{path} has ids up to {max(used)}, the model's vocab_size is {vocab_size}")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise NpgptError(f"{path} is no byte-level vocabulary: it has no token for the byte 0x{missing[0]:02X}")
    for token in special:
        check_text(token, f"{path}: a special token")
        if not token:
            raise NpgptError(f"{path}: a token is empty")
    try:
        encoding = tiktoken.Encoding(path.name, pat_str=PIECES, mergeable_ranks=ranks, special_tokens=special)
    except ValueError as error:  # its special tokens become one pattern, which has a limit
        raise NpgptError(f"{path}: tiktoken does not take its tokens: {error}") from None
    return Tokenizer(encoding, ranks, special, _holes(used, path), files)


def _holes(used: Set[int], path: File) -> NDArray[np.intp]:
    """Return the ids below the highest that no token has. Raises NpgptError where they are more than MOST_HOLES."""
    number = max(used) + 1 - len(used)
    if number > MOST_HOLES:
        raise NpgptError(f"{path} has {len(used)} tokens with ids up to {max(used)}: {number} ids below have none")
    return np.setdiff1d(np.arange(max(used)), list(used), assume_unique=True)


def byte_characters() -> dict[str, int]:
    """Return {character: byte}, the printable characters that stand for bytes in vocab.json and merges.txt.

    Printable Latin-1 stands for itself; the 68 other bytes, in order, are U+0100 and up, so that a space is written Ġ
    (openai/gpt-2, src/encoder.py).
    """
    printable = {byte for byte in range(256) if chr(byte).isprintable() and byte != 0x20}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _text(path: File) -> str:
    try:
        return contents(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise NpgptError(f"{path} is not UTF-8: {error}") from None
