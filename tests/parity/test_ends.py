"""Begin-of-text and end-of-text ids, compared with transformers' generate."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

import npgpt
from npgpt.text.sampling import Sampling
from tests.support.models import small, store
from tests.support.verification import Report

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="extra parity is not installed")
transformers = pytest.importorskip("transformers", reason="extra parity is not installed")

PENALTY = 5.0  # so that successive greedy ids differ
IDS: tuple[Any, ...] = (None, 11, [28], [5, 17, 28], [99, 11], "no key")
PROMPT = [1, 2, 3]
LENGTH = 16


def greedy(folder: Path) -> tuple[Any, list[int]]:
    """Return transformers' model and its greedy continuation."""
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64)
    options = {"do_sample": False, "max_new_tokens": LENGTH, "repetition_penalty": PENALTY, "pad_token_id": 0}
    return model, model.generate(torch.tensor([PROMPT]), **options)[0].tolist()[len(PROMPT) :]


def stated(ids: Any) -> dict[str, Any]:
    return {} if ids == "no key" else {"eos_token_id": ids}


def test_greedy_ids_end_where_transformers_end(tmp_path: Path, difference: Report) -> None:
    transformers.logging.set_verbosity_error()
    ended = 0
    for number, (configured, generated) in enumerate(itertools.product(IDS, (*IDS, "no file"))):
        folder = store(tmp_path / f"m{number}", small(), **stated(configured))
        if generated != "no file":
            (folder / "generation_config.json").write_text(json.dumps(stated(generated)))
        model = npgpt.load(folder, dtype="float64")
        npgpt.save(npgpt.load(folder), tmp_path / f"saved{number}")
        npgpt.convert(folder, tmp_path / f"converted{number}")
        for place in [folder, tmp_path / f"saved{number}", tmp_path / f"converted{number}"][
            : 3 if number % 7 == 0 else 1
        ]:
            theirs, ids = greedy(place)
            ends = theirs.generation_config.eos_token_id
            ends = [ends] if isinstance(ends, int) else ends or []
            assert list(model.end_ids) == [end for end in ends if end < 40], (configured, generated)
            sampling = Sampling(temperature=0, repetition_penalty=PENALTY)
            steps = list(model.steps(PROMPT, max_tokens=LENGTH, sampling=sampling))
            mine = [step.token_id for step in steps if step.token_id is not None]
            finished = ids[-1] in ends
            assert mine == (ids[:-1] if finished else ids), (configured, generated)
            assert steps[-1].finish == ("end_of_text" if finished else "length")
            ended += finished
    assert ended > 15
    difference("text", "transformers: where greedy text ends, under every way to state it", "ids", 0)


def test_no_prompt_begins_where_transformers_begin(tmp_path: Path) -> None:
    for number, (configured, generated) in enumerate([(4, None), (4, 6), (None, 6)]):
        folder = store(tmp_path / f"m{number}", small(), bos_token_id=configured)
        if generated is not None:
            (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": generated}))
        theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).generate(max_new_tokens=1, do_sample=False)
        assert npgpt.load(folder).encode_prompt("") == [theirs[0, 0].item()]


def test_settings_that_are_said_are_those_that_change_what_transformers_writes(tmp_path: Path) -> None:
    """A setting that is not mentioned in a note leaves transformers' greedy ids unchanged."""
    base = greedy(store(tmp_path / "base", small()))[1]
    silent: dict[str, Any] = {"top_k": 50, "temperature": 1.0, "num_beams": 1, "use_cache": False, "max_length": 20}
    for key, value in silent.items():
        folder = store(tmp_path / key, small())
        (folder / "generation_config.json").write_text(json.dumps({key: value}))
        assert greedy(folder)[1] == base
        assert npgpt.load(folder).ends.notes == ()
    said: dict[str, Any] = {"no_repeat_ngram_size": 1, "suppress_tokens": base[:1], "bad_words_ids": [base[:1]]}
    for key, value in said.items():
        folder = store(tmp_path / key, small())
        (folder / "generation_config.json").write_text(json.dumps({key: value}))
        assert key == "no_repeat_ngram_size" or greedy(folder)[1] != base
        assert f"sets {key} " in npgpt.load(folder).ends.notes[0]
