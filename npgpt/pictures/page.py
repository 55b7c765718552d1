"""What every HTML page shares: one style sheet in light and dark, the frame of a page, and a page inside a notebook.

Pages need no network. They take their colours from the variables of STYLE: --paper and --ink, --faint for asides,
--line and --mark; --c0 to --c4 from zero to one; --minus, --zero and --plus for values of either sign.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

STYLE = """
:root {
  color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif;
  --paper: #fff; --ink: #1b1b1b; --faint: #595959; --line: #8a8a8a; --mark: #b3261e;
  --c0: #e9eef8; --c1: #a8c6ea; --c2: #5a90cf; --c3: #25579c; --c4: #081a44;
  --minus: #2166ac; --zero: #f7f7f7; --plus: #b2182b;
}
@media (prefers-color-scheme: dark) {
  :root { --paper: #131518; --ink: #ececec; --faint: #b0b0b0; --line: #808080; --mark: #ff9d80;
    --c0: #1f2f52; --c1: #2c5f9b; --c2: #3899b0; --c3: #86cf9c; --c4: #fff5a6;
    --minus: #6aaef0; --zero: #202328; --plus: #ff8a70; }
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


def filled(template: Path, data: Any) -> str:
    """Return a page with a script: the template with STYLE for {{style}} and the data, as JSON, for {{data}}."""
    # no "<", and so no "</script>": a text must not end the element that holds it
    text = json.dumps(data).replace("<", "\\u003c")
    return template.read_text("utf-8").replace("{{style}}", STYLE).replace("{{data}}", text)


def in_notebook(page: str, height: int) -> str:
    """Return a page as an element of another one, such as a notebook's output: a frame of `height` pixels."""
    style = f"width: 100%; height: {height}px; border: 0"
    return f'<iframe srcdoc="{html.escape(page)}" style="{style}" sandbox="allow-scripts"></iframe>'
