"""npgpt tokens: a text's ids and pieces."""

from __future__ import annotations

import argparse
import json

from .options import add_common, importing, note, read_text


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = "Print each token's id and piece. --model gpt2 is GPT-2's vocabulary, weights or no weights."
    parser.epilog = 'example: npgpt tokens --model gpt2 "Hello, world"'
    argument = parser.add_argument
    argument("text", help="the text, or - for standard input")
    add_common(parser, "--model", "--special")
    argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Print tokens; see the help."""
    with importing():
        from ..text.tokenizer import quoted, shown
        from ..text.vocabularies import load_tokenizer

    tokenizer = load_tokenizer(options.model)
    ids = tokenizer.encode(read_text(options.text), special=options.special)
    if options.json:
        pieces = [shown(tokenizer.piece(token_id)) for token_id in ids]
        print(json.dumps({"ids": ids, "pieces": pieces, "vocabulary": tokenizer.source}))
        return 0
    note(f"{len(ids)} tokens of {tokenizer.source} ({tokenizer.n_vocab} ids)")
    for token_id in ids:
        print(f"{token_id:>5}  {quoted(tokenizer.piece(token_id))}")
    return 0
