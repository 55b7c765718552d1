"""The page of `npgpt check` in a real browser, compared with the report's figures."""

from __future__ import annotations

from pathlib import Path

import pytest

import npgpt
from npgpt.oracle.page import page
from npgpt.oracle.report import Report
from tests.browser.conftest import Visit
from tests.support.austen import AUSTEN
from tests.support.devtools import Browser

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report() -> Report:
    """Return a report on the stages of the first block."""
    stages = npgpt.trace("It is a truth", only=["h.0.*", "h.0", "logits"])
    found = npgpt.check(stages, "It is a truth", AUSTEN)
    assert isinstance(found, Report)
    return found


@pytest.fixture(scope="module")
def file(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "check.html"
    path.write_text(page(report), "utf-8")
    return path


def agrees(browser: Browser, report: Report, stage: str) -> bool:
    """Return whether the panel shows the figures of this stage."""
    (row,) = (row for row in report.rows if row.stage == stage)
    return browser.text(".panel").startswith(f"{stage}: {row.difference.ratio:.3g} tolerances")


def test_every_cell_by_keyboard(file: Path, report: Report, visit: Visit) -> None:
    with visit(file) as browser:
        assert "arrow keys" in browser.text(".panel")
        browser.press("Tab")
        assert agrees(browser, report, "logits")
        browser.press("Tab")
        names = [row.stage for row in report.rows if row.stage != "logits"]
        for name in names:
            assert agrees(browser, report, name), name
            browser.press("ArrowRight")


def test_mouse_and_touch_on_a_phone_in_the_dark(file: Path, report: Report, visit: Visit) -> None:
    with visit(file) as browser:
        browser.prefer("dark")
        browser.resize(390, 800, phone=True)
        assert browser.fits()
        browser.evaluate("document.querySelector('.blocks td').scrollIntoView({block: 'center'})")
        left, top, width, height = browser.box(".blocks td")
        browser.tap(left + width / 2, top + height / 2)
        assert agrees(browser, report, "h.0.ln_1")
        browser.resize(1400, 1000)
