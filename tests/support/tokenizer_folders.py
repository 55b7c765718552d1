"""Tokenizer folders, one for every setting that their files may have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from npgpt.checkpoints.places import GPT2_RANKS
from npgpt.text.byte_pairs import byte_characters, from_ranks

N_RANKS, VOCAB_SIZE = 700, 800
Files = dict[str, Any]  # the contents of a folder: JSON, or text as it is


@cache
def vocabulary() -> tuple[dict[str, int], list[str]]:
    """Return GPT-2's first ranks and <|endoftext|> in vocab.json's form, and the merges."""
    ranks = {piece: rank for piece, rank in from_ranks(GPT2_RANKS, 50257).ranks.items() if rank < N_RANKS}
    written = {byte: character for character, byte in byte_characters().items()}

    def text(piece: bytes) -> str:
        return "".join(written[byte] for byte in piece)

    def parts(piece: bytes) -> list[bytes]:
        found = [bytes([byte]) for byte in piece]
        while len(found) > 2:
            _, at = min((ranks.get(a + b, N_RANKS), at) for at, (a, b) in enumerate(itertools.pairwise(found)))
            found[at : at + 2] = [found[at] + found[at + 1]]
        return found

    merges = [" ".join(map(text, parts(piece))) for piece in sorted(ranks, key=ranks.__getitem__) if len(piece) > 1]
    return {text(piece): rank for piece, rank in ranks.items()} | {"<|endoftext|>": N_RANKS}, merges


def pair(vocab: Mapping[str, int] | None = None) -> Files:
    """Return vocab.json and merges.txt."""
    ids, merges = vocabulary()
    return {"vocab.json": dict(vocab or ids), "merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n"}


def added(content: str, number: int | None = None, **flags: bool) -> dict[str, Any]:
    """Return an added token with all its flags and, as in tokenizer.json, its id."""
    token: dict[str, Any] = {} if number is None else {"id": number}
    token |= {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return token | {"special": True} | flags


EOT = added("<|endoftext|>", N_RANKS)
USER = N_RANKS + 1  # the first id that is free
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def whole(model: Mapping[str, Any] | None = None, **parts: Any) -> Files:
    """Return tokenizer.json with byte-level BPE and some parts replaced; `model` extends BPE's."""
    ids, merges = vocabulary()
    bpe: Files = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
    }
    bpe |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": ids, "merges": merges}
    entire: Files = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [EOT], "normalizer": None}
    entire |= {
        "pre_tokenizer": BYTE_LEVEL,
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": bpe | dict(model or {}),
    }
    return {"tokenizer.json": entire | parts}


def config(**keys: Any) -> Files:
    """Return tokenizer_config.json."""
    return {"tokenizer_config.json": keys}


def fast(**keys: Any) -> Files:
    """Return a tokenizer_config.json that leaves tokenizer.json unchanged."""
    return config(tokenizer_class="PreTrainedTokenizerFast", **keys)


def decoder(*tokens: dict[str, Any]) -> dict[str, Any]:
    """Return added_tokens_decoder of <|endoftext|> and these."""
    return {str(N_RANKS + number): token for number, token in enumerate([added("<|endoftext|>"), *tokens])}


def template(single: Sequence[str]) -> dict[str, Any]:
    """Return a TemplateProcessing of <|endoftext|> and of A, the text."""
    pieces = [
        {"Sequence": {"id": "A", "type_id": 0}} if name == "A" else {"SpecialToken": {"id": name, "type_id": 0}}
        for name in single
    ]
    special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [N_RANKS], "tokens": ["<|endoftext|>"]}}
    return {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special}


def word_piece() -> dict[str, Any]:
    """Return a WordPiece model's own keys."""
    words = ["[UNK]", *"abcdefghijklmnopqrstuvwxyz0123456789.,!?<>|'", "the", "in", "hello", "world", "user", "text"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    ids = {word: number for number, word in enumerate(dict.fromkeys(words))}
    return {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": ids} | {
        "max_input_chars_per_word": 100
    }


def unigram() -> dict[str, Any]:
    """Return a Unigram model's own keys, with a fallback to bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"aeioutnrs", "▁the", "▁in", "er", "▁user"]
    return {
        "type": "Unigram",
        "unk_id": 0,
        "byte_fallback": True,
        "vocab": [[p, -float(n)] for n, p in enumerate(pieces)],
    }


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
LOWER = {"type": "Lowercase"}
SPLIT = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}|\p{L}+|\s+|."}, "behavior": "Isolated", "invert": False},
        BYTE_LEVEL | {"use_regex": False},
    ],
}


@dataclass(frozen=True)
class Case:
    """A folder with one setting, and what npgpt does with it."""

    file: str
    setting: str
    honoured: bool
    files: Files


def cases() -> Iterator[Case]:
    """Yield a folder for every setting."""
    yes, no = True, False
    tc, sm, at, tj, cj = (
        *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json", "config.json"),
    )
    yield Case("vocab.json + merges.txt", "alone", yes, pair())
    yield Case(
        "vocab.json + merges.txt",
        "no `<|endoftext|>`",
        yes,
        pair({k: v for k, v in vocabulary()[0].items() if v < N_RANKS}),
    )
    yield Case(
        "vocab.json + merges.txt", "a token that no file declares", yes, pair(vocabulary()[0] | {"<|user|>": USER})
    )
    yield Case("vocab.json", "ids with a hole", yes, pair(vocabulary()[0] | {"<|endoftext|>": 750}))
    yield Case(
        "vocab.json",
        "a hole, and an added token",
        no,
        pair(vocabulary()[0] | {"<|endoftext|>": 750}) | {at: {"<|user|>": 751}},
    )
    yield Case(at, "new tokens", yes, pair() | {at: {"<|user|>": USER, "user": USER + 1}})
    yield Case(at, "an id that is not the next", no, pair() | {at: {"<|user|>": USER + 5}})
    yield Case(at, "a token that a key names", yes, pair() | {at: {"[PAD]": USER}} | config(pad_token="[PAD]"))
    yield Case(
        at,
        "passed over by added_tokens_decoder",
        no,
        pair() | {at: {"<|user|>": USER}} | config(added_tokens_decoder={}),
    )
    yield Case(sm, "a text", yes, pair() | {sm: {"pad_token": "[PAD]"}})
    yield Case(sm, "flags", yes, pair() | {sm: {"pad_token": added("[PAD]", lstrip=True, rstrip=True)}})
    yield Case(sm, "additional_special_tokens", yes, pair() | {sm: {"additional_special_tokens": ["<|user|>", "<s>"]}})
    yield Case(
        sm,
        "additional_special_tokens, in added_tokens.json too",
        yes,
        pair() | {sm: {"additional_special_tokens": ["<|user|>"]}, at: {"<|user|>": USER}},
    )
    yield Case(sm, "a name of its own", yes, pair() | {sm: {"user_token": "<|user|>"}})
    yield Case(
        sm,
        "another pad_token",
        no,
        pair()
        | {sm: {"pad_token": "<pad>"}}
        | config(pad_token="[PAD]", added_tokens_decoder=decoder(added("[PAD]"), added("<pad>"))),
    )
    yield Case(
        sm,
        "passed over by added_tokens_decoder",
        no,
        pair() | {sm: {"pad_token": "[PAD]"}} | config(added_tokens_decoder={}),
    )
    yield Case(sm, "an unknown key", no, pair() | {sm: {"pad": "[PAD]"}})
    for flags in ({}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}):
        for special in (True, False):
            name = f"added_tokens_decoder, {'special' if special else 'not special'}" + "".join(
                f", {flag}" for flag in flags
            )
            tokens = decoder(added("<|user|>", special=special, **flags), added("user", special=special, **flags))
            yield Case(tc, name, yes, pair() | config(added_tokens_decoder=tokens))
    nested = decoder(
        added("use", special=False, normalized=True), added("user", single_word=True), added("ser"), added(" the")
    )
    yield Case(tc, "added_tokens_decoder, tokens within others", yes, pair() | config(added_tokens_decoder=nested))
    yield Case(
        tc,
        "added_tokens_decoder, white space",
        yes,
        pair() | config(added_tokens_decoder=decoder(added("\n", rstrip=True), added("  ", special=False))),
    )
    yield Case(
        tc,
        "added_tokens_decoder, tokens of the vocabulary",
        yes,
        pair() | config(added_tokens_decoder={str(vocabulary()[0]["in"]): added("in", special=False)}),
    )
    yield Case(
        tc,
        "added_tokens_decoder, an id that is not the next",
        no,
        pair() | config(added_tokens_decoder={"790": added("<|user|>")}),
    )
    yield Case(
        tc,
        "added_tokens_decoder, an unknown flag",
        no,
        pair() | config(added_tokens_decoder={str(USER): added("<|user|>", bold=True)}),
    )
    for key in (
        "bos_token",
        "eos_token",
        "unk_token",
        "sep_token",
        "pad_token",
        "cls_token",
        "mask_token",
        "user_token",
    ):
        yield Case(tc, key, yes, pair() | config(**{key: "<|user|>"}))
    yield Case(tc, "additional_special_tokens", yes, pair() | config(additional_special_tokens=["<|user|>", "<s>"]))
    yield Case(tc, "extra_special_tokens, a list", yes, pair() | config(extra_special_tokens=["<|user|>", "<s>"]))
    yield Case(
        tc, "extra_special_tokens, an object", yes, pair() | config(extra_special_tokens={"user_token": "<|user|>"})
    )
    yield Case(
        tc,
        "additional_ and extra_special_tokens",
        no,
        pair() | config(additional_special_tokens=["<s>"], extra_special_tokens=["<|user|>"]),
    )
    yield Case(tc, "add_bos_token", yes, pair() | config(add_bos_token=True))
    yield Case(tc, "add_bos_token, bos_token", yes, pair() | config(add_bos_token=True, bos_token="<s>"))
    yield Case(tc, "add_bos_token, bos_token null", yes, pair() | config(add_bos_token=True, bos_token=None))
    yield Case(tc, "add_eos_token", yes, pair() | config(add_eos_token=True))
    yield Case(tc, "add_prefix_space", yes, pair() | config(add_prefix_space=True))
    yield Case(
        tc,
        "add_prefix_space, added tokens",
        yes,
        pair()
        | config(add_prefix_space=True, added_tokens_decoder=decoder(added("<|user|>", special=False), added("user"))),
    )
    yield Case(tc, "split_special_tokens true", no, pair() | config(split_special_tokens=True))
    yield Case(tc, "split_special_tokens false", yes, pair() | config(split_special_tokens=False))
    yield Case(tc, "do_lower_case true", no, pair() | config(do_lower_case=True))
    yield Case(tc, "auto_map", no, pair() | config(auto_map={"AutoTokenizer": ["own.Own", None]}))
    yield Case(
        tc,
        "without effect on ids",
        yes,
        pair()
        | config(
            model_max_length=4,
            errors="strict",
            clean_up_tokenization_spaces=True,
            padding_side="left",
            chat_template="{{ messages }}",
            name_or_path="x",
            model_input_names=["input_ids"],
        ),
    )
    yield Case(tc, "an unknown key", no, pair() | config(reverse_text=True))
    for name in ("GPT2Tokenizer", "GPT2TokenizerFast"):
        yield Case(tc, f"tokenizer_class {name}", yes, pair() | config(tokenizer_class=name))
    for name in (
        "PreTrainedTokenizerFast",
        "RobertaTokenizer",
        "BertTokenizerFast",
        "T5Tokenizer",
        "CodeGenTokenizer",
        "OwnTokenizer",
    ):
        yield Case(tc, f"tokenizer_class {name}, no tokenizer.json", no, pair() | config(tokenizer_class=name))
    yield Case(
        cj,
        "tokenizer_class RobertaTokenizer",
        no,
        pair() | {cj: {"model_type": "gpt2", "tokenizer_class": "RobertaTokenizer"}},
    )
    yield Case(
        cj,
        "tokenizer_class PreTrainedTokenizerFast",
        yes,
        whole(normalizer=LOWER) | {cj: {"model_type": "gpt2", "tokenizer_class": "PreTrainedTokenizerFast"}},
    )
    yield Case(tj, "alone", yes, whole())
    yield Case(tj, "as it stands", yes, whole() | fast())
    yield Case(tj, "and a pair that says the same", yes, whole() | pair())
    shifted = {token: (number + 1) % (N_RANKS + 1) for token, number in vocabulary()[0].items()}
    yield Case(tj, "and a pair with other ids", no, whole() | pair(shifted))
    fewer = pair()["merges.txt"].rsplit("\n", 2)[0] + "\n"
    yield Case(tj, "and a pair with other merges", no, whole() | pair() | {"merges.txt": fewer})
    for label, kind in (("", {}), (", as it stands", fast())):
        for flags in (
            {"special": False, "normalized": True},
            {"lstrip": True},
            {"rstrip": True, "special": False},
            {"single_word": True, "special": False},
        ):
            token = added("user", USER + 1, **flags)
            name = f"added_tokens{label}: " + ", ".join(f"{key} {str(value).lower()}" for key, value in flags.items())
            yield Case(tj, name, yes, whole(added_tokens=[EOT, added("<|user|>", USER, **flags), token]) | kind)
        yield Case(
            tj,
            f"added_tokens{label}: an id that is not the next",
            no,
            whole(added_tokens=[EOT, added("<|user|>", 790)]) | kind,
        )
        yield Case(
            tj,
            f"added_tokens{label}: other flags than added_tokens_decoder",
            no,
            whole(added_tokens=[EOT, added("<|user|>", USER)])
            | config(**{**kind.get(tc, {}), "added_tokens_decoder": decoder(added("<|user|>", lstrip=True))}),
        )
        yield Case(
            tj,
            f"truncation{label}",
            yes,
            whole(truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}) | kind,
        )
        yield Case(
            tj,
            f"padding{label}",
            yes,
            whole(
                padding={
                    "strategy": {"Fixed": 8},
                    "direction": "Right",
                    "pad_to_multiple_of": None,
                    "pad_id": 0,
                    "pad_type_id": 0,
                    "pad_token": "!",
                }
            )
            | kind,
        )
        yield Case(tj, f"post_processor ByteLevel{label}", yes, whole(post_processor=BYTE_LEVEL) | kind)
        roberta = {
            "type": "RobertaProcessing",
            "sep": ["<|endoftext|>", N_RANKS],
            "cls": ["<|endoftext|>", N_RANKS],
            "trim_offsets": True,
            "add_prefix_space": False,
        }
        yield Case(tj, f"post_processor RobertaProcessing{label}", yes, whole(post_processor=roberta) | kind)
        bert = {"type": "BertProcessing", "sep": ["in", 259], "cls": ["<|endoftext|>", N_RANKS]}
        yield Case(tj, f"post_processor BertProcessing{label}", yes, whole(post_processor=bert) | kind)
        for single in (["<|endoftext|>", "A"], ["A", "<|endoftext|>"], ["<|endoftext|>", "<|endoftext|>", "A"]):
            yield Case(
                tj,
                f"post_processor {' '.join(f'`{name}`' for name in single)}{label}",
                yes,
                whole(post_processor=template(single)) | kind,
            )
        sequence = {"type": "Sequence", "processors": [BYTE_LEVEL, template(["<|endoftext|>", "A"])]}
        yield Case(tj, f"post_processor Sequence{label}", yes, whole(post_processor=sequence) | kind)
        yield Case(
            tj,
            f"post_processor, and add_bos_token false{label}",
            no,
            whole(post_processor=sequence) | config(**{**kind.get(tc, {}), "add_bos_token": False}),
        )
        yield Case(
            tj,
            f"add_bos_token, and no post_processor{label}",
            no,
            whole() | config(**{**kind.get(tc, {}), "add_bos_token": True}),
        )
        yield Case(
            tj,
            f"add_prefix_space{label}",
            bool(label),
            whole(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True}) | kind,
        )
        yield Case(
            tj,
            f"add_prefix_space, in both{label}",
            yes,
            whole(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True})
            | config(**{**kind.get(tc, {}), "add_prefix_space": True}),
        )
        yield Case(
            tj,
            f"add_prefix_space, in tokenizer_config.json alone{label}",
            no,
            whole() | config(**{**kind.get(tc, {}), "add_prefix_space": True}),
        )
        beyond: dict[str, Files] = {
            "normalizer Lowercase": whole(normalizer=LOWER),
            "normalizer NFKC, added tokens": whole(
                normalizer={"type": "NFKC"}, added_tokens=[EOT, added("User", USER, special=False, normalized=True)]
            ),
            "normalizer Sequence": whole(
                normalizer={"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}, LOWER]}
            ),
            "pre_tokenizer Split": whole(pre_tokenizer=SPLIT),
            "pre_tokenizer without the pattern": whole(pre_tokenizer=BYTE_LEVEL | {"use_regex": False}),
            "pre_tokenizer null": whole(pre_tokenizer=None),
            "dropout 1": whole({"dropout": 1.0}),
            "end_of_word_suffix": whole({"end_of_word_suffix": "</w>"}),
            "ignore_merges": whole({"ignore_merges": True}),
            "decoder Metaspace": whole(decoder=METASPACE),
            "a byte without a token": whole(
                {
                    "vocab": {k: v for k, v in vocabulary()[0].items() if k != "ÿ"},
                    "merges": [m for m in vocabulary()[1] if "ÿ" not in m],
                }
            ),
            "model WordPiece": whole(
                added_tokens=[added("[UNK]", 0)],
                decoder={"type": "WordPiece", "prefix": "##", "cleanup": False},
                pre_tokenizer={"type": "BertPreTokenizer"},
                normalizer=LOWER,
            ),
            "model Unigram": whole(added_tokens=[added("<unk>", 0)], decoder=METASPACE, pre_tokenizer=METASPACE),
            "model WordLevel": whole(added_tokens=[], pre_tokenizer={"type": "Whitespace"}, decoder=None),
        }
        beyond["model WordPiece"]["tokenizer.json"]["model"] = word_piece()
        beyond["model Unigram"]["tokenizer.json"]["model"] = unigram()
        beyond["model WordLevel"]["tokenizer.json"]["model"] = {
            "type": "WordLevel",
            "unk_token": "?",
            "vocab": {"?": 0, "the": 1, "user": 2},
        }
        for name, files in beyond.items():
            yield Case(tj, name + label, bool(label), files | kind)
        yield Case(
            tj,
            f"unk_token, fuse_unk, byte_fallback{label}",
            yes,
            whole({"unk_token": "<|endoftext|>", "fuse_unk": True, "byte_fallback": True}) | kind,
        )
        yield Case(tj, f"an unknown key{label}", no, whole(reverse=True) | kind)
        yield Case(tj, f"an unknown key of the model{label}", no, whole({"reverse": True}) | kind)
    for name in (
        "spiece.model",
        "bpe.model",
        "source.spm",
        "tekken.json",
        "vocab.jsonl",
        "Vocab.json",
        "vocab.txt",
        "tokenizer.model",
        "sentencepiece.bpe.model",
    ):
        yield Case(name, "alone", no, {name: ""})
