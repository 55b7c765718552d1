"""Known mistakes in the rest of a block and its parameters. mistakes.py describes rows, textbook.py shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..config import Config
from ..parameters import Array
from .functions import gelu, gelu_erf, layer_norm
from .rows import Formulas, Table, changed, rows
from .textbook import MODEL, Formula, linear, normalised, parameter


def constant(value: Any) -> Formula:
    """Return the formula that yields this value and ignores the stages."""
    return lambda s: value


def activated(activation: Callable[[Array], Array]) -> Formulas:
    """Return the formulas that use another activation."""
    return {"mlp.act": lambda s: activation(s["mlp.c_fc"])}


ACTIVATIONS = rows(
    "erf GELU: GELU is in its exact form; GPT-2 uses the tanh form (known from: nanoGPT, torch.nn.GELU())",
    activated(gelu_erf),
    "tanh GELU: GELU is in its tanh form; this model uses the exact form (known from: GPT-2)",
    activated(gelu),
    "quick GELU: x · sigmoid(1.702 x) instead of GPT-2's tanh form of GELU (known from: CLIP's QuickGELU)",
    activated(lambda x: x / (np.exp(x * -1.702) + 1)),
    "ReLU: max(x, 0) instead of GELU (known from: the first Transformer, GPT-2 written from memory)",
    activated(lambda x: x * (x > 0)),
    "squared ReLU: max(x, 0)² instead of GELU (known from: Primer, modded-nanogpt)",
    activated(lambda x: x * x * (x > 0)),
    "SiLU: x · sigmoid(x) instead of GELU (known from: LLaMA, torch.nn.SiLU())",
    activated(lambda x: x / (np.exp(-x) + 1)),
    "activation missing: c_proj reads the output of c_fc without GELU between them (known from: an omission)",
    activated(lambda x: x),
    "GELU with 0.44715: the factor of x³ is 0.44715, not 0.044715 (known from: a missing zero)",
    activated(partial(gelu, cubic=0.44715)),
    "GELU with 0.0044715: the factor of x³ is 0.0044715, not 0.044715 (known from: an extra zero)",
    activated(partial(gelu, cubic=0.0044715)),
    "GELU with 0.044175: the factor of x³ is 0.044175, not 0.044715 (known from: two swapped digits)",
    activated(partial(gelu, cubic=0.044175)),
    "GELU without ½: x (1 + tanh(…)), which is twice GELU (known from: an omission)",
    activated(partial(gelu, half=1.0)),
    "GELU with √(2π): √(2π) instead of √(2/π) (known from: a missing slash)",
    activated(partial(gelu, root=math.sqrt(2 * math.pi))),
    "GELU before the bias: c_fc's bias is added to the output of GELU, not to its input (known from: a fused kernel)",
    {"mlp.act": lambda s: s["activation"](s["mlp.c_fc"] - s["mlp.c_fc.bias"]) + s["mlp.c_fc.bias"]},
)


def normed(norm: Callable[[Array, Array, Array, float], Array]) -> Formulas:
    """Return the formulas that use another LayerNorm, norm(x, weight, bias, epsilon)."""
    return {"layer_norm": constant(norm)}


def divided(divisor: Callable[[Array, float], Array]) -> Formulas:
    """Return the formulas of a LayerNorm that divides by divisor(the centred x, epsilon)."""

    def norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / divisor(centred, epsilon) * weight + bias

    return normed(norm)


def variance(centred: Array, correction: int = 0) -> Array:
    """Return the variance of centred rows, with C − correction as its divisor."""
    return (centred * centred).sum(axis=-1, keepdims=True) / max(1, centred.shape[-1] - correction)


def rms_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
    """Return x divided by its root mean square, with gain and bias. The mean is not subtracted."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * weight + bias


EPSILONS = {"1e-6": "default in Flax", "1e-12": "BERT", "0": "an omission", "1e-3": "default in Keras"}


def epsilons(config: Config) -> Table:
    """Return every epsilon that is in common use, except the model's own."""
    own = f"{config.layer_norm_epsilon:g}".replace("e-0", "e-")
    numbers = EPSILONS if own == "1e-5" else EPSILONS | {"1e-5": "GPT-2"}
    return {
        f"LayerNorm epsilon {text}: {text} is added to the variance, {'GPT-2' if own == '1e-5' else 'this model'} "
        f"adds {own} (known from: {source})": {"epsilon": constant(float(text))}
        for text, source in numbers.items()
        if float(text) != config.layer_norm_epsilon
    }


def taken(*pairs: tuple[str, str]) -> Formulas:
    """Return formulas that give LayerNorms other parameters, from pairs (this norm, the norm that owns them)."""
    return {f"{norm}.{kind}": parameter(f"{other}.{kind}") for norm, other in pairs for kind in ("weight", "bias")}


LAYER_NORMS = rows(
    "unbiased variance: LayerNorm divides the sum of squares by C − 1, not by C "
    "(known from: defaults of torch.var and torch.std)",
    divided(lambda x, epsilon: np.sqrt(variance(x, 1) + epsilon)),
    "epsilon outside the root: LayerNorm divides by √variance + epsilon, not by √(variance + epsilon) "
    "(known from: the annotated Transformer)",
    divided(lambda x, epsilon: np.sqrt(variance(x)) + epsilon),
    "standard deviation plus epsilon: LayerNorm divides by x.std() + epsilon, and torch's std divides by C − 1 "
    "(known from: the annotated Transformer in torch)",
    divided(lambda x, epsilon: np.sqrt(variance(x, 1)) + epsilon),
    "variance without root: LayerNorm divides by variance + epsilon, not by its square root (known from: an omission)",
    divided(lambda x, epsilon: variance(x) + epsilon),
    "LayerNorm over tokens: mean and variance are taken over tokens, not channels (known from: axis=1, BatchNorm)",
    normed(partial(layer_norm, axis=1)),
    "RMS norm: the mean is not subtracted and no bias is added (known from: LLaMA)",
    normed(lambda x, weight, bias, epsilon: rms_norm(x, weight, bias * 0, epsilon)),
    "RMS norm with bias: the mean is not subtracted, but the bias is added (known from: an omission)",
    normed(rms_norm),
    "LayerNorm gain dropped: LayerNorm does not multiply by its weight (known from: an omission)",
    normed(lambda x, weight, bias, epsilon: layer_norm(x, np.ones_like(weight), bias, epsilon)),
    "LayerNorm bias dropped: LayerNorm does not add its bias (known from: bias=False)",
    normed(lambda x, weight, bias, epsilon: layer_norm(x, weight, bias * 0, epsilon)),
    "LayerNorm gain and bias dropped: LayerNorm has no parameters (known from: elementwise_affine=False)",
    normed(lambda x, weight, bias, epsilon: layer_norm(x, np.ones_like(weight), bias * 0, epsilon)),
    "LayerNorm gain and bias swapped: every LayerNorm multiplies by its bias and adds its gain "
    "(known from: manual weight assignment)",
    {
        f"{norm}.{kind}": parameter(f"{norm}.{other}")
        for norm in ("ln_1", "ln_2", "ln_f")
        for kind, other in (("weight", "bias"), ("bias", "weight"))
    },
    "ln_1 and ln_2 swapped: each uses the parameters of the other (known from: manual weight assignment)",
    taken(("ln_1", "ln_2"), ("ln_2", "ln_1")),
    "ln_1 in place of ln_2: ln_2 uses the parameters of ln_1 (known from: one LayerNorm used twice)",
    taken(("ln_2", "ln_1")),
    "ln_2 in place of ln_1: ln_1 uses the parameters of ln_2 (known from: manual weight assignment)",
    taken(("ln_1", "ln_2")),
    "ln_1 missing: attention reads the residual stream without LayerNorm (known from: an omission)",
    {"ln_1": lambda s: s["input"]},
    "ln_2 missing: the MLP reads the residual stream without LayerNorm (known from: an omission)",
    {"ln_2": lambda s: s["attn.residual"]},
    "final LayerNorm missing: the output head reads the last block's output without ln_f "
    "(known from: the first Transformer, which has no LayerNorm after its last block)",
    {"ln_f": lambda s: s["last"]},
    "final LayerNorm twice: ln_f is applied to its own output "
    "(known from: ln_f at the end of the model and again before the output head)",
    {"ln_f": lambda s: normalised(s, "ln_f", MODEL["ln_f"](s))},
    "post-norm order: LayerNorm comes after the sum, x = ln(x + f(x)), as in GPT-1; GPT-2 has x = x + f(ln(x)) "
    "(known from: GPT-1, the first Transformer)",
    {
        "attn.c_attn": lambda s: linear(s, "attn.c_attn", s["input"]),
        "ln_1": lambda s: normalised(s, "ln_1", s["input"] + s["attn.c_proj"]),
        "mlp.c_fc": lambda s: linear(s, "mlp.c_fc", s["ln_1"]),
        "attn.residual": lambda s: s["ln_1"] + s["mlp.c_proj"],  # the input of ln_2, as a hook sees it
        "": lambda s: s["ln_2"],
    },
)


def sums(kind: str, equation: str, source: str, form: Callable[[Array, Array, Array], Array]) -> Table:
    """Return another residual sum after attention, after the MLP and after both: form(x, ln(x), f(ln(x)))."""
    attention: Formulas = {"attn.residual": lambda s: form(s["input"], s["ln_1"], s["attn.c_proj"])}
    mlp: Formulas = {"": lambda s: form(s["attn.residual"], s["ln_2"], s["mlp.c_proj"])}
    known = f"(known from: {source})"
    return {
        f"attention residual {kind}: {equation.format(f='attn', ln='ln_1')} {known}": attention,
        f"MLP residual {kind}: {equation.format(f='mlp', ln='ln_2')} {known}": mlp,
        f"both residuals {kind}: {equation.format(f='f', ln='ln')}, f = attn and f = mlp {known}": attention | mlp,
    }


RESIDUALS: Table = {
    **sums("missing", "x = {f}({ln}(x)), x is not added", "an omission", lambda x, normed, f: f),
    **sums("doubled", "x = 2 x + {f}({ln}(x))", "a sum in two places", lambda x, normed, f: x + x + f),
    **sums(
        "from after the norm",
        "x = {ln}(x) + {f}({ln}(x))",
        "BERT, apply_residual_connection_post_layernorm in BLOOM",
        lambda x, normed, f: normed + f,
    ),
    **rows(
        "attention added twice: x = x + 2 attn(ln_1(x)) (known from: a sum in two places)",
        {"attn.residual": lambda s: s["input"] + s["attn.c_proj"] * 2},
        "MLP added twice: x = x + 2 mlp(ln_2(x)) (known from: a sum in two places)",
        {"": lambda s: s["attn.residual"] + s["mlp.c_proj"] * 2},
        "attention missing: only the output of the MLP is added to x (known from: an omission)",
        {"attn.residual": lambda s: s["input"]},
        "MLP missing: only the output of attention is added to x (known from: an omission)",
        {"": lambda s: s["attn.residual"]},
        "MLP residual from the block's input: the output of the MLP is added to the block's input "
        "(known from: a shortcut saved only once)",
        {"": lambda s: s["input"] + s["mlp.c_proj"]},
        "parallel block: x = x + attn(ln_1(x)) + mlp(ln_2(x)), the MLP does not see the output of attention "
        "(known from: use_parallel_residual in GPT-NeoX)",
        {"ln_2": lambda s: normalised(s, "ln_2", s["input"])},
        "parallel block with one norm: x = x + attn(ln_1(x)) + mlp(ln_1(x)) (known from: GPT-J)",
        {"mlp.c_fc": lambda s: linear(s, "mlp.c_fc", s["ln_1"])},
    ),
}
MAPS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def biased(factor: int, *parts: str) -> Formulas:
    """Return the formulas of linear maps whose biases are multiplied by a factor."""
    return changed(lambda bias: bias * factor, *(f"{part}.bias" for part in parts))


def without(third: int) -> Formulas:
    """Return the formulas of a c_attn whose bias [3C] is 0 in one third: queries, keys or values."""
    return changed(lambda bias: bias * (np.arange(len(bias)) // (len(bias) // 3) != third), "attn.c_attn.bias")


BIASES: Table = {
    "c_attn bias dropped: queries, keys and values have no bias (known from: qkv_bias=False)": biased(0, "attn.c_attn"),
    "all biases dropped: no linear map has a bias (known from: bias=False)": biased(0, *MAPS),
    "query bias dropped: the queries have no bias (known from: a name not found in the checkpoint)": without(0),
    "key bias dropped: the keys have no bias; no output shows this, since the softmax cancels it "
    "(known from: OpenAI's Whisper)": without(1),
    "value bias dropped: the values have no bias (known from: a name not found in the checkpoint)": without(2),
    **{
        f"{part} bias dropped: {part} has no bias (known from: bias=False in one Linear layer)": biased(0, part)
        for part in MAPS[1:]
    },
    **{
        f"{part} bias added twice: the bias of {part} is added twice (known from: a Linear layer and a manual sum)": (
            biased(2, part)
        )
        for part in MAPS
    },
}
TRANSPOSED = rows(
    "attn.c_proj transposed: attn.c_proj.weight was loaded transposed; being square, it keeps its shape "
    "(known from: Conv1D is [in, out], Linear [out, in])",
    changed(np.transpose, "attn.c_proj.weight"),
    "q, k, v weights transposed: the square weight matrices of queries, keys and values were each loaded transposed "
    "(known from: Conv1D is [in, out], Linear [out, in])",
    changed(lambda x: np.hstack([third.T for third in np.split(x, 3, axis=1)]), "attn.c_attn.weight"),
)
