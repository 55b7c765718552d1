"""llama.cpp's names for GPT-2 (ggml-org/llama.cpp, gguf-py, tensor_mapping.py)."""

from __future__ import annotations

from collections.abc import Mapping

from ..tensor import Tensor
from .scheme import Rule, Scheme, Source, translated

BLOCK = r"blk\.(\d+)\."
LINEAR = {"attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
RULES = [
    Rule(r"token_embd\.weight", "wte.weight"),
    Rule(r"position_embd\.weight", "wpe.weight"),
    Rule(r"output\.weight", "lm_head.weight"),
    Rule(r"output_norm\.(weight|bias)", r"ln_f.\1"),
    Rule(BLOCK + r"attn_norm\.(weight|bias)", r"h.\1.ln_1.\2"),
    Rule(BLOCK + r"ffn_norm\.(weight|bias)", r"h.\1.ln_2.\2"),
    *(Rule(rf"{BLOCK}{name}\.weight", rf"h.\1.{ours}.weight", transposed=True) for name, ours in LINEAR.items()),
    *(Rule(rf"{BLOCK}{name}\.bias", rf"h.\1.{ours}.bias") for name, ours in LINEAR.items()),
]


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether there are token and position embeddings under these names."""
    return {"token_embd.weight", "position_embd.weight"} <= tensors.keys()


def translate(tensors: Mapping[str, Tensor]) -> dict[str, Source]:
    """By the rules."""
    return translated(tensors, RULES)


SCHEME = Scheme("llama.cpp", "llama.cpp's names", recognises, translate)
