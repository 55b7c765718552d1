"""Download a model from the Hugging Face hub into the user's cache, where find.py looks for it.

huggingface_hub (extra hub) transfers files, resumes downloads and shows progress. This module chooses the files and
explains each failure in one line. It avoids snapshot_download, whose threads make Ctrl-C wait for complete files.
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
WEIGHTS = (  # in order of preference; the last two are an adapter's
    ("model", "safetensors"),
    ("pytorch_model", "bin"),
    ("adapter_model", "safetensors"),
    ("adapter_model", "bin"),
)
WEIGHTS_LIKE = (".safetensors", ".bin", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".pt", ".pth", ".ckpt", ".tflite")

IN_CACHE = "a model in the cache needs no download"
UNREACHABLE = f"cannot connect to the hub at {{hub}} ({{detail}}): check the connection and try again; {IN_CACHE}"
LOG_IN = "log in with `hf auth login`"
REFUSED = f"the hub at {{hub}} denies access to {{what}} of {{repository}} ({{status}}): {LOG_IN}, or correct HF_TOKEN"
# Messages by exception name, since the library has moved its exceptions and changed its HTTP client; by HTTP status;
# or by "status" and "errno" for any exception with that attribute. The first match is used.
MESSAGES = {
    "GatedRepoError": f"{{repository}} is gated: accept its terms at {{hub}}/{{repository}}, then {LOG_IN}",
    "DisabledRepoError": "{repository} is disabled: see {hub}/{repository}",
    "RepositoryNotFoundError": f"the hub at {{hub}} has no model {{repository}}, or the model is private: check the "
    f"name at {{hub}}/models, or {LOG_IN}",
    "RevisionNotFoundError": "{repository} has no revision {revision}: see {hub}/{repository}/commits/main",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set and {repository} is not in the cache: "
    f"unset it to download; {IN_CACHE}",
    **dict.fromkeys(("ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol"), UNREACHABLE),
    "ConnectionError": UNREACHABLE,  # requests', with huggingface_hub before 1.0
    **dict.fromkeys(("401", "403"), REFUSED),
    "status": "the hub at {hub} answers {status} for {what} of {repository}: try again later, or correct HF_ENDPOINT",
    # a web page instead of JSON, an invalid URL, a missing header
    "ValueError": "{what} of {repository} cannot be fetched ({detail}): correct HF_ENDPOINT or HF_TOKEN",
    "errno": "{what} of {repository} cannot be written to {cache} ({detail}): free some space, or change HF_HOME",
    "Exception": "the download of {what} of {repository} failed ({detail}): run the same command again; complete files "
    "are kept",
}


@dataclass(frozen=True)
class Snapshot:
    """A repository's files in the cache, with their sizes in bytes by name.

    new is the number of files downloaded in this call. asked is False if the hub could not be asked for a newer commit.
    """

    repository: str
    folder: Path
    sizes: dict[str, int]
    new: int
    asked: bool


def fetch(name: str, revision: str | None = None) -> Snapshot:
    """Download a model's configuration, vocabulary and weights into the cache, all from one commit, the weights last.

    name is a published name or org/name; revision is a branch, tag or commit (None: main). If the hub does not answer,
    a model in the cache is used. Raises NpgptError if the model cannot be downloaded.
    """
    repository = repository_name(name)
    if revision is not None and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", revision, re.ASCII):
        raise NpgptError(f"the revision must be a branch, a tag or a commit, not {revision!r:.200}")
    place = hub_cache() / f"models--{repository.replace('/', '--')}"
    ref = place / "refs" / (revision or "main")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hub = _library()
        try:
            patience = hub.constants.HF_HUB_ETAG_TIMEOUT  # seconds; model_info has no timeout by default
            info = hub.HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=patience)
        except Exception as error:
            # the connection or the server failed; a status below 500 is an answer
            no_answer = getattr(getattr(error, "response", None), "status_code", 500) >= 500
            if no_answer and (held := _held(place, ref, repository)):
                return held
            raise _explained(error, "the list of files", repository, revision) from None
        if info.sha is None:
            raise NpgptError(f"the hub at {hub.constants.ENDPOINT} states no commit for {repository}")
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
            if file == CONFIG:  # reject another architecture before downloading its weights
                source = f"{CONFIG} of {repository}"
                read_fields(read_object(read_bytes(path, CONFIGURATION), source), source)
    with contextlib.suppress(OSError, NpgptError):  # a read-only cache may already contain all files
        if revision != info.sha:
            ref.parent.mkdir(parents=True, exist_ok=True)
            with atomic.writing(ref) as written:
                written.write(info.sha.encode())
    return Snapshot(repository, folder, {file: (folder / file).stat().st_size for file in files}, len(missing), True)


def repository_name(name: str) -> str:
    """Return a published model's repository, or org/name unchanged. Raises NpgptError for any other name."""
    if name in ORGANISATIONS:
        return ORGANISATIONS[name]
    if name == EMBEDDED:
        raise NpgptError(f"{name} comes with npgpt and needs no download")
    part = r"\w(?:[\w.-]{0,94}\w)?"  # the hub's rules for names
    if not re.fullmatch(f"{part}/{part}", name, re.ASCII) or re.search(r"--|\.\.|\.git$", name):
        meant = f"{name!r:.200}{suggestion(name)}"
        raise NpgptError(f"{meant} cannot be downloaded: give one of {', '.join(ORGANISATIONS)}, or org/name")
    return name


def choose(names: Collection[str], repository: str) -> list[str]:
    """Return the files to download: the weights last, and an index after all its shards.

    Raises NpgptError if there are no weights that npgpt reads.
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
    found = f"only {', '.join(others[:5])}{more}" if others else "and no other weights"
    raise NpgptError(f"{repository} has no model.safetensors or pytorch_model.bin, single or sharded, {found}")


def _library() -> Any:
    """Return huggingface_hub with its log silenced. Raises NpgptError if it cannot be imported."""
    try:
        with contextlib.redirect_stdout(None):  # a failing import prints its reason
            import huggingface_hub
            from huggingface_hub import HfApi, constants, hf_hub_download  # noqa: F401
    except ImportError:
        raise NpgptError("npgpt download needs the extra hub: pip install huggingface_hub") from None
    except Exception as error:  # the import reads its HF_ variables
        raise NpgptError(f"huggingface_hub cannot be imported ({error}): correct its HF_ variables") from None
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    return huggingface_hub


def _check(path: Path, listed: Any) -> None:
    """Remove a file whose checksum differs from the hub's and raise NpgptError; the library compares only sizes."""
    if listed.lfs is not None:
        kind, found, expected = "sha256", sha256(path), listed.lfs.sha256
    else:  # a git blob
        git = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        kind, found, expected = "sha1", digest(path, git), listed.blob_id
    if expected not in (None, found):
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise NpgptError(
            f"{path.name} was damaged in transit: its {kind} is {found}, not {expected} as on the hub; it was removed, "
            "so run the same command again"
        )


def _held(place: Path, ref: Path, repository: str) -> Snapshot | None:
    """Return the cached snapshot of a revision, or None if it is not complete."""
    try:
        commit = read_bytes(ref, REVISION).decode("utf-8").strip() if ref.is_file() else ref.relative_to(place / "refs")
        folder = place / "snapshots" / commit
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        return Snapshot(repository, folder, {name: sizes[name] for name in choose(sizes, repository)}, 0, asked=False)
    except (OSError, ValueError):  # NpgptError is a ValueError
        return None


def _explained(error: BaseException, what: str, repository: str, revision: str | None) -> NpgptError:
    """Return the error for an exception raised by the library, its HTTP client or the operating system."""
    from huggingface_hub import constants

    while type(error).__name__ == "LocalEntryNotFoundError" and error.__cause__ is not None:
        error = error.__cause__  # the reason it fell back to the cache
    status = getattr(getattr(error, "response", None), "status_code", None)
    kinds = {kind.__name__ for kind in type(error).__mro__} | {str(status)}
    kinds |= {"status"} if status is not None else {"errno"} if getattr(error, "errno", None) is not None else set()
    message = next(message for kind, message in MESSAGES.items() if kind in kinds)
    detail = (str(error).strip() or type(error).__name__).splitlines()[0]
    known = {"what": what, "repository": repository, "revision": revision or "main", "hub": constants.ENDPOINT}
    return NpgptError(message.format(**known, cache=hub_cache(), status=status, detail=detail[:300]))
