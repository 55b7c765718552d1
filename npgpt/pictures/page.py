"""What every HTML page shares: one style sheet in light and dark, the frame of a page, and a page inside a notebook.

Pages need no network. They take their colours from the variables of STYLE: --paper and --ink, --faint for asides,
--line and --mark; --c0 to --c4 from zero to one; --minus, --zero and --plus for values of either sign; --fit for
agreement, --near and --far for small and large differences; --heat for surprisal.

Tokens are written in the notation of text.tokenizer.shown(), with unprintable characters escaped. Spaces
are visible as ␣ unless the token is in quotes.
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
  --fit: #cfe8d5; --near: #fbe6a2; --far: #f08f78; --heat: #ff5a00;
}
@media (prefers-color-scheme: dark) {
  :root { --paper: #131518; --ink: #ececec; --faint: #b0b0b0; --line: #808080; --mark: #ff9d80;
    --c0: #1f2f52; --c1: #2c5f9b; --c2: #3899b0; --c3: #86cf9c; --c4: #fff5a6;
    --minus: #6aaef0; --zero: #202328; --plus: #ff8a70;
    --fit: #1f4632; --near: #5f4c12; --far: #962f22; }
}
body { margin: 1.5rem auto; max-width: 72rem; padding: 0 1rem; background: var(--paper); color: var(--ink); }
h1 { font-size: 1.25rem; margin: 0 0 .3rem; } h2 { font-size: 1rem; margin: 1.8rem 0 .3rem; }
p { margin: .3rem 0; max-width: 62rem; } pre { font-size: .85rem; line-height: 1.4; overflow-x: auto; }
table { border-collapse: collapse; } th { font-weight: 400; font-size: .75rem; color: var(--faint); }
.scroll { overflow: auto; }
.panel { position: sticky; bottom: 0; z-index: 3; display: block; min-height: 4.4em; max-height: 40vh; overflow: auto;
  margin-top: 1.5rem; padding: .5rem 0; background: var(--paper); border-top: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
.panel bdi { white-space: pre-wrap; }
"""
CHOICES = Path(__file__).with_name("choices.js")


def page(title: str, style: str, body: Iterable[str], script: str = "") -> Iterator[str]:
    """Yield a page part by part: the shared style and its own, then its body.

    script: runs at the end, after that of choices.js; without one the page allows no scripts.
    """
    yield f"{head(title, bool(script))}{style}</style></head><body>\n"
    yield from body
    if script:
        yield f"<script>{CHOICES.read_text('utf-8')}{script}</script>\n"
    yield "</body></html>\n"


def head(title: str, scripts: bool) -> str:
    """Return the beginning of a page up to the shared style, after which its own may follow; no network is allowed."""
    allowed = "style-src 'unsafe-inline'" + ("; script-src 'unsafe-inline'" if scripts else "")
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; {allowed}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}'
    )


def filled(title: str, template: Path, data: Any) -> str:
    """Return a template with the head for {{head}}, choices.js for {{choices}} and the data, as JSON, for {{data}}."""
    text = template.read_text("utf-8").replace("{{head}}", head(title, True))
    return text.replace("{{choices}}", CHOICES.read_text("utf-8")).replace("{{data}}", json_of(data))


def json_of(data: Any) -> str:
    """Return data as JSON without "<", and so without "</script>": a text must not end the element that holds it."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")


def in_notebook(page: str, height: int) -> str:
    """Return a page as a frame of `height` pixels inside another page, such as a notebook."""
    style = f"width: 100%; height: {height}px; border: 0"
    return f'<iframe srcdoc="{html.escape(page)}" style="{style}" sandbox="allow-scripts"></iframe>'
