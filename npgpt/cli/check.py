"""npgpt check: another implementation's numbers against GPT-2's."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ..errors import NpgptError
from .options import add_model, add_n_head, importing, note, output_path, read_text, tune


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "check",
        help="name the mistake in another implementation",
        description="Compare another implementation's logits or stages with GPT-2's, and name the mistake. "
        "Exit code 0: matches, 1: differs, 2: could not be compared.",
        epilog='example: npgpt check theirs.npz --model gpt2 --prompt "Every effort moves you"',
    )
    parser.add_argument("theirs", metavar="THEIRS", help=".npz, .npy, .safetensors, .pt, raw .bin, llm.c's debug state")
    add_model(parser)
    add_n_head(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="what it was run on; - reads standard input")
    parser.add_argument("--ids", metavar="1,2,3", help="the same as ids")
    parser.add_argument(
        "--their-dtype",
        choices=("float32", "float16", "bfloat16", "float64"),
        help="it computed in (default: the coarsest that fits)",
    )
    parser.add_argument("--shape", metavar="T,V", help="of raw numbers in a .bin")
    parser.add_argument("--chunks", metavar="5,1,1", help="tokens run at a time with a cache, where it was")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--html", metavar="FILE", help="write the report as a page, too")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check; see the help."""
    tune()
    with importing():
        from ..checkpoints.atomic import writing
        from ..language_model import load
        from ..oracle import files, page
        from ..oracle.checking import check
        from ..oracle.greedy import check_greedy

    html = output_path("--html", options.html)
    shape = _numbers("--shape", options.shape)
    theirs = Path(os.path.expanduser(options.theirs))
    given = files.read(theirs, tuple(shape) if shape else None, options.their_dtype or "float32")
    model = load(options.model, dtype="float64", n_head=options.n_head)
    if options.prompt is not None and options.ids is not None:
        raise NpgptError("--prompt and --ids say the same: give one of them")
    stated = None
    if options.ids is not None:
        stated = _numbers("--ids", options.ids)
    elif options.prompt is not None:
        stated = model.encode_prompt(read_text(options.prompt))
    ids = given.token_ids if given.token_ids is not None else stated
    if ids is None:
        raise NpgptError(f"{theirs} holds no ids: give what it was run on, --prompt TEXT or --ids 1,2,3")
    if stated is not None and given.token_ids is not None and given.token_ids.reshape(-1).tolist() != list(stated):
        raise NpgptError(
            f"{theirs} holds other ids than --prompt or --ids says: {given.token_ids.reshape(-1).tolist()!r:.200}"
        )
    if given.greedy_ids is not None and not given.arrays:
        greedy = check_greedy(given.greedy_ids, ids, model, dtype=options.their_dtype or "float32")
        print(greedy)
        return greedy.code
    arrays = dict(given.arrays)
    if given.flat:
        arrays["logits"] = files.state_logits(given, model.config.vocab_size)
    report = check(
        arrays,
        ids,
        model,
        dtype=options.their_dtype,
        attention_mask=given.attention_mask,
        chunks=_numbers("--chunks", options.chunks) or (),
    )
    print(report.to_json() if options.json else report)
    if html is not None:
        with writing(html) as file:
            file.write(page.page(report).encode())
        note(f"wrote {options.html}")
    return report.code


def _numbers(name: str, text: str | None) -> list[int] | None:
    """Whole numbers between commas."""
    if text is None:
        return None
    try:
        found = [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise NpgptError(f"{name} must be whole numbers between commas, such as 1,2,3, not {text!r:.80}")
    return found
