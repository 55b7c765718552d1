"""npgpt score: how likely a text is to the model, token by token."""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from ..errors import NpgptError
from ..process import cores
from .html import page_writer
from .options import add_common, coloured, importing, into_file, note, open_model, output_path, read_ids, tune
from .progress import bar, clear
from .streams import paint

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ..language_model import LanguageModel
    from ..scoring.likelihood import Score, Totals
    from .inputs import Input


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
        from ..scoring.page import score_page
        from ..scoring.report import summary
        from ..scoring.texts import convention_of
        from .inputs import inputs, of_ids

    write_page = page_writer(options.html)
    resume = None if options.resume is None else output_path("--resume", options.resume)
    most = 4 * cores()
    if options.workers is not None and not 1 <= options.workers <= most:
        raise NpgptError(f"--workers must be from 1 to {most}, four for each core, not {options.workers}")
    if options.ids is not None and options.files:
        raise NpgptError("give the text as files or as --ids, not both")
    if options.ids is None:
        texts = inputs(options.files or ["-"], again=resume is not None)
    else:
        texts = [of_ids("--ids", read_ids(options.ids))]
    model = open_model(options)
    rule = convention_of(model, options.convention, options.context, options.stride, options.bos)
    as_lines = options.json or resume is not None
    by_token = as_lines or write_page is not None or options.top or coloured(sys.stdout)
    settings = records.settings(model, rule, options.top, options.special) if as_lines else {}
    known = records.Known(options.resume, settings)
    with records.appending(resume, known.add) if resume is not None else nullcontext(_print_line) as add_line:
        done = {number for number, text in enumerate(texts) if known.has(text.name) and known.take(*_hashed(text))}
        if done:
            note(f"{len(done)} of {len(texts)} texts are in {options.resume} already")

        def scored() -> Iterator[tuple[str, Any]]:
            """Print each text, or write its line, as soon as it is scored; then hand it on to the page."""
            for number, found in _scores(options, texts, model, done, by_token):
                text = texts[number]
                known.sums.add(found.totals if by_token else found)
                if as_lines:
                    add_line(records.line(text.name, text.sha256, found, settings))
                else:
                    clear()
                    _print(text.name, found, options.top, model)
                yield text.name, found

        if write_page is not None:
            write_page(score_page(scored(), model, rule))
        else:
            deque(scored(), maxlen=0)
    where = "" if resume is None else f" in {options.resume}"
    several = known.sums.texts > 1 or where
    rows = summary(f"all {known.sums.texts} texts{where}", known.sums.totals()) if several else []
    rows.append(f"{model.name}, {options.dtype}; {rule}")
    if options.json:
        note("; ".join(" ".join(row.split()) for row in rows))
    else:
        print("\n".join(rows))
    return 0


def _hashed(text: Input) -> tuple[str, str]:
    """Read a text; return its name and its sha256."""
    for _ in () if text.ids else text.parts():
        pass
    return text.name, text.sha256


def _print_line(parts: Iterable[str]) -> None:
    sys.stdout.writelines(parts)
    print(flush=True)


def _print(name: str, found: Score | Totals, top: int, model: LanguageModel) -> None:
    """Print a text's tokens, if they are known, coloured where a terminal shows colours, and its sums."""
    from ..scoring import report

    colours = coloured(sys.stdout)
    if not isinstance(found, tuple) and (top or colours):
        for line in report.table(found, model, colours) if top else ():
            paint(line)
        if not top:
            for part in report.tinted(found):
                paint(part, end="")
            paint(f"\n\n{report.legend()}")
        print()
    print(*report.summary(name, found if isinstance(found, tuple) else found.totals), sep="\n", flush=True)


def _scores(
    options: argparse.Namespace, texts: list[Input], model: LanguageModel, done: set[int], by_token: bool
) -> Iterator[tuple[int, Any]]:
    """Yield the number of each text that is not done and its Score, or only its Totals, under a progress bar.

    Raises NpgptError where a worker process was killed.
    """
    from concurrent.futures import BrokenExecutor

    from ..scoring import scoring

    pool: AbstractContextManager[Executor | None] = nullcontext()
    if options.workers is not None:
        from ..scoring.workers import processes

        pool = processes(options.workers, options.threads)
    numbers = [number for number in range(len(texts)) if number not in done]
    sizes = [texts[number].size for number in numbers]
    size = None if None in sizes else sum(filter(None, sizes))
    # a bar would lie between the lines, unless they go to a file, or to this terminal one after another
    between = options.json or (len(texts) > 1 and not options.resume and not sys.stdout.isatty())
    quiet = between and not into_file(sys.stdout)
    try:
        with pool as executor, nullcontext() if quiet else bar("tokens", of="of about") as draw:

            def progress(tokens: int, read: int) -> None:
                if draw is not None:
                    draw(tokens, None if size is None else max(tokens, tokens * size // max(read, 1)))

            found = (scoring.score if by_token else scoring.totals)(
                (text.ids or text.parts() for text in texts),
                model,
                executor,
                convention=options.convention,
                context=options.context,
                stride=options.stride,
                end_of_text=options.bos,
                special=options.special,
                **({"top": options.top} if by_token else {}),
                names=["standard input" if text.name == "-" else text.name for text in texts],
                skip=done,
                progress=progress,
            )
            yield from zip(numbers, found, strict=True)
    except BrokenExecutor:
        file, keeps = (options.resume, "keeps") if options.resume else ("--resume FILE.jsonl", "would keep")
        raise NpgptError(
            f"a worker was killed, perhaps for want of memory: fewer --workers; {file} {keeps} what is done"
        ) from None
