"""npgpt attend: attention weights as a picture."""

from __future__ import annotations

import argparse
import shutil
import sys
from typing import Any

from .html import page_writer
from .options import add_common, add_text, coloured, importing, open_model, text_ids, tune

NARROWEST = 20  # columns


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "attend",
        help="attention weights as a picture",
        description="Show which token attends to which: a heat map of one head, or of each head of a layer.",
        epilog='example: npgpt attend "Her mother was glad" --layer 2 --head 3',
    )
    add_text(parser)
    parser.add_argument("--layer", type=int, metavar="L", help="from 0 (default: 0; with --html: all)")
    parser.add_argument("--head", type=int, metavar="H", help="from 0 (default: all)")
    parser.add_argument("--html", metavar="FILE", help="write a page to look through instead")
    add_common(parser, "--model", "--n-head")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Show attention; see the help."""
    tune()
    with importing():
        from ..pictures.attention import attention_weights
        from ..pictures.attention_page import page_of
        from ..pictures.terminal import palette_for, picture

    write_page = page_writer(options.html)
    model = open_model(options)
    _, token_ids = text_ids(options, model)
    if write_page is not None:
        write_page([page_of(model, token_ids, layer=options.layer, head=options.head)])
        return 0
    attention = attention_weights(model, token_ids, layer=options.layer or 0, head=options.head)
    columns = max(NARROWEST, shutil.get_terminal_size().columns)
    palette = palette_for(sys.stdout.encoding, coloured(sys.stdout))
    print("\n".join(picture(attention, columns, palette)))
    return 0
