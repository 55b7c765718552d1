"""npgpt trace: write the intermediates of a run."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from ..checkpoints.atomic import check_new
from ..errors import NpgptError, about
from .options import add_common, add_text, importing, note, open_model, output_path, text_ids, tune, unwinding


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
        help="write a folder; FORM is raw: a little-endian .bin for each array, and manifest.json",
    )
    argument(
        "--only", action="append", default=[], metavar="PATTERN", help="names to write, such as 'h.*.attn.weights'"
    )
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
        path = _folder(form, place, tracing.FOLDERS)
    model = open_model(options)
    text, token_ids = text_ids(options, model)
    stages = tracing.trace(token_ids, model, only=options.only)
    size = sum(array.nbytes for array in stages.values())
    with unwinding():
        tracing.write(path, stages, tracing.metadata(model, token_ids, text), form)
    note(f"{place}: {len(stages)} intermediates of {len(token_ids)} tokens, {options.dtype}, {size:,} bytes")
    return 0


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
