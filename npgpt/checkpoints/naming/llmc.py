"""llm.c's names (karpathy/llm.c, train_gpt2.c, ParameterTensors): 16 arrays, each stacked over all blocks."""

from __future__ import annotations

from collections.abc import Mapping

from ...config import MOST_LAYERS
from ..tensor import Tensor
from .scheme import Scheme, Source

WHOLE = {"wte": "wte.weight", "wpe": "wpe.weight", "lnfw": "ln_f.weight", "lnfb": "ln_f.bias"}
STACKED = {"ln1": "ln_1", "qkv": "attn.c_attn", "attproj": "attn.c_proj", "ln2": "ln_2"}
STACKED |= {"fc": "mlp.c_fc", "fcproj": "mlp.c_proj"}


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all 16 are there."""
    return {*WHOLE, *(name + kind for name in STACKED for kind in "wb")} <= tensors.keys()


def translate(tensors: Mapping[str, Tensor]) -> dict[str, Source]:
    """Every block's entry of every stack."""
    sources = {ours: Source((name,)) for name, ours in WHOLE.items()}
    for name, ours in STACKED.items():
        for suffix, kind in (("w", "weight"), ("b", "bias")):
            shape = tensors[name + suffix].shape
            for layer in range(min(shape[0] if shape else 0, MOST_LAYERS)):
                sources[f"h.{layer}.{ours}.{kind}"] = Source((name + suffix,), len(shape) == 3, layer)
    known = {name for source in sources.values() for name in source.parts}
    return sources | {name: Source((name,)) for name in tensors if name not in known}


SCHEME = Scheme("llm.c", "llm.c's names", recognises, translate)
