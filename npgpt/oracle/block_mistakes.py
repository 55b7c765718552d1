"""Known mistakes within a block: by the line of a report the formulas of textbook.py that each replaces.

Rows and shapes as mistakes.py has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..parameters import Array
from .textbook import (
    BLOCK,
    MODEL,
    Formula,
    Scope,
    gelu,
    gelu_erf,
    layer_norm,
    linear,
    masked,
    normalised,
    parameter,
    softmax,
)

Norm = Callable[[Array, Array, Array, float], Array]
Table = dict[str, dict[str, Formula]]


def constant(value: Any) -> Formula:
    """Return the formula that is this value, whatever the stages are."""
    return lambda s: value


def activated(activation: Callable[[Array], Array]) -> dict[str, Formula]:
    """Return the formulas of another activation."""
    return {"mlp.act": lambda s: activation(s["mlp.c_fc"])}


FORMS: dict[str, Callable[[Array], Array]] = {
    "erf GELU: the exact form of GELU; GPT-2 has the tanh form (known from: nanoGPT, torch.nn.GELU())": gelu_erf,
    "tanh GELU: GELU's tanh form, where the model has the exact one (known from: GPT-2)": gelu,
    "quick GELU: x · sigmoid(1.702 x) in place of GPT-2's tanh form of GELU (known from: CLIP's QuickGELU)": (
        lambda x: x / (np.exp(x * -1.702) + 1)
    ),
    "ReLU: max(x, 0) in place of GELU (known from: the first Transformer, GPT-2 written from memory)": (
        lambda x: x * (x > 0)
    ),
    "squared ReLU: max(x, 0)² in place of GELU (known from: Primer, modded-nanogpt)": lambda x: x * x * (x > 0),
    "SiLU: x · sigmoid(x) in place of GELU (known from: LLaMA, torch.nn.SiLU())": lambda x: x / (np.exp(-x) + 1),
    "activation missing: the MLP's second map reads the first's output as it is (known from: left out)": (lambda x: x),
    "GELU with 0.44715: the factor of x³ is 0.44715, not 0.044715 (known from: a zero left out)": (
        partial(gelu, cubic=0.44715)
    ),
    "GELU with 0.0044715: the factor of x³ is 0.0044715, not 0.044715 (known from: a zero too many)": (
        partial(gelu, cubic=0.0044715)
    ),
    "GELU with 0.044175: the factor of x³ is 0.044175, not 0.044715 (known from: two digits exchanged)": (
        partial(gelu, cubic=0.044175)
    ),
    "GELU without ½: x (1 + tanh(…)), twice GELU (known from: left out)": partial(gelu, half=1.0),
    "GELU with √(2π): √(2π) in place of √(2/π) (known from: a slash left out)": (
        partial(gelu, root=math.sqrt(2 * math.pi))
    ),
}
ACTIVATIONS: Table = {text: activated(activation) for text, activation in FORMS.items()} | {
    "GELU before the bias: c_fc's bias is added to GELU's output, not to its input (known from: a fused kernel)": {
        "mlp.act": lambda s: s["activation"](s["mlp.c_fc"] - s["mlp.c_fc.bias"]) + s["mlp.c_fc.bias"]
    },
}


def layer_norm_by(divisor: Callable[[Array, float], Array]) -> Norm:
    """Return a LayerNorm that divides by divisor(the centred x, epsilon)."""

    def norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / divisor(centred, epsilon) * weight + bias

    return norm


def rms_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
    """x by its root mean square, nothing subtracted."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * weight + bias


def variance(centred: Array, correction: int = 0) -> Array:
    """Divided by C − correction."""
    return (centred * centred).sum(axis=-1, keepdims=True) / max(1, centred.shape[-1] - correction)


NORMS: dict[str, Norm] = {
    "unbiased variance: LayerNorm's variance is divided by C − 1, not by C "
    "(known from: torch.var's and torch.std's default)": layer_norm_by(lambda x, eps: np.sqrt(variance(x, 1) + eps)),
    "epsilon outside the root: LayerNorm divides by √variance + epsilon, not by √(variance + epsilon) "
    "(known from: the annotated Transformer)": layer_norm_by(lambda x, eps: np.sqrt(variance(x)) + eps),
    "standard deviation plus epsilon: LayerNorm divides by x.std() + epsilon, where torch's std divides by C − 1 "
    "(known from: the annotated Transformer in torch)": layer_norm_by(lambda x, eps: np.sqrt(variance(x, 1)) + eps),
    "variance without root: LayerNorm divides by variance + epsilon (known from: left out)": layer_norm_by(
        lambda x, eps: variance(x) + eps
    ),
    "LayerNorm over tokens: mean and variance are those of a channel over all tokens "
    "(known from: axis 1, BatchNorm)": partial(layer_norm, axis=1),
    "RMS norm: the mean is not subtracted, and no bias is added (known from: LLaMA)": lambda x, weight, bias, eps: (
        rms_norm(x, weight, bias * 0, eps)
    ),
    "RMS norm with bias: the mean is not subtracted (known from: left out)": rms_norm,
    "LayerNorm gain dropped: LayerNorm does not multiply by its weight (known from: left out)": (
        lambda x, weight, bias, eps: layer_norm(x, np.ones_like(weight), bias, eps)
    ),
    "LayerNorm bias dropped: LayerNorm does not add its bias (known from: bias=False)": (
        lambda x, weight, bias, eps: layer_norm(x, weight, bias * 0, eps)
    ),
    "LayerNorm gain and bias dropped: LayerNorm has no parameters (known from: elementwise_affine=False)": (
        lambda x, weight, bias, eps: layer_norm(x, np.ones_like(weight), bias * 0, eps)
    ),
}
EPSILONS = {"1e-6": "JAX and Flax's default", "1e-12": "BERT", "0": "left out", "1e-3": "Keras' default"}


def epsilons(config: Config) -> Table:
    """Return every number that is known to be added to the variance, but the model's own."""
    own = f"{config.layer_norm_epsilon:g}".replace("e-0", "e-")
    numbers = EPSILONS if own == "1e-5" else EPSILONS | {"1e-5": "GPT-2"}
    return {
        f"LayerNorm epsilon {text}: {text} is added to the variance, {'GPT-2' if own == '1e-5' else 'this model'} "
        f"adds {own} (known from: {source})": {"epsilon": constant(float(text))}
        for text, source in numbers.items()
        if float(text) != config.layer_norm_epsilon
    }


def taken(*pairs: tuple[str, str]) -> dict[str, Formula]:
    """Return formulas by which LayerNorms have each other's parameters: (whose place, whose parameters)."""
    return {f"{norm}.{kind}": parameter(f"{other}.{kind}") for norm, other in pairs for kind in ("weight", "bias")}


LAYER_NORMS: Table = {text: {"layer_norm": constant(norm)} for text, norm in NORMS.items()} | {
    "LayerNorm gain and bias swapped: every LayerNorm multiplies by its bias and adds its gain "
    "(known from: weights assigned by hand)": {
        f"{norm}.{kind}": parameter(f"{norm}.{other}")
        for norm in ("ln_1", "ln_2", "ln_f")
        for kind, other in (("weight", "bias"), ("bias", "weight"))
    },
    "ln_1 and ln_2 swapped: each has the other's parameters (known from: weights assigned by hand)": taken(
        ("ln_1", "ln_2"), ("ln_2", "ln_1")
    ),
    "ln_1 in place of ln_2: ln_2 has ln_1's parameters (known from: one LayerNorm used twice)": taken(("ln_2", "ln_1")),
    "ln_2 in place of ln_1: ln_1 has ln_2's parameters (known from: weights assigned by hand)": taken(("ln_1", "ln_2")),
    "ln_1 missing: attention reads the stream as it is (known from: left out)": {"ln_1": lambda s: s["input"]},
    "ln_2 missing: the MLP reads the stream as it is (known from: left out)": {"ln_2": lambda s: s["attn.residual"]},
    "final LayerNorm missing: the output head reads the last block's output without ln_f "
    "(known from: blocks copied from the first Transformer, which has no norm behind them)": {
        "ln_f": lambda s: s["last"]
    },
    "final LayerNorm twice: ln_f is applied to its own output "
    "(known from: ln_f in the model and again before the output head)": {
        "ln_f": lambda s: s["layer_norm"](MODEL["ln_f"](s), s["ln_f.weight"], s["ln_f.bias"], s["epsilon"])
    },
    "post-norm order: LayerNorm stands behind the sum, x = ln(x + f(x)), as in GPT-1; GPT-2 has x = x + f(ln(x)) "
    "(known from: GPT-1, the first Transformer)": {
        "attn.c_attn": linear("attn.c_attn", "input"),
        "ln_1": lambda s: s["layer_norm"](
            s["input"] + s["attn.c_proj"], s["ln_1.weight"], s["ln_1.bias"], s["epsilon"]
        ),
        "mlp.c_fc": linear("mlp.c_fc", "ln_1"),
        "attn.residual": lambda s: s["ln_1"] + s["mlp.c_proj"],  # what enters ln_2, as a hook sees it
        "": lambda s: s["ln_2"],
    },
}

SCALES: dict[str, Callable[[Config, int], float]] = {  # with so many tokens
    "attention scale missing: scores are not divided by √D (known from: left out)": lambda config, T: 1.0,
    "attention scaled by C: scores are divided by √C, the whole width, in place of √D, a head's "
    "(known from: single-head code made multi-head)": lambda config, T: 1 / math.sqrt(config.n_embd),
    "attention scaled twice: scores are divided by √D twice "
    "(known from: a scale in the code and again in scaled_dot_product_attention)": lambda config, T: (
        1 / config.head_width
    ),
    "attention scaled up: scores are multiplied by √D (known from: * for /)": lambda config, T: math.sqrt(
        config.head_width
    ),
    "attention scaled by 8: scores are divided by 8, which is √D in the published models alone "
    "(known from: a constant)": lambda config, T: 1 / 8,
    "attention scaled by T: scores are divided by √T, T the number of tokens (known from: another axis's size)": (
        lambda config, T: 1 / math.sqrt(T)
    ),
    "attention scaled by H: scores are divided by √H, H the number of heads (known from: another axis's size)": (
        lambda config, T: 1 / math.sqrt(config.n_head)
    ),
}


def scales(config: Config, tokens: int) -> Table:
    """Return every wrong scale; of equal ones the first."""

    def formula(scale: Callable[[Config, int], float]) -> Formula:
        return lambda s: scale(s.config, len(s["visible"]))

    found: Table = {}
    numbers = {1 / math.sqrt(config.head_width), config.attention_scale(0)}
    for text, scale in SCALES.items():
        if (number := scale(config, tokens)) not in numbers:
            numbers.add(number)
            found[text] = {"attn.scale": formula(scale)}
    return found


SCALES_BY_LAYER: Table = {
    "attention scaled by layer: scores are divided by layer + 1 as well "
    "(known from: transformers' scale_attn_by_inverse_layer_idx, Mistral's GPT-2)": {
        "attn.scale": lambda s: 1 / math.sqrt(s.config.head_width) / (s.layer + 1)
    },
    "attention scaled as in GPT-2: scores are divided by √D, and by nothing else "
    "(known from: scale_attn_weights and scale_attn_by_inverse_layer_idx not read)": {
        "attn.scale": lambda s: 1 / math.sqrt(s.config.head_width)
    },
}

ATTENTION: Table = {
    "scale after the softmax: the weights are divided by √D, not the scores (known from: a bracket)": {
        "attn.scale": constant(1.0),
        "attn.weights": lambda s: s["softmax"](s["attn.scores"]) * s.config.attention_scale(s.layer),
    },
    "softmax over queries: the softmax runs over the queries (dim=-2), so that a query's weights do not add up to 1 "
    "(known from: softmax(dim=2), or a legacy default axis)": {
        "attn.weights": lambda s: softmax(masked(s["attn.products"], s["visible"]), axis=2)
    },
    "softmax over heads: the softmax runs over the heads (dim=1) (known from: softmax(dim=1) written for three axes)": {
        "attn.weights": lambda s: softmax(masked(s["attn.products"], s["visible"], -1e30), axis=1) * s["visible"]
    },
    "keys reshaped: keys [B, H, T, D] are reshaped to [B, H, D, T], not transposed (known from: view for transpose)": {
        "attn.products": lambda s: s["attn.q"] @ reshaped(s["attn.k"]) * s["attn.scale"]
    },
    "keys used as values: the weights are applied to the keys (known from: one name for another)": {
        "attn.v": lambda s: s["attn.k"]
    },
    "queries used as keys: queries are multiplied with themselves (known from: one name for another)": {
        "attn.k": lambda s: s["attn.q"]
    },
}


def reshaped(keys: Array) -> Array:
    """[B, H, T, D] → [B, H, D, T], each number in its place of the memory."""
    return keys.reshape(*keys.shape[:2], *keys.shape[:1:-1])


def viewed(columns: str) -> Formula:
    """Return the formula of heads [B, H, T, D] that are a reshape of the columns [B, T, C]."""
    return lambda s: s[columns].reshape(s[columns].shape[0], s.config.n_head, s[columns].shape[1], -1)


def strided(columns: str) -> Formula:
    """Return the formula of heads of which each has every H-th of the columns."""
    return lambda s: s[columns].reshape(*s[columns].shape[:2], -1, s.config.n_head).transpose(0, 3, 1, 2)


def interleaved(s: Scope) -> list[Array]:
    """Return queries, keys and values, each of which is a third of every head's columns."""
    x = s["attn.c_attn"]
    by_head = x.reshape(*x.shape[:2], s.config.n_head, 3, -1)
    return [by_head[..., number, :].reshape(*x.shape[:2], -1) for number in range(3)]


COLUMNS = {"q": "attn.query", "k": "attn.key", "v": "attn.value"}
VIEWED = (
    "[B, T, C] is reshaped to [B, H, T, D] at once; it has to become [B, T, H, D] and then be transposed "
    "(known from: view(B, H, T, D))"
)
STRIDED = {f"attn.{letter}": strided(columns) for letter, columns in COLUMNS.items()}
HEADS: Table = {
    f"heads split without transpose: queries, keys and values: {VIEWED}": {
        f"attn.{letter}": viewed(columns) for letter, columns in COLUMNS.items()
    },
    f"queries split without transpose: the queries alone: {VIEWED}": {"attn.q": viewed("attn.query")},
    f"keys split without transpose: the keys alone: {VIEWED}": {"attn.k": viewed("attn.key")},
    f"values split without transpose: the values alone: {VIEWED}": {"attn.v": viewed("attn.value")},
    "heads merged without transpose: [B, H, T, D] is reshaped to [B, T, C] at once; it has to be transposed to "
    "[B, T, H, D] first (known from: view after attention, contiguous() without transpose(1, 2))": {
        "attn.merged": lambda s: s["attn.heads"].reshape(s["attn.query"].shape)
    },
    "heads split as [D, H]: a head has every H-th column, not D columns side by side "
    "(known from: view(B, T, D, H))": STRIDED,
    "heads split and merged as [D, H]: a head has every H-th column, and is put back there "
    "(known from: einops' (d h) for (h d))": STRIDED
    | {"attn.merged": lambda s: s["attn.heads"].transpose(0, 2, 3, 1).reshape(s["attn.query"].shape)},
    "heads interleaved: c_attn's 3C columns are split into heads first and into q, k, v within each; in GPT-2 q, k, v "
    "come first (known from: GPT-NeoX, BLOOM, Megatron)": {"attn.thirds": interleaved},
}
THIRDS: Table = {
    f"q, k, v read as {', '.join(order)}: c_attn's columns are queries, keys, values in this order, and were taken as "
    f"{', '.join(order)} (known from: unpacking c_attn.chunk(3))": {
        COLUMNS[letter]: BLOCK[columns]
        for letter, columns in zip(order, COLUMNS.values(), strict=True)
        if COLUMNS[letter] != columns
    }
    for order in permutations("qkv")
    if order != ("q", "k", "v")
}


def triangle(s: Scope, diagonal: int = 0) -> NDArray[np.bool_]:
    """Return [T, T], true up to that diagonal."""
    return np.tri(len(s["visible"]), k=diagonal, dtype=bool)


def seen(s: Scope, visible: NDArray[np.bool_], hidden: float = -1e30) -> Array:
    """Return scores hidden by a number: by a large one a query that sees nothing looks at all keys alike."""
    return masked(s["attn.products"], visible, hidden)


MASKS: Table = {
    "causal mask missing: every token sees those that follow it (known from: is_causal left out, BERT's attention)": {
        "attn.scores": lambda s: seen(s, np.ones_like(triangle(s)))
    },
    "mask hides the own token: a token sees those before it, but not itself (known from: triu(diagonal=0))": {
        "attn.scores": lambda s: seen(s, triangle(s, -1))
    },
    "mask shows the next token: a token sees itself, those before it and the next one (known from: triu(diagonal=2))": {
        "attn.scores": lambda s: seen(s, triangle(s, 1))
    },
    "mask transposed: a token sees itself and those that follow it (known from: triu for tril)": {
        "attn.scores": lambda s: seen(s, triangle(s).T)
    },
    "mask of -1e4: hidden scores get −10000 added and still take part "
    "(known from: TensorFlow's GPT-2 and early transformers; too little in low precision or beside large scores)": {
        "attn.scores": lambda s: s["attn.products"] + np.where(s["visible"], 0, -1e4).astype(np.float32)
    },
    "mask of 0: hidden scores are 0 and still take part "
    "(known from: scores multiplied by the mask, masked_fill with -1e-9 for -1e9)": {
        "attn.scores": lambda s: seen(s, s["visible"], 0.0)
    },
    "mask after the softmax: hidden weights are set to 0 and the others not divided by their sum "
    "(known from: weights multiplied by the mask)": {
        "attn.scores": lambda s: s["attn.products"],
        "attn.weights": lambda s: s["softmax"](s["attn.products"]) * s["visible"],
    },
}


def windows(tokens: int) -> Table:
    """Return sliding windows of 2, 4, 8, … tokens, as long as they hide something."""

    def formula(width: int) -> Formula:
        return lambda s: seen(s, s["visible"] & ~triangle(s, -width))

    return {
        f"sliding window of {width}: a token sees itself and the {width - 1} before it "
        "(known from: GPT-Neo's and Mistral's local attention)": {"attn.scores": formula(width)}
        for width in (2**power for power in range(1, tokens.bit_length()))
        if width < tokens
    }


def sums(kind: str, equation: str, source: str, form: Callable[[Array, Array, Array], Array]) -> Table:
    """Return another sum behind attention, behind the MLP and behind both: form(x, ln(x), f(ln(x)))."""
    attention: dict[str, Formula] = {"attn.residual": lambda s: form(s["input"], s["ln_1"], s["attn.c_proj"])}
    mlp: dict[str, Formula] = {"": lambda s: form(s["attn.residual"], s["ln_2"], s["mlp.c_proj"])}
    known = f"(known from: {source})"
    return {
        f"attention residual {kind}: {equation.format(f='attn', ln='ln_1')} {known}": attention,
        f"MLP residual {kind}: {equation.format(f='mlp', ln='ln_2')} {known}": mlp,
        f"both residuals {kind}: {equation.format(f='f', ln='ln')}, f attention and MLP {known}": attention | mlp,
    }


RESIDUALS: Table = {
    **sums("missing", "x = {f}({ln}(x)), nothing is added", "left out", lambda x, normed, f: f),
    **sums("doubled", "x = 2 x + {f}({ln}(x))", "added in two places", lambda x, normed, f: x + x + f),
    **sums(
        "from behind the norm",
        "x = {ln}(x) + {f}({ln}(x))",
        "BERT, BLOOM's apply_residual_connection_post_layernorm",
        lambda x, normed, f: normed + f,
    ),
    "attention added twice: x = x + 2 attn(ln_1(x)) (known from: added in two places)": {
        "attn.residual": lambda s: s["input"] + s["attn.c_proj"] * 2
    },
    "MLP added twice: x = x + 2 mlp(ln_2(x)) (known from: added in two places)": {
        "": lambda s: s["attn.residual"] + s["mlp.c_proj"] * 2
    },
    "attention missing: x stays as it is, the MLP alone is added (known from: left out)": {
        "attn.residual": lambda s: s["input"]
    },
    "MLP missing: attention alone is added to x (known from: left out)": {"": lambda s: s["attn.residual"]},
    "MLP residual from the block's input: the MLP's output is added to what entered the block, without attention's "
    "(known from: the shortcut saved once)": {"": lambda s: s["input"] + s["mlp.c_proj"]},
    "parallel block: x = x + attn(ln_1(x)) + mlp(ln_2(x)), the MLP does not see attention "
    "(known from: GPT-NeoX's use_parallel_residual)": {"ln_2": normalised("ln_2", "input")},
    "parallel block with one norm: x = x + attn(ln_1(x)) + mlp(ln_1(x)) (known from: GPT-J)": {
        "mlp.c_fc": linear("mlp.c_fc", "ln_1")
    },
}


def changed(name: str, change: Callable[[Array], Array]) -> Formula:
    """Return the formula of a tensor that was changed on its way."""
    return lambda s: change(s.tensor(name))


def without_third(number: int) -> Callable[[Array], Array]:
    """Return what makes a bias [3C] 0 for queries, keys or values."""
    return lambda bias: bias * (np.arange(len(bias)) // (len(bias) // 3) != number)


MAPS = {f"{part}.bias": part for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
ATTENDING = "attn.c_attn.bias"
BIASES: Table = {
    "c_attn bias dropped: queries, keys and values have no bias (known from: qkv_bias=False)": {
        ATTENDING: changed(ATTENDING, lambda x: x * 0)
    },
    "all biases dropped: no linear map has a bias (known from: bias=False)": {
        bias: changed(bias, lambda x: x * 0) for bias in MAPS
    },
    "query bias dropped: the queries have no bias (known from: a name that was not found)": {
        ATTENDING: changed(ATTENDING, without_third(0))
    },
    "key bias dropped: the keys have no bias: the softmax cancels it, so that no output ever shows it "
    "(known from: OpenAI's Whisper)": {ATTENDING: changed(ATTENDING, without_third(1))},
    "value bias dropped: the values have no bias (known from: a name that was not found)": {
        ATTENDING: changed(ATTENDING, without_third(2))
    },
    **{
        f"{part} bias dropped: {part} has no bias (known from: bias=False in one Linear)": {
            bias: changed(bias, lambda x: x * 0)
        }
        for bias, part in MAPS.items()
        if bias != ATTENDING
    },
    **{
        f"{part} bias added twice: {part}'s bias is added in two places (known from: a Linear's, and again by hand)": {
            bias: changed(bias, lambda x: x * 2)
        }
        for bias, part in MAPS.items()
    },
}
TRANSPOSED: Table = {
    "attn.c_proj transposed: the square attn.c_proj.weight was loaded transposed; its shape does not tell "
    "(known from: Conv1D is [in, out], Linear [out, in])": {
        "attn.c_proj.weight": changed("attn.c_proj.weight", np.transpose)
    },
    "q, k, v weights transposed: the square weights of queries, keys and values were loaded transposed "
    "(known from: Conv1D is [in, out], Linear [out, in])": {
        "attn.c_attn.weight": changed(
            "attn.c_attn.weight", lambda x: np.hstack([third.T for third in np.split(x, 3, axis=1)])
        )
    },
}
