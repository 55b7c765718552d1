"""Numbers that others published for the real weights; skipped, with the reason, if the weights are missing."""

from __future__ import annotations

import numpy as np
import pytest

import npgpt
from npgpt.errors import NpgptError
from npgpt.language_model import LanguageModel
from npgpt.model import forward


def published(name: str, dtype: str = "float32") -> LanguageModel:
    try:
        return npgpt.load(name, dtype=dtype)
    except NpgptError as error:
        pytest.skip(f"the published {name} is needed: {error}")


# transformer-explainer, src/constants/examples: prompts' ids, the most likely next ids, their logits. That port of
# gpt2 uses the erf form of GELU, and so does this test.
EXPLAINER = [
    ([6601, 32704, 795, 30132, 2985, 284], [(38350, -135.9131622), (2251, -136.6836090)]),
    ([8001, 9542, 9345, 318, 25449, 262], [(835, -100.8785248), (995, -101.0487823)]),
    ([1722, 262, 40663, 373, 13885, 262], [(5440, -92.8636475)]),
    ([2202, 262, 36043, 5440, 484, 5071, 257], [(6283, -89.0185852)]),
    ([40, 31909, 50035, 4495, 11330, 262], [(6817, -93.2509690)]),
]


@pytest.mark.parametrize(("ids", "expected"), EXPLAINER)
def test_transformer_explainer(ids: list[int], expected: list[tuple[int, float]]) -> None:
    model = published("gpt2")
    config = npgpt.Config(**{**model.config.__dict__, "activation_function": "gelu"})
    logits = forward(model.parameters, config, ids, logits_from=-1)[0, 0]
    assert np.argsort(-logits)[: len(expected)].tolist() == [token_id for token_id, _ in expected]
    for token_id, value in expected:
        assert logits[token_id] == pytest.approx(value, abs=1e-3)


def test_transformers_greedy_continuation() -> None:
    """The text is in transformers' tests/models/gpt2."""
    model = published("gpt2")
    expected = [
        464,
        3290,
        373,
        1043,
        287,
        257,
        2214,
        1474,
        262,
        16246,
        286,
        2688,
        290,
        2688,
        27262,
        13,
        198,
        198,
        464,
        3290,
    ]
    steps = model.steps(expected[:2], max_tokens=18, sampling=npgpt.Sampling(temperature=0))
    assert expected[:2] + [step.token_id for step in steps if step.token_id is not None] == expected


@pytest.mark.parametrize(
    ("name", "prompt", "continuation"),
    [
        (  # picoGPT's README
            "gpt2",
            "Alan Turing theorized that computers would one day become",
            " the most powerful machines on the planet.",
        ),
        ("gpt2-medium", "Hello.", " I'm a little late to the party, but"),  # tinygrad, examples/gpt2.py
    ],
)
def test_greedy_text(name: str, prompt: str, continuation: str) -> None:
    model = published(name)
    count = len(model.tokenizer.encode(continuation))
    assert "".join(model.generate(prompt, max_tokens=count, temperature=0)) == continuation


def test_log_likelihood_of_the_evaluation_harness() -> None:
    """The value is in lm-evaluation-harness's tests/test_models.py, asserted to a relative 1e-3."""
    model = published("gpt2")
    text = "We study empirical scaling laws for language model performance on the cross-entropy loss."
    ids = model.tokenizer.encode(text)
    assert len(ids) == 17
    logits = model([50256, *ids])[0, :-1].astype(np.float64)
    log_probabilities = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_probabilities -= logits.max(-1, keepdims=True)
    assert float(log_probabilities[np.arange(17), ids].sum()) == pytest.approx(-95.00736, rel=1e-3)
