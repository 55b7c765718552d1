"""Where npgpt looks for weights."""

from __future__ import annotations

# the environment variables that say so
VARIABLES = ("NPGPT_WEIGHTS", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
