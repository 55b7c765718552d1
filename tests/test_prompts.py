"""Prompts of unequal length, continued side by side, give what each gives alone."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npgpt
from npgpt.cache import KVCache, side_by_side
from npgpt.errors import NpgptError
from npgpt.language_model import LanguageModel
from npgpt.model import attention_scores, forward
from npgpt.text import generation
from npgpt.text.generation import Step
from npgpt.text.sampling import Sampling
from tests.support.austen import AUSTEN
from tests.support.command import here, refused
from tests.support.models import SHAPES, random_ids, random_parameters, small, store
from tests.support.thorough import examples
from tests.support.vocabularies import put, small_pair

GREEDY = Sampling(temperature=0)
AUSTEN_64 = npgpt.load(dtype="float64")
TEXTS = ["It is a truth universally acknowledged", "Emma", "She was not so very well", " and" * 30]


def by_prompt(steps: Iterable[Step], count: int) -> list[list[Step]]:
    """Return each prompt's steps, numbered as generate() does."""
    steps = list(steps)
    return [[step._replace(sample=0) for step in steps if step.sample == number] for number in range(count)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_padded_row_gives_what_it_gives_alone(shape: str) -> None:
    """The logits and recorded stages agree at every token, for a whole batch and token by token, without warnings."""
    config = SHAPES[shape]
    parameters, padding = random_parameters(config), [3, 0, 7]
    ids = random_ids(config, (3, 12))
    cache = KVCache(config, 3, 14, "float64", padding)
    seen: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = forward(parameters, config, ids[:, :9], cache, seen.__setitem__)
        rest = [forward(parameters, config, ids[:, at : at + 1], cache) for at in range(9, 12)]
    logits = np.concatenate([first, *rest], axis=1)
    assert np.isfinite(logits).all()
    assert seen["wpe"].shape == (3, 9, config.n_embd)
    for row, empty in enumerate(padding):
        alone: dict[str, Any] = {}
        expected = forward(parameters, config, ids[row, empty:])
        forward(parameters, config, ids[row, empty:9], record=alone.__setitem__)
        np.testing.assert_allclose(logits[row, empty:], expected[0], rtol=0, atol=1e-12)
        for name, stage in alone.items():
            mine = seen[name][row, ..., empty:, :]
            if name.endswith(("attn.scores", "attn.weights")):
                mine = mine[..., empty:]
            np.testing.assert_allclose(mine, stage if name == "wpe" else stage[0], rtol=0, atol=1e-12)
        assert not seen["h.0.attn.weights"][row, :, empty:, :empty].any()


def test_many_queries_are_padded_too() -> None:
    """There are enough queries for the tiles to be used otherwise."""
    config = small(n_positions=100)
    parameters, ids = random_parameters(config), random_ids(config, (2, 90))
    logits = forward(parameters, config, ids, KVCache(config, 2, 90, "float64", [0, 15]))
    for row, empty in enumerate([0, 15]):
        expected = forward(parameters, config, ids[row, empty:])[0]
        np.testing.assert_allclose(logits[row, empty:], expected, rtol=0, atol=1e-12)


def test_what_is_hidden_literally() -> None:
    q = np.ones((2, 1, 3, 1))
    scores = attention_scores(q, q, 1.0, np.array([1, 0]).reshape(2, 1, 1, 1))
    hidden = -np.inf
    assert scores[0, 0].tolist() == [[1, hidden, hidden], [hidden, 1, hidden], [hidden, 1, 1]]
    assert scores[1, 0].tolist() == attention_scores(q, q, 1.0)[0, 0].tolist()
    assert scores[1, 0].tolist() == [[1, hidden, hidden], [1, 1, hidden], [1, 1, 1]]


def test_rows_of_a_padded_cache_lose_what_is_padding_in_all() -> None:
    config = small()
    parameters, ids = random_parameters(config), random_ids(config, (3, 8))
    cache = KVCache(config, 3, 12, "float64", [0, 2, 5])
    forward(parameters, config, ids, cache)
    new = cache.rows([2, 1, 2])
    assert (new.length, np.ravel(new.padding).tolist()) == (6, [3, 0, 3])
    assert (cache.length, np.ravel(cache.padding).tolist()) == (8, [0, 2, 5])
    single = cache.rows([2])
    assert (single.length, single.padding) == (3, 0)
    logits = forward(parameters, config, [[4]], single)[0, -1]
    np.testing.assert_allclose(logits, forward(parameters, config, [*ids[2, 5:], 4])[0, -1], rtol=0, atol=1e-12)


def test_caches_side_by_side_end_together() -> None:
    config = small()
    parameters = random_parameters(config)
    prompts = [random_ids(config, (n,), n) for n in (4, 1, 6)]
    caches = [KVCache(config, 1, len(prompt), "float64") for prompt in prompts]
    for prompt, cache in zip(prompts, caches, strict=True):
        forward(parameters, config, prompt, cache)
    joined = side_by_side(config, caches, 10)
    assert (joined.length, joined.capacity, np.ravel(joined.padding).tolist()) == (6, 10, [2, 5, 0])
    logits = forward(parameters, config, [[1], [2], [3]], joined)
    for row, prompt in enumerate(prompts):
        expected = forward(parameters, config, [*prompt, row + 1])[0, -1]
        np.testing.assert_allclose(logits[row, -1], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("padding", "message"),
    [
        (5, "padding must be whole numbers in a list, not 5"),
        (None, "padding must be whole numbers in a list, not None"),
        ("ab", "a row's padding .* must be a whole number, not 'a'"),
        ([[1], [2]], r"a row's padding .* must be a whole number, not \[1\]"),
        ([1], "padding must have one number for each of the cache's 2 rows, not 1 numbers"),
        ([0, 5], "a row's padding .* at most 4, not 5"),
        ([-1, 0], "a row's padding .* at least 0, not -1"),
        ([0, 1.5], "a row's padding .* must be a whole number, not 1.5"),
    ],
)
def test_padding_that_cannot_be(padding: Any, message: str) -> None:
    with pytest.raises(NpgptError, match=message):
        KVCache(small(), 2, 5, padding=padding)


@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=6),
    max_tokens=st.integers(0, 30),
    seed=st.integers(0, 2**64 - 6),
    temperature=st.sampled_from([0, 1.5]),
    rows=st.integers(1, 6),
    room=st.sampled_from([1, 20_000, 2**30]),
)
@settings(max_examples=examples(15, 60))
def test_each_prompt_is_continued_as_if_alone(
    lengths: list[int], max_tokens: int, seed: int, temperature: float, rows: int, room: int
) -> None:
    """With 24 positions, contexts fill at different times, in batches of any size."""
    config = small()
    parameters = random_parameters(config)
    prompts = [random_ids(config, (length,), number) for number, length in enumerate(lengths)]
    sampling = Sampling(temperature=temperature, repetition_penalty=1.3)
    options: dict[str, Any] = {"max_tokens": max_tokens, "sampling": sampling}
    expected = [
        list(generation.generate(parameters, config, prompt, seed=seed + number, **options))
        for number, prompt in enumerate(prompts)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "ROWS", rows)
        patch.setattr(generation, "ROWS_BYTES", room)
        steps = generation.generate_many(parameters, config, prompts, seed=seed, **options)
        assert by_prompt(steps, len(prompts)) == expected


def test_prompts_that_end_at_different_times_and_for_different_reasons() -> None:
    wpe = AUSTEN_64.parameters.wpe
    short = replace(
        AUSTEN_64,
        config=replace(AUSTEN_64.config, n_positions=36),
        parameters=AUSTEN_64.parameters._replace(wpe=wpe._replace(weight=wpe.weight[:36])),
    )
    prompts = [short.encode_prompt(text) for text in TEXTS]
    options: dict[str, Any] = {"max_tokens": 25, "sampling": Sampling(temperature=1.2), "stop": ["ing", ".", "?"]}
    together = by_prompt(short.steps_many(prompts, seed=2, **options), len(prompts))
    assert together == [list(short.steps(ids, seed=2 + n, **options)) for n, ids in enumerate(prompts)]
    assert {steps[-1].finish for steps in together} >= {"stop", "context"}
    assert len({len(steps) for steps in together}) > 2


def test_texts_come_whole_and_in_order() -> None:
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "stop": [",", "."]}
    expected = ["".join(AUSTEN_64.generate(text, **options)) for text in TEXTS]
    assert list(AUSTEN_64.generate_many(TEXTS, **options)) == expected
    ids = [AUSTEN_64.encode_prompt(text) for text in TEXTS]
    mixed: list[Any] = [TEXTS[0], ids[1]]
    assert list(AUSTEN_64.generate_many(iter(mixed), **options)) == expected[:2]
    cut: dict[str, Any] = {"keep_last": True, "temperature": 0, "max_tokens": 3}
    long = [5 + n % 200 for n in range(300)]
    assert next(AUSTEN_64.generate_many([long, "Emma"], **cut)) == "".join(AUSTEN_64.generate(long, **cut)) != ""
    assert list(AUSTEN_64.generate_many(TEXTS, max_tokens=0)) == [""] * len(TEXTS)


def test_a_model_without_text_continues_several_ids() -> None:
    config = small()
    model = LanguageModel("bare", config, random_parameters(config))
    steps = by_prompt(model.steps_many([[1], [2, 3, 4]], max_tokens=3, sampling=GREEDY), 2)
    assert steps == [list(model.steps(ids, max_tokens=3, sampling=GREEDY)) for ids in ([1], [2, 3, 4])]
    with pytest.raises(NpgptError, match="bare has no text"):
        model.generate_many([[1]])


@pytest.mark.parametrize("length", [1, 2, 24])
def test_without_a_limit_the_context_is_what_ends(length: int) -> None:
    model = LanguageModel("bare", small(), random_parameters(small()))
    steps = list(model.steps([1] * length, max_tokens=None, sampling=GREEDY))
    assert len(steps) == 24 - length + 2  # the drawn ones, the last of which is not fed back, and the end
    assert steps[-1].finish == "context"
    assert list(model.steps_many([[1] * length], max_tokens=None, sampling=GREEDY)) == steps


def test_no_more_are_held_at_once_than_rows() -> None:
    most: list[int] = []

    def noted(config: Any, caches: Any, capacity: int) -> KVCache:
        most.append(len(caches))
        return side_by_side(config, caches, capacity)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "side_by_side", noted)
        patch.setattr(generation, "ROWS", 4)
        list(AUSTEN.steps_many([[1, 2]] * 9, max_tokens=1, sampling=GREEDY))
        # 2 (keys and values) × 6 blocks × 192 × 4 bytes × 3 tokens a row
        patch.setattr(generation, "ROWS_BYTES", 2 * 6 * 192 * 4 * 3 * 2)
        list(AUSTEN.steps_many([[1, 2]] * 5, max_tokens=1, sampling=GREEDY))
    assert most == [4, 4, 1, 2, 2, 1]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("Emma", {}, r"prompts must be in a list or another iterable, such as \[prompt\]"),
        (5, {}, "prompts must be in a list .*, not 5"),
        (None, {}, "prompts must be in a list .*, not None"),
        ({"Emma": 1}, {}, "prompts must be in a list .*, not {'Emma': 1}"),
        ([5], {}, "prompt 0: it must be one row|prompt 0: token ids must have the shape"),
        ([None], {}, "prompt 0: token ids must be integers"),
        ([], {}, "there are no prompts to continue"),
        (["a", []], {}, "prompt 1: there are no token ids"),
        (["a", [5000]], {}, "prompt 1: token id 5000"),
        (["a", [1] * 257], {}, "prompt 1: 257 tokens do not fit into the context of 256"),
        ([[[1], [2]]], {}, "prompt 0: it must be one row of ids, not 2 rows"),
        (["a"] * 3, {"seed": 2**64 - 2}, "the last prompt's seed, .*, must be at most"),
        (["a"], {"max_tokens": -1}, "max_tokens must be at least 0"),
        (["a"], {"stop": ""}, "a stop string must not be empty"),
    ],
)
def test_what_cannot_be_continued_is_refused_at_once(prompts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(NpgptError, match=message):
        AUSTEN.generate_many(prompts, **options)


def test_the_command_prints_a_line_for_each_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\n".join(TEXTS[:3]).encode() + b" \r\n")
    arguments = ["--max-tokens", "9", "--dtype", "float64", "--seed", "7"]
    code, out, error = here("generate", "--prompts", "prompts.txt", *arguments, cwd=tmp_path)
    assert (code, error) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == [*TEXTS[:2], TEXTS[2] + " "]
    for number, line in enumerate(lines):
        seed = str(7 + number)
        alone = json.loads(here("generate", line["prompt"], *arguments[:-1], seed, "--json")[1])
        assert line.keys() == alone.keys()
        assert [line[key] for key in ("text", "token_ids", "finish", "seed", "prompt_ids")] == [
            alone[key] for key in ("text", "token_ids", "finish", "seed", "prompt_ids")
        ]
        assert (line["sample"], alone["sample"]) == (number + 1, 1)
    piped = here(
        "generate", "--prompts", "-", *arguments, "--json", "-v", stdin=(tmp_path / "prompts.txt").read_bytes()
    )
    assert [json.loads(line)["text"] for line in piped[1].splitlines()] == [line["text"] for line in lines]
    assert f"{sum(len(line['prompt_ids']) for line in lines)} prompt tokens, 9 generated (length), " in piped[2]


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("a\n\nb\n", [], "p.txt: line 2 is empty: remove it"),
        ("", [], "p.txt: line 1 is empty"),
        ("a\n" + " and" * 300, [], "p.txt: line 2: the prompt has 300 tokens, the context holds 256; --keep-last cuts"),
        ("a", ["Emma"], "give one prompt, as text or as --ids, or several with --prompts, not both"),
        ("a", ["--ids", "1"], "or several with --prompts, not both"),
        ("a", ["--samples", "2"], "--prompts draws one sample per prompt: repeat a line in the file"),
        ("a\nb", ["--seed", str(2**64 - 1)], "the last prompt's seed"),
        ("a", ["--stop", ""], "a stop string must not be empty"),
    ],
)
def test_files_of_prompts_that_are_refused(tmp_path: Path, content: str, arguments: list[str], message: str) -> None:
    (tmp_path / "p.txt").write_text(content)
    assert message in refused("generate", "--prompts", "p.txt", *arguments, cwd=tmp_path)


def test_the_head_of_a_long_line_is_cut_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Emma\n" + " and" * 300)
    arguments = ["--keep-last", "--max-tokens", "2"]
    code, out, error = here("generate", "--prompts", "p.txt", *arguments, cwd=tmp_path)
    assert code == 0
    assert [len(json.loads(line)["prompt_ids"]) for line in out.splitlines()] == [3, 255]
    assert (
        error == "npgpt: p.txt: line 2: the prompt's first 45 of 300 tokens are cut, 255 kept in the context of 256\n"
    )


def test_a_character_that_the_vocabulary_has_not_is_named_with_its_text(tmp_path: Path) -> None:
    store(tmp_path / "m", small(vocab_size=2))
    meta = {"vocab_size": 2, "itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}}
    (tmp_path / "m" / "meta.pkl").write_bytes(pickle.dumps(meta))
    (tmp_path / "p.txt").write_text("ab\naZ")
    assert "p.txt: line 2: " in refused("generate", "--prompts", "p.txt", "--model", "m", cwd=tmp_path)
    assert "p.txt: " in refused("score", "--no-bos", "p.txt", "--model", "m", cwd=tmp_path)
    model = npgpt.load(tmp_path / "m")
    with pytest.raises(NpgptError, match=r"prompt 1: .* has no id for 'Z'"):
        model.generate_many(["ab", "aZ"])
    with pytest.raises(NpgptError, match=r"text 1: .* has no id for 'Z'"):
        list(npgpt.score(["ab", "aZ"], model, end_of_text=False))
    with pytest.raises(NpgptError, match="text 1: token id 7 at position"):
        list(npgpt.score([[0, 1], [0, 7]], model, end_of_text=False))


def test_a_space_that_the_tokenizer_puts_before_a_prompt_is_not_shown(tmp_path: Path) -> None:
    """The output is the user's text and its continuation; a space of the user's own stays."""
    folder = store(tmp_path / "m", small(vocab_size=300))
    put(folder, small_pair() | {"tokenizer_config.json": {"add_prefix_space": True}})
    arguments = ("--model", str(folder), "--max-tokens", "0")
    (tmp_path / "p.txt").write_text("the\n the")
    assert here("generate", "the", *arguments)[1] == "the\n"
    assert here("generate", " the", *arguments)[1] == " the\n"
    assert json.loads(here("generate", "the", "--json", *arguments)[1])["prompt"] == "the"
    lines = here("generate", "--prompts", str(tmp_path / "p.txt"), *arguments)[1].splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["the", " the"]
