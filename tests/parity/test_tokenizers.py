"""Tokenization compared with transformers: every setting of a tokenizer's folder, and random folders."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from npgpt.errors import NpgptError
from npgpt.text.tokenizer import TextDecoder
from npgpt.text.vocabularies import open_tokenizer
from tests.support.tokenizer_folders import (
    N_RANKS,
    USER,
    VOCAB_SIZE,
    Case,
    Files,
    added,
    cases,
    config,
    fast,
    pair,
    whole,
)
from tests.support.tokenizer_table import differences, outcome, texts, write
from tests.support.verification import Report

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers", reason="extra parity is not installed")
CASES = list(cases())
FEW = texts(40)


def test_no_setting_is_passed_over(difference: Report) -> None:
    wrong: list[Any] = []
    for case in CASES:
        found = outcome(case, FEW)
        if found.silent or case.honoured == bool(found.reason):
            wrong.append((case.file, case.setting, found))
    assert not wrong
    difference("text", "transformers: token ids under every setting of a tokenizer's folder", "ids", 0)


def test_the_table_has_every_setting() -> None:
    table = (Path(__file__).parent / "TOKENIZERS.md").read_text("utf-8").splitlines()
    rows = [f"| {case.file} | {case.setting.replace('|', chr(92) + '|')} | {done} | 0 |" for case, done in said()]
    assert table[-len(rows) :] == rows


def said() -> list[tuple[Case, str]]:
    return [(case, "honoured" if case.honoured else "refused") for case in CASES]


CONTENTS = [
    "<|user|>",
    "user",
    "us er",
    "<|us",
    "er|>",
    " user",
    "User",
    "é",
    "e\u0301",
    "\n",
    "  ",
    "the",
    "Ġthe",
    "[P]",
    "日",
]


def random_folder(generator: random.Random) -> Files:
    """Return added tokens with random texts and flags, in one or two of the files that may define them."""
    names = generator.sample(CONTENTS, generator.randrange(1, 6))
    flags = [
        {flag: generator.random() < 0.4 for flag in ("special", "lstrip", "rstrip", "single_word", "normalized")}
        for _ in names
    ]
    numbered = {str(USER + n): added(name, **f) for n, (name, f) in enumerate(zip(names, flags, strict=True))}
    files = whole() if generator.random() < 0.5 else pair()
    kind = (
        {"tokenizer_class": "PreTrainedTokenizerFast"} if "tokenizer.json" in files and generator.random() < 0.5 else {}
    )
    if generator.random() < 0.3 and kind:
        files["tokenizer.json"]["normalizer"] = generator.choice(
            [{"type": "NFC"}, {"type": "Lowercase"}, {"type": "NFKD"}]
        )
    keys: dict[str, Any] = dict(zip(("pad_token", "bos_token", "x_token"), names, strict=False))
    keys = {key: name for key, name in keys.items() if generator.random() < 0.3}
    if "tokenizer.json" not in files:
        keys |= {
            key: True for key in ("add_bos_token", "add_eos_token", "add_prefix_space") if generator.random() < 0.2
        }
    where = generator.randrange(4)
    if where in (0, 3) and "tokenizer.json" in files:
        tokens = [{"id": int(number)} | token for number, token in numbered.items()]
        files["tokenizer.json"]["added_tokens"] += tokens
        if where == 0:
            return files | config(**kind, **keys)
    if where == 1:
        files["added_tokens.json"] = {token["content"]: int(number) for number, token in numbered.items()}
        named = {key: name for key, name in keys.items() if isinstance(name, str)}
        return files | config(**kind) | {"special_tokens_map.json": named}
    end = {str(N_RANKS): added("<|endoftext|>")}
    return files | config(**kind, **keys, added_tokens_decoder=end | numbered)


def cuts(theirs: Any, text: str) -> bool:
    """Return whether tokenizers splits a text; if two tokens claim the same white space it panics, not an Exception."""
    try:
        return bool(theirs(text))
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return False


def test_folders_at_random(tmp_path: Path) -> None:
    """A folder is either refused or gives transformers' ids, and most are accepted."""
    transformers.logging.set_verbosity_error()
    accepted = 0
    for seed in range(100):
        generator = random.Random(seed)
        files = random_folder(generator)
        place = tmp_path / str(seed)
        place.mkdir()
        write(place, files)
        some = [
            "".join(generator.choices([*CONTENTS, "a", "s", "  ", "\t", "_", "<", "\xa0"], k=12)) for _ in range(12)
        ]
        try:
            ours = open_tokenizer(place / "model.safetensors", VOCAB_SIZE)
        except NpgptError:
            continue
        accepted += 1
        theirs = transformers.AutoTokenizer.from_pretrained(place)
        some = [text for text in some if cuts(theirs, text)]
        assert not differences(ours, theirs, some), json.dumps(files.get("tokenizer_config.json"))
        if "tokenizer.json" not in files or not files["tokenizer.json"]["normalizer"]:
            plain = [text for text in some if "é" not in text]  # tokenizers' decoder takes an added é for a byte
            for ids in (ours.encode(text, special=True, alone=True) for text in plain):
                decoder = TextDecoder(ours)
                assert "".join([*map(decoder.feed, ids), decoder.flush()]) == ours.decode(ids)
    assert accepted > 40


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.honoured and "model " in case.setting], ids=lambda case: case.setting
)
def test_the_text_of_other_models(tmp_path: Path, case: Case) -> None:
    """The package tokenizers decodes a whole text to what npgpt yields in pieces."""
    write(tmp_path, case.files)
    ours = open_tokenizer(tmp_path / "model.safetensors", VOCAB_SIZE)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the user in the text", "user, the 42 in", "in"):
        ids = ours.encode(text)
        decoder = TextDecoder(ours)
        assert "".join([*map(decoder.feed, ids), decoder.flush()]) == ours.decode(ids) == theirs.decode(ids)


def test_what_the_package_does_not_take_is_one_line(tmp_path: Path) -> None:
    """A panic of the package, which is not an Exception, gives one line as well."""
    write(tmp_path, whole({"vocab": {"a": 0}, "merges": ["a a"]}) | fast())
    with pytest.raises(NpgptError, match=r"tokenizer\.json is rejected by tokenizers"):
        open_tokenizer(tmp_path / "model.safetensors", VOCAB_SIZE)
    overlapping = [added("<x>", USER, rstrip=True), added(" ", USER + 1, lstrip=True)]
    end = added("<|endoftext|>", N_RANKS)
    write(tmp_path, whole(added_tokens=[end, *overlapping], normalizer={"type": "NFC"}) | fast())
    tokenizer = open_tokenizer(tmp_path / "model.safetensors", VOCAB_SIZE)
    with pytest.raises(NpgptError, match=r"cannot split the text into tokens with .*bad split"):
        tokenizer.encode("<x>  a", special=True)
