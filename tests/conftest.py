"""Fixtures and settings for all tests."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import settings

# One BLAS thread in this process: for models this small, a second one only waits, which takes most of the tests' time.
# OpenBLAS reads the variable when NumPy is imported; processes that tests start do not inherit it.
with mock.patch.dict(os.environ, {"OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS", "1")}):
    from npgpt.oracle import comparison, diagnosis
    from npgpt.oracle.mistakes import Mistake, catalogue
    from tests.support import verification
    from tests.support.models import small, store

# Registered before Hypothesis's own plugin looks for --hypothesis-profile, which happens in pytest_configure.
settings.register_profile("quick", deadline=None, max_examples=20)
settings.register_profile("thorough", deadline=None, max_examples=200)
settings.load_profile("quick")


def pytest_addoption(parser: pytest.Parser) -> None:
    verification.add_option(parser)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    verification.summarise(terminalreporter)


def pytest_configure() -> None:
    """Restore Ctrl-C, which a shell's background job ignores, because processes that tests interrupt inherit it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Reduce garbage collection, which took a quarter of the time.

    Objects that exist before the first test are exempt from it, and it runs less often, because the oracle's tests
    create many small objects.
    """
    gc.freeze()
    gc.set_threshold(20_000)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip importing deselected comparisons, because torch and transformers take seconds."""
    return f"not {collection_path.name}" in config.option.markexpr.split(" and ") or None


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model with 40 ids and no vocabulary."""
    return store(tmp_path_factory.mktemp("bare"), small())


# the mistakes made by tests that use few_mistakes
MADE = (
    "ReLU",
    "erf GELU",
    "attention scale missing",
    "n_head 2",
    "positions count the padding",
    "log-softmax given as logits",
)


@pytest.fixture
def few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit the oracle's search for pairs of mistakes, slow if nothing explains a difference, unless thorough."""
    if settings.get_current_profile_name() != "thorough":
        monkeypatch.setattr(diagnosis, "MOST_PAIRS", 20)


@pytest.fixture
def few_mistakes(monkeypatch: pytest.MonkeyPatch, few_pairs: None) -> None:
    """Limit the oracle to every tenth mistake and MADE, for tests of input and output, unless thorough."""

    def few(*arguments: Any) -> list[Mistake]:
        entries = catalogue(*arguments)
        return [entry for number, entry in enumerate(entries) if number % 10 == 0 or entry.name in MADE]

    if settings.get_current_profile_name() != "thorough":
        monkeypatch.setattr(comparison, "catalogue", few)
