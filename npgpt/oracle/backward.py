"""The textbook's backward pass: formulas of the loss and its gradients, read with those of textbook.py.

"d.attn.q" is the gradient of the loss with respect to the stage attn.q, and "d.mlp.c_fc.weight" that with respect to
the parameter, each of the same shape. "d." is that of the block's output, "d.input" that of its input. Written apart
from gradients.py, which it verifies: matrix calculus by hand, one line per formula.

Shapes as in textbook.py; n is the number of targets that count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..erf import erf
from ..parameters import Array, schema
from .arithmetic import once

if TYPE_CHECKING:
    from ..config import Config
    from .textbook import Formula, Scope

IGNORED = -100  # a target that does not count


def gelu_derivative(x: Array, cubic: float = 0.044715) -> Array:
    """Return the derivative of GELU in its tanh form: with t = tanh(u), ½ (1 + t) + ½ x (1 − t²) u′."""
    root = math.sqrt(2 / math.pi)
    t = np.tanh((x * x * x * cubic + x) * root)
    slope = (x * x * (3 * cubic) + 1) * root
    return (t + 1) * 0.5 + x * 0.5 * (1 - t * t) * slope


def gelu_erf_derivative(x: Array) -> Array:
    """Return the derivative of GELU in its exact form: Φ(x) + x φ(x)."""
    density = np.exp(x * x * -0.5) / math.sqrt(2 * math.pi)
    return (once(erf, x * math.sqrt(0.5)) + 1) * 0.5 + x * density


def softmax_backward(dy: Array, y: Array) -> Array:
    """Return the gradient of scores from that of their softmax y: y (dy − Σ dy y)."""
    return y * (dy - (dy * y).sum(axis=-1, keepdims=True))


def standardised(x: Array, epsilon: float) -> tuple[Array, Array]:
    """Return x as LayerNorm normalises it, before the gain, and the standard deviation that it is divided by."""
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + epsilon)
    return centred / deviation, deviation


def layer_norm_backward(dy: Array, x: Array, weight: Array, epsilon: float) -> Array:
    """Return the gradient of LayerNorm's input: (g − mean(g) − n mean(g n)) / σ, with n the normalised x, g = dy w."""
    n, deviation = standardised(x, epsilon)
    g = dy * weight
    return (g - g.mean(axis=-1, keepdims=True) - n * (g * n).mean(axis=-1, keepdims=True)) / deviation


def lines(x: Array) -> Array:
    """Return x as one line for each token of the batch: [B, T, C] → [B T, C]."""
    return x.reshape(-1, x.shape[-1])


def total(dy: Array) -> Array:
    """Return the sum over all tokens: [B, T, C] → [C]."""
    return lines(dy).sum(axis=0)


def outer(x: Array, dy: Array) -> Array:
    """Return the sum over all tokens of the outer products of x and dy: [in, out]."""
    return lines(x).T @ lines(dy)


def scattered(dy: Array, rows: NDArray[np.integer[Any]], count: int) -> Array:
    """Return [count, C], each row the sum of dy [B, T, C] over the places at which `rows` [B, T] names it."""

    def summed(dy: Array) -> Array:
        found = np.zeros((count, dy.shape[-1]), dy.dtype)
        np.add.at(found, rows, dy)
        return found

    return once(summed, dy)


def one_hot(s: Scope) -> Array:
    """Return 1 at each position's target and 0 elsewhere, [B, T, V]. Ignored positions have no 1."""
    found = np.zeros(s["logits"].shape, s["logits"].dtype)
    rows, positions = s["counting"].nonzero()
    found[rows, positions, s["targets"][rows, positions]] = 1
    return found


def share(s: Scope) -> Array:
    """Return the share of each position in the loss, [B, T]: 1 / n where the target counts, else 0."""
    return (s["counting"] / max(1, s["counting"].sum())).astype(s["logits"].dtype)


def in_heads(x: Array, n_head: int) -> Array:
    """Undo the merging of heads: [B, T, C] → [B, H, T, D]."""
    return x.reshape(*x.shape[:2], n_head, -1).swapaxes(1, 2)


def in_channels(x: Array) -> Array:
    """Undo the splitting of heads: [B, H, T, D] → [B, T, C]."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def through(name: str, source: str = "") -> Formula:
    """Return the formula of the gradient of a linear map's input. source: the stage that is its output, if not name."""
    return lambda s: s[f"d.{source or name}"] @ s[f"{name}.weight"].T


def through_norm(name: str, x: str) -> Callable[[Scope], Array]:
    """Return the formula of what comes back through a LayerNorm of the stage x."""
    return lambda s: s["d.layer_norm"](s[f"d.{name}"], s[x], s[f"{name}.weight"], s["epsilon"])


def of_linear(name: str, x: str) -> dict[str, Formula]:
    """Return the formulas of the gradients of a linear map's parameters; it reads the stage x."""
    return {
        f"d.{name}.weight": lambda s: outer(s[x], s[f"d.{name}"]),
        f"d.{name}.bias": lambda s: total(s[f"d.{name}"]),
    }


def of_norm(name: str, x: str) -> dict[str, Formula]:
    """Return the formulas of the gradients of a LayerNorm's parameters; it reads the stage x."""
    return {
        f"d.{name}.weight": lambda s: total(s[f"d.{name}"] * standardised(s[x], s["epsilon"])[0]),
        f"d.{name}.bias": lambda s: total(s[f"d.{name}"]),
    }


back_ln_1, back_ln_2 = through_norm("ln_1", "input"), through_norm("ln_2", "attn.residual")
BLOCK_BACKWARD: dict[str, Formula] = {  # in the order of computation
    "d.": lambda s: s.run.gradient(s.layer + 1),  # of the block's output
    "d.mlp.c_proj": lambda s: s["d."],
    **of_linear("mlp.c_proj", "mlp.act"),
    "d.mlp.act": through("mlp.c_proj"),
    "d.mlp.c_fc": lambda s: s["d.mlp.act"] * s["d.activation"](s["mlp.c_fc"]),
    **of_linear("mlp.c_fc", "ln_2"),
    "d.ln_2": through("mlp.c_fc"),
    **of_norm("ln_2", "attn.residual"),
    "d.attn.residual": lambda s: s["d."] + back_ln_2(s),
    "d.attn.c_proj": lambda s: s["d.attn.residual"],
    **of_linear("attn.c_proj", "attn.merged"),
    "d.attn.merged": through("attn.c_proj"),
    "d.attn.heads": lambda s: in_heads(s["d.attn.merged"], s.config.n_head),
    "d.attn.weights": lambda s: s["d.attn.heads"] @ s["attn.v"].swapaxes(2, 3),
    "d.attn.scores": lambda s: s["d.softmax"](s["d.attn.weights"], s["attn.weights"]),
    "d.attn.products": lambda s: s["d.attn.scores"] * s["visible"],
    "d.attn.q": lambda s: s["d.attn.products"] @ s["attn.k"] * s["attn.scale"],
    "d.attn.k": lambda s: s["d.attn.products"].swapaxes(2, 3) @ s["attn.q"] * s["attn.scale"],
    "d.attn.v": lambda s: s["attn.weights"].swapaxes(2, 3) @ s["d.attn.heads"],
    "d.attn.query": lambda s: in_channels(s["d.attn.q"]),
    "d.attn.key": lambda s: in_channels(s["d.attn.k"]),
    "d.attn.value": lambda s: in_channels(s["d.attn.v"]),
    "d.attn.thirds": lambda s: [s["d.attn.query"], s["d.attn.key"], s["d.attn.value"]],
    "d.attn.c_attn": lambda s: np.concatenate(s["d.attn.thirds"], axis=-1),
    **of_linear("attn.c_attn", "ln_1"),
    "d.ln_1": through("attn.c_attn"),
    **of_norm("ln_1", "input"),
    "d.input": lambda s: s["d.attn.residual"] + back_ln_1(s),
}
HEAD: dict[str, Formula] = {  # from the loss to the last block
    "targets": lambda s: s.run.targets,  # [B, T]
    "counting": lambda s: s["targets"] != IGNORED,
    "aim": one_hot,  # [B, T, V], the distribution that is wanted
    "share": share,
    "loss": lambda s: -((s["log_probabilities"] * s["aim"]).sum(axis=-1) * s["share"]).sum().reshape(1),  # [1]
    "d.log_probabilities": lambda s: -s["aim"] * s["share"][..., None],
    "d.logits": lambda s: (np.exp(s["log_probabilities"]) - s["aim"]) * s["share"][..., None],
    "d.unembedded": lambda s: s["d.logits"],
    "d.head.part": lambda s: outer(s["d.unembedded"], s["ln_f"]),  # of the head's weight, [V, C]
    "d.lm_head.weight": lambda s: s["d.head.part"],
    "d.ln_f": lambda s: s["d.unembedded"] @ s["lm_head.weight"],
    **of_norm("ln_f", "last"),
    "d.last": through_norm("ln_f", "last"),
}
EMBEDDED: dict[str, Formula] = {  # from the first block to the embeddings
    "d.embedding": lambda s: s.run.gradient(0),
    "d.wte": lambda s: s["d.embedding"],
    "d.wpe": lambda s: s["d.embedding"].sum(axis=0, keepdims=True),  # [1, T, C]
    "d.wte.part": lambda s: scattered(s["d.wte"], s["token_ids"], s.config.vocab_size),  # without the head's
    "d.wte.weight": lambda s: s["d.wte.part"] + s["d.head.part"] if s.config.tie_word_embeddings else s["d.wte.part"],
    "d.wpe.weight": lambda s: scattered(s["d.wpe"], s["positions"][None], s.config.n_positions),
}


def norm(s: Scope) -> float:
    """Return the root of the sum of squares of all parameters' gradients."""
    right = [s.run.right(f"d.{name}") for name in schema(s.config)]
    return math.sqrt(sum(float(np.square(gradient).sum()) for gradient in right))


MODEL_BACKWARD = HEAD | EMBEDDED
NORM_BACKWARD: dict[str, Formula] = {"d.layer_norm": lambda s: layer_norm_backward}
BLOCK_BACKWARD |= NORM_BACKWARD | {
    "d.softmax": lambda s: softmax_backward,
    "d.activation": lambda s: gelu_erf_derivative if s.config.activation_function == "gelu" else gelu_derivative,
}
MODEL_BACKWARD |= NORM_BACKWARD | {"d.norm": norm}
BACKWARD = {*BLOCK_BACKWARD, *MODEL_BACKWARD}
UNSEEN = {"d.attn.products", "d.attn.thirds", "d.input", *NORM_BACKWARD, "d.softmax", "d.activation"}  # not compared
UNSEEN |= {"targets", "counting", "aim", "share", "d.log_probabilities", "d.unembedded", "d.last"}
UNSEEN |= {"d.head.part", "d.wte.part"}


# What gradients are of, by their names: stages and parameters that formulas of the forward pass read.
OF_BLOCK = {name: name[2:] for name in BLOCK_BACKWARD if name not in (*NORM_BACKWARD, "d.softmax", "d.activation")}
OF_MODEL = {name: name[2:] for name in MODEL_BACKWARD if name.startswith("d.")}
for part in ("d.layer_norm", "d.norm", "d.wte.part", "d.lm_head.weight"):
    del OF_MODEL[part]
OF_MODEL |= {"d.head.part": "lm_head.weight"}


def is_backward(stage: str) -> bool:
    """Return whether this is the loss or a gradient."""
    return stage == "loss" or stage.startswith("d.")


def backward_stages(config: Config) -> list[str]:
    """Return the loss and the gradients that are compared, in the order of computation."""
    unseen = UNSEEN | ({"d.lm_head.weight"} if config.tie_word_embeddings else set())
    blocks = [
        f"d.h.{layer}.{name[2:]}".rstrip(".")
        for layer in reversed(range(config.n_layer))
        for name in BLOCK_BACKWARD
        if name not in unseen
    ]
    head, embedded = ([name for name in table if name not in unseen] for table in (HEAD, EMBEDDED))
    return [*head, *blocks, *embedded]


def is_last(stage: str) -> bool:
    """Return whether this is the loss or a parameter's gradient, from which nothing else is computed."""
    return is_backward(stage) and (stage == "loss" or stage.endswith((".weight", ".bias")))


def is_parameter(stage: str, config: Config) -> bool:
    """Return whether this is the gradient of a parameter."""
    return stage.startswith("d.") and stage[2:] in schema(config)
