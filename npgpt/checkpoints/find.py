"""Find a model's weights on this machine, by name or path. Nothing is downloaded."""

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
from .places import CACHED, EMBEDDED, EMBEDDED_WEIGHTS, ORGANISATIONS, expanded, hub_cache, names, roots

# A missing model whose name ends like this is reported as a missing file.
ENDING = re.compile(r".*\.(?:safetensors|bin|pt|pth|ckpt|gguf|index|json|npz|h5|zip)", re.IGNORECASE)


@dataclass(frozen=True)
class Location:
    """A model's name and its weights file, or the index of several. The model's other files lie beside it."""

    name: str
    weights: Path


def find(model: str | os.PathLike[str] | None = None) -> Location:
    """Find a model by the path of a folder or file, or by name; the default is the embedded model.

    A name (gpt2, org/name) is looked up in ./weights/, in the folder $NPGPT_WEIGHTS, beside the embedded model and in
    the Hugging Face cache, in this order. Raises NpgptError, which lists these places, if the model is in none of them.
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
    if not places or os.path.exists(path) or ENDING.fullmatch(name):
        kind = "is neither a folder nor a regular file" if os.path.exists(path) else "does not exist"
        raise NpgptError(f"{path} {kind}")
    looked = ", ".join(dict.fromkeys(str(place.absolute()) for place in places))
    download = f"npgpt download {name} fetches it, or " if name in PUBLISHED or "/" in name else ""
    way = f"; {download}put {WEIGHTS_FILE} and config.json into {Path('weights') / name}{os.sep}"
    meant = suggestion(name)  # a misspelt name needs no folder of its own
    begun = [f"{place}: {what}; " for place in places if os.path.isdir(place) and (what := stand_ins.in_folder(place))]
    raise NpgptError(
        f"no model {name!r} here{meant}; {''.join(begun[:1])}looked for {WEIGHTS_FILE} or another "
        f"checkpoint in {looked}{'' if meant and not download else way}"
    )


def hub_page(name: str) -> str | None:
    """Return the model's name in an address of the Hugging Face hub, of a page or a file; None for anything else."""
    match = re.match(r"(?i:https?:/+)?(?i:(?:www\.)?huggingface\.co|hf\.co)/+(?!datasets/|spaces/)(.+)|hf:/+(.+)", name)
    words = re.split(r"/+", re.split(r"[?#]", match[1] or match[2])[0]) if match else []
    end = next((n for n, word in enumerate(words) if word in ("", "tree", "blob", "resolve", "raw", "commits")), None)
    return "/".join(words[:end][:2]) or None


def suggestion(name: str) -> str:
    """Return " (did you mean NAME?)": a hub page's or cached folder's name, or the nearest known one; empty if none."""
    cached = name[len(CACHED) :].replace("--", "/") if name.startswith(CACHED) else None
    page = hub_page(name) or cached
    known = {_squeezed(known): known for known in (*names(), *ORGANISATIONS, EMBEDDED)}
    own = _squeezed(name)
    swapped = [other for other in known if sorted(other) == sorted(own)]  # gtp2; but gpt3 is not gpt2
    near = difflib.get_close_matches(own, known, 1, 0.8) or swapped
    meant = page or (known[near[0]] if near else name)
    return "" if name in (meant, ORGANISATIONS.get(meant)) else f" (did you mean {meant}?)"


def _squeezed(name: str) -> str:
    """Return a model's name without its organisation, punctuation and capitals."""
    return re.sub(r"[\W_]", "", name.rpartition("/")[2].lower())


def _held(folder: Path) -> str:
    """Return a summary of a folder's contents for a message."""
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    what = stand_ins.in_folder(folder)
    what = "" if what is None else f"; {what}"
    return f"it holds {', '.join(names[:6])}{more}{what}" if names else "it is empty"


def _is_name(name: str) -> bool:
    """Return whether a path could also be a model's name: one word, or org/name."""
    parts = name.split("/")
    return len(parts) <= 2 and all(part.strip(".") and not part.startswith("~") and "\\" not in part for part in parts)


def _places(name: str) -> list[Path]:
    """Return the folders in which a model of this name may lie, in order of preference."""
    if name == EMBEDDED:
        return [EMBEDDED_WEIGHTS / EMBEDDED]
    repositories = {name, ORGANISATIONS.get(name, name)} | {old for old, new in ORGANISATIONS.items() if new == name}
    spellings = sorted(repositories, key=lambda repository: (repository != name, repository))
    folders = [root / spelling for root in roots() for spelling in spellings]
    return folders + [_snapshot(hub_cache() / f"{CACHED}{spelling.replace('/', '--')}") for spelling in spellings]


def _snapshot(repository: Path) -> Path:
    """Return the snapshot in a cached repository: the one that refs/main names, or else the newest with weights.

    Returns the repository's own folder where no snapshot has weights.
    """
    main = repository / "refs" / "main"
    try:
        is_ref = main.is_file() and main.stat().st_size <= REVISION.most
        named = read_bytes(main, REVISION).decode("utf-8").strip() if is_ref else ""
        snapshots = [path for path in (repository / "snapshots").glob("*") if formats.find(path) is not None]
    except (OSError, ValueError):  # also NpgptError: an unreadable cache counts as empty
        return repository
    newest_last = sorted(snapshots, key=lambda path: (path.name == named, path.stat().st_mtime))
    return newest_last[-1] if newest_last else repository
