"""Find a model's vocabulary, in any format, and make its tokenizer."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoints import strict_json
from ..checkpoints.find import find
from ..checkpoints.open import Checkpoint, open_vocabulary
from ..checkpoints.places import GPT2_RANKS
from ..config import GPT2_VOCAB_SIZES, PUBLISHED
from ..errors import NpgptError, reason
from . import byte_pairs, characters, companions, tokenizer_json
from .added_tokens import AddedToken, check_stated, numbered
from .byte_pairs import BytePairs
from .characters import META
from .companions import COMPANIONS, CONFIG, Companions
from .tokenizer import File, Tokenizer, contents

PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
RANKS, WHOLE, LLMC = "vocab.tiktoken", "tokenizer.json", "gpt2_tokenizer.bin"
READABLE = (RANKS, *PAIRS[0], *PAIRS[1], WHOLE, LLMC, META)
# Vocabularies of other kinds, which npgpt does not read. FOREIGN matches many more names, in upper or lower case.
KNOWN = """spiece.model bpe.model tokenizer.model sentencepiece.bpe.model source.spm target.spm tekken.json vocab.txt
vocab.jsonl""".split()
FOREIGN = re.compile(
    r".*\.(model|spm|tiktoken|vocab|bpe|codes)|dict\.txt"
    r"|.*(vocab|merges|tokenizer|spiece|tekken|sentencepiece|wordpiece|bpe|encoder).*"
    r"\.(json|jsonl|txt|bin|pkl|model|gz|zip)",
    re.IGNORECASE,
)
NO_VOCABULARY = re.compile(r"tokenizer_config\.json|(pytorch|tf|flax|rust)_model.*", re.IGNORECASE)

FILES = (*READABLE, *KNOWN, *COMPANIONS)


def is_vocabulary(name: str) -> bool:
    """Return whether a file name is that of a vocabulary, whether npgpt can read it or not."""
    foreign = "/" not in name and FOREIGN.fullmatch(name) and not NO_VOCABULARY.fullmatch(name)
    return name in READABLE or bool(foreign)


@dataclass(frozen=True)
class Inside:
    """A file inside a checkpoint file, such as the vocabulary in GGUF."""

    name: str
    checkpoint: Path
    content: bytes = field(repr=False)

    def read_bytes(self) -> bytes:
        """Return the file's contents."""
        return self.content

    def __str__(self) -> str:
        return f"{self.name} in {self.checkpoint}"


def load_tokenizer(model: str | os.PathLike[str] | None = None) -> Tokenizer:
    """Load a model's tokenizer without its weights.

    A published name without a checkpoint gets GPT-2's own. Raises NpgptError with the reason if there is no vocabulary.
    """
    try:
        location = find(model)
    except NpgptError:
        if model not in PUBLISHED:
            raise
        return from_ranks(GPT2_RANKS, PUBLISHED[str(model)].vocab_size)
    found, vocab_size, stated = open_vocabulary(location.weights)
    try:
        weights, eos_token_id = found.home or location.weights, stated.get("eos_token_id")
        return open_tokenizer(weights, vocab_size, eos_token_id, found.vocabulary)
    except NpgptError as error:
        raise NpgptError(f"{location.name} has no text: {error}") from None


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """Return the tokenizer of an open checkpoint; see open_tokenizer."""
    eos_token_id = checkpoint.stated.get("eos_token_id")
    return open_tokenizer(checkpoint.path, checkpoint.config.vocab_size, eos_token_id, checkpoint.contents.vocabulary)


def open_tokenizer(
    weights: Path,
    vocab_size: int,
    eos_token_id: object = None,
    within: Callable[[], Mapping[str, bytes]] | None = None,
) -> Tokenizer:
    """Return the tokenizer of the model in a weights file.

    A vocabulary inside the weights file (within) wins. Otherwise it is read from files beside it: vocab.tiktoken,
    tokenizer.json, vocab.json + merges.txt, encoder.json + vocab.bpe, llm.c's gpt2_tokenizer.bin or nanoGPT's meta.pkl.
    Without any of them, a model with 50257 ids (or 50304, padded) has GPT-2's vocabulary. tokenizer_config.json and
    similar files are interpreted as in transformers. A ranks file is checked against config.json's eos_token_id.

    Raises NpgptError if there is no vocabulary, and if it is broken, incomplete, of another kind or has ids beyond
    vocab_size. GPT-2's vocabulary instead would give fluent nonsense. The model then runs on ids.
    """
    folder = weights.parent
    try:
        if within:
            here: dict[str, File] = {name: Inside(name, weights, content) for name, content in within().items()}
        else:
            here = {name: path for name, path in (in_folder(folder) | beside(folder)).items() if path != weights}
        model_class = None if within else stated_class(folder)
        tokenizer = _from_files(here, folder, vocab_size, eos_token_id, model_class)
        for token_id in (*tokenizer.before, *tokenizer.after):
            if token_id not in tokenizer.pieces:
                around = f"the id {token_id}, to be added before or after every text,"
                raise NpgptError(f"{tokenizer.source}: {around} has no text; the model's vocab_size is {vocab_size}")
        return replace(tokenizer, beside=tuple(here[name] for name in COMPANIONS if name in here))
    except OSError as error:
        raise NpgptError(reason(error)) from None


def stated_class(folder: Path) -> object:
    """Return the tokenizer_class in the folder's config.json, or None."""
    path = folder / "config.json"
    return strict_json.read_file(path).get("tokenizer_class") if path.is_file() else None


def _from_files(
    here: Mapping[str, File], folder: Path, vocab_size: int, eos_token_id: object, model_class: object
) -> Tokenizer:
    if RANKS in here:
        tokenizer = _of_pairs(byte_pairs.from_ranks(here[RANKS], vocab_size), here, model_class, vocab_size)
        # an end among the tokens themselves, such as a line break, does not tell their number
        if isinstance(eos_token_id, int) and (tokenizer.end_of_text or vocab_size) < eos_token_id < vocab_size:
            raise NpgptError(
                f"{tokenizer.source} has {len(tokenizer.ranks)} ranks, which makes <|endoftext|> "
                f"{tokenizer.end_of_text}, but config.json says that eos_token_id is {eos_token_id}"
            )
        return tokenizer
    pair = next((pair for pair in PAIRS if here.keys() >= set(pair)), None)
    if META in here and (others := sorted(here.keys() & {*(pair or ())[:1], WHOLE, LLMC, *COMPANIONS})):
        raise NpgptError(f"{here[META]} and {here[others[0]]} are two vocabularies: remove one of them")
    if WHOLE in here:
        return _of_whole(here, pair, model_class, vocab_size)
    if pair == PAIRS[0]:
        said = companions.read(here, model_class)
        added = {token.content for token in said.added}
        return _tokenizer(byte_pairs.from_pair(here[pair[0]], here[pair[1]], vocab_size, added), said, vocab_size)
    if pair:
        return _of_pairs(byte_pairs.from_pair(here[pair[0]], here[pair[1]], vocab_size), here, model_class, vocab_size)
    if LLMC in here:
        return _of_pairs(byte_pairs.from_llmc(here[LLMC], vocab_size), here, model_class, vocab_size)
    if META in here:
        return characters.from_meta(here[META], vocab_size)
    if unread := sorted(here.keys() - set(COMPANIONS)):
        raise NpgptError(
            f"{folder} has {' and '.join(unread)}, which alone is not a vocabulary that npgpt reads "
            f"({' or '.join(map(' + '.join, PAIRS))})"
        )
    if vocab_size in GPT2_VOCAB_SIZES:
        return _of_pairs(byte_pairs.from_ranks(GPT2_RANKS, vocab_size), here, model_class, vocab_size)
    wanted = f"{RANKS}, {', '.join(map(' + '.join, PAIRS))}, {WHOLE} or nanoGPT's {META}"
    raise NpgptError(
        f"its {vocab_size} ids are not GPT-2's 50257, and {folder} has no vocabulary ({wanted}); it runs on ids"
    )


def _of_pairs(pairs: BytePairs, here: Mapping[str, File], model_class: object, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a vocabulary in a format that transformers does not know, with the files beside it."""
    said = companions.read(here, model_class, defaults=False)
    special = [AddedToken(content, special=True, normalized=False) for content in pairs.others]
    return _tokenizer(pairs, replace(said, added=(*special, *said.added)), vocab_size)


def _tokenizer(pairs: BytePairs, said: Companions, vocab_size: int) -> Tokenizer:
    """Return a vocabulary's tokenizer as transformers' GPT2Tokenizer makes it from the files beside it."""
    tokens = numbered(said.added, pairs.id_of, len(pairs))
    check_stated(tokens, said.stated, said.winner)
    if missing := [content for content in said.around if content is not None and content not in tokens]:
        raise NpgptError(f"{pairs.files[0]} has no {missing[0]!r:.60}, the token to add before or after every text")
    before, after = (() if content is None else (tokens[content][1],) for content in said.around)
    tokenizer = byte_pairs.tokenizer(pairs, tokens, vocab_size, said.adds.get("add_prefix_space", False))
    return replace(tokenizer, before=before, after=after)


def _of_whole(
    here: Mapping[str, File], pair: tuple[str, str] | None, model_class: object, vocab_size: int
) -> Tokenizer:
    """Return the tokenizer of tokenizer.json, which wins over an equal pair of vocabulary and merges.

    transformers' GPT2Tokenizer uses only its vocabulary, merges and post-processor and builds the rest itself.
    """
    path = here[WHOLE]
    whole = tokenizer_json.read(path)
    said = companions.read(here, model_class, whole, str(path))
    if pair:
        _check_pair(path, whole, here[pair[0]], here[pair[1]])
    before, after = tokenizer_json.around(whole.get("post_processor"), str(path))
    for key, ids in (("add_bos_token", before), ("add_eos_token", after)):
        if said.adds.get(key, bool(ids)) != bool(ids):
            raise NpgptError(
                f"{here[CONFIG]} says that {key} is {str(said.adds[key]).lower()}, but the post_processor of {path} "
                f"adds {ids or 'nothing'} there: correct one of them"
            )
    beyond, prefix_space = tokenizer_json.beyond_byte_pairs(whole), tokenizer_json.prefix_space(whole)
    if beyond and not said.uses_all:
        raise NpgptError(
            f"{path} has {beyond[0]}, which transformers' GPT2Tokenizer ignores, and {said.reason}: if the model was "
            'trained with it, set "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json, or use --ids'
        )
    if prefix_space is not None and prefix_space != said.adds.get("add_prefix_space", prefix_space and said.uses_all):
        raise NpgptError(
            f"{path} says that add_prefix_space is {str(prefix_space).lower()}, but {here.get(CONFIG, CONFIG)} says "
            f"{str(not prefix_space).lower()} (the default is false): correct one of them"
        )
    if beyond:
        tokenizer = tokenizer_json.by_package(path, whole, said, vocab_size, beyond[0])
    else:
        added = {token.content for token in said.added}
        merges = tokenizer_json.merges(whole, path)
        pairs = byte_pairs.from_merges((path,), whole["model"]["vocab"], merges, added, vocab_size)
        said = replace(said, around=(None, None), adds={"add_prefix_space": bool(prefix_space)})
        tokenizer = _tokenizer(pairs, said, vocab_size)
    return replace(tokenizer, before=tuple(before), after=tuple(after))


def _check_pair(path: File, whole: Mapping[str, Any], vocabulary: File, merges: File) -> None:
    """Raise NpgptError if a vocabulary and merges beside tokenizer.json contradict it."""
    ids = strict_json.read_object(contents(vocabulary), str(vocabulary))
    model, added = whole["model"], {token["content"]: token["id"] for token in whole.get("added_tokens") or []}
    theirs = {**(model["vocab"] if isinstance(model["vocab"], Mapping) else {}), **added}
    differing = [token for token in ids if theirs.get(token) != ids[token]]
    differing += [token for token in theirs if token not in ids and token not in added]
    if differing:
        token = differing[0]
        raise NpgptError(
            f"{path} and {vocabulary} contradict each other: {token!r:.60} is {theirs.get(token)} and "
            f"{ids.get(token)}; remove the one that the model was not trained with"
        )
    if tokenizer_json.merges(whole, path) != byte_pairs.merge_lines(merges):
        raise NpgptError(f"{path} and {merges} contradict each other: their merges differ; remove one of them")


def in_folder(folder: Path) -> dict[str, Path]:
    """Return the vocabulary files in a folder by name, readable or not, including dangling links."""
    return {name: folder / name for name in sorted(os.listdir(folder)) if is_vocabulary(name)}


def beside(folder: Path) -> dict[str, Path]:
    """Return the files in a folder with settings of its tokenizer, by name."""
    return {name: folder / name for name in COMPANIONS if os.path.lexists(folder / name)}


def from_ranks(path: File, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a ranks file alone; see byte_pairs.from_ranks."""
    return _of_pairs(byte_pairs.from_ranks(path, vocab_size), {}, None, vocab_size)
