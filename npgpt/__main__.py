"""python -m npgpt, and the console script. It imports little, so that Ctrl-C is quiet from the start."""

from __future__ import annotations

import sys

INTERRUPTED = 128 + 2  # as a shell reports a process that SIGINT ended


def main() -> int:
    """Run the command line with the process's arguments; return its exit code."""
    try:
        from .cli import main as run

        return run()
    except KeyboardInterrupt:
        import signal

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would kill the process on its way out
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
