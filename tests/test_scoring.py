from __future__ import annotations

import itertools
import math
import os
import pickle
import signal
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npgpt
from npgpt import parameters
from npgpt.errors import NpgptError
from npgpt.language_model import LanguageModel
from npgpt.parameters import Array
from npgpt.process import cores
from npgpt.scoring import likelihood as likelihoods
from npgpt.scoring import scoring, windows
from npgpt.scoring import texts as texts_of
from npgpt.scoring.likelihood import Score, Totals, exact, likelihood, total, unknown
from npgpt.scoring.scoring import SharedModel, score
from npgpt.scoring.workers import processes
from tests.support.austen import AUSTEN
from tests.support.command import wait_for_the_end
from tests.support.thorough import THOROUGH, examples

TEXTS = [
    "Emma Woodhouse, handsome, clever, and rich, with a comfortable home and happy disposition. " * 3,
    "naïve 日本\n",
    "It was a truth. " * 12,
    "Emma",
    "and",
]


@pytest.fixture(scope="module")
def austen() -> LanguageModel:
    return npgpt.load(dtype="float64")


def log_softmax(logits: Array) -> list[float]:
    """Return log softmax by its definition."""
    largest = float(logits.max())
    norm = math.log(math.fsum(math.exp(float(v) - largest) for v in logits))
    return [float(v) - largest - norm for v in logits]


def by_definition(model: LanguageModel, text: str, rule: windows.Convention) -> list[float]:
    """Return every token's figures by running the window that scores it, up to that token."""
    ids = model.tokenizer.encode(text)
    if rule.end_of_text:
        ids = [model.tokenizer.end_of_text or 0, *ids]
    found = [math.nan] * len(ids)
    for window in windows.windows(len(ids), rule):
        logits = model(ids[window.begin : window.last - 1])[0]
        for place in range(window.first, window.last):
            row = logits[place - 1 - window.begin]
            found[place] = row[ids[place]] - row.max() - np.log(np.exp(row - row.max()).sum())
    return found[1:] if rule.end_of_text else found


@given(st.integers(1, 6), st.integers(1, 12), st.sampled_from(["float32", "float64"]), st.data())
def test_likelihood_by_brute_force(n: int, V: int, dtype: str, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(-30, 30), min_size=n * V, max_size=n * V))
    logits = (np.array(values) / 4).reshape(n, V).astype(dtype)
    ids = np.array(data.draw(st.lists(st.integers(0, V - 1), min_size=n, max_size=n)))
    top = data.draw(st.integers(0, V))
    found = likelihood(logits, ids, top)
    for row, (these, token_id) in enumerate(zip(logits, ids.tolist(), strict=True)):
        expected = log_softmax(these)
        order = sorted(range(V), key=lambda i, these=these: (-these[i], i))  # type: ignore[misc]
        # float32: V exponentials, each off by an ulp or two, of differences that are exact here (multiples of 1/4)
        tolerance = 1e-6 if dtype == "float32" else 1e-14 * 40
        assert found.log_probs[row] == pytest.approx(expected[token_id], abs=tolerance)
        assert found.ranks[row] == 1 + sum(v > these[token_id] for v in these)
        values_there = [float(these[i]) for i in found.top_ids[row]]
        assert values_there == [float(these[i]) for i in order[:top]]
        np.testing.assert_allclose(found.top_log_probs[row], [expected[i] for i in found.top_ids[row]], atol=tolerance)


def test_the_likeliest_of_a_large_vocabulary_in_order_and_of_equals_the_lowest_id_first() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 5000))
    logits[1, [4000, 17, 2500]] = 9
    found = likelihood(logits, np.zeros(3, np.int64), 900)  # more than a partition sorts by the way
    for row in range(3):
        assert found.top_ids[row].tolist() == np.argsort(-logits[row], kind="stable")[:900].tolist()
    assert found.top_ids[1, :3].tolist() == [17, 2500, 4000]


def test_exponentials_are_summed_in_float64() -> None:
    """With float32 logits, only the rounding of the exponentials themselves remains."""
    logits = np.random.default_rng(1).uniform(-3, 0, (4, 50257)).astype(np.float32)
    logits[:, 0] = 0
    found = likelihood(logits, np.zeros(4, np.int64))
    sums = [math.fsum(row) for row in np.exp(logits)]
    np.testing.assert_allclose(found.log_probs, [-math.log(value) for value in sums], rtol=0, atol=1e-13)


def test_likelihood_goes_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    logits, ids = rng.standard_normal((23, 50)), rng.integers(0, 50, 23)
    whole = likelihood(logits, ids, 3)
    monkeypatch.setattr(likelihoods, "BLOCK", 100)
    for one, other in zip(whole, likelihood(logits, ids, 3), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "context", "stride"),
    [(name, *sizes) for sizes in [(256, 256), (40, 40), (40, 7)] for name in ["rolling", "huggingface", "llama.cpp"]][
        :: examples(2, 1)
    ],
)
def test_scores_by_definition(austen: LanguageModel, name: str, context: int, stride: int) -> None:
    if name == "llama.cpp":
        stride = context
    rule = windows.convention(name, austen.config, context, stride)
    least = {"rolling": 1, "huggingface": 2, "llama.cpp": context}[name]
    several = [TEXTS[0] * examples(3, 5)] if context == 256 or THOROUGH else []  # of windows: TEXTS[0] has those of 40
    texts = [text for text in [*TEXTS, *several] if len(austen.tokenizer.encode(text)) >= least]
    for text, found in zip(texts, score(texts, austen, convention=name, context=context, stride=stride), strict=True):
        expected = by_definition(austen, text, rule)
        np.testing.assert_allclose(found.log_probs, expected, rtol=1e-10)
        assert np.array_equal(found.ranks == 0, np.isnan(expected))
        assert b"".join(found.pieces).decode() == text
        assert [
            text.encode()[at : at + len(p)] for at, p in zip(found.byte_offsets, found.pieces, strict=True)
        ] == list(found.pieces)


def test_no_logits_are_computed_but_those_that_are_scored(
    austen: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    whole = LanguageModel.__call__

    def watch(*arguments: Any, **keywords: Any) -> Any:
        logits = whole(*arguments, **keywords)
        rows.append(logits.shape[0] * logits.shape[1])
        return logits

    monkeypatch.setattr(LanguageModel, "__call__", watch)
    (found,) = score([TEXTS[0]], austen, context=40, stride=7)
    assert sum(rows) == len(found.token_ids)


def test_float32_differs_by_rounding_alone(austen: LanguageModel) -> None:
    for one, other in zip(score(TEXTS, AUSTEN), score(TEXTS, austen), strict=True):
        # logits of about 10 in float32, u = 6e-8, after some hundreds of roundings: 1e-6 is typical, see tolerances.py
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=5e-5)


def test_the_first_token_is_scored_where_end_of_text_stands_before_it(austen: LanguageModel) -> None:
    (before,) = score(["Emma"], austen)
    (without,) = score(["Emma"], austen, end_of_text=False)
    ids = austen.tokenizer.encode("Emma")
    expected = log_softmax(austen([4095])[0, -1])[ids[0]]
    assert before.log_probs[0] == pytest.approx(expected)
    assert math.isnan(without.log_probs[0])
    assert without.ranks[0] == 0
    assert without.totals.scored == len(ids) - 1


def test_sums_literally() -> None:
    nan = math.nan
    text = "a bc\u3000déf\ng"
    pieces = (b"a", b" b", b"c\xe3\x80", b"\x80", b"d\xc3", b"\xa9f", b"\n", b"g")
    assert b"".join(pieces).decode() == text
    log_probs = np.array([nan, -1.0, -2.0, -0.5, -4.0, nan, -0.25, -0.25])
    found = Score(
        np.arange(8),
        pieces,
        unknown(8, 0)._replace(log_probs=log_probs, ranks=np.array([0, *[1] * 4, 0, 1, 1])),
    )
    assert found.byte_offsets.tolist() == [0, 1, 3, 6, 7, 9, 11, 12]
    # words begin in: a (not scored), " b", "d\xc3", g
    assert found.totals == Totals(tokens=8, scored=6, words=3, bytes=2 + 3 + 1 + 2 + 1 + 1, nll=8.0)
    assert found.perplexity == pytest.approx(math.exp(8 / 6))
    assert found.totals.word_perplexity == pytest.approx(math.exp(8 / 3))
    assert found.totals.bits_per_byte == pytest.approx(8 / math.log(2) / 10)


@given(st.text(min_size=1, max_size=60))
@settings(max_examples=30)
def test_words_are_those_between_white_space(text: str) -> None:
    (found,) = score([text], AUSTEN, context=16)
    assert found.totals.words == len(text.split())
    assert found.totals.bytes == len(text.encode())
    assert found.totals.tokens == found.totals.scored == len(found.pieces)


@given(st.lists(st.floats(-1e300, 1e300), max_size=30), st.integers(1, 30))
def test_sums_are_rounded_once_however_they_are_cut(values: list[float], size: int) -> None:
    kept: list[float] = []
    for start in range(0, len(values), size):
        kept = exact([*kept, *values[start : start + size]])
    assert math.fsum(kept) == math.fsum(values)


def test_few_numbers_hold_an_exact_sum() -> None:
    assert exact([1.0, 1e-20, 1e-40]) == [1.0, 1e-20, 1e-40]
    assert exact([0.1] * 10) == [1.0, 5.551115123125783e-17]
    assert exact([1e100, 1.0, -1e100]) == [1.0]
    assert exact([-math.inf, 1.0]) == [-math.inf]
    assert str(exact([math.nan, 1.0])) == "[nan]"
    assert exact([]) == exact([0.5, -0.5]) == []


@given(st.text("ab é日\u3000\n", max_size=40), st.integers(1, 5), st.data())
def test_words_are_counted_by_parts(text: str, size: int, data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=20)) if len(raw) > 1 else [])
    pieces = [raw[a:b] for a, b in itertools.pairwise([0, *cuts, len(raw)]) if raw]
    whole = likelihoods.measured(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihoods, "PIECES", size)
        for one, other in zip(likelihoods.measured(pieces), whole, strict=True):
            np.testing.assert_array_equal(one, other)
    assert whole[1].sum() == len(text.split())


def test_sums_of_several_and_of_none() -> None:
    parts = [Totals(3, 2, 1, 9, 0.1), Totals(5, 4, 2, 10, 0.2)]
    assert total(parts) == Totals(8, 6, 3, 19, math.fsum([0.1, 0.2]))
    nothing = Totals(1, 0, 0, 0, 0.0)
    assert all(math.isnan(v) for v in (nothing.perplexity, nothing.word_perplexity, nothing.bits_per_byte))
    assert Totals(9, 9, 1, 9, 5000.0).word_perplexity == math.inf
    assert Totals(9, 9, 1, 9, 300.0).word_perplexity == math.exp(300)


def test_batches_hold_windows_of_one_length_and_no_more_than_one_context(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AUSTEN
    seen: list[tuple[int, ...]] = []
    once = LanguageModel.__call__

    def call(self: LanguageModel, token_ids: Any, *rest: Any, **named: Any) -> Array:
        seen.append(np.shape(token_ids))
        return once(self, token_ids, *rest, **named)

    monkeypatch.setattr(LanguageModel, "__call__", call)
    list(score(["Emma"] * 20 + ["and"] * 3 + TEXTS[:1], model, context=24))
    assert all(B * T <= 24 for B, T in seen)
    assert any(B > 4 for B, _ in seen)
    assert (
        sum(B * T for B, T in seen) < 1.1 * sum(len(model.tokenizer.encode(t)) for t in ["Emma"] * 20 + TEXTS[:1]) + 60
    )


class Backwards(Executor):
    """An executor that runs its work in reverse order, and only when a result is awaited."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Any]] = []
        self.most = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        handed, *rest = args
        result, inner = future.result, (fn, pickle.loads(pickle.dumps(handed)), *rest)

        def wait(timeout: float | None = None) -> Any:
            while self.waiting:
                other, (call, *its) = self.waiting.pop()
                other.set_result(call(*its))
            return result(timeout)

        future.result = wait  # type: ignore[method-assign]
        self.waiting.append((future, inner))
        self.most = max(self.most, len(self.waiting))
        return future


def same(one: Iterator[Score] | list[Score], other: Iterator[Score] | list[Score]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.pieces == b.pieces
        for mine, theirs in zip(a.likelihood, b.likelihood, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("make", [Backwards, lambda: ThreadPoolExecutor(3), None])
def test_any_executor_gives_the_same_in_order(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "AHEAD", 5)
    monkeypatch.setattr(scoring, "GROUP", 2)
    model = AUSTEN
    texts, options = TEXTS[1:] * examples(3, 4), {"context": 32, "stride": 20, "top": 2}
    executor = make() if make else None
    same(score(texts, model, executor, **options), score(texts, model, **options))  # type: ignore[arg-type]
    if isinstance(executor, Backwards):
        assert executor.most == 5  # no more is handed out than can be kept


def test_who_stops_early_leaves_no_work_behind() -> None:
    with ThreadPoolExecutor(1) as pool:
        submitted: list[Future[Any]] = []
        submit = pool.submit

        def noted(*arguments: Any) -> Future[Any]:
            submitted.append(submit(*arguments))
            return submitted[-1]

        pool.submit = noted  # type: ignore[method-assign, assignment]
        found = score(TEXTS * 20, AUSTEN, pool, context=16)
        next(found)
        found.close()  # type: ignore[attr-defined]
        assert sum(future.cancelled() for future in submitted) > 30


@given(
    texts=st.lists(
        st.lists(st.sampled_from(["Emma", "don't", " ", "\n", "\t ", "日本", "\u3000", "<|endoftext|>", "—1"]))
    ),
    convention=st.sampled_from(windows.NAMES),
    context=st.integers(2, 9),
    stride=st.integers(1, 9),
    part=st.integers(1, 12),
    special=st.booleans(),
    skip=st.sets(st.integers(0, 4)),
)
@settings(max_examples=examples(8, 100))
def test_totals_are_those_of_the_scores_however_a_text_comes(
    texts: list[list[str]],
    convention: str,
    context: int,
    stride: int,
    part: int,
    special: bool,
    skip: set[int],
) -> None:
    """The text arrives in the user's or the reader's parts, with or without per-token figures."""
    whole = [text for text in map("".join, texts) if len(AUSTEN.tokenizer.encode(text, special=special)) > 9]
    context = max(context, 3 if convention == "llama.cpp" else 2)
    stride = context if convention == "llama.cpp" else min(stride, context)
    options: dict[str, Any] = {"convention": convention, "context": context, "stride": stride, "special": special}
    expected = list(score(whole, AUSTEN, skip=skip, **options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("npgpt.scoring.texts.PART", part)
        same(score(map(iter, whole), AUSTEN, skip=skip, **options), expected)
        assert list(scoring.totals(whole, AUSTEN, skip=skip, **options)) == [found.totals for found in expected]


def test_sums_only_take_no_memory_for_a_longer_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring 100 KB, in parts or as many texts, holds no more memory than 10 KB."""
    monkeypatch.setattr(
        scoring,
        "compute",
        lambda _, ids, skip, top: unknown(ids[:, skip + 1 :].size, top)._replace(
            log_probs=np.full(ids[:, skip + 1 :].size, -0.1)
        ),
    )
    monkeypatch.setattr(texts_of, "PART", 2**10)

    def peak(parts: int, texts: int) -> int:
        tracemalloc.start()
        try:
            several = (("Emma was glad. " * 16 + "\n" for _ in range(parts)) for _ in range(texts))
            for found in scoring.totals(several, AUSTEN, context=64):
                assert found.tokens > 60 * parts
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few = peak(40, 1)
    assert few < 2**20
    assert max(peak(400, 1), peak(1, 400)) < few + 2**17


def test_what_is_asked_of_the_last_text_is_read_when_it_is_reached() -> None:
    """A finished long text ends its group before the text is read to its end."""
    read = 0

    def parts() -> Iterator[str]:
        nonlocal read
        for _ in range(100):
            read += 1
            yield "Emma was glad. " * 1000

    (found,) = score([parts(), "and"], AUSTEN, context=16, skip={0})
    assert found.totals.tokens == 1
    assert read < 20


def test_texts_may_be_endless() -> None:
    def more() -> Iterator[str]:
        while True:
            yield "Emma Woodhouse " * 12

    found = score(more(), AUSTEN, context=32)
    assert next(found).totals.tokens == next(found).totals.tokens > 40


def test_what_is_skipped_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "GROUP", 2)
    model, texts = AUSTEN, TEXTS * 3
    whole = list(score(texts, model))
    done = {0, 1, 2, 3, 7}
    same(score(texts, model, skip=done), [found for number, found in enumerate(whole) if number not in done])


def test_groups_of_which_nothing_is_wanted_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(scoring, "compute", never)
    assert list(score(TEXTS * 3, AUSTEN, skip=range(3 * len(TEXTS)))) == []


def test_a_stride_of_one_takes_no_memory_for_all_its_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows overlap, so all of them together would be as large as context × text."""

    def enough(*_: Any) -> None:
        raise KeyError

    monkeypatch.setattr(scoring, "compute", enough)
    model = AUSTEN
    work = score(["and " * 4000], model, stride=1)
    tracemalloc.start()
    try:
        with pytest.raises(KeyError):
            next(work)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < model.config.n_positions * 4000 * 8 / 2


@pytest.mark.parametrize("convention", windows.NAMES)
def test_progress_counts_tokens_and_the_bytes_read_for_them(convention: str) -> None:
    seen: list[tuple[int, int]] = []
    texts = TEXTS if convention == "rolling" else [TEXTS[0], TEXTS[2]]
    found = list(score(texts, AUSTEN, convention=convention, context=8, progress=lambda *two: seen.append(two)))
    assert seen[-1][0] == sum(text.totals.scored for text in found)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    # llama.cpp leaves out what is no whole window
    left_out = [
        b"".join(text.pieces[len(text.pieces) // 8 * 8 :]) if convention == "llama.cpp" else b"" for text in found
    ]
    assert seen[-1][1] == sum(map(len, map(str.encode, texts))) - sum(map(len, left_out))
    some = []
    list(score(TEXTS, AUSTEN, skip={0, 2}, progress=lambda *two: some.append(two)))
    wanted = [text for number, text in enumerate(score(TEXTS, AUSTEN)) if number not in {0, 2}]
    assert some[-1] == (sum(text.totals.scored for text in wanted), sum(text.totals.bytes for text in wanted))


def test_processes_give_the_same_share_the_weights_and_end(tmp_path: Path) -> None:
    npgpt.save(AUSTEN, tmp_path / "float32")  # the embedded file is float16, which each would widen for itself
    model, texts = npgpt.load(tmp_path / "float32"), TEXTS * 4
    with processes(2, 1) as pool:
        found = list(score(texts, model, pool, context=64))
        workers = list(pool._processes)
        if os.path.exists(f"/proc/{workers[0]}/smaps"):
            mapped = [memory(worker, "float32/model.safetensors") for worker in workers]
            whole = model.files[0].stat().st_size / 1024
            # a window of 64 leaves most of wpe unread
            assert all(size["Rss"] > 0.8 * whole for size in mapped), "no worker has mapped the weights"
            assert all(size["Private_Dirty"] == 0 for size in mapped)
            # shared with this process, too: no worker's share is more than a half
            assert all(size["Pss"] <= 0.55 * size["Rss"] for size in mapped)
    for one, other in zip(found, score(texts, model, context=64), strict=True):
        # to the last bit where both have as many threads; OpenBLAS may cut a product in other places for one
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=0, atol=1e-5)
    wait_for_the_end(workers)


def memory(process: int, file: str) -> dict[str, int]:
    """Return the kilobytes of a file's mappings in a process."""
    sums = {"Rss": 0, "Pss": 0, "Private_Dirty": 0}
    inside = False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        key, *values = line.split()
        if not key.endswith(":"):
            inside = line.endswith(file)
        elif inside and key[:-1] in sums:
            sums[key[:-1]] += int(values[0])
    return sums


def test_a_killed_worker_is_told() -> None:
    with processes(2, 1) as pool:
        found = score(TEXTS * 50, AUSTEN, pool)
        next(found)
        os.kill(next(iter(pool._processes)), signal.SIGKILL)
        with pytest.raises(BrokenProcessPool):
            list(found)


def test_an_error_ends_workers_whatever_they_are_at() -> None:
    """Otherwise it would wait for them, here a minute."""
    futures: list[Future[None]] = []

    def fail() -> None:
        with processes(1, 1) as pool:
            futures.append(pool.submit(time.sleep, 60))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert isinstance(futures[0].exception(), BrokenProcessPool)


def test_workers_share_the_cores() -> None:
    with processes(2) as pool:
        assert pool.submit(os.getenv, "OPENBLAS_NUM_THREADS").result() == str(max(1, cores() // 2))


def test_processes_leave_the_environment_alone() -> None:
    before = dict(os.environ)
    with processes(1, 3) as pool:
        assert pool.submit(os.getenv, "OPENBLAS_NUM_THREADS").result() == "3"
    assert dict(os.environ) == before


def changed(model: LanguageModel, name: str, rows: slice) -> LanguageModel:
    """Return the model with some rows of a parameter set to zero, only in memory."""
    arrays = dict(parameters.to_arrays(model.parameters))
    arrays[name] = arrays[name].copy()
    arrays[name][rows] = 0
    return replace(model, parameters=parameters.from_arrays(model.config, arrays))


def test_a_model_goes_to_another_process_as_its_file() -> None:
    model = npgpt.load(dtype="float64")
    content = pickle.dumps(SharedModel(model))
    assert len(content) < 1000
    again = pickle.loads(content).open()
    assert again.config == model.config
    np.testing.assert_array_equal(again([1, 2, 3]), model([1, 2, 3]))
    assert pickle.loads(content).open() is again  # not loaded for each piece of work
    assert SharedModel(model).open() is model


@pytest.mark.parametrize("name", ["h.3.attn.c_proj.weight", "wte.weight", "ln_f.bias"])
def test_every_value_of_the_weights_is_in_the_fingerprint(name: str) -> None:
    model = npgpt.load()
    assert model.fingerprint == npgpt.load().fingerprint
    assert model.fingerprint != npgpt.load(dtype="float64").fingerprint
    assert model.fingerprint != changed(model, name, slice(-1, None)).fingerprint


def test_a_model_that_was_changed_is_not_scored_as_its_file() -> None:
    """One head of one block is zeroed, which the first values of parameters do not show."""
    model = npgpt.load()
    other = changed(model, "h.3.attn.c_proj.weight", slice(160, 192))
    assert next(score(TEXTS, other)).totals.nll != next(score(TEXTS, model)).totals.nll
    with (
        processes(1, 1) as pool,
        pytest.raises(NpgptError, match=r"does not have the weights of .* was changed in memory"),
    ):
        next(score(TEXTS, other, pool))


def test_another_file_there_is_told(tmp_path: Path) -> None:
    model = npgpt.load(dtype="float64")
    npgpt.save(AUSTEN, tmp_path / "one")
    content = pickle.dumps(SharedModel(npgpt.load(tmp_path / "one")))
    npgpt.save(changed(AUSTEN, "ln_f.bias", slice(-1, None)), tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "one" / "model.safetensors")
    with pytest.raises(NpgptError, match="does not have the weights of the model to be used"):
        pickle.loads(content).open()
    (tmp_path / "one" / "model.safetensors").unlink()
    with pytest.raises(NpgptError, match="does not exist"):
        pickle.loads(content).open()
    assert model.source is not None


def test_a_model_of_no_file_stays_here() -> None:
    model = npgpt.load()
    mine = replace(model, name="mine", source=None)
    same(score(TEXTS, mine, ThreadPoolExecutor(2)), score(TEXTS, model))
    with processes(1, 1) as pool, pytest.raises(NpgptError, match=r"mine is not in a file .*: npgpt\.save"):
        next(score(TEXTS, mine, pool))


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("Emma", {}, r"texts must be in a list or another iterable: pass a single one as \[text\]"),
        ([""], {}, "text 0 is empty: there is nothing to score"),
        (["Emma", ""], {"names": ["a.txt", "b.txt"]}, "b.txt is empty"),
        (
            ["and"],
            {"end_of_text": False},
            r"text 0 has too few tokens to score any, 1: .*needs 2, or <\|endoftext\|> before it",
        ),
        (["and"], {"convention": "llama.cpp"}, "needs a full window of 256"),
        (["\ud800"], {}, "lone surrogate"),
        ([iter(["Emma", "\ud800"])], {}, "lone surrogate"),
        ([iter([b"Emma"])], {}, "a part of a text must be a str, not bytes"),
        ([iter([])], {}, "text 0 is empty"),
        ([b"Emma"], {}, "text 0 must be integers"),
        ([["Emma"]], {}, "text 0 must be integers"),
        (["Emma"], {"top": -1}, "top, .* at least 0, not -1"),
        (["Emma"], {"top": 4097}, "top, .* at most 4096, not 4097"),
        (["Emma"], {"stride": 257}, "a stride of 257 skips tokens: use at most 256"),
    ],
)
def test_what_cannot_be_scored(texts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(NpgptError, match=message):
        list(score(texts, AUSTEN, **options))


def test_wrong_arguments_are_told_at_once() -> None:
    with pytest.raises(NpgptError, match="stride"):
        score([], AUSTEN, stride=0)


def test_broken_weights_are_told() -> None:
    model = npgpt.load(dtype="float64")
    ln_f = model.parameters.ln_f
    weights = model.parameters._replace(ln_f=ln_f._replace(bias=ln_f.bias * np.nan))
    broken = replace(model, parameters=weights)
    with pytest.raises(NpgptError, match="logits are not finite"):
        list(score(["Emma"], broken))
