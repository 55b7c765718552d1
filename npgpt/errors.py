"""The one exception that stands for a mistake in what the user gave."""

from __future__ import annotations


class NpgptError(ValueError):
    """Bad input: a configuration, a file, a name, a token id, a text.

    The message is one line that names the thing, both values and the way out. The command line prints it
    and ends with exit code 2.
    """
