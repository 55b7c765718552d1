"""npgpt score: how likely the model holds a text, token by token."""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import NpgptError
from ..process import cores
from .options import add_model, add_n_head, coloured, importing, into_file, note, output_path, read_file, tune
from .progress import bar

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ..language_model import LanguageModel
    from ..scoring.likelihood import Score
    from ..scoring.report import Whole


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "score",
        help="perplexity, and each token's probability",
        description="Print how likely the model holds texts: perplexity by token and by word, bits per byte. "
        "On a terminal the text is tinted by surprise.",
        epilog="example: npgpt score chapter.txt --model gpt2 --stride 512 --top 3",
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="texts; - or none: standard input")
    add_model(parser)
    add_n_head(parser)
    parser.add_argument(
        "--convention",
        default="rolling",
        metavar="NAME",
        help="rolling (default; lm-evaluation-harness), huggingface, or llama.cpp",
    )
    parser.add_argument("--context", type=int, metavar="N", help="tokens of a window (default: the model's context)")
    parser.add_argument("--stride", type=int, metavar="N", help="from one window to the next (default: a window)")
    parser.add_argument("--bos", action=argparse.BooleanOptionalAction, help="<|endoftext|> stands before the text")
    parser.add_argument("--special", action="store_true", help="read special tokens such as <|endoftext|> as such")
    parser.add_argument("--top", type=int, default=0, metavar="K", help="each token's rank, and the K likeliest there")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object a text, token by token")
    output.add_argument("--html", metavar="FILE", help="write a page: tinted text, figures where one points")
    output.add_argument("--resume", metavar="FILE.jsonl", help="add the JSON of those texts that it lacks")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="default: float32")
    parser.add_argument("--workers", type=int, metavar="N", help="processes, which share the weights in memory")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of each process (default: all cores)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Score; see the help."""
    tune(options.threads)
    with importing():
        from ..language_model import load
        from ..scoring import report as report
        from ..scoring.likelihood import total
        from ..scoring.page import page
        from ..scoring.scoring import score
        from ..scoring.windows import convention

    html, resume = output_path("--html", options.html), output_path("--resume", options.resume)
    most = 4 * cores()
    if options.workers is not None and not 1 <= options.workers <= most:
        raise NpgptError(f"--workers must be from 1 to {most}, four for each core, not {options.workers}")
    names = options.files or ["-"]
    texts = [read_file(name) for name in names]
    model = load(options.model, dtype=options.dtype, n_head=options.n_head)
    if model.origin:
        note(model.origin)
    rule = convention(options.convention, model.config, options.context, options.stride, options.bos)

    def scores(done: set[int]) -> Iterator[tuple[int, Score]]:
        """Of the texts that are not done, each with its number."""
        quiet = options.json and not into_file(sys.stdout)  # a bar would lie between the lines
        with _executor(options) as executor, nullcontext() if quiet else bar("tokens") as progress:
            found = score(
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
                progress=progress or (lambda *_: None),  # with one, all texts are found fit before the work begins
            )
            yield from zip((number for number in range(len(texts)) if number not in done), found, strict=True)

    if options.json or resume is not None:
        settings = report.settings(model, rule, options.top, options.special)
        with _records(resume) as (records, add_record):
            done = _done(records, options, names, texts, settings)
            sums = [found.totals for found in records]
            for number, text in scores(done):
                sums.append(text.totals)
                add_record(report.record(names[number], texts[number], text, settings))
    else:
        found = list(scores(set()))  # until all is known, the terminal is the progress bar's
        sums = [text.totals for _, text in found]
        for number, text in found:
            _print(names[number], text, options.top, model)
        if html is not None:
            from ..checkpoints.atomic import writing

            with writing(html) as file:
                file.writelines(part.encode() for part in page([(names[n], text) for n, text in found], model, rule))
    where = "" if resume is None else f" in {options.resume}"
    rows = report.summary(f"all {len(sums)} texts{where}", total(sums)) if len(sums) > 1 or where else []
    rows.append(f"{model.name}, {options.dtype}; {rule}")
    if options.json:
        note("; ".join(" ".join(row.split()) for row in rows))
    else:
        print("\n".join(rows))
    if html is not None:
        note(f"wrote {options.html}, {html.stat().st_size:,} bytes")
    return 0


def _print(name: str, text: Score, top: int, model: LanguageModel) -> None:
    """A text's tokens, tinted where a terminal shows colours, and its sums."""
    from ..scoring import report as report

    colours = coloured(sys.stdout)
    if top:
        for line in report.table(text, model, colours):
            print(line)
    elif colours:
        for part in report.tinted(text):
            print(part, end="")
        print(f"\n\n{report.legend()}")
    if top or colours:
        print()
    for line in report.summary(name, text.totals):
        print(line)


@contextmanager
def _executor(options: argparse.Namespace) -> Iterator[Executor | None]:
    """Processes where they are asked for. Raises NpgptError where one of them was killed."""
    if options.workers is None:
        yield None
        return
    from concurrent.futures import BrokenExecutor

    from ..scoring.workers import processes

    try:
        with processes(options.workers, options.threads) as pool:
            yield pool
    except BrokenExecutor:
        kept = (
            f"{options.resume} keeps what is done" if options.resume else "--resume FILE.jsonl would keep what is done"
        )
        raise NpgptError(f"a worker was killed, perhaps for want of memory: fewer --workers; {kept}") from None


@contextmanager
def _records(resume: Path | None) -> Iterator[tuple[list[Whole], Callable[[dict[str, Any]], None]]]:
    """What is there already, and where more of it goes: the file, or standard output."""
    from ..scoring.json_lines import appending, line
    from ..scoring.report import read

    if resume is None:
        yield [], lambda record: print(line(record), flush=True)
    else:
        with appending(resume, ("text", "sha256"), read) as both:
            yield both


def _done(
    records: list[Whole], options: argparse.Namespace, names: list[str], texts: list[str], settings: dict[str, Any]
) -> set[int]:
    """Which texts are in the file already. Raises NpgptError where it was made in another way, or of other texts."""
    from ..scoring.report import fingerprint

    there = Counter((found.text, found.sha256) for found in records)
    contents: dict[str, set[str]] = defaultdict(set)
    for found in records:
        contents[found.text].add(found.sha256)
        for key, value in settings.items():
            if (theirs := found.settings.get(key)) != value:
                raise NpgptError(
                    f"{options.resume} was made with {key} {theirs!r:.80}, and now it is {value!r}: take another file"
                )
    done = set()
    for number, name in enumerate(names):
        one = (name, fingerprint(texts[number]))
        if contents[name] - {one[1]}:
            raise NpgptError(f"{name} is another text than the {name} in {options.resume}: take another file")
        if there[one]:
            there[one] -= 1
            done.add(number)
    if done:
        note(f"{len(done)} of {len(texts)} texts are in {options.resume} already")
    return done
