"""npgpt list: the models on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import NpgptError, reason
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
        from ..checkpoints.places import names

    found = list(map(_row, names()))
    if options.json:
        show(json.dumps(row) for row in found)
        return 0
    wide = max(len(row["name"]) for row in found)
    for row in found:
        size = f"{row['bytes'] / 1e6:,.1f} MB" if row["bytes"] else "–"
        what = f"{row['path']}" if row["error"] is None else f"unreadable: {row['error']}"
        show([f"{row['name']:<{wide}}  {size:>11}  {what}"])
    return 0


def _row(name: str) -> dict[str, Any]:
    """Return a model's name, weights file, size, number of parameters, and the reason if it cannot be read."""
    from .. import parameters
    from ..checkpoints.find import find
    from ..checkpoints.open import open_checkpoint

    row: dict[str, Any] = {"name": name, "path": None, "bytes": None, "parameters": None, "error": None}
    try:
        path: Path = find(name).weights
        row["path"] = str(path)
        checkpoint = open_checkpoint(path)
        row["bytes"] = sum(file.stat().st_size for file in checkpoint.contents.files)
        row["parameters"] = sum(parameters.count(checkpoint.config).values())
    except NpgptError as error:
        row["error"] = str(error)
    except OSError as error:
        row["error"] = reason(error)
    return row
