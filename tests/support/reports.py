"""Reports as the oracle's tests read them."""

from __future__ import annotations


def said(report: object) -> str:
    """Return its text, in which no line breaks."""
    return " ".join(str(report).split())
