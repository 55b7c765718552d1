"""Collects the largest difference seen with each package and prints the table at the end of the run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

LARGEST = pytest.StashKey[dict[str, tuple[float, str]]]()


@pytest.fixture
def difference(request: pytest.FixtureRequest) -> Callable[[str, str, float], None]:
    """Report a difference, relative to the tensor's largest value, with a package and a stage."""
    largest = request.config.stash.setdefault(LARGEST, {})

    def report(package: str, stage: str, error: float) -> None:
        largest[package] = max(largest.get(package, (0.0, "")), (error, stage))

    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for package, (error, stage) in sorted(terminalreporter.config.stash.get(LARGEST, {}).items()):
        terminalreporter.write_line(f"largest difference, {package}: {error:.1e} of the largest value, at {stage}")
