"""Known mistakes of the backward pass within a block. mistakes.py describes rows, backward.py names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations

import numpy as np

from ..parameters import Array
from .backward import (
    BLOCK_BACKWARD,
    gelu_derivative,
    gelu_erf_derivative,
    softmax_backward,
    standardised,
    total,
)
from .functions import softmax
from .rows import Formulas, Table, rows
from .textbook import Formula, Scope

NORMS = {"ln_1": "input", "ln_2": "attn.residual", "ln_f": "last"}


def derived(derivative: Callable[[Array], Array]) -> Formulas:
    """Return the formulas that use another derivative of the activation."""
    return {"d.activation": lambda s: derivative}


def half_derivative(x: Array) -> Array:
    """Return tanh GELU's derivative without its second term, in which x is multiplied by the derivative of tanh."""
    return (np.tanh((x * x * x * 0.044715 + x) * np.sqrt(2 / np.pi)) + 1) * 0.5


def unthreefold(x: Array) -> Array:
    """Return tanh GELU's derivative with x² · 0.044715 in place of 3 x² · 0.044715."""
    t = np.tanh((x * x * x * 0.044715 + x) * np.sqrt(2 / np.pi))
    return (t + 1) * 0.5 + x * 0.5 * (1 - t * t) * (x * x * 0.044715 + 1) * np.sqrt(2 / np.pi)


def quick_derivative(x: Array) -> Array:
    """Return the derivative of x · sigmoid(1.702 x)."""
    y = 1 / (np.exp(x * -1.702) + 1)
    return y + x * 1.702 * y * (1 - y)


def early(s: Scope) -> Array:
    """Return the activation's gradient with the derivative at its output."""
    return s["d.mlp.act"] * s["d.activation"](s["mlp.act"])


DERIVATIVES = rows(
    "erf GELU's derivative: the backward pass uses the derivative of GELU's exact form, the forward pass its tanh form "
    "(known from: a backward pass written for torch.nn.GELU())",
    derived(gelu_erf_derivative),
    "tanh GELU's derivative: the backward pass uses that of GELU's tanh form, the forward pass GELU's exact form "
    "(known from: a backward pass written for GPT-2)",
    derived(gelu_derivative),
    "GELU's derivative after the activation: the derivative is taken at the output of GELU, not at its input "
    "(known from: derivatives of sigmoid and tanh, which are written in terms of the output)",
    {"d.mlp.c_fc": early},
    "GELU's derivative missing: what comes back to GELU's output is passed on to its input (known from: an omission)",
    derived(np.ones_like),
    "GELU's derivative without its second term: ½ (1 + tanh u) alone, the product rule forgotten "
    "(known from: an omission)",
    derived(half_derivative),
    "GELU's derivative without the factor 3: x³ is differentiated as x² (known from: an omission)",
    derived(unthreefold),
    "ReLU's derivative: 1 where the input is positive, 0 elsewhere (known from: an MLP written from memory)",
    derived(lambda x: (x > 0).astype(x.dtype)),
    "quick GELU's derivative: that of x · sigmoid(1.702 x) (known from: CLIP's QuickGELU)",
    derived(quick_derivative),
)


def norm_back(
    mean: bool = True, variance: bool = True, gain: bool = True, less: int = 0, deviation: int = 0
) -> Formulas:
    """Return the formulas of another backward pass of LayerNorm.

    mean, variance, gain: which terms it has. less: what is subtracted from C in both means. deviation: that in σ.
    """

    def back(dy: Array, x: Array, weight: Array, epsilon: float) -> Array:
        C = x.shape[-1]
        n, sigma = standardised(x, epsilon)
        if deviation:
            sigma = np.sqrt((sigma * sigma - epsilon) * (C / max(1, C - deviation)) + epsilon)
            n = (x - x.mean(axis=-1, keepdims=True)) / sigma
        g = dy * weight if gain else dy
        dx = g
        if mean:
            dx = dx - g.sum(axis=-1, keepdims=True) / max(1, C - less)
        if variance:
            dx = dx - n * ((g * n).sum(axis=-1, keepdims=True) / max(1, C - less))
        return dx / sigma

    return {"d.layer_norm": lambda s: back}


def undivided(dy: Array, x: Array, weight: Array, epsilon: float) -> Array:
    """Return LayerNorm's backward pass without the division by σ."""
    n, _ = standardised(x, epsilon)
    g = dy * weight
    return g - g.mean(axis=-1, keepdims=True) - n * (g * n).mean(axis=-1, keepdims=True)


def unbiased(s: Scope, norm: str, x: str) -> Array:
    """Return the normalised input of a LayerNorm, with σ computed with C − 1."""
    n, sigma = standardised(s[x], s["epsilon"])
    C = n.shape[-1]
    return n * sigma / np.sqrt((sigma * sigma - s["epsilon"]) * (C / max(1, C - 1)) + s["epsilon"])


def gain_from(source: Callable[[Scope, str, str], Array]) -> Formulas:
    """Return formulas of gain gradients Σ dy · source(scope, norm, its input)."""

    def formula(norm: str, x: str) -> Formula:
        return lambda s: total(s[f"d.{norm}"] * source(s, norm, x))

    return {f"d.{norm}.weight": formula(norm, x) for norm, x in NORMS.items()}


NORM_BACKWARDS = rows(
    "LayerNorm's backward without the mean term: mean(g) is not subtracted, as if the mean were a constant "
    "(known from: an omission)",
    norm_back(mean=False),
    "LayerNorm's backward without the variance term: n · mean(g n) is not subtracted, as if σ were a constant "
    "(known from: an omission)",
    norm_back(variance=False),
    "LayerNorm's backward without both terms: g / σ, as if mean and σ were constants (known from: statistics detached)",
    norm_back(mean=False, variance=False),
    "LayerNorm's backward with C − 1: both means divide by C − 1, not by C (known from: torch.var's default)",
    norm_back(less=1),
    "LayerNorm's backward with unbiased σ: σ is computed with C − 1, not with C (known from: defaults of torch.std)",
    norm_back(deviation=1),
    "LayerNorm's backward and gain gradient with unbiased σ: σ is computed with C − 1 for all gradients "
    "(known from: defaults of torch.std)",
    norm_back(deviation=1) | gain_from(unbiased),
    "LayerNorm's backward without the gain: what comes back is not multiplied by LayerNorm's weight "
    "(known from: an omission)",
    norm_back(gain=False),
    "LayerNorm's backward without σ: what comes back is not divided by σ (known from: an omission)",
    {"d.layer_norm": lambda s: undivided},
    "LayerNorm's backward missing: what comes back passes through LayerNorm unchanged (known from: an omission)",
    {"d.layer_norm": lambda s: lambda dy, x, weight, epsilon: dy},
    "LayerNorm's gain gradient from the input: the gain's gradient is Σ dy x, with x before LayerNorm "
    "(known from: the wrong buffer)",
    gain_from(lambda s, norm, x: s[x]),
    "LayerNorm's gain gradient from the output: the gain's gradient is Σ dy y, with y after gain and bias "
    "(known from: the wrong buffer)",
    gain_from(lambda s, norm, x: s[norm]),
)


def keys_and_queries(q: Callable[[Scope], Array], k: Callable[[Scope], Array]) -> Formulas:
    """Return the formulas of other gradients of queries and keys."""
    return {"d.attn.q": q, "d.attn.k": k}


def dq(power: int = 1) -> Callable[[Scope], Array]:
    """Return the formula of the gradient of queries with a power of the scale."""
    return lambda s: s["d.attn.products"] @ s["attn.k"] * s["attn.scale"] ** power


def dk(power: int = 1) -> Callable[[Scope], Array]:
    """Return the formula of the gradient of keys with a power of the scale."""
    return lambda s: s["d.attn.products"].swapaxes(2, 3) @ s["attn.q"] * s["attn.scale"] ** power


def unmasked(s: Scope) -> Array:
    """Return attention weights computed again without the mask."""
    return softmax(s["attn.products"])


UNMASKED: Formulas = {
    "d.attn.scores": lambda s: softmax_backward(s["d.attn.weights"], unmasked(s)),
    "d.attn.products": lambda s: s["d.attn.scores"],
}
THIRDS = ("d.attn.query", "d.attn.key", "d.attn.value")


def joined(order: Sequence[int]) -> Formula:
    """Return the formula that joins the gradients of queries, keys and values in this order."""
    return lambda s: np.concatenate([s[THIRDS[place]] for place in order], axis=-1)


def unturned(name: str) -> Formula:
    """Return the formula of a stage [B, H, T, D] as [B, T, C] without moving a number in memory."""
    return lambda s: np.ascontiguousarray(s[name]).reshape(s[name].shape[0], s[name].shape[2], -1)


ATTENTION_BACKWARDS: Table = {
    **rows(
        "softmax's backward without the sum: y dy, without − y Σ dy y (known from: the rule of elementwise functions)",
        {"d.softmax": lambda s: lambda dy, y: y * dy},
        "softmax's backward on the diagonal: y (1 − y) dy, as for the sigmoid (known from: a Jacobian's diagonal)",
        {"d.softmax": lambda s: lambda dy, y: y * (1 - y) * dy},
        "softmax's backward missing: what comes back to the weights is passed on to the visible scores "
        "(known from: an omission)",
        {"d.attn.scores": lambda s: s["d.attn.weights"] * s["visible"]},
        "attention's backward without the scale: the gradients of q and k lack 1 / √D (known from: an omission)",
        keys_and_queries(dq(0), dk(0)),
        "q's gradient without the scale: the gradient of q lacks 1 / √D (known from: an omission)",
        {"d.attn.q": dq(0)},
        "k's gradient without the scale: the gradient of k lacks 1 / √D (known from: an omission)",
        {"d.attn.k": dk(0)},
        "attention's backward scaled twice: the gradients of q and k have 1 / D (known from: a scale in two places)",
        keys_and_queries(dq(2), dk(2)),
        "scores' backward without the mask: the softmax's backward uses weights computed again without the causal mask "
        "(known from: a backward pass that recomputes attention)",
        UNMASKED,
        "attention's backward without the mask: weights computed again without the causal mask also lead to v "
        "(known from: a backward pass that recomputes attention)",
        UNMASKED | {"d.attn.v": lambda s: unmasked(s).swapaxes(2, 3) @ s["d.attn.heads"]},
        "q and k exchanged in their gradients: dq = dS q and dk = dSᵀ k (known from: a mixed-up name)",
        keys_and_queries(
            lambda s: s["d.attn.products"] @ s["attn.q"] * s["attn.scale"],
            lambda s: s["d.attn.products"].swapaxes(2, 3) @ s["attn.k"] * s["attn.scale"],
        ),
        "gradients of q and k in each other's place: q gets dSᵀ q and k gets dS k (known from: return dk, dq, dv)",
        keys_and_queries(dk(), dq()),
        "dS not transposed in k's gradient: dk = dS q, not dSᵀ q (known from: an omission)",
        {"d.attn.k": lambda s: s["d.attn.products"] @ s["attn.q"] * s["attn.scale"]},
        "dS transposed in q's gradient: dq = dSᵀ k, not dS k (known from: a mixed-up transposition)",
        {"d.attn.q": lambda s: s["d.attn.products"].swapaxes(2, 3) @ s["attn.k"] * s["attn.scale"]},
        "weights not transposed in v's gradient: dv = P dy, not Pᵀ dy (known from: an omission)",
        {"d.attn.v": lambda s: s["attn.weights"] @ s["d.attn.heads"]},
    ),
    **{
        f"gradients of q, k, v joined as {', '.join('qkv'[place] for place in order)}: the thirds of c_attn's gradient "
        "are not in the order q, k, v (known from: a mixed-up order)": {"d.attn.c_attn": joined(order)}
        for order in permutations(range(3))
        if order != (0, 1, 2)
    },
}
HEADS_BACKWARDS: Table = rows(  # in models of several heads
    "heads of the gradients not transposed back: [B, H, T, D] is reshaped to [B, T, C] without transposing "
    "(known from: view instead of transpose)",
    {f"d.attn.{whole}": unturned(f"d.attn.{whole[0]}") for whole in ("query", "key", "value")},
    "heads of the output's gradient not transposed: [B, T, C] is reshaped to [B, H, T, D] without transposing "
    "(known from: view instead of transpose)",
    {"d.attn.heads": lambda s: s["d.attn.merged"].reshape(s["attn.heads"].shape)},
)


def part(name: str, factor: float, skip: float) -> Formula:
    """Return the formula of a gradient at a residual sum, with factors on what comes through the part and on the skip.

    name: "d.input" or "d.attn.residual".
    """
    above = {"d.input": "d.attn.residual", "d.attn.residual": "d."}[name]
    return lambda s: s[above] * skip + (BLOCK_BACKWARD[name](s) - s[above]) * factor


def sums(kind: str, text: str, source: str, factor: float, skip: float) -> Table:
    """Return another gradient at the residual sum of attention, of the MLP and of both."""
    attention = {"d.input": part("d.input", factor, skip)}
    mlp = {"d.attn.residual": part("d.attn.residual", factor, skip)}
    return {
        f"{where} {kind}: {text} (known from: {source})": formulas
        for where, formulas in (
            ("attention residual's gradient", attention),
            ("MLP residual's gradient", mlp),
            ("both residuals' gradients", attention | mlp),
        )
    }


RESIDUAL_BACKWARDS: Table = {
    **sums("without the skip", "only what comes through f comes back to x in x + f(ln(x))", "an omission", 1, 0),
    **sums("without the part", "what comes through f is not added in x + f(ln(x))", "= instead of +=, detach()", 0, 1),
    **sums("with the skip twice", "what skips f is added twice in x + f(ln(x))", "+= in two places", 1, 2),
    **sums("with the part twice", "what comes through f is added twice in x + f(ln(x))", "+= in two places", 2, 1),
}
