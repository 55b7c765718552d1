"""The ids that begin and end a text: stated, missing and ineffective ones."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import npgpt
from npgpt.checkpoints.ends import GENERATION_FILE, Ends, ends_of, special_ids
from npgpt.checkpoints.tensor import Stated
from npgpt.errors import NpgptError
from npgpt.scoring.texts import convention_of
from npgpt.text.sampling import Sampling
from tests.support import writers
from tests.support.command import here
from tests.support.models import random_arrays, small, store

VOCAB_SIZE = 258
END_OF_TEXT = 256  # of the vocabulary; 257 is a row that stands for no text


def wants(folder: Path, token_id: int, generation: dict[str, Any] | None = None, **ids: Any) -> Path:
    """Store a model that always draws the same id; its vocabulary is bytes, unless it has 40 ids."""
    config = small() if token_id < 40 else small(vocab_size=VOCAB_SIZE)
    arrays = random_arrays(config, dtype="float32")
    arrays["ln_f.weight"][:], arrays["wte.weight"][token_id] = 0, 100 * arrays["ln_f.bias"]
    store(folder, config, **ids)
    npgpt.checkpoints.safetensors.write(folder / "model.safetensors", arrays)
    if token_id >= 40:
        ranks = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
        (folder / "vocab.tiktoken").write_bytes(ranks)
    if generation is not None:
        (folder / GENERATION_FILE).write_text(json.dumps(generation))
    return folder


def drawn(model: npgpt.LanguageModel, **options: Any) -> tuple[int, str | None]:
    """Return the number of ids drawn and the reason for stopping."""
    steps = list(model.steps([1], max_tokens=3, sampling=Sampling(temperature=0), **options))
    return sum(step.token_id is not None for step in steps), steps[-1].finish


# not: a list read as nothing; generation_config.json read after config.json; ids of models without text
@pytest.mark.parametrize(
    ("token_id", "ids", "generation", "ended"),
    [
        (7, {}, None, False),
        (7, {"eos_token_id": 7}, None, True),
        (7, {"eos_token_id": [3, 7]}, None, True),
        (7, {"eos_token_id": 3}, None, False),
        (7, {"eos_token_id": 3}, {"eos_token_id": 7}, True),
        (7, {"eos_token_id": 3}, {"eos_token_id": [9, 7]}, True),
        (7, {"eos_token_id": 7}, {"eos_token_id": 3}, False),
        (7, {"eos_token_id": 7}, {}, False),
        (7, {"eos_token_id": 7}, {"eos_token_id": None}, False),
        (7, {"eos_token_id": [99, 7, -1]}, None, True),
        (END_OF_TEXT, {}, None, True),
        (END_OF_TEXT, {"eos_token_id": None}, None, True),
        (END_OF_TEXT, {"eos_token_id": []}, None, True),
        (END_OF_TEXT, {"eos_token_id": 50256}, None, True),  # GPT2Config's own, where nobody set it
        (END_OF_TEXT, {}, {"do_sample": True}, True),
        (END_OF_TEXT, {"eos_token_id": 65}, None, False),  # another is stated, as in transformers
        (65, {"eos_token_id": 65}, None, True),
        (65, {"eos_token_id": [256, 65]}, None, True),
        (257, {}, {"eos_token_id": 257}, True),  # it stands for no text, and is drawn as an end all the same
        (257, {"eos_token_id": [256, 257]}, None, True),
        (257, {}, None, False),
    ],
)
def test_what_ends_a_text(
    tmp_path: Path, token_id: int, ids: dict[str, Any], generation: dict[str, Any] | None, ended: bool
) -> None:
    model = npgpt.load(wants(tmp_path / "m", token_id, generation, **ids))
    assert bool(model.why_no_text) == (token_id < 40)
    assert drawn(model) == ((0, "end_of_text") if ended else (3, "length"))
    assert drawn(model, ignore_eos=True) == (3, "length")
    # what is written ends alike, in the other two forms
    npgpt.convert(tmp_path / "m", tmp_path / "converted")
    npgpt.save(model, tmp_path / "saved")
    for folder in ("converted", "saved"):
        assert npgpt.load(tmp_path / folder).end_ids == model.end_ids
        assert (tmp_path / folder / GENERATION_FILE).exists() == (generation is not None)


def test_a_converted_model_is_replaced_with_all_its_files(tmp_path: Path) -> None:
    wants(tmp_path / "m", 7, {"eos_token_id": 7})
    for overwrite in (False, True):
        npgpt.convert(tmp_path / "m", tmp_path / "out", overwrite=overwrite)
    assert npgpt.load(tmp_path / "out").end_ids == (7,)


@pytest.mark.parametrize(
    ("ids", "generation", "begin", "in_words"),
    [
        ({}, None, END_OF_TEXT, "<|endoftext|>"),
        ({"bos_token_id": None}, None, END_OF_TEXT, "<|endoftext|>"),
        ({"bos_token_id": 50256}, None, END_OF_TEXT, "<|endoftext|>"),
        ({"bos_token_id": 65}, None, 65, "A"),
        ({"bos_token_id": 10}, None, 10, "\\n"),
        ({"bos_token_id": 65}, {"bos_token_id": 257}, 257, "id 257"),
        ({"bos_token_id": 65}, {}, 65, "A"),
    ],
)
def test_what_a_text_begins_with(
    tmp_path: Path, ids: dict[str, Any], generation: dict[str, Any] | None, begin: int, in_words: str
) -> None:
    folder = wants(tmp_path / "m", 70, generation, **ids)
    model = npgpt.load(folder)
    assert model.begin_ids == (begin,)
    assert convention_of(model, "rolling", None, None, None).before == in_words
    assert model.encode_prompt("") == [begin]
    (found,) = npgpt.score(["ab"], model)
    logits = model([begin])[0, 0].astype(np.float64)
    log_probs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    assert found.log_probs[0] == pytest.approx(log_probs[ord("a")], abs=1e-5)
    (tmp_path / "t.txt").write_text("ab")
    assert f"{in_words} before the text" in here("score", str(tmp_path / "t.txt"), "--model", str(folder))[1]
    assert "nothing before the text" in here("score", str(tmp_path / "t.txt"), "--no-bos", "--model", str(folder))[1]


def test_ids_without_text_begin_with_what_is_stated(tmp_path: Path) -> None:
    folder = wants(tmp_path / "m", 7, None, bos_token_id=4, eos_token_id=7)
    assert npgpt.load(folder).encode_prompt("") == [4]
    code, out, _ = here("generate", "--model", str(folder), "--json")
    report = json.loads(out)
    assert (code, report["prompt_ids"], report["finish"], report["token_ids"]) == (0, [4], "end_of_text", [])
    assert json.loads(here("generate", "--model", str(folder), "--json", "--ignore-eos")[1])["finish"] == "context"
    with pytest.raises(NpgptError, match="has no text"):
        npgpt.load(wants(tmp_path / "n", 7)).encode_prompt("")


@pytest.mark.parametrize("where", ["config.json", GENERATION_FILE])
@pytest.mark.parametrize(
    "wrong", ["x", 5.0, True, [True], [[5]], ["5"], {"a": 5}, [5, None]], ids=lambda wrong: json.dumps(wrong)
)
@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_an_id_that_is_none_is_refused_by_name(tmp_path: Path, where: str, key: str, wrong: object) -> None:
    folder = store(tmp_path / "m", small())
    stated = json.loads((folder / "config.json").read_text()) if where == "config.json" else {}
    (folder / where).write_text(json.dumps(stated | {key: wrong}))
    with pytest.raises(NpgptError, match=rf"{where}: {key} must be a whole number.*, or null, not"):
        npgpt.load(folder)


# not: a list left out of a training checkpoint's configuration, as no plain value
@pytest.mark.parametrize("ends", [[3, 7], (3, 7)])
@pytest.mark.parametrize("is_record", [False, True])
def test_ends_in_a_training_checkpoint(tmp_path: Path, ends: Any, is_record: bool) -> None:
    arrays = random_arrays(small(), dtype="float32")
    stated = {"n_head": 3, "n_embd": 21, "n_layer": 2, "activation_function": "gelu_new", "eos_token_id": ends}
    held = writers.Call(writers.Global("__main__", "GPTConfig"), (), stated) if is_record else stated
    content = writers.torch_zip(arrays, wrap=lambda state: {"model": state, "config": held})
    (tmp_path / "ckpt.pt").write_bytes(content)
    assert npgpt.load(tmp_path / "ckpt.pt").ends.eos == (3, 7)
    npgpt.convert(tmp_path / "ckpt.pt", tmp_path / "out")
    assert npgpt.load(tmp_path / "out").ends.eos == (3, 7)


def test_a_text_begins_with_one_id(tmp_path: Path) -> None:
    with pytest.raises(NpgptError, match="bos_token_id must be a whole number, or null, not"):
        npgpt.load(store(tmp_path / "m", small(), bos_token_id=[1, 2]))


def test_a_broken_generation_config_is_told(tmp_path: Path) -> None:
    folder = store(tmp_path / "m", small())
    (folder / GENERATION_FILE).write_text("{")
    with pytest.raises(NpgptError, match=r"generation_config\.json is not valid JSON"):
        npgpt.load(folder)
    (folder / GENERATION_FILE).unlink()
    (folder / GENERATION_FILE).mkdir()
    with pytest.raises(NpgptError, match=r"generation_config\.json is not a regular file"):
        npgpt.load(folder)


def test_what_is_not_used_is_said(tmp_path: Path) -> None:
    sets = {
        "temperature": 0.7,
        "top_k": 50,
        "do_sample": True,
        "repetition_penalty": 1.3,
        "use_cache": False,
        "x": 2,
    }
    folder = wants(tmp_path / "m", 7, sets | {"eos_token_id": [99, 5]}, eos_token_id=7)
    file = folder / GENERATION_FILE
    expected = [
        f"{file} states eos_token_id 99, but the model has only 40 ids",
        f"{file} sets temperature 0.7, repetition_penalty 1.3, x 2: ignored in favour of npgpt's arguments",
    ]
    assert list(npgpt.load(folder).ends.notes) == expected
    code, _, error = here("generate", "--ids", "1", "--model", str(folder), "--max-tokens", "1")
    assert (code, error.splitlines()) == (0, [f"npgpt: {text}" for text in expected])
    for out in (here("inspect", str(folder))[1], here("convert", str(folder), str(tmp_path / "out"))[1]):
        said = [line for line in out.splitlines() if "not used" in line]
        assert [line.endswith(text) for line, text in zip(said, expected, strict=True)] == [True, True]
    file.write_text("{}")
    assert npgpt.load(folder).ends.notes == (f"{file} states no eos_token_id: 7 from the configuration is ignored",)
    # transformers obeys config.json where there is no other file, in which old versions wrote every default
    old = store(tmp_path / "old", small(), top_k=50, num_beams=1, max_length=20, temperature=0.5, use_cache=True)
    assert [text.split(" sets ")[1] for text in npgpt.load(old).ends.notes] == [
        "temperature 0.5: ignored in favour of npgpt's arguments"
    ]


def test_inspect_shows_both(tmp_path: Path) -> None:
    folder = wants(tmp_path / "m", 65, {"eos_token_id": [256, 65, 257]})
    out = here("inspect", str(folder))[1]
    assert f"text ends       256 '<|endoftext|>', 65 'A', 257 ({folder}/generation_config.json)" in out
    assert f"text begins     256 '<|endoftext|>' ({folder}/vocab.tiktoken)" in out
    assert "text ends       at no id" in here("inspect", str(wants(tmp_path / "n", 7)))[1]


def test_a_model_made_in_python_has_ends_too(tmp_path: Path) -> None:
    stored = npgpt.load(wants(tmp_path / "m", 7))
    model = npgpt.LanguageModel("mine", stored.config, stored.parameters, ends=Ends(eos=(3, 7), bos=1, pad=0))
    assert drawn(model) == (0, "end_of_text")
    npgpt.save(model, tmp_path / "saved")
    stated = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert [stated[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")] == [1, [3, 7], 0]
    assert npgpt.load(tmp_path / "saved").end_ids == (3, 7)


def test_ends_that_were_replaced_in_python_are_saved(tmp_path: Path) -> None:
    written = '{"eos_token_id": [99, 5], "temperature": 0.5}'
    folder = wants(tmp_path / "m", 7, json.loads(written), eos_token_id=7, pad_token_id=3)
    (folder / GENERATION_FILE).write_text(written)
    model = npgpt.load(folder)
    npgpt.save(model, tmp_path / "same")
    assert (tmp_path / "same" / GENERATION_FILE).read_text() == written
    for number, ends in enumerate((Ends(eos=(7,)), Ends(eos=(7, 8), bos=2), Ends())):
        npgpt.save(replace(model, ends=ends), tmp_path / f"other{number}")
        again = npgpt.load(tmp_path / f"other{number}")
        assert (again.end_ids, again.begin_ids) == (ends.eos, () if ends.bos is None else (ends.bos,))
        kept = json.loads((tmp_path / f"other{number}" / GENERATION_FILE).read_text())
        assert kept == {"temperature": 0.5} | ends.stated()


IDS = st.none() | st.integers(-2, 45) | st.lists(st.integers(-2, 45), max_size=4)


@given(IDS, IDS | st.just("no file"), st.none() | st.integers(0, 39))
def test_ends_by_definition(configured: Any, generated: Any, end_of_text: int | None) -> None:
    """The ends are the deciding file's ids that the model has, without duplicates, or else the vocabulary's."""
    statement = Stated("config.json", {"eos_token_id": configured})
    generation = None if generated == "no file" else Stated(GENERATION_FILE, {"eos_token_id": generated})
    found = ends_of([statement], special_ids(statement.fields, "config.json"), generation, 40)
    decides = configured if generated == "no file" else generated
    listed = [] if decides is None else decides if isinstance(decides, list) else [decides]
    usable = [token_id for token_id in dict.fromkeys(listed) if 0 <= token_id < 40]
    assert list(found.eos) == usable
    assert list(found.completed(end_of_text).eos) == (usable or ([] if end_of_text is None else [end_of_text]))
    said = [note.split("eos_token_id ")[1].split(", but")[0] for note in found.notes if "has only" in note]
    absent = [token_id for token_id in dict.fromkeys(listed) if token_id not in usable]
    assert said == ([", ".join(map(str, absent))] if absent else [])
    assert bool(found.notes) == (len(set(listed)) > len(usable) or (not listed and configured not in (None, [])))
