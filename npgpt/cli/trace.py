"""npgpt trace: the intermediates of a run, in a file."""

from __future__ import annotations

import argparse

from .options import add_common, add_text, importing, note, open_model, output_path, text_ids, tune, unwinding


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Write every intermediate of one run under its name, to compare another implementation with; "
        "npgpt check reads the same names."
    )
    parser.epilog = "example: npgpt trace \"It is a truth\" -o truth.npz --only logits --only 'h.0.*'"
    argument = parser.add_argument
    add_text(parser)
    argument("-o", "--output", required=True, metavar="FILE", help="where to: FILE.npz or FILE.safetensors")
    argument(
        "--only", action="append", default=[], metavar="PATTERN", help="names that fit, such as 'h.*.attn.weights'"
    )
    add_common(parser, "--dtype", "--model", "--n-head", "--activation")


def run(options: argparse.Namespace) -> int:
    """Trace; see the help."""
    tune()
    with importing():
        from .. import tracing

    path = output_path("-o", options.output)
    tracing.suffix(path)
    model = open_model(options)
    text, token_ids = text_ids(options, model)
    stages = tracing.trace(model, token_ids, options.only)
    size = sum(array.nbytes for array in stages.values())
    note(f"{options.output}: {len(stages)} intermediates of {len(token_ids)} tokens, {options.dtype}, {size:,} bytes")
    with unwinding():
        tracing.write(path, stages, tracing.metadata(model, token_ids, text))
    return 0
