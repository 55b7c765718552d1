"""Known mistakes in how a block computes: activation, LayerNorm, attention, heads, masks, residuals, precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..parameters import Array
from .arithmetic import rounded
from .mistake import Change, Mistake, replaced
from .textbook import Formula, Scope, gelu_erf, masked, softmax


def activations() -> Iterator[Mistake]:
    """Of the MLP."""
    for name, explanation, source, function in (
        ("erf GELU", "the exact form of GELU; GPT-2 has the tanh form", "nanoGPT, torch.nn.GELU()", gelu_erf),
        (
            "quick GELU",
            "x · sigmoid(1.702 x) in place of GPT-2's tanh form of GELU",
            "CLIP's QuickGELU",
            lambda x: x / (np.exp(x * -1.702) + 1),
        ),
        (
            "ReLU",
            "max(x, 0) in place of GELU",
            "the first Transformer, GPT-2 written from memory",
            lambda x: x * (x > 0),
        ),
    ):
        yield Mistake(name, explanation, source, replaced({"activation": lambda s, f=function: f}))  # type: ignore[misc]


def layer_norms() -> Iterator[Mistake]:
    """Epsilon, variance, order."""
    for text, epsilon in (("1e-6", 1e-6), ("1e-12", 1e-12), ("0", 0.0), ("1e-3", 1e-3)):
        yield Mistake(
            f"LayerNorm epsilon {text}",
            f"{text} is added to the variance, GPT-2 adds 1e-5",
            {"1e-6": "JAX and Flax's default", "1e-12": "BERT", "1e-3": "Keras' default"}.get(text, "left out"),
            replaced({"epsilon": lambda s, e=epsilon: e}),  # type: ignore[misc]
        )

    def unbiased(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred * centred).sum(axis=-1, keepdims=True) / max(1, x.shape[-1] - 1)
        return centred / np.sqrt(variance + epsilon) * weight + bias

    def outside(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / (np.sqrt((centred * centred).mean(axis=-1, keepdims=True)) + epsilon) * weight + bias

    yield Mistake(
        "unbiased variance",
        "LayerNorm's variance is divided by C − 1, not by C",
        "torch.var's and torch.std's default",
        replaced({"layer_norm": lambda s: unbiased}),
    )
    yield Mistake(
        "epsilon outside the root",
        "LayerNorm divides by √variance + epsilon, not by √(variance + epsilon)",
        "the annotated Transformer",
        replaced({"layer_norm": lambda s: outside}),
    )
    swapped: dict[str, Formula] = {}
    for norm in ("ln_1", "ln_2", "ln_f"):
        swapped |= {f"{norm}.weight": parameter_of(f"{norm}.bias"), f"{norm}.bias": parameter_of(f"{norm}.weight")}
    yield Mistake(
        "LayerNorm gain and bias swapped",
        "every LayerNorm multiplies by its bias and adds its gain",
        "weights assigned by hand",
        replaced(swapped),
    )
    yield Mistake(
        "final LayerNorm missing",
        "the output head reads the last block's output without ln_f",
        "blocks copied from the first Transformer, which has no norm behind them",
        replaced({"ln_f": lambda s: s["last"]}),
    )
    yield Mistake(
        "post-norm order",
        "LayerNorm stands behind the sum, x = ln(x + f(x)), as in GPT-1; GPT-2 has x = x + f(ln(x))",
        "GPT-1, the first Transformer",
        replaced(
            {
                "attn.c_attn": lambda s: s["input"] @ s["attn.c_attn.weight"] + s["attn.c_attn.bias"],
                "ln_1": lambda s: normed(s, "ln_1", s["input"] + s["attn.c_proj"]),
                "mlp.c_fc": lambda s: s["ln_1"] @ s["mlp.c_fc.weight"] + s["mlp.c_fc.bias"],
                "attn.residual": lambda s: s["ln_1"] + s["mlp.c_proj"],  # what enters ln_2, as a hook sees it
                "ln_2": lambda s: normed(s, "ln_2", s["attn.residual"]),
                "": lambda s: s["ln_2"],
            }
        ),
    )


def normed(s: Scope, name: str, x: Array) -> Array:
    """The norm of that name, of x."""
    normal: Array = s["layer_norm"](x, s[f"{name}.weight"], s[f"{name}.bias"], s["epsilon"])
    return normal


def parameter_of(name: str) -> Formula:
    """Another tensor in a tensor's place."""
    return lambda s: s.tensor(name)


def attention() -> Iterator[Mistake]:
    """Scale and the softmax's axis."""
    scales: tuple[tuple[str, str, str, Callable[[Scope], float]], ...] = (
        ("attention scale missing", "scores are not divided by √D", "left out", lambda s: 1.0),
        (
            "attention scaled by C",
            "scores are divided by √C, the whole width, in place of √D, a head's",
            "single-head code made multi-head",
            lambda s: 1 / math.sqrt(s.config.n_embd),
        ),
        (
            "attention scaled twice",
            "scores are divided by √D twice",
            "a scale in the code and again in scaled_dot_product_attention",
            lambda s: 1 / s.config.head_width,
        ),
        (
            "attention scaled by layer",
            "scores are divided by layer + 1 as well",
            "transformers' scale_attn_by_inverse_layer_idx, Mistral's GPT-2",
            lambda s: 1 / math.sqrt(s.config.head_width) / (s.layer + 1),
        ),
    )
    for name, explanation, source, scale in scales:
        yield Mistake(name, explanation, source, replaced({"attn.scale": scale}))
    yield Mistake(
        "softmax over queries",
        "the softmax runs over the queries (dim=-2), so that a query's weights do not add up to 1",
        "softmax(dim=2), or a legacy default axis",
        replaced({"attn.weights": lambda s: softmax(masked(s["attn.products"], s["visible"]), axis=2)}),
    )
    yield Mistake(
        "softmax over heads",
        "the softmax runs over the heads (dim=1)",
        "softmax(dim=1) written for three axes",
        replaced(
            {"attn.weights": lambda s: softmax(masked(s["attn.products"], s["visible"], -1e30), 1) * s["visible"]}
        ),
    )


def heads(config: Config) -> Iterator[Mistake]:
    """How C columns become heads."""

    def viewed(s: Scope, x: Array) -> Array:
        return x.reshape(x.shape[0], s.config.n_head, x.shape[1], -1)

    parts = {
        "attn.q": lambda s: viewed(s, s["attn.query"]),
        "attn.k": lambda s: viewed(s, s["attn.key"]),
        "attn.v": lambda s: viewed(s, s["attn.value"]),
    }
    shape = "[B, T, C] is reshaped to [B, H, T, D] at once; it has to become [B, T, H, D] and then be transposed"
    yield Mistake(
        "heads split without transpose", f"queries, keys and values: {shape}", "view(B, H, T, D)", replaced(parts)
    )
    for name, word in (("q", "queries"), ("k", "keys"), ("v", "values")):
        yield Mistake(
            f"{word} split without transpose",
            f"the {word} alone: {shape}",
            "view(B, H, T, D)",
            replaced({f"attn.{name}": parts[f"attn.{name}"]}),
        )
    yield Mistake(
        "heads merged without transpose",
        "[B, H, T, D] is reshaped to [B, T, C] at once; it has to be transposed to [B, T, H, D] first",
        "view after attention, contiguous() without transpose(1, 2)",
        replaced({"attn.merged": lambda s: s["attn.heads"].reshape(s["attn.query"].shape)}),
    )

    def interleaved(s: Scope) -> list[Array]:
        x = s["attn.c_attn"]
        by_head = x.reshape(*x.shape[:2], s.config.n_head, 3, -1)
        return [by_head[..., third, :].reshape(*x.shape[:2], -1) for third in range(3)]

    yield Mistake(
        "heads interleaved",
        "c_attn's 3C columns are split into heads first and into q, k, v within each; in GPT-2 q, k, v come first",
        "GPT-NeoX, BLOOM, Megatron",
        replaced({"attn.thirds": interleaved}),
    )
    for order in permutations("qkv"):
        if order != ("q", "k", "v"):
            names = {"q": "attn.query", "k": "attn.key", "v": "attn.value"}
            change: dict[str, Formula] = {
                names[letter]: (lambda s, third=third: s["attn.thirds"][third])  # type: ignore[misc]
                for third, letter in enumerate(order)
            }
            yield Mistake(
                f"q, k, v read as {', '.join(order)}",
                f"c_attn's columns are queries, keys, values in this order, and were taken as {', '.join(order)}",
                "unpacking c_attn.chunk(3)",
                replaced(change),
            )
    for n_head in range(1, config.n_embd + 1):
        if config.n_embd % n_head == 0 and n_head != config.n_head:
            note = ", which is n_layer" if n_head == config.n_layer else ""
            yield Mistake(
                f"n_head {n_head}",
                f"{n_head} heads{note}; the model has {config.n_head}, and no shape of a weight tells",
                "n_layer taken for n_head, another size's configuration",
                lambda book, n=n_head: replace(book, config=replace(book.config, n_head=n)),  # type: ignore[misc]
            )


def masks() -> Iterator[Mistake]:
    """Who sees whom."""

    def hidden(visible: Callable[[int], NDArray[np.bool_]]) -> Change:
        """Scores hidden by a large number: a query that sees nothing looks at all alike, as in PyTorch."""
        return replaced({"attn.scores": lambda s: masked(s["attn.products"], visible(len(s["visible"])), -1e30)})

    yield Mistake(
        "causal mask missing",
        "every token sees those that follow it",
        "is_causal left out, BERT's attention",
        hidden(lambda T: np.ones((T, T), bool)),
    )
    yield Mistake(
        "mask hides the own token",
        "a token sees those before it, but not itself",
        "triu(diagonal=0)",
        hidden(lambda T: np.tri(T, T, -1, dtype=bool)),
    )
    yield Mistake(
        "mask shows the next token",
        "a token sees itself, those before it and the next one",
        "triu(diagonal=2)",
        hidden(lambda T: np.tri(T, T, 1, dtype=bool)),
    )
    yield Mistake(
        "mask transposed",
        "a token sees itself and those that follow it",
        "triu for tril",
        hidden(lambda T: np.tri(T, dtype=bool).T),
    )
    yield Mistake(
        "mask of -1e4",
        "hidden scores get −10000 added and still take part",
        "TensorFlow's GPT-2 and early transformers; too little in low precision or beside large scores",
        replaced({"attn.scores": lambda s: s["attn.products"] + np.where(s["visible"], 0, -1e4).astype(np.float32)}),
    )


def residuals() -> Iterator[Mistake]:
    """The stream that is added to."""
    alone: Formula = lambda s: s["attn.c_proj"]  # noqa: E731
    mlp: Formula = lambda s: s["mlp.c_proj"]  # noqa: E731
    yield Mistake(
        "attention residual missing",
        "x = attn(ln_1(x)), nothing is added",
        "left out",
        replaced({"attn.residual": alone}),
    )
    yield Mistake("MLP residual missing", "x = mlp(ln_2(x)), nothing is added", "left out", replaced({"": mlp}))
    yield Mistake(
        "both residuals missing",
        "neither attention nor MLP is added to the stream",
        "left out",
        replaced({"attn.residual": alone, "": mlp}),
    )


def precisions() -> Iterator[Mistake]:
    """Where half precision does not suffice."""
    for dtype in ("float16", "bfloat16"):

        def coarse(x: Array, dtype: str = dtype) -> Array:
            return rounded(x, dtype).astype(x.dtype)

        def norm(
            x: Array, weight: Array, bias: Array, epsilon: float, coarse: Callable[[Array], Array] = coarse
        ) -> Array:
            mean = coarse(x.mean(axis=-1, keepdims=True))
            variance = coarse(x.var(axis=-1, keepdims=True))
            return (x - mean) / np.sqrt(variance + epsilon) * weight + bias

        yield Mistake(
            f"softmax in {dtype}",
            f"scores are rounded to {dtype} before the softmax, and its result after it",
            "autocast left on around attention",
            replaced({"softmax": lambda s, coarse=coarse: lambda x: coarse(softmax(coarse(x)))}, flips=True),  # type: ignore[misc]
        )
        yield Mistake(
            f"LayerNorm in {dtype}",
            f"mean and variance are rounded to {dtype}",
            "statistics kept in the activations' dtype",
            replaced({"layer_norm": lambda s, norm=norm: norm}, flips=True),  # type: ignore[misc]
        )
