"""The one exception for a user's mistake, and checks of arguments that every room uses."""

from __future__ import annotations

import operator

LONGEST = 5000  # characters of a message


class NpgptError(ValueError):
    """Bad input: a configuration, a file, a name, a token id, a text.

    The message is one printable line that names the thing, both values and the way out. The command line prints it
    and ends with exit code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Return the text on one line, without control characters, which a name in a file could send to a terminal."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:LONGEST])
    return shown + (" …" if len(text) > LONGEST else "")


def whole_number(name: str, value: object, low: int = 1, high: int = 2**31 - 1) -> int:
    """Return the value, which may be NumPy's, as an int. Raises NpgptError for another type and outside low to high."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise NpgptError(f"{name} must be a whole number, not {value!r:.80}")
    if not low <= number <= high:
        bound = f"at least {low}" if number < low else f"at most {high}"
        raise NpgptError(f"{name} must be {bound}, not {number}")
    return number


def float_dtype(name: str, dtype: object) -> str:
    """Return the dtype's name, float32 or float64. Raises NpgptError for any other, and for None (NumPy's float64)."""
    import numpy as np  # here, since the command line shows its help without NumPy

    try:
        found = str(np.dtype(dtype)) if dtype is not None else "None"  # type: ignore[call-overload]
    except TypeError:
        found = str(dtype)
    if found not in ("float32", "float64"):
        raise NpgptError(f"{name} must be float32 or float64, not {found:.80}")
    return found
