"""Comparison with recorded results of transformers and LLMs-from-scratch, written by tests/golden/make.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from npgpt import parameters
from npgpt.model import forward
from npgpt.parameters import Array
from tests.golden.make import CASES
from tests.support.models import from_dict
from tests.support.tolerances import largest_difference, relative_error, rounding_bound

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_golden(case: str, dtype: str) -> None:
    with np.load(GOLDEN / f"{case}.npz") as file:
        golden = dict(file)
    config = from_dict(json.loads(str(golden["config"])))
    weights = {name.removeprefix("weights/"): array for name, array in golden.items() if name.startswith("weights/")}
    p = parameters.from_arrays(config, {name: array.astype(dtype) for name, array in weights.items()})
    record: dict[str, Array] = {}
    forward(p, config, golden["ids"], record=record.__setitem__)
    stages = [name for name in golden if name.startswith(("transformers/", "llms_from_scratch/"))]
    assert len(stages) >= 2 * config.n_layer + 2
    for stage in stages:
        ours, theirs = record[stage.split("/", 1)[1]], golden[stage]
        assert theirs.dtype == np.float64
        if dtype == "float64":
            assert largest_difference(ours, theirs) < 1e-10, stage
        else:
            assert relative_error(ours, theirs) < rounding_bound(config, golden["ids"].shape[1], "float32"), stage
