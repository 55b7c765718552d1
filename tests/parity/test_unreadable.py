"""check refuses or compares damaged files of the real torch and safetensors."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.damage import IDS, LOGITS, ONE, damaged, damaged_within, outcome, without_comparing

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.parity

LOGITS_AND_IDS = {"logits": torch.tensor(LOGITS), "input_ids": torch.tensor(IDS)}


@pytest.mark.parametrize("kind", ["dictionary", "tensor", "tuple", "bfloat16", "safetensors"])
def test_damaged_files_of_torch_are_refused_or_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path, logits = without_comparing(tmp_path, monkeypatch) / "theirs", LOGITS_AND_IDS["logits"]
    values = {"dictionary": LOGITS_AND_IDS, "tensor": logits, "tuple": (logits, None), "bfloat16": logits.bfloat16()}
    if kind == "safetensors":
        safetensors.save_file(LOGITS_AND_IDS, path)
    else:
        torch.save(values[kind], path)
    whole = path.read_bytes()
    assert outcome(path.name, *ONE)[0] == 1
    for seed in range(150):
        rng = random.Random(f"{kind} {seed}")
        inside = kind != "safetensors" and rng.random() < 0.7
        path.write_bytes((damaged_within if inside else damaged)(whole, rng))
        outcome(path.name, *ONE)
