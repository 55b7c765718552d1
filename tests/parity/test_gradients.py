"""Gradients against torch's autograd on transformers' GPT2LMHeadModel, for every parameter."""

from __future__ import annotations

import numpy as np
import pytest

from npgpt import parameters
from npgpt.config import PUBLISHED, Config
from npgpt.gradients import loss_and_gradients
from npgpt.parameters import Array
from tests.support.models import SHAPES, random_arrays, random_ids
from tests.support.tolerances import largest_difference, relative_error, rounding_bound
from tests.support.verification import Report

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="extra parity is not installed")
pytest.importorskip("transformers", reason="extra parity is not installed")
peers = pytest.importorskip("tests.support.peers", reason="llms-from-scratch 1.0.19 is not installed")

Ids = np.typing.NDArray[np.int64]
FLOAT64 = 1e-10  # of a tensor's scale, its largest value
IGNORED = -100


def autograd(config: Config, arrays: dict[str, Array], ids: Ids, targets: Ids) -> tuple[float, dict[str, Array]]:
    """Return torch's loss and its gradient with respect to every parameter, by canonical name.

    The model's own loss is not used, because transformers computes it in float32.
    """
    model = peers.transformers_model(config, arrays)
    logits = model(torch.from_numpy(ids), use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten())
    loss.backward()
    named = {name.removeprefix("transformer."): tensor.grad.numpy() for name, tensor in model.named_parameters()}
    return loss.item(), {name: named[name] for name in arrays}


def some_targets(config: Config, shape: tuple[int, int]) -> Ids:
    """Return random targets, a fifth of them ignored."""
    targets = random_ids(config, shape, seed=1)
    targets.flat[::5] = IGNORED
    targets[0, -1] = 3
    return targets


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [(1, 1), (3, 24)])
def test_float64(shape: str, rows: tuple[int, int], difference: Report) -> None:
    config = SHAPES[shape]
    arrays, ids, targets = random_arrays(config), random_ids(config, rows), some_targets(config, rows)
    value, found = loss_and_gradients(parameters.from_arrays(config, arrays), config, ids, targets)
    theirs, expected = autograd(config, arrays, ids, targets)
    assert value == pytest.approx(theirs, rel=1e-14)
    for name, array in parameters.to_arrays(found).items():
        assert expected[name].dtype == np.float64
        if rows == (1, 1) and np.abs(expected[name]).max() < 1e-15:  # one key: attention's weight is 1, whatever it is
            assert np.abs(array).max() < 1e-15
            continue
        error = largest_difference(array, expected[name])
        difference("gradients", "torch's autograd on transformers: every parameter", "float64", error)
        assert error < FLOAT64, name


@pytest.mark.parametrize("shape", SHAPES)
def test_float32(shape: str, difference: Report) -> None:
    """Each of the two is within the bound of the gradients in float64; see gradient_bound."""
    config, rows = SHAPES[shape], (3, 24)
    ids, targets = random_ids(config, rows), some_targets(config, rows)
    single = random_arrays(config, dtype="float32")
    _, truth = loss_and_gradients(parameters.from_arrays(config, random_arrays(config)), config, ids, targets)
    _, mine = loss_and_gradients(parameters.from_arrays(config, single), config, ids, targets)
    _, theirs = autograd(config, single, ids, targets)
    bound = gradient_bound(config, *rows)
    exact = parameters.to_arrays(truth)
    for name, array in parameters.to_arrays(mine).items():
        error = relative_error(array, exact[name])
        difference("gradients", "torch's autograd on transformers: every parameter", "float32", error)
        assert error <= bound, name
        assert relative_error(theirs[name], exact[name]) <= bound, name


def gradient_bound(config: Config, rows: int, tokens: int) -> float:
    """Return the relative root-mean-square error that float32's rounding explains in any gradient.

    The forward pass has N roundings between ids and logits (tests/support/tolerances.py). The backward pass goes the
    same way back with the same sums, and every product of it has a factor from the forward pass with its error: 2 N in
    all on the way to a stage, and as many again because softmax and LayerNorm subtract means, which leaves an error
    that belongs to what was subtracted. The gradient of a parameter is a sum over B T tokens.
    """
    roundings = rounding_bound(config, tokens, "float64") ** 2 / (np.finfo("float64").eps / 2) ** 2
    return float(np.finfo("float32").eps / 2 * np.sqrt(4 * roundings + rows * tokens))


def test_gpt2s_own_shape(difference: Report) -> None:
    """124 million parameters in float64, once."""
    config = PUBLISHED["gpt2"]
    arrays, ids = random_arrays(config), random_ids(config, (1, 64))
    targets = some_targets(config, (1, 64))
    _, expected = autograd(config, arrays, ids, targets)
    _, found = loss_and_gradients(parameters.from_arrays(config, arrays), config, ids, targets)
    for name, array in parameters.to_arrays(found).items():
        error = largest_difference(array, expected[name])
        difference("gradients", "the same at gpt2's size", "float64", error)
        assert error < FLOAT64, name
