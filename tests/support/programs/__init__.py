"""Sixteen GPT-2s, each in the style of a kind of program that people write, and what can go wrong in them.

A program is a correct module of this package in one of two forms. It has a function

    run(arrays, config, ids) -> the logits [B, T, V] and the stages that programs of its kind show, by name

where arrays are float32 by canonical names, or a function

    build(arrays, config) -> a PyTorch module in evaluation mode, which npgpt.check opens by itself.

ROUNDS is the dtype in which the program computes, unless that is float32. A mistake is an edit of the program's text
(ALTERATIONS.txt) that its author could have made. load returns the program with the edit.
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
    """Return a program as a module, with each edit's first text replaced by its second.

    Raises ValueError unless the first text occurs exactly once.
    """
    text = source(program)
    for before, after in edits:
        if text.count(before) != 1:
            raise ValueError(f"{program}.py has {text.count(before)} places that read {before!r}")
        text = text.replace(before, after)
    module = ModuleType(f"{__name__}.{program}_edited")
    exec(compile(text, f"{program}.py", "exec"), module.__dict__)
    return module
