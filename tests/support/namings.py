"""A model's arrays under the names of every scheme, written out without the tables under test.

Each function takes arrays by canonical names. None of them needs npgpt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]
Named = dict[str, NDArray[Any]]

LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def transposed(arrays: Arrays) -> Named:
    """Return matrices of linear layers as torch.nn.Linear has them, [out, in]."""
    return {name: np.ascontiguousarray(a.T) if name.endswith(LINEAR) else a for name, a in arrays.items()}


def masks(arrays: Arrays) -> Named:
    """Return the buffers that lie beside the parameters in each block."""
    return {f"{name}.bias": np.ones((1, 1, 24, 24), np.float32) for name in blocks(arrays, "attn")}


def blocks(arrays: Arrays, part: str) -> list[str]:
    """Return the names of one part in every block, in order."""
    count = sum(name.startswith("h.") and name.endswith(".ln_1.weight") for name in arrays)
    return [f"h.{layer}.{part}" for layer in range(count)]


def huggingface(arrays: Arrays) -> Named:
    """Return the names of transformers, with masks."""
    return {f"transformer.{name}": array for name, array in (dict(arrays) | masks(arrays)).items()}


def nanogpt(arrays: Arrays) -> Named:
    """Return nanoGPT's names after torch.compile, with masks."""
    return {f"_orig_mod.transformer.{name}": array for name, array in (transposed(arrays) | masks(arrays)).items()}


def llms_from_scratch(arrays: Arrays) -> Named:
    """Return LLMs-from-scratch's names: queries, keys and values apart, an output head of its own."""
    inner = {"attn.c_proj": "att.out_proj", "mlp.c_fc": "ff.layers.0", "mlp.c_proj": "ff.layers.2"}
    outer = {"wte": "tok_emb", "wpe": "pos_emb", "lm_head": "out_head"}
    norm = {"weight": "scale", "bias": "shift"}
    named: Named = {"out_head.weight": np.array(arrays["wte.weight"])}
    for name, array in transposed(arrays).items():
        path, _, kind = name.rpartition(".")
        _, layer, part = path.split(".", 2) if name.startswith("h.") else ("", "", path)
        block = f"trf_blocks.{layer}." if layer else ""
        if part == "attn.c_attn":
            for query, third in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                named[f"{block}att.W_{query}.{kind}"] = third
        elif part in inner:
            named[f"{block}{inner[part]}.{kind}"] = array
        elif part in outer:
            named[f"{outer[part]}.{kind}"] = array
        else:
            named[f"{block or 'final_'}norm{part[3:].replace('f', '')}.{norm[kind]}"] = array
    return named


def openai(arrays: Arrays) -> Named:
    """Return OpenAI's names, matrices with a leading 1."""
    named: Named = {}
    for name, array in arrays.items():
        path, _, kind = name.removeprefix("h.").rpartition(".")
        path = f"h{path.replace('.', '/')}" if name.startswith("h.") else path
        if path in ("wte", "wpe"):
            named[f"model/{path}"] = array
        elif "ln_" in path:
            named[f"model/{path}/{'g' if kind == 'weight' else 'b'}"] = array
        else:
            named[f"model/{path}/{kind[0]}"] = array[None] if kind == "weight" else array
    return named


def llamacpp(arrays: Arrays) -> Named:
    """Return llama.cpp's names."""
    outer = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"}
    inner = {"ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output"}
    inner |= {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    named: Named = {}
    for name, array in transposed(arrays).items():
        path, _, kind = name.rpartition(".")
        if name.startswith("h."):
            _, layer, part = path.split(".", 2)
            named[f"blk.{layer}.{inner[part]}.{kind}"] = array
        else:
            named[f"{outer[path]}.{kind}"] = array
    return named


def llmc(arrays: Arrays) -> Named:
    """Return llm.c's names: a stack of all blocks for each part."""
    inner = {"ln_1": "ln1", "attn.c_attn": "qkv", "attn.c_proj": "attproj", "ln_2": "ln2"}
    inner |= {"mlp.c_fc": "fc", "mlp.c_proj": "fcproj"}
    flat = transposed(arrays)
    named = {"wte": flat["wte.weight"], "wpe": flat["wpe.weight"]}
    named |= {"lnfw": flat["ln_f.weight"], "lnfb": flat["ln_f.bias"]}
    for ours, theirs in inner.items():
        for kind in ("weight", "bias"):
            named[theirs + kind[0]] = np.stack([flat[f"{name}.{kind}"] for name in blocks(arrays, ours)])
    return named


# Each with what lies beside the model's own tensors in such files: buffers, an optimiser's moments, a count of steps.
NAMINGS: dict[str, Callable[[Arrays], Named]] = {
    "huggingface": huggingface,
    "nanogpt": nanogpt,
    "llms-from-scratch": lambda arrays: (
        llms_from_scratch(arrays) | {"trf_blocks.0.att.mask": np.ones((24, 24), np.float32)}
    ),
    "openai": lambda arrays: (
        openai(arrays) | {"model/wte/Adam": arrays["wte.weight"], "global_step": np.array(3, np.float32)}
    ),
    "llama.cpp": llamacpp,
    "llm.c": llmc,
}
