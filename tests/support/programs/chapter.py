"""In the manner of LLMs-from-scratch, chapter 4: a dictionary as configuration, weights assigned by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from npgpt.config import Config
from npgpt.parameters import Array

ROUNDS = "float32"


class LayerNorm(nn.Module):  # type: ignore[misc]
    def __init__(self, emb_dim: int) -> None:
        super().__init__()
        self.eps = 1e-5
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x: Any) -> Any:
        mean = x.mean(dim=-1, keepdim=True)
        var = x.var(dim=-1, keepdim=True, unbiased=False)
        norm_x = (x - mean) / torch.sqrt(var + self.eps)
        return self.scale * norm_x + self.shift


class GELU(nn.Module):  # type: ignore[misc]
    def forward(self, x: Any) -> Any:
        inner = torch.sqrt(torch.tensor(2.0 / torch.pi)) * (x + 0.044715 * torch.pow(x, 3))
        return 0.5 * x * (1 + torch.tanh(inner))


class FeedForward(nn.Module):  # type: ignore[misc]
    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        up, down = nn.Linear(cfg["emb_dim"], cfg["inner"]), nn.Linear(cfg["inner"], cfg["emb_dim"])
        self.layers = nn.Sequential(up, GELU(), down)

    def forward(self, x: Any) -> Any:
        return self.layers(x)


class MultiHeadAttention(nn.Module):  # type: ignore[misc]
    def __init__(self, d_in: int, d_out: int, context_length: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.d_out, self.num_heads, self.head_dim = d_out, num_heads, d_out // num_heads
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)
        self.register_buffer("mask", torch.triu(torch.ones(context_length, context_length), diagonal=1))

    def forward(self, x: Any) -> Any:
        b, num_tokens, _ = x.shape
        keys = self.W_key(x)
        queries = self.W_query(x)
        values = self.W_value(x)
        keys = keys.view(b, num_tokens, self.num_heads, self.head_dim).transpose(1, 2)
        values = values.view(b, num_tokens, self.num_heads, self.head_dim).transpose(1, 2)
        queries = queries.view(b, num_tokens, self.num_heads, self.head_dim).transpose(1, 2)
        attn_scores = queries @ keys.transpose(2, 3)
        attn_scores.masked_fill_(self.mask.bool()[:num_tokens, :num_tokens], -torch.inf)
        attn_weights = torch.softmax(attn_scores / keys.shape[-1] ** 0.5, dim=-1)
        context_vec = (attn_weights @ values).transpose(1, 2)
        return self.out_proj(context_vec.contiguous().view(b, num_tokens, self.d_out))


class TransformerBlock(nn.Module):  # type: ignore[misc]
    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        sizes = cfg["emb_dim"], cfg["emb_dim"], cfg["context_length"], cfg["n_heads"], cfg["qkv_bias"]
        self.att, self.ff = MultiHeadAttention(*sizes), FeedForward(cfg)
        self.norm1, self.norm2 = LayerNorm(cfg["emb_dim"]), LayerNorm(cfg["emb_dim"])

    def forward(self, x: Any) -> Any:
        shortcut = x
        x = self.norm1(x)
        x = self.att(x)
        x = x + shortcut
        shortcut = x
        x = self.norm2(x)
        x = self.ff(x)
        return x + shortcut


class GPTModel(nn.Module):  # type: ignore[misc]
    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(0.0)
        self.trf_blocks = nn.Sequential(*[TransformerBlock(cfg) for _ in range(cfg["n_layers"])])
        self.final_norm = LayerNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def forward(self, in_idx: Any) -> Any:
        tok_embeds = self.tok_emb(in_idx)
        pos_embeds = self.pos_emb(torch.arange(in_idx.shape[1]))
        x = self.drop_emb(tok_embeds + pos_embeds)
        x = self.trf_blocks(x)
        x = self.final_norm(x)
        return self.out_head(x)


def assign(left: Any, right: Array) -> Any:
    assert left.shape == right.shape
    return nn.Parameter(torch.tensor(np.ascontiguousarray(right)))


def build(arrays: Mapping[str, Array], config: Config) -> Any:
    """The model with its weights assigned one by one."""
    torch.manual_seed(123)
    cfg = {"emb_dim": config.n_embd, "n_layers": config.n_layer, "n_heads": config.n_head, "qkv_bias": True}
    cfg |= {"vocab_size": config.vocab_size, "context_length": config.n_positions, "inner": config.inner_width}
    gpt = GPTModel(cfg)
    gpt.pos_emb.weight = assign(gpt.pos_emb.weight, arrays["wpe.weight"])
    gpt.tok_emb.weight = assign(gpt.tok_emb.weight, arrays["wte.weight"])
    for layer, block in enumerate(gpt.trf_blocks):
        h = {name.removeprefix(f"h.{layer}."): array for name, array in arrays.items() if f"h.{layer}." in name}
        q_w, k_w, v_w = np.split(h["attn.c_attn.weight"], 3, axis=-1)
        block.att.W_query.weight = assign(block.att.W_query.weight, q_w.T)
        block.att.W_key.weight = assign(block.att.W_key.weight, k_w.T)
        block.att.W_value.weight = assign(block.att.W_value.weight, v_w.T)
        q_b, k_b, v_b = np.split(h["attn.c_attn.bias"], 3, axis=-1)
        block.att.W_query.bias = assign(block.att.W_query.bias, q_b)
        block.att.W_key.bias = assign(block.att.W_key.bias, k_b)
        block.att.W_value.bias = assign(block.att.W_value.bias, v_b)
        block.att.out_proj.weight = assign(block.att.out_proj.weight, h["attn.c_proj.weight"].T)
        block.att.out_proj.bias = assign(block.att.out_proj.bias, h["attn.c_proj.bias"])
        block.ff.layers[0].weight = assign(block.ff.layers[0].weight, h["mlp.c_fc.weight"].T)
        block.ff.layers[0].bias = assign(block.ff.layers[0].bias, h["mlp.c_fc.bias"])
        block.ff.layers[2].weight = assign(block.ff.layers[2].weight, h["mlp.c_proj.weight"].T)
        block.ff.layers[2].bias = assign(block.ff.layers[2].bias, h["mlp.c_proj.bias"])
        for norm, name in ((block.norm1, "ln_1"), (block.norm2, "ln_2")):
            norm.scale = assign(norm.scale, h[f"{name}.weight"])
            norm.shift = assign(norm.shift, h[f"{name}.bias"])
    gpt.final_norm.scale = assign(gpt.final_norm.scale, arrays["ln_f.weight"])
    gpt.final_norm.shift = assign(gpt.final_norm.shift, arrays["ln_f.bias"])
    gpt.out_head.weight = assign(gpt.out_head.weight, arrays["wte.weight"])
    return gpt.eval()
