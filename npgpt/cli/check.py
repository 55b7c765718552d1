"""npgpt check: compare another implementation's numbers with GPT-2's."""

from __future__ import annotations

import argparse
import re
import shutil
import sys

from ..errors import NpgptError
from .html import page_writer
from .options import add_common, importing, note, read_text, tune
from .progress import bar


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Compare another implementation's logits, intermediate arrays or gradients with GPT-2's, and name the mistake. "
        "Exit codes: 0 matches, 1 differs, 2 could not be compared."
    )
    parser.epilog = 'example: npgpt check theirs.npz --model gpt2 --prompt "Every effort moves you"'
    argument = parser.add_argument
    argument(
        "theirs",
        metavar="THEIRS",
        help=".npz, .npy, .safetensors, .pt, .json, .csv, raw .bin, llm.c's debug state, or a folder of trace --to raw",
    )
    add_common(parser, "--model", "--n-head", "--activation")
    argument("--prompt", metavar="TEXT", help="the text that it was run on; - reads standard input")
    argument("--ids", metavar="1,2,3", help="the token ids that it was run on; several rows: 1,2,3;4,5,6")
    argument(
        "--targets",
        metavar="2,3,-100",
        help="the id that should follow each token, for its loss and gradients; -100 where none counts "
        "(default: the file's, else the next tokens)",
    )
    argument(
        "--their-dtype",
        choices=("float32", "float16", "bfloat16", "float64"),
        metavar="D",
        help="its precision: float32, float16, bfloat16 or float64 (default: the lowest that explains its numbers)",
    )
    argument("--shape", metavar="T,V", help="shape of a raw .bin")
    argument("--chunks", metavar="5,1,1", help="how many tokens it ran at a time, if it used a cache")
    argument("--json", action="store_true", help="print the report as JSON")
    argument("--html", metavar="FILE", help="also write the report as a page")


def run(options: argparse.Namespace) -> int:
    """Check; see the help."""
    tune()
    with importing():
        from ..language_model import load
        from ..oracle.check import compare_file
        from ..oracle.page import page
        from ..oracle.report import WIDTH, Report

    write_page = page_writer(options.html)
    if options.prompt is not None and options.ids is not None:
        raise NpgptError("--prompt and --ids exclude each other: give one of them")
    targets = _rows("--targets", options.targets, "-?[0-9]{1,20}")
    prompt = _rows("--ids", options.ids) if options.prompt is None else read_text(options.prompt)
    weights = options.model
    if options.activation is not None:
        weights = load(weights, dtype="float64", n_head=options.n_head, activation=options.activation)
    with bar("steps") as progress:
        report = compare_file(
            options.theirs,
            prompt,
            weights,
            dtype=options.their_dtype,
            n_head=options.n_head,
            shape=_numbers("--shape", options.shape),
            chunks=_numbers("--chunks", options.chunks),
            targets=targets,
            progress=progress,
        )
    if options.json:
        print(report.to_json())
    elif isinstance(report, Report) and sys.stdout.isatty():
        print(report.text(min(WIDTH, shutil.get_terminal_size().columns)))
    else:
        print(report)
    if write_page is not None and isinstance(report, Report):
        write_page([page(report)])
    elif write_page is not None:
        note("no page was written: greedy ids have no stages to show")
    return report.code


def _rows(name: str, text: str | None, form: str = "[0-9]{1,20}") -> list[list[int]] | None:
    """Return the rows of ids in a text, separated by semicolons; None without a text."""
    return None if text is None else [_numbers(name, row, form) for row in text.split(";")]


def _numbers(name: str, text: str | None, form: str = "[0-9]{1,20}") -> list[int]:
    """Return the whole numbers in a text, separated by commas; none without a text."""
    if text is None:
        return []
    parts = text.replace(",", " ").split()
    if not parts or not all(re.fullmatch(form, part) for part in parts):
        raise NpgptError(f"{name} must be whole numbers between commas, such as 1,2,3, not {text!r:.80}")
    return [int(part) for part in parts]
