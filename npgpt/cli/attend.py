"""npgpt attend: attention weights as a picture."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Any

from ..errors import printable
from .options import add_model, add_n_head, add_text, coloured, importing, note, output_path, text_ids, tune

if TYPE_CHECKING:
    from ..pictures.attention import Attended
    from ..pictures.terminal import Style

NARROWEST = 20  # columns


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "attend",
        help="attention weights as a picture",
        description="Show which token attends to which: a heat map of one head, or small ones of a layer's heads.",
        epilog='example: npgpt attend "Her mother was glad" --layer 2 --head 3',
    )
    add_text(parser)
    parser.add_argument("--layer", type=int, metavar="L", help="from 0 (default: 0; with --html: all)")
    parser.add_argument("--head", type=int, metavar="H", help="from 0 (default: all)")
    parser.add_argument("--html", metavar="FILE", help="write a page to look through instead")
    add_model(parser)
    add_n_head(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Show attention; see the help."""
    tune()
    with importing():
        from ..checkpoints.atomic import writing
        from ..language_model import load
        from ..pictures.attention import attend, chosen
        from ..pictures.attention_page import check_size, page

    html = output_path("--html", options.html)
    model = load(options.model, n_head=options.n_head)
    if model.origin:
        note(model.origin)
    _, token_ids = text_ids(options, model)
    if html is None:
        layer = 0 if options.layer is None else options.layer
        for line in report(attend(model, token_ids, layer=layer, head=options.head)):
            print(line)
        return 0
    layers = chosen("layer", options.layer, model.config.n_layer, model.name)
    heads = chosen("head", options.head, model.config.n_head, model.name)
    check_size(len(layers), len(heads), len(token_ids))
    text = page(attend(model, token_ids, layer=options.layer, head=options.head))
    with writing(html) as file:
        file.write(text.encode())
    note(f"wrote {options.html}")
    return 0


def report(attended: Attended) -> list[str]:
    """The lines that are printed: the map of one head, or those of one layer's heads, and what they show."""
    from ..pictures import terminal

    style = _style()
    columns = max(NARROWEST, shutil.get_terminal_size().columns)
    T, layer = len(attended.token_ids), attended.layers[0]
    name = f"{printable(attended.model)}, layer {layer}"
    weights = attended.weights[0]  # [H, T, T]
    if len(attended.heads) == 1:
        lines = terminal.map_lines(weights[0], attended.texts, columns, style)
        title = f"{name}, head {attended.heads[0]}: weights [{T}, {T}] out of [1, {attended.n_head}, {T}, {T}]"
    else:
        lines = terminal.grid_lines(weights, attended.heads, columns, style)
        title = (
            f"{name}: weights [1, {attended.n_head}, {T}, {T}], a map for each head (--head H for one with its tokens)"
        )
    axes = (
        "Rows are queries, columns are keys; softmax over the keys: each row sums to 1. "
        f"Later keys are masked: {'no colour' if style.colour else style.shades[0]}."
    )
    return [
        *textwrap.wrap(title, columns),
        *textwrap.wrap(axes, columns),
        "",
        *lines,
        "",
        terminal.scale(style),
    ]


def _style() -> Style:
    """Colours where a terminal shows them and nobody objects; ASCII where there is no more."""
    from ..pictures import terminal

    try:
        "".join([*terminal.SHADED[1:], "▀▄"]).encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return terminal.ASCII
    return terminal.COLOURED if coloured(sys.stdout) else terminal.SHADED
