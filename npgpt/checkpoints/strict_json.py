"""Read strict JSON: no duplicate keys, NaN or deep nesting, which Python's json accepts or crashes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import NpgptError
from . import stand_ins
from .files import CONFIGURATION, Kind, read_bytes
from .utf8 import check_encoding


def read_file(path: Path, kind: Kind = CONFIGURATION) -> dict[str, Any]:
    """Return the JSON object in a file. Raises NpgptError as read_object and read_bytes do."""
    return read_object(read_bytes(path, kind), str(path))


def read_object(content: bytes, source: str) -> dict[str, Any]:
    """Return a JSON object from UTF-8 bytes; source names it in errors.

    Raises NpgptError for anything except a JSON object, such as a Git LFS pointer or a web page, and for a duplicate
    key.
    """
    stand_ins.refuse(content, source)
    check_encoding(content, source)
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise NpgptError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise NpgptError(f"{source} must be a JSON object, not {type(value).__name__}")
    return value


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's dict. Raises ValueError for a duplicate key; json would silently keep the last one."""
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"duplicate key {key!r:.80}")
        mapping[key] = value
    return mapping


def _no_constant(literal: str) -> float:
    raise ValueError(f"{literal} is not JSON")
