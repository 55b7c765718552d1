"""A progress bar on stderr, if that is a terminal."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERVAL = 0.1  # seconds between two drawings


def clear() -> None:
    """Clear the bar's line before something else is printed, if stderr is a terminal; the bar is drawn again later."""
    if sys.stderr is not None and sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


@contextmanager
def bar(unit: str, scale: float = 1, of: str = "of") -> Iterator[Callable[[int, int | None], None] | None]:
    """Yield progress(done, total), which draws the amounts in units of `scale`, the rate, and the time left if known.

    Yields None if stderr is not a terminal. The line is cleared at the end. of: the words before the total.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    started, drawn, before = time.monotonic(), 0.0, 0

    def progress(done: int, total: int | None) -> None:
        nonlocal started, drawn, before
        now = time.monotonic()
        started, before = started if done >= before else now, done  # the next part of the work begins
        if now - drawn < INTERVAL:
            return
        drawn = now
        numbers = f" {done / scale:,.0f} {unit if total is None else f'{of} {total / scale:,.0f} {unit}'}"
        if done:
            each = max(now - started, 1e-9) * scale / done
            rate = f"{1 / each:,.0f} {unit}/s" if each <= 1 else f"{each:,.1f} s/{unit.removesuffix('s')}"
            numbers += f", {rate}" if total is None else f", {rate}, {(total - done) / scale * each:.0f} s left"
        columns = shutil.get_terminal_size().columns - 1  # a full line would scroll
        width = min(40, columns - len(numbers) - 2) if total is not None else 0
        filled = width * done // max(total or 0, 1)
        drawing = f"[{'#' * filled}{' ' * (width - filled)}]{numbers}" if width > 4 else numbers[1:]
        sys.stderr.write(f"\r{drawing[:columns]}\x1b[K")
        sys.stderr.flush()

    try:
        yield progress
    finally:
        clear()
