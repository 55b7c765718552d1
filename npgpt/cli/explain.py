"""npgpt explain: model.py beside what each of its lines computes."""

from __future__ import annotations

import argparse
import sys

from ..errors import NpgptError
from .html import page_writer
from .options import add_common, add_text, importing, note, open_model, text_ids, tune


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Show the source of the forward pass beside what each of its lines computes for a text: "
        "as text, a stage at a time, or as a page (--html)."
    )
    parser.epilog = 'example: npgpt explain "It is a truth" --html truth.html'
    argument = parser.add_argument
    add_text(parser)
    argument("--html", metavar="FILE", help="write a page to explore instead")
    argument("--step", action="store_true", help="wait for Enter after each stage, for a lecture; q and Enter ends")
    add_common(parser, "--model", "--n-head", "--activation", "--dtype", "--threads")


def run(options: argparse.Namespace) -> int:
    """Explain; see the help."""
    if options.step and options.html is not None:
        raise NpgptError("--step walks through the stages as text, --html writes a page: give one of them")
    tune(options.threads)
    with importing():
        from ..pictures.explain import explain

    write_page = page_writer(options.html)
    model = open_model(options)
    _, token_ids = text_ids(options, model)
    explanation = explain(token_ids, model)
    if write_page is not None:
        write_page([explanation.page()])
        return 0
    waits = options.step and sys.stdout.isatty() and sys.stdin is not None and sys.stdin.isatty()
    if waits:
        note("Enter shows the next stage, q and Enter ends")
    for step in explanation.steps():
        print(step, end="" if waits else "\n", flush=waits)
        answer = sys.stdin.readline() if waits else "\n"
        if not answer:  # Ctrl-D, which ends no line
            print()
        if not answer or answer.strip() in {"q", "Q"}:
            break
    return 0
