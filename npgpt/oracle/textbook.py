"""A second implementation of GPT-2, written like a textbook: full attention matrices, no cache, one line per formula.

It verifies model.py, and the catalogue of mistakes alters it. Every stage is a named formula of other stages, computed
on first use, so a mistake is another formula under the same name.

Shapes as in model.py: B rows, T tokens, C n_embd, H n_head, D head width, F inner width, V vocab_size, N n_positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..parameters import Array
from .backward import BLOCK_BACKWARD, MODEL_BACKWARD, NORM_BACKWARD, OF_BLOCK, OF_MODEL
from .derivative import chained
from .functions import gelu, gelu_erf, layer_norm, log_softmax, masked, merge, softmax, split

Formula: TypeAlias = "Callable[[Scope], Any]"


def linear(s: Scope, name: str, x: Array) -> Array:
    """Return x @ weight + bias with the parameters of this name."""
    return x @ s[f"{name}.weight"] + s[f"{name}.bias"]


def normalised(s: Scope, name: str, x: Array) -> Array:
    """Return x after the LayerNorm of this name."""
    return s["layer_norm"](x, s[f"{name}.weight"], s[f"{name}.bias"], s["epsilon"])


def parameter(name: str, change: Callable[[Array], Array] = lambda x: x) -> Formula:
    """Return the formula of a tensor, with a change applied."""
    return lambda s: change(s.tensor(name))


BLOCK: dict[str, Formula] = {  # in one block; input is the residual stream that enters it
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
MODEL: dict[str, Formula] = {  # outside the blocks
    "token_ids": lambda s: s.run.token_ids,  # [B, T]
    "positions": lambda s: np.arange(s["token_ids"].shape[1]),
    "visible": lambda s: np.tri(s["token_ids"].shape[1], dtype=bool),  # [T, T], one row per query
    "lm_head.weight": lambda s: s["wte.weight"] if s.config.tie_word_embeddings else s.tensor("lm_head.weight"),
    "wte": lambda s: s["wte.weight"][s["token_ids"]],
    "wpe": lambda s: s["wpe.weight"][s["positions"]][None],  # [1, T, C]
    "embedding": lambda s: s["wte"] + s["wpe"],
    "ln_f": lambda s: normalised(s, "ln_f", s["last"]),
    "unembedded": lambda s: s["ln_f"] @ s["lm_head.weight"].T,
    "logits": lambda s: s["unembedded"],
    "log_probabilities": lambda s: log_softmax(s["logits"]),
}
FORWARD = {*BLOCK, *MODEL} - {"token_ids", "positions", "visible", "attn.scale"}  # stages with a gradient
COMPARED = tuple(name for name in BLOCK if name not in ("attn.thirds", "attn.scale", "attn.products"))
NORM: dict[str, Formula] = {  # in every block and for ln_f
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
READERS = {"layer_norm": ("ln_1", "ln_2", "ln_f"), "activation": ("mlp.act",), "softmax": ("attn.weights",)}
BLOCK |= BLOCK_BACKWARD
MODEL |= MODEL_BACKWARD
NORM |= NORM_BACKWARD


@dataclass(frozen=True)
class Textbook:
    """A model to run: its formulas, tensors by canonical name in the arithmetic of the pass, and the index of the block
    used at each depth. flips: whether a formula rounds internally.
    """

    config: Config
    tensors: Mapping[str, Array]
    layers: tuple[int, ...]
    model: Mapping[str, Formula] = field(default_factory=lambda: MODEL)
    block: Mapping[str, Formula] = field(default_factory=lambda: BLOCK)
    flips: bool = False
    changed: frozenset[str] = frozenset()  # stages of the forward pass that are not GPT-2's

    def computed(self, s: Scope, name: str) -> Any:
        """Compute a stage. A gradient is by the chain rule if its stage is read by one that was changed."""
        table, right, above = (self.model, MODEL, OF_MODEL) if s.block is None else (self.block, BLOCK, OF_BLOCK)
        if name in above and table[name] is right[name] and (changed := self.changed & set(above.values())):
            stages = {stage: gradient for gradient, stage in above.items() if stage in FORWARD}
            if (found := chained(s, above[name], changed, table, right, stages)) is not None:
                return found
        return table[name](s)

    def altered(self, formulas: Mapping[str, Formula], layer: int | None = None, flips: bool = False) -> Textbook:
        """Return a copy with some formulas replaced, everywhere or at one depth only.

        layer: the depth of a block, or n_layer for formulas outside the blocks.
        """
        n_layer = self.config.n_layer
        block = {name: formula for name, formula in formulas.items() if name in BLOCK and layer != n_layer}
        model = {name: formula for name, formula in formulas.items() if name in MODEL and layer in (None, n_layer)}
        if layer is not None:
            block = {name: at_depth(layer, formula, self.block[name]) for name, formula in block.items()}
        changed = {stage for name in formulas for stage in READERS.get(name, (name,)) if stage in FORWARD}
        return replace(
            self,
            model={**self.model, **model},
            block={**self.block, **block},
            flips=self.flips or flips,
            changed=self.changed | changed,
        )


def at_depth(layer: int, formula: Formula, elsewhere: Formula) -> Formula:
    """Return a formula that is used at one depth, with another one elsewhere."""
    return lambda s: formula(s) if s.layer == layer else elsewhere(s)


@dataclass
class Pass:
    """One pass, forward and backward. Indexing by name, such as "h.0.attn.q", computes a stage on first use.

    known: stages to take as given, and all that was computed. padding: tokens removed on the left. targets: for the
    loss and gradients. asked: by name that was computed, what its formula read, in the order of completion.
    """

    book: Textbook
    token_ids: NDArray[np.integer[Any]]  # [B, T]
    known: dict[str, Any] = field(default_factory=dict)
    padding: int = 0
    targets: NDArray[np.integer[Any]] | None = None  # [B, T]
    asked: dict[str, set[str]] = field(default_factory=dict)
    given: frozenset[str] = frozenset()  # the first names of known
    traces: dict[Any, Any] = field(default_factory=dict)  # by formula and block, for the chain rule
    within: list[set[str]] = field(default_factory=list)  # what was read so far by formulas that are not finished

    def __post_init__(self) -> None:
        self.given = self.given or frozenset(self.known)

    def __getitem__(self, name: str) -> Any:
        if self.within:
            self.within[-1].add(name)
        if name not in self.known:
            self.known[name] = self.compute(name)
        return self.known[name]

    def compute(self, name: str) -> Any:
        """Compute a stage from its formula, even if it is known."""
        layer, local = located(name)
        self.within.append(set())
        try:
            return self.book.computed(Scope(self, layer), local)
        finally:
            self.asked.pop(name, None)
            self.asked[name] = self.within.pop()

    def behind(self, name: str) -> set[str]:
        """Return the names of everything that a computed stage depends on, up to given ones."""
        found, left = set[str](), [name]
        while left:
            new = self.asked.get(left.pop(), set()) - found
            found |= new
            left += new - self.given
        return found

    def right(self, name: str) -> Any:
        """Compute a gradient from the formula of the correct model."""
        layer, local = located(name)
        return (MODEL if layer is None else BLOCK)[local](Scope(self, layer))

    def stream(self, blocks: int) -> Any:
        """Return the residual stream after this many blocks."""
        done = next((number for number in range(blocks, 0, -1) if f"h.{number - 1}" in self.known), 0)
        for number in range(done, blocks):  # in order, since recursion through gpt2-xl would overflow the stack
            self[f"h.{number}"]
        return self[f"h.{blocks - 1}" if blocks else "embedding"]

    def gradient(self, blocks: int) -> Any:
        """Return the gradient of the residual stream after this many blocks."""
        last = len(self.book.layers)
        done = next((number for number in range(blocks + 1, last) if f"d.h.{number - 1}" in self.known), last)
        for number in range(done, blocks, -1):  # as above
            self[f"d.h.{number - 1}"]
        return self[f"d.h.{blocks}.input" if blocks < last else "d.last"]


@dataclass(frozen=True)
class Scope:
    """What a formula sees: stages by local name in its block, or of the whole model if the block has none."""

    run: Pass
    block: int | None

    @property
    def config(self) -> Config:
        """The configuration of the model."""
        return self.run.book.config

    @property
    def layer(self) -> int:
        """The depth, from 0. Defined only within a block."""
        assert self.block is not None
        return self.block

    def tensor(self, name: str) -> Array:
        """Return a tensor of this block, or of the model."""
        prefix = "" if self.block is None else f"h.{self.run.book.layers[self.block]}."
        return self.run.book.tensors[prefix + name]

    def __getitem__(self, name: str) -> Any:
        if self.block is not None and name == "input":
            return self.run.stream(self.block)
        if name == "last":
            return self.run.stream(len(self.run.book.layers))
        if self.block is None or name not in BLOCK:
            return self.run[name]
        mark = "d." if name.startswith("d.") else ""
        return self.run[f"{mark}h.{self.block}.{name.removeprefix(mark)}".rstrip(".")]


@cache
def located(name: str) -> tuple[int | None, str]:
    """Split a name in two: "h.3.attn.q" is (3, "attn.q"), "h.3" is (3, ""), "ln_f" is (None, "ln_f"); of gradients,
    "d.h.3.attn.q" is (3, "d.attn.q"), "d.h.3" is (3, "d."), "d.ln_f" is (None, "d.ln_f").
    """
    mark = "d." if name.startswith("d.") else ""
    rest = name.removeprefix(mark)
    if not rest.startswith("h."):
        return None, name
    number, _, local = rest[2:].partition(".")
    return int(number), mark + local


def stages(n_layer: int) -> list[str]:
    """Return the stages that are compared, in the order of computation."""
    blocks = [f"h.{layer}.{name}".rstrip(".") for layer in range(n_layer) for name in COMPARED]
    return ["wte", "wpe", "embedding", *blocks, "ln_f", "logits", "log_probabilities"]


def textbook(config: Config, tensors: Mapping[str, Array]) -> Textbook:
    """Return the textbook model of correct GPT-2."""
    return Textbook(config, tensors, tuple(range(config.n_layer)))
