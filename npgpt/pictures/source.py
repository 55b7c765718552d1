"""The source of model.py: the stage that each line computes, and syntax highlighting."""

from __future__ import annotations

import ast
import io
import keyword
import tokenize
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeAlias

from .. import model as forward_pass

OUTPUT = "h.{layer}"  # the block's output; the names of a block's other stages begin with it and a dot
Span: TypeAlias = tuple[int, int, str, str]  # start, end, kind, and the stage or function that it names


class Step(NamedTuple):
    """A stage of model.py: its name there, the lines that compute it, and the functions that they call."""

    stage: str  # "wte", "h.{layer}.ln_1"
    lines: tuple[int, ...]
    functions: tuple[str, ...]


@cache
def source() -> str:
    """Return the text of the model.py that runs."""
    return Path(str(forward_pass.__file__)).read_text("utf-8")


def calls_in(node: ast.AST, name: str = "") -> list[ast.Call]:
    """Return the calls of one function, or of every function with a plain name, in the order of the text."""
    found = [part for part in ast.walk(node) if isinstance(part, ast.Call) and isinstance(part.func, ast.Name)]
    found.sort(key=lambda call: (call.lineno, call.col_offset))
    return [call for call in found if name in ("", ast.unparse(call.func))]


@cache
def walk() -> tuple[dict[str, Step], dict[int, list[Span]]]:
    """Return the stages in the order of computation, and by line the spans (start, end, kind, what) of the source.

    The kind of a stage's span is "@".
    """
    functions = {node.name: node for node in ast.parse(source()).body if isinstance(node, ast.FunctionDef)}
    known, lines = {*functions, "activation"}, source().splitlines()
    spans: dict[int, list[Span]] = {}

    def mark(node: ast.expr | ast.stmt, stage: str) -> None:
        line = lines[node.lineno - 1].encode()  # ast counts bytes
        start, end = (len(line[:at].decode()) for at in (node.col_offset, node.end_col_offset or 0))
        spans.setdefault(node.lineno, []).append((start, end, "@", stage))

    def steps_of(function: str, call: str, prefix: str) -> Iterator[Step]:
        before: ast.stmt | None = None
        for node in (part for part in ast.walk(functions[function]) if isinstance(part, ast.stmt)):
            simple = isinstance(node, (ast.Assign, ast.Expr, ast.Return))
            for found in calls_in(node, call) if simple else ():
                name, value = found.args
                text = ast.literal_eval(ast.unparse(name).removeprefix("f"))
                mark(name, prefix + text)
                origin = before if isinstance(value, ast.Name) and before else value  # the line before computed a name
                used = [one for one in (ast.unparse(inner.func) for inner in calls_in(origin)) if one in known]
                yield Step(prefix + text, (found.lineno,), tuple(used))
            before = node if isinstance(node, ast.Assign) else before

    def in_order(steps: Iterator[Step]) -> list[Step]:
        return sorted(steps, key=lambda step: step.lines)  # stable: ast.walk goes breadth first

    outside, inside = in_order(steps_of("forward", "stage", "")), in_order(steps_of("block", "record", OUTPUT + "."))
    returned = functions["block"].body[-1]
    mark(returned, OUTPUT)
    at = next(number for number, step in enumerate(outside) if step.stage == OUTPUT)
    outside[at : at + 1] = [*inside, Step(OUTPUT, (returned.lineno, *outside[at].lines), ())]
    return {step.stage: step for step in outside}, _highlighted(spans, known)


def _highlighted(stages: Mapping[int, list[Span]], known: set[str]) -> dict[int, list[Span]]:
    """Return stages' spans and those of keywords "k", strings "s", comments "c" and model.py's functions "f"."""
    kinds, lines = {tokenize.COMMENT: "c", tokenize.STRING: "s"}, source().splitlines()
    spans = {number: list(found) for number, found in stages.items()}
    before = ""
    for token in tokenize.generate_tokens(io.StringIO(source()).readline):
        kind = kinds.get(token.type, "s" if tokenize.tok_name[token.type].startswith("FSTRING") else "")
        if token.type == tokenize.NAME:
            kind = "k" if keyword.iskeyword(token.string) else "f" if token.string in known and before != "." else ""
        before = token.string
        (first, start), (last, end) = token.start, token.end
        for number in range(first, last + 1) if kind else ():
            span = start if number == first else 0, end if number == last else len(lines[number - 1])
            if not any(one[0] < span[1] and span[0] < one[1] for one in stages.get(number, ())):
                spans.setdefault(number, []).append((*span, kind, token.string if kind == "f" else ""))
    return {number: sorted(found) for number, found in spans.items()}


def segments(line: str, spans: list[Span]) -> list[tuple[str, str, str]]:
    """Return a line of source as (text, kind, what), the parts between spans as plain text."""
    found, at = [], 0
    for start, end, kind, what in spans:
        found += [(line[at:start], "", ""), (line[start:end], kind, what)]
        at = end
    return [one for one in (*found, (line[at:], "", "")) if one[0]]
