"""The number of examples a test tries: few in plain `pytest`, all under Hypothesis's profile `thorough`.

`pytest --hypothesis-profile=thorough` selects the profile, which tests/conftest.py registers.
"""

from __future__ import annotations

import pytest
from hypothesis import settings

THOROUGH = settings.get_current_profile_name() == "thorough"  # loaded before any test is imported
only_thorough = pytest.mark.skipif(not THOROUGH, reason="takes long: --hypothesis-profile=thorough")


def examples(few: int, many: int) -> int:
    """Return the first value in plain runs, the second under the profile thorough."""
    return many if THOROUGH else few
