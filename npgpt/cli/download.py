"""npgpt download: a model of the Hugging Face hub into its cache."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from ..errors import printable
from .options import importing

if TYPE_CHECKING:
    from ..checkpoints.download import Snapshot


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
    """Download; see the help."""
    with importing():
        from ..checkpoints.download import fetch

    for line in report(options.name, options.revision, fetch(options.name, options.revision)):
        print(printable(line))
    return 0


def report(name: str, revision: str | None, found: Snapshot) -> list[str]:
    """The lines that are printed: what there is and where, and what to run next."""
    news = f"{found.new} of {len(found.sizes)} files fetched" if found.new else "already in the cache"
    news += "" if found.asked else ", and the hub could not be asked for a newer one"
    model = name if revision is None else shlex.quote(str(found.folder))
    published = "/" not in name
    verb = f'generate --model {model} "It is a truth"' if published else f"inspect {model}"
    *_, weights = found.sizes
    lines = [
        f"{found.repository}: {news}",
        str(found.folder),
        *(f"{size:>15,}  {file}" for file, size in found.sizes.items()),
        f"next: npgpt {verb}",
    ]
    return lines + ([f"as safetensors: npgpt convert {model} weights/{name}"] if ".bin" in weights else [])
