"""Fixtures for the comparisons with the real packages."""

from __future__ import annotations

import pytest

from tests.support.verification import Report, reporter


@pytest.fixture
def difference(request: pytest.FixtureRequest) -> Report:
    """Return a function that records a difference for docs/verification.md: table, row, column, figure."""
    return reporter(request)
