"""Known mistakes in the gradients of parameters. mistakes.py describes rows, backward.py names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..config import Config
from ..parameters import Array
from .backward import BLOCK_BACKWARD, MODEL_BACKWARD, in_channels, outer
from .rows import Formulas, Table, rows
from .textbook import Formula, Scope

LINEAR = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
LAYER_NORMS = ("ln_1", "ln_2", "ln_f")
BIASES = tuple(f"{name}.bias" for name in LINEAR)
WEIGHTS = tuple(f"{name}.weight" for name in LINEAR)
NORM_PARAMETERS = tuple(f"{name}.{kind}" for name in LAYER_NORMS for kind in ("weight", "bias"))
MATRICES = (*WEIGHTS, "wte.weight", "wpe.weight", "lm_head.weight")
EVERY = (*MATRICES, *BIASES, *NORM_PARAMETERS)
RIGHT = MODEL_BACKWARD | BLOCK_BACKWARD


def altered(change: Callable[[Scope, str, Array], Any], *names: str) -> Formulas:
    """Return formulas of parameters' gradients: the right ones with change(scope, name, gradient) applied."""

    def formula(name: str) -> Formula:
        return lambda s: change(s, name, RIGHT[f"d.{name}"](s))

    return {f"d.{name}": formula(name) for name in names}


def times(factor: float, *names: str) -> Formulas:
    """Return formulas that multiply these gradients by a factor."""
    return altered(lambda s, name, gradient: gradient * factor, *names)


class Cut:
    """A scope that shows a part of the batch: stages [B, T, …] at some rows and positions."""

    def __init__(self, scope: Scope, *at: slice) -> None:
        self.scope, self.at = scope, at

    def __getitem__(self, name: str) -> Any:
        found = self.scope[name]
        return found[self.at] if np.ndim(found) > 2 else found


def cut(*at: slice) -> Callable[[Scope, str, Array], Any]:
    """Return a change after which a parameter's gradient is from a part of the batch alone."""
    whole: Any = RIGHT
    return lambda s, name, gradient: whole[f"d.{name}"](Cut(s, *at))


def over(size: Callable[[Any], int]) -> Callable[[Scope, str, Array], Any]:
    """Return a change that divides by a size of the batch, found from the ids [B, T]."""
    return lambda s, name, gradient: gradient / size(s["token_ids"])


PARTS: dict[str, tuple[str, ...]] = {
    "bias gradients": BIASES,
    "weight gradients": WEIGHTS,
    "LayerNorm's parameter gradients": NORM_PARAMETERS,
}
ALL, FIRST, LAST = slice(None), slice(0, 1), slice(-1, None)
SUMS: dict[str, Callable[[Scope, str, Array], Any]] = {
    "of the first row alone: not summed over the rows of the batch (known from: a sum over one axis only)": cut(FIRST),
    "of the last row alone: not summed over the rows of the batch (known from: = instead of +=)": cut(LAST),
    "of the first position alone: not summed over positions (known from: a sum over one axis only)": cut(ALL, FIRST),
    "of the last position alone: not summed over positions (known from: = instead of +=)": cut(ALL, LAST),
    "of the last token alone: not summed over the tokens of the batch (known from: = instead of +=)": cut(LAST, LAST),
    "averaged over tokens: divided by the number of tokens of the batch (known from: mean instead of sum)": over(
        lambda ids: ids.size
    ),
    "averaged over rows: divided by the number of rows of the batch (known from: mean(0) instead of sum(0))": over(len),
    "averaged over positions: divided by the number of positions (known from: mean(1) instead of sum(1))": over(
        lambda ids: ids.shape[1]
    ),
}


def with_head(change: Callable[[Scope, str, Array], Any]) -> Formulas:
    """Return formulas that change the weight gradients of all linear maps, the output head's included."""
    return altered(change, *WEIGHTS, "head.part")


def turned(s: Scope, name: str, gradient: Array) -> Array:
    """Return a gradient [in, out] written as [out, in], in the shape of the first."""
    return np.ascontiguousarray(gradient.T).reshape(gradient.shape)


def turned_back(s: Scope, name: str, gradient: Array) -> Array:
    """Return a gradient [in, out] that was written as it is where [out, in] is stored."""
    return gradient.reshape(gradient.shape[::-1]).T


def turned_thirds(s: Scope, name: str, gradient: Array) -> Array:
    """Return the gradient of c_attn's weight with each of its square thirds transposed."""
    return np.concatenate([third.T for third in np.split(gradient, 3, axis=-1)], axis=-1)


def reads(name: str, stage: Callable[[Scope], Array]) -> Formulas:
    """Return the formula of a weight's gradient from another input of its linear map."""
    return {f"d.{name}.weight": lambda s: outer(stage(s), s[f"d.{name}"])}


PARAMETER_GRADIENTS: Table = {
    **{f"{part} {text}": altered(change, *names) for part, names in PARTS.items() for text, change in SUMS.items()},
    **rows(
        "weight gradients transposed: each linear map's weight gradient [in, out] is written as [out, in] "
        "(known from: Conv1D is [in, out], Linear [out, in])",
        altered(turned, *WEIGHTS),
        "weight gradients transposed in [out, in]: each linear map's weight is stored as [out, in], its gradient was "
        "written there as [in, out] (known from: xᵀ dy in the memory of a Linear)",
        altered(turned_back, *WEIGHTS),
    ),
    **{
        f"{name}'s weight gradient transposed: the gradient of {name}.weight [in, out] is written as [out, in] "
        "(known from: Conv1D is [in, out], Linear [out, in])": altered(turned, f"{name}.weight")
        for name in LINEAR
    },
    **rows(
        "q, k, v's weight gradients transposed: each square third of c_attn's weight gradient is transposed "
        "(known from: Conv1D is [in, out], Linear [out, in])",
        altered(turned_thirds, "attn.c_attn.weight"),
        "c_attn's weight gradient from before ln_1: computed with the input of ln_1, not with its output "
        "(known from: the wrong buffer)",
        reads("attn.c_attn", lambda s: s["input"]),
        "c_fc's weight gradient from before ln_2: computed with the input of ln_2, not with its output "
        "(known from: the wrong buffer)",
        reads("mlp.c_fc", lambda s: s["attn.residual"]),
        "c_fc's weight gradient from ln_1: computed with the output of ln_1, not with that of ln_2 "
        "(known from: a mixed-up name)",
        reads("mlp.c_fc", lambda s: s["ln_1"]),
        "c_proj's weight gradient from before the activation: that of mlp.c_proj is computed with the input of GELU, "
        "not with its output (known from: the wrong buffer)",
        reads("mlp.c_proj", lambda s: s["mlp.c_fc"]),
        "c_proj's weight gradient from the values: that of attn.c_proj is computed with v, not with attention's output "
        "(known from: the wrong buffer)",
        reads("attn.c_proj", lambda s: in_channels(s["attn.v"])),
        "c_proj's weight gradient from ln_1: that of attn.c_proj is computed with the output of ln_1 "
        "(known from: the input of attention taken for that of its projection)",
        reads("attn.c_proj", lambda s: s["ln_1"]),
    ),
}


WITH_HEAD: Table = {
    f"all weight gradients {text}": with_head(change)
    for text, change in {
        **SUMS,
        "transposed: each linear map's and the output head's weight gradient [in, out] is written as [out, in] "
        "(known from: Conv1D is [in, out], Linear [out, in])": turned,
    }.items()
} | rows(
    "all weight gradients transposed in [out, in]: each linear map's and the output head's weight is stored as "
    "[out, in], and its gradient was written there as [in, out] (known from: xᵀ dy in the memory of a Linear)",
    altered(turned_back, *WEIGHTS) | altered(turned, "head.part"),
)


def zero(names: Sequence[str]) -> Formulas:
    """Return formulas by which these gradients are 0."""
    return {f"d.{name}": nothing(f"d.{name}") for name in names}


def nothing(name: str) -> Formula:
    """Return the formula of a gradient in the right shape that is 0."""
    return lambda s: RIGHT[name](s) * 0


FROZEN: Table = {
    f"{what} frozen: 0 is the gradient of {text}, others are right (known from: requires_grad=False, .data)": zero(
        names
    )
    for what, text, names in (
        ("all biases", "every bias, LayerNorms' included", (*BIASES, *(f"{norm}.bias" for norm in LAYER_NORMS))),
        ("biases", "every linear map's bias", BIASES),
        ("LayerNorms", "every LayerNorm's gain and bias", NORM_PARAMETERS),
        ("blocks", "every parameter of a block", (*WEIGHTS, *BIASES, *NORM_PARAMETERS[:4])),
        *(
            (part, f"{part}'s parameters", (f"{part}.weight", f"{part}.bias"))
            for part in ("ln_1", "ln_2", "ln_f", *LINEAR)
        ),
        *((f"{part}.bias", f"{part}.bias", (f"{part}.bias",)) for part in LINEAR),
    )
}
DETACHED = rows(
    "attention detached: nothing comes back into attention, only to x in x + attn(ln_1(x)) "
    "(known from: return dy, None; detach())",
    {"d.attn.c_proj": nothing("d.attn.c_proj")},
    "MLP detached: nothing comes back into the MLP, only to x in x + mlp(ln_2(x)) "
    "(known from: return dy, None; detach())",
    {"d.mlp.c_proj": nothing("d.mlp.c_proj")},
    "attention and MLP detached: nothing comes back into either, only to x in x + f(ln(x)) "
    "(known from: return dy, None; detach())",
    {"d.attn.c_proj": nothing("d.attn.c_proj"), "d.mlp.c_proj": nothing("d.mlp.c_proj")},
    "attention's weights detached: nothing comes back to queries and keys (known from: a frozen attention pattern)",
    {"d.attn.scores": nothing("d.attn.scores")},
    "queries detached: nothing comes back to the queries (known from: detach())",
    {"d.attn.query": nothing("d.attn.query")},
    "keys detached: nothing comes back to the keys (known from: detach(), a key-value cache)",
    {"d.attn.key": nothing("d.attn.key")},
    "values detached: nothing comes back to the values (known from: detach(), a key-value cache)",
    {"d.attn.value": nothing("d.attn.value")},
    "keys and values detached: nothing comes back to keys and values (known from: a key-value cache)",
    {"d.attn.key": nothing("d.attn.key"), "d.attn.value": nothing("d.attn.value")},
)
EMBEDDINGS_FROZEN: Table = rows(
    "wpe frozen: 0 is the gradient of wpe (known from: requires_grad=False, fixed positions)",
    zero(["wpe.weight"]),
    "wte frozen: 0 is the gradient of wte (known from: requires_grad=False)",
    zero(["wte.weight"]),
    "wte and wpe frozen: 0 is the gradient of both embeddings (known from: requires_grad=False)",
    zero(["wte.weight", "wpe.weight"]),
    "embeddings detached: nothing comes back from the first block to wte and wpe (known from: detach(), .data)",
    {"d.embedding": nothing("d.embedding")},
    "output head frozen: 0 is the gradient of lm_head, others are right (known from: requires_grad=False)",
    zero(["lm_head.weight"]),
)


def limited(most: float) -> Formulas:
    """Return formulas of gradients clipped to this norm over all parameters, as torch does it."""
    return altered(lambda s, name, gradient: gradient * min(1.0, most / (s["d.norm"] + 1e-6)), *EVERY)


def bounded(most: float) -> Formulas:
    """Return formulas of gradients of which each number is clipped."""
    return altered(lambda s, name, gradient: np.minimum(np.maximum(gradient, -most), most), *EVERY)


def decayed(decay: float, *names: str) -> Formulas:
    """Return formulas of gradients to which the parameters are added."""
    return altered(lambda s, name, gradient: gradient + s[name] * decay, *names)


def stopped(layer: int) -> Formula:
    """Return the formula of the gradient of a block's output, 0 at this depth."""
    return lambda s: RIGHT["d."](s) * (s.layer != layer)


def training(config: Config, norm: float, largest: float) -> Table:
    """Return what a training loop does to the gradients of all parameters, and where it stops them.

    norm, largest: of all the right gradients together. What they do not exceed does not clip them.
    """
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    every, matrices = ([name for name in names if name not in tied] for names in (EVERY, MATRICES))
    words = {2: "twice", 3: "three times", 4: "four times"}
    return {
        **{
            f"gradients not reset, {words[n]}: every parameter's gradient is {n} times what it should be, stages' are "
            f"right (known from: zero_grad() missing, {n} backward passes)": times(n, *every)
            for n in words
        },
        **{
            f"backward pass run {words[n]}: the gradients of stages, too, are {n} times what they should be "
            f"(known from: retain_graph=True, {n} backward passes over one graph)": {"d.logits": scaled(n)}
            for n in words
        },
        "gradients negated: every parameter's gradient has the opposite sign (known from: updates)": times(-1, *every),
        **{
            f"gradients clipped to norm {most:g}: all were divided by their common norm over {most:g} "
            "(known from: clip_grad_norm_)": limited(most)
            for most in (1.0, 0.1, 0.25, 0.5, 2.0, 5.0)
            if most < norm
        },
        **{
            f"gradients clipped to ±{most:g}: larger ones are ±{most:g} (known from: clip_grad_value_)": bounded(most)
            for most in (0.01, 0.1, 0.5, 1.0)
            if most < largest
        },
        **{
            f"gradients scaled by {2**power}: 2^{power} times what they should be, loss scaling not undone "
            "(known from: GradScaler without unscale_(), mixed precision)": {"d.logits": scaled(2.0**power)}
            for power in range(5, 25)
        },
        **{
            f"weight decay {decay:g} in {what}: {decay:g} times the parameter was added to its gradient "
            "(known from: L2 regularisation, SGD's weight_decay)": decayed(decay, *names)
            for decay in (0.1, 0.01, 0.001, 0.0001, 0.05, 0.5)
            for what, names in (("all gradients", every), ("the gradients of matrices", matrices))
        },
        **{
            f"gradients stop above block {layer}: 0 below it (known from: detach(), truncated backpropagation)": {
                "d.": stopped(layer)
            }
            for layer in range(config.n_layer)
        },
    }


def scaled(factor: float) -> Formula:
    """Return the formula of the gradient of logits times a factor."""
    return lambda s: RIGHT["d.logits"](s) * factor
