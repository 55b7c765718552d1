"""The style that every HTML page shares, and the frame of those without scripts: no network, dark and light.

A page takes its colours from the style's variables: --paper and --ink, --faint for asides, --line and --mark.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator

STYLE = """
:root {
  color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif;
  --paper: #fff; --ink: #1b1b1b; --faint: #595959; --line: #8a8a8a; --mark: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root { --paper: #131518; --ink: #ececec; --faint: #b0b0b0; --line: #808080; --mark: #ff9d80; }
}
body { margin: 1.5rem auto; max-width: 72rem; padding: 0 1rem; background: var(--paper); color: var(--ink); }
h1 { font-size: 1.25rem; margin: 0 0 .3rem; } h2 { font-size: 1rem; margin: 1.8rem 0 .3rem; }
p { margin: .3rem 0; max-width: 62rem; } pre { font-size: .85rem; line-height: 1.4; overflow-x: auto; }
table { border-collapse: collapse; } th { font-weight: 400; font-size: .75rem; color: var(--faint); }
.scroll { overflow: auto; }
"""


def page(title: str, style: str, body: Iterable[str]) -> Iterator[str]:
    """Yield a page without scripts, part by part: its own style comes after the shared one, its body as it is given."""
    yield f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
    yield "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    yield f"<style>{STYLE}{style}</style></head><body>\n"
    yield from body
    yield "</body></html>\n"
