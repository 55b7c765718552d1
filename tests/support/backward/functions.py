"""A PyTorch GPT-2 under nanoGPT's names, whose every step is an autograd function with a backward pass by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from npgpt.config import Config
from npgpt.parameters import Array

TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def wide(x: Any) -> Any:
    """In float32, if x is coarser: a function computes in float32 and rounds what it returns."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class LayerNormFunction(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, eps: float) -> Any:
        mean = wide(x).mean(-1, keepdim=True)
        var = wide(x).var(-1, keepdim=True, unbiased=False)
        rstd = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, rstd)
        return ((wide(x) - mean) * rstd * wide(weight) + wide(bias)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        dy, N = wide(grad_output), x.shape[-1]
        x_hat = (wide(x) - mean) * rstd
        wdy = wide(weight) * dy
        c1 = (x_hat * wdy).sum(-1, keepdim=True) / N
        c2 = wdy.sum(-1, keepdim=True) / N
        dx = (wdy - (x_hat * c1 + c2)) * rstd
        dw = (dy * x_hat).sum(dim=(0, 1))
        db = dy.sum(dim=(0, 1))
        return dx.to(x.dtype), dw.to(weight.dtype), db.to(weight.dtype), None


class GELUFunction(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        z = wide(x)
        return (0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> Any:
        (x,) = ctx.saved_tensors
        z, k = wide(x), math.sqrt(2 / math.pi)
        t = torch.tanh(k * (z + 0.044715 * z**3))
        du = k * (1 + 3 * 0.044715 * z**2)
        derivative = 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * du
        return (wide(grad_output) * derivative).to(x.dtype)


class LinearFunction(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, input: Any, weight: Any, bias: Any) -> Any:
        ctx.save_for_backward(input, weight)
        output = input @ weight.t()
        return output if bias is None else output + bias

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> Any:
        input, weight = ctx.saved_tensors
        grad_input = grad_output @ weight
        grad_weight = grad_output.flatten(0, 1).t() @ input.flatten(0, 1)
        grad_bias = grad_output.sum(dim=(0, 1)) if ctx.needs_input_grad[2] else None
        return grad_input, grad_weight, grad_bias


class AttentionFunction(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
        scale = 1 / math.sqrt(q.size(-1))
        mask = torch.ones(q.size(-2), q.size(-2), dtype=torch.bool).tril()
        scores = (wide(q) @ wide(k).mT * scale).masked_fill(~mask, float("-inf"))
        p = scores.softmax(-1)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale = scale
        return (p @ wide(v)).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> Any:
        q, k, v, p = (wide(x) for x in ctx.saved_tensors)
        do = wide(grad_output)
        dv = p.mT @ do
        dp = do @ v.mT
        ds = p * (dp - (dp * p).sum(-1, keepdim=True))
        dq = ds @ k * ctx.scale
        dk = ds.mT @ q * ctx.scale
        return dq.to(grad_output.dtype), dk.to(grad_output.dtype), dv.to(grad_output.dtype)


class EmbeddingFunction(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, weight: Any, idx: Any) -> Any:
        ctx.save_for_backward(weight, idx)
        return weight[idx]

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> Any:
        weight, idx = ctx.saved_tensors
        grad = torch.zeros_like(wide(weight))
        grad.index_add_(0, idx.flatten(), wide(grad_output).flatten(0, -2))
        return grad.to(weight.dtype), None


class ResidualFunction(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Any, branch: Any) -> Any:
        return x + branch

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> Any:
        return grad_output, grad_output


class CrossEntropyFunction(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, logits: Any, targets: Any, ignore_index: int) -> Any:
        z = wide(logits)
        lse = z.logsumexp(-1)
        valid = targets != ignore_index
        picked = z.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        nll = (lse - picked) * valid
        n = valid.sum()
        ctx.save_for_backward(logits, targets, valid, n)
        return nll.sum() / n

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> Any:
        logits, targets, valid, n = ctx.saved_tensors
        grad = wide(logits).softmax(-1)
        one_hot = nn.functional.one_hot(targets.clamp(min=0), logits.size(-1))
        grad = grad - one_hot
        grad = grad * valid.unsqueeze(-1)
        grad = grad / n
        return (grad * grad_output).to(logits.dtype), None, None


class LayerNorm(nn.Module):  # type: ignore[misc]
    def __init__(self, ndim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(ndim)), nn.Parameter(torch.zeros(ndim)), eps

    def forward(self, x: Any) -> Any:
        return LayerNormFunction.apply(x, self.weight, self.bias, self.eps)


class Linear(nn.Linear):  # type: ignore[misc]
    def forward(self, x: Any) -> Any:
        return LinearFunction.apply(x, self.weight, self.bias)


class Embedding(nn.Embedding):  # type: ignore[misc]
    def forward(self, idx: Any) -> Any:
        return EmbeddingFunction.apply(self.weight, idx)


class CausalSelfAttention(nn.Module):  # type: ignore[misc]
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.c_attn, self.c_proj = Linear(config.n_embd, 3 * config.n_embd), Linear(config.n_embd, config.n_embd)
        self.n_head, self.n_embd = config.n_head, config.n_embd

    def forward(self, x: Any, keep: Any) -> Any:
        B, T, C = x.size()
        qkv = keep("attn.c_attn", self.c_attn(keep("ln_1", x)))
        q, k, v = qkv.split(self.n_embd, dim=2)
        k = keep("attn.k", k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2))
        q = keep("attn.q", q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2))
        v = keep("attn.v", v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2))
        y = keep("attn.heads", AttentionFunction.apply(q, k, v))
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return keep("attn.c_proj", self.c_proj(y))


class MLP(nn.Module):  # type: ignore[misc]
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.inner_width)
        self.c_proj = Linear(config.inner_width, config.n_embd)

    def forward(self, x: Any, keep: Any) -> Any:
        x = keep("mlp.c_fc", self.c_fc(keep("ln_2", x)))
        x = keep("mlp.act", GELUFunction.apply(x))
        return keep("mlp.c_proj", self.c_proj(x))


class Block(nn.Module):  # type: ignore[misc]
    def __init__(self, config: Config, layer_idx: int) -> None:
        super().__init__()
        self.ln_1, self.attn = LayerNorm(config.n_embd, config.layer_norm_epsilon), CausalSelfAttention(config)
        self.ln_2, self.mlp = LayerNorm(config.n_embd, config.layer_norm_epsilon), MLP(config)
        self.layer_idx = layer_idx

    def forward(self, x: Any, keep: Any) -> Any:
        x = keep("attn.residual", ResidualFunction.apply(x, self.attn(self.ln_1(x), keep)))
        return keep("", ResidualFunction.apply(x, self.mlp(self.ln_2(x), keep)))


class GPT(nn.Module):  # type: ignore[misc]
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": Embedding(config.vocab_size, config.n_embd),
                "wpe": Embedding(config.n_positions, config.n_embd),
                "h": nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
                "ln_f": LayerNorm(config.n_embd, config.layer_norm_epsilon),
            }
        )
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.transformer.wte.weight = self.lm_head.weight
        self.stages: dict[str, Any] = {}

    def keep(self, name: str, x: Any) -> Any:
        if x.requires_grad:
            x.retain_grad()
        self.stages[name.rstrip(".")] = x
        return x

    def forward(self, idx: Any, targets: Any) -> Any:
        pos = torch.arange(idx.size(1))
        tok_emb = self.transformer.wte(idx)
        pos_emb = self.transformer.wpe(pos)
        x = self.keep("embedding", tok_emb + pos_emb)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, lambda name, x, layer=layer: self.keep(f"h.{layer}.{name}", x))
        x = self.keep("ln_f", self.transformer.ln_f(x))
        logits = self.keep("logits", self.lm_head(x))
        loss = CrossEntropyFunction.apply(logits, targets, -100)
        return logits, loss


def build(arrays: Mapping[str, Array], config: Config) -> Any:
    """The model with these weights, of which four kinds are transposed."""
    model = GPT(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            source = arrays.get(name.removeprefix("transformer."), arrays["wte.weight"])
            p.copy_(torch.tensor(source).t() if name.endswith(TURNED) else torch.tensor(source))
    return model


def array(x: Any) -> Array:
    """A tensor as an array: float32 if it is in bfloat16."""
    found: Array = wide(x).detach().numpy()
    return found


def run(
    arrays: Mapping[str, Array], config: Config, ids: NDArray[Any], targets: NDArray[Any], dtype: str = "float32"
) -> dict[str, Any]:
    """The loss, stages, and the gradients of both."""
    model = build(arrays, config).to(getattr(torch, dtype))
    idx, y = torch.tensor(ids), torch.tensor(targets)
    _, loss = model(idx, y)
    loss.backward()
    found = {"loss": array(loss).reshape(1)}
    for name, x in model.stages.items():
        found |= {name: array(x)} | ({f"d.{name}": array(x.grad)} if x.grad is not None else {})
    for name, p in model.named_parameters():
        grad = np.zeros(p.shape, np.float32) if p.grad is None else array(p.grad)
        name = name.removeprefix("transformer.")
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            found[f"d.{name}"] = grad.T if name.endswith(TURNED) else grad
    return found
