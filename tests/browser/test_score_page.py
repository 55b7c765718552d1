"""The page of `npgpt score` in a real browser, compared with the score's figures."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

import npgpt
from npgpt.scoring import report
from npgpt.scoring.likelihood import Score
from tests.browser.conftest import Visit
from tests.support.devtools import Browser

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[2]
TEXT = "It is a truth </script> <b>universally</b> acknowledged, that 語 \\xc3\n\nlarge and certain fortune, \x1b must."
NUMBER = r"([\d.,e+-]+)"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of two texts that the command writes."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "a.txt").write_bytes(TEXT.encode())
    (folder / "b.txt").write_bytes(b"Emma was happy")
    command = [sys.executable, "-m", "npgpt", "score", str(folder / "a.txt"), str(folder / "b.txt")]
    subprocess.run([*command, "--html", str(folder / "page.html")], cwd=ROOT, check=True)
    return folder / "page.html"


@pytest.fixture(scope="module")
def found() -> Score:
    """Return the first text's score."""
    (score,) = npgpt.score([TEXT], top=5)
    return score


def lines(browser: Browser) -> list[tuple[str, str]]:
    """Return the panel's terms and descriptions."""
    code = "[...document.querySelectorAll('.panel dt')].map((dt) => [dt.textContent, dt.nextSibling.textContent])"
    return [(term, text) for term, text in browser.evaluate(code)]


def check(browser: Browser, found: Score, numbers: list[int]) -> None:
    """Compare the panel with the figures of these tokens."""
    said = lines(browser)
    assert len(said) == 2 * len(numbers)
    for number, (own, likely) in zip(numbers, zip(said[::2], said[1::2], strict=True), strict=True):
        assert own[0] == f"“{report.named(found, number)[1:-1]}”"
        pattern = (
            f"{NUMBER} bits, rank {NUMBER}, probability {NUMBER}\xa0%, log-probability {NUMBER}; id {NUMBER}, byte "
        )
        match = re.fullmatch(pattern + NUMBER, own[1])
        assert match
        bits, rank, chance, log_prob, token_id, byte = (float(text.replace(",", "")) for text in match.groups())
        assert log_prob == pytest.approx(found.log_probs[number], abs=0.51e-4)
        assert bits == pytest.approx(-found.log_probs[number] / math.log(2), abs=0.51e-2)
        assert chance == pytest.approx(100 * math.exp(found.log_probs[number]), abs=0.51e-2)
        place = (found.ranks[number], found.token_ids[number], found.byte_offsets[number])
        assert (rank, token_id, byte) == place
        assert likely[0] == "most likely"
        others = re.findall(r"“(.*?)” ([\d.e-]+)\xa0%", likely[1])
        expected = report.likeliest(found, number)
        assert [name for name, _ in others] == [name[1:-1] for name, _ in expected]
        for (_, text), (_, probability) in zip(others, expected, strict=True):
            assert float(text) == pytest.approx(100 * probability, abs=0.51e-2)


def test_every_token_by_keyboard(visit: Visit, file: Path, found: Score) -> None:
    parts = [numbers for _, numbers in report.segments(found)]
    with visit(file) as browser:
        assert "arrow keys" in browser.text(".panel")
        browser.press("Tab")
        check(browser, found, parts[0])
        for numbers in parts[1:]:
            browser.press("ArrowRight")
            check(browser, found, numbers)
        browser.press("ArrowRight")
        check(browser, found, parts[-1])  # the last stays
        browser.press("Home")
        browser.press("ArrowLeft")
        check(browser, found, parts[0])
        browser.press("ArrowDown")  # to the line below, and back
        assert browser.evaluate("document.activeElement.textContent") == "\n"
        browser.press("ArrowDown")
        assert browser.evaluate("document.activeElement.textContent") == "l"
        browser.press("End")
        check(browser, found, parts[-1])
        assert browser.evaluate("document.querySelectorAll('[tabindex]').length") == 2  # one stop for each text
        browser.press("Tab")
        assert lines(browser)[0][0] == "“E”"


def middle(browser: Browser, part: int) -> tuple[float, float]:
    """Return the screen position of a part of the first text."""
    rectangle = f"document.querySelector('.text').children[{part}].getClientRects()[0]"
    left, top, width, height = browser.evaluate(f"(({{x, y, width, height}}) => [x, y, width, height])({rectangle})")
    return left + width / 2, top + height / 2


def test_tokens_by_mouse_and_by_touch(visit: Visit, file: Path, found: Score) -> None:
    parts = [numbers for _, numbers in report.segments(found)]
    with visit(file) as browser:
        browser.point(*middle(browser, 3))
        check(browser, found, parts[3])
        browser.point(*middle(browser, 5), click=True)
        browser.point(*middle(browser, 2))
        check(browser, found, parts[2])
        browser.point(1, 1)
        check(browser, found, parts[5])  # the chosen one stays
        browser.resize(390, 800, phone=True)
        browser.open(file)
        assert browser.fits()
        for part in (4, 9, 1):
            browser.tap(*middle(browser, part))
            check(browser, found, parts[part])
        browser.resize(1400, 1000)


def test_the_text_is_the_text(visit: Visit, file: Path) -> None:
    with visit(file) as browser:
        for scheme in ("light", "dark"):
            browser.prefer(scheme)
            assert browser.evaluate("document.querySelector('.text').textContent") == TEXT
        assert browser.evaluate(f"document.body.innerText.includes({json.dumps('<b>universally</b>')})")
