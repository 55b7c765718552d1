"""A model's name becomes a folder on this machine; nothing is opened here, and nothing fetched."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .config import PUBLISHED
from .errors import NpgptError

EMBEDDED = "austen"  # the model that comes with npgpt, and the default

# In a wheel the weights lie inside the package, in a checkout (also one installed editable) beside it.
HERE = Path(__file__).parent
EMBEDDED_WEIGHTS = HERE / "weights" if (HERE / "weights").is_dir() else HERE.parent / "weights"
GPT2_RANKS = EMBEDDED_WEIGHTS / "gpt2.tiktoken"

ORGANISATIONS = {name: f"openai-community/{name}" for name in PUBLISHED} | {"distilgpt2": "distilbert/distilgpt2"}
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Location:
    """Where a model lies: its weights file, the folder that may hold config.json and a vocabulary, and its name."""

    name: str
    weights: Path
    folder: Path


def find(model: str | os.PathLike[str] | None = None) -> Location:
    """A path to a folder or file, the name of an embedded model, or a published name (gpt2, org/name); None: embedded.

    Published names are looked for in ./weights/, in the folder that NPGPT_WEIGHTS names, beside the embedded model and
    in the user's Hugging Face cache, in this order. Raises NpgptError where nothing is found, with all places.
    """
    if model is None:
        return Location(EMBEDDED, EMBEDDED_WEIGHTS / EMBEDDED / WEIGHTS_FILE, EMBEDDED_WEIGHTS / EMBEDDED)
    name = os.fspath(model)
    if not name:
        raise NpgptError("the model's name is empty: give a folder, a file, or a name such as gpt2")
    path = Path(name).expanduser()
    places = _places(name) if _is_name(name) else []
    if path.is_file():
        return Location(name, path, path.parent)
    if (path / WEIGHTS_FILE).is_file():
        return Location(name, path / WEIGHTS_FILE, path)
    for place in places:
        if (place / WEIGHTS_FILE).is_file():
            return Location(name, place / WEIGHTS_FILE, place)
    if path.is_dir():
        raise NpgptError(f"the folder {path} has no {WEIGHTS_FILE}; put it there, with its config.json")
    if not places:
        raise NpgptError(f"there is no file or folder {path}")
    looked = ", ".join(dict.fromkeys(str(place.absolute()) for place in places))
    raise NpgptError(
        f"no model {name!r} here; looked for {WEIGHTS_FILE} in {looked}; "
        f"put {WEIGHTS_FILE} and config.json into {Path('weights') / name.split('/')[-1]}{os.sep}"
    )


def _is_name(name: str) -> bool:
    """One word, or org/name: what can be a name and not only a path."""
    parts = name.split("/")
    return len(parts) <= 2 and all(part and part.strip(".~") and "\\" not in part for part in parts)


def _places(name: str) -> list[Path]:
    """The folders where a model of this name may lie, in order of preference."""
    if name == EMBEDDED:
        return [EMBEDDED_WEIGHTS / EMBEDDED]
    roots = [Path("weights"), EMBEDDED_WEIGHTS]
    if own := os.environ.get("NPGPT_WEIGHTS"):
        roots.insert(1, Path(own).expanduser())
    folders = [root / spelling for root in roots for spelling in dict.fromkeys((name, name.split("/")[-1]))]
    repositories = {name, ORGANISATIONS.get(name, name)} | {old for old, new in ORGANISATIONS.items() if new == name}
    for repository in sorted(repositories, key=lambda r: (r != name, r)):
        folders.append(_snapshot(hub_cache() / f"models--{repository.replace('/', '--')}"))
    return folders


def hub_cache() -> Path:
    """The Hugging Face cache: HF_HUB_CACHE, else HF_HOME/hub, else XDG_CACHE_HOME/huggingface/hub, else ~/.cache."""
    if cache := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def _snapshot(repository: Path) -> Path:
    """The snapshot that refs/main names, else the newest that has weights, else the repository's own folder."""
    try:
        return repository / "snapshots" / (repository / "refs" / "main").read_text().strip()
    except OSError:
        snapshots = [path for path in (repository / "snapshots").glob("*") if (path / WEIGHTS_FILE).is_file()]
        return max(snapshots, key=lambda path: path.stat().st_mtime, default=repository)
