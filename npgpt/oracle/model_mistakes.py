"""Known mistakes around the blocks and in all weights. mistakes.py describes the rows, textbook.py the shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..parameters import Array
from .arithmetic import rounded
from .backward import is_backward
from .functions import log_softmax, softmax
from .rows import Formulas, Table, changed, rows
from .textbook import BLOCK, MODEL, Formula, Scope


def coarse(x: Array, dtype: str) -> Array:
    """Return x rounded to dtype and cast back to its own dtype."""
    return rounded(x, dtype).astype(x.dtype)


def in_int8(x: Array, axis: int, block: int = 0) -> Array:
    """Return x quantised to int8 and back, with a scale for each line along the axis or each block of such a line.

    The largest magnitude becomes 127. Scales of blocks are rounded to float16.
    """
    along = x.swapaxes(axis, -1)
    groups = along.reshape(*along.shape[:-1], -1, block or along.shape[-1])
    step = np.abs(groups).max(axis=-1, keepdims=True) / 127
    whole = np.round(groups / np.where(step > 0, step, 1))
    return (whole * (coarse(step, "float16") if block else step)).reshape(along.shape).swapaxes(axis, -1)


MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
STORED = [
    name
    for name in (*BLOCK, *MODEL)
    if name.endswith((".weight", ".bias")) and name != "lm_head.weight" and not is_backward(name)
]
ROUNDED = rows(
    "weights rounded to float16: every weight was rounded to float16 (known from: a checkpoint stored in float16)",
    changed(partial(coarse, dtype="float16"), *STORED),
    "weights rounded to bfloat16: every weight was rounded to bfloat16 (known from: a checkpoint stored in bfloat16)",
    changed(partial(coarse, dtype="bfloat16"), *STORED),
    "weights in int8 by blocks of 32: every 32 inputs share a scale, also in wte (known from: Q8_0 in GGML)",
    changed(partial(in_int8, axis=0, block=32), *MATRICES) | changed(partial(in_int8, axis=1, block=32), "wte.weight"),
    "weights in int8 by output: every output of a linear map has its own scale "
    "(known from: per-channel dynamic quantisation in torch)",
    changed(partial(in_int8, axis=0), *MATRICES),
    "weights in int8 by row: every row of a matrix has its own scale, also in wte and wpe "
    "(known from: quantising a Conv1D weight [in, out] along axis -1)",
    changed(partial(in_int8, axis=1), *MATRICES, "wte.weight", "wpe.weight"),
)


counted = MODEL["positions"]  # 0, 1, 2, … [T]
WITHOUT_POSITIONS: Formulas = {"wpe": lambda s: MODEL["wpe"](s) * 0}
EMBEDDINGS = rows(
    "positions off by one: the first token has position 1, not 0 (known from: counting from 1)",
    {"positions": lambda s: counted(s) + 1},
    "positions off by two: the first token has position 2, not 0 (known from: the offset in OPT)",
    {"positions": lambda s: counted(s) + 2},
    "positions all zero: every token has position 0 (known from: a loop with a cache that does not count positions)",
    {"positions": lambda s: counted(s) * 0},
    "positions missing: wpe is not added (known from: an omission)",
    WITHOUT_POSITIONS,
    "positions looked up in wte: wte is indexed by positions, wpe is unused (known from: a mixed-up name)",
    {"wpe": lambda s: s["wte.weight"][s["positions"]][None]},
    "positions used as tokens: the token at position t has id t (known from: arange passed as ids)",
    {"wte": lambda s: np.repeat(s["wte.weight"][s["positions"]][None], len(s["token_ids"]), axis=0)},
    "embedding scaled: rows of wte are multiplied by √C (known from: the first Transformer, Gemma)",
    {"wte": lambda s: s["wte.weight"][s["token_ids"]] * math.sqrt(s.config.n_embd)},
)


def rotated(letter: str, halves: bool) -> Formula:
    """Return the formula of queries or keys rotated by position, in pairs i, i + D/2 (halves) or 2i, 2i + 1."""

    def formula(s: Scope) -> Array:
        x = BLOCK[f"attn.{letter}"](s)
        D = x.shape[-1]
        if D % 2:  # other mistakes can change the number of heads, and so D
            return x
        angles = s["positions"][:, None] * 10000.0 ** (-np.arange(0, D, 2) / D)
        cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
        a, b = np.split(x, 2, axis=-1) if halves else (x[..., ::2], x[..., 1::2])
        pair = [a * cos - b * sin, b * cos + a * sin]
        return np.concatenate(pair, axis=-1) if halves else np.stack(pair, axis=-1).reshape(x.shape)

    return formula


ROTARY: Table = {
    f"rotary positions {place}, {by}: queries and keys are rotated by their position{less} (known from: {source})": {
        "attn.q": rotated("q", halves),
        "attn.k": rotated("k", halves),
        **more,
    }
    for by, halves, source in (("by halves", True, "LLaMA, GPT-NeoX"), ("by neighbours", False, "RoFormer, GPT-J"))
    for place, less, more in (("instead of wpe", "; wpe is not added", WITHOUT_POSITIONS), ("on top of wpe", "", {}))
}


def half_precision(dtype: str) -> Table:
    """Return mistakes of steps for which half precision is not enough."""

    def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
        mean = coarse(x.mean(axis=-1, keepdims=True), dtype)
        variance = coarse(x.var(axis=-1, keepdims=True), dtype)
        return (x - mean) / np.sqrt(variance + epsilon) * weight + bias

    return rows(
        f"softmax in {dtype}: the scores and the result of the softmax are rounded to {dtype} "
        "(known from: attention under autocast)",
        {"softmax": lambda s: lambda x: coarse(softmax(coarse(x, dtype)), dtype)},
        f"LayerNorm in {dtype}: mean and variance are rounded to {dtype} "
        "(known from: statistics computed in the dtype of the activations)",
        {"layer_norm": lambda s: layer_norm},
    )


def padded_log_softmax(s: Scope) -> Array:
    """Return log-probabilities over a vocabulary padded with logits of 0 to a multiple of 64."""
    logits = s["logits"]
    V = logits.shape[-1]
    more = np.zeros((*logits.shape[:-1], -V % 64), logits.dtype)
    return log_softmax(np.concatenate([logits, more], axis=-1))[..., :V]


def inputs(config: Config) -> Table:
    """Return mistakes in the input ids."""
    end = config.vocab_size - 1 if config.vocab_size != 50304 else 50256
    return rows(
        f"BOS prepended: an extra token ({end}, <|endoftext|>) comes before the prompt "
        "(known from: add_bos_token or add_special_tokens of a tokenizer)",
        {"token_ids": lambda s: np.insert(s.run.token_ids, 0, end, axis=1)},
        f"EOS appended: an extra token ({end}, <|endoftext|>) comes after the prompt "
        "(known from: add_special_tokens of a tokenizer)",
        {"token_ids": lambda s: np.insert(s.run.token_ids, s.run.token_ids.shape[1], end, axis=1)},
        "first token missing: the first token of the prompt was not run (known from: ids[1:], meant to remove a BOS)",
        {"token_ids": lambda s: s.run.token_ids[:, 1:]},
        "last token missing: the last token of the prompt was not run (known from: ids[:-1])",
        {"token_ids": lambda s: s.run.token_ids[:, :-1]},
        "ids one too high: every id is 1 too high (known from: counting from 1)",
        {"token_ids": lambda s: (s.run.token_ids + 1) % config.vocab_size},
        "ids one too low: every id is 1 too low (known from: counting from 1)",
        {"token_ids": lambda s: (s.run.token_ids - 1) % config.vocab_size},
    )


OUTPUTS = rows(
    "logits of the previous position: each position has the logits of the position before it "
    "(known from: index -2 instead of -1, targets shifted twice)",
    {"logits": lambda s: np.concatenate([s["unembedded"][:, :1], s["unembedded"][:, :-1]], axis=1)},
    "logits one id too high: each id has the logit of the id before it (known from: a vocabulary numbered from 1)",
    {"logits": lambda s: np.roll(s["unembedded"], 1, axis=-1)},
    "logits one id too low: each id has the logit of the next id (known from: a vocabulary numbered from 1)",
    {"logits": lambda s: np.roll(s["unembedded"], -1, axis=-1)},
    "log-softmax given as logits: these are log-probabilities, not logits; the probabilities do not change "
    "(known from: log_softmax in the model)",
    {"logits": lambda s: log_softmax(s["unembedded"])},
    "probabilities given as logits: these are probabilities, not logits (known from: softmax in the model)",
    {"logits": lambda s: softmax(s["unembedded"])},
    "logits capped at 30: 30 tanh(logits / 30) (known from: Gemma 2, nanochat)",
    {"logits": lambda s: np.tanh(s["unembedded"] / 30) * 30},
    "logits capped at 50: 50 tanh(logits / 50) (known from: attention in Gemma 2)",
    {"logits": lambda s: np.tanh(s["unembedded"] / 50) * 50},
    "logits divided by √C: the logits are divided by √C (known from: T5)",
    {"logits": lambda s: s["unembedded"] / math.sqrt(s.config.n_embd)},
    "vocabulary padded and not masked: the softmax includes the rows that pad the vocabulary to a multiple of 64 "
    "(known from: padded wte in nanoGPT and llm.c)",
    {"log_probabilities": padded_log_softmax},
    "output head tied: the logits are computed with wte, but the model has its own output head "
    "(known from: tie_word_embeddings=True)",
    {"lm_head.weight": lambda s: s["wte.weight"]},
    "output head reshaped: wte [V, C] is reshaped to [C, V], not transposed (known from: view instead of transpose)",
    {"lm_head.weight": lambda s: MODEL["lm_head.weight"](s).reshape(s.config.n_embd, -1).T},
    "logits centred: the mean of each position's logits is subtracted; the probabilities do not change "
    "(known from: center_unembed in TransformerLens)",
    {"logits": lambda s: s["unembedded"] - s["unembedded"].mean(axis=-1, keepdims=True)},
)
PADDING = rows(
    "positions count the padding: positions are counted from the left padding, not from the first token of the text "
    "(known from: forward of transformers called without position_ids)",
    {"positions": lambda s: counted(s) + s.run.padding},
)


def caches(chunks: Sequence[int]) -> Table:
    """Return mistakes of a run in chunks with a key-value cache."""
    starts = np.cumsum((0, *chunks[:-1]))

    def chunk(s: Scope) -> NDArray[np.intp]:
        """Return the chunk of every token [T]."""
        return (counted(s)[:, None] >= starts).sum(axis=1) - 1

    def within(s: Scope) -> NDArray[np.intp]:
        """Return the index of every token within its chunk [T]."""
        return counted(s) - starts[chunk(s)]

    def later(by: int) -> Formula:
        """Return positions that are off by this much in every chunk except the first, clipped to valid ones."""
        return lambda s: np.clip(counted(s) + by * (chunk(s) > 0), 0, s.config.n_positions - 1)

    own = "(known from: a hand-written key-value cache)"
    return rows(
        f"cache positions one too far: later chunks begin one position too late {own}",
        {"positions": later(1)},
        f"cache positions one short: later chunks begin one position too early {own}",
        {"positions": later(-1)},
        f"cache positions never advance: the positions of every chunk begin at 0 {own}",
        {"positions": within},
        f"cache not extended: a chunk does not see the tokens before it {own}",
        {"visible": lambda s: MODEL["visible"](s) & (chunk(s)[:, None] == chunk(s))},
        f"causal mask missing in chunks: a token also sees later tokens of its chunk {own}",
        {"visible": lambda s: chunk(s)[:, None] >= chunk(s)},
        "causal mask from the upper left: the first token of a chunk sees only token 0, its second sees two tokens, … "
        "(known from: is_causal of scaled_dot_product_attention used with a cache)",
        {"visible": lambda s: within(s)[:, None] >= counted(s)},
    )
