"""The exception for users' mistakes, and checks of arguments."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])
LONGEST = 5000  # characters of a message
TRUTH = ("bool", "bool_")  # the type names of Python's and NumPy's truth values; NumPy's is bool_ before 2.2


class NpgptError(ValueError):
    """An error in the input: a configuration, a file, a name, a token id, a text.

    The message is one printable line that names the thing, both values and the way out. The command line prints it
    and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Return the text on one line, with control characters escaped: \\n, \\x1b, \\u0085; \\x85 is a byte (see shown()).

    Names in files may contain control characters.
    """
    shown = "".join(c if c.isprintable() else _escaped(c) for c in text[:LONGEST])
    return shown + (" …" if len(text) > LONGEST else "")


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, in the plural except for 1."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _escaped(character: str) -> str:
    if "\x80" <= character <= "\xff":
        return f"\\u{ord(character):04x}"
    return character.encode("unicode_escape").decode()


def whole_number(name: str, value: object, low: int = 1, high: int = 2**31 - 1) -> int:
    """Return a Python or NumPy integer as an int. Raises NpgptError for another type and outside low to high."""
    try:
        # truth values first: operator.index accepts NumPy's, with a warning in NumPy 2.0
        is_none = is_masked(value) or type(value).__name__ in TRUTH
        number = None if is_none else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise NpgptError(f"{name} must be a whole number, not {value!r:.80}")
    if not low <= number <= high:
        bound = f"at least {low}" if number < low else f"at most {high}"
        raise NpgptError(f"{name} must be {bound}, not {number}")
    return number


def real_number(name: str, value: object) -> float:
    """Return a Python or NumPy number as a float. Raises NpgptError for another type, including truth values."""
    try:
        if isinstance(value, (str, bytes, bytearray)) or is_masked(value) or type(value).__name__ in TRUTH:
            raise TypeError
        if getattr(value, "ndim", 0):  # float() accepts an array of one number, with a warning
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise NpgptError(f"{name} must be a number, not {value!r:.80}") from None


def reason(error: OSError) -> str:
    """Return a system's error in npgpt's words: the file, then what is wrong with it."""
    if error.filename is None or not error.strerror:
        return str(error)
    file = os.fsdecode(error.filename) if not isinstance(error.filename, int) else "a file"
    if isinstance(error, FileNotFoundError):
        return f"{file} does not exist"
    if isinstance(error, IsADirectoryError):
        return f"{file} is a folder, not a file"
    return f"{file}: {error.strerror[0].lower()}{error.strerror[1:]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean NAME?)" with the known name that is most like a misspelt one; empty if none is."""
    import difflib  # only a mistake needs it

    by_letters = {word.lower(): word for word in known}
    found = difflib.get_close_matches(str(name).lower(), by_letters, 1)
    return f" (did you mean {by_letters[found[0]]}?)" if found else ""


@contextmanager
def about(name: str) -> Iterator[None]:
    """Prefix the message of an NpgptError with the name of what it is about."""
    try:
        yield
    except NpgptError as error:
        raise NpgptError(f"{name}: {error}") from None


def numbers(name: str, value: object, kinds: str = "iu") -> NDArray[Any]:
    """Return lists of numbers, or an array of any library, as a NumPy array whose dtype.kind is in `kinds`.

    Raises NpgptError for rows of different lengths, masked arrays, truth values and other types.
    """
    import numpy as np

    wanted = "integers (of 64 bits at most)" if kinds == "iu" else "numbers"
    if is_masked(value):
        raise NpgptError(f"{name} must be {wanted}, not a masked array: fill it or select a part of it")
    try:
        array = np.asarray(value)
    except ValueError as error:
        why = "these rows have different lengths" if "inhomogeneous" in str(error) else str(error)
        raise NpgptError(f"{name} must be one row or rows of equal length; {why}") from None
    except Exception as error:  # of any type, since the value is foreign
        raise NpgptError(f"{name} cannot be read as an array: {type(error).__name__}: {error}") from None
    if array.size and (array.dtype.kind not in kinds or ("b" not in kinds and _holds_truth(value))):
        found = array.dtype if array.dtype.kind not in kinds else "bool"
        raise NpgptError(f"{name} must be {wanted}, not {found}")
    return array


def is_masked(value: object) -> bool:
    """Return whether a value is a masked array of NumPy's; its data under the mask must not be used."""
    return hasattr(value, "mask") and hasattr(value, "fill_value")


def _holds_truth(value: object) -> bool:
    """Return whether nested lists contain True or False, which NumPy would convert to 1 and 0."""
    if isinstance(value, (list, tuple)):
        return any(map(_holds_truth, value))
    return type(value).__name__ in TRUTH


def _kind(title: str, check: Callable[[Any], object]) -> Callable[[str, object], None]:
    """Return a check of an argument that raises NpgptError with the title if `check` is false or raises."""

    def checked_kind(name: str, value: object) -> None:
        try:
            fits = check(value)
        except (TypeError, ValueError):  # UnicodeEncodeError is one
            fits = False
        if not fits:
            plain = value is None or isinstance(value, (str, bytes, int, float))
            raise NpgptError(f"{name} must be {title}, not {f'{value!r:.80}' if plain else type(value).__name__}")

    return checked_kind


def _is_a(*names: str) -> Callable[[Any], bool]:
    """Return a check for npgpt's classes by name, which avoids importing them here."""
    return lambda value: any(
        kind.__name__ in names and kind.__module__.startswith("npgpt") for kind in type(value).__mro__
    )


def _is_path(value: Any) -> bool:
    path = os.fspath(value)
    return isinstance(path, str) and b"\0" not in os.fsencode(path)


def _are_several(value: Any) -> bool:
    iter(value)  # raises TypeError for what is not iterable, such as a 0-d array
    return not isinstance(value, (str, bytes, bytearray, Mapping))


def _may_be_numbers(value: Any) -> bool:
    return bool(value) if isinstance(value, str) else _are_several(value)  # a str's characters are rejected later


def _are_whole(value: Any) -> bool:
    found = () if isinstance(value, range) or not isinstance(value, Iterable) else value
    if any(type(number).__name__ in TRUTH or operator.index(number) is None for number in found):
        return False
    return isinstance(value, Container) and not isinstance(value, (str, bytes, bytearray))


def _check_str(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise NpgptError(f"{name} must be a str, not {type(value).__name__}")


_PATH = _kind("a path: a text or a pathlib.Path", _is_path)
_FUNCTION = _kind("a function", callable)
_MODEL = _kind("a model that npgpt.load returns", _is_a("LanguageModel"))
_SEVERAL = "in a list or another iterable"
# The check of an argument by its annotation; other arguments are checked where they are used.
CHECKS: Mapping[str, Callable[[str, object], None]] = {
    "bool": _kind("True or False", lambda value: type(value).__name__ in TRUTH),
    "str": _check_str,
    "str | os.PathLike[str]": _PATH,
    "LanguageModel": _MODEL,
    "LanguageModel | str | os.PathLike[str]": lambda name, value: (
        None if _is_a("LanguageModel")(value) else _PATH(name, value)
    ),
    "Config": _kind("an npgpt.Config", _is_a("Config")),
    "Parameters": _kind("npgpt.Parameters", _is_a("Parameters")),
    "KVCache": _kind("an npgpt.KVCache", _is_a("KVCache")),
    "Sampling": _kind("an npgpt.Sampling", _is_a("Sampling")),
    "Ends": _kind("Ends of npgpt.checkpoints.ends", _is_a("Ends")),
    **dict.fromkeys(("Record", "Progress", "Callable[[int, int], None]", "Callable[[], Tokenizer]"), _FUNCTION),
    "Executor": _kind("an executor", lambda value: callable(getattr(value, "submit", None))),
    "Mapping[str, Any]": _kind("a dict", lambda value: isinstance(value, Mapping)),
    "Container[int]": _kind("a set of whole numbers", _are_whole),
    "Sequence[str]": _kind(
        "texts in a list", lambda value: _are_several(value) and all(isinstance(text, str) for text in value[:])
    ),
    "Iterable[str]": _kind(f"texts {_SEVERAL}", _are_several),
    "str | Iterable[str]": _kind("a text or several", lambda value: isinstance(value, str) or _are_several(value)),
    "Iterable[int]": _kind(f"whole numbers {_SEVERAL}", _may_be_numbers),
    "Sequence[int]": _kind("whole numbers in a list", lambda value: _may_be_numbers(value) and len(value[:]) >= 0),
}


def checked(function: Function) -> Function:
    """Decorate a public function so that an argument of the wrong type raises NpgptError; see CHECKS."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    annotated = function.__annotations__

    @wraps(function)
    def run(*arguments: Any, **keywords: Any) -> Any:
        check_kinds(annotated, zip(names, arguments))  # noqa: B905  # there are usually fewer arguments than names
        check_kinds(annotated, keywords.items())
        return function(*arguments, **keywords)

    return run  # type: ignore[return-value]


def check_kinds(annotations: Mapping[str, str], values: Iterable[tuple[str, object]]) -> None:
    """Raise NpgptError for a value that does not fit the annotation of its name; see CHECKS."""
    for name, value in values:
        annotation = annotations.get(name, "")
        kind = annotation.removesuffix(" | None")
        if kind in CHECKS and not (value is None and kind != annotation):
            CHECKS[kind](name, value)


def float_dtype(name: str, dtype: object) -> str:
    """Return the dtype's name, float32 or float64. Raises NpgptError for others and for None (NumPy's float64)."""
    import numpy as np  # imported here because the command line shows its help without NumPy

    try:
        found = str(np.dtype(dtype)) if dtype is not None else "None"  # type: ignore[call-overload]
    except Exception:  # of any type, since NumPy calls the foreign type
        found = str(dtype)
    if found not in ("float32", "float64"):
        raise NpgptError(f"{name} must be float32 or float64, not {found:.80}")
    return found
