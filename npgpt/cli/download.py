"""npgpt download: a model of the Hugging Face hub into its cache."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from ..errors import printable
from .options import importing


def add(verbs: argparse._SubParsersAction[Any]) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "download",
        help="fetch a model from the Hugging Face hub",
        description="Bring a model's configuration, weights and vocabulary into the Hugging Face cache, where npgpt "
        "finds it by its name. Needs the extra hub: pip install huggingface_hub.",
        epilog="example: npgpt download gpt2",
    )
    parser.add_argument(
        "name", metavar="NAME", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, or org/name on the hub"
    )
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit (default: main)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Download; see the help. Prints what there is and where, and what to run next."""
    with importing():
        from ..checkpoints.download import fetch

    found = fetch(options.name, options.revision)
    news = f"{found.new} of {len(found.sizes)} files fetched" if found.new else "already in the cache"
    news += "" if found.asked else ", and the hub could not be asked for a newer one"
    model = options.name if options.revision is None else shlex.quote(str(found.folder))
    verb = f"inspect {model}" if "/" in options.name else f'generate --model {model} "It is a truth"'
    sizes = [f"{size:>15,}  {file}" for file, size in found.sizes.items()]
    lines = [f"{found.repository}: {news}", str(found.folder), *sizes, f"next: npgpt {verb}"]
    if ".bin" in list(found.sizes)[-1]:  # the weights are the last
        lines.append(f"as safetensors: npgpt convert {model} weights/{options.name}")
    for line in lines:
        print(printable(line))
    return 0
