"""The page of `npgpt attend` in a real browser, compared with the model's numbers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from npgpt.language_model import load
from npgpt.parameters import Array
from npgpt.pictures.attention import AttentionWeights, attend
from tests.browser.conftest import Visit
from tests.support.devtools import Browser, pixels

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[2]
TEXT = "It is a truth </script> é\n“acknowledged”"
LIGHT = np.array([0.2126, 0.7152, 0.0722])


@pytest.fixture(scope="module")
def attended() -> AttentionWeights:
    """Return the weights of every layer and head of the embedded model."""
    model = load()
    return attend(TEXT, model)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page that the command writes."""
    path = tmp_path_factory.mktemp("page") / "attention.html"
    subprocess.run([sys.executable, "-m", "npgpt", "attend", TEXT, "--html", str(path)], cwd=ROOT, check=True)
    return path


@pytest.fixture
def opened(visit: Visit, file: Path) -> Iterator[Browser]:
    """Open the page in light colours; expect no error and no request."""
    with visit(file) as browser:
        browser.resize(1400, 1600)
        browser.evaluate("choose(0); [query, key] = [T - 1, 0]; show(query, key)")  # the page opens on another head
        yield browser


def expected(attended: AttentionWeights, layer: int, head: int, query: int, key: int) -> str:
    """Return the expected readout."""
    value = f"{attended.weights[layer, head, query, key]:.4f}" if key <= query else "masked"
    return f"query {query} “{attended.texts[query]}” → key {key} “{attended.texts[key]}”: {value}"


def agrees(shown: str, attended: AttentionWeights, layer: int, head: int, query: int, key: int) -> bool:
    """Return whether a readout is the expected one; a stored weight's rounding may change the last decimal."""
    text, _, value = shown.rpartition(": ")
    wanted, _, number = expected(attended, layer, head, query, key).rpartition(": ")
    if number == "masked":
        return (text, value) == (wanted, number)
    return text == wanted and abs(float(value) - attended.weights[layer, head, query, key]) <= 0.5e-4 + 0.5 / 65535


def middle(browser: Browser, T: int, query: int, key: int) -> tuple[float, float]:
    """Return the screen position of the middle of a cell of the large map."""
    left, top, width, height = browser.box("#large")
    return left + width * (key + 0.5) / T, top + height * (query + 0.5) / T


def test_every_head_by_keyboard(opened: Browser, attended: AttentionWeights) -> None:
    """Tab reaches the overview and the map, arrow keys move within them, and h and l change the head."""
    T = len(attended.pieces)
    opened.press("Tab")
    assert opened.evaluate("document.activeElement.getAttribute('aria-label').split(':')[0]") == "layer 0, head 0"
    for arrow in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowRight", "ArrowLeft"):
        opened.press(arrow)
    assert opened.evaluate("document.activeElement.getAttribute('aria-label').split(':')[0]") == "layer 2, head 1"
    assert opened.evaluate("document.querySelectorAll('[aria-selected=true]').length") == 1
    assert opened.text("#chosen") == "Layer 2, head 1"
    opened.press("Tab")  # the sentence
    opened.press("Tab")
    assert opened.evaluate("document.activeElement.id") == "map"
    query, key = T - 1, 0
    moves = {"ArrowUp": (-1, 0), "ArrowDown": (1, 0), "ArrowLeft": (0, -1), "ArrowRight": (0, 1)}
    for arrow in ["ArrowRight"] * 3 + ["ArrowUp"] * 4 + ["ArrowLeft", "ArrowDown", "ArrowDown", "ArrowUp"]:
        opened.press(arrow)
        query, key = query + moves[arrow][0], key + moves[arrow][1]
        assert agrees(opened.text("#readout"), attended, 2, 1, query, key), opened.text("#readout")
    opened.press("End")
    assert agrees(opened.text("#readout"), attended, 2, 1, query, query)
    opened.press("ArrowRight")
    assert opened.text("#readout") == expected(attended, 2, 1, query, query + 1)
    opened.press("Home")
    layer, head = 2, 1
    for letter, shift, step in (("h", False, (0, 1)), ("l", False, (1, 0)), ("H", True, (0, -1)), ("L", True, (-1, 0))):
        opened.press(letter, shift)
        layer, head = layer + step[0], head + step[1]
        assert opened.text("#chosen") == f"Layer {layer}, head {head}"
        assert agrees(opened.text("#readout"), attended, layer, head, query, 0)
    for _ in range(8):
        opened.press("l")
    assert opened.text("#chosen") == "Layer 5, head 1"  # the last


def test_cells_and_heads_by_mouse(opened: Browser, attended: AttentionWeights) -> None:
    T = len(attended.pieces)
    for layer, head in ((0, 0), (3, 3), (5, 4)):
        left, top, width, height = opened.box(f"#overview tr:nth-child({layer + 2}) td:nth-child({head + 2})")
        opened.point(left + width / 2, top + height / 2, click=True)
        assert opened.text("#chosen") == f"Layer {layer}, head {head}"
        for query, key in ((0, 0), (T - 1, T - 1), (T - 1, 0), (7, 3), (T - 2, 6), (2, 9)):
            opened.point(*middle(opened, T, query, key))
            assert agrees(opened.text("#readout"), attended, layer, head, query, key), opened.text("#readout")
            now = opened.evaluate("[...document.querySelectorAll('#map .now')].map((label) => label.title)")
            assert [title.split(":")[0] for title in now] == [str(key), str(query)]
    opened.point(*middle(opened, T, 6, 2), click=True)
    opened.point(1, 1)
    assert agrees(opened.text("#readout"), attended, 5, 4, 6, 2)  # it stays where it was clicked
    assert opened.evaluate("document.activeElement.id") == "map"


def lightness(browser: Browser, selector: str, T: int) -> tuple[Array, Array]:
    """Return the lightness of each cell's middle [T, T] in a map, and the pixels of its masked corner."""
    left, top, width, height = browser.box(selector)
    image = pixels(browser.screenshot()).astype(float)[:, :, :3]
    x, y = ((start + extent * (np.arange(T) + 0.5) / T).astype(int) for start, extent in ((left, width), (top, height)))
    corner = image[int(top) + 1 : int(top + height / 3), int(left + 2 * width / 3) : int(left + width) - 1]
    return image[np.ix_(y, x)] @ LIGHT, corner.reshape(-1, 3)


@pytest.mark.parametrize(("scheme", "sign"), [("light", -1), ("dark", 1)])
def test_colours_go_with_the_weights(opened: Browser, attended: AttentionWeights, scheme: str, sign: int) -> None:
    """A larger weight is further from the paper's colour, and masked cells are hatched paper."""
    T = len(attended.pieces)
    opened.prefer(scheme)
    paper, hatching = {
        "light": ((255, 255, 255), (212, 212, 212)),
        "dark": ((19, 21, 24), (53, 56, 61)),
    }[scheme]
    opened.press("Tab")
    for place in range(3):  # layer 0, head 0, then layer 1, head 1, then layer 2, head 2
        weights = attended.weights[place, place]
        seen = np.tri(T, dtype=bool)
        order = np.argsort(weights[seen], kind="stable")
        for selector in ("#large", f"#overview tr:nth-child({place + 2}) td:nth-child({place + 2}) canvas"):
            light, corner = lightness(opened, selector, T)
            steps = sign * np.diff(light[seen][order])
            assert (steps >= -1.0).all()  # a rounded colour, which may be one level off in each channel
            assert abs(light[0, 0] - light[seen][order[0]]) > 100  # row 0 has one weight, and that is 1
            assert set(map(tuple, corner)) == {paper, hatching}
        opened.press("ArrowRight")
        opened.press("ArrowDown")


def test_words_on_the_page(opened: Browser, attended: AttentionWeights) -> None:
    T = len(attended.pieces)
    body = opened.text("body")
    for words in (f"[1, n_head, T, T] = [1, 6, {T}, {T}]", "over the keys: each row, a query's weights, sums to 1"):
        assert words in body
    labels = opened.evaluate("[...document.querySelectorAll('.queries span')].map((label) => label.textContent)")
    assert labels == [text.replace(" ", "␣") for text in attended.texts]
    assert opened.evaluate("[...document.querySelectorAll('.keys span')].map((label) => label.textContent)") == labels
    assert opened.text("#model") == f"austen over {T} tokens"


def test_text_stands_out_from_the_paper(opened: Browser) -> None:
    """Every text colour has a contrast of at least 4.5 to 1 in both schemes (WCAG 2.1, 1.4.3)."""
    for scheme in ("light", "dark"):
        opened.prefer(scheme)
        found = {
            name: opened.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}').trim()")
            for name in ("paper", "ink", "faint", "mark")
        }
        light = {name: relative_luminance(colour) for name, colour in found.items()}
        for name in ("ink", "faint", "mark"):
            low, high = sorted((light[name], light["paper"]))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, name)


def relative_luminance(colour: str) -> float:
    """Return the relative luminance of #rgb or #rrggbb as WCAG defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = np.array([int(digits[start : start + 2], 16) for start in (0, 2, 4)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ LIGHT)


def test_the_sentence_links_words_both_ways(opened: Browser, attended: AttentionWeights) -> None:
    """Mouse, keyboard and touch show a word's strongest links and their weights."""
    opened.evaluate("choose(25)")  # layer 4, head 1
    weights = attended.weights[4, 1]

    def check(word: int) -> None:
        key, query = int(weights[word, : word + 1].argmax()), word + 1 + int(weights[word + 1 :, word].argmax())
        to, by = opened.text("#links > div:first-child"), opened.text("#links > div:last-child")
        assert "attends to" in to
        assert abs(float(to.split(" 0.", 1)[1][:4]) / 1e4 - weights[word, key]) <= 1e-4
        assert abs(float(by.split(" 0.", 1)[1][:4]) / 1e4 - weights[query, word]) <= 1e-4

    left, top, width, height = opened.box("#words span:nth-of-type(4)")
    opened.point(left + width / 2, top + height / 2, click=True)
    check(3)
    opened.press("ArrowRight")
    check(4)
    assert opened.evaluate("document.querySelectorAll('#words path').length") > 0
    opened.resize(390, 800, phone=True)
    assert opened.fits()
    opened.evaluate("document.querySelector('#words').scrollIntoView({block: 'center'})")
    left, top, width, height = opened.box("#words span:nth-of-type(3)")
    opened.tap(left + width / 2, top + height / 2)
    check(2)
    opened.resize(1400, 1600)
