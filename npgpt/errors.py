"""The one exception that stands for a mistake in what the user gave."""

from __future__ import annotations

LONGEST = 5000  # characters of a message


class NpgptError(ValueError):
    """Bad input: a configuration, a file, a name, a token id, a text.

    The message is one printable line that names the thing, both values and the way out. The command line prints it
    and ends with exit code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """The text on one line, without the control characters that a name in a file could send to a terminal."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:LONGEST])
    return shown + (" …" if len(text) > LONGEST else "")
