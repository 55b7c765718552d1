"""The report of a check: verdict, mistakes and stages, as text and as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

from ..errors import counted, printable
from ..pictures.page import in_notebook
from .backward import is_backward, is_last
from .diagnosis import Diagnosis
from .difference import Difference, LogitStatistics
from .rounding import CLEAR, FACTOR
from .theirs import OUTPUTS

SHOWN = 14  # stages in the printed table
WIDTH = 100  # characters of a printed line
FRAME = 600  # pixels of a page's height in a notebook


@dataclass(frozen=True)
class Row:
    """The difference at one stage, which includes the errors of earlier stages."""

    stage: str
    difference: Difference
    alone: float | None = None  # in tolerances, without errors of earlier stages; None if unknown


@dataclass(frozen=True)
class Report:
    """The result of check."""

    rows: list[Row]
    diagnosis: Diagnosis
    dtype: str
    notes: list[str] = field(default_factory=list)
    logits: LogitStatistics | None = None
    problems: list[str] = field(default_factory=list)  # in loading or running their model
    where: dict[str, str] = field(default_factory=dict)  # keys: the first stage that differs, and unexplained ones

    @property
    def matches(self) -> bool:
        """Whether rounding explains every difference and nothing else is wrong."""
        return not self.problems and all(row.difference.ratio <= 1 for row in self.rows)

    @property
    def code(self) -> int:
        """The exit code of the command: 0 for a match, 1 for a difference."""
        return 0 if self.matches else 1

    @property
    def first(self) -> Row | None:
        """The first stage that rounding cannot explain."""
        return next((row for row in self.rows if row.difference.ratio > 1), None)

    @property
    def names(self) -> list[str]:
        """Names of the mistakes found. Mistakes that cannot be told apart are joined by "or"."""
        return [" or ".join(m.name for m in finding.mistakes) for finding in self.diagnosis.findings]

    @property
    def verdict(self) -> str:
        """The verdict in one sentence, without capital letter and full stop."""
        if self.matches:
            last = self.rows[-1].stage
            whole = last in OUTPUTS or is_backward(last)
            behind = "" if whole else f"; no stage after {last} was given"
            stages = counted(len(self.rows), "stage")
            return f"matches: rounding in {self.dtype} explains every difference, in {stages}{behind}"
        found, parts = self.diagnosis, list[str]()
        if self.problems and not found.findings:
            parts += [self.problems[0], f"and {len(self.problems) - 1} more"][: len(self.problems)]
        if self.first is None:
            return f"differs: {'; '.join(parts)}"
        parts.append(f"{self.first.stage} is the first stage that rounding in {self.dtype} cannot explain")
        if found.findings:
            cause = "the cause is" if len(self.names) == 1 else "the causes are"
            parts.append(f"{cause} {', and '.join(self.names)}")
        if found.faint:
            rest = "what remains is" if found.findings else "the difference is"
            (at,) = (row.difference for row in self.rows if row.stage == found.unexplained)
            size = f"{at.ratio:.2g} tolerances, rms {at.rms:.2g}"
            parts.append(f"{rest} too small to name a mistake ({size}; {CLEAR:g} tolerances are needed)")
        elif found.unexplained is not None:
            behind = f" and {counted(len(found.unknown) - 1, 'stage')} after it" if len(found.unknown) > 1 else ""
            known = "other known" if found.findings else "known"
            parts.append(f"no {known} mistake explains {found.unexplained}{behind}")
        return f"differs: {'; '.join(parts)}"

    def __repr__(self) -> str:
        """The verdict; str() and a notebook show the stages too."""
        return printable(f"Report({self.verdict})")

    def _repr_html_(self) -> str:
        """Return the page of npgpt check --html for a notebook."""
        from .page import page  # it shows reports

        return in_notebook(page(self), FRAME)

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int = WIDTH) -> str:
        """Return the report in lines of at most this many characters; see table()."""
        blocks = [
            [*([head] if head else []), *(f"  {of}: {text}" if of else f"  {text}" for of, text in below)]
            for head, below in said(self)
        ]
        blocks += [list(table(self, width))] if self.rows else []
        blocks += [[remark] for remark in remarks(self)]

        def filled(line: str) -> str:
            return textwrap.fill(line, width, subsequent_indent="    " if line.startswith("  ") else "")

        return "\n\n".join("\n".join(filled(line) for line in block) for block in blocks)

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
        # JSON has no infinity or NaN: they become text
        return json.dumps(json.loads(json.dumps(whole), parse_constant=lambda name: str(float(name))))


@dataclass(frozen=True)
class GreedyReport:
    """The result of check_greedy: the first token that differs, and whether a near tie explains it.

    margin: the reference's logit of its own token minus that of theirs. tolerance: the largest margin that rounding of
    two logits explains.
    """

    at: int | None
    theirs: int | None
    expected: int | None
    margin: float
    tolerance: float

    @property
    def matches(self) -> bool:
        """Whether all tokens are equal, or the first difference is a near tie."""
        return self.at is None or self.margin <= self.tolerance

    @property
    def code(self) -> int:
        """The exit code of the command: 0 for a match, 1 for a difference."""
        return 0 if self.matches else 1

    def to_json(self) -> str:
        """Everything, for a program."""
        return json.dumps({"matches": self.matches, **asdict(self)})

    def __str__(self) -> str:
        if self.at is None:
            return "Matches: all greedy tokens equal the reference's."
        where = f"token {self.at} is {self.theirs}, the reference has {self.expected}"
        margin = f"it prefers its own by {self.margin:.3g} in logits; rounding explains up to {self.tolerance:.3g}"
        return f"Matches, up to a near tie: {where}; {margin}." if self.matches else f"Differs: {where}; {margin}."


def said(report: Report) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield the paragraphs before the table: a sentence (or ""), and the lines below it as (subject or "", text)."""
    yield (
        report.verdict[0].upper() + report.verdict[1:] + ".",
        [*(("", text) for text in report.problems), *report.where.items(), *(("", text) for text in report.notes)],
    )
    found = report.diagnosis
    for finding in found.findings:
        below = [(entry.name, f"{entry.explanation} (known from: {entry.source})") for entry in finding.mistakes]
        if finding.used:
            text = "the stage that the mistake replaces is right as given, but later stages use something else"
            below.append(("", f"{finding.stage} shows this: {text}."))
        if finding.decide:
            below.append(("", f"To tell them apart, give {finding.decide}."))
        several = f"At {finding.stage}, one of these mistakes, which this data cannot tell apart:"
        yield several if len(finding.mistakes) > 1 else "", below
    if found.unexplained is not None and not found.faint:
        yield f"No known mistake explains {found.unexplained}. {sign(report)}".rstrip(), []


def remarks(report: Report) -> Iterator[str]:
    """Yield the paragraphs after the table: how far apart the probabilities are, and what cannot be excluded."""
    if (stats := report.logits) is not None:
        constant = " The logits differ only by a constant at each position, so the probabilities are equal."
        yield (
            f"Logits: KL divergence {stats.kl_mean:.2e} nats (99 %: {stats.kl_99:.2e}), top-1 agrees in "
            f"{stats.top_1:.0%}, top-10 in {stats.top_10:.0%}, largest constant shift {stats.shift:.2e}."
            f"{constant if stats.shape_of_shift else ''}"
        )
    if left := report.diagnosis.left:
        word = "Possible, but too small to confirm" if report.diagnosis.faint else "This data cannot exclude"
        yield f"{word}: {', '.join(entry.name for entry in left)}."


def sign(report: Report) -> str:
    """Return what the first unexplained stage suggests, else the two most useful experiments unless they were run."""
    stage = report.diagnosis.unexplained
    if stage is not None and is_backward(stage):
        of_stages = any(is_backward(row.stage) and not is_last(row.stage) for row in report.rows)
        return "" if of_stages else "The gradients of stages, d.NAME, would show where it begins."
    if stage in ("wte", "wpe", "embedding"):
        return "The embeddings themselves differ: are these the same weights, and the same ids?"
    if stage in OUTPUTS and any(row.stage == "ln_f" and row.difference.ratio <= 1 for row in report.rows):
        return "All earlier stages agree: check the output head, its weights, and what is done with its logits."
    experiments = (
        " Two experiments help most: does the first token alone (T = 1) agree? "
        "Does a later token change an earlier position?"
    )
    tried = any(note.startswith("Tried: ") for note in report.notes)
    return f"Are the weights and the ids the same?{'' if tried else experiments}"


COLUMNS = {  # of the table: a Difference's field, its width and form
    "tolerances": ("ratio", 11, ".3g"),
    "rms": ("rms", 10, ".2e"),
    "largest": ("largest", 10, ".2e"),
    "dB": ("nmse", 8, ".1f"),
    "cosine": ("cosine", 10, ".6f"),
    "ulps": ("ulps", 10, ".3g"),
}


def table(report: Report, width: int = WIDTH) -> Iterator[str]:
    """Yield the table of stages around the first that differs; dB and ulps only if `width` has room for them."""
    rows = report.rows
    at = rows.index(report.first) if report.first else 0
    begin = max(0, min(at - 3, len(rows) - SHOWN))
    names = max([20, *(len(row.stage) + 1 for row in rows[begin : begin + SHOWN])])
    left = () if width >= WIDTH + names - 20 else ("ulps",) if width >= WIDTH else ("dB", "ulps")
    columns = {name: column for name, column in COLUMNS.items() if name not in left}
    yield f"{'stage':<{names}}{''.join(f'{name:>{wide}}' for name, (_, wide, _) in columns.items())}  from their input"
    if begin:
        yield _rest(rows[:begin], "before", names)
    for row in rows[begin : begin + SHOWN]:
        alone = "" if row.alone is None else "matches" if row.alone <= 1 else "differs"
        figures = [f"{getattr(row.difference, field):>{wide}{form}}" for field, wide, form in columns.values()]
        yield f"{row.stage:<{names}}{''.join(figures)}  {alone}".rstrip()
    if len(rows) > begin + SHOWN:
        yield _rest(rows[begin + SHOWN :], "after", names)
    of_rms = {
        (): "; dB and ulps (units in the last place) compare that rms with ours",
        ("ulps",): "; dB compares that rms with ours",
    }.get(left, "")
    yield (
        f"1 tolerance is {FACTOR:g} times the largest rms error of reordered models that we ran in {report.dtype}. "
        f"rms and largest describe theirs - ours{of_rms}. "
        "From their input: whether the stage is right when computed from their earlier stages."
    )


def _rest(rows: Sequence[Row], where: str, names: int) -> str:
    """Return one line for all rows that are not shown."""
    what = f"… {counted(len(rows), 'stage')} {where}"
    return f"{what:<{names}}{max(row.difference.ratio for row in rows):>11.3g} at most"
