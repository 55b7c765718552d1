"""Write Jane Austen's six novels as texts, from Debian's package r-cran-janeaustenr:

    python examples/austen.py DIR [/usr/lib/R/site-library/janeaustenr]

A novel is a vector of lines in R's lazy-load database: Rdata.rdb holds zlib streams behind their length, and Rdata.rdx,
in gzip, the place of each by name. Both are R objects in XDR, big-endian (R Internals, section 1.8). Single line breaks
become spaces, and a paragraph ends with an empty line. The six texts have 4.0 MB.
"""

from __future__ import annotations

import gzip
import re
import struct
import sys
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

PACKAGE = "/usr/lib/R/site-library/janeaustenr"
SYMBOL, PAIRS, CHARACTERS, LOGICALS, INTEGERS, STRINGS, LIST, NOTHING, REFERENCE = 1, 2, 9, 10, 13, 16, 19, 254, 255
ATTRIBUTES, TAG = 1 << 9, 1 << 10  # flags beside the type


def read(data: bytes) -> Any:
    """Return an R object: a str, a list of str or int, or with names a dict. Raises ValueError for any other."""
    file = BytesIO(data)

    def number() -> int:
        return int(struct.unpack(">i", file.read(4))[0])

    def item() -> Any:
        flags = number()
        kind, value = flags & 255, None
        if kind == PAIRS:
            attributes = item() if flags & ATTRIBUTES else None
            tag, first, rest = item() if flags & TAG else attributes, item(), item()
            return {tag: first} | (rest or {})
        if kind == SYMBOL:
            symbols.append(item())
            return symbols[-1]
        if kind == REFERENCE:
            return symbols[(flags >> 8) - 1]
        if kind == CHARACTERS:
            return file.read(number()).decode()
        if kind in (LOGICALS, INTEGERS):
            value = [number() for _ in range(number())]
        elif kind in (STRINGS, LIST):
            value = [item() for _ in range(number())]
        elif kind != NOTHING:
            raise ValueError(f"an R object of type {kind} is none that a text needs")
        names = item().get("names") if flags & ATTRIBUTES else None
        return dict(zip(names, value or [], strict=True)) if names else value

    symbols: list[str] = []
    if file.read(2) != b"X\n" or (version := number()) not in (2, 3):
        raise ValueError("this is no R object in XDR of version 2 or 3")
    file.read(8)  # R's version, and the oldest that can read this
    if version == 3:
        file.read(number())  # the encoding
    return item()


def novels(package: Path) -> dict[str, str]:
    """Return each novel's text by name. Raises OSError if the package is not there, ValueError if it is another."""
    index, data = (package / "data" / f"Rdata.{kind}" for kind in ("rdx", "rdb"))
    places, streams = read(gzip.decompress(index.read_bytes()))["variables"], data.read_bytes()
    lines = {name: read(zlib.decompress(streams[at + 4 : at + size])) for name, (at, size) in places.items()}
    return {name: paragraphs("\n".join(found)) for name, found in lines.items()}


def paragraphs(text: str) -> str:
    """Return the text with single line breaks joined to spaces, and one empty line between paragraphs."""
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"(?<!\n)\n(?!\n)", " ", text)).strip() + "\n"


def main() -> int:
    """Write DIR/NAME.txt for each novel; return 2 after a mistake, which one line explains."""
    if len(sys.argv) not in (2, 3):
        print(f"austen.py: error: give DIR, and the package's folder if it is not {PACKAGE}", file=sys.stderr)
        return 2
    folder, package = Path(sys.argv[1]), Path((*sys.argv, PACKAGE)[2])
    try:
        found = novels(package)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in found.items():
            (folder / f"{name}.txt").write_text(text, "utf-8")
    except FileNotFoundError as error:
        print(f"austen.py: error: {error.filename} does not exist: apt install r-cran-janeaustenr", file=sys.stderr)
        return 2
    except (OSError, ValueError, zlib.error) as error:
        print(f"austen.py: error: {package}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
