"""The page of `npgpt explain` in a real browser, compared with the model's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npgpt.pictures.explain import Explanation, explain
from tests.browser.conftest import Visit
from tests.support.devtools import Browser, pixels
from tests.support.thorough import examples

pytestmark = pytest.mark.browser

TEXT = "It is a truth </script> é\n“acknowledged”"


@pytest.fixture(scope="module")
def explained() -> Explanation:
    """Return every stage of the embedded model."""
    return explain(TEXT)


@pytest.fixture(scope="module")
def file(explained: Explanation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page's file."""
    path = tmp_path_factory.mktemp("page") / "explain.html"
    path.write_text(explained.page(), "utf-8")
    return path


@pytest.fixture
def opened(visit: Visit, file: Path) -> Iterator[Browser]:
    """Open the page in light colours; expect no error and no request."""
    with visit(file) as browser:
        yield browser


def shown_numbers(browser: Browser) -> dict[int, float]:
    """Return the numbers of the chosen token, by column."""
    cells = "[...document.querySelectorAll('#numbers [data-column]')]"
    found: dict[str, str] = browser.evaluate(f"Object.fromEntries({cells}.map(x => [x.dataset.column, x.textContent]))")
    return {int(column): number(text) for column, text in found.items()}


def number(text: str) -> float:
    return float(text.replace("−", "-").replace("∞", "inf"))


CHOSEN = [  # stage, token and head
    ("wte", 0, 0),
    ("wpe", 3, 1),
    ("h.0.ln_1", 2, 0),
    ("h.3.attn.c_attn", 5, 2),
    ("h.1.attn.q", 4, 5),
    ("h.5.attn.v", 1, 3),
    ("h.2.attn.scores", 6, 1),
    ("h.4.attn.weights", 6, 4),
    ("h.3.attn.heads", 3, 2),
    ("h.2.attn.residual", 0, 0),
    ("h.5.mlp.act", 7, 0),
    ("h.5", 2, 0),
    ("ln_f", 8, 0),
    ("logits", 1, 0),
]
# 4 digits are shown, 5e-4 of a number at most; a kept number has another 2⁻¹¹ of it, or 2⁻⁴⁰ of its row's largest
SHOWN, KEPT, OF_LARGEST = 5e-4, 2**-11, 2**-40


def test_the_numbers_are_the_models(opened: Browser, explained: Explanation) -> None:
    for stage, token, head in CHOSEN:
        opened.evaluate(f"location.hash = '#stage={stage}&token={token}&head={head}'; address()")
        array = explained.stages[stage]
        assert opened.text("#name") == stage
        assert f"= [{', '.join(map(str, array.shape))}]" in opened.text("#shape")
        found = shown_numbers(opened)
        row = array.reshape(-1, array.shape[-1])[token]
        if array.ndim == 4:
            width = 0 if stage.endswith(("scores", "weights")) else array.shape[-1]
            row = array[0, head, token]
            found = {column - head * width: value for column, value in found.items()}
        assert set(found) <= set(range(len(row))), stage
        assert len(found) == len(row) or stage == "logits", stage
        least = abs(row[np.isfinite(row)]).max() * OF_LARGEST
        np.testing.assert_allclose(list(found.values()), row[list(found)], 1.01 * (SHOWN + KEPT), least, err_msg=stage)
        finite = array[np.isfinite(array)]
        assert number(opened.text("#mean")) == pytest.approx(float(finite.mean(dtype=float)), rel=SHOWN + 1e-6), stage
        assert number(opened.text("#spread")) == pytest.approx(float(finite.std(dtype=float)), rel=SHOWN + 1e-6), stage


def test_the_keyboard_walks_through_every_stage_in_order_and_back(opened: Browser, explained: Explanation) -> None:
    names = list(explained.stages)[-examples(12, 1000) :]
    opened.evaluate(f"open('{names[0]}')")
    seen = [opened.text("#name")]
    for _ in names[1:]:
        opened.press("j")
        seen.append(opened.text("#name"))
    assert seen == names
    assert opened.evaluate("document.activeElement.dataset.stage") == "logits"
    opened.press("j")
    assert opened.text("#name") == "logits"
    back = []
    for _ in names:
        back.append(opened.text("#name"))
        opened.press("k")
    assert back == names[::-1]


def test_keys_choose_token_head_and_block(opened: Browser) -> None:
    opened.evaluate("open('h.2.attn.q', { token: 1, head: 1 })")
    for key in ("ArrowRight", "h", "l"):
        opened.press(key)
    assert opened.evaluate("[state.token, state.head, state.layer]") == [2, 2, 3]
    opened.press("ArrowLeft")
    opened.press("h", shift=True)
    opened.press("l", shift=True)
    assert opened.evaluate("[state.token, state.head, state.layer]") == [1, 1, 2]
    opened.evaluate("document.querySelector('.stage').focus()")
    opened.press("ArrowDown")
    assert opened.text("#name") == "h.2.attn.k"
    assert opened.evaluate("location.hash") == "#stage=h.2.attn.k&token=1&head=1"


def test_a_click_on_a_line_or_a_stage_chooses_it_and_its_line_is_marked(opened: Browser) -> None:
    opened.evaluate("document.querySelector('[data-stage$=\"attn.k\"]').click()")
    assert opened.text("#name") == "h.0.attn.k"
    assert 'record("attn.k", k)' in opened.text(".line.now")
    opened.evaluate("[...document.querySelectorAll('.line')].find(x => x.textContent.includes('mlp.c_fc')).click()")
    assert opened.text("#name") == "h.0.mlp.c_fc"
    assert opened.evaluate("document.querySelectorAll('[aria-current=step]').length") == 1


@pytest.mark.parametrize(
    ("function", "stage"),
    [
        ("layer_norm", "h.0.ln_1"),
        ("softmax", "h.0.attn.weights"),
        ("attention", "h.0.attn.heads"),
        ("gelu", "h.0.mlp.act"),
        ("activation", "h.0.mlp.act"),
        ("split_heads", "h.0.attn.q"),
        ("merge_heads", "h.0.attn.c_proj"),
        ("linear", "h.0.attn.c_attn"),
    ],
)
def test_a_function_is_stepped_into(opened: Browser, function: str, stage: str) -> None:
    opened.evaluate(f"document.querySelector('[data-fn={function}]').click()")
    name = "gelu" if function == "activation" else function
    assert (opened.text("#name"), opened.text("#formula-title").startswith(f"Inside {name}")) == (stage, True)
    assert f"def {name}(" in opened.text(".def")
    assert opened.evaluate("document.querySelector('#formula').children.length") > 0


def test_layer_norm_has_this_tokens_numbers(opened: Browser, explained: Explanation) -> None:
    opened.evaluate("open('h.1.ln_2', { token: 4 })")
    x = explained.stages["h.1.attn.residual"][0, 4].astype(float)
    norm = explained.model.parameters.h[1].ln_2
    normalised = (x - x.mean()) / np.sqrt(x.var() + explained.model.config.layer_norm_epsilon)
    rows: list[list[str]] = opened.evaluate(
        "[...document.querySelectorAll('#formula tbody tr')].map(x => [...x.children].map(cell => cell.textContent))"
    )
    table = np.array([[number(cell) for cell in row] for row in rows])
    columns = table[:, 0].astype(int)
    result = norm.weight * normalised + norm.bias
    expected: list[Any] = [x, x - x.mean(), normalised, norm.weight, norm.bias, result]
    for shown, exact in zip(table.T[1:], expected, strict=True):
        np.testing.assert_allclose(shown, exact[columns], 3e-3, abs(exact).max() * 1e-3)


def test_dark_has_other_colours_and_no_number_changes(opened: Browser) -> None:
    before, light = shown_numbers(opened), pixels(opened.screenshot())
    opened.prefer("dark")
    dark = pixels(opened.screenshot())
    assert (light[2, 2, :3].mean(), dark[2, 2, :3].mean()) == (pytest.approx(255, abs=12), pytest.approx(20, abs=20))
    assert shown_numbers(opened) == before


@pytest.mark.parametrize(
    "stage", ["wte", "h.0.ln_1", "h.0.attn.q", "h.0.attn.weights", "h.0.attn.c_proj", "h.0.mlp.act", "logits"]
)
def test_nothing_is_cut_off_on_a_phone(opened: Browser, stage: str) -> None:
    opened.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=False)
    try:
        opened.evaluate(f"open('{stage}')")
        assert opened.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
        outside = """[...document.querySelectorAll('main *, .bar *, .below *')].filter(x =>
            x.getBoundingClientRect().right > innerWidth + 1 &&
            !x.closest('#source, .scroll, .numbers, select')).length"""
        assert opened.evaluate(outside) == 0
    finally:
        opened.call("Emulation.clearDeviceMetricsOverride")


def test_a_single_token_has_a_small_arc(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "one.html"
    path.write_text(explain("It").page(), "utf-8")
    browser.open(path)
    browser.evaluate("open('h.0.attn.weights')")
    assert browser.text("#arcs text") == "It"
    assert 0 < browser.box("#arcs svg")[2] < 100


def test_the_source_stays_below_the_bar_of_many_tokens(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "many.html"
    path.write_text(explain(list(range(60))).page(), "utf-8")
    browser.open(path)
    browser.evaluate("scrollTo(0, 500)")
    _, top, _, height = browser.box(".bar")
    assert browser.box("#source")[1] >= top + height


@pytest.mark.parametrize("down", [0, 700])
def test_what_is_chosen_is_in_view(browser: Browser, tmp_path: Path, down: int) -> None:
    path = tmp_path / "many.html"
    path.write_text(explain([1026, 257] * 100).page(), "utf-8")
    browser.open(path, "#stage=h.0.mlp.c_proj&token=150")
    browser.evaluate(f"scrollTo(0, {down})")
    browser.press("ArrowRight")
    browser.press("j")
    assert browser.text("#name") == "h.0"
    assert browser.text("#tokens [aria-pressed=true]") == "␣a"
    for chosen, within in (("#tokens [aria-pressed=true]", "#tokens"), ("[aria-current=step]", "#source")):
        (_, top, _, height), (_, first, _, tall) = browser.box(chosen), browser.box(within)
        assert first <= top <= first + tall - height


@pytest.mark.parametrize("stage", ["h.0.attn.c_attn", "h.0.attn.q", "h.0.attn.heads"])
def test_the_colours_of_heads_lie_above_their_columns(opened: Browser, stage: str) -> None:
    opened.evaluate(f"open('{stage}', {{ token: 0 }})")
    assert opened.box(".groups")[::2] == opened.box(".field canvas")[::2]
