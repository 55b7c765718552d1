"""Download a model of the Hugging Face hub into the user's cache, where find.py looks.

huggingface_hub (extra hub) transfers, resumes and shows progress. This module chooses the files and explains failures
in one line. It does not use snapshot_download, whose threads make Ctrl-C wait for whole files.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import NpgptError
from ..text.companions import COMPANIONS
from ..text.vocabularies import READABLE, is_vocabulary
from . import atomic
from .configs import read_fields
from .ends import GENERATION_FILE
from .files import CONFIGURATION, REVISION, read_bytes
from .find import suggestion
from .formats import ADAPTER_CONFIG
from .inspect import digest, sha256
from .places import EMBEDDED, ORGANISATIONS, hub_cache
from .strict_json import read_object

CONFIG = "config.json"
WEIGHTS = (  # in the order of preference; the last two are an adapter's
    ("model", "safetensors"),
    ("pytorch_model", "bin"),
    ("adapter_model", "safetensors"),
    ("adapter_model", "bin"),
)
WEIGHTS_LIKE = (".safetensors", ".bin", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".pt", ".pth", ".ckpt", ".tflite")

IN_CACHE = "a model that is in the cache is used without downloading"
UNREACHABLE = f"no connection to the hub at {{hub}} ({{detail}}): try again with one; {IN_CACHE}"
LOG_IN = "log in with `hf auth login`"
REFUSED = f"the hub at {{hub}} refuses {{what}} of {{repository}} ({{status}}): {LOG_IN}, or correct HF_TOKEN"
# By the names of exceptions, since the library's moved between versions and it had two HTTP clients; by a status, or by
# "status" and "errno" for exceptions that have one. The first that fits is used.
MESSAGES = {
    "GatedRepoError": f"{{repository}} is gated: accept its terms at {{hub}}/{{repository}}, then {LOG_IN}",
    "DisabledRepoError": "{repository} is disabled: see {hub}/{repository}",
    "RepositoryNotFoundError": f"the hub at {{hub}} has no model {{repository}}, or it is private: look the name up "
    f"at {{hub}}/models, or {LOG_IN}",
    "RevisionNotFoundError": "{repository} has no revision {revision}: see {hub}/{repository}/commits/main",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set and {repository} is not in the cache: "
    f"unset it to download; {IN_CACHE}",
    **dict.fromkeys(("ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol"), UNREACHABLE),
    "ConnectionError": UNREACHABLE,  # requests', with huggingface_hub before 1.0
    **dict.fromkeys(("401", "403"), REFUSED),
    "status": "the hub at {hub} answers {status} to {what} of {repository}: try again later, or correct HF_ENDPOINT",
    # a web page for JSON, no URL, no header
    "ValueError": "{what} of {repository} cannot be fetched ({detail}): correct HF_ENDPOINT or HF_TOKEN",
    "errno": "{what} of {repository} cannot be written into {cache} ({detail}): make room, or set HF_HOME elsewhere",
    "Exception": "{what} of {repository} did not arrive ({detail}): run the same command again, files that are whole "
    "are kept",
}


@dataclass(frozen=True)
class Snapshot:
    """A repository's files in the cache, their sizes in bytes by name.

    new is the number of files that were not there before; asked is False if the hub could not be asked for a newer one.
    """

    repository: str
    folder: Path
    sizes: dict[str, int]
    new: int
    asked: bool


def fetch(name: str, revision: str | None = None) -> Snapshot:
    """Bring a model's configuration, vocabulary and weights into the cache, all of one commit, the weights last.

    name is a published name or org/name; revision is a branch, tag or commit (None: main). Without an answer from the
    hub, a model that is in the cache is used. Raises NpgptError for whatever goes wrong.
    """
    repository = repository_name(name)
    if revision is not None and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", revision, re.ASCII):
        raise NpgptError(f"a revision is a branch, a tag or a commit, not {revision!r:.200}")
    place = hub_cache() / f"models--{repository.replace('/', '--')}"
    ref = place / "refs" / (revision or "main")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hub = _library()
        try:
            patience = hub.constants.HF_HUB_ETAG_TIMEOUT  # seconds; by itself model_info waits without end
            info = hub.HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=patience)
        except Exception as error:
            # a failing connection or hub, as opposed to an answer
            no_answer = getattr(getattr(error, "response", None), "status_code", 500) >= 500
            if no_answer and (held := _held(place, ref, repository)):
                return held
            raise _explained(error, "the list of files", repository, revision) from None
        if info.sha is None:
            raise NpgptError(f"the hub at {hub.constants.ENDPOINT} names no commit of {repository}")
        listed = {sibling.rfilename: sibling for sibling in info.siblings or []}
        folder, files = place / "snapshots" / info.sha, choose(listed, repository)
        missing = [file for file in files if not (folder / file).exists()]
        for file in files:
            try:
                path = Path(hub.hf_hub_download(repository, file, revision=info.sha, cache_dir=hub_cache()))
            except Exception as error:
                raise _explained(error, file, repository, revision) from None
            if file in missing:
                _check(path, listed[file])
            if file == CONFIG:  # another architecture is refused before its weights are fetched
                source = f"{CONFIG} of {repository}"
                read_fields(read_object(read_bytes(path, CONFIGURATION), source), source)
    with contextlib.suppress(OSError, NpgptError):  # a read-only cache may hold all files already
        if revision != info.sha:
            ref.parent.mkdir(parents=True, exist_ok=True)
            with atomic.writing(ref) as written:
                written.write(info.sha.encode())
    return Snapshot(repository, folder, {file: (folder / file).stat().st_size for file in files}, len(missing), True)


def repository_name(name: str) -> str:
    """Return the repository of a published name, or org/name itself. Raises NpgptError for any other name."""
    if name in ORGANISATIONS:
        return ORGANISATIONS[name]
    if name == EMBEDDED:
        raise NpgptError(f"{name} comes with npgpt, there is nothing to download")
    part = r"\w(?:[\w.-]{0,94}\w)?"  # the hub's rules, here and below
    if not re.fullmatch(f"{part}/{part}", name, re.ASCII) or re.search(r"--|\.\.|\.git$", name):
        meant = f"{name!r:.200}{suggestion(name)}"
        raise NpgptError(f"{meant} is no model to download: names are {', '.join(ORGANISATIONS)}, or org/name")
    return name


def choose(names: Collection[str], repository: str) -> list[str]:
    """Return the files to fetch: the weights last, and an index after all its shards.

    Raises NpgptError where there are no weights that npgpt reads.
    """
    known = (CONFIG, GENERATION_FILE, ADAPTER_CONFIG, *READABLE, *COMPANIONS)
    wanted = [name for name in known if name in names]
    wanted += sorted(name for name in names if is_vocabulary(name) and name not in wanted)
    for stem, suffix in WEIGHTS:
        whole, index = f"{stem}.{suffix}", f"{stem}.{suffix}.index.json"
        shards = sorted(name for name in names if re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", name, re.ASCII))
        if whole in names:
            return [*wanted, whole]
        if index in names and shards and shards[-1].endswith(f"-of-{len(shards):05}.{suffix}"):
            return [*wanted, *shards, index]
    others = sorted(name for name in names if name.endswith(WEIGHTS_LIKE))
    more = f" and {len(others) - 5} more" if len(others) > 5 else ""
    found = f"only {', '.join(others[:5])}{more}" if others else "and nothing like it"
    raise NpgptError(f"{repository} has no model.safetensors or pytorch_model.bin, whole or in shards, {found}")


def _library() -> Any:
    """Return huggingface_hub with its log silenced. Raises NpgptError where it is missing or cannot be imported."""
    try:
        with contextlib.redirect_stdout(None):  # it prints there why it cannot be imported
            import huggingface_hub
            from huggingface_hub import HfApi, constants, hf_hub_download  # noqa: F401
    except ImportError:
        raise NpgptError("npgpt download needs the extra hub: pip install huggingface_hub") from None
    except Exception as error:  # importing it reads its HF_ variables
        raise NpgptError(f"huggingface_hub cannot be imported ({error}): correct its HF_ variables") from None
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    return huggingface_hub


def _check(path: Path, listed: Any) -> None:
    """Remove a file whose hash is not the hub's and raise NpgptError; the library compares sizes alone."""
    if listed.lfs is not None:
        kind, found, expected = "sha256", sha256(path), listed.lfs.sha256
    else:  # git's
        git = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        kind, found, expected = "sha1", digest(path, git), listed.blob_id
    if expected not in (None, found):
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise NpgptError(
            f"{path.name} arrived damaged: its {kind} is {found}, and the hub says {expected}; it is removed, run the "
            "same command again"
        )


def _held(place: Path, ref: Path, repository: str) -> Snapshot | None:
    """Return the revision that the cache holds, or None where it is not a whole model."""
    try:
        commit = read_bytes(ref, REVISION).decode("utf-8").strip() if ref.is_file() else ref.relative_to(place / "refs")
        folder = place / "snapshots" / commit
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        return Snapshot(repository, folder, {name: sizes[name] for name in choose(sizes, repository)}, 0, asked=False)
    except (OSError, ValueError):  # NpgptError among them
        return None


def _explained(error: BaseException, what: str, repository: str, revision: str | None) -> NpgptError:
    """Return the message for an exception of the library, its HTTP client or the operating system."""
    from huggingface_hub import constants

    while type(error).__name__ == "LocalEntryNotFoundError" and error.__cause__ is not None:
        error = error.__cause__  # why it was looked for in the cache
    status = getattr(getattr(error, "response", None), "status_code", None)
    kinds = {kind.__name__ for kind in type(error).__mro__} | {str(status)}
    kinds |= {"status"} if status is not None else {"errno"} if getattr(error, "errno", None) is not None else set()
    message = next(message for kind, message in MESSAGES.items() if kind in kinds)
    detail = (str(error).strip() or type(error).__name__).splitlines()[0]
    known = {"what": what, "repository": repository, "revision": revision or "main", "hub": constants.ENDPOINT}
    return NpgptError(message.format(**known, cache=hub_cache(), status=status, detail=detail[:300]))
