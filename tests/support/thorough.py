"""How much of a check by many examples is done: less in plain `pytest`, which is to stay short, all of it
under Hypothesis's profile `thorough`, `pytest --hypothesis-profile=thorough` (see tests/conftest.py).
"""

from __future__ import annotations

import pytest
from hypothesis import settings

THOROUGH = settings.get_current_profile_name() == "thorough"  # loaded before any test is imported
only_thorough = pytest.mark.skipif(not THOROUGH, reason="takes long: --hypothesis-profile=thorough")


def examples(few: int, many: int) -> int:
    """Return the first value in plain runs, the second under the profile thorough."""
    return many if THOROUGH else few
