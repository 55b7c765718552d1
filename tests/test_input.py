"""Input texts: byte order marks, other encodings, ids, special tokens, and options that are switched off."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import npgpt
from npgpt.cli.options import read_ids
from npgpt.errors import NpgptError
from npgpt.text.sampling import Sampling, adjusted
from tests.support.command import here, refused
from tests.support.models import random_parameters, small, store

AUSTEN = npgpt.load()
TEXT = "Emma was happy, naïve and 24."
DROPPED = "begins with a byte order mark, which is dropped"


# not: the mark dropped from files alone, or twice
@pytest.mark.parametrize("arguments", [["tokens", "-"], ["trace", "-", "-o", "t.npz"], ["attend", "-"]])
def test_a_byte_order_mark_is_dropped_and_said(tmp_path: Path, arguments: list[str]) -> None:
    code, out, error = here(*arguments, stdin=codecs.BOM_UTF8 + b"Emma", cwd=tmp_path)
    assert (code, f"npgpt: standard input {DROPPED}" in error) == (0, True)
    (tmp_path / "t.npz").unlink(missing_ok=True)
    assert here(*arguments, stdin=b"Emma", cwd=tmp_path)[1] == out


def test_generate_says_it_with_v(tmp_path: Path) -> None:
    arguments = ["generate", "-", "--temperature", "0", "--max-tokens", "3", "--json"]
    for more, said in (([], False), (["-v"], True)):
        code, out, error = here(*arguments, *more, stdin=codecs.BOM_UTF8 + b"Emma")
        assert (code, json.loads(out)["prompt"], DROPPED in error) == (0, "Emma", said)
    assert json.loads(here(*arguments, stdin=2 * codecs.BOM_UTF8)[1])["prompt"] == "\ufeff"  # one is the mark


def test_score_and_check_say_it(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(codecs.BOM_UTF8 + TEXT.encode())
    (tmp_path / "plain.txt").write_bytes(TEXT.encode())
    scores = [json.loads(here("score", name, "--json", cwd=tmp_path)[1]) for name in ("t.txt", "plain.txt")]
    assert {**scores[0], "text": ""} == {**scores[1], "text": ""}
    assert f"npgpt: t.txt {DROPPED}" in here("score", "t.txt", cwd=tmp_path)[2]
    assert "is empty" in refused("score", "-", "--json", stdin=b"")


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ("utf-16", "UTF-16"),
        ("utf-32", "UTF-32"),
        ("utf-16-le", "UTF-16LE"),
        ("utf-16-be", "UTF-16BE"),
        ("utf-32-le", "UTF-32LE"),
        ("utf-32-be", "UTF-32BE"),
    ],
)
def test_other_encodings_are_named(tmp_path: Path, encoding: str, name: str) -> None:
    content = "Emma was happy.\n".encode(encoding)
    (tmp_path / "t.txt").write_bytes(content)
    way_out = f"is {name}, but npgpt reads UTF-8: convert it with iconv -f {name} -t UTF-8"
    assert f"t.txt {way_out}" in refused("score", "t.txt", cwd=tmp_path)
    assert f"standard input {way_out}" in refused("generate", "-", stdin=content)
    if "-" not in encoding[4:]:
        other = codecs.BOM_UTF16_BE if name == "UTF-16" else codecs.BOM_UTF32_BE
        assert name in refused("generate", "-", stdin=other + "日".encode(f"{encoding}-be"))


def test_a_configuration_in_another_encoding_is_named(tmp_path: Path) -> None:
    folder = store(tmp_path / "m", small())
    stated = (folder / "config.json").read_text()
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_text(stated, encoding="utf-16")
        with pytest.raises(NpgptError, match=rf"{name} is UTF-16, but npgpt reads UTF-8"):
            npgpt.load(folder)
        (folder / name).write_text(stated)


@pytest.mark.parametrize("text", ["a\0b", "\0\0\0\0", "ab\0", "a\0", "日本"])
def test_a_zero_byte_alone_is_no_other_encoding(text: str) -> None:
    code, out, _ = here("generate", "-", "--max-tokens", "0", "--json", stdin=text.encode())
    assert (code, json.loads(out)["prompt"]) == (0, text)


def test_an_error_counts_the_mark() -> None:
    assert "byte 0xFF at 4" in refused("generate", "-", stdin=codecs.BOM_UTF8 + b"a\xff")


# --- ids ---


@given(st.lists(st.integers(0, 4094), min_size=1, max_size=300))
def test_ids_are_scored_as_their_text(ids: list[int]) -> None:
    """This includes ids that no text encodes to, such as half a character or two tokens instead of one."""
    (found,) = npgpt.score([ids], AUSTEN)
    assert found.token_ids.tolist() == ids
    assert b"".join(found.pieces) == b"".join(AUSTEN.tokenizer.piece(one) for one in ids)
    text = AUSTEN.tokenizer.decode(ids)
    assert found.totals.bytes == sum(map(len, found.pieces))
    if AUSTEN.tokenizer.encode(text) == ids:
        (same,) = npgpt.score([text], AUSTEN)
        np.testing.assert_array_equal(same.log_probs, found.log_probs)
        assert same.totals == found.totals


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda ids: np.array(ids, np.uint16)])
def test_ids_of_any_kind(kind: Any) -> None:
    ids = AUSTEN.tokenizer.encode(TEXT)
    mixed = list(npgpt.score([TEXT, kind(ids)], AUSTEN))
    np.testing.assert_allclose(mixed[0].log_probs, mixed[1].log_probs, atol=1e-5)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([[1.0, 2.0]], "text 0 must be integers .of 64 bits at most., not float64"),
        ([[True, 2]], "text 0 must be integers .of 64 bits at most., not bool"),
        ([[-1]], "token id -1 at position .0. is out of range"),
        ([[1, 4096]], "token id 4096 at position .1. is out of range"),
        (
            [[[1, 2]]],
            r"text 0 must be a text or ids .T., not an array of shape .1, 2.*; for one text of ids, pass .ids.",
        ),
        ([1, 2], r"text 0 must be a text or ids .T., not an array of shape \[\]"),
        ([b"ab"], "text 0 must be integers"),
        ([[]], "text 0 is empty"),
        ([np.ma.masked_array([1, 2], [False, True])], "not a masked array"),
    ],
)
def test_ids_that_are_none(texts: Any, message: str) -> None:
    with pytest.raises(NpgptError, match=message):
        list(npgpt.score(texts, AUSTEN))


def test_score_ids(tmp_path: Path, bare: Path) -> None:
    ids = ",".join(map(str, AUSTEN.tokenizer.encode(TEXT)))
    (tmp_path / "t.txt").write_text(TEXT)
    by_text = json.loads(here("score", "t.txt", "--json", cwd=tmp_path)[1])
    by_ids = json.loads(here("score", "--ids", ids, "--json", cwd=tmp_path)[1])
    assert by_ids.pop("text") == "--ids"
    assert by_ids.pop("sha256") != by_text.pop("sha256")
    assert by_text.pop("text") == "t.txt"
    assert by_ids == by_text
    assert "--ids: 14 tokens" in here("score", "--ids", ids, cwd=tmp_path)[1]
    assert here("score", "--ids", ids, "--resume", "r.jsonl", cwd=tmp_path)[0] == 0
    assert "1 of 1 texts are in r.jsonl already" in here("score", "--ids", ids, "--resume", "r.jsonl", cwd=tmp_path)[2]
    assert "not both" in refused("score", "t.txt", "--ids", ids, cwd=tmp_path)
    assert "must be whole numbers between commas" in refused("check", "x", "--ids", "1_0")
    for wrong in ("", "1,,2", "1_0", "a", "1.5", "1 2", "１", "9" * 5000):
        assert "--ids takes whole numbers with commas" in refused("score", "--ids", wrong)
    assert read_ids(" 1, 2 ,3") == [1, 2, 3]


def test_score_ids_of_a_model_without_text(tmp_path: Path, bare: Path) -> None:
    model = npgpt.load(bare)
    (found,) = npgpt.score([[1, 2, 3]], model, end_of_text=False, top=2)
    logits = model([1, 2, 3])[0].astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(found.log_probs[1:], log_probs[[0, 1], [2, 3]], atol=1e-5)
    assert (found.pieces, found.totals.bytes, found.totals.words) == ((b"",) * 3, 0, 0)
    arguments = ["score", "--ids", "1,2,3", "--model", str(bare)]
    error = refused(*arguments)
    assert "has no text (" in error
    assert "and so no <|endoftext|> to put before a text: use end_of_text=False or --no-bos" in error
    code, out, _ = here(*arguments, "--no-bos", "--top", "2")
    assert code == 0
    assert "id 2" in out
    assert "bits per byte            no text" in out
    tinted = here(*arguments, "--no-bos", terminal=True, TERM="xterm", NO_COLOR="")[1].splitlines()[0]
    assert re.sub(r"\x1b\[[0-9;]*m", "", tinted) == "1 2 3 "
    record = json.loads(here(*arguments, "--no-bos", "--json")[1])
    assert (record["token_ids"], record["pieces"], record["bits_per_byte"]) == ([1, 2, 3], ["", "", ""], None)
    page = tmp_path / "page.html"
    assert here(*arguments, "--no-bos", "--html", str(page))[0] == 0
    assert '"ids": [1, 2, 3]' in page.read_text()


# --- special, and off ---


def test_special_tokens_in_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    steps = npgpt.LanguageModel.steps

    def watch(model: npgpt.LanguageModel, ids: Any, **options: Any) -> Any:
        seen.append(list(ids))
        return steps(model, ids, **options)

    monkeypatch.setattr(npgpt.LanguageModel, "steps", watch)
    for special in (False, True):
        "".join(AUSTEN.generate("<|endoftext|>Emma", max_tokens=0, special=special))
    assert seen[1][0] == 4095
    assert seen == [AUSTEN.tokenizer.encode("<|endoftext|>Emma", special=special) for special in (False, True)]


@pytest.mark.parametrize(
    ("off", "same"),
    [
        ({"temperature": None}, {"temperature": 1.0}),
        ({"top_k": None}, {}),
        ({"top_k": 0}, {}),
        ({"top_p": None}, {"top_p": 1.0}),
        ({"min_p": None}, {"min_p": 0.0}),
        ({"repetition_penalty": None}, {"repetition_penalty": 1.0}),
        ({"stop": None}, {"stop": ()}),
        ({"temperature": np.float32(0.5)}, {"temperature": 0.5}),
    ],
)
def test_none_switches_off(off: dict[str, Any], same: dict[str, Any]) -> None:
    def text(**options: Any) -> str:
        return "".join(AUSTEN.generate("It is", max_tokens=8, seed=4, **options))

    assert text(**off) == text(**same)


def test_none_is_no_limit_but_the_context() -> None:
    steps = list(AUSTEN.steps([1] * 254, max_tokens=None, sampling=Sampling(), seed=1, ignore_eos=True))
    assert (len(steps), steps[-1].finish) == (4, "context")
    model = npgpt.LanguageModel("m", small(), random_parameters(small()), lambda: AUSTEN.tokenizer)
    assert "".join(model.generate([1] * 30, max_tokens=None, keep_last=True, seed=1))


def test_top_k_0_on_the_command_line() -> None:
    arguments = ["generate", "Emma", "--seed", "1", "--max-tokens", "8"]
    assert here(*arguments, "--top-k", "0") == here(*arguments)


def test_off_leaves_the_logits_alone() -> None:
    logits = np.array([1.0, -2.0, 3.0])
    off = Sampling(temperature=None, top_k=0, top_p=None, min_p=None, repetition_penalty=None)
    np.testing.assert_array_equal(adjusted(logits, off), logits - 3)
