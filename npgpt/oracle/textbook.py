"""GPT-2 a second time, as a textbook has it: the whole square, no cache, no blocks, a line for every formula.

It keeps model.py honest, and it is what the catalogue of mistakes alters: every stage is a named formula of other
stages, computed when it is first asked for, so that a mistake is another formula under the same name.

Shapes as in model.py: B rows, T tokens, C n_embd, H n_head, D head width, F inner width, V vocab_size, N n_positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..erf import erf
from ..parameters import Array
from .arithmetic import once

Formula: TypeAlias = "Callable[[Scope], Any]"


def gelu(x: Array, cubic: float = 0.044715, half: float = 0.5, root: float = math.sqrt(2 / math.pi)) -> Array:
    """The tanh form."""
    return x * half * (np.tanh((x * x * x * cubic + x) * root) + 1)


def gelu_erf(x: Array) -> Array:
    """The exact form."""
    return x * 0.5 * (once(erf, x * math.sqrt(0.5)) + 1)


def softmax(x: Array, axis: int = -1) -> Array:
    """exp(x) / Σ exp(x)."""
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


def log_softmax(x: Array) -> Array:
    """log(softmax(x)), over the last axis."""
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float, axis: int = -1) -> Array:
    """Over the last axis, or another."""
    centred = x - x.mean(axis=axis, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(axis=axis, keepdims=True) + epsilon) * weight + bias


def split(x: Array, n_head: int) -> Array:
    """[B, T, C] → [B, H, T, D]."""
    return np.stack(np.split(x, n_head, axis=-1), axis=1)


def merge(x: Array) -> Array:
    """[B, H, T, D] → [B, T, C]."""
    return np.concatenate([x[:, head] for head in range(x.shape[1])], axis=-1)


def masked(scores: Array, visible: NDArray[np.bool_], hidden: float = -math.inf) -> Array:
    """scores [B, H, T, T] where a key is visible [T, T], hidden elsewhere."""
    scores = scores.copy()
    scores[..., ~visible] = hidden
    return scores


def linear(s: Scope, name: str, x: Array) -> Array:
    """x @ weight + bias, with the parameters of that name."""
    return x @ s[f"{name}.weight"] + s[f"{name}.bias"]


def normalised(s: Scope, name: str, x: Array) -> Array:
    """The LayerNorm of that name."""
    return s["layer_norm"](x, s[f"{name}.weight"], s[f"{name}.bias"], s["epsilon"])


def parameter(name: str, change: Callable[[Array], Array] = lambda x: x) -> Formula:
    """The tensor itself, or what a change makes of it."""
    return lambda s: change(s.tensor(name))


BLOCK: dict[str, Formula] = {  # in one block; input is the stream as it enters
    "ln_1": lambda s: normalised(s, "ln_1", s["input"]),
    "attn.c_attn": lambda s: linear(s, "attn.c_attn", s["ln_1"]),  # [B, T, 3C]
    "attn.thirds": lambda s: np.split(s["attn.c_attn"], 3, axis=-1),
    "attn.query": lambda s: s["attn.thirds"][0],  # [B, T, C]
    "attn.key": lambda s: s["attn.thirds"][1],
    "attn.value": lambda s: s["attn.thirds"][2],
    "attn.q": lambda s: split(s["attn.query"], s.config.n_head),  # [B, H, T, D]
    "attn.k": lambda s: split(s["attn.key"], s.config.n_head),
    "attn.v": lambda s: split(s["attn.value"], s.config.n_head),
    "attn.scale": lambda s: s.config.attention_scale(s.layer),
    "attn.products": lambda s: s["attn.q"] @ s["attn.k"].swapaxes(2, 3) * s["attn.scale"],  # [B, H, T, T]
    "attn.scores": lambda s: masked(s["attn.products"], s["visible"]),
    "attn.weights": lambda s: s["softmax"](s["attn.scores"]),
    "attn.heads": lambda s: s["attn.weights"] @ s["attn.v"],  # [B, H, T, D]
    "attn.merged": lambda s: merge(s["attn.heads"]),
    "attn.c_proj": lambda s: linear(s, "attn.c_proj", s["attn.merged"]),
    "attn.residual": lambda s: s["input"] + s["attn.c_proj"],
    "ln_2": lambda s: normalised(s, "ln_2", s["attn.residual"]),
    "mlp.c_fc": lambda s: linear(s, "mlp.c_fc", s["ln_2"]),  # [B, T, F]
    "mlp.act": lambda s: s["activation"](s["mlp.c_fc"]),
    "mlp.c_proj": lambda s: linear(s, "mlp.c_proj", s["mlp.act"]),
    "": lambda s: s["attn.residual"] + s["mlp.c_proj"],  # the block's output
}
MODEL: dict[str, Formula] = {  # once
    "token_ids": lambda s: s.run.token_ids,  # [B, T]
    "positions": lambda s: np.arange(s["token_ids"].shape[1]),
    "visible": lambda s: np.tri(s["token_ids"].shape[1], dtype=bool),  # [T, T], a query a row
    "lm_head.weight": lambda s: s["wte.weight"] if s.config.tie_word_embeddings else s.tensor("lm_head.weight"),
    "wte": lambda s: s["wte.weight"][s["token_ids"]],
    "wpe": lambda s: s["wpe.weight"][s["positions"]][None],  # [1, T, C]
    "embedding": lambda s: s["wte"] + s["wpe"],
    "ln_f": lambda s: normalised(s, "ln_f", s["last"]),
    "unembedded": lambda s: s["ln_f"] @ s["lm_head.weight"].T,
    "logits": lambda s: s["unembedded"],
    "log_probabilities": lambda s: log_softmax(s["logits"]),
}
COMPARED = tuple(name for name in BLOCK if name not in ("attn.thirds", "attn.scale", "attn.products"))
NORM: dict[str, Formula] = {  # in every block, and again for ln_f
    "epsilon": lambda s: s.config.layer_norm_epsilon,
    "layer_norm": lambda s: layer_norm,
}
BLOCK |= NORM | {
    "activation": lambda s: gelu_erf if s.config.activation_function == "gelu" else gelu,
    "softmax": lambda s: softmax,
}
BLOCK |= {
    f"{part}.{kind}": parameter(f"{part}.{kind}")
    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for kind in ("weight", "bias")
}
MODEL |= NORM | {name: parameter(name) for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")}


@dataclass(frozen=True)
class Textbook:
    """A model to be run: formulas, and which block's tensors stand at each depth. tensors are by canonical name, in
    whichever arithmetic the pass is to have. flips: a formula rounds within, so that a last bit may turn a coarser one.
    """

    config: Config
    tensors: Mapping[str, Array]
    layers: tuple[int, ...]
    model: Mapping[str, Formula] = field(default_factory=lambda: MODEL)
    block: Mapping[str, Formula] = field(default_factory=lambda: BLOCK)
    flips: bool = False

    def altered(self, formulas: Mapping[str, Formula], layer: int | None = None, flips: bool = False) -> Textbook:
        """The same with some formulas replaced, in all blocks and behind them, or at one depth alone.

        layer: a block's depth, or n_layer for what is not in a block.
        """
        n_layer = self.config.n_layer
        block = {name: formula for name, formula in formulas.items() if name in BLOCK and layer != n_layer}
        model = {name: formula for name, formula in formulas.items() if name in MODEL and layer in (None, n_layer)}
        if layer is not None:
            block = {name: at_depth(layer, formula, self.block[name]) for name, formula in block.items()}
        return replace(self, model={**self.model, **model}, block={**self.block, **block}, flips=self.flips or flips)


def at_depth(layer: int, formula: Formula, elsewhere: Formula) -> Formula:
    """The formula in one block, and another in all others."""
    return lambda s: formula(s) if s.layer == layer else elsewhere(s)


@dataclass
class Pass:
    """One forward pass: a stage by its name, "h.0.attn.q", computed when it is first asked for.

    known: stages that are taken as given. padding: tokens that stood on the left of these and are not here.
    """

    book: Textbook
    token_ids: NDArray[np.integer[Any]]  # [B, T]
    known: dict[str, Any] = field(default_factory=dict)
    padding: int = 0
    asked: set[str] = field(default_factory=set)  # names of all that the stages computed so far rest on

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        if name not in self.known:
            self.known[name] = self.compute(name)
        return self.known[name]

    def compute(self, name: str) -> Any:
        """A stage anew, from what it is made of."""
        layer, local = located(name)
        return (self.book.model if layer is None else self.book.block)[local](Scope(self, layer))

    def stream(self, blocks: int) -> Any:
        """What enters the next block after so many."""
        done = next((number for number in range(blocks, 0, -1) if f"h.{number - 1}" in self.known), 0)
        for number in range(done, blocks):  # from below, since Python's stack is shorter than gpt2-xl
            self[f"h.{number}"]
        return self[f"h.{blocks - 1}" if blocks else "embedding"]


@dataclass(frozen=True)
class Scope:
    """What a formula sees: stages by their names within its block, of the whole model where the block has none."""

    run: Pass
    block: int | None

    @property
    def config(self) -> Config:
        """Of the model."""
        return self.run.book.config

    @property
    def layer(self) -> int:
        """The depth, from 0; only within a block."""
        assert self.block is not None
        return self.block

    def tensor(self, name: str) -> Array:
        """A tensor of this block, or of the model."""
        prefix = "" if self.block is None else f"h.{self.run.book.layers[self.block]}."
        return self.run.book.tensors[prefix + name]

    def __getitem__(self, name: str) -> Any:
        if self.block is not None and name == "input":
            return self.run.stream(self.block)
        if name == "last":
            return self.run.stream(len(self.run.book.layers))
        return self.run[f"h.{self.block}.{name}" if self.block is not None and name in BLOCK else name]


@cache
def located(name: str) -> tuple[int | None, str]:
    """ "h.3.attn.q" is (3, "attn.q"), "h.3" is (3, ""), "ln_f" is (None, "ln_f")."""
    if not name.startswith("h."):
        return None, name
    number, _, local = name[2:].partition(".")
    return int(number), local


def stages(n_layer: int) -> list[str]:
    """What is compared, in the order of computation."""
    blocks = [f"h.{layer}.{name}".rstrip(".") for layer in range(n_layer) for name in COMPARED]
    return ["wte", "wpe", "embedding", *blocks, "ln_f", "logits", "log_probabilities"]


def textbook(config: Config, tensors: Mapping[str, Array]) -> Textbook:
    """GPT-2 as it is."""
    return Textbook(config, tensors, tuple(range(config.n_layer)))
