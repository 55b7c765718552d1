"""The port computes what GPT-2 does, from one function to the loaded model."""

from pathlib import Path

import gpt
import pytest

import npgpt
from npgpt.testing import assert_matches


def test_gelu() -> None:
    report = npgpt.check_part("gelu", gpt.MLP(8).act)
    assert report.matches, str(report)


def test_attention() -> None:
    report = npgpt.check_part("attention", gpt.Attention(n_embd=24, n_head=3))
    assert report.matches, str(report)


def test_a_fresh_model() -> None:
    """Compare with GPT-2 of the same random weights: needs no file, and finds every mistake but those of loading."""
    model = gpt.GPT(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=3)
    assert_matches(model, [[7, 3, 3, 49, 0, 12]])


def test_a_training_step() -> None:
    """The loss of the next tokens is run backwards: every parameter's gradient is compared, too."""
    model = gpt.GPT(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=3)
    assert_matches(model, [[7, 3, 3, 49, 0, 12]], gradients=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The embedded model as Hugging Face would publish it; a real suite would use its own checkpoint."""
    npgpt.convert("austen", tmp_path / "austen")
    return tmp_path / "austen"


def test_a_loaded_model(folder: Path) -> None:
    assert_matches(gpt.load(folder), "It is a truth universally acknowledged", folder)
