"""npgpt trace: write the intermediates of a run."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from ..checkpoints.atomic import check_new
from ..errors import NpgptError, about, whole_number
from .options import (
    add_common,
    add_text,
    any_text_ids,
    importing,
    note,
    open_model,
    output_path,
    text_ids,
    tune,
    unwinding,
)

LLM_C = "llm.c"


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Write every intermediate array of a run under its name, to compare another implementation with. "
        "npgpt check reads what this writes."
    )
    parser.epilog = "example: npgpt trace \"It is a truth\" -o truth.npz --only logits --only 'h.0.*'"
    argument = parser.add_argument
    add_text(parser)
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("-o", "--output", metavar="FILE", help="write FILE.npz or FILE.safetensors")
    place.add_argument(
        "--to",
        nargs=2,
        metavar=("FORM", "DIR"),
        help="write a folder; FORM is raw (a little-endian .bin for each array, and manifest.json) or llm.c (what its "
        "test_gpt2.c reads)",
    )
    argument(
        "--only", action="append", default=[], metavar="PATTERN", help="names to write, such as 'h.*.attn.weights'"
    )
    argument("--loss", action="store_true", help="add the mean cross-entropy of the next tokens, as loss")
    argument(
        "--gradients",
        action="store_true",
        help="add the loss's gradient by each stage and parameter, as d.h.0.ln_1 and d.h.0.ln_1.weight",
    )
    argument("--batch", type=int, metavar="B", help="with --to llm.c: rows of ids (default: 4)")
    argument("--length", type=int, metavar="T", help="with --to llm.c: ids in a row (default: 64)")
    add_common(parser, "--dtype", "--model", "--n-head", "--activation")


def run(options: argparse.Namespace) -> int:
    """Trace; see the help."""
    tune()
    with importing():
        from .. import tracing

    form, place = options.to or (None, options.output)
    if form is None:
        path = output_path("-o", place)
        tracing.suffix(path)
    else:
        path = _folder(form, place, (*tracing.FOLDERS, LLM_C))
    _refuse_others(options, form)
    model = open_model(options)
    if form == LLM_C:
        _, token_ids = any_text_ids(options, model)
        batch, length = options.batch or 4, options.length or 64
        with unwinding():
            loss, why_no_tokenizer = tracing.write_llmc(path, model, token_ids, batch, length)
        if why_no_tokenizer:
            note(f"{place} has no gpt2_tokenizer.bin: {why_no_tokenizer}")
        used = f"the first {batch * length + 1} of {len(token_ids)} tokens"
        note(f"{place}: llm.c's files of {used}, {batch} × {length}, float32, loss {loss:.6f}")
        return 0
    text, token_ids = text_ids(options, model)
    stages = tracing.trace(token_ids, model, only=options.only, loss=options.loss, gradients=options.gradients)
    size = sum(array.nbytes for array in stages.values())
    with unwinding():
        tracing.write(path, stages, tracing.metadata(model, token_ids, text, stages), form)
    note(f"{place}: {len(stages)} intermediates of {len(token_ids)} tokens, {options.dtype}, {size:,} bytes")
    return 0


def _refuse_others(options: argparse.Namespace, form: str | None) -> None:
    """Raise NpgptError for an option that has no meaning in this form, None for a file."""
    if form == LLM_C:
        reasons = {
            "--only": options.only and "test_gpt2.c reads its files whole",
            "--loss": options.loss and "its files hold the loss in any case",
            "--gradients": options.gradients and "its files hold the gradients in any case",
            "--dtype": options.dtype != "float32" and f"its files hold float32, not {options.dtype}",
        }
        for name, reason in reasons.items():
            if reason:
                raise NpgptError(f"{name} does not go with --to llm.c: {reason}")
    for name, value in (("--batch", options.batch), ("--length", options.length)):
        if value is not None and form != LLM_C:
            raise NpgptError(f"{name} {value} goes with --to llm.c only: other forms hold the whole text as one row")
        if value is not None:
            whole_number(name, value)


def _folder(form: str, place: str, forms: Iterable[str]) -> Path:
    """Return the folder of --to. Raises NpgptError, before the work, for an unknown form or a folder that is in use."""
    if form not in forms:
        raise NpgptError(f"--to writes {' or '.join(forms)}, not {form!r:.80}; for .npz or .safetensors use -o FILE")
    path = Path(place).expanduser()
    if not path.absolute().parent.is_dir():
        raise NpgptError(f"--to {form} {place}: there is no folder {path.parent}")
    with about(f"--to {form}"):
        check_new(path)
    return path
