"""How much of a check by many examples is done: less in plain `pytest`, which is to take under 2 minutes on 2 cores,
all of it with NPGPT_THOROUGH=1, as in `.ci/run`.
"""

from __future__ import annotations

import os

THOROUGH = os.environ.get("NPGPT_THOROUGH", "") not in ("", "0")


def examples(few: int, many: int) -> int:
    """How many, or every how-manieth, now."""
    return many if THOROUGH else few
