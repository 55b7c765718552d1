"""Mistakes that a GPT-2 in torch can have, by name, with the parts that all styles of foreign.py share.

LOADING and the wrong layers change a module's tensors, AROUND its inputs and outputs. CACHE shows only in a cached run.
All others change the forward pass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from npgpt.config import Config
from npgpt.parameters import Array

Mistakes: TypeAlias = frozenset[str]

ACTIVATION = {"erf GELU": "gelu", "quick GELU": "quick_gelu", "ReLU": "relu"}  # by transformers' names
EPSILON = {f"LayerNorm epsilon {text}": float(text) for text in ("1e-6", "1e-12", "0", "1e-3")}
NORM = ["unbiased variance", "epsilon outside the root", "LayerNorm gain and bias swapped"]
NORM += ["LayerNorm in float16", "LayerNorm in bfloat16"]
RESIDUAL = ["attention residual missing", "MLP residual missing", "both residuals missing"]
BLOCK = ["post-norm order", *RESIDUAL]
SCALE = ["attention scale missing", "attention scaled by C", "attention scaled twice"]
BY_LAYER = "attention scaled by layer"
READING = {f"q, k, v read as {', '.join(parts)}": parts for parts in ("qvk", "kqv", "kvq", "vqk", "vkq")}
# -1e9 hides the token itself, so that the first query sees all keys alike and nothing is NaN
MASK = ["causal mask missing", "mask hides the token itself", "mask shows the next token", "mask transposed"]
MASK += ["mask of -1e4"]
SOFTMAX = ["softmax over queries", "softmax over heads", "softmax in float16", "softmax in bfloat16"]
HEADS = [f"{part} split without transpose" for part in ("heads", "queries", "keys", "values")]
HEADS += ["heads merged without transpose", "heads interleaved"]
ATTENTION = [*HEADS, *READING, *MASK, *SOFTMAX]
EMBEDDING = ["positions off by one", "positions off by two", "positions all zero", "positions missing"]
EMBEDDING += ["embedding scaled"]
LOADING = ["c_attn bias dropped", "all biases dropped", "key bias dropped", "attn.c_proj transposed"]
LOADING += ["q, k, v weights transposed", "weights rounded to float16", "weights rounded to bfloat16"]
AROUND = ["BOS prepended", "last token missing", "logits of the previous position", "log-softmax given as logits"]
AROUND += ["logits centred"]
CACHE = [f"cache {what}" for what in ("positions one too far", "positions one short", "positions never advance")]
CACHE += ["cache not extended"]


def names(config: Config) -> list[str]:
    """Return all mistakes of a plain run; CACHE has those of a cached run."""
    heads = [f"n_head {n}" for n in range(1, config.n_embd + 1) if config.n_embd % n == 0 and n != config.n_head]
    groups = [*ACTIVATION, *EPSILON, *NORM, *BLOCK, *SCALE, BY_LAYER, *ATTENTION, *EMBEDDING, *LOADING, *AROUND]
    layers = ["final LayerNorm missing", "layers reversed", "layers sorted as text", *layer_changes(config.n_layer)]
    return groups + layers + heads


def misread(config: Config, wrong: Mistakes) -> Config:
    """Return the configuration with its mistakes applied."""
    heads = [int(name.split()[1]) for name in sorted(wrong) if name.startswith("n_head ")]
    return replace(
        config,
        n_head=heads[0] if heads else config.n_head,
        layer_norm_epsilon=chosen(EPSILON, wrong, config.layer_norm_epsilon),
        scale_attn_weights=config.scale_attn_weights and not wrong.intersection(SCALE),
        scale_attn_by_inverse_layer_idx=config.scale_attn_by_inverse_layer_idx or BY_LAYER in wrong,
    )


def layer_changes(n_layer: int) -> dict[str, dict[int, list[int]]]:
    """Return, for every mistake about single layers, the layers that replace a layer."""
    changes: dict[str, dict[int, list[int]]] = {}
    for i in range(n_layer):
        changes |= {f"layer {i} missing": {i: []}, f"layer {i} run twice": {i: [i, i]}}
    for i in range(n_layer - 1):
        changes[f"layers {i} and {i + 1} swapped"] = {i: [i + 1], i + 1: [i]}
        changes[f"layer {i} in place of layer {i + 1}"] = {i + 1: [i]}
    return changes


def layer_order(n_layer: int, wrong: Mistakes) -> list[int]:
    """Return the layer at every place."""
    layers = sorted(range(n_layer), key=str) if "layers sorted as text" in wrong else list(range(n_layer))
    layers = layers[::-1] if "layers reversed" in wrong else layers
    for name, change in layer_changes(n_layer).items():
        if name in wrong:
            layers = [new for layer in layers for new in change.get(layer, [layer])]
    return layers


def loaded(config: Config, arrays: Mapping[str, Array], wrong: Mistakes) -> dict[str, Any]:
    """Return float32 tensors by canonical names after the mistakes of loading, the head's always included."""
    C, rounded = config.n_embd, half("weights rounded to", wrong)

    def tensor(name: str) -> Any:
        held = torch.tensor(np.asarray(arrays[name]), dtype=torch.float32)
        if "q, k, v weights transposed" in wrong and name.endswith("attn.c_attn.weight"):
            held = torch.cat([part.T for part in held.split(C, dim=1)], dim=1)
        if "attn.c_proj transposed" in wrong and name.endswith("attn.c_proj.weight"):
            held = held.T
        if "key bias dropped" in wrong and name.endswith("attn.c_attn.bias"):
            held[C : 2 * C] = 0
        if "c_attn bias dropped" in wrong and name.endswith("attn.c_attn.bias"):
            held = torch.zeros_like(held)
        if "all biases dropped" in wrong and re.search(r"\.(attn|mlp)\..*\.bias$", name):
            held = torch.zeros_like(held)
        return held if rounded is None else held.to(rounded).to(torch.float32)

    tensors = {name: tensor(name) for name in arrays if not name.startswith("h.")}
    within = [name.removeprefix("h.0.") for name in arrays if name.startswith("h.0.")]
    for place, layer in enumerate(layer_order(config.n_layer, wrong)):
        tensors |= {f"h.{place}.{name}": tensor(f"h.{layer}.{name}") for name in within}
    return {"lm_head.weight": tensors["wte.weight"]} | tensors


def half(what: str, wrong: Mistakes) -> Any:
    """Return the dtype named by the mistake with this prefix ("softmax in"), or None."""
    return next((getattr(torch, kind) for kind in ("float16", "bfloat16") if f"{what} {kind}" in wrong), None)


def chosen(table: Mapping[str, Any], wrong: Mistakes, right: Any) -> Any:
    """Return the table's value for the first mistake made, or the right value."""
    return next((value for name, value in table.items() if name in wrong), right)


def kept_residuals(wrong: Mistakes) -> tuple[bool, bool]:
    """Return whether attention and the MLP add to the stream."""
    attention, mlp, both = (name in wrong for name in RESIDUAL)
    return not (attention or both), not (mlp or both)


def first_position(past: int, wrong: Mistakes) -> int:
    """Return the position of a chunk's first token after `past` tokens."""
    if past == 0 or "cache positions never advance" in wrong:
        return 0
    return past + ("cache positions one too far" in wrong) - ("cache positions one short" in wrong)


def logits_of(output: Any) -> Any:
    """Return the logits [B, T, V] in the output of a module of any style."""
    return output[0] if isinstance(output, tuple) else getattr(output, "logits", output)


def wrap(model: Any, config: Config, wrong: Mistakes) -> None:
    """Wrap a model in mistakes about its input and output, whose type stays."""

    def before(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids = args[0]
        if "BOS prepended" in wrong:
            ids = torch.cat([torch.full_like(ids[:, :1], config.vocab_size - 1), ids], dim=1)
        return (ids[:, :-1] if "last token missing" in wrong else ids, *args[1:])

    def after(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        logits = logits_of(output)
        if "logits of the previous position" in wrong:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        if "log-softmax given as logits" in wrong:
            logits = logits.log_softmax(dim=-1)
        if "logits centred" in wrong:
            logits = logits - logits.mean(dim=-1, keepdim=True)
        if hasattr(output, "logits"):
            output.logits = logits
            return output
        return (logits, *output[1:]) if isinstance(output, tuple) else logits

    model.register_forward_pre_hook(before)
    model.register_forward_hook(after)


def attention_scale(config: Config, layer: int, wrong: Mistakes) -> float:
    """Return the factor of the scores in the block at this place, in the first two styles."""
    scale = config.head_width**-0.5 if config.scale_attn_weights else 1.0
    scale *= config.n_embd**-0.5 if "attention scaled by C" in wrong else 1.0
    scale /= config.head_width if "attention scaled twice" in wrong else 1.0
    return scale / (layer + 1 if config.scale_attn_by_inverse_layer_idx else 1)


def position_embedding(table: Any, first: int, count: int, wrong: Mistakes) -> Any:
    """Return rows [T, C] of wpe for `count` tokens from position `first`, or 0, in the first two styles."""
    if "positions missing" in wrong:
        return 0
    first += ("positions off by one" in wrong) + 2 * ("positions off by two" in wrong)
    positions = torch.arange(first, first + count)
    return table(torch.zeros_like(positions) if "positions all zero" in wrong else positions)


class GELU(nn.Module):  # type: ignore[misc]
    """The tanh form of GELU written out, or its wrong replacement; any shape."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Any) -> Any:
        if self.form == "relu":
            return x.clamp(min=0)
        if self.form == "quick_gelu":
            return x / (1 + torch.exp(-1.702 * x))
        if self.form == "gelu":
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
