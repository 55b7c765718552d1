"""LLMs-from-scratch's names (rasbt/LLMs-from-scratch, ch04): GPTModel, its variant with a KV cache, and GPTModelFast.

Queries, keys and values are three linear layers in GPTModel and one, qkv, in GPTModelFast, which has PyTorch's own
LayerNorm (weight and bias) besides. Without qkv_bias, the default, those have no biases. The output head is a parameter
of its own. The number of heads is in no shape.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..tensor import Tensor
from .scheme import Rule, Scheme, Source, translated, with_absent_biases

BLOCK = r"trf_blocks\.(\d+)\."
RULES = [
    Rule(BLOCK + r"att\.(?:mask|cache_k|cache_v)", None),
    Rule(r"tok_emb\.weight", "wte.weight"),
    Rule(r"pos_emb\.weight", "wpe.weight"),
    Rule(r"out_head\.weight", "lm_head.weight"),
    Rule(r"final_norm\.(?:scale|weight)", "ln_f.weight"),
    Rule(r"final_norm\.(?:shift|bias)", "ln_f.bias"),
    Rule(BLOCK + r"norm([12])\.(?:scale|weight)", r"h.\1.ln_\2.weight"),
    Rule(BLOCK + r"norm([12])\.(?:shift|bias)", r"h.\1.ln_\2.bias"),
    Rule(BLOCK + r"att\.(?:W_query|qkv)\.weight", r"h.\1.attn.c_attn.weight", transposed=True),
    Rule(BLOCK + r"att\.W_key\.weight", r"h.\1.attn.c_attn.weight", transposed=True),
    Rule(BLOCK + r"att\.W_value\.weight", r"h.\1.attn.c_attn.weight", transposed=True),
    Rule(BLOCK + r"att\.(?:W_query|qkv)\.bias", r"h.\1.attn.c_attn.bias"),
    Rule(BLOCK + r"att\.W_key\.bias", r"h.\1.attn.c_attn.bias"),
    Rule(BLOCK + r"att\.W_value\.bias", r"h.\1.attn.c_attn.bias"),
    Rule(BLOCK + r"att\.(?:out_proj|proj)\.weight", r"h.\1.attn.c_proj.weight", transposed=True),
    Rule(BLOCK + r"att\.(?:out_proj|proj)\.bias", r"h.\1.attn.c_proj.bias"),
    Rule(BLOCK + r"ff\.layers\.0\.weight", r"h.\1.mlp.c_fc.weight", transposed=True),
    Rule(BLOCK + r"ff\.layers\.0\.bias", r"h.\1.mlp.c_fc.bias"),
    Rule(BLOCK + r"ff\.layers\.2\.weight", r"h.\1.mlp.c_proj.weight", transposed=True),
    Rule(BLOCK + r"ff\.layers\.2\.bias", r"h.\1.mlp.c_proj.bias"),
]


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether there is a trf_blocks.N."""
    return any(name.startswith("trf_blocks.") for name in tensors)


def translate(tensors: Mapping[str, Tensor]) -> dict[str, Source]:
    """By the rules, with zeros for the biases of queries, keys and values where there are none."""
    return with_absent_biases(translated(tensors, RULES), r"h\.\d+\.attn\.c_attn\.bias")


SCHEME = Scheme("llms-from-scratch", "LLMs-from-scratch's names", recognises, translate)
