from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex  # type: ignore[import-untyped]
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from npgpt.checkpoints.places import EMBEDDED_WEIGHTS, GPT2_RANKS
from npgpt.errors import NpgptError, printable
from npgpt.text import vocabularies as tokenizers
from npgpt.text.byte_pairs import byte_characters
from npgpt.text.tokenizer import TextDecoder, Tokenizer, quoted, shown
from tests.support.thorough import examples

GPT2 = tokenizers.from_ranks(GPT2_RANKS, 50257)
AUSTEN = tokenizers.from_ranks(EMBEDDED_WEIGHTS / "austen" / "vocab.tiktoken", 4096)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def test_gpt2_ranks_are_openais() -> None:
    """tiktoken pins this sha256 for r50k_base, which has the same ranks in the same form."""
    digest = hashlib.sha256(GPT2_RANKS.read_bytes()).hexdigest()
    assert digest == "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    assert (len(GPT2.ranks), GPT2.end_of_text, GPT2.n_vocab) == (50256, 50256, 50257)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("hello world", [31373, 995]),  # tiktoken's own test
        ("Hello, world", [15496, 11, 995]),
        ("Hello, my dog is cute", [15496, 11, 616, 3290, 318, 13779]),  # transformers' documentation of GPT-2
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),
        (" \n\n  x", [220, 628, 220, 2124]),
        ("", []),
    ],
)
def test_literal_ids(text: str, ids: list[int]) -> None:
    assert GPT2.encode(text) == ids
    assert GPT2.decode(ids) == text


def test_end_of_text_is_special_only_on_request() -> None:
    assert GPT2.encode("a<|endoftext|>b", special=True) == [64, 50256, 65]
    assert 50256 not in GPT2.encode("a<|endoftext|>b")
    assert GPT2.decode([64, 50256, 65]) == "a<|endoftext|>b"


def test_austen_is_the_first_4095_ranks() -> None:
    assert AUSTEN.ranks == {token: rank for token, rank in GPT2.ranks.items() if rank < 4095}
    assert AUSTEN.end_of_text == 4095


@given(TEXT)
def test_round_trip(text: str) -> None:
    for tokenizer in (GPT2, AUSTEN):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text, special=True)) == text


# OpenAI's own pattern and the algorithm of Sennrich et al. 2016, as gpt-2's src/encoder.py has them.
ORIGINAL = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def textbook_encode(text: str) -> list[int]:
    ids: list[int] = []
    for piece in ORIGINAL.findall(text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while len(parts) > 1:
            ranked = [(GPT2.ranks.get(a + b, 10**9), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
            rank, i = min(ranked)
            if rank == 10**9:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [GPT2.ranks[part] for part in parts]
    return ids


WORDS = st.lists(
    st.sampled_from(["It", "'s", " truth", "  ", "\n\n", "\t", "2026", " naïve", "'LL", "日本", "🙂", "…", "'re"])
)


@given(st.one_of(TEXT, WORDS.map("".join), st.text("aet' 0\n.", max_size=40)))
@settings(max_examples=examples(100, 400))
def test_ids_are_those_of_the_textbook_algorithm(text: str) -> None:
    assert GPT2.encode(text) == textbook_encode(text)


@pytest.mark.parametrize("text", [" " * 200_000, "a" * 200_000, "\n" * 200_000 + "x", " a" * 50_000, "😀" * 50_000])
def test_long_runs_neither_crash_nor_crawl(text: str) -> None:
    assert GPT2.decode(GPT2.encode(text)) == text


def test_a_run_that_tiktoken_gives_up_on() -> None:
    with pytest.raises(NpgptError, match=r"cannot be split into tokens: .* white space"):
        GPT2.encode(" " * 1_500_000 + "x")
    with pytest.raises(NpgptError, match="must be a str, not bytes"):
        GPT2.encode(b"x")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["\ud800", "ab\udcffcd"])
def test_lone_surrogates_are_refused(text: str) -> None:
    with pytest.raises(NpgptError, match=f"lone surrogate U\\+{ord(text.strip('abcd')):04X} at character"):
        GPT2.encode(text)


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("a network call")

    monkeypatch.setattr("socket.socket", refuse)
    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    assert tokenizers.from_ranks(GPT2_RANKS, 50257).encode("hello") == [31373]


def read_back(notation: str) -> bytes:
    """Return a token's bytes from the notation of shown(), with or without printable()'s escapes."""

    def character(found: re.Match[bytes]) -> bytes:
        escape = found[0][1:]
        if escape[:1] == b"x":
            return bytes.fromhex(escape[1:].decode())
        if escape[:1] in b"uU":
            return chr(int(escape[1:], 16)).encode()
        return {b"n": b"\n", b"r": b"\r", b"t": b"\t"}.get(escape, escape)

    return re.sub(rb"\\(x..|u.{4}|U.{8}|.)", character, notation.encode())


@given(st.binary(max_size=12) | TEXT.map(str.encode) | st.text("\\x5c3u0085\x85\xa0n\n'\"").map(str.encode))
def test_the_notation_of_a_token_can_be_read_back(piece: bytes) -> None:
    assert read_back(shown(piece)) == piece
    assert read_back(printable(shown(piece))) == piece
    assert read_back(quoted(piece)[1:-1]) == piece
    assert quoted(piece).isprintable()
    assert json.loads(json.dumps(shown(piece))) == shown(piece)


@pytest.mark.parametrize(
    ("piece", "text", "in_quotes"),
    [
        (b" the", " the", "' the'"),
        (b"\xc3", "\\xc3", "'\\xc3'"),
        (b"\\xc3", "\\\\xc3", "'\\\\xc3'"),
        (" é語".encode(), " é語", "' é語'"),
        (b" \xf0\x9f", " \\xf0\\x9f", "' \\xf0\\x9f'"),
        (b"a\n\\n", "a\n\\\\n", "'a\\n\\\\n'"),
        ("\x85".encode(), "\x85", "'\\u0085'"),
        (b"\x85", "\\x85", "'\\x85'"),
        (b"\x1b[2J", "\x1b[2J", "'\\x1b[2J'"),
        (b"'s", "'s", '"\'s"'),
        (b'"', '"', "'\"'"),
    ],
)
def test_the_notation_of_a_token(piece: bytes, text: str, in_quotes: str) -> None:
    assert (shown(piece), quoted(piece)) == (text, in_quotes)


def test_ids_without_text() -> None:
    for token_id in (50257, 50303):
        with pytest.raises(NpgptError, match=f"token id {token_id} has no text"):
            GPT2.decode([token_id])
    for ids in ([-1], [2**40], [1.0], np.array([64.9]), ["5"], "56", [True]):
        with pytest.raises(NpgptError, match="a token id must be"):
            GPT2.decode(ids)  # type: ignore[arg-type]
    logits = np.zeros(50304)
    GPT2.hide_unused(logits)
    np.testing.assert_array_equal(np.isneginf(logits), np.arange(50304) > 50256)


@given(TEXT)
def test_a_stream_never_shows_half_a_character(text: str) -> None:
    decoder = TextDecoder(AUSTEN)
    pieces = [decoder.feed(token_id) for token_id in AUSTEN.encode(text)]
    assert "".join(pieces) + decoder.flush() == text
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


def test_a_stream_that_breaks_off_within_a_character() -> None:
    decoder = TextDecoder(GPT2)
    head = GPT2.encode("🤯")
    assert len(head) > 1
    assert [decoder.feed(token_id) for token_id in head[:-1]] == [""] * (len(head) - 1)
    assert decoder.flush() == "\ufffd"


# --- vocabularies in a folder ----------------------------------------------------------------------------------------


def small_vocabulary() -> tuple[dict[str, int], list[str]]:
    """Return bytes in Hugging Face's order, four merges and the special token."""
    vocabulary = {character: i for i, character in enumerate(sorted(byte_characters()))}
    merges = ["Ġ t", "h e", "Ġt he", "i n"]
    for merge in merges:
        vocabulary[merge.replace(" ", "")] = len(vocabulary)
    return vocabulary | {"<|endoftext|>": len(vocabulary)}, merges


def put(
    folder: Path, names: tuple[str, str], vocabulary: object, merges: list[str], head: str = "#version: 0.2\n"
) -> None:
    (folder / names[0]).write_text(json.dumps(vocabulary), "utf-8")
    (folder / names[1]).write_text(head + "\n".join(merges) + "\n", "utf-8")


def find(folder: Path, vocab_size: int = 261) -> Tokenizer:
    return tokenizers.open_tokenizer(folder / "model.safetensors", vocab_size)


def reason(folder: Path, vocab_size: int = 261) -> str:
    with pytest.raises(NpgptError) as error:
        tokenizers.open_tokenizer(folder / "model.safetensors", vocab_size)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
@pytest.mark.parametrize("head", ["#version: 0.2\n", ""])
def test_vocabulary_and_merges(tmp_path: Path, names: tuple[str, str], head: str) -> None:
    vocabulary, merges = small_vocabulary()
    put(tmp_path, names, vocabulary, merges, head)
    tokenizer = find(tmp_path)
    ids = tokenizer.encode(" the thing")
    assert ids == [vocabulary[token] for token in ("Ġthe", "Ġt", "h", "in", "g")]
    assert tokenizer.decode(ids) == " the thing"
    assert tokenizer.end_of_text == 260


def test_special_tokens_may_come_first(tmp_path: Path) -> None:
    vocabulary, merges = small_vocabulary()
    shifted = {token: i + 1 for token, i in vocabulary.items() if token != "<|endoftext|>"} | {"<|endoftext|>": 0}
    put(tmp_path, ("vocab.json", "merges.txt"), shifted, merges)
    assert find(tmp_path).end_of_text == 0
    assert find(tmp_path).encode("in<|endoftext|>", special=True) == [shifted["in"], 0]


@pytest.mark.parametrize("pairs", [False, True])
def test_tokenizer_json(tmp_path: Path, pairs: bool) -> None:
    vocabulary, merges = small_vocabulary()
    model = {"type": "BPE", "vocab": vocabulary, "merges": [m.split() for m in merges] if pairs else merges}
    splitter = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    added = [{"id": 260, "content": "<|endoftext|>", "special": True}, {"id": 261, "content": "<pad>", "special": True}]
    whole = {"model": model, "pre_tokenizer": splitter, "added_tokens": added, "normalizer": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    tokenizer = find(tmp_path, 300)
    assert tokenizer.encode(" the") == [vocabulary["Ġthe"]]
    assert dict(tokenizer.special_tokens) == {"<|endoftext|>": 260, "<pad>": 261}
    assert tokenizer.holes.tolist() == []
    whole["added_tokens"] = [*added, {"id": 270, "content": "<far>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    assert "says that '<far>' is 270, but transformers, which numbers added tokens" in reason(tmp_path, 300)
    vocabulary |= {"<pad>": 261, "<far>": 270}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    far = find(tmp_path, 300)
    assert far.holes.tolist() == list(range(262, 270))
    logits = np.zeros(300)
    far.hide_unused(logits)
    assert np.flatnonzero(np.isneginf(logits)).tolist() == [*range(262, 270), *range(271, 300)]
    # not: an array with an entry for each of a hundred million ids that nothing has
    whole["added_tokens"] = [*added, {"id": 10**8, "content": "<far>"}]
    vocabulary["<far>"] = 10**8
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(NpgptError, match=r"has 263 tokens with ids up to 100000000: 99999738 ids are unused"):
        find(tmp_path, 10**8 + 1)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "WordPiece", "vocab": {}}},
        {"model": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
        {"normalizer": {"type": "Lowercase"}},
        {"added_tokens": [{"id": 3}]},
        {"added_tokens": [{"id": 260, "content": 5}]},
        {"added_tokens": [{"id": 10**30, "content": "<x>"}]},
    ],
)
def test_another_kind_of_tokenizer_is_refused_and_gpt2s_not_put_in_its_place(tmp_path: Path, change: Any) -> None:
    vocabulary, merges = small_vocabulary()
    whole: dict[str, Any] = {"model": {"type": "BPE", "vocab": vocabulary, "merges": merges}}
    whole["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole | change))
    assert "tokenizer.json" in reason(tmp_path, 50257)


def test_a_vocabulary_in_the_folder_wins(tmp_path: Path) -> None:
    put(tmp_path, ("vocab.json", "merges.txt"), *small_vocabulary())
    assert find(tmp_path, 50257).n_vocab == 261
    (tmp_path / "vocab.tiktoken").write_bytes((EMBEDDED_WEIGHTS / "austen" / "vocab.tiktoken").read_bytes())
    assert find(tmp_path, 50257).n_vocab == 4096


@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_gpt2s_vocabulary_serves_its_sizes_and_no_other(tmp_path: Path, vocab_size: int) -> None:
    assert find(tmp_path, vocab_size).encode("hello") == [31373]
    assert "its 50256 ids are not GPT-2's 50257" in reason(tmp_path, 50256)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "encoder.json", "vocab.bpe"])
def test_half_a_vocabulary_is_not_replaced_by_gpt2s(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    assert f"has {name}, which alone is not a vocabulary that npgpt reads (vocab.json + merges.txt or" in reason(
        tmp_path, 50257
    )


@pytest.mark.parametrize("name", ["spiece.model", "vocab.txt"])
def test_nor_is_one_of_another_kind(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert f"has {name}, which alone is not a vocabulary that npgpt reads" in reason(tmp_path, 50257)


@pytest.mark.skipif(os.name != "posix", reason="needs links")
def test_nor_is_one_whose_file_is_missing_or_no_file(tmp_path: Path) -> None:
    put(tmp_path, ("vocab.json", "merges.txt"), *small_vocabulary())
    (tmp_path / "merges.txt").unlink()
    (tmp_path / "merges.txt").symlink_to("nowhere")
    assert "merges.txt" in reason(tmp_path, 50257)
    (tmp_path / "vocab.tiktoken").mkdir()
    assert "vocab.tiktoken" in reason(tmp_path, 50257)


def test_merges_cut_short_are_found_out(tmp_path: Path) -> None:
    vocabulary, merges = small_vocabulary()
    for kept in range(len(merges)):
        put(tmp_path, ("vocab.json", "merges.txt"), vocabulary, merges[:kept])
        assert f"has {4 - kept} tokens that no merge makes" in reason(tmp_path)


def test_a_ranks_file_without_room_for_end_of_text(tmp_path: Path) -> None:
    (tmp_path / "vocab.tiktoken").write_bytes(b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)))
    assert find(tmp_path, 256).end_of_text is None
    assert find(tmp_path, 257).end_of_text == 256
    assert "ids up to 255, but the model's vocab_size is 100" in reason(tmp_path, 100)


LINES = GPT2_RANKS.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"".join([*LINES[:300], b"nonsense\n"]), "line 301: not a base64 token and its rank"),
        (b"".join([*LINES[:300], b"@@@@ 300\n"]), "line 301"),
        (b"".join([*LINES[:300], b"aGVsbG8= x\n"]), "line 301"),
        (b"".join([*LINES[:300], LINES[7]]), "line 301: duplicate token"),
        (b"".join([*LINES[:300], b"aGVsbG8= 7\n"]), "without duplicates"),
        (b"".join([*LINES[:300], b"aGVsbG8= -7\n"]), "ranks must be whole numbers from 0"),
        (b"".join([*LINES[:300], b"aGVsbG8= 99999999999999999999\n"]), "ids up to 99999999999999999999"),
        (b"".join(LINES[:200]), "no token for the byte 0x"),
        (b"", "not a byte-level vocabulary|ranks must"),
    ],
)
def test_a_broken_ranks_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "vocab.tiktoken"
    path.write_bytes(content)
    with pytest.raises(NpgptError, match=message):
        tokenizers.from_ranks(path, 50257)


def damaged_pairs() -> list[tuple[Any, list[str], str]]:
    vocabulary, merges = small_vocabulary()
    return [
        ([1, 2], merges, "must be a JSON object"),
        (vocabulary | {"x": "3"}, merges, "ids whole numbers"),
        ({t: i for t, i in vocabulary.items() if i < 260} | {"<\ud800>": 260}, merges, "lone surrogate"),
        (vocabulary | {"": 300}, merges, "tokens that no merge makes"),
        (vocabulary | {"<x>": -1}, merges, "whole numbers from 0"),
        (vocabulary | {"in": 0}, merges, "without duplicates"),
        ({token: i for token, i in vocabulary.items() if token != "Ā"}, merges, "no token for the byte 0x00"),
        (vocabulary, [*merges, "q q"], "merge 'q q'"),
        (vocabulary, merges[::-1], "not in order of ids"),
        (vocabulary, [*merges, "nospace"], "merge 'nospace'"),
    ]


@pytest.mark.parametrize(("vocabulary", "merges", "message"), damaged_pairs())
def test_vocabulary_and_merges_that_do_not_belong_together(
    tmp_path: Path, vocabulary: Any, merges: list[str], message: str
) -> None:
    put(tmp_path, ("vocab.json", "merges.txt"), vocabulary, merges)
    assert message in reason(tmp_path)


def test_files_that_are_not_even_text(tmp_path: Path) -> None:
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "vocab.json").write_bytes(b"{")
    assert "not UTF-8" in reason(tmp_path)
    (tmp_path / "merges.txt").write_bytes(b"")
    assert "not valid JSON" in reason(tmp_path)
    (tmp_path / "vocab.json").write_bytes(b'{"a": 1, "a": 2}')
    assert "duplicate key 'a'" in reason(tmp_path)
