"""Options, input and output that several verbs share."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import os
import re
import shutil
import stat
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, TextIO

from ..checkpoints.files import is_input, is_output, naming
from ..checkpoints.utf8 import check_encoding
from ..errors import NpgptError, printable, whole_number
from ..process import THREAD_VARIABLES, handling, tune_process

if TYPE_CHECKING:
    from ..language_model import LanguageModel


PART = 2**16  # bytes read at a time
COMMON: dict[str, dict[str, Any]] = {
    "--model": {"metavar": "M", "help": "name or path of a model (default: the embedded one)"},
    "--n-head": {"type": int, "metavar": "N", "help": "number of heads, overriding the checkpoint"},
    "--activation": {
        "choices": ("gelu", "gelu_new"),
        "metavar": "A",
        "help": "form of GELU: gelu (erf) or gelu_new (tanh)",
    },
    "--dtype": {
        "choices": ("float32", "float64"),
        "default": "float32",
        "metavar": "D",
        "help": "float32 (default) or float64",
    },
    "--threads": {"type": int, "metavar": "N", "help": "threads per process (default: all cores)"},
    "--special": {"action": "store_true", "help": "encode <|endoftext|> and the like as special tokens"},
    "--ids": {"metavar": "1,2,3", "help": "token ids in place of a text"},
}


def add_common(parser: argparse.ArgumentParser, *names: str) -> None:
    """Declare options of COMMON."""
    for name in names:
        parser.add_argument(name, **COMMON[name])


def open_model(options: argparse.Namespace) -> LanguageModel:
    """Load the model of --model, --n-head, --activation and --dtype.

    Notes on stderr name its format, unless that is npgpt's own, and what is left out or guessed.
    """
    with importing():
        from ..language_model import load

    dtype = getattr(options, "dtype", "float32")
    model = load(options.model, dtype=dtype, n_head=options.n_head, activation=options.activation)
    for line in (model.origin, *model.notes):
        if line:
            note(line)
    return model


def add_text(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments for a text: itself, - for standard input, or --ids. text_ids() reads them."""
    parser.add_argument("text", nargs="?", help="the text; - reads standard input")
    add_common(parser, "--ids", "--special")


def text_ids(options: argparse.Namespace, model: LanguageModel) -> tuple[str | None, list[int]]:
    """Return the text, or None for --ids, and its ids. Raises NpgptError if they do not fit the context."""
    text, ids = any_text_ids(options, model)
    context = model.config.n_positions
    if len(ids) > context:
        raise NpgptError(
            f"the text has {len(ids)} tokens, the context holds {context}: shorten it by {len(ids) - context}"
        )
    return text, ids


def any_text_ids(options: argparse.Namespace, model: LanguageModel) -> tuple[str | None, list[int]]:
    """Return what text_ids() does, of any length. Raises NpgptError if there is no text."""
    given = text_or_ids(options.text, options.ids, "text")
    if given is None:
        raise NpgptError("there is no text: give it, or - for standard input, or --ids 1,2,3")
    if given == "":
        raise NpgptError('the text is empty, and at least one token is needed: give one, or "<|endoftext|>" --special')
    if isinstance(given, list):
        return None, given
    return given, model.encode_prompt(given, special=options.special)


def text_or_ids(text: str | None, ids: str | None, kind: str, say: bool = True) -> str | list[int] | None:
    """Return the text of an argument or the numbers of --ids, or None. Raises NpgptError if both are given."""
    if ids is None:
        return None if text is None else read_text(text, say)
    if text is not None:
        raise NpgptError(f"give the {kind} as text or as --ids, not both")
    return read_ids(ids)


def read_ids(ids: str) -> list[int]:
    """Return the numbers of --ids. Raises NpgptError for anything else."""
    if re.fullmatch(r"\s*-?[0-9]{1,20}\s*(?:,\s*-?[0-9]{1,20}\s*)*", ids) is None:
        raise NpgptError(f"--ids takes whole numbers with commas between them, not {ids!r:.80}")
    return [int(number) for number in ids.split(",")]


def tune(threads: int | None = None) -> list[str]:
    """Set the process up before NumPy is imported, with this many threads of its BLAS; return what was done, in words.

    Raises NpgptError for a number of threads below 1, and if NumPy is already imported.
    """
    if threads is not None:
        whole_number("--threads", threads)
        if "numpy" in sys.modules:
            raise NpgptError("--threads comes too late: NumPy is already imported in this process")
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    return tune_process()


def importing() -> AbstractContextManager[None]:
    """Let Ctrl-C end the process at once within the context: NumPy's C code would turn it into an ImportError."""
    return handling(["SIGINT"], lambda number, _: os._exit(128 + number))


def unwinding() -> AbstractContextManager[None]:
    """Let SIGTERM and SIGHUP unwind the process within the context, as Ctrl-C does: no half-written file stays."""

    def end(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    return handling(["SIGTERM", "SIGHUP"], end)


def read_text(argument: str, say: bool = True) -> str:
    """Return the argument itself, or all of standard input for -."""
    return read_file("-", say) if argument == "-" else argument


def read_file(name: str, say: bool = True) -> str:
    """Return all the text of a file, or of standard input for -; see text_parts."""
    with open_file(name) as file:
        return "".join(text_parts(file, name, say))


def open_file(name: str) -> AbstractContextManager[IO[bytes]]:
    """Open a file, or standard input for -, which stays open. A note says that a terminal's input is waited for.

    Raises NpgptError for a closed standard input and for no name, OSError as open does.
    """
    if name == "-":
        if sys.stdin is None:
            raise NpgptError("standard input is closed")
        if sys.stdin.isatty():
            note("reading from the terminal: end with Ctrl-D")
        return contextlib.nullcontext(sys.stdin.buffer)
    if not name:
        raise NpgptError("a file's name must not be empty")
    path = Path(os.path.expanduser(name))
    is_input(path)
    return open(path, "rb")


def text_parts(file: IO[bytes], name: str, say: bool = True) -> Iterator[str]:
    """Yield a UTF-8 text in parts. A byte order mark at its beginning is dropped, with a note if say.

    Raises NpgptError for UTF-16 and UTF-32, which are named, and for any other byte that is not UTF-8, with its place.
    """
    shown, decoder, at = "standard input" if name == "-" else name, codecs.getincrementaldecoder("utf-8")(), 0
    with naming(shown):
        part = file.read(PART)
        check_encoding(part, shown)
        if part.startswith(codecs.BOM_UTF8):
            at, part = len(codecs.BOM_UTF8), part.removeprefix(codecs.BOM_UTF8)
            if say:
                note(f"{shown} begins with a byte order mark, which is dropped")
        while True:
            begun = decoder.getstate()[0]  # the bytes of an incomplete character
            try:
                yield decoder.decode(part, final=not part)
            except UnicodeDecodeError as error:
                place = at - len(begun) + error.start
                raise NpgptError(f"{shown} is not UTF-8: byte 0x{error.object[error.start]:02X} at {place}") from None
            if not part:
                return
            at, part = at + len(part), file.read(PART)


def output_path(option: str, argument: str) -> Path:
    """Return the path of an option's output file, with links resolved.

    Raises NpgptError, before the work, if it cannot be written, or if this run reads or writes the same file elsewhere.
    """
    named = Path(os.path.expanduser(argument))
    if not named.parent.is_dir():
        raise NpgptError(f"{option} {argument}: there is no folder {named.parent}")
    path = Path(os.path.realpath(named))
    if path.is_dir():
        raise NpgptError(f"{option} {argument}: that is a folder, not a file")
    if path.exists() and not path.is_file():
        raise NpgptError(f"{option} {argument}: that is no regular file")
    if not os.access(path.parent, os.W_OK):
        raise NpgptError(f"{option} {argument}: the folder {path.parent} is not writable")
    is_output(path, f"{option} {argument}")
    return path


def coloured(stream: TextIO) -> bool:
    """Return whether a stream is a terminal with colours, and NO_COLOR is not set (https://no-color.org)."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR")


def into_file(stream: TextIO) -> bool:
    """Return whether a stream is a regular file, and so reaches no terminal, as a pipe may."""
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except OSError:
        return False


def show(lines: Iterable[str]) -> None:
    """Print lines, without control characters; on a terminal break long ones between words."""
    for line in lines:
        print(filled(printable(line), sys.stdout))


def note(message: str) -> None:
    """Print a line on stderr; do nothing if stderr cannot be written."""
    with contextlib.suppress(OSError):
        print(filled(f"npgpt: {printable(message)}", sys.stderr), file=sys.stderr, flush=True)


def filled(line: str, stream: TextIO | None) -> str:
    """Return a line broken between words at the width of a terminal; unchanged for any other stream.

    What follows a break is indented as the text behind the line's label is: two spaces end a label.
    """
    columns = shutil.get_terminal_size().columns
    if stream is None or not stream.isatty() or len(line) <= columns:
        return line
    label = re.match(r" *(?:\S+(?: \S+)* {2,})?", line)
    indent = len(label[0]) if label and len(label[0]) <= columns // 2 else 2
    indent = max(0, min(indent, columns - max(map(len, line.split()))))  # a long path or digest may need the room
    return textwrap.fill(line, columns, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
