"""The documents' examples with PyTorch modules and Dask run as printed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt import parameters
from npgpt.language_model import LanguageModel
from npgpt.oracle.report import Report
from npgpt.testing import assert_matches
from tests.support import backward, documents
from tests.support.austen import AUSTEN
from tests.support.models import no_text, random_arrays, small

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="extra parity is not installed")
foreign = pytest.importorskip("tests.support.foreign", reason="llms-from-scratch 1.0.19 is not installed")
distributed = pytest.importorskip("distributed", reason="extra cluster is not installed")

MISTAKE = "heads merged without transpose"
BLOCKS = [block for path in documents.RUN for block in documents.blocks(path) if block.needs_parity]


@pytest.fixture
def names(tmp_path: Path) -> dict[str, Any]:
    """Return the names that documents assume: the book's GPT-2 with a mistake, correct arrays, and parts of others."""
    documents.lay_out(tmp_path)
    gpt2 = npgpt.load(tmp_path / "weights" / "gpt2")
    arrays = parameters.to_arrays(gpt2.parameters)
    found: dict[str, Any] = {}
    gpt2([464, 3290], record=found.__setitem__)
    wide = small(n_embd=36, n_head=12)
    return {
        "npgpt": npgpt,
        "model": foreign.build("llms-from-scratch", gpt2.config, arrays, [MISTAKE]),
        "logits": found["logits"],
        "a": found["h.0.attn.c_attn"],
        "b": found["h.0"],
        "my_logits": gpt2,
        "theirs": trained("attention's backward without the scale"),
        "attention_module": foreign.build("nanogpt", wide, random_arrays(wide)).transformer.h[0].attn,
        "texts": ["It is a truth", "universally acknowledged"],
    }


def trained(mistake: str) -> dict[str, Any]:
    """Return the loss and the parameters' gradients of a program in the manner of llm.c, with a mistake."""
    edits = next(each.edits for each in backward.read()["c_like"] if each.truth == mistake)
    ids = np.array([AUSTEN.encode_prompt("Every effort moves you")])
    targets = np.concatenate([ids[:, 1:], [[-100]]], axis=1)
    arrays = parameters.to_arrays(AUSTEN.parameters)
    found = backward.load("c_like", edits).run(arrays, AUSTEN.config, ids, targets)
    return {name: array for name, array in found.items() if name == "loss" or name.endswith((".weight", ".bias"))}


@pytest.fixture
def scheduler() -> Iterator[str]:
    """Return the address of a cluster on this machine."""
    with distributed.LocalCluster(n_workers=1, processes=True, dashboard_address=None, host="127.0.0.1") as cluster:
        yield cluster.scheduler_address


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.shown], ids=str)
def test_a_report_is_as_it_is_shown(block: documents.Block, names: dict[str, Any], tmp_path: Path) -> None:
    assert block.agrees(printed := documents.run(block, tmp_path, names)), printed


@pytest.mark.parametrize("block", [block for block in BLOCKS if "npgpt.check(logits" in block.text], ids=str)
def test_every_form_of_a_call(
    block: documents.Block, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call finds the difference of the module with the mistake, and a match for everything else."""
    monkeypatch.chdir(tmp_path)
    reports = []
    for line in block.text.splitlines():
        if line.startswith("npgpt."):
            reports.append((line, eval(line, names)))
        elif line.startswith("assert_matches"):
            with pytest.raises(AssertionError, match=MISTAKE[:5]):
                exec(line, names)
        else:
            exec(line, names)
    assert len(reports) >= 4
    for line, report in reports:
        if isinstance(report, Report):
            assert report.matches != ("(model" in line), f"{line}\n{report}"
            assert report.matches or report.names == [MISTAKE], f"{line}\n{report}"


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if "gradients=True" in block.text and not block.shown], ids=str
)
def test_every_form_of_a_backward_call(block: documents.Block) -> None:
    """Of a small model that is right, since the gradients of a large vocabulary take long."""
    config = small(n_embd=16, n_head=4)
    arrays = random_arrays(config)
    reference = LanguageModel("reference", config, parameters.from_arrays(config, arrays), no_text("none"))
    model = foreign.build("nanogpt", config, arrays)
    ids, targets = torch.tensor([[3, 1, 4]]), torch.tensor([[1, 5, -100]])
    names = {
        "npgpt": npgpt,
        "assert_matches": assert_matches,
        "reference": reference,
        "model": model,
        "ids": ids,
        "targets": targets,
        "loss": torch.nn.functional.cross_entropy(model(ids)[0][0], targets[0]),
        "step": lambda ids, targets: {"loss": npgpt.loss(reference.parameters, config, ids, targets)},
    }
    text = block.text.replace('"gpt2"', "reference").replace('"Every effort moves you"', "ids")
    for line in text.splitlines():
        if line.startswith("npgpt.check("):
            report = eval(line, names)
            assert report.matches, f"{line}\n{report}"
        else:
            exec(line, names)


@pytest.mark.parametrize("block", [block for block in BLOCKS if "distributed" in block.text], ids=str)
def test_a_cluster(block: documents.Block, names: dict[str, Any], tmp_path: Path, scheduler: str) -> None:
    here = replace(block, text=block.text.replace('"scheduler:8786"', repr(scheduler)))
    assert len(documents.run(here, tmp_path, names).splitlines()) == 2
    names["Client"].current().close()
