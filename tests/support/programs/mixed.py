"""In the manner of training in mixed precision: float32 weights, matrix products under autocast in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from npgpt.config import Config
from npgpt.parameters import Array

ROUNDS = "bfloat16"


def linear(w: Mapping[str, Any], name: str, x: Any) -> Any:
    return F.linear(x, w[f"{name}.weight"].T, w[f"{name}.bias"])


def norm(w: Mapping[str, Any], name: str, x: Any) -> Any:
    return F.layer_norm(x.float(), x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)


def attention(w: Mapping[str, Any], name: str, x: Any, n_head: int) -> Any:
    _, T, C = x.shape
    q, k, v = linear(w, f"{name}.c_attn", x).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (n_head, C // n_head)).transpose(1, 2) for part in (q, k, v))
    scores = (q @ k.mT).float() * (C // n_head) ** -0.5
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    y = scores.softmax(dim=-1) @ v
    return linear(w, f"{name}.c_proj", y.transpose(1, 2).flatten(2))


def block(w: Mapping[str, Any], name: str, x: Any, n_head: int) -> Any:
    x = x + attention(w, f"{name}.attn", norm(w, f"{name}.ln_1", x), n_head)
    up = linear(w, f"{name}.mlp.c_fc", norm(w, f"{name}.ln_2", x))
    return x + linear(w, f"{name}.mlp.c_proj", F.gelu(up, approximate="tanh"))


def run(arrays: Mapping[str, Array], config: Config, ids: NDArray[Any]) -> dict[str, Any]:
    """Logits, as bfloat16 gives them, and the stream."""
    w = {name: torch.tensor(array) for name, array in arrays.items()}
    seen: dict[str, Any] = {}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        x = w["wte.weight"][torch.tensor(ids)] + w["wpe.weight"][: ids.shape[1]]
        seen["embedding"] = x
        for layer in range(config.n_layer):
            x = block(w, f"h.{layer}", x, config.n_head)
            seen[f"h.{layer}"] = x
        x = norm(w, "ln_f", x)
        logits = x @ w["wte.weight"].T
    return {name: np.asarray(array.float()) for name, array in (seen | {"ln_f": x, "logits": logits}).items()}
