"""The report as one page of HTML, with a map of the error by block and stage."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator

from ..pictures import page as pages
from .report import Report, Row, remarks, said
from .textbook import COMPARED, located

STYLE = """
th { text-align: left; padding: .15rem .5rem; font-size: .85rem; color: var(--ink); }
td { min-width: 2.3rem; padding: .25rem .1rem; text-align: center; font-size: .75rem; }
.blocks th[scope=col] { writing-mode: vertical-rl; transform: rotate(180deg); padding: .4rem .1rem; }
td { border: 1px solid var(--paper); color: var(--ink); } td.none { border: 0; }
dl { margin: 0; } dt { font-weight: 600; margin-top: .8rem; } .legend td { min-width: 5rem; }
td.chosen, td:focus { outline: 2px solid var(--mark); outline-offset: -2px; }
"""
SCRIPT = """
const panel = document.querySelector(".panel");
for (const table of document.querySelectorAll(".stages")) {
  const cells = [...table.querySelectorAll("[data-figures]")];
  if (cells.length) choices(table, cells, (number) => { panel.textContent = cells[number].dataset.figures; });
}
"""


def page(report: Report) -> str:
    """Return the whole page."""
    body: list[str] = []
    for head, below in said(report):
        tag = "p" if body else "h1"
        body += [f"<{tag}>{html.escape(head)}</{tag}>"] if head else []
        for of, text in below:
            term = f"<dt>{html.escape(of)}</dt>"
            body.append(f"<dl>{term}<dd>{html.escape(text)}</dd></dl>" if of else f"<p>{html.escape(text)}</p>")
    body += [
        "<h2>Error by block and stage, in tolerances</h2>",
        "<p>Rounding explains an error of up to 1 tolerance. A frame marks the first stage that differs.</p>",
        *heat_map(report.rows, report.first),
        *(f"<p>{html.escape(remark)}</p>" for remark in remarks(report)),
    ]
    body.append(
        '<output class="panel" aria-live="polite">Point at a cell, tap it, or press <kbd>Tab</kbd> and arrow keys '
    )
    body.append("for its figures.</output>")
    return "".join(pages.page("npgpt check", STYLE, ["\n".join(body)], SCRIPT))


def heat_map(rows: list[Row], first: Row | None) -> Iterator[str]:
    """Yield a row of cells for each block, below a row for the stages outside of blocks, and the legend."""
    by_place = {located(row.stage): row for row in rows}
    within = {name for layer, name in by_place if layer is not None}
    columns = [name for name in COMPARED if name in within]
    whole = [row for row in rows if located(row.stage)[0] is None]
    yield '<div class="scroll"><table class="stages"><tr>'
    yield from (f'<th scope="col">{row.stage}</th>' for row in whole)
    yield "</tr><tr>"
    yield from (cell(row, first) for row in whole)
    yield "</tr></table></div>"
    if columns:
        yield '<div class="scroll"><table class="stages blocks"><tr><th></th>'
        yield from (f'<th scope="col">{name or "output"}</th>' for name in columns)
        yield "</tr>"
        for layer in sorted({layer for layer, _ in by_place if layer is not None}):
            yield f'<tr><th scope="row">h.{layer}</th>'
            yield from (cell(by_place.get((layer, name)), first) for name in columns)
            yield "</tr>"
        yield "</table></div>"
    yield '<table class="legend"><tr>'
    for ratio, text in ((0.1, "rounding"), (1.0, "1: the limit"), (30.0, "30"), (1e3, "1,000 and more")):
        yield f'<td style="background:{colour(ratio)}">{text}</td>'
    yield "</tr></table>"


def cell(row: Row | None, first: Row | None) -> str:
    """Return a stage's cell."""
    if row is None:
        return '<td class="none"></td>'
    d = row.difference
    alone = "" if row.alone is None else f"; {row.alone:.3g} from their own input"
    figures = (
        f"{row.stage}: {d.ratio:.3g} tolerances{alone}; rms {d.rms:.3g}, largest {d.largest:.3g}, {d.nmse:.1f} dB, "
        f"cosine {d.cosine:.7f}, {d.ulps:.3g} units in the last place"
    )
    frame = ";outline:3px solid var(--ink);outline-offset:-3px" if row is first else ""
    return (
        f'<td style="background:{colour(d.ratio)}{frame}" data-figures="{html.escape(figures)}">{short(d.ratio)}</td>'
    )


def short(ratio: float) -> str:
    """Return a ratio in at most four characters."""
    if ratio < 1000:
        return f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"
    return "∞" if math.isinf(ratio) else f"{ratio / 1e3:.0f}k" if ratio < 1e6 else ">1M"


def colour(ratio: float) -> str:
    """Return the palette's colour: --fit up to 1, and beyond from --near to --far by the logarithm."""
    if ratio <= 1:
        return "var(--fit)"
    height = min(1.0, math.log10(ratio) / 3) if math.isfinite(ratio) else 1.0
    return f"color-mix(in srgb, var(--far) {100 * height:.0f}%, var(--near))"
