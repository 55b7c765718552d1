"""Files beside a vocabulary, and vocabularies of other kinds, are honoured or refused by name.

Ids are literal values from transformers 5.23.0; tests/parity compares many texts with it."""

from __future__ import annotations

import itertools
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npgpt
from npgpt.checkpoints.download import choose
from npgpt.checkpoints.places import GPT2_RANKS
from npgpt.cli import main
from npgpt.errors import NpgptError
from npgpt.text import byte_pairs
from npgpt.text.companions import NAMED
from npgpt.text.tokenizer import TextDecoder
from npgpt.text.vocabularies import is_vocabulary
from tests.support.models import small, store
from tests.support.thorough import examples
from tests.support.vocabularies import opened, put, reason, small_pair, small_vocabulary, small_whole

CONFIG, MAP, ADDED, WHOLE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json"
USER = 261  # the first id after the vocabulary
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def decoder(**flags: bool) -> dict[str, Any]:
    return {CONFIG: {"added_tokens_decoder": {"261": {"content": "<|user|>"} | FLAGS | flags}}}


def whole_with(**flags: bool) -> dict[str, Any]:
    end = {"id": 260, "content": "<|endoftext|>", "special": True}
    return small_whole(added_tokens=[end, {"id": 261, "content": "<|user|>"} | FLAGS | flags])


@pytest.mark.parametrize(
    "files",
    [
        small_pair() | {ADDED: {"<|user|>": 261}},
        small_pair() | decoder(),
        whole_with(),
        whole_with() | {CONFIG: {"tokenizer_class": "PreTrainedTokenizerFast"}},
        whole_with() | small_pair(),
    ],
)
def test_an_added_token_is_one_token(tmp_path: Path, files: dict[str, Any]) -> None:
    tokenizer = opened(put(tmp_path, files))
    for special in (False, True):
        assert tokenizer.encode("in<|user|> the", special=special) == [259, USER, 258]
    assert tokenizer.decode([259, USER, 258]) == "in<|user|> the"
    assert tokenizer.piece(USER) == b"<|user|>"
    assert tokenizer.holes.tolist() == []
    logits = np.zeros(300)
    tokenizer.hide_unused(logits)
    assert np.flatnonzero(np.isneginf(logits)).tolist() == list(range(262, 300))  # and so it can be drawn
    decode = TextDecoder(tokenizer)
    assert [decode.feed(token_id) for token_id in (259, USER, 258)] == ["in", "<|user|>", " the"]


@pytest.mark.parametrize(
    "files",
    [
        {MAP: {"pad_token": "<|user|>"}},
        {MAP: {"pad_token": {"content": "<|user|>", "lstrip": False}}},
        {MAP: {"additional_special_tokens": ["<|user|>"]}},
        {ADDED: {"<|user|>": 261}, MAP: {"cls_token": "<|user|>"}},
        decoder(special=True),
        {CONFIG: {"pad_token": "<|user|>", "added_tokens_decoder": decoder()[CONFIG]["added_tokens_decoder"]}},
        {CONFIG: {"extra_special_tokens": ["<|user|>"]}},
        {CONFIG: {"extra_special_tokens": {"user_token": "<|user|>"}}},
        *({CONFIG: {key: "<|user|>"}} for key in (*NAMED, "user_token")),
    ],
)
def test_a_special_token_is_one_only_on_request(tmp_path: Path, files: dict[str, Any]) -> None:
    tokenizer = opened(put(tmp_path, small_pair() | files))
    assert tokenizer.encode("in<|user|>", special=True) == [259, USER]
    assert USER not in tokenizer.encode("in<|user|>")
    assert tokenizer.special_tokens["<|user|>"] == USER


@pytest.mark.parametrize(
    ("flags", "ids"),
    [
        ({}, [220, 261, 220, 78, 261, 220, 261, 78]),
        ({"lstrip": True}, [261, 220, 78, 261, 261, 78]),
        ({"rstrip": True}, [220, 261, 78, 261, 261, 78]),
        ({"lstrip": True, "rstrip": True}, [261, 78, 261, 261, 78]),
    ],
)
def test_flags_of_added_tokens(tmp_path: Path, flags: dict[str, bool], ids: list[int]) -> None:
    for special in (False, True):
        tokenizer = opened(put(tmp_path, small_pair() | decoder(special=special, **flags)))
        assert tokenizer.encode(" <|user|> o<|user|> <|user|>o", special=True) == ids
    tokenizer = opened(put(tmp_path, small_pair() | decoder(lstrip=True, rstrip=True)))
    assert tokenizer.encode("\u3000\n<|user|>\xa0\u2028") == [261]
    assert tokenizer.encode("\x1c<|user|>\x1f") == [216, 261, 219]  # which Python calls white space, and Unicode not


def test_flags_of_words(tmp_path: Path) -> None:
    tokens = {"261": {"content": "ab"}, "262": {"content": "abc", "single_word": True}, "263": {"content": "bcd"}}
    tokenizer = opened(put(tmp_path, small_pair() | {CONFIG: {"added_tokens_decoder": tokens}}))
    # the longest match counts, and where it is no word of its own, nothing does
    assert tokenizer.encode("abcd abc. abcab ab") == [64, 65, 66, 67, 220, 262, 13, 220, 64, 65, 66, 261, 220, 261]
    for neighbour in ("_", "é", "Ⓐ", "\u200d", "\u0301", "5", "ⅷ"):
        assert 262 not in tokenizer.encode(f"abc{neighbour}")
        assert 262 not in tokenizer.encode(f"{neighbour}abc")
    assert tokenizer.encode("½abc½").count(262) == 1


def test_two_tokens_that_take_the_same_white_space(tmp_path: Path) -> None:
    tokens = {"261": {"content": "<x>", "rstrip": True}, "262": {"content": " ", "lstrip": True}}
    tokenizer = opened(put(tmp_path, small_pair() | {CONFIG: {"added_tokens_decoder": tokens}}))
    assert tokenizer.encode("<x> a ") == [261, 64, 262]  # nothing is left of the first space
    with pytest.raises(NpgptError, match="added token ' ' lies in white space that another one claims"):
        tokenizer.encode("<x>  a")  # where tokenizers panics
    tokens["262"]["lstrip"] = False
    tokenizer = opened(put(tmp_path, small_pair() | {CONFIG: {"added_tokens_decoder": tokens}}))
    assert tokenizer.encode("<x>  a") == [261, 262, 262, 64]


def test_a_token_of_tokenizer_json_that_a_key_names_is_special(tmp_path: Path) -> None:
    tokenizer = opened(put(tmp_path, whole_with(special=False) | {CONFIG: {"pad_token": "<|user|>"}}))
    assert USER not in tokenizer.encode("<|user|>")
    assert tokenizer.encode("<|user|>", special=True) == [USER]


def test_tokens_before_and_after_a_text(tmp_path: Path) -> None:
    bos = opened(put(tmp_path / "bos", small_pair() | {CONFIG: {"add_bos_token": True}}))
    assert bos.encode("in") == [260, 259]
    assert bos.encode("") == [260]
    assert bos.encode("in", alone=True) == [259]
    other = opened(put(tmp_path / "s", small_pair() | {CONFIG: {"add_bos_token": True, "bos_token": "<s>"}}))
    assert other.encode("in") == [261, 259]
    both = {"type": "RobertaProcessing", "cls": ["<|endoftext|>", 260], "sep": ["in", 259]}
    assert opened(put(tmp_path / "both", small_whole(post_processor=both))).encode("the") == [260, 83, 257, 259]
    sequence = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, both, both]}
    whole = opened(put(tmp_path / "two", small_whole(post_processor=sequence)))
    assert (whole.before, whole.after) == ((260, 260), (259, 259))


def test_a_space_before_a_text(tmp_path: Path) -> None:
    files = small_pair() | {CONFIG: {"add_prefix_space": True}}
    tokenizer = opened(put(tmp_path, files))
    assert tokenizer.encode("the") == tokenizer.encode(" the") == [258]
    assert tokenizer.encode("\nthe") == [220, 198, 83, 257]
    assert tokenizer.encode("the<|endoftext|>the", special=True) == [258, 260, 258]
    assert tokenizer.encode("") == []


# Each contradiction names the two files, or the file and the key.
CONTRADICTIONS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    (small_pair() | {ADDED: {"<|user|>": 290}}, (ADDED, "'<|user|>' is 290", "makes it 261")),
    (small_pair() | {ADDED: {"<|user|>": 261}, CONFIG: {"added_tokens_decoder": {}}}, (ADDED, "'<|user|>'")),
    (small_pair() | {MAP: {"pad_token": "<p>"}, CONFIG: {"added_tokens_decoder": {}}}, (MAP, CONFIG, "pad_token")),
    (
        small_pair() | {MAP: {"eos_token": "<e>"}, CONFIG: decoder()[CONFIG] | {"eos_token": "<|user|>"}},
        (MAP, CONFIG, "eos_token is '<e>'", "'<|user|>'"),
    ),
    (whole_with() | decoder(lstrip=True), (WHOLE, "lstrip of '<|user|>' is false")),
    (whole_with() | {CONFIG: {"added_tokens_decoder": {}}}, (WHOLE, "'<|user|>'", CONFIG)),
    (small_whole() | small_pair() | {"vocab.json": small_vocabulary()[0] | {"<x>": 270}}, (WHOLE, "vocab.json", "<x>")),
    (small_whole() | small_pair() | {"merges.txt": "Ġ t\nh e\nĠt he\n"}, (WHOLE, "merges.txt")),
    (small_whole() | {CONFIG: {"add_bos_token": True}}, (WHOLE, CONFIG, "add_bos_token is true")),
    (
        small_whole(post_processor={"type": "BertProcessing", "cls": ["a", 1], "sep": ["b", 2]})
        | {CONFIG: {"add_eos_token": False}},
        (WHOLE, CONFIG, "add_eos_token is false"),
    ),
    (small_whole() | {CONFIG: {"add_prefix_space": True}}, (WHOLE, CONFIG, "add_prefix_space is false")),
    (small_pair() | {"meta.pkl": b""}, ("meta.pkl", "vocab.json")),
]


@pytest.mark.parametrize(("files", "named"), CONTRADICTIONS)
def test_contradictions_name_both(tmp_path: Path, files: dict[str, Any], named: tuple[str, ...]) -> None:
    message = reason(put(tmp_path, files))
    assert all(word in message for word in named), message


REFUSED: list[tuple[dict[str, Any], str]] = [
    (small_pair() | {CONFIG: {"reverse_text": True}}, "has the setting 'reverse_text'"),
    (small_pair() | {CONFIG: {"split_special_tokens": True}}, "split_special_tokens is True"),
    (small_pair() | {CONFIG: {"do_lower_case": True}}, "do_lower_case is True"),
    (small_pair() | {CONFIG: {"auto_map": {"AutoTokenizer": ["a.B", None]}}}, "auto_map is"),
    (small_pair() | {CONFIG: {"add_bos_token": 1}}, "add_bos_token must be true or false, not 1"),
    (small_pair() | {CONFIG: {"use_special_token": True}}, "an added token must be a string or an object"),
    (small_pair() | {CONFIG: {"pad_token": {"content": "<p>", "bold": True}}}, "the unknown setting 'bold'"),
    (
        small_pair() | {CONFIG: {"pad_token": {"content": "<p>", "lstrip": "no"}}},
        "lstrip of the added token '<p>' must",
    ),
    (small_pair() | {CONFIG: {"added_tokens_decoder": {"x": "<p>"}}}, "added_tokens_decoder must be"),
    (small_pair() | {CONFIG: {"added_tokens_decoder": []}}, "added_tokens_decoder must be"),
    (small_pair() | {CONFIG: {"added_tokens_decoder": {"9" * 5000: "<p>"}}}, "added_tokens_decoder must be"),
    (
        small_whole(post_processor={"type": "BertProcessing", "cls": ["a", 299], "sep": ["b", 2]}),
        "the id 299, to be added before or after every text, has no text",
    ),
    (small_pair() | {CONFIG: {"pad_token": "\ud800"}}, "lone surrogate"),
    (small_pair() | {CONFIG: "{"}, "tokenizer_config.json is not valid JSON"),
    (small_pair() | {CONFIG: {"extra_special_tokens": "<p>"}}, "extra_special_tokens must be a list or an object"),
    (small_pair() | {MAP: {"pad": "<p>"}}, "has the key 'pad', which is not a special token"),
    (small_pair() | {ADDED: {"<p>": "261"}}, "the id of '<p>' must be a whole number"),
    (
        small_pair() | {CONFIG: {"tokenizer_class": "PreTrainedTokenizerFast"}},
        "which needs tokenizer.json, but that is missing",
    ),
    (small_pair() | {CONFIG: {"tokenizer_class": "RobertaTokenizer"}}, "tokenizer_class is 'RobertaTokenizer'"),
    (
        small_pair() | {"config.json": {"tokenizer_class": "T5Tokenizer"}},
        "config.json says that tokenizer_class is 'T5T",
    ),
    (small_whole(normalizer={"type": "NFC"}), "the normalizer NFC, which transformers' GPT2Tokenizer ignores"),
    (small_whole(reverse=True), "has the setting 'reverse'"),
    (small_whole(post_processor={"type": "New"}), "the post_processor 'New'"),
    (small_whole(post_processor={"type": "BertProcessing"}), "post_processor 'BertProcessing' is malformed"),
    (small_whole(added_tokens={}), "added_tokens must be a list"),
    (
        small_whole(added_tokens=[{"id": True, "content": "<p>"}]),
        "the id of the added token '<p>' must be a whole number",
    ),
]


@pytest.mark.parametrize(("files", "message"), REFUSED)
@pytest.mark.parametrize("vocab_size", [300, 50257])
def test_what_is_not_honoured_is_refused_by_name(
    tmp_path: Path, files: dict[str, Any], message: str, vocab_size: int
) -> None:
    assert message in reason(put(tmp_path, files), vocab_size)


def changed(**model: Any) -> dict[str, Any]:
    whole = small_whole()[WHOLE]
    return {WHOLE: whole | {"model": whole["model"] | model}}


SPLIT = {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]}
BEYOND: list[tuple[dict[str, Any], str]] = [
    (changed(dropout=0.1), "dropout 0.1"),
    (changed(end_of_word_suffix="</w>"), "end_of_word_suffix '</w>'"),
    (changed(continuing_subword_prefix="##"), "continuing_subword_prefix '##'"),
    (changed(ignore_merges=True), "ignore_merges True"),
    ({WHOLE: {"model": {"type": "WordPiece", "vocab": {}}}}, "the model 'WordPiece'"),
    ({WHOLE: {"model": {"type": "Unigram", "vocab": []}}}, "the model 'Unigram'"),
    (small_whole(normalizer={"type": "Lowercase"}), "the normalizer Lowercase"),
    (small_whole(pre_tokenizer=SPLIT), "the pre_tokenizer Sequence(Digits,ByteLevel)"),
    (small_whole(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": 0}), "the pre_tokenizer ByteLevel"),
    (small_whole(pre_tokenizer=None), "the pre_tokenizer null"),
    (small_whole(pre_tokenizer={"type": "ByteLevel", "use_regex": False}), "the pre_tokenizer ByteLevel"),
    (small_whole(decoder={"type": "Metaspace"}), "the decoder Metaspace"),
]


@pytest.mark.parametrize(("files", "setting"), BEYOND)
def test_without_the_package_a_setting_is_refused_with_the_ways_out(
    tmp_path: Path, files: dict[str, Any], setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    message = reason(put(tmp_path, files | {CONFIG: {"tokenizer_class": "PreTrainedTokenizerFast"}}))
    assert setting in message
    assert 'pip install "npgpt[tokenizers]"' in message
    assert "--ids" in message


def test_a_token_without_a_row_is_an_error_where_a_text_has_it(tmp_path: Path) -> None:
    tokenizer = opened(put(tmp_path, small_pair() | {CONFIG: {"pad_token": "[PAD]"}}), 261)
    assert tokenizer.n_vocab == 261
    assert tokenizer.encode("in") == [259]
    assert tokenizer.decode(tokenizer.encode("[PAD]")) == "[PAD]"
    with pytest.raises(NpgptError, match=r"the token '\[PAD\]' has the id 261 .* the model has no embedding for it"):
        tokenizer.encode("in [PAD]", special=True)


FOREIGN = """spiece.model bpe.model source.spm target.spm tekken.json vocab.jsonl Vocab.json VOCAB.TXT vocab.txt
tokenizer.model sentencepiece.bpe.model tiktoken.model qwen.tiktoken bpe.codes dict.txt vocab.json.gz my-tokenizer.json
Merges.txt wordpiece.txt m.vocab""".split()
OTHERS = """config.json model.safetensors pytorch_model.bin tokenizer_config.json generation_config.json README.md
model.bin training_args.bin
onnx/vocab.json original/tokenizer.model optimizer.pt model.gguf ckpt.pt
tf_model.h5 merges.md chat_template.jinja""".split()


@pytest.mark.parametrize("name", FOREIGN)
def test_another_kind_of_vocabulary_is_never_replaced_by_gpt2s(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert f"has {name}, which alone is not a vocabulary that npgpt reads" in reason(tmp_path, 50257)
    assert name in choose([name, "config.json", "model.safetensors"], "org/name")


def test_a_file_that_only_sounds_like_a_vocabulary_is_not_overwritten(tmp_path: Path) -> None:
    source = put(store(tmp_path / "m", small(vocab_size=300)), small_pair())
    npgpt.convert(source, tmp_path / "out")
    npgpt.convert(source, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "my_vocab_notes.txt").write_text("mine")
    with pytest.raises(NpgptError, match=r"contains my_vocab_notes\.txt, so it is not just a converted model"):
        npgpt.convert(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "my_vocab_notes.txt").read_text() == "mine"


def test_what_is_no_vocabulary() -> None:
    assert [name for name in OTHERS if is_vocabulary(name)] == []


def test_a_foreign_class_without_a_vocabulary_is_not_replaced_either(tmp_path: Path) -> None:
    put(tmp_path, {CONFIG: {"tokenizer_class": "BertTokenizer"}})
    assert "tokenizer_class is 'BertTokenizer'" in reason(tmp_path, 50257)
    put(tmp_path, {CONFIG: {"added_tokens_decoder": {"50257": {"content": "<|user|>"}}}})
    assert opened(tmp_path, 50304).encode("hello<|user|>") == [31373, 50257]


@pytest.mark.parametrize("step", ["convert", "save"])
def test_what_lies_beside_a_vocabulary_travels(tmp_path: Path, step: str) -> None:
    files = small_pair() | decoder() | {ADDED: {"<|user|>": 261}}
    source = put(store(tmp_path / "m", small(vocab_size=300)), files)
    if step == "convert":
        npgpt.convert(source, tmp_path / "out")
    else:
        npgpt.save(npgpt.load(source), tmp_path / "out")
    assert npgpt.load(tmp_path / "out").tokenizer.encode("<|user|>in") == [261, 259]


# not: config.json's class, which says how the vocabulary is read, kept by convert alone
@pytest.mark.parametrize("write", ["save", "convert"])
def test_a_class_in_config_json_is_kept(tmp_path: Path, write: str) -> None:
    splitter = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}
    source = store(tmp_path / "m", small(vocab_size=300), tokenizer_class="PreTrainedTokenizerFast")
    put(source, small_whole(pre_tokenizer=splitter))
    ids = npgpt.load(source).tokenizer.encode("the")
    assert ids == [258]  # " the"
    if write == "save":
        npgpt.save(npgpt.load(source), tmp_path / "out")
    else:
        npgpt.convert(source, tmp_path / "out")
    assert npgpt.load(tmp_path / "out").tokenizer.encode("the") == ids


# --- merges ---


def by_pairs(text: str, ids: dict[str, int], merges: list[str]) -> list[int]:
    """Return a piece's ids by applying the earliest possible merge first, as OpenAI's encoder.py does."""
    order = {tuple(merge.split()): n for n, merge in enumerate(merges)}
    written = {byte: character for character, byte in byte_pairs.byte_characters().items()}
    parts = [written[byte] for byte in text.encode()]
    while pairs := [(order[pair], at) for at, pair in enumerate(itertools.pairwise(parts)) if pair in order]:
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ids[part] for part in parts]


@given(st.integers(0, 10**6), st.lists(st.text("abc", min_size=1, max_size=9), min_size=4, max_size=4))
@settings(max_examples=examples(60, 2000))
def test_merges_that_are_accepted_give_their_ids(seed: int, texts: list[str]) -> None:
    """Most lists of random merges contain one that merging by rank never reaches."""
    generator = random.Random(seed)
    parts, merges = ["a", "b", "c"], []
    for _ in range(generator.randrange(1, 7)):
        merge = generator.choice(parts), generator.choice(parts)
        if "".join(merge) not in parts:
            parts.append("".join(merge))
            merges.append(" ".join(merge))
    ids = {character: i for i, character in enumerate(sorted(byte_pairs.byte_characters()))}
    ids |= {merge.replace(" ", ""): 256 + n for n, merge in enumerate(merges)}
    try:
        pairs = byte_pairs.from_merges((GPT2_RANKS,), ids, merges, (), 300)
    except NpgptError:
        ranked = {token: n for n, token in enumerate(ids)}  # and then some token does not come apart into its parts
        assert any(textbook(merge, ids, ranked) != merge.split() for merge in merges)
        return
    tokenizer = byte_pairs.tokenizer(pairs, {}, 300)
    for text in texts:
        assert tokenizer.encode(text) == by_pairs(text, ids, merges)


def textbook(merge: str, ids: dict[str, int], ranked: dict[str, int]) -> list[str]:
    """Return the two parts of a token under the ranks below its own."""
    whole = merge.replace(" ", "")
    parts = list(whole)
    while True:
        pairs = [(ids.get(a + b, 10**9), at) for at, (a, b) in enumerate(itertools.pairwise(parts))]
        rank, at = min(pairs, default=(10**9, 0))
        if rank >= ids[whole]:
            return parts
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.mark.parametrize(
    ("merges", "named"),
    [
        (["a b", "b c", "a bc"], "'a bc'"),  # abc is ab c
        (["a a", "a aa"], "'a aa'"),  # aaa is aa a
        (["b c", "ab c"], "'ab c'"),  # there is no ab
        (["a b", "c d", "b c", "ab cd", "a bcd"], "'a bcd'"),
    ],
)
def test_merges_that_others_forestall(tmp_path: Path, merges: list[str], named: str) -> None:
    ids = {character: i for i, character in enumerate(sorted(byte_pairs.byte_characters()))}
    ids |= {merge.replace(" ", ""): 256 + n for n, merge in enumerate(merges)}
    if "bcd" in named:
        ids = {token: n for token, n in ids.items() if token != "abcd"} | {"abcd": 260}
    message = reason(put(tmp_path, {"vocab.json": ids, "merges.txt": "\n".join(merges)}))
    assert named in message


def test_gpt2s_merges_are_known_by_their_hash(tmp_path: Path) -> None:
    """The hash skips a needless check; the published file's hash is tiktoken's."""
    assert byte_pairs.GPT2_MERGES == "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0"


# --- nanoGPT's meta.pkl ---

LETTERS = "\n !abcé🙂"


def meta(**changes: Any) -> bytes:
    stoi = {character: n for n, character in enumerate(LETTERS)}
    plain = {"vocab_size": len(LETTERS), "itos": {n: c for c, n in stoi.items()}, "stoi": stoi}
    return pickle.dumps(plain | changes)


def test_a_character_vocabulary(tmp_path: Path) -> None:
    tokenizer = opened(put(tmp_path, {"meta.pkl": meta()}), len(LETTERS))
    assert tokenizer.encode("a🙂 é\n") == [3, 7, 1, 6, 0]
    assert tokenizer.decode([3, 7, 1, 6, 0]) == "a🙂 é\n"
    assert tokenizer.n_vocab == len(LETTERS)
    assert tokenizer.end_of_text is None
    with pytest.raises(NpgptError, match=r"meta\.pkl has no id for 'x' \(U\+0078, character 1 of the text\)"):
        tokenizer.encode("ax")


def test_a_model_of_characters_writes_text_and_converts(tmp_path: Path) -> None:
    source = put(store(tmp_path / "m", small(vocab_size=len(LETTERS))), {"meta.pkl": meta()})
    npgpt.convert(source, tmp_path / "out")
    for model in (npgpt.load(source), npgpt.load(tmp_path / "out")):
        assert set("".join(model.generate("abc", max_tokens=9, seed=1))) <= set(LETTERS)
        (score,) = npgpt.score(["abc é"], model, end_of_text=False)
        assert b"".join(score.pieces).decode() == "abc é"


class Exploit:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('run')",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Exploit()), "it has no dicts stoi and itos"),
        (meta(stoi=Exploit()), "it has no dicts stoi and itos"),
        (pickle.dumps([1]), "it has no dicts stoi and itos"),
        (pickle.dumps({"vocab_size": 50257}), "it has no dicts stoi and itos"),
        (meta(itos={}), "not inverse to each other"),
        (meta(stoi={"ab": 0}, itos={0: "ab"}), "'ab': 0, which is not a character and its id"),
        (meta(stoi={"a": True}, itos={True: "a"}), "not a character and its id"),
        (meta(stoi={"a": 0, "b": 0}, itos={0: "b"}), "not inverse to each other"),
        (meta(stoi={}, itos={}), "ids up to -1"),
        (meta(vocab_size=9), "vocab_size 9 but 8 characters"),
        (meta()[:-1], "is malformed"),
        (b"", "malformed"),
    ],
)
def test_what_is_no_character_vocabulary(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in reason(put(tmp_path, {"meta.pkl": content}), 50257)


def test_characters_that_the_model_has_not(tmp_path: Path) -> None:
    assert "ids up to 7, but the model's vocab_size is 7" in reason(put(tmp_path, {"meta.pkl": meta()}), 7)


# --- what a user sees ---


def test_a_token_before_every_text_is_read_and_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = put(store(tmp_path / "m", small(vocab_size=300)), small_pair() | {CONFIG: {"add_bos_token": True}})
    arguments = ["--model", str(folder), "--max-tokens", "3", "--temperature", "0"]
    main(["generate", "in the", *arguments])
    text = capsys.readouterr().out
    assert text.startswith("in the")
    main(["generate", "--ids", "260,259,258", *arguments])
    assert capsys.readouterr().out == "<|endoftext|>" + text
    main(["tokens", "in", "--model", str(folder), "--json"])
    assert '"ids": [260, 259]' in capsys.readouterr().out


def test_a_token_before_every_text_stands_once_before_a_scored_one(tmp_path: Path) -> None:
    files = small_pair() | {CONFIG: {"add_bos_token": True, "add_eos_token": True}}
    ours = npgpt.load(put(store(tmp_path / "m", small(vocab_size=300)), files))
    plain = npgpt.load(put(store(tmp_path / "plain", small(vocab_size=300)), small_pair()))
    (mine,), (theirs,) = (list(npgpt.score(["in the"], model)) for model in (ours, plain))
    assert mine.token_ids.tolist() == theirs.token_ids.tolist() == [259, 258]
    np.testing.assert_array_equal(mine.log_probs, theirs.log_probs)
    (guide,) = npgpt.score(["in the"], ours, convention="huggingface")
    assert not np.isnan(guide.log_probs).any()
    (bare,) = npgpt.score(["in the"], ours, end_of_text=False)
    assert np.isnan(bare.log_probs).tolist() == [True, False]
