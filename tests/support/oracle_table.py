"""Tabulate the oracle's answers to every known mistake in three foreign implementations.

    python -m tests.support.oracle_table

writes tests/parity/ORACLE.md. A cell is "named", "1 of N" (N entries that the data cannot tell apart), or "not
excluded" if the effect is below five tolerances. Anything else is a failure and is written in capitals.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from npgpt.config import Config
from npgpt.oracle.comparison import compare
from npgpt.oracle.mistakes import Mistake, catalogue
from npgpt.oracle.report import Report
from npgpt.oracle.rounding import CLEAR
from npgpt.oracle.theirs import cases
from npgpt.parameters import Array
from tests.support.models import random_arrays, random_ids, small

from . import foreign, mistakes

TOKENS = 9
PADDED = "vocabulary padded and not masked"
MODELS = {
    "3 blocks, 4 × 6": small(n_embd=24, n_head=4, n_layer=3),
    "2 blocks, 5 × 6": small(n_embd=30, n_head=5, n_layer=2, vocab_size=61, n_positions=20),
}


def entries(config: Config) -> list[Mistake]:
    """Return the catalogue's entries that the foreign implementations can have."""
    names = {*mistakes.names(config), PADDED}
    return [entry for entry in catalogue(config, TOKENS) if entry.name in names]


def evidence(
    style: str, config: Config, arrays: dict[str, Array], names: tuple[str, ...], stages: bool
) -> dict[str, Array]:
    """Return what an implementation with these mistakes gives: all its stages, or only logits."""
    ids = random_ids(config, (1, TOKENS))
    if PADDED in names:  # which shows in log-probabilities alone
        logits = foreign.capture(foreign.build(style, config, arrays, set(names) - {PADDED}), style, ids)["logits"]
        padded = torch.nn.functional.pad(torch.tensor(logits), (0, -config.vocab_size % 64))
        return {"log_probabilities": padded.log_softmax(-1)[..., : config.vocab_size].numpy()}
    seen = foreign.capture(foreign.build(style, config, arrays, names), style, ids)
    if not stages or seen["logits"].shape[1] != TOKENS:  # stages of other tokens are refused before any comparison
        return {"logits": seen["logits"]}
    return {name: array for name, array in seen.items() if not name.startswith(f"h.{config.n_layer}")}


def report(style: str, config: Config, names: tuple[str, ...], stages: bool) -> Report:
    """Return the oracle's report, given the true weights."""
    arrays = random_arrays(config)
    theirs = evidence(style, config, arrays, names, stages)
    return compare(config, arrays, cases(theirs, config, random_ids(config, (1, TOKENS))))


def verdict(found: Report, name: str) -> str:
    """Return a cell of the table, in capitals if it is a failure."""
    strongest = max(row.difference.ratio for row in found.rows)
    for finding in found.diagnosis.findings[:1]:
        if name in [entry.name for entry in finding.mistakes] and found.diagnosis.unexplained is None:
            return "named" if len(finding.mistakes) == 1 else f"1 of {len(finding.mistakes)}"
    if strongest < CLEAR and name in [entry.name for entry in found.diagnosis.left]:
        return f"not excluded ({strongest:.2g})"
    return f"MISSED ({strongest:.2g}): {found.verdict}"


def table() -> Iterator[str]:
    """Return the whole file."""
    yield "# Every known mistake, in three foreign implementations"
    yield ""
    yield (
        "Made by `python -m tests.support.oracle_table`. The implementations are those of tests/support/foreign.py, "
        "run by PyTorch in float32; s: from all stages that its modules show, l: from the logits alone. In brackets: "
        "the difference in tolerances, where it is too faint to name."
    )
    for title, config in MODELS.items():
        yield ""
        yield f"## {title}, vocabulary of {config.vocab_size}, {TOKENS} tokens"
        yield ""
        yield "| mistake | " + " | ".join(f"{style}, {kind}" for style in foreign.STYLES for kind in "sl") + " |"
        yield "|" + " --- |" * (1 + 2 * len(foreign.STYLES))
        for entry in entries(config):
            cells = [
                verdict(report(style, config, (entry.name,), stages), entry.name)
                for style in foreign.STYLES
                for stages in (True, False)
            ]
            yield f"| {entry.name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    with np.errstate(all="ignore"):
        text = "\n".join(table()) + "\n"
    (Path(__file__).parents[1] / "parity" / "ORACLE.md").write_text(text)
    sys.exit("MISSED" in text)
