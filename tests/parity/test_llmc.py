"""llm.c's reference state as PyTorch makes it: logits, loss, every gradient, and ten steps of AdamW."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import npgpt
from npgpt import parameters, tracing
from tests.support import writers
from tests.support.austen import AUSTEN, CARD_IDS
from tests.support.command import ROOT
from tests.support.tolerances import relative_error, rounding_bound

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="extra parity is not installed")
pytest.importorskip("transformers", reason="extra parity is not installed")
peers = pytest.importorskip("tests.support.peers", reason="llms-from-scratch 1.0.19 is not installed")


def test_the_state_and_the_ten_losses_of_the_manual(tmp_path: Path) -> None:
    """train_gpt2.py writes PyTorch's numbers, and test_gpt2.c updates by AdamW's defaults: rate 1e-4, decay 0.01."""
    tracing.write_llmc(tmp_path / "d", AUSTEN, CARD_IDS, 1, 11)
    arrays = parameters.to_arrays(npgpt.load(tmp_path / "d" / "gpt2_124M.bin").parameters)
    model = peers.transformers_model(AUSTEN.config, arrays)
    ids, targets = torch.tensor([CARD_IDS[:-1]]), torch.tensor([CARD_IDS[1:]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    losses: list[float] = []
    for step in range(10):
        logits = model(ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            named = {name.removeprefix("transformer."): p.grad.numpy() for name, p in model.named_parameters()}
            gradients = writers.llmc(AUSTEN.config, {name: named[name] for name in arrays})[1024:]
            expected = [logits.detach().numpy().reshape(-1), np.array([loss.item()]), np.frombuffer(gradients, "<f4")]
        optimizer.step()
    content = np.fromfile(tmp_path / "d" / "gpt2_124M_debug_state.bin", "<f4")[256 + 2 * 11 :]
    parts = np.split(content, np.cumsum([array.size for array in expected])[:-1])
    # gradients have twice the forward pass's bound (test_gradients.py, gradient_bound), and both results are rounded
    bound = 4 * rounding_bound(AUSTEN.config, 11, np.float32)
    for what, found, theirs in zip(("logits", "loss", "gradients"), parts, expected, strict=True):
        assert relative_error(found, theirs) < bound, what
    manual = (ROOT / "docs" / "checking.md").read_text("utf-8")
    (shown,) = re.findall(r"^```text\n((?:\d\.\d{3}, ?){10})$", manual, re.MULTILINE)
    # three digits are shown, and a loss in float32 moves by less than another half of the last of them
    assert [float(number) for number in shown.split(",")[:-1]] == pytest.approx(losses, abs=1e-3)
