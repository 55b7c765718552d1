"""A progress bar on stderr, where that is a terminal."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERVAL = 0.1  # seconds between two drawings


@contextmanager
def bar(unit: str, scale: float = 1) -> Iterator[Callable[[int, int], None] | None]:
    """Yield progress(done, total), which draws the amounts in `scale` units, the rate and the time left.

    Yields None where stderr is not a terminal. The line is cleared at the end.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    started, drawn, before = time.monotonic(), 0.0, 0

    def progress(done: int, total: int) -> None:
        nonlocal started, drawn, before
        now = time.monotonic()
        started, before = started if done >= before else now, done  # another part of the work begins
        if now - drawn < INTERVAL:
            return
        drawn = now
        numbers = f" {done / scale:,.0f} of {total / scale:,.0f} {unit}"
        if done:
            each = max(now - started, 1e-9) * scale / done
            rate = f"{1 / each:,.0f} {unit}/s" if each <= 1 else f"{each:,.1f} s/{unit.removesuffix('s')}"
            numbers += f", {rate}, {(total - done) / scale * each:.0f} s left"
        columns = shutil.get_terminal_size().columns - 1  # a full line would scroll
        width = min(40, columns - len(numbers) - 2)
        filled = width * done // max(total, 1)
        drawing = f"[{'#' * filled}{' ' * (width - filled)}]{numbers}" if width > 4 else numbers[1:]
        sys.stderr.write(f"\r{drawing[:columns]}\x1b[K")
        sys.stderr.flush()

    try:
        yield progress
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
