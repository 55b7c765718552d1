"""Two GPT-2s with a backward pass by hand, in the manner of other people's programs, and what can go wrong in them.

c_like is NumPy in the manner of llm.c, its kernels in c_kernels.py; functions is PyTorch with autograd functions. Each
has a function

    run(arrays, config, ids, targets, dtype) -> loss, stages and gradients, by npgpt's names and in its shapes

dtype is float32, float64 or bfloat16. A mistake is one or several edits of a program's text (ALTERATIONS.txt) that its
author could have made; a rewrite is an edit after which the program is still right. load returns the program with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from tests.support.programs.alterations import paragraphs

FOLDER = Path(__file__).parent
TEXTS = {"c_like": ("c_kernels", "c_like"), "functions": ("functions",)}  # of each program, the last one has run
RIGHT = ", still right"


@dataclass(frozen=True)
class Alteration:
    """Edits of one program: (old text, new text), and the names that are right answers."""

    program: str
    truth: str
    edits: tuple[tuple[str, str], ...]
    also: tuple[str, ...] = ()

    @property
    def right(self) -> set[str]:
        """Return the names that are right answers."""
        return {self.truth, *self.also}


@cache
def read() -> dict[str, list[Alteration]]:
    """Return the alterations of ALTERATIONS.txt by heading, a program's name, with ", still right" for its rewrites.

    An alteration is a line with the truth, in the catalogue's words if it has the mistake; lines "= name" with other
    right answers; then, for each edit, the old text ("-") and the new ("+"), exactly.
    """
    found: dict[str, list[Alteration]] = {}
    for heading, truth, lines in paragraphs(FOLDER / "ALTERATIONS.txt"):
        also = tuple(line[1:].strip() for line in lines if line[0] == "=")
        edits = tuple(edits_of([line for line in lines if line[0] in "-+"]))
        found.setdefault(heading, []).append(Alteration(heading.removesuffix(RIGHT), truth, edits, also))
    return found


def edits_of(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the old and the new text of each edit: an edit ends where "-" follows "+"."""
    while lines:
        old = next((number for number, line in enumerate(lines) if line[0] == "+"), len(lines))
        end = next((number for number, line in enumerate(lines) if line[0] == "-" and number > old), len(lines))
        yield "\n".join(line[1:] for line in lines[:old]), "\n".join(line[1:] for line in lines[old:end])
        lines = lines[end:]


def mistakes() -> list[Alteration]:
    """Return the alterations that are wrong."""
    return [each for program in TEXTS for each in read()[program]]


def rewrites() -> list[Alteration]:
    """Return the alterations that are right, and each program as it stands."""
    plain = [Alteration(program, "as it stands", ()) for program in TEXTS]
    return [*plain, *(each for program in TEXTS for each in read()[program + RIGHT])]


@cache
def source(text: str) -> str:
    """Return the text of a file."""
    return (FOLDER / f"{text}.py").read_text("utf-8")


def altered(program: str, edits: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Return a program's texts with each edit's first text replaced by its second.

    Raises ValueError unless the first text occurs exactly once.
    """
    texts = {name: source(name) for name in TEXTS[program]}
    for before, after in edits:
        places = [name for name, text in texts.items() for _ in range(text.count(before))]
        if len(places) != 1:
            raise ValueError(f"{program} has {len(places)} places that read {before!r}")
        texts[places[0]] = texts[places[0]].replace(before, after)
    return texts


def load(program: str, edits: tuple[tuple[str, str], ...] = ()) -> ModuleType:
    """Return a program as a module, with these edits of its text."""
    texts = altered(program, edits)
    modules = [ModuleType(f"{__name__}.{name}_edited") for name in texts]
    for module, (name, text) in zip(modules, texts.items(), strict=True):
        exec(compile(text, f"{name}.py", "exec"), module.__dict__)
    if program == "c_like":
        modules[-1].__dict__["c"] = modules[0]
    return modules[-1]
