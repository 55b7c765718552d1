"""npgpt generate: a prompt and what the model writes after it."""

from __future__ import annotations

import argparse
import json
import secrets
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..errors import NpgptError
from .options import add_model, add_n_head, importing, note, read_text, set_threads

if TYPE_CHECKING:
    from ..language_model import LanguageModel


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "generate",
        help="continue a prompt",
        description="Print a prompt and, as it is produced, what the model writes after it.",
        epilog='example: npgpt generate "It is a truth universally acknowledged" --temperature 0 --max-tokens 40',
    )
    parser.add_argument(
        "prompt", nargs="?", help="the text, or - for standard input, newline and all; none: <|endoftext|>"
    )
    parser.add_argument("--ids", metavar="1,2,3", help="the prompt as token ids")
    add_model(parser)
    add_n_head(parser)
    parser.add_argument("--max-tokens", type=int, default=100, metavar="N", help="stop after N tokens (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (default: 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="from the likeliest until they reach P, the one that crosses it too"
    )
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="from those at least P times as likely as the likeliest"
    )
    parser.add_argument(
        "--seed", type=int, metavar="S", help="same seed, same text (default: a new one, which -v tells)"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on after <|endoftext|>")
    parser.add_argument("--special", action="store_true", help="read special tokens such as <|endoftext|> as such")
    parser.add_argument(
        "--keep-last",
        action="store_true",
        help="cut the head of a prompt longer than the context",
    )
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="default: float32")
    parser.add_argument("--threads", type=int, metavar="N", help="threads for matrix products (default: all cores)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of text")
    parser.add_argument("-v", "--verbose", action="store_true", help="counts and times on stderr")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Generate; see the help."""
    set_threads(options.threads)
    with importing():
        from ..loading import load
        from ..sampling import Sampling

    seed = secrets.randbits(32) if options.seed is None else options.seed
    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, min_p=options.min_p)
    model = load(options.model, dtype=options.dtype, n_head=options.n_head)
    if model.origin:
        note(model.origin)
    has_text = not isinstance(model.vocabulary, str)
    prompt_ids = _prompt_ids(options, model)
    steps = model.steps(
        prompt_ids,
        max_tokens=options.max_tokens,
        sampling=sampling,
        seed=seed,
        stop=options.stop,
        ignore_eos=options.ignore_eos,
    )
    prompt = "" if options.prompt is None and options.ids is None else _as_text(model, prompt_ids)
    started = time.perf_counter()
    text, token_ids, times = "", [], []
    for number, step in enumerate(steps):
        if step.token_id is not None:
            token_ids.append(step.token_id)
            times.append(time.perf_counter())
        piece = step.text if has_text else _spaced(step[:1])
        text += piece
        if not options.json:
            print(piece if number else prompt + piece, end="", flush=True)
    finish = step.finish

    seconds = times[0] - started if times else None
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
    if options.json:
        report: dict[str, Any] = {
            "model": model.name,
            "dtype": str(model.parameters.wte.weight.dtype),
            "prompt": prompt,
            "prompt_ids": prompt_ids,
            "text": text,
            "token_ids": token_ids,
            "finish": finish,
            "seed": seed,
            "seconds_to_first_token": seconds,
            "tokens_per_second": rate,
        }
        print(json.dumps(report))
    else:
        print()
    if finish == "context":
        note(f"the context of {model.config.n_positions} tokens is full")
    if options.verbose:
        pace = f"{seconds:.3f} s to the first token" if seconds is not None else "no token"
        pace += f", then {rate:.1f} tokens/s" if rate is not None else ""
        note(f"{len(prompt_ids)} prompt tokens, {len(token_ids)} generated ({finish}), seed {seed}; {pace}")
    return 0


def _prompt_ids(options: argparse.Namespace, model: LanguageModel) -> list[int]:
    """The prompt as ids that fit into the context."""
    if options.ids is not None and options.prompt is not None:
        raise NpgptError("give the prompt as text or as --ids, not both")
    if options.ids is not None:
        try:
            ids = [int(number) for number in options.ids.split(",")]
        except ValueError:
            raise NpgptError(f"--ids takes whole numbers with commas between them, not {options.ids!r}") from None
    else:
        ids = model.encode_prompt(read_text(options.prompt or ""), special=options.special)
    context = model.config.n_positions
    if len(ids) <= context:
        return ids
    if not options.keep_last:
        raise NpgptError(f"the prompt has {len(ids)} tokens, the context holds {context}; --keep-last cuts its head")
    kept = context - min(max(options.max_tokens - 1, 0), context // 2)  # the last token drawn takes no room
    note(f"the prompt's first {len(ids) - kept} of {len(ids)} tokens are cut, {kept} kept in the context of {context}")
    return ids[-kept:]


def _as_text(model: LanguageModel, prompt_ids: list[int]) -> str:
    """The prompt as text, less a character that its end cuts in two, or as ids where the model has no text."""
    from ..tokenizer import TextDecoder

    if isinstance(model.vocabulary, str):
        return _spaced(prompt_ids)
    return TextDecoder(model.vocabulary, prompt_ids).before


def _spaced(token_ids: Iterable[int | None]) -> str:
    """Ids of a model without text, each with a space after it."""
    return "".join(f"{token_id} " for token_id in token_ids if token_id is not None)
