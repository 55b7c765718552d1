from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npgpt
from npgpt import generation, tokenizer, vocabulary
from npgpt.cache import KVCache
from npgpt.errors import NpgptError
from npgpt.finding import GPT2_RANKS
from npgpt.generation import Finish, Step
from npgpt.language_model import LanguageModel
from npgpt.model import forward
from npgpt.sampling import Sampling
from tests.models import random_parameters, small

AUSTEN = npgpt.load()
GREEDY = Sampling(temperature=0)
GPT2 = vocabulary.from_ranks(GPT2_RANKS, 50257)


def test_greedy_is_the_argmax_of_the_whole_sequence_again_and_again() -> None:
    config = small()
    parameters = random_parameters(config)
    ids = [5, 3]
    steps = list(generation.generate(parameters, config, ids, max_tokens=10, sampling=GREEDY))
    for step in steps[:-1]:
        ids.append(int(forward(parameters, config, ids)[0, -1].argmax()))
        assert step == Step(ids[-1], "")
    assert steps[-1] == Step(None, "", "length")
    assert len(steps) == 11


@pytest.mark.parametrize(("prompt", "tokens", "finish"), [(20, 5, "context"), (24, 1, "context"), (1, 24, "context")])
def test_the_context_is_used_up_and_said_to_be(prompt: int, tokens: int, finish: Finish) -> None:
    """24 positions: 24 tokens are read at most, and what follows the 24th is still predicted."""
    config = small()
    steps = list(generation.generate(random_parameters(config), config, [1] * prompt, max_tokens=99, sampling=GREEDY))
    assert [step.finish for step in steps] == [None] * tokens + [finish]


def test_no_tokens_at_all() -> None:
    config = small()
    assert list(generation.generate(random_parameters(config), config, [1], max_tokens=0, sampling=GREEDY)) == [
        Step(None, "", "length")
    ]


def test_same_seed_same_text_and_another_seed_another() -> None:
    def text(seed: int) -> str:
        return "".join(AUSTEN.generate("It is a truth", max_tokens=30, seed=seed))

    assert text(3) == text(3)
    assert len({text(seed) for seed in range(5)}) == 5


def test_the_filters_reach_the_draw() -> None:
    def text(**options: Any) -> str:
        return "".join(AUSTEN.generate("It is a truth", max_tokens=20, seed=5, **options))

    greedy = text(temperature=0)
    for only_the_likeliest in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert text(temperature=1.5, **only_the_likeliest) == greedy
    assert text() == text(temperature=0.8) == text(temperature=0.8, top_k=4096, top_p=1.0, min_p=0.0) != greedy
    assert Sampling().temperature == 0.8


def test_only_the_last_position_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def watch(*arguments: Any, **keywords: Any) -> Any:
        asked.append(keywords)
        return forward(*arguments, **keywords)

    monkeypatch.setattr(generation, "forward", watch)
    list(AUSTEN.steps([1, 2, 3], max_tokens=2, sampling=GREEDY))
    assert asked == [{"last_only": True}] * 2
    assert AUSTEN([1, 2, 3], last_only=True).shape == (1, 1, 4096)


def with_logits(monkeypatch: pytest.MonkeyPatch, favourites: Sequence[int], vocab_size: int) -> None:
    """A model that wants these ids one after another, and the last for ever."""
    waiting = list(favourites)

    def fake(*arguments: Any, **keywords: Any) -> Any:
        logits = np.zeros((1, 1, vocab_size))
        logits[0, 0, waiting.pop(0) if len(waiting) > 1 else waiting[0]] = 9
        return logits

    monkeypatch.setattr(generation, "forward", fake)


def gpt2_like(vocab_size: int) -> LanguageModel:
    config = small(vocab_size=vocab_size, n_positions=64)
    return LanguageModel("fake", config, random_parameters(config), lambda: GPT2)


def test_end_of_text_ends_it_unless_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2_like(50257)
    with_logits(monkeypatch, [31373, 50256, 995], 50257)
    steps = list(model.steps([1], max_tokens=5, sampling=GREEDY))
    assert steps == [Step(31373, "hello"), Step(None, "", "end_of_text")]
    with_logits(monkeypatch, [31373, 50256, 995], 50257)
    assert "".join(model.generate([1], max_tokens=3, temperature=0, ignore_eos=True)) == "hello<|endoftext|> world"


def test_padding_is_never_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2_like(50304)
    with_logits(monkeypatch, [50300], 50304)
    for temperature in (0, 1.0, 100.0):
        sampling = Sampling(temperature=temperature)
        steps = list(model.steps([1], max_tokens=30, sampling=sampling, seed=1, ignore_eos=True))
        assert all(step.token_id is None or step.token_id <= 50256 for step in steps)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["world"], "hello "),
        (["lo wo"], "hel"),
        (["wor", "lo"], "hel"),
        (["xyz"], "hello world!!"),
        (["!!!"], "hello world!!"),
        (["!!"], "hello world"),
        (["hello"], ""),
    ],
)
def test_stop_strings_may_span_tokens_and_are_not_shown(
    monkeypatch: pytest.MonkeyPatch, stop: list[str], expected: str
) -> None:
    with_logits(monkeypatch, [*AUSTEN.tokenizer.encode("hello world!!"), 4095], 4096)
    shown = list(AUSTEN.generate("x", temperature=0, stop=stop))
    assert "".join(shown) == expected
    with_logits(monkeypatch, [*AUSTEN.tokenizer.encode("hello world!!"), 4095], 4096)
    assert "".join(AUSTEN.generate("x", temperature=0, stop=(s for s in stop))) == expected


@given(st.text("ab ", max_size=12), st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3))
@settings(deadline=None)
def test_stopping_by_brute_force(text: str, stop: list[str]) -> None:
    """However the text is cut into tokens, what is shown is the text before the first stop string to be complete."""
    ids = AUSTEN.tokenizer.encode(text)
    ends = [text.find(s) + len(s) for s in stop if s in text]
    steps = [*(Step(token_id, "") for token_id in ids), Step(None, "", "length")]
    shown = list(generation._with_text(iter(steps), tokenizer.TextDecoder(AUSTEN.tokenizer), stop))
    joined = "".join(step.text for step in shown)
    if not ends:
        assert joined == text
        assert shown[-1].finish == "length"
    else:
        assert shown[-1].finish == "stop"
        assert text.startswith(joined)
        assert not any(s in joined for s in stop)
        assert any(text[len(joined) :].startswith(s) for s in stop)
    assert [step.finish for step in shown[:-1]] == [None] * (len(shown) - 1)


def test_text_comes_as_soon_as_it_is_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = AUSTEN.tokenizer.encode("hé €!")
    assert [AUSTEN.tokenizer.piece(token_id) for token_id in ids] == [
        b"h",
        b"\xc3\xa9",
        b" \xe2",
        b"\x82",
        b"\xac",
        b"!",
    ]
    with_logits(monkeypatch, [*ids, 4095], 4096)
    steps = list(AUSTEN.steps([1], max_tokens=20, sampling=GREEDY))
    assert [step.text for step in steps] == ["h", "é", " ", "", "€", "!", ""]
    assert all("\ufffd" not in step.text for step in steps)


def test_empty_prompt_starts_from_end_of_text() -> None:
    assert AUSTEN.encode_prompt("") == [4095]
    assert "".join(AUSTEN.generate("", max_tokens=5, temperature=0)) == "".join(
        AUSTEN.generate([4095], max_tokens=5, temperature=0)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": -1}, "max_tokens must be at least 0, not -1"),
        ({"seed": -1}, "a seed must be at least 0, not -1"),
        ({"max_tokens": 3.5}, "max_tokens must be a whole number, not 3.5"),
        ({"seed": True}, "a seed must be a whole number, not True"),
        ({"top_k": 2.5}, "top-k, .* must be a whole number, not 2.5"),
        ({"stop": [""]}, "stop string must not be empty"),
        ({"stop": [b"x"]}, "a stop string must be a str, not bytes"),
        ({"stop": "\udc80"}, "a stop string has a lone surrogate"),
        ({"temperature": -1}, "temperature"),
        ({"prompt": []}, "no token ids"),
        ({"prompt": [4096]}, "token id 4096 at position"),
        ({"prompt": [1] * 257}, "257 tokens do not fit into the context of 256"),
        ({"prompt": [[1], [2]]}, "one prompt at a time is continued, not 2 rows"),
        ({"prompt": "a\ud800"}, "lone surrogate"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(NpgptError, match=message):
        AUSTEN.generate(**{"prompt": "a"} | arguments)


def test_a_model_without_text_runs_on_ids_and_says_why() -> None:
    config = small()
    model = LanguageModel("bare", config, random_parameters(config), lambda: "its 40 ids are nobody's")
    steps = list(model.steps([1, 2], max_tokens=3, sampling=GREEDY))
    assert [step.text for step in steps] == [""] * 4
    for use in (
        lambda: model.tokenizer,
        lambda: model.generate("hello"),
        lambda: model.generate([1, 2]),
        lambda: model.encode_prompt("hello"),
    ):
        with pytest.raises(NpgptError, match="bare has no text: its 40 ids are nobody's"):
            use()
    with pytest.raises(NpgptError, match="needs a model that has text"):
        model.steps([1], max_tokens=1, sampling=GREEDY, stop=["x"])


def test_a_character_cut_by_the_end_of_the_prompt_is_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    head, *rest = AUSTEN.tokenizer.encode("日!")
    with_logits(monkeypatch, [*rest, 4095], 4096)
    assert "".join(AUSTEN.generate([head], temperature=0)) == "日!"
    assert tokenizer.TextDecoder(AUSTEN.tokenizer, [head]).before == ""
    assert len(list(gpt2_like(50304).steps([50300], max_tokens=2, sampling=GREEDY))) == 3  # a padding id may be read


def test_broken_weights_are_told_in_words_and_not_in_warnings() -> None:
    config = small()
    parameters = random_parameters(config, dtype="float32")
    parameters.h[0].mlp.c_fc.weight[0, 0] = np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NpgptError, match="NaN or infinity"):
            list(generation.generate(parameters, config, [1], max_tokens=1, sampling=GREEDY))


def test_models_and_tokenizers_can_be_compared_and_hashed() -> None:
    assert AUSTEN == AUSTEN
    assert len({AUSTEN, AUSTEN.tokenizer}) == 2
    assert len(repr(AUSTEN)) < 600
    assert len(repr(AUSTEN.tokenizer)) < 200


def test_the_cache_is_of_the_models_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def watch(*arguments: Any) -> Any:
        made.append(KVCache(*arguments))
        return made[-1]

    monkeypatch.setattr(generation, "KVCache", watch)
    config = small()
    for dtype in ("float32", "float64"):
        list(
            generation.generate(random_parameters(config, dtype=dtype), config, [1] * 4, max_tokens=3, sampling=GREEDY)
        )
    assert [(str(cache.keys.dtype), cache.capacity, cache.length) for cache in made] == [
        ("float32", 7, 6),
        ("float64", 7, 6),
    ]
