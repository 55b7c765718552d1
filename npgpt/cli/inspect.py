"""npgpt inspect: what a checkpoint holds, and what is wrong with it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .options import add_common, importing, show

if TYPE_CHECKING:
    from ..checkpoints.inspect import Inspection


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = "Print a model's configuration with its head split, its parameters by part, and its files."
    parser.epilog = "example: npgpt inspect weights/gpt2"
    parser.add_argument("model", nargs="?", help="name or path of a model (default: the embedded one)")
    add_common(parser, "--n-head", "--activation")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Inspect; see the help."""
    with importing():
        from ..checkpoints.inspect import inspect

    found = inspect(options.model, n_head=options.n_head, activation=options.activation)
    if options.json:
        print(found.to_json())
    else:
        show(report(found))
    return 0


def report(found: Inspection) -> list[str]:
    """Return the lines to print."""
    config, total = found.config, sum(found.counts.values())
    published = f"the shapes of the published {found.published_name}" if found.published_name else "no published size"
    inner = "" if config.n_inner is None else f" (n_inner; {config.inner_width / config.n_embd:g} × n_embd)"
    scaling = (
        f"scale_attn_weights {config.scale_attn_weights}, "
        f"scale_attn_by_inverse_layer_idx {config.scale_attn_by_inverse_layer_idx}"
    )
    activation = f"{config.activation_function}{' (a guess)' if found.guesses_gelu else ''}"
    usual = config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
    configuration = [
        ("n_layer", f"{config.n_layer} blocks"),
        ("n_head", f"{config.n_embd} = {config.n_head} heads × {config.head_width}"),
        ("n_positions", f"{config.n_positions} tokens of context"),
        ("vocab_size", f"{config.vocab_size} ids; text: {found.vocabulary}"),
        ("mlp", f"{config.n_embd} → {config.inner_width} → {config.n_embd}{inner}, {activation}"),
        ("layer norm", f"epsilon {config.layer_norm_epsilon:g}"),
        ("output head", "wte itself (tied)" if config.tie_word_embeddings else "lm_head, its own (untied)"),
        ("attention", None if usual else scaling),
        ("text begins", found.begin),
        ("text ends", found.ends),
        *(("not used", text) for text in found.unused),
        ("unknown keys", f"{', '.join(found.unknown_keys)} (in config.json; not used)" if found.unknown_keys else None),
    ]
    file = [
        ("path", str(found.path)),
        ("format", found.description),
        ("tensors", ", ".join(f"{count} {dtype}" for dtype, count in found.dtypes.items()) + _at_load(found)),
        ("values", _values(found)),
        ("checksums", found.unchecked),
        *(("note", line) for line in found.notes),
    ]
    for path, (size, sha256) in found.files.items():
        name = path.name if len(found.files) > 1 else None
        file += [("file", name), ("size", f"{size:,} bytes"), ("sha256", sha256)]
    return [
        f"{found.name}: GPT-2 of {total:,} parameters, {published}",
        *_table("configuration", configuration),
        *_table("parameters", [(part, f"{count:>13,}  {count / total:6.1%}") for part, count in found.counts.items()]),
        *_table("file", file),
    ]


def _table(heading: str, rows: Iterable[tuple[str, str | None]]) -> list[str]:
    """Return the lines of a table, without the rows that have no value."""
    return ["", heading, *(f"  {key:<15} {value}" for key, value in rows if value is not None)]


def _at_load(found: Inspection) -> str:
    """Return what loading in float32 does to the tensors: copied, converted, or used in place."""
    if found.misaligned:
        return f"; {len(found.misaligned)} lie on no multiple of their size and are copied at load"
    if set(found.dtypes) != {"float32"}:
        return "; converted to float32 at load"
    return "; used where they lie, not copied"


def _values(found: Inspection) -> str:
    """Return whether all values are finite, and which tensors have others."""
    if not found.non_finite:
        return "all finite"
    faults = [f"{name} has {nan} NaN and {inf} infinite" for name, (nan, inf) in found.non_finite.items()]
    return "NOT FINITE: " + "; ".join(faults)
