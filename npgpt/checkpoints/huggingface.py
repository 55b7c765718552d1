"""Hugging Face's names for GPT-2, which are the canonical ones but for a prefix, two buffers and the tied head."""

from __future__ import annotations

import re
from collections.abc import Iterable

PREFIX = "transformer."  # a saved GPT2LMHeadModel has it, the hub's gpt2 has not
MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """{canonical name: name in the file}, less the causal mask's buffers h.N.attn.bias and h.N.attn.masked_bias.

    Buffers are known by their whole name: h.N.attn.c_attn.bias is a parameter. A name that would be taken twice
    (with and without the prefix) keeps its prefix the second time, so that strict loading reports it as left over.
    """
    found: dict[str, str] = {}
    for name in names:
        canonical = name.removeprefix(PREFIX)
        if not MASK_BUFFER.fullmatch(canonical):
            found[canonical if canonical not in found else name] = name
    return found
