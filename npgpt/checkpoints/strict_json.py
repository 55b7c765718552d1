"""Strict JSON: no duplicate keys, no NaN, no endless nesting, all of which Python's json accepts or fails on."""

from __future__ import annotations

import json
from typing import Any

from ..errors import NpgptError
from .utf8 import check_encoding


def read_object(content: bytes, source: str) -> dict[str, Any]:
    """Return a JSON object from UTF-8 bytes; source names it in errors.

    Raises NpgptError, in one line, for anything but a JSON object, and for a duplicate key, of which json would
    silently keep the last.
    """
    check_encoding(content, source)
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise NpgptError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise NpgptError(f"{source} must be a JSON object, not {type(value).__name__}")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"the key {key!r:.80} stands twice in one object")
        mapping[key] = value
    return mapping


def _no_constant(literal: str) -> float:
    raise ValueError(f"{literal} is not JSON")
