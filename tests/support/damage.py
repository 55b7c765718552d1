"""Damage files for npgpt check at random, and report the outcome."""

from __future__ import annotations

import io
import random
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from npgpt.oracle import check
from npgpt.oracle.diagnosis import Diagnosis
from npgpt.oracle.report import Report
from tests.support.command import here
from tests.support.models import random_ids, small, store

CONFIG = small()
IDS = random_ids(CONFIG, (1, 4))
LOGITS = np.random.default_rng(0).standard_normal((1, 4, 40)).astype(np.float32)
ONE = ("--ids", ",".join(map(str, IDS[0].tolist())))


def without_comparing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a folder with a model and replace the comparison by a stub; return the folder."""
    monkeypatch.chdir(store(folder, CONFIG))
    report = Report([], Diagnosis([], [], []), "float32", [], None, ["not compared"])
    monkeypatch.setattr(check, "compare", lambda *arguments, **options: report)
    return folder


def outcome(name: str, *arguments: str) -> tuple[int, str]:
    """Return npgpt check's exit code and its error line, which must be printable; warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code, _, error = here("check", name, "--model", ".", *arguments)
    assert code in (1, 2)  # 1 where it would be compared
    assert error.count("\n") == (code == 2) == error.startswith("npgpt: error: ")
    assert error.rstrip("\n").isprintable()
    return code, error


def npy(array: NDArray[Any]) -> bytes:
    with io.BytesIO() as file:
        np.lib.format.write_array(file, array)
        return file.getvalue()


def zipped(members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return file.getvalue()


PARTS = re.compile(rb"[-\d.e]+|'[^']*'|\"[^\"]*\"|[\[\]{}(),]")
STRANGE = (
    b"-1 1e999 NaN null true 'x' [] {} [[ ( 99999999999999999999 '|O' '|V0' '<U9' '<c16' '|b1' (-1,) \xff\xfe".split()
)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return the content truncated, with bits, bytes or words changed, a part moved, or an odd value inserted."""
    place, other = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    match rng.randrange(6):
        case 0:
            return content[:place]
        case 1:
            changed = bytearray(content)
            for _ in range(rng.choice((1, 8, 64))):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            return bytes(changed)
        case 2:
            return (
                content[:place] + rng.choice((b"\xff", b"\0", b"\x7f")) * rng.choice((1, 4, 8)) + content[place + 1 :]
            )
        case 3:
            return content[:place] + content[other:]
        case 4:
            place = rng.randrange(min(200, len(content)))  # a header
            return content[:place] + rng.randbytes(1) + content[place + 1 :]
    found = rng.choice([*PARTS.finditer(content[:20_000])] or [re.match(b"", content)])
    assert found is not None
    return content[: found.start()] + rng.choice(STRANGE) + content[found.end() :]


def damaged_within(content: bytes, rng: random.Random) -> bytes:
    """Return a ZIP with one damaged member and corrected checksums."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice([name for name, member in members.items() if member])
    return zipped(members | {name: damaged(members[name], rng)})
