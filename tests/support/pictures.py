"""The pictures of README.md and docs/, made from the embedded model.

    python -m tests.support.pictures

writes docs/pictures/: attention.svg, score.svg and, where a browser is installed, explain.png. They have a light
background of their own, so that they look the same on a dark page.
"""

from __future__ import annotations

import html
import math
import re
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import npgpt
from npgpt.language_model import LanguageModel
from npgpt.pictures.page import STYLE

from . import devtools
from .command import here

FOLDER = Path(__file__).parents[2] / "docs" / "pictures"
TEXT = "It is a truth universally acknowledged"
SENTENCE, LAYER, HEAD = "Her mother was glad to see her", 4, 4
EXPLAINED, PLACE, SIZE = TEXT, "#stage=h.0.attn.c_attn&token=3&head=1", (1200, 720)
CELL, COLUMN, SURPRISING = 26, 8.4, 12.0  # pixels of a map's cell and of a character; bits that have the full colour

Colour = tuple[int, int, int]


def palette(*names: str) -> list[Colour]:
    """Return colours of the pages' light palette."""
    found = dict(re.findall(r"--(\w+): (#\w+);", STYLE.partition("@media")[0]))
    return [colour(found[name]) for name in names]


def colour(digits: str) -> Colour:
    """Return the red, green and blue of #rgb or #rrggbb."""
    digits = digits[1:] if len(digits) == 7 else "".join(2 * digit for digit in digits[1:])
    red, green, blue = bytes.fromhex(digits)
    return red, green, blue


def shade(value: float, colours: list[Colour]) -> str:
    """Return the colour of a value from 0 to 1, interpolated between neighbours in a list."""
    place = min(max(value, 0.0), 1.0) * (len(colours) - 1)
    first = min(int(place), len(colours) - 2)
    mixed = np.array(colours[first]) + (place - first) * (np.array(colours[first + 1]) - colours[first])
    return "#" + "".join(f"{round(part):02x}" for part in mixed)


def svg(width: float, height: float, title: str, body: Iterator[str]) -> str:
    """Return a picture of this size on white."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
    head += f'height="{height:.0f}" role="img" font-family="ui-monospace, monospace" font-size="14" fill="#1b1b1b">'
    background = '<rect width="100%" height="100%" rx="6" fill="#fff"/>'
    return "\n".join([head, f"<title>{html.escape(title)}</title>", background, *body, "</svg>", ""])


def pieces(model: LanguageModel, ids: list[int]) -> list[str]:
    """Return each token's text, with its spaces made visible."""
    return [html.escape(model.tokenizer.decode([each]).replace(" ", "␣")) for each in ids]


def attention(model: LanguageModel, text: str = SENTENCE, layer: int = LAYER, head: int = HEAD) -> str:
    """Return a head's attention weights as a map: queries down the side, keys along the top."""
    ids, found = model.tokenizer.encode(text), {}
    model(ids, record=lambda name, array: found.update({name: array}), logits_from=-1)
    weights, words = found[f"h.{layer}.attn.weights"][0, head], pieces(model, ids)
    side = 20 + COLUMN * max(map(len, words))
    size = side + CELL * len(words) + 10
    colours = palette("c0", "c1", "c2", "c3", "c4")

    def body() -> Iterator[str]:
        for number, word in enumerate(words):
            middle = side + CELL * (number + 0.5)
            yield f'<text x="{side - 8:.0f}" y="{middle + 5:.0f}" text-anchor="end">{word}</text>'
            yield f'<text transform="translate({middle + 5:.0f} {side - 8:.0f}) rotate(-90)">{word}</text>'
        for query, key in zip(*np.tril_indices(len(words)), strict=True):
            x, y = side + CELL * key + 1, side + CELL * query + 1
            fill = shade(math.sqrt(weights[query, key]), colours)  # so that 0.05 can be told from 0
            yield f'<rect x="{x:.0f}" y="{y:.0f}" width="{CELL - 2}" height="{CELL - 2}" rx="3" fill="{fill}"/>'

    title = f"{model.name}, layer {layer}, head {head}: how much each token (row) attends to each earlier one (column)"
    return svg(size, size, title, body())


def score(model: LanguageModel, text: str = TEXT) -> str:
    """Return a text whose tokens are coloured by surprisal, with the bits of each beneath it."""
    (found,) = npgpt.score([text], model)
    words, bits = pieces(model, found.token_ids.tolist()), (-found.log_probs / math.log(2)).tolist()
    zero, plus = palette("zero", "plus")
    colours = [zero, plus]

    def body() -> Iterator[str]:
        x = 12.0
        for word, surprisal in zip(words, bits, strict=True):
            width = COLUMN * max(len(html.unescape(word)), 4) + 6
            fill = shade(0.6 * surprisal / SURPRISING, colours)
            yield f'<rect x="{x:.0f}" y="12" width="{width - 2:.0f}" height="24" rx="3" fill="{fill}"/>'
            yield f'<text x="{x + width / 2 - 1:.0f}" y="29" text-anchor="middle">{word}</text>'
            yield f'<text x="{x + width / 2 - 1:.0f}" y="52" text-anchor="middle" font-size="11">{surprisal:.1f}</text>'
            x += width

    width = 24 + sum(COLUMN * max(len(html.unescape(word)), 4) + 6 for word in words)
    return svg(width, 62, f"Each token's surprisal in bits: {text}", body())


def explain(browser: str) -> bytes:
    """Return a screenshot of the page that `npgpt explain` writes, at one stage."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "explain.html")
        code, _, error = here("explain", EXPLAINED, "--html", str(page))
        assert code == 0, error
        window = devtools.Browser(browser, Path(folder))
        try:
            window.prefer("light")
            width, height = SIZE
            window.call(
                "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
            )
            window.open(page, PLACE)
            return smaller(window.screenshot())
        finally:
            window.close()


def smaller(png: bytes) -> bytes:
    """Return a picture as a PNG of at most 256 colours, those that occur most often among 16 shades a channel."""
    image = devtools.pixels(png)[..., :3]
    height, width, _ = image.shape
    rounded = np.rint(image.reshape(-1, 3) / 17).astype(int)
    colours, place, count = np.unique(rounded @ [256, 16, 1], return_inverse=True, return_counts=True)
    table = np.stack([colours // 256, colours // 16 % 16, colours % 16], axis=-1)
    kept = np.argsort(-count)[:256]
    nearest = ((table[:, None] - table[kept]) ** 2).sum(axis=-1).argmin(axis=1).astype(np.uint8)
    rows = np.pad(nearest[place].reshape(height, width), ((0, 0), (1, 0)))  # each after a 0: without a filter
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0),
        b"PLTE": (17 * table[kept]).astype(np.uint8).tobytes(),
        b"IDAT": zlib.compress(rows.tobytes(), 9),
        b"IEND": b"",
    }
    chunks = (
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))
        for kind, part in parts.items()
    )
    return png[:8] + b"".join(chunks)


def main() -> None:
    """Write the pictures."""
    FOLDER.mkdir(exist_ok=True)
    model = npgpt.load()
    (FOLDER / "attention.svg").write_text(attention(model), "utf-8")
    (FOLDER / "score.svg").write_text(score(model), "utf-8")
    browser = devtools.find()
    if browser:
        (FOLDER / "explain.png").write_bytes(explain(browser))
    else:
        print("no browser is installed: explain.png is not made", file=sys.stderr)


if __name__ == "__main__":
    main()
