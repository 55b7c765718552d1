"""Detect text in UTF-16 or UTF-32, which npgpt does not read."""

from __future__ import annotations

import codecs

from ..errors import NpgptError

MARKS = {  # byte order marks; UTF-32 first, since its mark begins with UTF-16's
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
# Without a mark: which of every four bytes are not always zero in Latin letters.
NOT_ZERO: dict[tuple[bool, ...], str] = {
    (True, False, False, False): "UTF-32LE",
    (False, False, False, True): "UTF-32BE",
    (True, False, True, False): "UTF-16LE",
    (False, True, False, True): "UTF-16BE",
}


def check_encoding(content: bytes, name: str) -> None:
    """Raise NpgptError for UTF-16 and UTF-32, detected by a byte order mark or by the positions of zero bytes."""
    found = next((encoding for encoding, marks in MARKS.items() if content.startswith(marks)), None)
    if found is None and len(content) >= 4 and len(content) % 2 == 0:
        head = content[:64]
        found = NOT_ZERO.get(tuple(any(head[place::4]) for place in range(4)))
    if found is not None:
        raise NpgptError(f"{name} is {found}, but npgpt reads UTF-8: convert it with iconv -f {found} -t UTF-8")
