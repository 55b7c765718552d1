"""Three GPT-2s in torch, as users write them, that can be given mistakes for the oracle to name.

"llms-from-scratch" is written here in the manner of the book, "nanogpt" in tests/support/nanogpt.py, each with an
attention and a block of its own; "transformers" is the real GPT2LMHeadModel, patched. Mistakes go by their names
(tests/support/mistakes.py) and come in any combination.

Shapes as in npgpt.model. Blocks are counted as they stand in the module: where a layer is missing or run twice it has
one block less or more, and names of stages and a scale by layer follow the place, not the layer's number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block

from npgpt.checkpoints import configs
from npgpt.config import Config
from npgpt.parameters import Array, count_blocks
from tests.support.mistakes import (
    ACTIVATION,
    AROUND,
    ATTENTION,
    BLOCK,
    CACHE,
    GELU,
    NORM,
    READING,
    SOFTMAX,
    Mistakes,
    attention_scale,
    chosen,
    first_position,
    half,
    kept_residuals,
    loaded,
    logits_of,
    misread,
    names,
    position_embedding,
    wrap,
)
from tests.support.nanogpt import GPT, LayerNorm

STYLES = ("llms-from-scratch", "nanogpt", "transformers")


def build(style: str, config: Config, arrays: Mapping[str, Array], mistakes: Collection[str] = ()) -> torch.nn.Module:
    """Return the module in float32 and evaluation mode; its first positional argument is ids [B, T].

    arrays: by canonical names. Mistakes of CACHE show in chunked alone. Raises ValueError for an unknown name.
    """
    if unknown := {style}.difference(STYLES) or set(mistakes).difference(names(config), CACHE):
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
    wrong = frozenset(mistakes)
    tensors = loaded(config, arrays, wrong)
    config = replace(misread(config, wrong), n_layer=count_blocks(tensors))
    model = BUILDERS[style](config, wrong)
    fill(model, style, tensors)
    if wrong.intersection(AROUND):
        wrap(model, config, wrong)
    return model.eval()


OUTER = {"embedding": "drop_emb", "wte": "tok_emb", "wpe": "pos_emb", "h": "trf_blocks", "lm_head": "out_head"}
NORMS = {"ln_1": "norm1", "ln_2": "norm2", "ln_f": "final_norm"}
LINEAR = {"attn.c_attn": "att.W_query att.W_key att.W_value", "attn.c_proj": "att.out_proj"}
LAYERS = {"mlp.c_fc": "ff.layers.0", "mlp.act": "ff.layers.1", "mlp.c_proj": "ff.layers.2"}
BOOK = OUTER | NORMS | LINEAR | LAYERS


def paths(style: str, stage: str) -> list[str]:
    """Return the modules that together form npgpt's stage or parameter of that name."""
    if style == "llms-from-scratch":
        block, part = re.findall(r"^(h\.\d+\.?)?(.*)", stage)[0]
        return [block.replace("h.", "trf_blocks.") + name for name in BOOK.get(part, part).split(" ")]
    stage = stage.replace(".act", ".gelu") if style == "nanogpt" else stage
    return [stage if stage == "lm_head" else f"transformer.{stage.replace('embedding', 'drop')}"]


def fill(model: Any, style: str, tensors: dict[str, Any]) -> None:
    """Fill every tensor; nn.Linear stores [out, in]."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            stem, kind = name.rsplit(".", 1)
            found = paths(style, stem)
            for path, part in zip(found, tensor.chunk(len(found), dim=-1), strict=True):
                left = model.get_submodule(path)
                kind = {"weight": "scale", "bias": "shift"}[kind] if isinstance(left, BookLayerNorm) else kind
                turned = isinstance(left, nn.Linear) and stem != "lm_head"
                getattr(left, kind).copy_(part.t() if turned else part)


# In the manner of LLMs-from-scratch. Modules without a word about shapes are [B, T, C] → [B, T, C].


class BookLayerNorm(nn.Module):  # type: ignore[misc]
    """LayerNorm written out, with parameters scale and shift."""

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


class FeedForward(nn.Module):  # type: ignore[misc]
    """The MLP: up, GELU, down."""

    def __init__(self, config: Config, wrong: Mistakes) -> None:
        super().__init__()
        up, down = nn.Linear(config.n_embd, config.inner_width), nn.Linear(config.inner_width, config.n_embd)
        self.layers = nn.Sequential(up, GELU(chosen(ACTIVATION, wrong, config.activation_function)), down)

    def forward(self, x: Any) -> Any:
        return self.layers(x)


class MultiHeadAttention(nn.Module):  # type: ignore[misc]
    """Attention with three projections, a mask of hidden positions, and an internal cache."""

    def __init__(self, config: Config, layer: int, wrong: Mistakes) -> None:
        super().__init__()
        self.d_out, self.num_heads, self.head_dim = config.n_embd, config.n_head, config.head_width
        self.scale, self.wrong = attention_scale(config, layer, wrong), wrong
        self.W_query = nn.Linear(self.d_out, self.d_out)
        self.W_key = nn.Linear(self.d_out, self.d_out)
        self.W_value = nn.Linear(self.d_out, self.d_out)
        self.out_proj = nn.Linear(self.d_out, self.d_out)
        diagonal = 1 + ("mask shows the next token" in wrong) - ("mask hides the token itself" in wrong)
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
            attn_scores.masked_fill_(mask_bool, -1e9 if "mask hides the token itself" in self.wrong else -torch.inf)
        dim = 2 if "softmax over queries" in self.wrong else 1 if "softmax over heads" in self.wrong else 3
        attn_weights = torch.softmax(attn_scores, dim=dim, dtype=half("softmax in", self.wrong)).to(x.dtype)
        if dim == 1:
            attn_weights = attn_weights.nan_to_num(0.0)  # all heads are masked there
        context_vec = attn_weights @ values
        if "heads merged without transpose" not in self.wrong:
            context_vec = context_vec.transpose(1, 2)
        return self.out_proj(context_vec.reshape(b, num_tokens, self.d_out))


class TransformerBlock(nn.Module):  # type: ignore[misc]
    """A block: norm, layer and shortcut, twice."""

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
    """The model: ids [B, T] to logits [B, T, V]; with use_cache it continues from the cached tokens."""

    def __init__(self, config: Config, wrong: Mistakes) -> None:
        super().__init__()
        self.emb_dim, self.wrong, self.current_pos = config.n_embd, wrong, 0
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_emb = nn.Embedding(config.n_positions, config.n_embd)
        self.drop_emb = nn.Dropout(0.0)
        self.trf_blocks = nn.ModuleList(TransformerBlock(config, layer, wrong) for layer in range(config.n_layer))
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


# transformers' own model.


class PatchedAttention(GPT2Attention):  # type: ignore[misc]
    """Eager attention with mistakes of ATTENTION and its own mask."""

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
        ahead = ("mask shows the next token" in wrong) - ("mask hides the token itself" in wrong)
        masked = (later > earlier + ahead) & ("causal mask missing" not in wrong)
        weights = torch.matmul(query, key.transpose(-1, -2)) * self.scaling
        if "mask of -1e4" in wrong:
            weights = weights + torch.zeros_like(weights).masked_fill(masked, -1e4)
        else:
            weights = torch.where(masked, -1e9 if "mask hides the token itself" in wrong else -math.inf, weights)
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


def patched(config: Config, wrong: Mistakes) -> Any:
    """Return GPT2LMHeadModel with mistakes, through its configuration where possible and patched otherwise."""
    activation = chosen(ACTIVATION, wrong, config.activation_function)
    fields = configs.to_dict(config) | {"activation_function": activation}
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


BUILDERS: dict[str, Callable[[Config, Mistakes], Any]] = {
    "llms-from-scratch": GPTModel,
    "nanogpt": lambda config, wrong: GPT(config, wrong, mask=True),
    "transformers": patched,
}


# What tests do with a module.


def chunked(
    style: str,
    config: Config,
    arrays: Mapping[str, Array],
    chunks: Sequence[int],
    ids: np.typing.NDArray[np.int64],
    mistakes: Collection[str] = (),
) -> Array:
    """Return logits [B, T, V] of ids [B, T], run in chunks of the given sizes with a cache, in the arrays' dtype."""
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
    """Return one run's float64 stages, by npgpt's names, from modules' outputs; attn.residual is ln_2's input."""
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
