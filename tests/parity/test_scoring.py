"""Scores, compared with the programs whose conventions they follow."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import npgpt
from npgpt import parameters
from npgpt.language_model import LanguageModel
from npgpt.scoring import windows
from npgpt.scoring.scoring import score
from tests.support.verification import Report, relative

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="extra parity is not installed")
peers = pytest.importorskip("tests.support.peers", reason="llms-from-scratch 1.0.19 is not installed")
lm_eval = pytest.importorskip("lm_eval.utils", reason="lm_eval is not installed (--no-deps is enough)")

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune — or two. " * 14
LOSS = 1e-6  # transformers rounds float64 logits to float32 (u = 6e-8) before its loss, log softmax and mean
FLOAT64 = 1e-11  # for a log-probability near −10; the two models' logits differ by 1e-15


@pytest.fixture(scope="module")
def austen() -> LanguageModel:
    return npgpt.load(dtype="float64")


@pytest.fixture(scope="module")
def theirs(austen: LanguageModel) -> Any:
    return peers.transformers_model(austen.config, parameters.to_arrays(austen.parameters))


@given(st.integers(0, 200), st.integers(2, 40), st.data())
def test_the_windows_of_lm_evaluation_harness(length: int, context: int, data: st.DataObject) -> None:
    """The harness passes a context and a continuation whose last token is never an input."""
    shared = data.draw(st.integers(1, context))  # its context_len
    ids = list(range(length))
    pairs = map(lm_eval.make_disjoint_window, lm_eval.get_rolling_token_windows(ids, -1, context, shared))
    expected = [(before + after[:-1], after) for before, after in pairs]
    rule = windows.Convention(name="rolling", context=context, stride=context - shared + 1, end_of_text=True)
    whole = [-1, *ids]
    found = windows.windows(len(whole), rule)
    assert [(whole[w.begin : w.last - 1], whole[w.first : w.last]) for w in found] == expected


@pytest.mark.parametrize("shared", [1, 129])
def test_the_rolling_log_likelihood_of_lm_evaluation_harness(
    austen: LanguageModel, theirs: Any, shared: int, difference: Report
) -> None:
    ids = austen.tokenizer.encode(TEXT)
    total = 0.0
    for before, after in lm_eval.get_rolling_token_windows(ids, 4095, 256, shared):
        with torch.no_grad():
            log_probs = torch.log_softmax(theirs(torch.tensor([before])).logits[0], dim=-1)
        total += float(log_probs[-len(after) :].gather(1, torch.tensor(after)[:, None]).sum())
    (found,) = score([TEXT], austen, stride=256 - shared + 1)
    assert found.totals.scored == len(ids)
    assert -found.totals.nll == pytest.approx(total, rel=FLOAT64)
    row = "lm-evaluation-harness: rolling log-likelihood over its windows, run by transformers"
    difference("scores", row, "float64", relative(-found.totals.nll, total))
    # its word_perplexity and bits_per_byte; its regex split counts an empty word at the end of this text
    assert found.totals.words == len(TEXT.split()) == len(lm_eval.re.split(r"\s+", TEXT)) - 1
    assert found.totals.bits_per_byte == pytest.approx(-total / len(TEXT.encode()) / math.log(2), rel=FLOAT64)


@pytest.mark.parametrize("stride", [64, 128, 256])
def test_the_perplexity_guide_of_transformers(
    austen: LanguageModel, theirs: Any, stride: int, difference: Report
) -> None:
    """The guide weights a later window's mean by one token too few; with those weights our result equals the guide's.

    Weighted by tokens, as npgpt does it, the result is close.
    """
    ids = torch.tensor([austen.tokenizer.encode(TEXT)])
    length, context = ids.shape[1], 256
    sums, tokens, previous, means = 0.0, 0, 0, []
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - previous)] = -100
        with torch.no_grad():
            loss = float(theirs(ids[:, begin:end], labels=labels).loss)
        weight = int((labels != -100).sum()) - 1
        sums, tokens, previous = sums + loss * weight, tokens + weight, end
        means.append((loss, weight))
        if end == length:
            break
    guide = math.exp(sums / tokens)

    (found,) = score([TEXT], austen, convention="huggingface", stride=stride)
    rule = windows.convention("huggingface", austen.config, stride=stride)
    cut = windows.windows(length, rule)
    ours = [
        (-float(np.mean(found.log_probs[w.first : w.last])), weight) for w, (_, weight) in zip(cut, means, strict=True)
    ]
    for (mine, _), (their_mean, _) in zip(ours, means, strict=True):
        assert mine == pytest.approx(their_mean, rel=LOSS)
    regrouped = math.exp(sum(mean * weight for mean, weight in ours) / tokens)
    assert regrouped == pytest.approx(guide, rel=LOSS)
    row = "Hugging Face's guide: perplexity by its loop, whose loss is float32, weighted as it weights windows"
    difference("scores", row, "float64", relative(regrouped, guide))
    # weights n and n − 1 for a window's mean change the logarithm by less than the means' spread over n
    spread = max(mean for mean, _ in means) - min(mean for mean, _ in means)
    assert abs(math.log(found.perplexity / guide)) <= spread / min(weight for _, weight in means)
