"""The browser of the tests in this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.support.devtools import NAMES, Browser, find

Visit = Callable[[Path], AbstractContextManager[Browser]]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Run one browser for all tests."""
    path = find()
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed (Debian: apt-get install chromium)")
    found = Browser(path, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def visit(browser: Browser) -> Visit:
    """Return a context that opens a page in light colours at a desktop's width and expects no error and no request."""

    @contextmanager
    def visiting(file: Path) -> Iterator[Browser]:
        browser.prefer("light")
        browser.resize(1400, 1000)
        browser.open(file)
        yield browser
        methods = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"}
        assert [event for event in browser.events if event["method"] in methods] == []
        asked = [event for event in browser.events if event["method"] == "Network.requestWillBeSent"]
        assert {event["params"]["request"]["url"] for event in asked} <= {file.resolve().as_uri()}

    return visiting
