"""Three foreign GPT-2s in torch, as users write them, into which mistakes can be put: what the oracle has to name.

"llms-from-scratch" and "nanogpt" are written here in the manner of the two, each with an attention and a block of its
own; "transformers" is the real GPT2LMHeadModel, patched. Mistakes go by their names and come in any combination. Those
of LOADING and the wrong layers are in the module's tensors, all others in its forward pass.

Shapes as in npgpt.model. Blocks are counted as they stand in the module: where a layer is missing or run twice it has
one block less or more, and names of stages and a scale by layer follow the place, not the layer's number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block

from npgpt.checkpoints import configs
from npgpt.config import Config
from npgpt.parameters import Array, count_blocks

Mistakes: TypeAlias = frozenset[str]

STYLES = ("llms-from-scratch", "nanogpt", "transformers")

ACTIVATION = {"erf GELU": "gelu", "quick GELU": "quick_gelu", "ReLU": "relu"}  # by transformers' names
EPSILON = {f"LayerNorm epsilon {text}": float(text) for text in ("1e-6", "1e-12", "0", "1e-3")}
NORM = ["unbiased variance", "epsilon outside the root", "LayerNorm gain and bias swapped"]
NORM += ["LayerNorm in float16", "LayerNorm in bfloat16"]
RESIDUAL = ["attention residual missing", "MLP residual missing", "both residuals missing"]
BLOCK = ["post-norm order", *RESIDUAL]
SCALE = ["attention scale missing", "attention scaled by C", "attention scaled twice"]
BY_LAYER = "attention scaled by layer"
READING = {f"q, k, v read as {', '.join(parts)}": parts for parts in ("qvk", "kqv", "kvq", "vqk", "vkq")}
# the own token is hidden by -1e9 in place of a score, so that the first query sees all keys alike and none is NaN
MASK = ["causal mask missing", "mask hides the own token", "mask shows the next token", "mask transposed"]
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
    """All mistakes of a plain run; those of a cached run are CACHE."""
    heads = [f"n_head {n}" for n in range(1, config.n_embd + 1) if config.n_embd % n == 0 and n != config.n_head]
    groups = [*ACTIVATION, *EPSILON, *NORM, *BLOCK, *SCALE, BY_LAYER, *ATTENTION, *EMBEDDING, *LOADING, *AROUND]
    layers = ["final LayerNorm missing", "layers reversed", "layers sorted as text", *layer_changes(config.n_layer)]
    return groups + layers + heads


def build(style: str, config: Config, arrays: Mapping[str, Array], mistakes: Collection[str] = ()) -> torch.nn.Module:
    """The module in evaluation and float32, on ids [B, T], which are its first argument, by position.

    arrays: by canonical names. Mistakes of CACHE show in chunked alone. Raises ValueError for an unknown name.
    """
    if unknown := {style}.difference(STYLES) or set(mistakes).difference(names(config), CACHE):
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
    wrong = frozenset(mistakes)
    tensors = loaded(config, arrays, wrong)
    config = misread(config, wrong)
    model = {"llms-from-scratch": GPTModel, "nanogpt": GPT, "transformers": patched}[style](
        config, count_blocks(tensors), wrong
    )
    fill(model, style, tensors)
    if wrong.intersection(AROUND):
        wrap(model, config, wrong)
    return model.eval()


# What the styles share: the reading of names, loading, and what lies around a model.


def misread(config: Config, wrong: Mistakes) -> Config:
    """The configuration that follows from mistakes in it."""
    heads = [int(name.split()[1]) for name in sorted(wrong) if name.startswith("n_head ")]
    return replace(
        config,
        n_head=heads[0] if heads else config.n_head,
        layer_norm_epsilon=chosen(EPSILON, wrong, config.layer_norm_epsilon),
        scale_attn_weights=config.scale_attn_weights and not wrong.intersection(SCALE),
        scale_attn_by_inverse_layer_idx=config.scale_attn_by_inverse_layer_idx or BY_LAYER in wrong,
    )


def layer_changes(n_layer: int) -> dict[str, dict[int, list[int]]]:
    """For every mistake about single layers: which layers stand in place of a layer."""
    changes: dict[str, dict[int, list[int]]] = {}
    for i in range(n_layer):
        changes |= {f"layer {i} missing": {i: []}, f"layer {i} run twice": {i: [i, i]}}
    for i in range(n_layer - 1):
        changes[f"layers {i} and {i + 1} swapped"] = {i: [i + 1], i + 1: [i]}
        changes[f"layer {i} in place of layer {i + 1}"] = {i + 1: [i]}
    return changes


def layer_order(n_layer: int, wrong: Mistakes) -> list[int]:
    """The layer that stands in every place."""
    layers = sorted(range(n_layer), key=str) if "layers sorted as text" in wrong else list(range(n_layer))
    layers = layers[::-1] if "layers reversed" in wrong else layers
    for name, change in layer_changes(n_layer).items():
        if name in wrong:
            layers = [new for layer in layers for new in change.get(layer, [layer])]
    return layers


def loaded(config: Config, arrays: Mapping[str, Array], wrong: Mistakes) -> dict[str, Any]:
    """Tensors in float32 by canonical names, as the mistakes of loading leave them; the head's always among them."""
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


OUTER = {"embedding": "drop_emb", "wte": "tok_emb", "wpe": "pos_emb", "h": "trf_blocks", "lm_head": "out_head"}
NORMS = {"ln_1": "norm1", "ln_2": "norm2", "ln_f": "final_norm"}
LINEAR = {"attn.c_attn": "att.W_query att.W_key att.W_value", "attn.c_proj": "att.out_proj"}
LAYERS = {"mlp.c_fc": "ff.layers.0", "mlp.act": "ff.layers.1", "mlp.c_proj": "ff.layers.2"}
BOOK = OUTER | NORMS | LINEAR | LAYERS


def paths(style: str, stage: str) -> list[str]:
    """The modules that, side by side, are npgpt's stage or parameter of that name."""
    if style == "llms-from-scratch":
        block, part = re.findall(r"^(h\.\d+\.?)?(.*)", stage)[0]
        return [block.replace("h.", "trf_blocks.") + name for name in BOOK.get(part, part).split(" ")]
    stage = stage.replace(".act", ".gelu") if style == "nanogpt" else stage
    return [stage if stage == "lm_head" else f"transformer.{stage.replace('embedding', 'drop')}"]


def fill(model: Any, style: str, tensors: dict[str, Any]) -> None:
    """Put every tensor in place; nn.Linear holds [out, in]."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            stem, kind = name.rsplit(".", 1)
            found = paths(style, stem)
            for path, part in zip(found, tensor.chunk(len(found), dim=-1), strict=True):
                left = model.get_submodule(path)
                kind = {"weight": "scale", "bias": "shift"}[kind] if isinstance(left, BookLayerNorm) else kind
                turned = isinstance(left, nn.Linear) and stem != "lm_head"
                getattr(left, kind).copy_(part.t() if turned else part)


def half(what: str, wrong: Mistakes) -> Any:
    """The dtype in the mistake that begins so ("softmax in"), or None."""
    return next((getattr(torch, kind) for kind in ("float16", "bfloat16") if f"{what} {kind}" in wrong), None)


def chosen(table: Mapping[str, Any], wrong: Mistakes, right: Any) -> Any:
    """What the first mistake made of a table stands for, or what is right."""
    return next((value for name, value in table.items() if name in wrong), right)


def kept_residuals(wrong: Mistakes) -> tuple[bool, bool]:
    """Whether attention, and whether the MLP, adds to the stream."""
    attention, mlp, both = (name in wrong for name in RESIDUAL)
    return not (attention or both), not (mlp or both)


def first_position(past: int, wrong: Mistakes) -> int:
    """The position of a chunk's first token, after `past` tokens."""
    if past == 0 or "cache positions never advance" in wrong:
        return 0
    return past + ("cache positions one too far" in wrong) - ("cache positions one short" in wrong)


def logits_of(output: Any) -> Any:
    """Logits [B, T, V] in what a module of any style returns."""
    return output[0] if isinstance(output, tuple) else getattr(output, "logits", output)


def wrap(model: Any, config: Config, wrong: Mistakes) -> None:
    """Mistakes in what goes into a model and in what is made of its output, which keeps its type."""

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
    """What scores are multiplied by in the block at this place, in the first two styles."""
    scale = config.head_width**-0.5 if config.scale_attn_weights else 1.0
    scale *= config.n_embd**-0.5 if "attention scaled by C" in wrong else 1.0
    scale /= config.head_width if "attention scaled twice" in wrong else 1.0
    return scale / (layer + 1 if config.scale_attn_by_inverse_layer_idx else 1)


def position_embedding(table: Any, first: int, count: int, wrong: Mistakes) -> Any:
    """[T, C] from wpe for `count` tokens from position `first`, or 0, in the first two styles."""
    if "positions missing" in wrong:
        return 0
    first += ("positions off by one" in wrong) + 2 * ("positions off by two" in wrong)
    positions = torch.arange(first, first + count)
    return table(torch.zeros_like(positions) if "positions all zero" in wrong else positions)


# In the manner of LLMs-from-scratch. Modules without a word about shapes are [B, T, C] → [B, T, C].


class BookLayerNorm(nn.Module):  # type: ignore[misc]
    """Normalisation written out; its parameters are scale and shift."""

    def __init__(self, config: Config, wrong: Mistakes) -> None:
        super().__init__()
        self.eps, self.wrong = config.layer_norm_epsilon, wrong
        self.scale = nn.Parameter(torch.ones(config.n_embd))
        self.shift = nn.Parameter(torch.zeros(config.n_embd))

    def forward(self, x: Any) -> Any:
        mean = x.mean(dim=-1, keepdim=True)
        var = x.var(dim=-1, keepdim=True, unbiased="unbiased variance" in self.wrong)
        if (dtype := half("LayerNorm in", self.wrong)) is not None:
            mean, var = mean.to(dtype).to(x.dtype), var.to(dtype).to(x.dtype)
        outside = "epsilon outside the root" in self.wrong
        norm_x = (x - mean) / (torch.sqrt(var) + self.eps if outside else torch.sqrt(var + self.eps))
        swapped = "LayerNorm gain and bias swapped" in self.wrong
        return self.shift * norm_x + self.scale if swapped else self.scale * norm_x + self.shift


class GELU(nn.Module):  # type: ignore[misc]
    """The tanh form written out, or what is taken for it; any shape."""

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


class FeedForward(nn.Module):  # type: ignore[misc]
    """Up, GELU, down."""

    def __init__(self, config: Config, wrong: Mistakes) -> None:
        super().__init__()
        up, down = nn.Linear(config.n_embd, config.inner_width), nn.Linear(config.inner_width, config.n_embd)
        self.layers = nn.Sequential(up, GELU(chosen(ACTIVATION, wrong, config.activation_function)), down)

    def forward(self, x: Any) -> Any:
        return self.layers(x)


class MultiHeadAttention(nn.Module):  # type: ignore[misc]
    """Three projections, a mask of what is hidden, and the cache inside."""

    def __init__(self, config: Config, layer: int, wrong: Mistakes) -> None:
        super().__init__()
        self.d_out, self.num_heads, self.head_dim = config.n_embd, config.n_head, config.head_width
        self.scale, self.wrong = attention_scale(config, layer, wrong), wrong
        self.W_query = nn.Linear(self.d_out, self.d_out)
        self.W_key = nn.Linear(self.d_out, self.d_out)
        self.W_value = nn.Linear(self.d_out, self.d_out)
        self.out_proj = nn.Linear(self.d_out, self.d_out)
        diagonal = 1 + ("mask shows the next token" in wrong) - ("mask hides the own token" in wrong)
        mask = torch.triu(torch.ones(config.n_positions, config.n_positions), diagonal=diagonal)
        mask = torch.zeros_like(mask) if "causal mask missing" in wrong else mask
        self.register_buffer("mask", mask.T if "mask transposed" in wrong else mask)
        self.cache: tuple[Any, Any] | None = None

    def split(self, x: Any, part: str) -> Any:
        """[B, T, C] → [B, H, T, D]."""
        b, num_tokens, _ = x.shape
        if self.wrong & {"heads split without transpose", f"{part} split without transpose"}:
            return x.reshape(b, self.num_heads, num_tokens, self.head_dim)
        return x.reshape(b, num_tokens, self.num_heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Any, use_cache: bool = False) -> Any:
        b, num_tokens, _ = x.shape
        projected = (self.W_query(x), self.W_key(x), self.W_value(x))
        if "heads interleaved" in self.wrong:
            together = torch.cat(projected, dim=-1).view(b, num_tokens, self.num_heads, 3, self.head_dim)
            projected = tuple(together[:, :, :, i].reshape(b, num_tokens, self.d_out) for i in range(3))
        taken = dict(zip(chosen(READING, self.wrong, "qkv"), projected, strict=True))
        queries, keys, values = (self.split(taken[part[0]], part) for part in ("queries", "keys", "values"))
        if use_cache:
            if self.cache is not None and "cache not extended" not in self.wrong:
                keys, values = torch.cat([self.cache[0], keys], dim=2), torch.cat([self.cache[1], values], dim=2)
            self.cache = keys, values

        attn_scores = queries @ keys.transpose(2, 3) * self.scale
        seen = keys.shape[2]
        mask_bool = self.mask.bool()[seen - num_tokens : seen, :seen]
        if "mask of -1e4" in self.wrong:
            attn_scores = torch.where(mask_bool, attn_scores - 1e4, attn_scores)
        else:
            attn_scores.masked_fill_(mask_bool, -1e9 if "mask hides the own token" in self.wrong else -torch.inf)
        dim = 2 if "softmax over queries" in self.wrong else 1 if "softmax over heads" in self.wrong else 3
        attn_weights = torch.softmax(attn_scores, dim=dim, dtype=half("softmax in", self.wrong)).to(x.dtype)
        if dim == 1:
            attn_weights = attn_weights.nan_to_num(0.0)  # where every head is masked
        context_vec = attn_weights @ values
        if "heads merged without transpose" not in self.wrong:
            context_vec = context_vec.transpose(1, 2)
        return self.out_proj(context_vec.reshape(b, num_tokens, self.d_out))


class TransformerBlock(nn.Module):  # type: ignore[misc]
    """Twice: norm, layer, shortcut."""

    def __init__(self, config: Config, layer: int, wrong: Mistakes) -> None:
        super().__init__()
        self.att = MultiHeadAttention(config, layer, wrong)
        self.ff = FeedForward(config, wrong)
        self.norm1, self.norm2 = BookLayerNorm(config, wrong), BookLayerNorm(config, wrong)
        self.drop_shortcut = nn.Dropout(0.0)
        self.post_norm, self.shortcuts = "post-norm order" in wrong, kept_residuals(wrong)

    def forward(self, x: Any, use_cache: bool = False) -> Any:
        shortcut = x
        x = self.drop_shortcut(self.att(x if self.post_norm else self.norm1(x), use_cache))
        if self.shortcuts[0]:
            x = x + shortcut
        if self.post_norm:
            x = self.norm1(x)
        shortcut = x
        x = self.drop_shortcut(self.ff(x if self.post_norm else self.norm2(x)))
        if self.shortcuts[1]:
            x = x + shortcut
        return self.norm2(x) if self.post_norm else x


class GPTModel(nn.Module):  # type: ignore[misc]
    """Logits [B, T, V] of ids [B, T]; with use_cache it goes on from the tokens before."""

    def __init__(self, config: Config, n_layers: int, wrong: Mistakes) -> None:
        super().__init__()
        self.emb_dim, self.wrong, self.current_pos = config.n_embd, wrong, 0
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_emb = nn.Embedding(config.n_positions, config.n_embd)
        self.drop_emb = nn.Dropout(0.0)
        self.trf_blocks = nn.ModuleList(TransformerBlock(config, layer, wrong) for layer in range(n_layers))
        self.final_norm = BookLayerNorm(config, wrong)
        self.out_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, in_idx: Any, use_cache: bool = False) -> Any:
        num_tokens = in_idx.shape[1]
        past = self.current_pos if use_cache else 0
        self.current_pos = past + num_tokens
        tok_embeds = self.tok_emb(in_idx)
        if "embedding scaled" in self.wrong:
            tok_embeds = tok_embeds * self.emb_dim**0.5
        pos_embeds = position_embedding(self.pos_emb, first_position(past, self.wrong), num_tokens, self.wrong)
        x = self.drop_emb(tok_embeds + pos_embeds)
        for block in self.trf_blocks:
            x = block(x, use_cache)
        return self.out_head(x if "final LayerNorm missing" in self.wrong else self.final_norm(x))


# In the manner of nanoGPT.


class LayerNorm(nn.LayerNorm):  # type: ignore[misc]
    """torch's own, written out where a mistake asks for it; transformers' is turned into this."""

    wrong: Mistakes = frozenset()

    def forward(self, input: Any) -> Any:
        if not self.wrong.intersection(NORM):
            return super().forward(input)
        weight, bias = self.weight, self.bias
        if "LayerNorm gain and bias swapped" in self.wrong:
            weight, bias = bias, weight
        correction = int("unbiased variance" in self.wrong)
        statistics = torch.var_mean(input, dim=-1, correction=correction, keepdim=True)
        dtype = half("LayerNorm in", self.wrong) or input.dtype
        variance, mean = (value.to(dtype).to(input.dtype) for value in statistics)
        if "epsilon outside the root" in self.wrong:
            return torch.addcmul(bias, (input - mean) / (variance**0.5 + self.eps), weight)
        return torch.addcmul(bias, (input - mean) * torch.rsqrt(variance + self.eps), weight)


class CausalSelfAttention(nn.Module):  # type: ignore[misc]
    """One projection for all three, a mask of what is seen; a cache holds keys and values by layer."""

    def __init__(self, config: Config, layer: int, wrong: Mistakes) -> None:
        super().__init__()
        self.n_head, self.n_embd, self.layer, self.wrong = config.n_head, config.n_embd, layer, wrong
        self.scale = attention_scale(config, layer, wrong)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        N = config.n_positions
        ahead = ("mask shows the next token" in wrong) - ("mask hides the own token" in wrong)
        seen = torch.ones(N, N) if "causal mask missing" in wrong else torch.tril(torch.ones(N, N), diagonal=ahead)
        self.register_buffer("bias", (seen.T if "mask transposed" in wrong else seen).view(1, 1, N, N))

    def forward(self, x: Any, cache: dict[int, Any] | None = None) -> Any:
        B, T, C = x.size()
        wrong, D = self.wrong, C // self.n_head
        if "heads interleaved" in wrong:
            parts = [part.flatten(2) for part in self.c_attn(x).view(B, T, self.n_head, 3, D).unbind(3)]
        else:
            parts = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (parts[chosen(READING, wrong, "qkv").index(letter)] for letter in "qkv")
        bare = ["heads split without transpose" in wrong or name in wrong for name in HEADS[1:4]]
        q, k, v = (
            part.reshape(B, self.n_head, T, D) if straight else part.view(B, T, self.n_head, D).transpose(1, 2)
            for part, straight in zip((q, k, v), bare, strict=True)
        )  # [B, H, T, D]
        if cache is not None:
            if self.layer in cache and "cache not extended" not in wrong:
                k, v = (torch.cat(pair, dim=2) for pair in zip(cache[self.layer], (k, v), strict=True))
            cache[self.layer] = (k, v)

        S = k.size(2)
        att = (q @ k.transpose(-2, -1)) * self.scale
        hidden = self.bias[:, :, S - T : S, :S] == 0
        if "mask of -1e4" in wrong:
            att = att - 1e4 * hidden.to(att.dtype)
        else:
            att = att.masked_fill(hidden, -1e9 if "mask hides the own token" in wrong else float("-inf"))
        att = att.to(half("softmax in", wrong) or att.dtype)
        if "softmax over queries" in wrong:
            att = functional.softmax(att, dim=-2)
        elif "softmax over heads" in wrong:
            att = functional.softmax(att, dim=1)
            att = att.masked_fill(att.isnan(), 0.0)
        else:
            att = functional.softmax(att, dim=-1)
        y = att.to(v.dtype) @ v  # [B, H, T, D]
        y = y if "heads merged without transpose" in wrong else y.transpose(1, 2)
        return self.c_proj(y.contiguous().view(B, T, C))


class MLP(nn.Module):  # type: ignore[misc]
    """Up, activation, down."""

    def __init__(self, config: Config, wrong: Mistakes) -> None:
        super().__init__()
        form = chosen(ACTIVATION, wrong, config.activation_function)
        others = {"gelu": nn.GELU(), "quick_gelu": GELU("quick_gelu"), "relu": nn.ReLU()}
        self.c_fc = nn.Linear(config.n_embd, config.inner_width)
        self.gelu = others.get(form, nn.GELU(approximate="tanh"))
        self.c_proj = nn.Linear(config.inner_width, config.n_embd)

    def forward(self, x: Any) -> Any:
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):  # type: ignore[misc]
    """Attention, then the MLP."""

    def __init__(self, config: Config, layer: int, wrong: Mistakes) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (LayerNorm(config.n_embd, eps=config.layer_norm_epsilon) for _ in range(2))
        self.ln_1.wrong = self.ln_2.wrong = wrong
        self.attn = CausalSelfAttention(config, layer, wrong)
        self.mlp = MLP(config, wrong)
        self.wrong = wrong

    def forward(self, x: Any, cache: dict[int, Any] | None = None) -> Any:
        first, second = kept_residuals(self.wrong)  # True is 1
        if "post-norm order" in self.wrong:
            x = self.ln_1(first * x + self.attn(x, cache))
            return self.ln_2(second * x + self.mlp(x))
        x = first * x + self.attn(self.ln_1(x), cache)
        return second * x + self.mlp(self.ln_2(x))


class GPT(nn.Module):  # type: ignore[misc]
    """Logits [B, T, V] of ids [B, T], and None; a cache, at first empty, belongs to the caller, who counts the past."""

    def __init__(self, config: Config, n_layer: int, wrong: Mistakes) -> None:
        super().__init__()
        C, N, V = config.n_embd, config.n_positions, config.vocab_size
        self.config = SimpleNamespace(
            n_layer=n_layer, n_head=config.n_head, n_embd=C, block_size=N, vocab_size=V, bias=True, dropout=0.0
        )
        self.wrong = wrong
        parts = {"wte": nn.Embedding(V, C), "wpe": nn.Embedding(N, C), "drop": nn.Dropout(0.0)}
        parts["h"] = nn.ModuleList(Block(config, layer, wrong) for layer in range(n_layer))
        parts["ln_f"] = LayerNorm(C, eps=config.layer_norm_epsilon)
        parts["ln_f"].wrong = wrong
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(C, V, bias=False)
        if config.tie_word_embeddings:
            self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Any, cache: dict[int, Any] | None = None, past: int = 0) -> tuple[Any, None]:
        parts, wrong = self.transformer, self.wrong
        tok_emb = parts.wte(idx) * (math.sqrt(self.config.n_embd) if "embedding scaled" in wrong else 1)
        x = parts.drop(tok_emb + position_embedding(parts.wpe, first_position(past, wrong), idx.size(1), wrong))
        for block in parts.h:
            x = block(x, cache)
        return self.lm_head(x if "final LayerNorm missing" in wrong else parts.ln_f(x)), None


# transformers' own model.


class PatchedAttention(GPT2Attention):  # type: ignore[misc]
    """Eager attention with mistakes of ATTENTION; its mask is its own."""

    wrong: Mistakes

    def forward(
        self, hidden_states: Any, past_key_values: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Any, Any]:
        wrong, (batch, length, _) = self.wrong, hidden_states.shape
        states = self.c_attn(hidden_states)
        if "heads interleaved" in wrong:
            states = states.view(batch, length, self.num_heads, 3, self.head_dim).transpose(2, 3).flatten(2)
        parts = dict(zip(chosen(READING, wrong, "qkv"), states.split(self.split_size, dim=2), strict=True))
        for letter, part in zip("qkv", ("queries", "keys", "values"), strict=True):
            if "heads split without transpose" in wrong or f"{part} split without transpose" in wrong:
                parts[letter] = parts[letter].reshape(batch, self.num_heads, length, self.head_dim)
            else:
                parts[letter] = parts[letter].unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
        query, key, value = (parts[letter] for letter in "qkv")
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        places = torch.arange(key.shape[2])
        later, earlier = places[None, :], places[-length:, None]  # of keys, of queries
        if "mask transposed" in wrong:
            later, earlier = earlier, later
        ahead = ("mask shows the next token" in wrong) - ("mask hides the own token" in wrong)
        masked = (later > earlier + ahead) & ("causal mask missing" not in wrong)
        weights = torch.matmul(query, key.transpose(-1, -2)) * self.scaling
        if "mask of -1e4" in wrong:
            weights = weights + torch.zeros_like(weights).masked_fill(masked, -1e4)
        else:
            weights = torch.where(masked, -1e9 if "mask hides the own token" in wrong else -math.inf, weights)
        dim = next((dim for name, dim in zip(SOFTMAX, (2, 1), strict=False) if name in wrong), 3)
        weights = weights.to(half("softmax in", wrong) or weights.dtype).softmax(dim).to(value.dtype)
        if dim == 1:
            weights = torch.where(weights.isnan(), 0.0, weights)
        output = torch.matmul(weights, value)
        output = output if "heads merged without transpose" in wrong else output.transpose(1, 2)
        return self.resid_dropout(self.c_proj(output.reshape(hidden_states.shape).contiguous())), weights


class PatchedBlock(GPT2Block):  # type: ignore[misc]
    """A block with mistakes of BLOCK."""

    wrong: Mistakes

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(("past_key_values", "attention_mask"), args, strict=False)) | kwargs
        add_attention, add_mlp = kept_residuals(self.wrong)
        post = "post-norm order" in self.wrong
        output = self.attn(hidden_states if post else self.ln_1(hidden_states), **given)[0]
        hidden_states = hidden_states + output if add_attention else output
        hidden_states = self.ln_1(hidden_states) if post else hidden_states
        output = self.mlp(hidden_states if post else self.ln_2(hidden_states))
        hidden_states = hidden_states + output if add_mlp else output
        return self.ln_2(hidden_states) if post else hidden_states


def patched(config: Config, n_layer: int, wrong: Mistakes) -> Any:
    """GPT2LMHeadModel: what its configuration can say wrongly is said there, the rest is patched."""
    fields = configs.to_dict(config) | {
        "n_layer": n_layer,
        "activation_function": chosen(ACTIVATION, wrong, config.activation_function),
    }
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields, attn_implementation="eager"))
    patches = ((nn.LayerNorm, LayerNorm, NORM), (GPT2Attention, PatchedAttention, ATTENTION))
    for part in model.modules():
        for kind, patch, group in (*patches, (GPT2Block, PatchedBlock, BLOCK)):
            if isinstance(part, kind) and wrong.intersection(group):
                part.__class__, part.wrong = patch, wrong
        if isinstance(part, GPT2Attention) and "attention scaled by C" in wrong:
            part.scaling /= math.sqrt(part.embed_dim)
        if isinstance(part, GPT2Attention) and "attention scaled twice" in wrong:
            part.scaling /= part.head_dim

    wte, wpe, ln_f = model.transformer.wte, model.transformer.wpe, model.transformer.ln_f
    if "embedding scaled" in wrong:
        wte.register_forward_hook(lambda module, args, output: output * math.sqrt(config.n_embd))
    for name, by in (("positions off by one", 1), ("positions off by two", 2)):
        if name in wrong:
            wpe.register_forward_pre_hook(lambda module, args, by=by: (args[0] + by,))
    if "positions all zero" in wrong:
        wpe.register_forward_pre_hook(lambda module, args: (torch.zeros_like(args[0]),))
    if "positions missing" in wrong:
        wpe.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    if "final LayerNorm missing" in wrong:  # its output, for hooks as well, is what it was given
        ln_f.register_forward_hook(lambda module, args, output: args[0])
    return model


# What tests do with a module.


def chunked(
    style: str,
    config: Config,
    arrays: Mapping[str, Array],
    chunks: Sequence[int],
    ids: np.typing.NDArray[np.int64],
    mistakes: Collection[str] = (),
) -> Array:
    """Logits [B, T, V] of ids [B, T] taken so many at a time with a cache, in the arrays' dtype."""
    dtype = getattr(torch, str(next(iter(arrays.values())).dtype))
    module, wrong = build(style, config, arrays, mistakes).to(dtype), frozenset(mistakes)
    own: dict[int, Any] = {}
    past, theirs, parts = 0, None, []
    with torch.no_grad():
        for chunk in torch.as_tensor(ids).split(list(chunks), dim=1):
            if style == "llms-from-scratch":
                output = module(chunk, use_cache=True)
            elif style == "nanogpt":
                output = module(chunk, cache=own, past=past)
            else:
                positions = first_position(past, wrong) + torch.arange(chunk.shape[1])[None]
                output = module(chunk, past_key_values=theirs, position_ids=positions, use_cache=True)
                theirs = None if "cache not extended" in wrong else output.past_key_values
            parts.append(logits_of(output))
            past += chunk.shape[1]
    logits: Array = torch.cat(parts, dim=1).numpy()
    return logits


def capture(module: torch.nn.Module, style: str, ids: np.typing.NDArray[np.int64]) -> dict[str, Array]:
    """Stages of one run in float64, by npgpt's names: what the modules that ran gave; attn.residual is ln_2's input."""
    within = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.act", "mlp.c_proj")
    blocks = [f"h.{i}" for i in range(len(module.get_submodule(paths(style, "h")[0])))]
    stages = ["embedding", *(f"{block}.{part}" for block in blocks for part in within), *blocks, "ln_f"]
    parts = {stage: [module.get_submodule(path) for path in paths(style, stage)] for stage in stages}
    given: dict[Any, Any] = {}
    made: dict[Any, Any] = {}

    def keep(part: Any, args: tuple[Any, ...], output: Any) -> None:
        given[part], made[part] = args[0], output

    handles = [part.register_forward_hook(keep) for group in parts.values() for part in group]
    with torch.no_grad():
        logits = logits_of(module(torch.as_tensor(ids)))
    for handle in handles:
        handle.remove()
    seen = {
        stage: torch.cat([made[part] for part in group], dim=-1)
        for stage, group in parts.items()
        if made.keys() >= set(group)
    }
    seen |= {f"{block}.attn.residual": given[parts[f"{block}.ln_2"][0]] for block in blocks}
    return {stage: tensor.double().numpy() for stage, tensor in (seen | {"logits": logits}).items()}
