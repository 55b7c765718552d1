"""npgpt at Python's prompt: dir(), help() and the repr of results."""

from __future__ import annotations

import pydoc
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import npgpt
from npgpt.checkpoints.inspect import Inspection
from npgpt.text.sampling import Sampling
from tests.support.models import random_parameters, small

AUSTEN = npgpt.load()
PARAMETERS = random_parameters(small(), dtype="float32")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (
            npgpt.LanguageModel("m", small(), PARAMETERS),
            "LanguageModel('m': 2 blocks, 21 = 3 × 7, 24 positions, 40 ids, float32)",
        ),
        (
            npgpt.LanguageModel("m", small(), PARAMETERS, origin="a.pt: torch.save"),
            "LanguageModel('m': 2 blocks, 21 = 3 × 7, 24 positions, 40 ids, float32; a.pt: torch.save)",
        ),
        (npgpt.KVCache(small(), 1, 9), "KVCache(0 of 9 tokens: 2 blocks, 1 row, 3 heads × 7, float32)"),
        (
            PARAMETERS,
            "Parameters(wte=Embedding(weight=float32[40, 21]), wpe=Embedding(weight=float32[24, 21]), h=<2 blocks>, "
            "ln_f=LayerNorm(weight=float32[21], bias=float32[21]), lm_head=Embedding(weight=float32[40, 21]))",
        ),
        (
            PARAMETERS.h[0].mlp,
            "MLP(c_fc=Linear(weight=float32[21, 84], bias=float32[84]), "
            "c_proj=Linear(weight=float32[84, 21], bias=float32[21]))",
        ),
        (npgpt.attend("It is"), "AttentionWeights('austen': all 6 layers, all 6 heads, weights float32[6, 6, 2, 2])"),
        (
            npgpt.attend("It is", layer=2, head=3),
            "AttentionWeights('austen': layer 2, head 3, weights float32[1, 1, 2, 2])",
        ),
        (next(npgpt.score(["It is"])), "Score(2 tokens, 2 scored: perplexity 56.965, 2.3328 bits per byte)"),
        (
            npgpt.check(AUSTEN([1, 2]), [1, 2], AUSTEN),
            "Report(matches: rounding in float32 explains every difference, in 1 stage)",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_repr_says_what_matters(value: object, shown: str) -> None:
    assert repr(value) == shown


def test_no_repr_floods_a_prompt() -> None:
    found = npgpt.inspect()
    assert isinstance(found, Inspection)
    assert repr(found).startswith(
        "Inspection('austen': GPT-2 of 3,505,152 parameters, safetensors, Hugging Face's names; "
    )
    for value in (AUSTEN, AUSTEN.tokenizer, AUSTEN.config, AUSTEN.parameters, found, Sampling()):
        place = str(Path(npgpt.__file__).parents[1])  # however long that is
        assert len(repr(value).replace(place, "")) < 300, type(value)
        assert "\n" not in repr(value)
    assert len(repr(AUSTEN.parameters.h[0])) < 500


@pytest.mark.parametrize(
    "value",
    [npgpt.attend("It is"), next(npgpt.score(["It is"])), npgpt.check(AUSTEN([1, 2]), [1, 2], AUSTEN)],
    ids=lambda value: type(value).__name__,
)
def test_a_result_shows_its_page_in_a_notebook(value: Any) -> None:
    shown = value._repr_html_()
    assert shown.startswith('<iframe srcdoc="&lt;!DOCTYPE html&gt;')
    assert "<script" not in shown


def test_completion_offers_what_is_public_and_no_imports() -> None:
    assert dir(npgpt) == sorted([*npgpt.__all__, "__version__"])
    assert not {"importlib", "annotations", "TYPE_CHECKING"} & {*dir(npgpt)}


def test_help_begins_with_a_table_of_everything_public() -> None:
    """Each name occurs once, and lines leave room for pydoc's indent of four."""
    contents = npgpt.__doc__ or ""
    listed = re.findall(r"^    (\w+)(?:\(.*?\))?  +\S", contents, re.MULTILINE)
    assert sorted(listed) == [*npgpt.__all__]
    assert max(map(len, contents.splitlines())) <= 76
    page = pydoc.plain(pydoc.render_doc(npgpt))
    assert page.index("npgpt.load") < page.index("PACKAGE CONTENTS")
    assert "load(model: 'str | os.PathLike[str] | None' = None" in page


def test_an_unknown_name_is_an_attribute_error() -> None:
    code = "import npgpt; npgpt.lod"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("AttributeError: module 'npgpt' has no attribute 'lod'")
