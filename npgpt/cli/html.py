"""--html FILE: the page that a verb writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .options import note, output_path, unwinding


def page_writer(argument: str | None) -> Callable[[Iterable[str]], None] | None:
    """Return a function that writes the parts of a page to the file of --html, or None without the option.

    The file appears whole or not at all. Raises NpgptError at once, before the work, if it cannot be written.
    """
    if argument is None:
        return None
    path = output_path("--html", argument)

    def write_page(page: Iterable[str]) -> None:
        from ..checkpoints.atomic import writing

        with unwinding(), writing(path) as file:
            file.writelines(part.encode() for part in page)
        note(f"wrote {argument}, {path.stat().st_size:,} bytes")

    return write_page
