"""Hugging Face's names for GPT-2, which are the canonical ones but for a prefix, two buffers and the tied head."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..tensor import Tensor
from .scheme import Rule, Scheme, Source, translated

# a saved GPT2LMHeadModel has the prefix, the hub's gpt2 has not; buffers are known by their whole name, since
# h.N.attn.c_attn.bias is a parameter
RULES = [Rule(r"(?:transformer\.)?h\.\d+\.attn\.(?:bias|masked_bias)", None), Rule(r"(?:transformer\.)?(.+)", r"\1")]
C_ATTN = re.compile(r"(?:transformer\.)?h\.\d+\.attn\.c_attn\.weight")


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether there is an h.N.attn.c_attn.weight (nanoGPT's, of the same name, is [3C, C])."""
    return any(C_ATTN.fullmatch(name) for name in tensors)


def translate(tensors: Mapping[str, Tensor]) -> dict[str, Source]:
    """The names without their prefix."""
    return translated(tensors, RULES)


SCHEME = Scheme("huggingface", "Hugging Face's names", recognises, translate, ties=True)
