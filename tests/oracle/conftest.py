"""What the oracle's tests share."""

from __future__ import annotations

from typing import Any

import pytest

from npgpt.oracle import check, diagnosis
from npgpt.oracle.mistakes import Mistake, catalogue
from tests.support.thorough import THOROUGH

# what the tests that have few mistakes make
MADE = ("ReLU", "erf GELU", "attention scale missing", "n_head 2", "log-softmax given as logits")


@pytest.fixture
def few_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let npgpt.check look for every tenth mistake, for those made here, and for few pairs, where a test is of what is
    read and not of what is named: all take most of a second where nothing explains it. Under thorough it looks for all.
    """

    def few(*arguments: Any) -> list[Mistake]:
        entries = catalogue(*arguments)
        return [entry for number, entry in enumerate(entries) if number % 10 == 0 or entry.name in MADE]

    if not THOROUGH:
        monkeypatch.setattr(check, "catalogue", few)
        monkeypatch.setattr(diagnosis, "MOST_PAIRS", 20)
