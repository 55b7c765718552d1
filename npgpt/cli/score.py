"""npgpt score: the perplexity of texts, and the log-probability of each token."""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from ..errors import NpgptError
from ..process import cores
from ..scoring.windows import DEFAULTS, NAMES
from .html import page_writer
from .options import add_common, coloured, importing, into_file, note, open_model, output_path, read_ids, show, tune
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
        "Print the perplexity of texts per token and per word, and their bits per byte. "
        "A terminal also shows the text, coloured by surprisal."
    )
    parser.epilog = "example: npgpt score chapter.txt --model gpt2 --stride 512 --top 3"
    argument = parser.add_argument
    argument("files", nargs="*", metavar="FILE", help="text files; - or none reads standard input")
    add_common(parser, "--ids", "--model", "--n-head", "--activation")
    argument(
        "--convention",
        default="rolling",
        choices=NAMES,
        metavar="NAME",
        help="how long texts are cut: rolling (default, lm-evaluation-harness), huggingface or llama.cpp",
    )
    contexts = [f"{name}: {default.context}" for name, default in DEFAULTS.items() if default.context]
    strides = [f"{name}: 1/{default.per_window} of it" for name, default in DEFAULTS.items() if default.per_window > 1]
    begun = [name for name, default in DEFAULTS.items() if default.end_of_text]
    argument(
        "--context",
        type=int,
        metavar="N",
        help=f"tokens in a window (default: the model's context; {', '.join(contexts)})",
    )
    argument(
        "--stride",
        type=int,
        metavar="N",
        help=f"tokens from one window to the next (default: the window; {', '.join(strides)})",
    )
    argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help=f"put <|endoftext|> or bos_token_id before each text (default: {', '.join(begun)} does)",
    )
    add_common(parser, "--special")
    likely = "print each token's rank, and the K most likely tokens (default: 0; in a page: 5)"
    argument("--top", type=int, default=0, metavar="K", help=likely)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object per text, with every token")
    output.add_argument("--html", metavar="FILE", help="write a page with the text coloured by surprisal")
    output.add_argument("--resume", metavar="FILE.jsonl", help="append JSON; texts already in the file are skipped")
    add_common(parser, "--dtype")
    argument("--workers", type=int, metavar="N", help="number of processes; they share the weights in memory")
    add_common(parser, "--threads")


def run(options: argparse.Namespace) -> int:
    """Score; see the help."""
    tune(options.threads)
    with importing():
        from ..scoring import records
        from ..scoring.page import TOP, score_page
        from ..scoring.report import summary
        from ..scoring.texts import convention_of
        from .inputs import inputs, of_ids

    write_page = page_writer(options.html)
    resume = None if options.resume is None else output_path("--resume", options.resume)
    most = 4 * cores()
    if options.workers is not None and not 1 <= options.workers <= most:
        raise NpgptError(f"--workers must be between 1 and {most}, four per core, not {options.workers}")
    if options.ids is not None and options.files:
        raise NpgptError("give the text as files or as --ids, not both")
    if options.ids is None:
        texts = inputs(options.files or ["-"], again=resume is not None)
    else:
        texts = [of_ids("--ids", read_ids(options.ids))]
    model = open_model(options)
    if options.ids is None and model.why_no_text:
        raise NpgptError(f"{model.name} has no text: give --ids 1,2,3 in place of files; {model.why_no_text}")
    rule = convention_of(model, options.convention, options.context, options.stride, options.bos)
    top = options.top or (min(TOP, model.config.vocab_size) if write_page is not None else 0)
    as_lines = options.json or resume is not None
    by_token = as_lines or write_page is not None or options.top or sys.stdout.isatty()
    settings = records.settings(model, rule, options.top, options.special) if as_lines else {}
    known = records.Known(options.resume, settings)
    with records.appending(resume, known.add) if resume is not None else nullcontext(_print_line) as add_line:
        done = {number for number, text in enumerate(texts) if known.has(text.name) and known.take(*_hashed(text))}
        if done:
            note(f"{len(done)} of {len(texts)} texts are in {options.resume} already")

        def scored() -> Iterator[tuple[str, Any]]:
            """Print each text or write its JSON line as soon as it is scored, then pass it on to the page."""
            for number, found in _scores(options, texts, model, done, top if by_token else None):
                text = texts[number]
                known.sums.add(found.totals if by_token else found)
                if as_lines:
                    add_line(records.line(text.name, text.sha256, found, settings))
                else:
                    clear()
                    _print(text.name, found, options.top, model)
                yield text.name, found

        if write_page is not None:
            write_page(score_page(scored(), f"{model.name}, {options.dtype}", f"{rule}."))
        else:
            deque(scored(), maxlen=0)
    where = "" if resume is None else f" in {options.resume}"
    several = known.sums.texts > 1 or where
    rows = summary(f"all {known.sums.texts} texts{where}", known.sums.totals()) if several else []
    rows.append(f"{model.name}, {options.dtype}; {rule}")
    if options.json:
        note("; ".join(" ".join(row.split()) for row in rows))
    else:
        show(rows)
    return 0


def _hashed(text: Input) -> tuple[str, str]:
    """Read a text; return its name and its sha256."""
    for _ in () if text.ids else text.parts():
        pass
    return text.name, text.sha256


def _print_line(parts: Iterable[str]) -> None:
    """Print a JSON line that comes in parts."""
    sys.stdout.writelines(parts)
    print(flush=True)


def _print(name: str, found: Score | Totals, top: int, model: LanguageModel) -> None:
    """Print a text's sums; for --top and on a terminal also its tokens: coloured, or as figures without colours."""
    from ..scoring import report

    colours = coloured(sys.stdout)
    if not isinstance(found, tuple) and (top or sys.stdout.isatty()):
        if top or not colours:
            for line in report.table(found, top, colours):
                paint(line)
        else:
            for part in report.tinted(found):
                paint(part, end="")
            paint(f"\n\n{report.legend()}")
        print()
    show(report.summary(name, found if isinstance(found, tuple) else found.totals))
    sys.stdout.flush()


def _scores(
    options: argparse.Namespace, texts: list[Input], model: LanguageModel, done: set[int], top: int | None
) -> Iterator[tuple[int, Any]]:
    """Yield the number of each text that is not done with its Score (Totals if top is None), under a progress bar.

    Raises NpgptError if a worker process was killed.
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
    # lines and bar would mix, unless the lines go to a file, or to this terminal one after another
    between = options.json or (len(texts) > 1 and not options.resume and not sys.stdout.isatty())
    quiet = between and not into_file(sys.stdout)
    try:
        with pool as executor, nullcontext() if quiet else bar("tokens", of="of about") as draw:

            def progress(tokens: int, read: int) -> None:
                if draw is not None:
                    draw(tokens, None if size is None else max(tokens, tokens * size // max(read, 1)))

            found = (scoring.totals if top is None else scoring.score)(
                (text.ids or text.parts() for text in texts),
                model,
                executor,
                convention=options.convention,
                context=options.context,
                stride=options.stride,
                end_of_text=options.bos,
                special=options.special,
                **({} if top is None else {"top": top}),
                names=["standard input" if text.name == "-" else text.name for text in texts],
                skip=done,
                progress=progress,
            )
            yield from zip(numbers, found, strict=True)
    except BrokenExecutor:
        file, keeps = (options.resume, "keeps") if options.resume else ("--resume FILE.jsonl", "would keep")
        raise NpgptError(
            f"a worker process was killed, perhaps for lack of memory: use fewer --workers; {file} {keeps} what is done"
        ) from None
