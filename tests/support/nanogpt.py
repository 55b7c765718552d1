"""nanoGPT in torch, written from its description, with optional mistakes, and what its train.py saves.

Two programs share the names. nanoGPT: the exact (erf) GELU, biases or none, an output head that is wte itself, a mask
buffer only where attention is written out. minGPT: the tanh form, biases, an output head of its own, always the buffer.
torch.nn.Linear stores [out, in].
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from npgpt import parameters
from npgpt.config import Config
from npgpt.parameters import Array
from tests.support.mistakes import (
    ACTIVATION,
    GELU,
    HEADS,
    NORM,
    READING,
    Mistakes,
    attention_scale,
    chosen,
    first_position,
    half,
    kept_residuals,
    position_embedding,
)

NONE: Mistakes = frozenset()
LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # the ends of the names of [out, in] matrices


class LayerNorm(nn.LayerNorm):  # type: ignore[misc]
    """torch's LayerNorm, written out if a mistake needs it; transformers' is converted to this class."""

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
    """Attention with one projection, over a mask buffer or by torch's own function, with an optional cache."""

    def __init__(self, config: Config, layer: int, wrong: Mistakes, bias: bool, mask: bool) -> None:
        super().__init__()
        self.n_head, self.n_embd, self.layer, self.wrong = config.n_head, config.n_embd, layer, wrong
        self.scale = attention_scale(config, layer, wrong)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=bias)
        N = config.n_positions
        ahead = ("mask shows the next token" in wrong) - ("mask hides the token itself" in wrong)
        seen = torch.ones(N, N) if "causal mask missing" in wrong else torch.tril(torch.ones(N, N), diagonal=ahead)
        if mask:
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

        if not hasattr(self, "bias"):
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
            return self.c_proj(y.transpose(1, 2).reshape(B, T, C))

        S = k.size(2)
        att = (q @ k.transpose(-2, -1)) * self.scale
        hidden = self.bias[:, :, S - T : S, :S] == 0
        if "mask of -1e4" in wrong:
            att = att - 1e4 * hidden.to(att.dtype)
        else:
            att = att.masked_fill(hidden, -1e9 if "mask hides the token itself" in wrong else float("-inf"))
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
    """The MLP: up, activation, down."""

    def __init__(self, config: Config, wrong: Mistakes, bias: bool) -> None:
        super().__init__()
        form = chosen(ACTIVATION, wrong, config.activation_function)
        others = {"gelu": nn.GELU(), "quick_gelu": GELU("quick_gelu"), "relu": nn.ReLU()}
        self.c_fc = nn.Linear(config.n_embd, config.inner_width, bias=bias)
        self.gelu = others.get(form, nn.GELU(approximate="tanh"))
        self.c_proj = nn.Linear(config.inner_width, config.n_embd, bias=bias)

    def forward(self, x: Any) -> Any:
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):  # type: ignore[misc]
    """Attention, then the MLP."""

    def __init__(self, config: Config, layer: int, wrong: Mistakes, bias: bool, mask: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (LayerNorm(config.n_embd, config.layer_norm_epsilon, bias=bias) for _ in range(2))
        self.ln_1.wrong = self.ln_2.wrong = wrong
        self.attn = CausalSelfAttention(config, layer, wrong, bias, mask)
        self.mlp = MLP(config, wrong, bias)
        self.wrong = wrong

    def forward(self, x: Any, cache: dict[int, Any] | None = None) -> Any:
        first, second = kept_residuals(self.wrong)  # True is 1
        if "post-norm order" in self.wrong:
            x = self.ln_1(first * x + self.attn(x, cache))
            return self.ln_2(second * x + self.mlp(x))
        x = first * x + self.attn(self.ln_1(x), cache)
        return second * x + self.mlp(self.ln_2(x))


class GPT(nn.Module):  # type: ignore[misc]
    """The model: ids [B, T] to logits [B, T, V] and None for the loss; with mingpt, minGPT.

    A cache, at first empty, belongs to the caller, who counts the past; it and mistakes of attention need the mask.
    """

    def __init__(
        self, config: Config, wrong: Mistakes = NONE, *, bias: bool = True, mask: bool = False, mingpt: bool = False
    ) -> None:
        super().__init__()
        bias, mask = bias or mingpt, mask or mingpt
        C, N, V = config.n_embd, config.n_positions, config.vocab_size
        self.config = SimpleNamespace(
            n_layer=config.n_layer, n_head=config.n_head, n_embd=C, block_size=N, vocab_size=V, bias=bias, dropout=0.0
        )
        self.wrong = wrong
        parts = {"wte": nn.Embedding(V, C), "wpe": nn.Embedding(N, C), "drop": nn.Dropout(0.0)}
        parts["h"] = nn.ModuleList(Block(config, layer, wrong, bias, mask) for layer in range(config.n_layer))
        parts["ln_f"] = LayerNorm(C, config.layer_norm_epsilon, bias=bias)
        parts["ln_f"].wrong = wrong
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(C, V, bias=False)
        if config.tie_word_embeddings and not mingpt:
            self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Any, cache: dict[int, Any] | None = None, past: int = 0) -> tuple[Any, None]:
        parts, wrong = self.transformer, self.wrong
        tok_emb = parts.wte(idx) * (math.sqrt(self.config.n_embd) if "embedding scaled" in wrong else 1)
        x = parts.drop(tok_emb + position_embedding(parts.wpe, first_position(past, wrong), idx.size(1), wrong))
        for block in parts.h:
            x = block(x, cache)
        return self.lm_head(x if "final LayerNorm missing" in wrong else parts.ln_f(x)), None


def filled(config: Config, arrays: dict[str, Array], **options: Any) -> Any:
    """Return a GPT in evaluation mode with these weights, by canonical names; options are GPT's."""
    """Return a GPT in evaluation mode with these weights, by canonical names; options are GPT's."""
    model = GPT(config, **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a shared head is met once, as wte
            array = arrays[name.removeprefix("transformer.")]
            parameter.copy_(torch.from_numpy(np.array(array.T if name.endswith(LINEAR) else array)))
    return model


def canonical(config: Config, model: Any) -> dict[str, Array]:
    """Return a GPT's weights by canonical names, with zeros for missing biases."""
    held = {
        name.removeprefix("transformer."): (parameter.T if name.endswith(LINEAR) else parameter).detach().numpy()
        for name, parameter in model.named_parameters()
    }
    return {
        name: held[name] if name in held or not name.endswith(".bias") else np.zeros(shape, np.float32)
        for name, shape in parameters.schema(config).items()
    }


def model_args(config: Config, bias: bool) -> dict[str, Any]:
    """Return the configuration that nanoGPT's train.py saves."""
    sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    return sizes | {"block_size": config.n_positions, "bias": bias, "vocab_size": config.vocab_size, "dropout": 0.0}


def checkpoint(model: Any, config: Config, bias: bool) -> dict[str, Any]:
    """Return the dictionary that nanoGPT's train.py saves, after one step of AdamW, which changes the model."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    loss = step(model, optimizer, config)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": model_args(config, bias),
        "iter_num": 1,
        "best_val_loss": loss.detach(),
        "config": model_args(config, bias) | {"out_dir": "out", "learning_rate": 6e-4, "compile": True, "seed": None},
    }


def step(model: Any, optimizer: Any, config: Config) -> Any:
    """Run one training step on random ids and return the loss, a scalar tensor."""
    ids = torch.from_numpy(np.random.default_rng(7).integers(0, config.vocab_size, (2, 9)))
    output = getattr(model, "_orig_mod", model)(ids[:, :-1])  # without compiling
    logits = output[0] if isinstance(output, tuple) else output
    loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss
