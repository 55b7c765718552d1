"""The embedded model and its card."""

from __future__ import annotations

import npgpt

AUSTEN = npgpt.load()  # for whatever leaves it as it is

# What transformers 5.23 gives for it, with the float16 weights widened to float64.
CARD_PROMPT = "It is a truth universally acknowledged"
CARD_IDS = [1026, 318, 257, 3872, 555, 1191, 453, 257, 694, 2197, 992, 2004]
CARD_TOP5 = [(11, 8.069855), (13, 7.931571), (326, 7.163698), (284, 7.014548), (26, 6.762969)]
CARD_GREEDY = (
    "It is a truth universally acknowledged, and I am sure I should not have been able to see you again, "
    "and I am sure you will be afraid of being in the world. I am sure you will be a"
)

CARD_SHA256 = "e2391161a9b8f1c5f328a53625e96634200d775a8655c9c8c2f29a0f43452d3d"
