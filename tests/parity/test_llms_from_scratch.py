"""npgpt and LLMs-from-scratch's GPTModel compute the same logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from npgpt import parameters
from npgpt.config import PUBLISHED, Config
from npgpt.errors import NpgptError
from npgpt.model import forward
from tests.support.models import SHAPES, from_dict, random_arrays, random_ids, small
from tests.support.tolerances import largest_difference, relative_error, rounding_bound
from tests.support.verification import Report

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="extra parity is not installed")
ch04 = pytest.importorskip("llms_from_scratch.ch04", reason="llms-from-scratch 1.0.19 is not installed")
peers = pytest.importorskip("tests.support.peers", reason="extra parity is not installed")

BOOKS = ["3 heads x 7", "1 head", "8 heads x 1", "untied"]  # the shapes that its configuration can express


def logits(config: Config, dtype: str, replace_gelu: bool = False) -> tuple[Any, Any]:
    """Return their logits and ours."""
    arrays, ids = random_arrays(config, dtype=dtype), random_ids(config, (2, min(40, config.n_positions)))
    model = peers.llms_from_scratch_model(config, arrays)
    if replace_gelu:
        for block in model.trf_blocks:
            assert isinstance(block.ff.layers[1], ch04.GELU)
            block.ff.layers[1] = peers.Float64GELU()
    return peers.llms_from_scratch_logits(model, ids), forward(parameters.from_arrays(config, arrays), config, ids)


@pytest.mark.parametrize("shape", BOOKS)
def test_float64_with_its_gelu_in_float64(shape: str, difference: Report) -> None:
    theirs, ours = logits(SHAPES[shape], "float64", replace_gelu=True)
    assert theirs.dtype == np.float64
    error = largest_difference(theirs, ours)
    difference("model", "LLMs-from-scratch: logits, its GELU replaced by one in float64", "float64", error)
    assert error < 1e-10


@pytest.mark.parametrize("shape", BOOKS)
def test_float64_as_shipped(shape: str, difference: Report) -> None:
    error = largest_difference(*logits(SHAPES[shape], "float64"))
    difference("model", "LLMs-from-scratch: logits, as shipped, with √(2/π) in float32", "float64", error)
    assert 1e-10 < error < 1e-7  # only the float32 constant makes a difference


@pytest.mark.parametrize("shape", BOOKS)
def test_float32(shape: str, difference: Report) -> None:
    config = SHAPES[shape]
    (theirs, ours), (_, truth) = logits(config, "float32"), logits(config, "float64")
    bound = rounding_bound(config, 24, "float32")
    assert relative_error(theirs, truth) < bound
    assert relative_error(ours, truth) < bound
    row = "LLMs-from-scratch: logits, as shipped, with √(2/π) in float32"
    difference("model", row, "float32", largest_difference(theirs, ours))


def test_the_books_own_size(difference: Report) -> None:
    """The book's GPT_CONFIG_124M is gpt2 with a context of 256, which saves memory in training."""
    book = {"vocab_size": 50257, "context_length": 256, "emb_dim": 768, "n_heads": 12, "n_layers": 12}
    config = from_dict(book | {"drop_rate": 0.1, "qkv_bias": True})
    theirs, ours = logits(config, "float32")
    error = relative_error(theirs, ours)
    row = "LLMs-from-scratch: logits, gpt2's shape"
    difference("model", row, "float32", largest_difference(theirs, ours))
    assert error < 2 * rounding_bound(config, 40, "float32")


def test_its_divisibility_check_and_ours_agree() -> None:
    size = PUBLISHED["gpt2-xl"]
    with pytest.raises(AssertionError, match="d_out must be divisible by"):
        ch04.MultiHeadAttention(size.n_embd, size.n_embd, 1024, 0.0, num_heads=48)
    with pytest.raises(NpgptError, match=r"1600 / 48 = 33\.33"):
        small(n_embd=1600, n_layer=25, n_head=48)
