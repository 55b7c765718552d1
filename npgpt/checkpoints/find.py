"""Find a model's weights on this machine, by name or path; nothing is downloaded."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..config import PUBLISHED
from ..errors import NpgptError
from . import formats, stand_ins
from .files import REVISION, read_bytes
from .formats import WEIGHTS_FILE

EMBEDDED = "austen"  # the model that comes with npgpt, and the default

# A wheel has the weights inside the package, a checkout (also one installed as editable) beside it.
HERE = Path(__file__).parent.parent  # the package
EMBEDDED_WEIGHTS = HERE / "weights" if (HERE / "weights").is_dir() else HERE.parent / "weights"
GPT2_RANKS = EMBEDDED_WEIGHTS / "gpt2.tiktoken"

ORGANISATIONS = {name: f"openai-community/{name}" for name in PUBLISHED} | {"distilgpt2": "distilbert/distilgpt2"}


CACHED = "models--"  # how the folders of models in the cache begin


@dataclass(frozen=True)
class Location:
    """A model's name and its weights: a file, or the index of several. Its other files are beside them."""

    name: str
    weights: Path


def find(model: str | os.PathLike[str] | None = None) -> Location:
    """Find a model by the path of a folder or file, by a published name, or, by default, the embedded model.

    Published names (gpt2, org/name) are looked for in ./weights/, in the folder that NPGPT_WEIGHTS names, beside the
    embedded model and in the user's Hugging Face cache, in this order. Raises NpgptError with all these places if the
    model is in none of them.
    """
    if model is None:
        return Location(EMBEDDED, EMBEDDED_WEIGHTS / EMBEDDED / WEIGHTS_FILE)
    name = os.fspath(model)
    if not isinstance(name, str) or not name:
        raise NpgptError(f"a model's name must be a folder, a file, or a name such as gpt2, not {name!r}")
    path = expanded(name)
    for file in (path, path.with_name(f"{path.name}.index") if path.name else path):  # TensorFlow's have a prefix
        if os.path.isfile(file):
            return Location(name, file)
    places = _places(name) if _is_name(name) else []
    for place in (_snapshot(path) if path.name.startswith(CACHED) else path, *places):
        if os.path.isdir(place) and (weights := formats.find(place)) is not None:
            return Location(name, weights)
    if os.path.isdir(path):
        raise NpgptError(f"the folder {path} has no checkpoint that npgpt reads; {_held(path)}")
    if repository := hub_page(name):
        raise NpgptError(
            f"{name} is a page of the hub: npgpt download {repository} fetches the model, --model {repository} uses it"
        )
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", name):  # a Path has one slash of two
        raise NpgptError(f"{name} is an address, and npgpt opens files of this machine: download it first")
    if os.path.lexists(path) and (what := stand_ins.described(path)):
        raise NpgptError(f"the model {path} is {what}")
    if not places or os.path.exists(path):
        kind = "is neither a folder nor a regular file" if os.path.exists(path) else "does not exist"
        raise NpgptError(f"the model {path} {kind}")
    looked = ", ".join(dict.fromkeys(str(place.absolute()) for place in places))
    download = f"npgpt download {name} fetches it, or " if name in PUBLISHED or "/" in name else ""
    begun = [f"{place}: {what}; " for place in places if os.path.isdir(place) and (what := stand_ins.in_folder(place))]
    raise NpgptError(
        f"no model {name!r} here{suggestion(name)}; {''.join(begun[:1])}looked for {WEIGHTS_FILE} or another "
        f"checkpoint in {looked}; {download}put {WEIGHTS_FILE} and config.json into {Path('weights') / name}{os.sep}"
    )


def hub_page(name: str) -> str | None:
    """Return the model's name where an address of the Hugging Face hub is given, of its page or of a file there."""
    match = re.match(r"(?i:https?:/+)?(?i:(?:www\.)?huggingface\.co|hf\.co)/+(?!datasets/|spaces/)(.+)|hf:/+(.+)", name)
    words = re.split(r"/+", re.split(r"[?#]", match[1] or match[2])[0]) if match else []
    end = next((n for n, word in enumerate(words) if word in ("", "tree", "blob", "resolve", "raw", "commits")), None)
    return "/".join(words[:end][:2]) or None


def suggestion(name: str) -> str:
    """Return in brackets the name that is meant: a page's, a cached folder's, or the nearest known. Else nothing."""
    cached = name[len(CACHED) :].replace("--", "/") if name.startswith(CACHED) else None
    page, known = hub_page(name) or cached, {_squeezed(known): known for known in (*ORGANISATIONS, EMBEDDED)}
    near = difflib.get_close_matches(_squeezed(name.rpartition("/")[2]), known, 1, 0.85)
    meant = page or (known[near[0]] if near else name)
    return "" if name in (meant, ORGANISATIONS.get(meant)) else f" (did you mean {meant}?)"


def _squeezed(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def _held(folder: Path) -> str:
    """Return a summary of what is in a folder, for a message."""
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    what = stand_ins.in_folder(folder)
    what = "" if what is None else f"; {what}"
    return f"it holds {', '.join(names[:6])}{more}{what}" if names else "it is empty"


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return the path with ~ expanded to the user's home."""
    return Path(os.path.expanduser(path))


def _is_name(name: str) -> bool:
    """Return whether a path could also be a model's name: one word, or org/name."""
    parts = name.split("/")
    return len(parts) <= 2 and all(part.strip(".") and not part.startswith("~") and "\\" not in part for part in parts)


def _places(name: str) -> list[Path]:
    """Return the folders where a model of this name may be, in order of preference."""
    if name == EMBEDDED:
        return [EMBEDDED_WEIGHTS / EMBEDDED]
    roots = [Path("weights"), EMBEDDED_WEIGHTS]
    if own := os.environ.get("NPGPT_WEIGHTS"):
        roots.insert(1, expanded(own))
    repositories = {name, ORGANISATIONS.get(name, name)} | {old for old, new in ORGANISATIONS.items() if new == name}
    spellings = sorted(repositories, key=lambda repository: (repository != name, repository))
    folders = [root / spelling for root in roots for spelling in spellings]
    return folders + [_snapshot(hub_cache() / f"{CACHED}{spelling.replace('/', '--')}") for spelling in spellings]


def hub_cache() -> Path:
    """Return the Hugging Face cache: $HF_HUB_CACHE, $HF_HOME/hub, or huggingface/hub in $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return expanded(cache or os.path.join(home, "hub"))


def _snapshot(repository: Path) -> Path:
    """Return the snapshot that refs/main names, else the newest one, of those with weights; else the repository."""
    main = repository / "refs" / "main"
    try:
        is_ref = main.is_file() and main.stat().st_size <= REVISION.most
        named = read_bytes(main, REVISION).decode("utf-8").strip() if is_ref else ""
        snapshots = [path for path in (repository / "snapshots").glob("*") if formats.find(path) is not None]
    except (OSError, ValueError):  # also NpgptError: an unreadable cache counts as empty
        return repository
    newest_last = sorted(snapshots, key=lambda path: (path.name == named, path.stat().st_mtime))
    return newest_last[-1] if newest_last else repository
