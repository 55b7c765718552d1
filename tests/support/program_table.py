"""Tabulate the oracle's answers to programs in other people's styles, right ones and altered ones.

    python -m tests.support.program_table [--every N] [PROGRAM …]

writes tests/parity/PROGRAMS.md, with every third alteration unless --every is given. For named programs it prints what
is wrong and writes nothing. The kinds of answer:

- right: the alteration is named, and nothing else
- class: it is named among entries that the data cannot tell apart
- located: nothing is named, and the first stage that differs is reported as unexplained
- too small: the difference is below CLEAR tolerances, and the report says so
- unseen: it changes nothing that was compared
- refused: an NpgptError says why it cannot be compared, for example because of a stage's shape
- partly: it is named, and something remains unexplained
- WRONG: something else is named, or another stage
- FALSE MATCH: "matches", though the logits differ
- ALARM: a right model differs
- CRASH: an exception other than NpgptError
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

import npgpt
from npgpt import parameters
from npgpt.config import Config
from npgpt.errors import NpgptError
from npgpt.language_model import LanguageModel
from npgpt.oracle.mistakes import catalogue
from npgpt.oracle.report import Report
from npgpt.oracle.rounding import CLEAR
from npgpt.parameters import Array
from tests.support import programs
from tests.support.models import no_text, random_arrays, random_ids, small
from tests.support.programs.alterations import Alteration, alterations, pairs

CONFIG = small(n_embd=24, n_head=4, n_layer=3)
IDS = random_ids(CONFIG, (2, 12))
KINDS = ("right", "class", "located", "too small", "unseen", "refused", "partly")
FAULTS = ("WRONG", "FALSE MATCH", "ALARM", "CRASH")
SEEN = {"float32": 1e-5, "bfloat16": 3e-2}  # of the logits, relative: what no rounding does at this size
GIVEN = ("stages", "logits")
EVERY = 3  # how-manieth alteration the file has: all of them take half an hour
Item = TypeVar("Item")
Answered = TypeVar("Answered")


def fresh_arrays(config: Config, seed: int = 0) -> dict[str, Array]:
    """Return freshly initialised weights: standard deviation 0.02, gains of 1, biases of 0."""
    rng = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    for name, shape in parameters.schema(config).items():
        drawn = 0.02 * rng.standard_normal(shape) if len(shape) == 2 else np.full(shape, float(name.endswith("weight")))
        found[name] = drawn.astype(np.float32).astype(np.float64)
    return found


WEIGHTS = {"random": random_arrays(CONFIG), "fresh": fresh_arrays(CONFIG)}


def reference(config: Config, arrays: Mapping[str, Array]) -> LanguageModel:
    """Return the model that a program should equal."""
    return LanguageModel("reference", config, parameters.from_arrays(config, dict(arrays)), no_text("none"))


def shown(program: Any, config: Config, arrays: Mapping[str, Array], ids: NDArray[Any]) -> tuple[Any, Any]:
    """Return a program's stages as check takes them, a module or arrays, and its logits."""
    single = {name: array.astype(np.float32) for name, array in arrays.items()}
    if hasattr(program, "run"):
        stages = program.run(single, config, ids)
        return stages, stages["logits"]
    module = program.build(single, config)
    return module, module_logits(module, ids)


def module_logits(module: Any, ids: NDArray[Any], **options: Any) -> NDArray[Any]:
    """Return a module's logits [B, T, V]."""
    with torch.no_grad():
        output = module(torch.tensor(ids), **options)
    output = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    return np.asarray(output.float() if output.dtype == torch.bfloat16 else output)


@dataclass(frozen=True)
class Answer:
    """The oracle's answer to a program: kind, text, difference in tolerances, and the largest class named."""

    program: str
    truth: str
    known: bool  # whether the catalogue has it
    kind: str
    said: str
    size: float = 0.0
    entries: int = 1
    weights: str = ""
    given: str = ""


def largest_ratio(report: Report) -> float:
    """Return the largest difference of any stage in tolerances, 0 if none was compared."""
    return max((row.difference.ratio for row in report.rows), default=0.0)


def classify(report: Report, right: set[str], changed: float) -> tuple[str, str]:
    """Return the kind of an answer and its text. changed: the relative change of the logits."""
    findings, unexplained = report.diagnosis.findings, report.diagnosis.unexplained
    named = [{entry.name for entry in finding.mistakes} for finding in findings]
    said = "; ".join(" or ".join(sorted(each)) for each in named)
    if any(not each & right for each in named):
        return "WRONG", f"{said} ({report.verdict})"
    if named:
        if unexplained is not None and not report.diagnosis.faint:
            return "partly", f"{said}; unexplained: {unexplained}"
        return ("right" if all(len(each) == 1 for each in named) else "class"), said
    problems = "; ".join(report.problems)
    if problems:
        return ("right" if any(each in problems for each in right) else "WRONG"), problems
    if report.matches and any(each in note for each in right for note in report.notes):
        return "right", "; ".join(report.notes)  # such as that a part drops out, which the check switched off
    if report.matches:
        return ("FALSE MATCH" if changed > SEEN.get(report.dtype, 1e-5) else "unseen"), report.verdict
    strongest = largest_ratio(report)
    if report.diagnosis.faint and strongest < CLEAR:
        return "too small", f"{strongest:.2g} tolerances at most"
    if report.first is not None and unexplained == report.first.stage:
        return "located", unexplained
    return "WRONG", f"{unexplained} is not the first stage that differs ({report.verdict})"


@cache
def names() -> frozenset[str]:
    """Return the catalogue's names for this model, with or without a cache, and with padding."""
    tokens = IDS.shape[1]
    return frozenset(
        entry.name for chunks in ((), (5, 4, 1, 1, 1)) for entry in catalogue(CONFIG, tokens, chunks, True)
    )


@cache
def usual(program: str, weights: str) -> Any:
    """Return the logits of the unaltered program."""
    return shown(programs.load(program), CONFIG, WEIGHTS[weights], IDS)[1]


def examined(edits: Sequence[Alteration], weights: str, given: str) -> tuple[Report, float]:
    """Return the report on a program with these alterations and the relative change of its logits."""
    name = edits[0].program
    program = programs.load(name, *((edit.before, edit.after) for edit in edits))
    stages, logits = shown(program, CONFIG, WEIGHTS[weights], IDS)
    right = usual(name, weights)
    theirs: Any = stages if given == "stages" else logits
    model = reference(CONFIG, WEIGHTS[weights])
    report = npgpt.check(theirs, IDS, model, chunks=getattr(program, "CHUNKS", ()))
    if np.shape(logits) != right.shape or not np.isfinite(logits).all():
        return report, np.inf
    return report, float(np.sqrt(np.square(right - logits).mean() / np.square(right).mean()))


def answer(case: tuple[Alteration, str, str]) -> Answer:
    """Return the oracle's answer to an alteration on these weights, from "stages" or from "logits"."""
    alteration, weights, given = case
    head = (alteration.program, alteration.truth, bool(alteration.right & names()))
    try:
        report, changed = examined([alteration], weights, given)
    except NpgptError as error:
        return Answer(*head, "refused", str(error), weights=weights, given=given)
    except Exception as error:
        return Answer(*head, "CRASH", f"{type(error).__name__}: {error}", weights=weights, given=given)
    kind, said = classify(report, alteration.right, changed)
    size = largest_ratio(report)
    largest = max((len(finding.mistakes) for finding in report.diagnosis.findings), default=0)
    return Answer(*head, kind, said, size, largest, weights, given)


def answer_pair(pair: tuple[Alteration, Alteration]) -> Answer:
    """Return "right" if the known mistake of a pair is named from stages, "located" if not, or a fault."""
    known, unknown = pair
    head = (known.program, f"{known.truth} + {unknown.truth}", True)
    try:
        report, _ = examined(pair, "random", "stages")
    except NpgptError as error:
        return Answer(*head, "refused", str(error))
    except Exception as error:
        return Answer(*head, "CRASH", f"{type(error).__name__}: {error}")
    named = [{entry.name for entry in finding.mistakes} for finding in report.diagnosis.findings]
    size = largest_ratio(report)
    if wrong := [each for each in named if not each & known.right]:
        return Answer(*head, "WRONG", f"{wrong} ({report.verdict})", size)
    problems = "; ".join(report.problems)
    found = bool(named) or any(each in problems for each in known.right)
    return Answer(*head, "right" if found else "located", report.verdict, size)


# Right models.

TORCH = ("build", "chapter", "conv", "mini", "nano")  # whose module is checked
ANY_DTYPE = ("classes", "functions", "pytree", "scopes")  # NumPy programs that compute in their arrays' dtype
SHAPES = (
    {"n_embd": 24, "n_head": 4, "n_layer": 3},
    {"n_embd": 15, "n_head": 3, "n_layer": 1, "vocab_size": 61},
    {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_inner": 50},
    {"n_embd": 8, "n_head": 1, "n_layer": 4},
)


@dataclass(frozen=True)
class Right:
    """A right model, and how it is run: "plain", "fresh", "padded vocabulary", "left", "right", "logits" or a dtype."""

    program: str
    how: str
    shape: int
    seed: int


def right_models(seeds: int = 1) -> Iterator[Right]:
    """Yield every program in every way to run it."""
    for program in programs.NAMES:
        hows = ["plain", "logits", "last", "fresh", "padded vocabulary", "right"]
        if program in TORCH:
            hows += ["float64", "float16", "bfloat16", "float16 logits", "bfloat16 logits", "autocast", "padded module"]
        if program in ANY_DTYPE:
            hows += ["float64"]
        if program == "conv":
            hows += ["left"]
        for how in hows:
            yield from (Right(program, how, shape, seed) for shape in range(len(SHAPES)) for seed in range(seeds))


def answer_right(model: Right) -> Answer:
    """Return "right" for a right model that matches, "ALARM" or "CRASH" otherwise."""
    head = (model.program, f"{model.how}, shape {model.shape}, seed {model.seed}", False)
    try:
        report = right_report(model)
    except Exception as error:
        return Answer(*head, "CRASH", f"{type(error).__name__}: {error}")
    return Answer(*head, "right" if report.matches else "ALARM", report.verdict)


def right_report(model: Right) -> Report:
    """Return the report on a right model."""
    config = small(**SHAPES[model.shape])
    how = model.how
    arrays = (fresh_arrays if how == "fresh" else random_arrays)(config, model.seed)
    ids = random_ids(config, (1 + model.shape % 2, 12), model.seed)
    program = programs.load(model.program)
    options: dict[str, Any] = {"chunks": getattr(program, "CHUNKS", ())}
    single = {name: array.astype("float64" if how == "float64" else "float32") for name, array in arrays.items()}
    if how == "padded module":
        rows = -config.vocab_size % 64
        wide = replace(config, vocab_size=config.vocab_size + rows)
        single["wte.weight"] = np.pad(single["wte.weight"], ((0, rows), (0, 0)))
        theirs: Any = program.build(single, wide)
    elif how == "left":
        mask = np.ones_like(ids)
        mask[-1, :4] = 0
        options = {"attention_mask": mask}
        theirs = module_logits(program.build(single, config), ids, attention_mask=torch.tensor(mask))
    elif model.program in TORCH and how not in ("logits", "last", "padded vocabulary", "right"):
        theirs = program.build(single, config)
        if how.split()[0] in ("float64", "float16", "bfloat16"):
            theirs = theirs.to(getattr(torch, how.split()[0]))
        if how.endswith(" logits"):
            theirs = module_logits(theirs, ids)
        elif how == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                theirs = module_logits(theirs, ids)
    elif model.program in TORCH:
        theirs = {"logits": module_logits(program.build(single, config), ids)}
    else:
        theirs = program.run(single, config, ids)
    if how in ("logits", "last"):
        theirs = theirs["logits"] if how == "logits" else theirs["logits"][:, -1]
    if how == "padded vocabulary":
        theirs["logits"] = np.pad(theirs["logits"], ((0, 0), (0, 0), (0, -config.vocab_size % 64)))
    if how == "right":
        mask = np.ones_like(ids)
        mask[-1, 7:] = 0
        theirs, options = theirs["logits"], {"attention_mask": mask}
    return npgpt.check(theirs, ids, reference(config, arrays), **options)


# The file.


def quiet(case: tuple[Callable[[Any], Answer], Any]) -> Answer:
    """Call a function in a worker process with one thread, ignoring the warnings of programs broken on purpose."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    function, item = case
    with np.errstate(all="ignore"):
        return function(item)


def run_all(function: Callable[[Any], Answer], given: Iterable[Any]) -> list[Answer]:
    """Return a function's results for each argument, from two processes."""
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        return list(pool.map(quiet, ((function, each) for each in given), chunksize=4))


def summary(answers: Sequence[Answer]) -> Iterator[str]:
    """Yield the counts, as a table."""
    kinds = [*KINDS, "WRONG", "FALSE MATCH", "CRASH"]
    yield "| alterations | all | " + " | ".join(kinds) + " | named |"
    yield "| --- |" + " ---: |" * (2 + len(kinds))
    for weights in WEIGHTS:
        for given in GIVEN:
            for known in (True, False):
                some = [a for a in answers if (a.weights, a.given, a.known) == (weights, given, known)]
                count = Counter(a.kind for a in some)
                named = count["right"] + count["class"] + count["partly"]
                clear = len(some) - count["unseen"] - count["too small"] - count["refused"]
                share = f"{named / max(clear, 1):.0%} of {clear}" if known else ""
                what = f"{weights} weights, from {given}, {'in' if known else 'not in'} the catalogue"
                yield f"| {what} | {len(some)} | " + " | ".join(str(count[kind]) for kind in kinds) + f" | {share} |"


def confused(answers: Sequence[Answer], of: Sequence[str] = GIVEN) -> Iterator[str]:
    """Yield a sentence for each kind of what was given that says how many entries were named together."""
    for given in of:
        sizes = Counter(a.entries for a in answers if a.given == given and a.kind in ("right", "class", "partly"))
        listed = ", ".join(f"{count} with {size}" for size, count in sorted(sizes.items()) if size > 1)
        yield f"Entries that were named together, from {given}: {sizes[1] + sizes[0]} alone, {listed or 'none more'}."


def cell(a: Answer) -> str:
    """Return an answer as a table cell."""
    if a.kind in ("right", "unseen"):
        return a.kind
    told = {"class": f"1 of {a.entries}", "too small": f"too small ({a.size:.1f})", "located": f"located: {a.said}"}
    return told.get(a.kind, f"{a.kind}: {a.said}".replace("|", "/").replace("\n", " ")[:160])


def faults(answers: Iterable[Answer]) -> Iterator[str]:
    """Yield a line for each faulty answer."""
    for a in answers:
        if a.kind in FAULTS:
            said = a.said.replace("|", "/").replace("\n", " ")[:300]
            yield f"- {a.kind}: {a.program}: {a.truth} ({a.weights} {a.given}, {a.size:.2g} tolerances): {said}"


def document(answers: Sequence[Answer], right: Sequence[Answer], both: Sequence[Answer]) -> Iterator[str]:
    """Yield the lines of the file."""
    yield "# What the oracle says of programs of others"
    yield ""
    yield f"Made by `python -m tests.support.program_table`: the {len(programs.NAMES)} programs of"
    yield "tests/support/programs/, each written anew in the manner of a kind of program that people have, one edit of"
    yield "its text at a time, at 3 blocks of 4 × 6 and 2 rows of 12 tokens. The module explains the kinds of answers."
    yield "Named is the share of the alterations in the catalogue that show clearly in what was given."
    yield ""
    yield from summary(answers)
    alarms = sum(a.kind != "right" for a in right)
    found, wrong = (sum(a.kind in kinds for a in both) for kinds in (("right",), FAULTS))
    counted = sum(a.kind != "refused" for a in both)
    yield ""
    yield f"Right models, in all the ways that they can be run: {len(right)}, of which alarms: {alarms}."
    yield f"Of {counted} pairs of one known and one unknown alteration, from stages, the known one is named in {found}"
    yield f"({found / max(counted, 1):.0%}), and {wrong} answers are wrong."
    yield from confused(answers)
    wrong_lines = [*faults(answers), *faults(right), *faults(both)]
    yield ""
    yield "## What must not be"
    yield ""
    yield from wrong_lines or ["Nothing."]
    yield ""
    yield "## Each alteration"
    yield ""
    columns = [(weights, given) for weights in WEIGHTS for given in GIVEN]
    yield "| program | alteration | " + " | ".join(f"{weights}, {given}" for weights, given in columns) + " |"
    yield "|" + " --- |" * (2 + len(columns))
    rows: dict[tuple[str, str, bool], dict[tuple[str, str], str]] = {}
    for a in answers:
        rows.setdefault((a.program, a.truth, a.known), {})[a.weights, a.given] = cell(a)
    for (program, truth, known), cells in rows.items():
        mark = "" if known else " (unknown)"
        yield f"| {program} | {truth}{mark} | " + " | ".join(cells.get(column, "") for column in columns) + " |"


def chosen(every: int, names_of: Sequence[str]) -> tuple[list[Any], list[Right], list[tuple[Alteration, Alteration]]]:
    """Return the cases, right models and pairs of the named programs (default: all), thinned by `every`."""
    wanted = names_of or programs.NAMES
    some = [each for each in alterations() if each.program in wanted][::every]
    cases = [(each, weights, given) for each in some for weights in WEIGHTS for given in GIVEN]
    right = [each for each in right_models() if each.program in wanted]
    known = [(one, two) for one, two in pairs() if one.program in wanted and one.right & names()]
    return cases, right, known[::every]


def main() -> int:
    """Write the file; for named programs, only print what is wrong."""
    parser = argparse.ArgumentParser(description="What the oracle says of programs of others.")
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help="these alone, and no file is written")
    parser.add_argument("--every", type=int, default=EVERY, metavar="N", help="every Nth alteration (%(default)s)")
    options = parser.parse_args()
    cases, right, both = chosen(options.every, options.programs)
    lines = list(document(run_all(answer, cases), run_all(answer_right, right), run_all(answer_pair, both)))
    at = lines.index("## Each alteration")
    print("\n".join(lines[6:at]))
    if not options.programs:
        (Path(__file__).parents[1] / "parity" / "PROGRAMS.md").write_text("\n".join(lines) + "\n", "utf-8")
    return "Nothing." not in lines[:at]


if __name__ == "__main__":
    sys.exit(main())
