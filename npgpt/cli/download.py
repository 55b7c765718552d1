"""npgpt download: fetch a model from the Hugging Face hub into its cache."""

from __future__ import annotations

import argparse
import shlex

from ..checkpoints.places import ORGANISATIONS
from .options import importing, show


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Fetch a model's configuration, weights and vocabulary into the Hugging Face cache, where npgpt finds "
        "it by name. Needs the extra hub: pip install huggingface_hub."
    )
    parser.epilog = "example: npgpt download gpt2"
    argument = parser.add_argument
    argument("name", metavar="NAME", help=f"{', '.join(ORGANISATIONS)}, or org/name on the hub")
    argument("--revision", metavar="R", help="branch, tag or commit (default: main)")


def run(options: argparse.Namespace) -> int:
    """Download; see the help."""
    with importing():
        from ..checkpoints.download import fetch

    found = fetch(options.name, options.revision)
    news = f"{found.new} of {len(found.sizes)} files fetched" if found.new else "already in the cache"
    news += "" if found.asked else "; the hub could not be asked for a newer version"
    model = options.name if options.revision is None else shlex.quote(str(found.folder))
    verb = f"inspect {model}" if "/" in options.name else f'generate --model {model} "It is a truth"'
    sizes = [f"{size:>15,}  {file}" for file, size in found.sizes.items()]
    lines = [f"{found.repository}: {news}", str(found.folder), *sizes, f"next: npgpt {verb}"]
    if ".bin" in list(found.sizes)[-1]:  # the weights are the last
        lines.append(f"as safetensors: npgpt convert {model} weights/{options.name}")
    show(lines)
    return 0
