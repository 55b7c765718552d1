"""What every test can count on."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """A shell's background job ignores Ctrl-C, and the processes that tests start and interrupt would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
