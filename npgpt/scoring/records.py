"""Scores as lines of JSON, and a file of them that an interrupted run resumes."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..checkpoints.files import naming
from ..errors import NpgptError
from ..language_model import LanguageModel
from ..text.tokenizer import shown
from .likelihood import Score, Totals
from .windows import Convention

# the keys that a record must have, and their types
NEEDED = {"text": str, "sha256": str, "settings": dict, **dict.fromkeys(Totals._fields, int), "nll": float}
BEGINNING, BEHIND = b'{"text": "', b'", "sha256": "'  # what surrounds a record's name
QUOTED = re.compile(rb'(?:[^"\\]|\\.?)*')  # the characters between the quotes of a JSON string


class ScoredText(NamedTuple):
    """The record of a text that was scored before; text is its name."""

    text: str
    sha256: str
    settings: dict[str, Any]
    totals: Totals


def settings(model: LanguageModel, rule: Convention, top: int, special: bool) -> dict[str, Any]:
    """Return everything that a score depends on, apart from the text."""
    cut = asdict(rule)
    return {"weights": model.fingerprint, "convention": cut.pop("name"), **cut, "special": special, "top": top}


def line(name: str, text: str | Sequence[int], score: Score, settings: dict[str, Any]) -> str:
    """Return a score as one line of ASCII JSON: its sums, and each token's figures to compare with another engine."""
    totals, ranks = score.totals, score.ranks.tolist()
    rates = {key: getattr(totals, key) for key in ("perplexity", "word_perplexity", "bits_per_byte")}
    columns = {
        key: [value if rank else None for value, rank in zip(values.tolist(), ranks, strict=True)]
        for key, values in score.likelihood._asdict().items()
        if values.size  # top_ids are [n, 0] where none were asked for
    }
    record = {
        "text": name,
        "sha256": sha256(text),
        "settings": settings,
        **totals._asdict(),
        **{key: value if math.isfinite(value) else None for key, value in rates.items()},  # JSON has no NaN
        "token_ids": score.token_ids.tolist(),
        "pieces": [shown(piece) for piece in score.pieces],
        "byte_offsets": score.byte_offsets.tolist(),
        **columns,
    }
    return json.dumps(record, allow_nan=False)


def sha256(text: str | Sequence[int]) -> str:
    """Return the hash of a text's UTF-8; of ids, of their numbers with commas between them."""
    content = text if isinstance(text, str) else ",".join(map(str, text))
    return hashlib.sha256(content.encode()).hexdigest()


def read(text: bytes) -> ScoredText | None:
    """Return the record in a line, or None where it holds anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or any(type(found.get(key)) is not kind for key, kind in NEEDED.items()):
        return None
    totals = Totals(*(found[key] for key in Totals._fields))
    return ScoredText(found["text"], found["sha256"], found["settings"], totals)


@contextmanager
def appending(path: Path) -> Iterator[tuple[list[ScoredText], Callable[[str], None]]]:
    """Open or create a file of records; yield those in it, and a function that adds a line.

    Nothing is changed until a line is added. Then a last line that an interruption cut short is removed first. A file
    created here is deleted again where no line was added. Raises NpgptError for a file that holds anything else and
    for one that another process is adding to, OSError where it cannot be opened or written.
    """
    made = not path.exists()
    with naming(path), open(path, "a+b") as file:
        _lock(file, path)
        file.seek(0)
        end, records = 0, []  # the size of the whole lines in bytes, and their records
        for number, text in enumerate(file, 1):
            if text.endswith(b"\n"):
                record = read(text)
                if record is None:
                    raise NpgptError(f"{path}: line {number} is not as they are written here: {text[:40]!r}")
                records.append(record)
                end += len(text)
            elif not _is_cut_short(text):
                raise NpgptError(f"{path} ends with something else than a line that was cut short: {text[:40]!r}")

        def add(text: str) -> None:
            nonlocal end
            file.truncate(end)
            end += file.write(text.encode() + b"\n")
            file.flush()

        try:
            yield records, add
        finally:
            if made and end == 0:
                with suppress(OSError):
                    path.unlink()


def _is_cut_short(text: bytes) -> bool:
    """Return whether this can be the beginning of a record: its name, then the next key."""
    if not text.startswith(BEGINNING):
        return BEGINNING.startswith(text)
    rest = QUOTED.sub(b"", text[len(BEGINNING) :], count=1)
    return rest.startswith(BEHIND) or BEHIND.startswith(rest)


def _lock(file: BinaryIO, path: Path) -> None:
    """Lock the file until it is closed, where the system and the file system have such locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise NpgptError(f"another process is adding to {path}") from None
    except (ImportError, OSError):
        pass


def done(
    records: Sequence[ScoredText],
    names: Sequence[str],
    texts: Sequence[str | Sequence[int]],
    settings: dict[str, Any],
    file: str,
) -> set[int]:
    """Return the numbers of the texts that a file's records already hold, each record counting once.

    Raises NpgptError where a record was made with other settings, or from another text of the same name.
    """
    wanted = [(name, sha256(text)) for name, text in zip(names, texts, strict=True)]
    digests = dict(wanted)
    for record in records:
        for key, value in settings.items():
            if (theirs := record.settings.get(key)) != value:
                other = f"{key} {theirs!r:.80}, and now it is {value!r}"
                raise NpgptError(f"{file} was made with {other}: take another file")
        if digests.get(record.text, record.sha256) != record.sha256:
            raise NpgptError(f"{record.text} is another text than the {record.text} in {file}: take another file")
    left = Counter((record.text, record.sha256) for record in records)
    found = set()
    for number, text in enumerate(wanted):
        if left[text]:
            left[text] -= 1
            found.add(number)
    return found
