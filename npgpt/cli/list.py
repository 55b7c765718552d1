"""npgpt list: the models on this machine."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from .options import importing, show


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "List the models that --model finds by name: the embedded one, those in ./weights/ and $NPGPT_WEIGHTS, and "
        "those in the Hugging Face cache. A folder or file anywhere else is given by its path."
    )
    parser.epilog = "example: npgpt list"
    parser.add_argument("--json", action="store_true", help="print one JSON object per model")


def run(options: argparse.Namespace) -> int:
    """List models; see the help."""
    with importing():
        from ..checkpoints.inspect import listed
        from ..checkpoints.places import names

    found = list(map(listed, names()))
    if options.json:
        for model in found:
            print(json.dumps(asdict(model)))
        return 0
    wide = max(len(model.name) for model in found)
    for model in found:
        size = f"{model.bytes / 1e6:,.1f} MB" if model.bytes else "–"
        show([f"{model.name:<{wide}}  {size:>11}  {f'unreadable: {model.error}' if model.error else model.path}"])
    return 0
