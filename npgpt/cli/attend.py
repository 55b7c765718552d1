"""npgpt attend: attention weights as a picture."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import NpgptError, printable
from .options import add_model, add_n_head, importing, note, read_ids, read_text, set_threads

if TYPE_CHECKING:
    from ..attending import Attended
    from ..heat import Style
    from ..language_model import LanguageModel

NARROWEST = 20  # columns


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "attend",
        help="attention weights as a picture",
        description="Show which token attends to which: a heat map of one head, or small ones of a layer's heads.",
        epilog='example: npgpt attend "Her mother was glad" --layer 2 --head 3',
    )
    parser.add_argument("text", nargs="?", help="the text, or - for standard input")
    parser.add_argument("--ids", metavar="1,2,3", help="the text as token ids")
    parser.add_argument("--layer", type=int, metavar="L", help="from 0 (default: 0; with --html: all)")
    parser.add_argument("--head", type=int, metavar="H", help="from 0 (default: all)")
    parser.add_argument("--html", metavar="FILE", help="write a page to look through instead")
    add_model(parser)
    add_n_head(parser)
    parser.add_argument("--special", action="store_true", help="read special tokens such as <|endoftext|> as such")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Show attention; see the help."""
    set_threads(None)
    with importing():
        from ..attending import attend, chosen
        from ..attention_page import check_size, page
        from ..checkpoints.atomic import writing
        from ..loading import load

    html = None if options.html is None else Path(os.path.expanduser(options.html))
    if html is not None and not html.parent.is_dir():  # before all the work, not after it
        raise NpgptError(f"--html {options.html}: there is no folder {html.parent}; make it, or name another")
    if html is not None and html.is_dir():
        raise NpgptError(f"--html {options.html}: is a folder; name a file in it")
    model = load(options.model, n_head=options.n_head)
    if model.origin:
        note(model.origin)
    token_ids = _token_ids(options, model)
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
    from .. import heat

    style = _style()
    columns = max(NARROWEST, shutil.get_terminal_size().columns)
    T, layer = len(attended.token_ids), attended.layers[0]
    name = f"{printable(attended.model)}, layer {layer}"
    weights = attended.weights[0]  # [H, T, T]
    if len(attended.heads) == 1:
        lines = heat.map_lines(weights[0], attended.texts, columns, style)
        title = f"{name}, head {attended.heads[0]}: weights [{T}, {T}] out of [1, {attended.n_head}, {T}, {T}]"
    else:
        lines = heat.grid_lines(weights, attended.heads, columns, style)
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
        heat.scale(style),
    ]


def _style() -> Style:
    """Colours where a terminal shows them and nobody objects; ASCII where there is no more."""
    from .. import heat

    try:
        "".join([*heat.SHADED[1:], "▀▄"]).encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return heat.ASCII
    coloured = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR")
    return heat.COLOURED if coloured else heat.SHADED


def _token_ids(options: argparse.Namespace, model: LanguageModel) -> list[int]:
    """The text as ids that fit into the context."""
    if options.ids is not None and options.text is not None:
        raise NpgptError("give the text as text or as --ids, not both")
    if options.ids is not None:
        ids = read_ids(options.ids)
    elif options.text is None:
        raise NpgptError("there is no text: give it, or - for standard input, or --ids 1,2,3")
    else:
        text = read_text(options.text)
        if not text:
            raise NpgptError(
                'the text is empty: attention needs a token at least; give one, or "<|endoftext|>" --special'
            )
        ids = model.encode_prompt(text, special=options.special)
    context = model.config.n_positions
    if len(ids) > context:
        raise NpgptError(
            f"the text has {len(ids)} tokens, the context holds {context}: shorten it by {len(ids) - context}"
        )
    return ids
