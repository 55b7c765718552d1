"""The embedded model and its card."""

from __future__ import annotations

import npgpt

AUSTEN = npgpt.load()  # for whatever leaves it as it is

# The card of the embedded model, made when it was trained, by another program: float16 weights widened to float64.
CARD_PROMPT = "It is a truth universally acknowledged"
CARD_IDS = [1026, 318, 257, 3872, 555, 1191, 453, 257, 694, 2197, 992, 2004]
CARD_TOP5 = [(11, 8.896697), (13, 8.394765), (26, 7.320081), (286, 6.882954), (284, 6.56875)]
CARD_GREEDY = (
    "It is a truth universally acknowledged, and I am sure I should not have been so much in the world. "
    "I am sure I should not have been so much in the world. I am sure I should not have been so happy"
)
