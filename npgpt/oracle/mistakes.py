"""The catalogue of known mistakes: each is a line of a report, and the formulas of textbook.py that it replaces.

To add a mistake, add a row to a table: "name: explanation (known from: source)", as a report prints it, and by the name
of each stage that is wrong the formula that makes it so. Rows are in the order in which reports have them. A mistake
that depends on the model's sizes (n_head, the order of layers) has an entry for every size that it can have.

Shapes as in textbook.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, permutations

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..parameters import Array
from .arithmetic import rounded
from .textbook import BLOCK, MODEL, Formula, Scope, Textbook, gelu_erf, linear, log_softmax, masked, parameter, softmax

Change = Callable[[Textbook], Textbook]
Norm = Callable[[Array, Array, Array, float], Array]
Table = dict[str, dict[str, Formula]]


@dataclass(frozen=True)
class Mistake:
    """An entry of the catalogue: what is wrong, in a name and a sentence, where it is known from, how to reproduce it,
    and which stages it replaces; "layers" is the textbook's own field.
    """

    name: str
    explanation: str
    source: str
    change: Change
    first: int = 0  # blocks below this one are not touched
    stages: tuple[str, ...] = ()
    layer: int | None = None  # the only block that is touched


def catalogue(config: Config, tokens: int, chunks: Sequence[int] = (), padded: bool = False) -> list[Mistake]:
    """Return every entry that can be made in a model of this shape with so many tokens.

    chunks: how many tokens were run at a time with a cache, where that is known; padded: on the left.
    """
    possible = {
        "positions off by one": tokens + 1 <= config.n_positions,
        "positions off by two": tokens + 2 <= config.n_positions,
        "layers reversed": config.n_layer > 2,
        "layers sorted as text": config.n_layer > 10,
        "layer 0 missing": config.n_layer > 1,
        "BOS prepended": tokens + 1 <= config.n_positions,
        "last token missing": tokens > 1,
        "logits of the previous position": tokens > 1,
        "vocabulary padded and not masked": config.vocab_size % 64 > 0,
        "output head tied": not config.tie_word_embeddings,
        "positions count the padding": padded,
    }
    found = (
        *entries(ACTIVATIONS | LAYER_NORMS | ATTENTION | HEADS | THIRDS),
        *head_counts(config),
        *entries(MASKS | RESIDUALS | LOADING | EMBEDDINGS),
        *orders(config.n_layer),
        *entries(half_precision("float16") | half_precision("bfloat16"), flips=True),
        *entries(outputs(config) | (caches(chunks) if len(chunks) > 1 else {})),
    )
    return [entry for entry in found if possible.get(entry.name, True)]


def entries(table: Table, flips: bool = False) -> Iterator[Mistake]:
    """Yield the mistakes of a table; flips: their formulas round within."""
    for text, formulas in table.items():
        yield entry(text, partial(replaced, formulas, flips), tuple(formulas))


def replaced(formulas: Mapping[str, Formula], flips: bool, book: Textbook) -> Textbook:
    """Return the book with these formulas."""
    return replace(book.altered(formulas), flips=book.flips or flips)


def entry(text: str, change: Change, stages: tuple[str, ...], first: int = 0) -> Mistake:
    """Return the mistake that a row's text describes."""
    name, _, rest = text.partition(": ")
    explanation, _, source = rest.removesuffix(")").partition(" (known from: ")
    return Mistake(name, explanation, source, change, first, stages)


ACTIVATIONS: Table = {
    "erf GELU: the exact form of GELU; GPT-2 has the tanh form (known from: nanoGPT, torch.nn.GELU())": {
        "mlp.act": lambda s: gelu_erf(s["mlp.c_fc"])
    },
    "quick GELU: x · sigmoid(1.702 x) in place of GPT-2's tanh form of GELU (known from: CLIP's QuickGELU)": {
        "mlp.act": lambda s: s["mlp.c_fc"] / (np.exp(s["mlp.c_fc"] * -1.702) + 1)
    },
    "ReLU: max(x, 0) in place of GELU (known from: the first Transformer, GPT-2 written from memory)": {
        "mlp.act": lambda s: s["mlp.c_fc"] * (s["mlp.c_fc"] > 0)
    },
}


def layer_norm_by(root: Callable[[Array, float], Array]) -> Norm:
    """Return a LayerNorm that divides by root(squares of the centred x, epsilon)."""

    def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / root(centred * centred, epsilon) * weight + bias

    return layer_norm


unbiased = layer_norm_by(lambda x, epsilon: np.sqrt(x.sum(-1, keepdims=True) / max(1, x.shape[-1] - 1) + epsilon))
outside = layer_norm_by(lambda x, epsilon: np.sqrt(x.mean(axis=-1, keepdims=True)) + epsilon)

LAYER_NORMS: Table = {
    "LayerNorm epsilon 1e-6: 1e-6 is added to the variance, GPT-2 adds 1e-5 (known from: JAX and Flax's default)": {
        "epsilon": lambda s: 1e-6
    },
    "LayerNorm epsilon 1e-12: 1e-12 is added to the variance, GPT-2 adds 1e-5 (known from: BERT)": {
        "epsilon": lambda s: 1e-12
    },
    "LayerNorm epsilon 0: 0 is added to the variance, GPT-2 adds 1e-5 (known from: left out)": {
        "epsilon": lambda s: 0.0
    },
    "LayerNorm epsilon 1e-3: 1e-3 is added to the variance, GPT-2 adds 1e-5 (known from: Keras' default)": {
        "epsilon": lambda s: 1e-3
    },
    "unbiased variance: LayerNorm's variance is divided by C − 1, not by C "
    "(known from: torch.var's and torch.std's default)": {"layer_norm": lambda s: unbiased},
    "epsilon outside the root: LayerNorm divides by √variance + epsilon, not by √(variance + epsilon) "
    "(known from: the annotated Transformer)": {"layer_norm": lambda s: outside},
    "LayerNorm gain and bias swapped: every LayerNorm multiplies by its bias and adds its gain "
    "(known from: weights assigned by hand)": {
        f"{norm}.{kind}": parameter(f"{norm}.{other}")
        for norm in ("ln_1", "ln_2", "ln_f")
        for kind, other in (("weight", "bias"), ("bias", "weight"))
    },
    "final LayerNorm missing: the output head reads the last block's output without ln_f "
    "(known from: blocks copied from the first Transformer, which has no norm behind them)": {
        "ln_f": lambda s: s["last"]
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

ATTENTION: Table = {
    "attention scale missing: scores are not divided by √D (known from: left out)": {"attn.scale": lambda s: 1.0},
    "attention scaled by C: scores are divided by √C, the whole width, in place of √D, a head's "
    "(known from: single-head code made multi-head)": {"attn.scale": lambda s: 1 / math.sqrt(s.config.n_embd)},
    "attention scaled twice: scores are divided by √D twice "
    "(known from: a scale in the code and again in scaled_dot_product_attention)": {
        "attn.scale": lambda s: 1 / s.config.head_width
    },
    "attention scaled by layer: scores are divided by layer + 1 as well "
    "(known from: transformers' scale_attn_by_inverse_layer_idx, Mistral's GPT-2)": {
        "attn.scale": lambda s: 1 / math.sqrt(s.config.head_width) / (s.layer + 1)
    },
    "softmax over queries: the softmax runs over the queries (dim=-2), so that a query's weights do not add up to 1 "
    "(known from: softmax(dim=2), or a legacy default axis)": {
        "attn.weights": lambda s: softmax(masked(s["attn.products"], s["visible"]), axis=2)
    },
    "softmax over heads: the softmax runs over the heads (dim=1) (known from: softmax(dim=1) written for three axes)": {
        "attn.weights": lambda s: softmax(masked(s["attn.products"], s["visible"], -1e30), axis=1) * s["visible"]
    },
}


def viewed(columns: str) -> Formula:
    """Return the formula of heads [B, H, T, D] that are a reshape of the columns [B, T, C]."""
    return lambda s: s[columns].reshape(s[columns].shape[0], s.config.n_head, s[columns].shape[1], -1)


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
    "heads interleaved: c_attn's 3C columns are split into heads first and into q, k, v within each; in GPT-2 q, k, v "
    "come first (known from: GPT-NeoX, BLOOM, Megatron)": {"attn.thirds": interleaved},
}
THIRDS: Table = {
    f"q, k, v read as {', '.join(order)}: c_attn's columns are queries, keys, values in this order, and were taken as "
    f"{', '.join(order)} (known from: unpacking c_attn.chunk(3))": {
        COLUMNS[letter]: BLOCK[columns] for letter, columns in zip(order, COLUMNS.values(), strict=True)
    }
    for order in permutations("qkv")
    if order != ("q", "k", "v")
}


def head_counts(config: Config) -> Iterator[Mistake]:
    """Yield every number of heads that the width allows, but the model's own."""
    for n_head in range(1, config.n_embd + 1):
        if config.n_embd % n_head == 0 and n_head != config.n_head:
            note = ", which is n_layer" if n_head == config.n_layer else ""
            yield entry(
                f"n_head {n_head}: {n_head} heads{note}; the model has {config.n_head}, and no shape of a weight tells "
                "(known from: n_layer taken for n_head, another size's configuration)",
                partial(replace, config=replace(config, n_head=n_head)),
                ("attn.q", "attn.k", "attn.v", "attn.scale"),
            )


def triangle(s: Scope, diagonal: int = 0) -> NDArray[np.bool_]:
    """Return [T, T], true up to that diagonal."""
    return np.tri(len(s["visible"]), k=diagonal, dtype=bool)


def seen(s: Scope, visible: NDArray[np.bool_]) -> Array:
    """Return scores hidden by a large number: a query that sees nothing looks at all keys alike, as in PyTorch."""
    return masked(s["attn.products"], visible, -1e30)


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
}

RESIDUALS: Table = {
    "attention residual missing: x = attn(ln_1(x)), nothing is added (known from: left out)": {
        "attn.residual": lambda s: s["attn.c_proj"]
    },
    "MLP residual missing: x = mlp(ln_2(x)), nothing is added (known from: left out)": {"": lambda s: s["mlp.c_proj"]},
    "both residuals missing: neither attention nor MLP is added to the stream (known from: left out)": {
        "attn.residual": lambda s: s["attn.c_proj"],
        "": lambda s: s["mlp.c_proj"],
    },
}


def without_key(s: Scope) -> Array:
    """Return c_attn's bias, 0 for the keys."""
    bias = s.tensor("attn.c_attn.bias").copy()
    bias[s.config.n_embd : 2 * s.config.n_embd] = 0
    return bias


def changed(name: str, change: Callable[[Array], Array]) -> Formula:
    """Return the formula of a tensor that was changed on its way."""
    return lambda s: change(s.tensor(name))


def coarse(x: Array, dtype: str) -> Array:
    """Return x rounded to dtype, in the dtype that it has."""
    return rounded(x, dtype).astype(x.dtype)


LOADING: Table = {
    "c_attn bias dropped: queries, keys and values have no bias (known from: qkv_bias=False)": {
        "attn.c_attn.bias": lambda s: s.tensor("attn.c_attn.bias") * 0
    },
    "all biases dropped: no linear map has a bias (known from: bias=False)": {
        f"{part}.bias": changed(f"{part}.bias", lambda x: x * 0)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    },
    "key bias dropped: the keys have no bias: the softmax cancels it, so that no output ever shows it "
    "(known from: OpenAI's Whisper)": {"attn.c_attn.bias": without_key},
    "attn.c_proj transposed: the square attn.c_proj.weight was loaded transposed; its shape does not tell "
    "(known from: Conv1D is [in, out], Linear [out, in])": {
        "attn.c_proj.weight": lambda s: s.tensor("attn.c_proj.weight").T
    },
    "q, k, v weights transposed: the square weights of queries, keys and values were loaded transposed "
    "(known from: Conv1D is [in, out], Linear [out, in])": {
        "attn.c_attn.weight": lambda s: np.hstack([x.T for x in np.split(s.tensor("attn.c_attn.weight"), 3, axis=1)])
    },
} | {
    f"weights rounded to {dtype}: every weight has been through {dtype} (known from: a checkpoint stored in it)": {
        name: changed(name, partial(coarse, dtype=dtype))
        for name in (*BLOCK, *MODEL)
        if name.endswith((".weight", ".bias")) and name != "lm_head.weight"
    }
    for dtype in ("float16", "bfloat16")
}


def counted(s: Scope) -> NDArray[np.intp]:
    """Return the positions 0, 1, 2, … [T]."""
    return np.arange(s["token_ids"].shape[1])


EMBEDDINGS: Table = {
    "positions off by one: the first token has position 1, not 0 (known from: counting from 1)": {
        "positions": lambda s: counted(s) + 1
    },
    "positions off by two: the first token has position 2, not 0 (known from: OPT's offset)": {
        "positions": lambda s: counted(s) + 2
    },
    "positions all zero: every token has position 0 (known from: a cached loop that never counts)": {
        "positions": lambda s: counted(s) * 0
    },
    "positions missing: wpe is not added (known from: left out)": {
        "wpe": lambda s: s["wpe.weight"][s["positions"]][None] * 0
    },
    "embedding scaled: wte's rows are multiplied by √C (known from: the first Transformer, Gemma)": {
        "wte": lambda s: s["wte.weight"][s["token_ids"]] * math.sqrt(s.config.n_embd)
    },
}


def orders(n_layer: int) -> Iterator[Mistake]:
    """Yield the blocks in every wrong order."""
    usual = list(range(n_layer))
    by_str = sorted(usual, key=str)
    found = {
        "layers reversed: the last block comes first (known from: a list read from its end)": usual[::-1],
        "layers sorted as text: blocks stand in the order 0, 1, 10, 11, 2, … (known from: sorted() over names)": by_str,
    }
    for i, j in pairwise(usual):
        before, after = usual[:i], usual[j + 1 :]
        swapped, repeated = [*before, j, i, *after], [*before, i, i, *after]
        found |= {
            f"layers {i} and {j} swapped: block {j} comes before block {i} (known from: assignment by hand)": swapped,
            f"layer {i} in place of layer {j}: block {i}'s weights are in block {j}, too "
            "(known from: an index off by one)": repeated,
        }
    for i in usual:
        before, after = usual[:i], usual[i + 1 :]
        found |= {
            f"layer {i} missing: block {i} is left out (known from: a loop too short)": [*before, *after],
            f"layer {i} run twice: block {i} is applied twice (known from: a loop too long)": [*before, i, i, *after],
        }
    for text, order in found.items():
        first = next((depth for depth, layer in enumerate(order) if depth != layer), len(order))
        yield entry(text, partial(replace, layers=tuple(order)), ("layers",), min(first, n_layer - 1))


def half_precision(dtype: str) -> Table:
    """Return mistakes of what half precision does not suffice for."""

    def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
        mean = coarse(x.mean(axis=-1, keepdims=True), dtype)
        variance = coarse(x.var(axis=-1, keepdims=True), dtype)
        return (x - mean) / np.sqrt(variance + epsilon) * weight + bias

    return {
        f"softmax in {dtype}: scores are rounded to {dtype} before the softmax, and its result after it "
        "(known from: autocast left on around attention)": {
            "softmax": lambda s: lambda x: coarse(softmax(coarse(x, dtype)), dtype)
        },
        f"LayerNorm in {dtype}: mean and variance are rounded to {dtype} "
        "(known from: statistics kept in the activations' dtype)": {"layer_norm": lambda s: layer_norm},
    }


def padded_log_softmax(s: Scope) -> Array:
    """Return log-probabilities over a vocabulary filled up with logits of 0 to a multiple of 64."""
    logits = s["logits"]
    V = logits.shape[-1]
    more = np.zeros((*logits.shape[:-1], -V % 64), logits.dtype)
    return log_softmax(np.concatenate([logits, more], axis=-1))[..., :V]


def outputs(config: Config) -> Table:
    """Return mistakes that give the right numbers in the wrong place, or of another kind."""
    bos = config.vocab_size - 1 if config.vocab_size != 50304 else 50256
    return {
        f"BOS prepended: a token ({bos}, <|endoftext|>) stands before the prompt "
        "(known from: add_bos_token, a tokenizer's add_special_tokens)": {
            "token_ids": lambda s: np.insert(s.run.token_ids, 0, bos, axis=1)
        },
        "last token missing: the prompt's last token was not run (known from: ids[:-1])": {
            "token_ids": lambda s: s.run.token_ids[:, :-1]
        },
        "logits of the previous position: each position has the logits of the one before it "
        "(known from: an index of −2, targets shifted twice)": {
            "logits": lambda s: np.concatenate([s["unembedded"][:, :1], s["unembedded"][:, :-1]], axis=1)
        },
        "log-softmax given as logits: these are log-probabilities, no logits; the probabilities are the same "
        "(known from: log_softmax in the model)": {"logits": lambda s: log_softmax(s["unembedded"])},
        "vocabulary padded and not masked: the softmax runs over the rows that pad the vocabulary to a multiple of 64, "
        "too (known from: nanoGPT's and llm.c's padded wte)": {"log_probabilities": padded_log_softmax},
        "output head tied: the logits are made with wte, and the model has an output head of its own "
        "(known from: tie_word_embeddings=True)": {"lm_head.weight": lambda s: s["wte.weight"]},
        "logits centred: each position's mean is subtracted; the probabilities are the same "
        "(known from: TransformerLens's center_unembed)": {
            "logits": lambda s: s["unembedded"] - s["unembedded"].mean(axis=-1, keepdims=True)
        },
        "positions count the padding: positions begin at the padding on the left, not at the first token of the text "
        "(known from: transformers' own forward without position_ids)": {
            "positions": lambda s: counted(s) + s.run.padding
        },
    }


def caches(chunks: Sequence[int]) -> Table:
    """Return mistakes of a run in chunks, with keys and values kept."""
    ends = np.cumsum(chunks)

    def chunk(s: Scope) -> NDArray[np.intp]:
        """Return the chunk of every token [T]."""
        return np.minimum(np.searchsorted(ends, counted(s), side="right"), len(chunks) - 1)

    def later(by: int) -> Formula:
        """Return positions so much too far in every chunk but the first, within those that the model has."""
        return lambda s: np.clip(counted(s) + by * (chunk(s) > 0), 0, s.config.n_positions - 1)

    own = "(known from: a key-value cache of one's own)"
    return {
        f"cache positions one too far: later chunks begin one position too late {own}": {"positions": later(1)},
        f"cache positions one short: later chunks begin one position too early {own}": {"positions": later(-1)},
        f"cache positions never advance: every chunk's positions begin at 0 {own}": {
            "positions": lambda s: counted(s) - np.array((0, *ends[:-1]))[chunk(s)]
        },
        f"cache not extended: a chunk does not see the tokens before it {own}": {
            "visible": lambda s: (chunk(s)[:, None] == chunk(s)) & np.tri(len(chunk(s)), dtype=bool)
        },
    }
