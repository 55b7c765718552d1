"""Reports in the form that the oracle's tests compare."""

from __future__ import annotations


def said(report: object) -> str:
    """Return a report's text on one line."""
    return " ".join(str(report).split())
