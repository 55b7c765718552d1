"""npgpt score: how likely a text is to the model, token by token."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import NpgptError
from ..process import cores
from .html import page_writer
from .options import (
    add_common,
    coloured,
    importing,
    into_file,
    note,
    open_model,
    output_path,
    read_file,
    read_ids,
    tune,
)
from .progress import bar
from .streams import paint

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ..language_model import LanguageModel
    from ..scoring.likelihood import Score


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Print how likely the model holds texts: perplexity by token and by word, bits per byte. "
        "On a terminal the text is tinted by surprise."
    )
    parser.epilog = "example: npgpt score chapter.txt --model gpt2 --stride 512 --top 3"
    argument = parser.add_argument
    argument("files", nargs="*", metavar="FILE", help="texts; - or none: standard input")
    add_common(parser, "--ids", "--model", "--n-head", "--activation")
    argument(
        "--convention",
        default="rolling",
        metavar="NAME",
        help="rolling (default; lm-evaluation-harness), huggingface, or llama.cpp",
    )
    argument("--context", type=int, metavar="N", help="tokens of a window (default: the model's context)")
    argument("--stride", type=int, metavar="N", help="from one window to the next (default: a window)")
    argument("--bos", action=argparse.BooleanOptionalAction, help="<|endoftext|> (bos_token_id) stands before the text")
    add_common(parser, "--special")
    argument("--top", type=int, default=0, metavar="K", help="each token's rank, and the K likeliest there")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object a text, token by token")
    output.add_argument("--html", metavar="FILE", help="write a page: tinted text, figures where one points")
    output.add_argument("--resume", metavar="FILE.jsonl", help="add the JSON of those texts that it lacks")
    add_common(parser, "--dtype")
    argument("--workers", type=int, metavar="N", help="processes, which share the weights in memory")
    add_common(parser, "--threads")


def run(options: argparse.Namespace) -> int:
    """Score; see the help."""
    tune(options.threads)
    with importing():
        from ..scoring import records
        from ..scoring.likelihood import total
        from ..scoring.page import score_page
        from ..scoring.report import summary
        from ..scoring.scoring import convention_of

    write_page = page_writer(options.html)
    resume = None if options.resume is None else output_path("--resume", options.resume)
    most = 4 * cores()
    if options.workers is not None and not 1 <= options.workers <= most:
        raise NpgptError(f"--workers must be from 1 to {most}, four for each core, not {options.workers}")
    if options.ids is None:
        names = options.files or ["-"]
        texts: list[str | list[int]] = [read_file(name) for name in names]
    else:
        names, texts = ["--ids"], [read_ids(options.ids)]
        if options.files:
            raise NpgptError("give the text as files or as --ids, not both")
    model = open_model(options)
    rule = convention_of(model, options.convention, options.context, options.stride, options.bos)
    as_lines = options.json or resume is not None
    settings = records.settings(model, rule, options.top, options.special) if as_lines else {}
    scores = []  # kept until the progress bar is gone
    output: AbstractContextManager[Any] = nullcontext(([], partial(print, flush=True)))
    if resume is not None:
        output = records.appending(resume)
    with output as (known, add_line):
        done = records.done(known, names, texts, settings, options.resume)
        if done:
            note(f"{len(done)} of {len(texts)} texts are in {options.resume} already")
        sums = [record.totals for record in known]
        for number, score in _scores(options, names, texts, model, done):
            sums.append(score.totals)
            if as_lines:
                add_line(records.line(names[number], texts[number], score, settings))
            else:
                scores.append((names[number], score))
    for name, score in scores:
        _print(name, score, options.top, model)
    if write_page is not None:
        write_page(score_page(scores, model, rule))
    where = "" if resume is None else f" in {options.resume}"
    rows = summary(f"all {len(sums)} texts{where}", total(sums)) if len(sums) > 1 or where else []
    rows.append(f"{model.name}, {options.dtype}; {rule}")
    if options.json:
        note("; ".join(" ".join(row.split()) for row in rows))
    else:
        print("\n".join(rows))
    return 0


def _print(name: str, score: Score, top: int, model: LanguageModel) -> None:
    """Print a text's tokens, coloured where a terminal shows colours, and its sums."""
    from ..scoring import report

    colours = coloured(sys.stdout)
    if top:
        paint("\n".join((*report.table(score, model, colours), "")))
    elif colours:
        paint(f"{''.join(report.tinted(score))}\n\n{report.legend()}\n")
    print(*report.summary(name, score.totals), sep="\n")


def _scores(
    options: argparse.Namespace, names: list[str], texts: list[str | list[int]], model: LanguageModel, done: set[int]
) -> Iterator[tuple[int, Score]]:
    """Yield the number and the score of each text that is not done, under a progress bar.

    Raises NpgptError where a worker process was killed.
    """
    from concurrent.futures import BrokenExecutor

    from ..scoring.scoring import score

    pool: AbstractContextManager[Executor | None] = nullcontext()
    if options.workers is not None:
        from ..scoring.workers import processes

        pool = processes(options.workers, options.threads)
    quiet = options.json and not into_file(sys.stdout)  # a bar would lie between the lines
    try:
        with pool as executor, nullcontext() if quiet else bar("tokens") as progress:
            scores = score(
                texts,
                model,
                executor,
                convention=options.convention,
                context=options.context,
                stride=options.stride,
                end_of_text=options.bos,
                special=options.special,
                top=options.top,
                names=["standard input" if name == "-" else name for name in names],
                skip=done,
                progress=progress or (lambda *_: None),  # makes score() check all texts before the work begins
            )
            yield from zip((number for number in range(len(texts)) if number not in done), scores, strict=True)
    except BrokenExecutor:
        file, keeps = (options.resume, "keeps") if options.resume else ("--resume FILE.jsonl", "would keep")
        raise NpgptError(
            f"a worker was killed, perhaps for want of memory: fewer --workers; {file} {keeps} what is done"
        ) from None
