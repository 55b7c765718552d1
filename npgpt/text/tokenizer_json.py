"""Hugging Face's tokenizer.json: recognise GPT-2's kind, and run other kinds with the package tokenizers."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..checkpoints import strict_json
from ..errors import NpgptError
from .added_tokens import check_stated, numbered
from .byte_pairs import byte_characters
from .companions import Companions
from .tokenizer import File, Tokenizer, contents, utf8_offsets

KEYS = frozenset(
    "version truncation padding added_tokens normalizer pre_tokenizer post_processor decoder model".split()
)
MODEL_KEYS = {
    "BPE": frozenset(
        """type dropout unk_token continuing_subword_prefix end_of_word_suffix fuse_unk byte_fallback ignore_merges
        vocab merges""".split()
    ),
    "WordPiece": frozenset("type unk_token continuing_subword_prefix max_input_chars_per_word vocab".split()),
    "Unigram": frozenset("type unk_id vocab byte_fallback".split()),
    "WordLevel": frozenset("type vocab unk_token".split()),
}
# Keys of a BPE model with GPT-2's values; other keys change no ids if every byte has a token.
PLAIN: Mapping[str, tuple[object, ...]] = {
    "dropout": (None, 0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "ignore_merges": (None, False),
}


def read(path: File) -> dict[str, Any]:
    """Return the file's contents. Raises NpgptError if it is not a tokenizer.json or has an unknown key."""
    whole = strict_json.read_object(contents(path), str(path))
    if unknown := sorted(whole.keys() - KEYS):
        raise NpgptError(f"{path} has the setting {unknown[0]!r:.60}, which tokenizers does not know")
    if not isinstance(whole.get("model"), Mapping) or not isinstance(whole["model"].get("vocab"), (Mapping, list)):
        raise NpgptError(f"{path} is not a tokenizer.json: it has no model with a vocab")
    kind = whole["model"].get("type", "BPE")
    known = MODEL_KEYS.get(kind, frozenset()) if isinstance(kind, str) else frozenset()
    if unknown := sorted(whole["model"].keys() - known):
        raise NpgptError(
            f"{path} has the setting {unknown[0]!r:.60} in its model {kind!r:.40}, which npgpt does not know"
        )
    return whole


def merges(whole: Mapping[str, Any], path: File) -> list[str]:
    """Return the merges of a BPE model as in merges.txt."""
    try:
        return [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"]]
    except (TypeError, KeyError):
        raise NpgptError(f"{path}: its merges are missing or malformed") from None


def beyond_byte_pairs(whole: Mapping[str, Any]) -> list[str]:
    """Return, as text, the settings that go beyond byte-level BPE with GPT-2's pattern."""
    model, splitter, found = whole["model"], whole.get("pre_tokenizer"), []
    if (kind := model.get("type", "BPE")) != "BPE" or not isinstance(model["vocab"], Mapping):
        return [f"the model {kind!r:.40}"]
    for key, values in PLAIN.items():
        if model.get(key) not in values:
            found.append(f"{key} {model[key]!r:.40}")
    if whole.get("normalizer") is not None:
        found.append(f"the normalizer {_kinds(whole['normalizer']):.60}")
    parts = splitter if isinstance(splitter, Mapping) else {}
    plain = parts.get("type") == "ByteLevel" and parts.get("use_regex", True) is True
    if not plain or type(parts.get("add_prefix_space", False)) is not bool:
        found.append(f"the pre_tokenizer {_kinds(splitter):.60}")
    if whole.get("decoder") is not None and _kinds(whole["decoder"]) != "ByteLevel":
        found.append(f"the decoder {_kinds(whole['decoder']):.60}")
    if missing := [byte for character, byte in byte_characters().items() if character not in model["vocab"]]:
        found.append(f"no token for the byte 0x{min(missing):02X}")
    return found


def prefix_space(whole: Mapping[str, Any]) -> bool | None:
    """Return whether a ByteLevel pre-tokenizer adds a space before a text; None for another pre-tokenizer."""
    splitter = whole.get("pre_tokenizer")
    if not isinstance(splitter, Mapping) or splitter.get("type") != "ByteLevel":
        return None
    return bool(splitter.get("add_prefix_space"))


def _kinds(part: object) -> str:
    """Return the type of a component, such as a normalizer, with the types of its parts, without spaces."""
    if not isinstance(part, Mapping):
        return "null"
    inner = next((value for value in part.values() if isinstance(value, list) and value), [])
    parts = ",".join(_kinds(each) for each in inner if isinstance(each, Mapping))
    return str(part.get("type")) + (f"({parts})" if parts else "")


def around(processor: Any, source: str) -> tuple[list[int], list[int]]:
    """Return the ids that a post-processor adds before and after a text.

    Raises NpgptError for a malformed or unknown post-processor.
    """
    if processor is None:
        return [], []
    kind = processor.get("type") if isinstance(processor, Mapping) else None
    try:
        if kind == "ByteLevel":
            return [], []
        if kind in ("RobertaProcessing", "BertProcessing"):
            return [_id(processor["cls"][1])], [_id(processor["sep"][1])]
        if kind == "Sequence":
            before: list[int] = []
            after: list[int] = []
            for each in processor["processors"]:
                first, last = around(each, source)
                before, after = first + before, after + last
            return before, after
        if kind == "TemplateProcessing":
            (at,) = (n for n, piece in enumerate(processor["single"]) if piece.keys() == {"Sequence"})
            special = processor["special_tokens"]
            ids = [
                [] if n == at else special[p["SpecialToken"]["id"]]["ids"] for n, p in enumerate(processor["single"])
            ]
            return [_id(i) for each in ids[:at] for i in each], [_id(i) for each in ids[at:] for i in each]
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        raise NpgptError(f"{source}: its post_processor {kind!r:.40} is malformed") from None
    raise NpgptError(f"{source} has the post_processor {kind!r:.40}, which npgpt does not know")


def _id(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("an id must be a whole number")
    return value


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Raise NpgptError for anything that the package raises, including panics, which are not an Exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise NpgptError(f"{what}: {error}") from None


def by_package(path: File, whole: Mapping[str, Any], companions: Companions, vocab_size: int, why: str) -> Tokenizer:
    """Return a tokenizer run by the package tokenizers, with the companions' tokens added.

    why names the setting that needs the package. Raises NpgptError if the package is missing or rejects the file.
    """
    try:
        import tokenizers
    except ImportError:
        raise NpgptError(
            f"{path} has {why}, for which npgpt needs the package tokenizers: "
            'pip install "npgpt[tokenizers]", or run on ids (--ids)'
        ) from None
    with _refusing(f"{path} is rejected by tokenizers"):
        found = tokenizers.Tokenizer.from_str(contents(path).decode("utf-8"))
        found.no_truncation()  # transformers also truncates and pads only on request
        found.no_padding()
        own = found.get_vocab(with_added_tokens=False)
        found.add_tokens([tokenizers.AddedToken(**vars(token)) for token in companions.added])
        vocabulary = found.get_vocab(with_added_tokens=True)
    tokens = numbered(companions.added, own.get, len(own))
    check_stated(tokens, companions.stated, companions.winner)
    ids = {content: token_id for content, token_id in vocabulary.items() if token_id < vocab_size}
    if len(set(vocabulary.values())) != len(vocabulary):
        raise NpgptError(f"{path} gives the same id to several tokens")
    if not own or max(own.values()) >= vocab_size:
        raise NpgptError(
            f"{path} has ids up to {max(own.values(), default=-1)}, but the model's vocab_size is {vocab_size}"
        )

    def encoded(text: str, special: bool) -> Any:
        found.encode_special_tokens = not special
        with _refusing(f"tokenizers cannot split the text into tokens with {path}"):
            return found.encode(text, add_special_tokens=False)

    with _refusing(f"{path}: tokenizers cannot decode its tokens"):
        pieces, leading = _pieces(found, whole.get("decoder"), ids, tokens.keys())
    return Tokenizer(
        lambda text, special: list(encoded(text, special).ids),
        pieces,
        {content: token_id for content, (token, token_id) in tokens.items() if token.special},
        (path,),
        beyond={token_id: content for content, token_id in vocabulary.items() if token_id >= vocab_size},
        leading=leading,
        ends_of=lambda text, special: utf8_offsets(text)[[end for _, end in encoded(text, special).offsets]].tolist(),
    )


def _pieces(
    found: Any, decoder: object, ids: Mapping[str, int], added: Collection[str]
) -> tuple[dict[int, bytes], bytes]:
    """Return the bytes of each id inside a text, and the bytes to remove from the first piece of a text.

    The decoders of byte-level and other BPE work token by token. With other decoders, a token's bytes are what it adds
    to a preceding token.
    """
    kinds, characters = _kinds(decoder), byte_characters()
    if "ByteLevel" in kinds:
        return {
            token_id: content.encode()
            if content in added or not set(content) <= characters.keys()
            else bytes(characters[c] for c in content)
            for content, token_id in ids.items()
        }, b""
    if kinds == "BPEDecoder" and isinstance(decoder, Mapping):
        suffix = str(decoder.get("suffix"))
        return {token_id: content.replace(suffix, " ").encode() for content, token_id in ids.items()}, b""
    numbers = list(ids.values())
    alone = dict(zip(numbers, found.decode_batch([[n] for n in numbers], skip_special_tokens=False), strict=True))
    anchor = next((n for n in numbers if alone[n].strip() and "\ufffd" not in alone[n]), numbers[0])
    pairs = found.decode_batch([[anchor, n] for n in numbers], skip_special_tokens=False)
    pieces = {n: both.removeprefix(alone[anchor]).encode() for n, both in zip(numbers, pairs, strict=True)}
    if "ByteFallback" in kinds:
        pieces |= {ids[f"<0x{byte:02X}>"]: bytes([byte]) for byte in range(256) if f"<0x{byte:02X}>" in ids}
    spaced = any(pieces[n] == b" " + alone[n].encode() for n in numbers if alone[n])
    return pieces, b" " if spaced else b""
