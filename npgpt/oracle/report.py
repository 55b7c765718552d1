"""The verdict, the stages and the mistakes, as lines and as JSON."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..parameters import Array
from .diagnosis import Diagnosis, Finding
from .rounding import CLEAR, FACTOR, Difference
from .textbook import log_softmax
from .theirs import OUTPUTS

SHOWN = 14  # stages in the printed table
WIDTH = 100  # characters of a printed line


@dataclass(frozen=True)
class Row:
    """One stage: all that came before it included, and on its own, where its input is known."""

    stage: str
    difference: Difference
    alone: float | None = None  # in tolerances, from their own input


@dataclass(frozen=True)
class LogitStatistics:
    """Theirs against the reference, over positions: KL divergence in nats, shares that agree, the shift in logits."""

    kl_mean: float
    kl_99: float
    top_1: float
    top_10: float
    shift: float  # largest constant by which a position is shifted
    shape_of_shift: bool  # whether nothing but such constants differs


@dataclass(frozen=True)
class Report:
    """What check found. code: 0 matches, 1 differs."""

    rows: list[Row]
    diagnosis: Diagnosis
    dtype: str
    notes: list[str] = field(default_factory=list)
    logits: LogitStatistics | None = None
    problems: list[str] = field(default_factory=list)  # of loading, or of how it was run
    where: dict[str, str] = field(default_factory=dict)  # by stage, of the first that differs and of unexplained ones

    @property
    def matches(self) -> bool:
        """Whether rounding explains everything."""
        return not self.problems and all(row.difference.ratio <= 1 for row in self.rows)

    @property
    def whole(self) -> bool:
        """Whether the model's output was compared, and so all that comes before it."""
        return any(row.stage in OUTPUTS for row in self.rows)

    @property
    def code(self) -> int:
        """Of the command's exit."""
        return 0 if self.matches else 1

    @property
    def first(self) -> Row | None:
        """The first stage that rounding cannot explain."""
        return next((row for row in self.rows if row.difference.ratio > 1), None)

    @property
    def names(self) -> list[str]:
        """Of the mistakes that were named, a class as one name."""
        return [" or ".join(m.name for m in finding.mistakes) for finding in self.diagnosis.findings]

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.matches:
            text = f"matches: rounding in {self.dtype} explains every difference, in {_stages(len(self.rows))}"
            return text + ("" if self.whole else f"; nothing behind {self.rows[-1].stage} was given")
        text = ""
        if self.problems and not self.diagnosis.findings:
            more = f"; and {len(self.problems) - 1} more" if len(self.problems) > 1 else ""
            text = f"{self.problems[0]}{more}; "
        if self.first is None:
            return f"differs: {text.removesuffix('; ')}"
        text = f"differs: {text}{self.first.stage} is the first stage that rounding in {self.dtype} cannot explain"
        if self.diagnosis.findings:
            text += f"; it is {', and '.join(self.names)}"
        if self.diagnosis.faint:
            rest = "what is left is" if self.diagnosis.findings else "the difference is"
            (at,) = (row for row in self.rows if row.stage == self.diagnosis.unexplained)
            size = f"{at.difference.ratio:.2g} tolerances, rms {at.difference.rms:.2g}"
            return f"{text}; {rest} too little ({size}; clear is {CLEAR:g}) to name a mistake by"
        if self.diagnosis.unexplained is not None:
            more = " more" if self.diagnosis.findings else ""
            others = len(self.diagnosis.unknown) - 1
            text += f"; no{more} known mistake explains {self.diagnosis.unexplained}"
            text += f" and {_stages(others)} behind it" if others else ""
        return text

    def __str__(self) -> str:
        indents = ((line, "    " if line.startswith("  ") else "") for line in lines(self))
        return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent=indent) for line, indent in indents)

    def to_json(self) -> str:
        """Everything, for a program."""
        found = self.diagnosis
        whole = {
            "verdict": self.verdict,
            "matches": self.matches,
            "dtype": self.dtype,
            "first": None if self.first is None else self.first.stage,
            "mistakes": [
                {
                    "stage": finding.stage,
                    "one_of": [
                        {"name": m.name, "explanation": m.explanation, "source": m.source} for m in finding.mistakes
                    ],
                    "tolerances_before": finding.before,
                    "decide": finding.decide,
                    "used": finding.used,
                }
                for finding in found.findings
            ],
            "unexplained": found.unexplained,
            "unexplained_stages": found.unknown,
            "where": self.where,
            "cannot_be_excluded": [entry.name for entry in found.left],
            "problems": self.problems,
            "notes": self.notes,
            "logits": None if self.logits is None else asdict(self.logits),
            "stages": [
                {"stage": row.stage, "ratio": row.difference.ratio, "alone": row.alone, **asdict(row.difference)}
                for row in self.rows
            ],
        }
        return json.dumps(_finite(whole))


@dataclass(frozen=True)
class GreedyReport:
    """Greedy text against the reference's: the first token that differs, and whether a near tie explains it.

    margin: by how much the reference prefers its own token to theirs there, in logits; tolerance: what rounding of two
    logits explains.
    """

    at: int | None
    theirs: int | None
    expected: int | None
    margin: float
    tolerance: float

    @property
    def matches(self) -> bool:
        """The same, or different by a near tie."""
        return self.at is None or self.margin <= self.tolerance

    @property
    def code(self) -> int:
        """Of the command's exit."""
        return 0 if self.matches else 1

    def to_json(self) -> str:
        """Everything, for a program."""
        return json.dumps({"matches": self.matches, **asdict(self)})

    def __str__(self) -> str:
        if self.at is None:
            return "Matches: every greedy token is the reference's."
        where = f"token {self.at} is {self.theirs}, the reference has {self.expected}"
        margin = f"it prefers its own by {self.margin:.3g}, and rounding explains up to {self.tolerance:.3g}"
        return f"Matches, up to a near tie: {where}; {margin}." if self.matches else f"Differs: {where}; {margin}."


def _finite(value: Any) -> Any:
    """JSON has no infinity: it becomes text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _stages(count: int) -> str:
    return f"{count} stage{'s' * (count != 1)}"


def lines(report: Report) -> Iterator[str]:
    """What is printed."""
    yield report.verdict[0].upper() + report.verdict[1:] + "."
    for problem in report.problems:
        yield f"  {problem}"
    for stage, text in report.where.items():
        yield f"  {stage}: {text}"
    for note in report.notes:  # under what conditions the verdict holds
        yield f"  {note}"
    found = report.diagnosis
    for finding in found.findings:
        yield ""
        yield from (f"{together}:" for together in alike(finding))
        for entry in finding.mistakes:
            yield f"  {entry.name}: {entry.explanation} (known from: {entry.source})"
        yield from (f"  {remark}" for remark in beside(finding))
    if found.unexplained is not None and not found.faint:
        yield ""
        yield f"{found.unexplained} is not explained by any known mistake. {sign(report)}"
    if report.rows:
        yield ""
        yield from table(report)
    for remark in remarks(report):
        yield ""
        yield remark


def alike(finding: Finding) -> Iterator[str]:
    """That several mistakes fit, where they do."""
    if len(finding.mistakes) > 1:
        yield f"At {finding.stage}, one of these, which this data cannot tell apart"


def beside(finding: Finding) -> Iterator[str]:
    """What is to be said of a finding besides its mistakes."""
    if finding.used:
        yield f"{finding.stage} shows it: the stage that it is about is right, and is not what is used there."
    if finding.decide:
        yield f"To decide: {finding.decide}."


def remarks(report: Report) -> Iterator[str]:
    """What is said behind the stages: how far the probabilities are apart, and what cannot be excluded."""
    if (stats := report.logits) is not None:
        constant = " Nothing but a constant at each position differs: the probabilities are the same."
        yield (
            f"Logits: KL divergence {stats.kl_mean:.2e} nats (99 %: {stats.kl_99:.2e}), top-1 agrees in "
            f"{stats.top_1:.0%}, top-10 in {stats.top_10:.0%}, largest constant shift {stats.shift:.2e}."
            f"{constant if stats.shape_of_shift else ''}"
        )
    if left := report.diagnosis.left:
        word = "Too faint to be named, it could be" if report.diagnosis.faint else "This data cannot exclude"
        yield f"{word}: {', '.join(entry.name for entry in left)}."


def sign(report: Report) -> str:
    """What the first unexplained stage itself tells, or the experiments that tell most."""
    stage = report.diagnosis.unexplained
    if stage in ("wte", "wpe", "embedding"):
        return "The embeddings themselves differ: are these the same weights, and the same ids?"
    if stage in OUTPUTS and any(row.stage == "ln_f" and row.difference.ratio <= 1 for row in report.rows):
        return "All that comes before it agrees: it is the output head, its weights, or what is done with its logits."
    return (
        "Are the weights and the ids the same? Two experiments tell most: does the first token alone (T = 1) agree? "
        "Does a later token change an earlier position?"
    )


HEAD = f"{'stage':<20}{'tolerances':>11}{'rms':>10}{'largest':>10}{'dB':>8}{'cosine':>10}{'ulps':>10}  from their input"


def table(report: Report) -> Iterator[str]:
    """The stages round the first that differs."""
    rows = report.rows
    at = next((place for place, row in enumerate(rows) if row.difference.ratio > 1), 0)
    begin = max(0, min(at - 3, len(rows) - SHOWN))
    yield HEAD
    if begin:
        yield _rest(rows[:begin], "before")
    for row in rows[begin : begin + SHOWN]:
        d = row.difference
        alone = "" if row.alone is None else "matches" if row.alone <= 1 else "differs"
        figures = f"{d.ratio:>11.3g}{d.rms:>10.2e}{d.largest:>10.2e}{d.nmse:>8.1f}{d.cosine:>10.6f}{d.ulps:>10.3g}"
        yield f"{row.stage:<20}{figures}  {alone}".rstrip()
    if len(rows) > begin + SHOWN:
        yield _rest(rows[begin + SHOWN :], "after")
    yield (
        f"1 tolerance is {FACTOR:g} times the largest rms error of our own runs in {report.dtype}, the model redrawn. "
        "rms and largest are of theirs - ours; dB and ulps, units in the last place, of the rms against ours. "
        "From their input: the stage computed from what they gave below it."
    )


def _rest(rows: Sequence[Row], where: str) -> str:
    """Rows that are not shown, in one."""
    return f"{'… ' + _stages(len(rows)) + ' ' + where:<20}{max(row.difference.ratio for row in rows):>11.3g} at most"


def logit_statistics(pairs: Sequence[tuple[Array, Array] | None], tolerance: float) -> LogitStatistics | None:
    """Of pairs of theirs and what is expected, each [rows, V]; None where there is a pair that cannot be compared."""
    whole = [pair for pair in pairs if pair is not None and np.isfinite(pair[0]).all()]
    if len(whole) < len(pairs):
        return None
    x, y = (np.concatenate([pair[side].reshape(-1, pair[side].shape[-1]) for pair in whole]) for side in (0, 1))
    gap = x - y
    shift = gap.mean(axis=-1, keepdims=True)
    left = math.sqrt(float(np.square(gap - shift).mean()))
    p, q = log_softmax(y), log_softmax(x)
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    count = min(10, x.shape[-1])
    tops = [np.argpartition(-z, count - 1, axis=-1)[:, :count] for z in (x, y)]
    shared = [len(set(a) & set(b)) / count for a, b in zip(*tops, strict=True)]
    return LogitStatistics(
        float(kl.mean()),
        float(np.quantile(kl, 0.99)),
        float((x.argmax(axis=-1) == y.argmax(axis=-1)).mean()),
        float(np.mean(shared)),
        float(np.abs(shift).max()),
        bool(left <= tolerance < float(np.sqrt(np.square(gap).mean()))),
    )
