"""What the oracle says of programs of others: of right ones, and of each alteration of each program.

    python -m tests.support.program_table

writes tests/parity/PROGRAMS.md. An answer is of one of these kinds:

- right: the alteration is named, and nothing else
- class: named among entries that the data cannot tell apart
- located: nothing is named, and the first stage that differs is said to be unexplained
- too small: the difference is below CLEAR tolerances, and the report says so
- unseen: it changes nothing that was given
- partly: it is named, and something is left that is not explained
- WRONG: something else is named
- FALSE MATCH: "matches", though the logits or a stage differ
- REFUSED: a traceback, or an error
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import npgpt
from npgpt import parameters
from npgpt.config import Config
from npgpt.language_model import LanguageModel
from npgpt.oracle.mistakes import catalogue
from npgpt.oracle.report import Report
from npgpt.oracle.rounding import CLEAR
from npgpt.parameters import Array
from tests.support import programs
from tests.support.models import no_text, random_arrays, random_ids, small
from tests.support.programs.alterations import Alteration, alterations

CONFIG = small(n_embd=24, n_head=4, n_layer=3)
IDS = random_ids(CONFIG, (2, 12))
FAULTS = ("WRONG", "FALSE MATCH", "REFUSED", "ALARM")
SEEN = 1e-5  # of the logits, relative: what no rounding in float32 does at this size


def fresh_arrays(config: Config, seed: int = 0) -> dict[str, Array]:
    """Return weights as training starts from: a spread of 0.02, gains of 1, biases of 0."""
    rng = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    for name, shape in parameters.schema(config).items():
        drawn = rng.standard_normal(shape) * 0.02 if len(shape) == 2 else np.full(shape, float(".ln_" in f".{name}"))
        found[name] = drawn * (0.0 if name.endswith("bias") else 1.0)
        found[name] = found[name].astype(np.float32).astype(np.float64)
    return found


WEIGHTS = {"random": random_arrays(CONFIG), "fresh": fresh_arrays(CONFIG)}


def reference(config: Config, arrays: Mapping[str, Array]) -> LanguageModel:
    """Return the model that a program should be."""
    return LanguageModel("reference", config, parameters.from_arrays(config, dict(arrays)), no_text("none"))


def logits_of(program: Any, config: Config, arrays: Mapping[str, Array], ids: NDArray[Any]) -> tuple[Any, Any]:
    """Return what check is given of a program for its stages, which is a module or arrays, and its logits."""
    single = {name: array.astype(np.float32) for name, array in arrays.items()}
    if hasattr(program, "run"):
        stages = program.run(single, config, ids)
        return stages, stages["logits"]
    import torch

    module = program.build(single, config)
    with torch.no_grad():
        output = module(torch.tensor(ids))
    output = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    return module, output.float().numpy()


@dataclass(frozen=True)
class Answer:
    """A row of the table: kind and what was said, about one alteration on some weights, from stages or logits."""

    program: str
    truth: str
    weights: str
    given: str
    kind: str
    said: str
    known: bool  # whether the catalogue has it
    size: float = 0.0  # of the difference, in tolerances
    entries: int = 1  # of the largest class that was named


def classify(report: Report, right: set[str], changed: float) -> tuple[str, str]:
    """Return the kind of an answer, and what it says. changed: how much the logits were, relative."""
    findings = report.diagnosis.findings
    named = [{entry.name for entry in finding.mistakes} for finding in findings]
    said = "; ".join(" or ".join(sorted(each)) for each in named)
    if any(not each & right for each in named):
        return "WRONG", f"{said} ({report.verdict})"
    if named:
        if report.diagnosis.unexplained is not None and not report.diagnosis.faint:
            return "partly", f"{said}; unexplained: {report.diagnosis.unexplained}"
        return ("right" if all(len(each) == 1 for each in named) else "class"), said
    problems = "; ".join(report.problems)
    if problems:
        return ("right" if any(each in problems for each in right) else "WRONG"), problems
    if report.matches:
        return ("FALSE MATCH" if changed > SEEN else "unseen"), report.verdict
    strongest = max(row.difference.ratio for row in report.rows)
    if report.diagnosis.faint and strongest < CLEAR:
        return "too small", f"{strongest:.2g} tolerances at most"
    first = report.first
    where = report.diagnosis.unexplained
    if first is not None and where == first.stage:
        return "located", where
    return "WRONG", f"{where} is not the first stage that differs ({report.verdict})"


def answer(case: tuple[Alteration, str, str]) -> Answer:
    """Return what the oracle says of an alteration, on these weights, from "stages" or from "logits"."""
    alteration, weights, given = case
    arrays, right = WEIGHTS[weights], alteration.right
    known = bool(right & names())
    head = (alteration.program, alteration.truth, weights, given)
    try:
        with np.errstate(all="ignore"):
            usual = logits_of(programs.load(alteration.program), CONFIG, arrays, IDS)[1]
            edited = programs.load(alteration.program, (alteration.before, alteration.after))
            stages, logits = logits_of(edited, CONFIG, arrays, IDS)
            report = npgpt.check(stages if given == "stages" else logits, IDS, reference(CONFIG, arrays))
    except Exception as error:
        return Answer(*head, "REFUSED", f"{type(error).__name__}: {error}", known)
    gap = np.inf
    if np.shape(usual) == np.shape(logits):
        gap = float(np.sqrt(np.square(usual - logits).mean() / np.square(usual).mean()))
    kind, said = classify(report, right, np.inf if np.isnan(gap) else gap)
    size = max(row.difference.ratio for row in report.rows)
    largest = max((len(finding.mistakes) for finding in report.diagnosis.findings), default=0)
    return Answer(*head, kind, said, known, size, largest)


def names() -> set[str]:
    """Return the catalogue's, for this model."""
    return {entry.name for entry in catalogue(CONFIG, IDS.shape[1])}


def run_all(function: Any, given: Iterable[Any]) -> list[Any]:
    """Return what a function gives for each, in two processes."""
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        return list(pool.map(function, given, chunksize=4))


def summary(answers: Sequence[Answer]) -> Iterator[str]:
    """Yield the counts, as a table."""
    kinds = ("right", "class", "located", "too small", "unseen", "partly", *FAULTS[:3])
    yield "| | known | " + " | ".join(kinds) + " |"
    yield "| --- |" + " ---: |" * (1 + len(kinds))
    for weights in WEIGHTS:
        for given in ("stages", "logits"):
            for known in (True, False):
                some = [a for a in answers if (a.weights, a.given, a.known) == (weights, given, known)]
                count = Counter(a.kind for a in some)
                kind = "in the catalogue" if known else "not in it"
                cells = " | ".join(str(count[kind]) for kind in kinds)
                yield f"| {weights} weights, from {given}, {kind} | {len(some)} | {cells} |"


def cell(text: str) -> str:
    """Return a text that fits into a table's cell."""
    return text.replace("|", "/").replace("\n", " ")[:300]


def main(chosen: Sequence[str]) -> int:
    """Write the file; with programs named, print their faults alone."""
    some = [each for each in alterations() if not chosen or each.program in chosen]
    cases = [(each, weights, given) for each in some for weights in WEIGHTS for given in ("stages", "logits")]
    answers: list[Answer] = run_all(answer, cases)
    lines = ["# What the oracle says of programs of others", "", *summary(answers), ""]
    lines += ["| program | truth | weights | from | kind | tolerances | said |", "|" + " --- |" * 7]
    lines += [
        f"| {a.program} | {cell(a.truth)} | {a.weights} | {a.given} | {a.kind} | {a.size:.2g} | {cell(a.said)} |"
        for a in answers
    ]
    faults = [line for line, a in zip(lines[-len(answers) :], answers, strict=True) if a.kind in FAULTS]
    print("\n".join([*summary(answers), "", *faults]))
    if not chosen:
        (Path(__file__).parents[1] / "parity" / "PROGRAMS.md").write_text("\n".join(lines) + "\n", "utf-8")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
