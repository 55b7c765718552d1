"""The places where models lie on this machine, and the names of those in them. Imports no NumPy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..config import PUBLISHED
from ..errors import NpgptError
from .files import CONFIGURATION, read_bytes

EMBEDDED = "austen"  # the model that comes with npgpt, and the default

# A wheel has the weights inside the package, a checkout (also one installed as editable) beside it.
HERE = Path(__file__).parent.parent  # the package
EMBEDDED_WEIGHTS = HERE / "weights" if (HERE / "weights").is_dir() else HERE.parent / "weights"
GPT2_RANKS = EMBEDDED_WEIGHTS / "gpt2.tiktoken"

ORGANISATIONS = {name: f"openai-community/{name}" for name in PUBLISHED} | {"distilgpt2": "distilbert/distilgpt2"}
CACHED = "models--"  # the prefix of a model's folder in the Hugging Face cache


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return the path with ~ expanded to the user's home."""
    return Path(os.path.expanduser(path))


def roots() -> list[Path]:
    """Return the folders that hold a folder for each model, in order of preference."""
    own = os.environ.get("NPGPT_WEIGHTS")
    return [Path("weights"), *([expanded(own)] if own else []), EMBEDDED_WEIGHTS]


def hub_cache() -> Path:
    """Return the Hugging Face cache: $HF_HUB_CACHE, $HF_HOME/hub, or huggingface/hub in $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return expanded(cache or os.path.join(home, "hub"))


def names() -> list[str]:
    """Return the names of all folders that may hold a model: the embedded one, those in roots(), those in the cache.

    Weights are not opened. Cached models whose config.json names another architecture are left out.
    """
    short = {repository: name for name, repository in ORGANISATIONS.items()}
    found = [EMBEDDED]
    for folder in (folder for root in roots() for folder in _entries(root) if folder.is_dir()):
        inside = list(_entries(folder))
        is_model = any(path.is_file() for path in inside)
        deeper = [path for path in inside if path.is_dir() and any(_entries(path))]
        found += [folder.name] if is_model else [f"{folder.name}/{path.name}" for path in deeper]
    for folder in _entries(hub_cache()):
        if folder.name.startswith(CACHED) and folder.is_dir() and _may_be_gpt2(folder):
            found.append(folder.name.removeprefix(CACHED).replace("--", "/"))
    return list(dict.fromkeys(short.get(name, name) for name in found))


def _entries(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder, sorted; nothing where it is missing or unreadable."""
    with suppress(OSError):
        yield from sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__")))


def _may_be_gpt2(repository: Path) -> bool:
    """Return whether no config.json of a cached model states an architecture other than gpt2."""
    for path in repository.glob("snapshots/*/config.json"):
        with suppress(OSError, NpgptError):
            if stated := re.search(rb'"model_type"\s*:\s*"([^"]*)"', read_bytes(path, CONFIGURATION)):
                return stated[1] == b"gpt2"
    return True
