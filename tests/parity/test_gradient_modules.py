"""Real modules run backwards: their own loss or npgpt's, every style and precision, and left as they were."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt.errors import NpgptError
from npgpt.oracle import losses
from npgpt.oracle.report import Report
from npgpt.testing import assert_matches
from tests.support.models import random_arrays, random_ids, small

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("few_mistakes")]
torch = pytest.importorskip("torch", reason="extra parity is not installed")
transformers = pytest.importorskip("transformers", reason="extra parity is not installed")
foreign = pytest.importorskip("tests.support.foreign", reason="extra parity is not installed")
nanogpt = pytest.importorskip("tests.support.nanogpt", reason="extra parity is not installed")
functional = torch.nn.functional

CONFIG = small(n_embd=16, n_head=4)
ARRAYS = random_arrays(CONFIG)
IDS = random_ids(CONFIG, (2, 7))
TARGETS = random_ids(CONFIG, (2, 7), seed=1)
TARGETS[0, 2] = -100
GRADIENTS = 28  # parameters of two blocks, the head tied
BUILT = "Its loss is npgpt's own, the mean cross-entropy of its logits: how it is trained is not checked."


def cross_entropy(logits: Any, targets: Any, **options: Any) -> Any:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), **options)


class Learning(nanogpt.GPT):  # type: ignore[misc, name-defined]
    """nanoGPT with its loss: without targets it returns the last position alone."""

    def loss(self, logits: Any, targets: Any) -> Any:
        return cross_entropy(logits, targets, ignore_index=-1)

    def forward(self, idx: Any, targets: Any = None) -> Any:
        logits, _ = super().forward(idx)
        return (logits[:, [-1]], None) if targets is None else (logits, self.loss(logits, targets))


def learning(loss: Any = None, **options: Any) -> Any:
    """Return nanoGPT with another loss of logits and targets, which are −1 where nothing is to be predicted."""
    model: Any = Learning(CONFIG, **options)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in named.items():
            array = ARRAYS[name.removeprefix("transformer.").replace("lm_head", "wte")]
            parameter.copy_(torch.from_numpy(np.array(array.T if name.endswith(nanogpt.LINEAR) else array)))
    if loss is not None:
        model.loss = loss
    return model.eval()


def stages(report: Report) -> list[str]:
    return [row.stage for row in report.rows]


@pytest.mark.parametrize("style", foreign.STYLES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_right_module_matches_backwards(style: str, dtype: str) -> None:
    module = foreign.build(style, CONFIG, ARRAYS).to(getattr(torch, dtype))
    report = npgpt.check(module, IDS, gradients=True)
    assert report.matches, str(report)
    untied = module.out_head.weight is not module.tok_emb.weight if style == "llms-from-scratch" else False
    seen = stages(report)
    assert len([name for name in seen if name.startswith("d.") and name.endswith(("weight", "bias"))]) == (
        GRADIENTS + untied
    )
    assert {"loss", "d.logits", "d.h.1", "d.h.0.mlp.act", "d.h.0.attn.residual", "d.embedding"} <= set(seen)
    own = "Its own loss is checked, forward(labels=…) with labels that are the ids themselves"
    assert any(note.startswith(own) if style == "transformers" else note == BUILT for note in report.notes)


@pytest.mark.parametrize("style", foreign.STYLES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_loss_backward_leaves_matches(style: str, dtype: str) -> None:
    """A training step of the user's own, with the last token's target, too."""
    module = foreign.build(style, CONFIG, ARRAYS).to(getattr(torch, dtype))
    output = module(torch.from_numpy(IDS))
    logits = output.logits if hasattr(output, "logits") else output[0] if isinstance(output, tuple) else output
    loss = cross_entropy(logits.float(), torch.from_numpy(TARGETS))
    loss.backward()
    theirs = {"loss": loss, **{name: parameter.grad for name, parameter in module.named_parameters()}}
    assert_matches(theirs, IDS, module, targets=TARGETS, dtype=dtype)
    theirs["loss"] = loss / 2
    assert not npgpt.check(theirs, IDS, module, targets=TARGETS, dtype=dtype).matches


@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "mask": True}, {"mingpt": True}], ids=["torch's", "mask", "minGPT"]
)
def test_nanogpt_s_own_loss_is_checked(options: dict[str, Any]) -> None:
    report = npgpt.check(learning(**options), IDS, targets=TARGETS)
    assert report.matches, str(report)
    assert "Its own loss is checked, forward(targets=…), with -1 where nothing is to be predicted." in report.notes
    shape = next(row for row in report.rows if row.stage == "logits").difference
    assert shape.ratio <= 1


def test_minus_100_is_used_where_the_module_expects_it() -> None:
    report = npgpt.check(learning(cross_entropy), IDS, targets=TARGETS)
    assert report.matches, str(report)
    assert "Its own loss is checked, forward(targets=…)." in report.notes


WRONG: dict[str, Callable[[Any, Any], Any]] = {
    "summed": lambda logits, targets: cross_entropy(logits, targets, ignore_index=-1, reduction="sum"),
    "counted": lambda logits, targets: cross_entropy(logits, targets.clamp(min=0)),
    "shifted twice": lambda logits, targets: cross_entropy(logits[:, :-1], targets[:, 1:], ignore_index=-1),
    "over all": lambda logits, targets: cross_entropy(logits, targets, ignore_index=-1, reduction="sum") / IDS.size,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_loss_of_its_own_is_seen(name: str) -> None:
    report = npgpt.check(learning(WRONG[name]), IDS, targets=TARGETS)
    assert report.first is not None
    assert report.first.stage == "loss", str(report)


def test_labels_cannot_state_what_follows_the_last_token() -> None:
    report = npgpt.check(foreign.build("transformers", CONFIG, ARRAYS), IDS, targets=TARGETS)
    assert report.matches, str(report)
    assert BUILT.replace("logits:", "logits, since its labels cannot state the last token's target:") in report.notes


@pytest.mark.parametrize("mode", ["", "no_grad", "inference_mode"])
@pytest.mark.parametrize("broken", [False, True])
def test_the_module_is_left_as_it_was(mode: str, broken: bool) -> None:
    def fails(logits: Any, targets: Any) -> Any:
        raise RuntimeError("no luck")

    module = learning(fails if broken else None).train()
    parameters = list(module.parameters())
    for place, parameter in enumerate(parameters):
        parameter.grad = None if place % 2 else torch.full_like(parameter, place)
    parameters[3].requires_grad_(False)
    stepped: list[int] = []
    parameters[0].register_post_accumulate_grad_hook(lambda parameter: stepped.append(1))
    grads = [(parameter.grad, None if parameter.grad is None else parameter.grad.clone()) for parameter in parameters]
    values = [parameter.detach().clone() for parameter in parameters]
    with getattr(torch, mode)() if mode else nullcontext():
        if broken:
            with pytest.raises(NpgptError, match="Learning, run with its loss backwards, raises RuntimeError: no luck"):
                npgpt.check(module, IDS, targets=TARGETS)
        else:
            report = npgpt.check(module, IDS, targets=TARGETS)
            assert report.problems == ["no gradient for h.0.ln_1.bias: frozen (requires_grad is False)"]
            assert report.first is None, str(report)
    assert not stepped
    for parameter, (grad, copied), value in zip(parameters, grads, values, strict=True):
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, copied)
        assert torch.equal(parameter, value)
    assert [parameter.requires_grad for parameter in parameters] == [place != 3 for place in range(len(parameters))]
    assert all(part.training and not part._forward_hooks and not part._forward_pre_hooks for part in module.modules())


def test_a_fresh_model_is_perturbed_backwards_too() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 4}
    module = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    report = npgpt.check(module, IDS, gradients=True)
    assert report.matches, str(report)
    assert not any(parameter.any() for name, parameter in module.named_parameters() if name.endswith("bias"))


def test_frozen_and_detached_parameters_are_told() -> None:
    module = foreign.build("transformers", CONFIG, ARRAYS)
    module.transformer.wpe.requires_grad_(False)
    (problem,) = npgpt.check(module, IDS, gradients=True).problems
    assert problem == "no gradient for wpe.weight: frozen (requires_grad is False)"
    module.requires_grad_(False)
    with pytest.raises(NpgptError, match="every parameter is frozen"):
        npgpt.check(module, IDS, gradients=True)
    module = learning()
    module.transformer.h[0].mlp.register_forward_hook(lambda part, given, output: output.detach())
    report = npgpt.check(module, IDS, gradients=True)
    assert report.problems[0].startswith("the loss does not depend on h.0.ln_2.weight, h.0.ln_2.bias")
    assert not report.matches
    with pytest.raises(NpgptError, match="the loss is detached"):
        npgpt.check(
            learning(lambda logits, targets: cross_entropy(logits, targets, ignore_index=-1).detach()),
            IDS,
            gradients=True,
        )


@pytest.mark.parametrize("reduction", ["none"])
def test_a_loss_that_is_not_one_number_is_refused(reduction: str) -> None:
    module = learning(lambda logits, targets: cross_entropy(logits, targets, ignore_index=-1, reduction=reduction))
    with pytest.raises(NpgptError, match=r"Learning\.forward\(targets=…\) returns .*\[14\], and no loss of one number"):
        npgpt.check(module, IDS, gradients=True)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda module: torch.compile(module, backend="aot_eager")])
def test_wrapped_modules_are_run_backwards(wrap: Callable[[Any], Any]) -> None:
    report = npgpt.check(wrap(learning()), IDS, targets=TARGETS)
    assert report.matches, str(report)
    assert any(note.startswith("Its own loss is checked") for note in report.notes)
    assert (losses.EAGER in report.notes) == (wrap is not torch.nn.DataParallel)
    assert len([name for name in stages(report) if name.endswith(("weight", "bias"))]) == GRADIENTS


class Checkpointed(torch.nn.Module):  # type: ignore[misc, name-defined]
    """A block whose intermediates are computed again for the backward pass."""

    def __init__(self, block: Any, use_reentrant: bool) -> None:
        super().__init__()
        self._checkpoint_wrapped_module, self.use_reentrant = block, use_reentrant

    def forward(self, *given: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(
            self._checkpoint_wrapped_module, *given, use_reentrant=self.use_reentrant
        )


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks_match_or_are_refused(use_reentrant: bool) -> None:
    module = learning()
    for layer, block in enumerate(module.transformer.h):
        module.transformer.h[layer] = Checkpointed(block, use_reentrant)
    if use_reentrant:
        with pytest.raises(NpgptError, match=r"use_reentrant=False"):
            npgpt.check(module, IDS, gradients=True)
        return
    report = npgpt.check(module, IDS, gradients=True)
    assert report.matches, str(report)
    assert "d.h.0.attn.c_attn" in stages(report)


def test_changes_in_place_do_not_move_a_gradient() -> None:
    """The residual is added into what c_proj returned, whose own gradient torch then no longer computes."""
    module = learning()
    for block in module.transformer.h:
        block.forward = lambda x, cache=None, block=block: (
            block.mlp(block.ln_2(y := block.attn(block.ln_1(x)).add_(x))).mul_(1.0).add_(y)
        )
    report = npgpt.check(module, IDS, gradients=True)
    assert report.matches, str(report)
    assert {"d.h.0.attn.residual", "d.h.0"} <= set(stages(report))


def test_autocast_is_judged_in_its_precision() -> None:
    module = learning()
    own = module.forward

    def cast(idx: Any, targets: Any = None) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return own(idx, targets)

    module.forward = cast
    report = npgpt.check(module, IDS, targets=TARGETS)
    assert report.matches, str(report)
    assert report.dtype == "bfloat16"
    loss = cast(torch.from_numpy(IDS), torch.from_numpy(np.where(TARGETS < 0, -1, TARGETS)))[1]
    loss.backward()
    theirs = {"loss": loss, **{name: parameter.grad for name, parameter in module.named_parameters()}}
    report = npgpt.check(theirs, IDS, module, targets=TARGETS)
    assert report.matches, str(report)


def test_npgpt_s_loss_needs_all_positions() -> None:
    module = nanogpt.filled(CONFIG, ARRAYS)
    own = module.forward
    module.forward = lambda idx: own(idx)[0][:, [-1]]
    with pytest.raises(NpgptError, match=r"its logits are \[2, 1, 40\], but a loss needs all of \[2, 7, 40\]"):
        npgpt.check(module, IDS, gradients=True)


def test_without_torch_a_module_has_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "sys", type("sys", (), {"modules": {}}))
    with pytest.raises(NpgptError, match="gradients of a module need PyTorch"):
        npgpt.check(learning(), IDS, gradients=True)
