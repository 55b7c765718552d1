"""A GPT-2 in torch under nanoGPT's names, written from their description: a writer of such checkpoints for the tests.

Two programs share the names. nanoGPT: the exact (erf) GELU, biases or none, an output head that is wte itself, a mask
buffer only where attention is written out. minGPT: the tanh form, biases, an output head of its own, always the buffer.
torch.nn.Linear stores [out, in].
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from npgpt import parameters
from npgpt.config import Config
from npgpt.parameters import Array

LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # the ends of the names of [out, in] matrices


class LayerNorm(torch.nn.Module):  # type: ignore[misc]
    """Normalisation over the last axis, with a bias or without."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))
        self.bias = torch.nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Any) -> Any:
        """x [..., C] → [..., C]."""
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(torch.nn.Module):  # type: ignore[misc]
    """Causal self-attention: written out over a mask buffer, or torch's own."""

    def __init__(self, config: Config, bias: bool, mask: bool) -> None:
        super().__init__()
        C, N = config.n_embd, config.n_positions
        self.n_head = config.n_head
        self.c_attn = torch.nn.Linear(C, 3 * C, bias=bias)
        self.c_proj = torch.nn.Linear(C, C, bias=bias)
        if mask:
            self.register_buffer("bias", torch.tril(torch.ones(N, N)).view(1, 1, N, N))

    def forward(self, x: Any) -> Any:
        """x [B, T, C] → [B, T, C]."""
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(C, dim=-1)
        )  # [B, H, T, D]
        if hasattr(self, "bias"):
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            heads = scores.masked_fill(self.bias[:, :, :T, :T] == 0, -math.inf).softmax(dim=-1) @ v
        else:
            heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(heads.transpose(1, 2).reshape(B, T, C))


class MLP(torch.nn.Module):  # type: ignore[misc]
    """Up, GELU in one of its forms ("none": erf, or "tanh"), down."""

    def __init__(self, config: Config, bias: bool, gelu: str) -> None:
        super().__init__()
        self.gelu = gelu
        self.c_fc = torch.nn.Linear(config.n_embd, 4 * config.n_embd, bias=bias)
        self.c_proj = torch.nn.Linear(4 * config.n_embd, config.n_embd, bias=bias)

    def forward(self, x: Any) -> Any:
        """x [B, T, C] → [B, T, C]."""
        return self.c_proj(functional.gelu(self.c_fc(x), approximate=self.gelu))


class Block(torch.nn.Module):  # type: ignore[misc]
    """Attention and MLP, each reads a normalised copy and adds to the stream."""

    def __init__(self, config: Config, bias: bool, mask: bool, gelu: str) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias)
        self.attn = Attention(config, bias, mask)
        self.ln_2 = LayerNorm(config.n_embd, bias)
        self.mlp = MLP(config, bias, gelu)

    def forward(self, x: Any) -> Any:
        """x [B, T, C] → [B, T, C]."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(torch.nn.Module):  # type: ignore[misc]
    """nanoGPT; with mingpt, minGPT."""

    def __init__(self, config: Config, *, bias: bool = True, mask: bool = False, mingpt: bool = False) -> None:
        super().__init__()
        C = config.n_embd
        bias, mask, gelu = bias or mingpt, mask or mingpt, "tanh" if mingpt else "none"
        self.transformer = torch.nn.ModuleDict(
            {
                "wte": torch.nn.Embedding(config.vocab_size, C),
                "wpe": torch.nn.Embedding(config.n_positions, C),
                "drop": torch.nn.Dropout(0.1),
                "h": torch.nn.ModuleList(Block(config, bias, mask, gelu) for _ in range(config.n_layer)),
                "ln_f": LayerNorm(C, bias),
            }
        )
        self.lm_head = torch.nn.Linear(C, config.vocab_size, bias=False)
        if not mingpt:
            self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, ids: Any) -> Any:
        """Logits [B, T, V] of ids [B, T]."""
        parts = self.transformer
        x = parts["drop"](parts["wte"](ids) + parts["wpe"](torch.arange(ids.shape[1])))
        for block in parts["h"]:
            x = block(x)
        return self.lm_head(parts["ln_f"](x))


def filled(config: Config, arrays: dict[str, Array], **options: bool) -> Any:
    """A GPT that holds these weights, by canonical names, in evaluation; options are GPT's."""
    model = GPT(config, **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a shared head is met once, as wte
            array = arrays[name.removeprefix("transformer.")]
            parameter.copy_(torch.from_numpy(np.array(array.T if name.endswith(LINEAR) else array)))
    return model


def canonical(config: Config, model: Any) -> dict[str, Array]:
    """The weights of a GPT by canonical names; zeros for the biases that it has not."""
    held = {
        name.removeprefix("transformer."): (parameter.T if name.endswith(LINEAR) else parameter).detach().numpy()
        for name, parameter in model.named_parameters()
    }
    return {
        name: held[name] if name in held or not name.endswith(".bias") else np.zeros(shape, np.float32)
        for name, shape in parameters.schema(config).items()
    }


def model_args(config: Config, bias: bool) -> dict[str, Any]:
    """What nanoGPT's train.py keeps of the configuration."""
    sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    return sizes | {"block_size": config.n_positions, "bias": bias, "vocab_size": config.vocab_size, "dropout": 0.0}


def checkpoint(model: Any, config: Config, bias: bool) -> dict[str, Any]:
    """The dictionary that nanoGPT's train.py saves, after one step of AdamW, which changes the model."""
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
    """One step of training on random ids; the loss, a tensor without dimensions."""
    ids = torch.from_numpy(np.random.default_rng(7).integers(0, config.vocab_size, (2, 9)))
    logits = getattr(model, "_orig_mod", model)(ids[:, :-1])  # without compiling
    loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss
