"""npgpt attend: attention weights as a picture."""

from __future__ import annotations

import argparse
import shutil
import sys

from .html import page_writer
from .options import add_common, add_text, coloured, importing, open_model, text_ids, tune
from .streams import paint

NARROWEST = 20  # columns


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Show which token attends to which: a heat map of one head, or of each head of a layer. A head is labelled by "
        "where its weight goes on average, if that says much: the previous token, the first, the query's own, or even."
    )
    parser.epilog = 'example: npgpt attend "Her mother was glad" --layer 2 --head 3'
    argument = parser.add_argument
    add_text(parser)
    argument("--layer", type=int, metavar="L", help="from 0 (default: 0; with --html: all)")
    argument("--head", type=int, metavar="H", help="from 0 (default: all)")
    argument("--html", metavar="FILE", help="write a page to look through instead")
    add_common(parser, "--model", "--n-head", "--activation")


def run(options: argparse.Namespace) -> int:
    """Show attention; see the help."""
    tune()
    with importing():
        from ..pictures.attention import attend, check_size, selected
        from ..pictures.terminal import palette_for, picture

    write_page = page_writer(options.html)
    model = open_model(options)
    _, token_ids = text_ids(options, model)
    if write_page is not None:
        layers = selected("layer", options.layer, model.config.n_layer, model.name)
        heads = selected("head", options.head, model.config.n_head, model.name)
        check_size(len(layers), len(heads), len(token_ids))  # before the forward pass
        write_page([attend(token_ids, model, layer=options.layer, head=options.head).page()])
        return 0
    attention = attend(token_ids, model, layer=options.layer or 0, head=options.head)
    columns = max(NARROWEST, shutil.get_terminal_size().columns)
    palette = palette_for(sys.stdout.encoding, coloured(sys.stdout))
    paint("\n".join(picture(attention, columns, palette)))
    return 0
