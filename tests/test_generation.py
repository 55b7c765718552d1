from __future__ import annotations

import base64
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npgpt
from npgpt.cache import KVCache
from npgpt.checkpoints.places import GPT2_RANKS
from npgpt.errors import NpgptError
from npgpt.language_model import LanguageModel
from npgpt.model import forward
from npgpt.text import generation, tokenizer, vocabularies
from npgpt.text.generation import Finish, Step
from npgpt.text.sampling import Sampling
from tests.support.austen import AUSTEN
from tests.support.models import no_text, random_parameters, small
from tests.support.thorough import examples

GREEDY = Sampling(temperature=0)
GPT2 = vocabularies.from_ranks(GPT2_RANKS, 50257)


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
    """With 24 positions, at most 24 tokens are read, and the token after the 24th is still predicted."""
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
        return "".join(AUSTEN.generate("It is a truth", max_tokens=10, seed=seed))

    assert text(3) == text(3)
    assert len({text(seed) for seed in range(5)}) == 5


def test_the_filters_reach_the_draw() -> None:
    def text(**options: Any) -> str:
        return "".join(AUSTEN.generate("It is a truth", max_tokens=12, seed=5, **options))

    greedy = text(temperature=0)
    assert text(temperature=0, repetition_penalty=1.3) != greedy == text(temperature=0, repetition_penalty=1.0)
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
    assert asked == [{"logits_from": -1}] * 2
    assert AUSTEN([1, 2, 3], logits_from=-1).shape == (1, 1, 4096)


def with_logits(monkeypatch: pytest.MonkeyPatch, favourites: Sequence[int], vocab_size: int) -> None:
    """Return a model that predicts these ids in turn, then repeats the last."""
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


def test_a_stop_string_over_three_tokens_and_over_the_prompts_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop string that begins in the prompt does not count: only new text is searched."""
    ids = [790, 820, 351, 448]
    assert [AUSTEN.tokenizer.piece(token_id) for token_id in ids] == [b" every", b"day", b" with", b"out"]
    for stop, text, finish, steps in (
        ("yday w", " ever", "stop", 3),
        (" everyday with", "", "stop", 3),
        ("rydays", " everyday without", "end_of_text", 5),
        ("this every", " everyday without", "end_of_text", 5),
        ("s everyday with", " everyday without", "end_of_text", 5),
    ):
        with_logits(monkeypatch, [*ids, 4095], 4096)
        found = list(AUSTEN.steps(AUSTEN.encode_prompt("this"), max_tokens=9, sampling=GREEDY, stop=[stop]))
        assert ("".join(step.text for step in found), found[-1].finish, len(found)) == (text, finish, steps)


@given(st.text("ab ", max_size=12), st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3))
def test_stopping_by_brute_force(text: str, stop: list[str]) -> None:
    """However the text is cut into tokens, the output is the text before the first completed stop string."""
    ids = AUSTEN.tokenizer.encode(text)
    ends = [text.find(s) + len(s) for s in stop if s in text]
    decoder = tokenizer.TextDecoder(AUSTEN.tokenizer)
    sample = generation._Sample(0, [], np.random.default_rng(), decoder, stop)
    shown = []
    for token_id in [*ids, None]:
        shown.append(sample.end("length") if token_id is None else sample.take(token_id))
        if shown[-1].finish:
            break
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
        ({"repetition_penalty": 0}, "repetition-penalty must be a finite number above 0, not 0"),
        ({"seed": True}, "a seed must be a whole number, not True"),
        ({"top_k": 2.5}, "top-k, .* must be a whole number, not 2.5"),
        ({"stop": [""]}, "stop string must not be empty"),
        ({"stop": [b"x"]}, "a stop string must be a str, not bytes"),
        ({"stop": "\udc80"}, "a stop string has a lone surrogate"),
        ({"temperature": -1}, "temperature"),
        ({"prompt": []}, "no token ids"),
        ({"prompt": [4096]}, "token id 4096 at position"),
        ({"prompt": [1] * 257}, "257 tokens do not fit into the context of 256"),
        ({"prompt": [[1], [2]]}, "the prompt must be one row of ids, not 2 rows"),
        ({"prompt": "a\ud800"}, "lone surrogate"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(NpgptError, match=message):
        AUSTEN.generate(**{"prompt": "a"} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"samples": 10**8}, "samples must be at most 1024, not 100000000"),
        ({"samples": 2.0}, "samples must be a whole number, not 2.0"),
        ({"samples": True}, "samples must be a whole number, not True"),
        ({"samples": 3, "seed": 2**64 - 2}, "the last sample's seed, .*, must be at most 18446744073709551615, not"),
    ],
)
def test_samples_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(NpgptError, match=message):
        AUSTEN.steps([1], max_tokens=1, sampling=GREEDY, **arguments)
    assert len(list(AUSTEN.steps([1], max_tokens=0, sampling=GREEDY, samples=3, seed=2**64 - 3))) == 3


def test_the_penalty_is_of_prompt_and_continuation() -> None:
    """With a huge penalty and positive logits, no earlier token is repeated."""
    config = small(vocab_size=20)
    parameters = random_parameters(config)
    parameters.wte.weight[:, 0], parameters.ln_f.bias[0] = 1, 1000
    sampling = Sampling(temperature=0, repetition_penalty=1e9)
    steps = generation.generate(parameters, config, [5, 3], max_tokens=18, sampling=sampling)
    assert sorted([5, 3, *(step.token_id for step in steps if step.token_id is not None)]) == list(range(20))


def test_a_model_without_text_runs_on_ids_and_says_why() -> None:
    config = small()
    model = LanguageModel("bare", config, random_parameters(config), no_text("its 40 ids are nobody's"))
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
    with pytest.raises(NpgptError, match="needs a model with a vocabulary"):
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


AUSTEN_64 = npgpt.load(dtype="float64")


def alone(steps: Iterable[Step], samples: int) -> list[list[Step]]:
    """Return each sample's steps, generated alone."""
    steps = list(steps)
    return [[step._replace(sample=0) for step in steps if step.sample == number] for number in range(samples)]


@given(
    prompt=st.lists(st.integers(0, 39), min_size=1, max_size=24),
    max_tokens=st.integers(0, 30),
    samples=st.integers(1, 5),
    seed=st.integers(0, 2**64 - 5),
    penalty=st.sampled_from([None, 1.5]),
)
@settings(max_examples=examples(25, 50))
def test_each_sample_is_as_if_drawn_alone(
    prompt: list[int], max_tokens: int, samples: int, seed: int, penalty: float | None
) -> None:
    config = small()
    parameters = random_parameters(config)
    sampling = Sampling(temperature=1.5, repetition_penalty=penalty)

    def steps(seed: int, samples: int) -> list[Step]:
        return list(
            generation.generate(
                parameters, config, prompt, max_tokens=max_tokens, sampling=sampling, seed=seed, samples=samples
            )
        )

    assert alone(steps(seed, samples), samples) == [steps(seed + number, 1) for number in range(samples)]


def test_samples_that_end_at_different_times_and_for_different_reasons() -> None:
    """Rows leave the batch from its middle, end and beginning, without mixing up texts."""
    wpe = AUSTEN_64.parameters.wpe
    short = replace(
        AUSTEN_64,
        config=replace(AUSTEN_64.config, n_positions=36),
        parameters=AUSTEN_64.parameters._replace(wpe=wpe._replace(weight=wpe.weight[:36])),
    )
    prompt = [*short.tokenizer.encode(" and" * 5), 1026, 318, 257, 3872]
    finishes: set[Finish | None] = set()
    lengths: set[int] = set()
    samples = examples(8, 12)
    for max_tokens in (20, 40):
        options: dict[str, Any] = {
            "max_tokens": max_tokens,
            "sampling": Sampling(temperature=1.2, repetition_penalty=1.1),
            "stop": ["ing", "ed to", ".", "?"],
        }
        together = alone(short.steps(prompt, seed=2, samples=samples, **options), samples)
        assert together == [list(short.steps(prompt, seed=2 + number, **options)) for number in range(samples)]
        finishes |= {steps[-1].finish for steps in together}
        lengths |= {len(steps) for steps in together}
    assert finishes >= {"stop", "context", "length"}
    assert len(lengths) > 6


def test_a_vocabulary_without_end_of_text_has_nothing_to_start_from(tmp_path: Path) -> None:
    (tmp_path / "bytes.tiktoken").write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    byte_text = vocabularies.from_ranks(tmp_path / "bytes.tiktoken", 256)
    config = small(vocab_size=256)
    model = LanguageModel("bytes", config, random_parameters(config), lambda: byte_text)
    with pytest.raises(
        NpgptError, match=r"the prompt is empty, and bytes has no <\|endoftext\|> or bos_token_id to start"
    ):
        model.encode_prompt("")
    with pytest.raises(NpgptError, match=r"bytes has no <\|endoftext\|> to put before a text: .*--no-bos"):
        next(npgpt.score(["ab"], model))
    assert next(npgpt.score(["ab"], model, end_of_text=False)).totals.scored == 1


def test_end_of_text_ends_one_sample_alone(tmp_path: Path) -> None:
    """The model writes mostly invalid UTF-8, which each sample's decoder holds back."""
    config = small(vocab_size=257, n_positions=64)
    (tmp_path / "bytes.tiktoken").write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    byte_text = vocabularies.from_ranks(tmp_path / "bytes.tiktoken", 257)
    model = LanguageModel("bytes", config, random_parameters(config), lambda: byte_text)
    options: dict[str, Any] = {"max_tokens": 60, "sampling": Sampling(temperature=8)}
    together = alone(model.steps([1, 2], seed=1, samples=12, **options), 12)
    assert together == [list(model.steps([1, 2], seed=1 + number, **options)) for number in range(12)]
    assert {steps[-1].finish for steps in together} == {"end_of_text", "length"}
    assert len({len(steps) for steps in together}) > 2


def test_the_prompt_is_read_once_and_who_has_ended_is_computed_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, ...]] = []

    def watch(parameters: Any, config: Any, ids: Any, *arguments: Any, **keywords: Any) -> Any:
        read.append(np.shape(ids))
        return forward(parameters, config, ids, *arguments, **keywords)

    monkeypatch.setattr(generation, "forward", watch)
    stop = ["er", "ing", "is"]
    steps = AUSTEN.steps([1026, 318, 257], max_tokens=30, sampling=Sampling(), seed=0, samples=6, stop=stop)
    drawn = [sum(step.token_id is not None for step in own) for own in alone(steps, 6)]
    assert len(set(drawn)) > 3
    assert read == [(1, 3), *((sum(n > fed for n in drawn), 1) for fed in range(1, max(drawn)))]


def test_samples_without_a_seed_are_all_others() -> None:
    """Greedy samples are all the same."""
    for sampling, texts in ((Sampling(temperature=1.0), 6), (GREEDY, 1)):
        steps = AUSTEN.steps([1026, 318], max_tokens=20, sampling=sampling, samples=6)
        assert len({"".join(step.text for step in own) for own in alone(steps, 6)}) == texts


def test_steps_of_samples_come_in_turn() -> None:
    steps = AUSTEN.steps([1026, 318], max_tokens=2, sampling=GREEDY, samples=3)
    assert [(step.sample, step.finish) for step in steps] == [
        *((number, None) for _ in range(2) for number in range(3)),
        *((number, "length") for number in range(3)),
    ]


@pytest.mark.parametrize(
    ("length", "max_tokens", "kept"),
    [(256, 100, 256), (257, 1, 256), (300, 0, 256), (300, 3, 254), (300, 1000, 128), (1000, 101, 156)],
)
def test_a_prompts_last_tokens_leave_room_for_what_is_drawn(length: int, max_tokens: int, kept: int) -> None:
    """The context has 256 positions; the last token drawn needs none, and at least half the context is kept."""
    assert generation.kept_prompt(range(length), AUSTEN.config, max_tokens).tolist() == list(range(length))[-kept:]


def test_keep_last_is_there_in_python_too() -> None:
    ids = [5 + n % 200 for n in range(300)]
    text = "".join(AUSTEN.generate(ids, keep_last=True, max_tokens=3, temperature=0))
    assert text == "".join(AUSTEN.generate(ids[-254:], max_tokens=3, temperature=0)) != ""
    with pytest.raises(NpgptError, match="300 tokens do not fit into the context of 256"):
        AUSTEN.generate(ids, max_tokens=3)
    with pytest.raises(NpgptError, match="max_tokens must be at least 0, not -1"):
        AUSTEN.generate(ids, max_tokens=-1, keep_last=True)


def test_a_model_made_without_a_vocabulary_runs_on_ids() -> None:
    model = LanguageModel("mine", small(), random_parameters(small()))
    assert model.why_no_text == "it was created without a vocabulary"
    assert [step.token_id is not None for step in model.steps([1], max_tokens=2, sampling=GREEDY)] == [
        True,
        True,
        False,
    ]
    with pytest.raises(NpgptError, match="mine has no text: it was created without a vocabulary"):
        model.generate("a")


def test_a_sampling_option_that_there_is_not() -> None:
    with pytest.raises(TypeError, match="temprature"):
        AUSTEN.generate("a", temprature=1)
