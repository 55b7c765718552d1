"""Sixteen GPT-2s, each written anew in the manner of a kind of program that people have, and what can go wrong in them.

A program is a module of this package, right as it stands, in one of two forms. It has a function

    run(arrays, config, ids) -> the logits [B, T, V] and whatever stages programs of its kind show, by name

where arrays hold float32 by canonical names, or a function

    build(arrays, config) -> a PyTorch module in evaluation, which npgpt.check opens by itself.

ROUNDS is the dtype in which the program computes, where that is not float32. A mistake is an edit of the program's
text (ALTERATIONS.txt), as its author could have made it: load gives the program with the edit.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parent
NAMES = tuple(
    sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "alterations"))
)  # of the programs


@cache
def source(program: str) -> str:
    """Return the text of a program."""
    return (FOLDER / f"{program}.py").read_text("utf-8")


def load(program: str, *edits: tuple[str, str]) -> ModuleType:
    """Return a program as a module; of each edit the one place that reads as its first text reads as its second.

    Raises ValueError where there is no such place, or more than one.
    """
    text = source(program)
    for before, after in edits:
        if text.count(before) != 1:
            raise ValueError(f"{program}.py has {text.count(before)} places that read {before!r}")
        text = text.replace(before, after)
    module = ModuleType(f"{__name__}.{program}_edited")
    exec(compile(text, f"{program}.py", "exec"), module.__dict__)
    return module
