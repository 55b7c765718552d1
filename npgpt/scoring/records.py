"""Scores as JSON lines, and a file of them that an interrupted run can resume."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..checkpoints.files import naming
from ..errors import NpgptError
from ..language_model import LanguageModel
from ..text.tokenizer import shown
from .likelihood import Score, Sums, Totals
from .windows import Convention

# the required keys of a record and their types
NEEDED = {"text": str, "sha256": str, "settings": dict, **dict.fromkeys(Totals._fields, int), "nll": float}
LONGEST = 2**20  # bytes read from a line at a time
VALUES = 2**12  # values of a list written at a time
COLUMNS = b', "token_ids": ['  # begins the first list of a record; inside a string its quotes would be escaped
BEGINNING, BEHIND = b'{"text": "', b'", "sha256": "'  # what comes before and after a record's name
QUOTED = re.compile(rb'(?:[^"\\]|\\.?)*')  # the characters between the quotes of a JSON string


class ScoredText(NamedTuple):
    """The record of a scored text; `text` is its name."""

    text: str
    sha256: str
    settings: dict[str, Any]
    totals: Totals


def settings(model: LanguageModel, rule: Convention, top: int, special: bool) -> dict[str, Any]:
    """Return everything except the text on which a score depends."""
    cut = asdict(rule)
    return {"weights": model.fingerprint, "convention": cut.pop("name"), **cut, "special": special, "top": top}


def line(name: str, sha256: str, score: Score, settings: dict[str, Any]) -> Iterator[str]:
    """Yield a score as one line of ASCII JSON, part by part: its totals, then the figures of each token.

    name and sha256 identify the text. Other engines' results can be joined on token_ids and byte_offsets.
    """
    totals, figures = score.totals, score.likelihood._asdict()
    rates = {key: getattr(totals, key) for key in ("perplexity", "word_perplexity", "bits_per_byte")}
    head = {
        "text": name,
        "sha256": sha256,
        "settings": settings,
        **totals._asdict(),
        **{key: value if math.isfinite(value) else None for key, value in rates.items()},  # JSON has no NaN
    }
    yield json.dumps(head, allow_nan=False)[:-1]
    columns = {
        "token_ids": score.token_ids,
        "pieces": score.pieces,
        "byte_offsets": score.byte_offsets,
        **{key: column for key, column in figures.items() if column.size},  # top_ids is [n, 0] if none were requested
    }
    for key, column in columns.items():
        yield f', "{key}": ['
        for start in range(0, len(column), VALUES):
            some = slice(start, start + VALUES)
            values = [shown(piece) for piece in column[some]] if key == "pieces" else column[some].tolist()
            if key in figures:
                ranks = score.ranks[some].tolist()
                values = [value if rank else None for value, rank in zip(values, ranks, strict=True)]
            yield (", " if start else "") + json.dumps(values, allow_nan=False)[1:-1]
        yield "]"
    yield "}"


def read(text: bytes) -> ScoredText | None:
    """Return the record in a line, or None if the line is not a record.

    The first LONGEST bytes of a longer line are enough.
    """
    if not text.endswith(b"\n"):
        text = text.partition(COLUMNS)[0] + b"}"
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or any(type(found.get(key)) is not kind for key, kind in NEEDED.items()):
        return None
    totals = Totals(*(found[key] for key in Totals._fields))
    return ScoredText(found["text"], found["sha256"], found["settings"], totals)


@dataclass
class Known:
    """The texts in a file of records, and the sums over all of them."""

    file: str
    settings: dict[str, Any]  # that the records must have
    sums: Sums = field(default_factory=Sums)
    _texts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # by name and sha256

    def add(self, record: ScoredText) -> None:
        """Add a record. Raises NpgptError if it was made with other settings."""
        for key, value in self.settings.items():
            if (theirs := record.settings.get(key)) != value:
                other = f"{key} {theirs!r:.80}, but now it is {value!r}"
                raise NpgptError(f"{self.file} was made with {other}: use another file")
        self._texts[record.text][record.sha256] += 1
        self.sums.add(record.totals)

    def has(self, name: str) -> bool:
        """Return whether there is a record of a text with this name."""
        return name in self._texts

    def take(self, name: str, sha256: str) -> bool:
        """Return whether a text is done, and count off one record of it.

        Raises NpgptError if the file has a record of another text with this name.
        """
        left = self._texts[name]
        if left.keys() - {sha256}:
            raise NpgptError(f"{name} is not the same text as the {name} in {self.file}: use another file")
        left[sha256] -= 1
        return left[sha256] >= 0


@contextmanager
def appending(path: Path, found: Callable[[ScoredText], object]) -> Iterator[Callable[[Iterable[str]], None]]:
    """Open or create a file of records, pass each to found(), and yield a function that appends a line given in parts.

    Nothing changes until a line is appended; a last line that an interruption truncated is then removed first. A new
    file to which no line was appended is deleted. Raises NpgptError for a file with other contents or one to which
    another process is appending, and OSError if it cannot be opened or written.
    """
    made = not path.exists()
    with naming(path), open(path, "a+b") as file:
        _lock(file, path)
        file.seek(0)
        end = number = 0  # size and number of the complete lines
        while text := file.readline(LONGEST):
            number += 1
            ending = text[-3:]
            while not ending.endswith(b"\n") and (more := file.readline(LONGEST)):  # the line is longer than LONGEST
                ending = (ending + more)[-3:]
            if ending.endswith(b"\n"):
                record = read(text) if text.endswith(b"\n") or ending == b"]}\n" else None
                if record is None:
                    raise NpgptError(f"{path}: line {number} is not a record that npgpt score writes: {text[:40]!r}")
                found(record)
                end = file.tell()
            elif not _is_cut_short(text):
                raise NpgptError(f"{path}: the last line is not a truncated record: {text[:40]!r}")

        def add(parts: Iterable[str]) -> None:
            nonlocal end
            file.truncate(end)
            for part in parts:
                file.write(part.encode())
            file.write(b"\n")
            file.flush()
            end = file.tell()

        try:
            yield add
        finally:
            if made and end == 0:
                with suppress(OSError):
                    path.unlink()


def _is_cut_short(text: bytes) -> bool:
    """Return whether this can be the beginning of a record: its name and the next key."""
    if not text.startswith(BEGINNING):
        return BEGINNING.startswith(text)
    rest = QUOTED.sub(b"", text[len(BEGINNING) :], count=1)
    return rest.startswith(BEHIND) or BEHIND.startswith(rest)


def _lock(file: BinaryIO, path: Path) -> None:
    """Lock the file until it is closed, if the system and the file system support locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise NpgptError(f"another process is writing to {path}: wait for it, or use another file") from None
    except (ImportError, OSError):
        pass
