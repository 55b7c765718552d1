"""Known mistakes around the blocks and in all weights; rows and shapes as mistakes.py has them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..parameters import Array
from .arithmetic import rounded
from .rows import Formulas, Table, changed, rows
from .textbook import BLOCK, MODEL, Formula, Scope, log_softmax, softmax


def coarse(x: Array, dtype: str) -> Array:
    """Return x rounded to dtype, in the dtype that it has."""
    return rounded(x, dtype).astype(x.dtype)


def in_int8(x: Array, axis: int, block: int = 0) -> Array:
    """Return x in whole steps, of which the largest number along the axis, or in so many along it, has 127.

    A block's step is stored in float16.
    """
    along = x.swapaxes(axis, -1)
    groups = along.reshape(*along.shape[:-1], -1, block or along.shape[-1])
    step = np.abs(groups).max(axis=-1, keepdims=True) / 127
    whole = np.round(groups / np.where(step > 0, step, 1))
    return (whole * (coarse(step, "float16") if block else step)).reshape(along.shape).swapaxes(axis, -1)


MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
STORED = [name for name in (*BLOCK, *MODEL) if name.endswith((".weight", ".bias")) and name != "lm_head.weight"]
ROUNDED = rows(
    "weights rounded to float16: every weight has been through float16 (known from: a checkpoint stored in it)",
    changed(partial(coarse, dtype="float16"), *STORED),
    "weights rounded to bfloat16: every weight has been through bfloat16 (known from: a checkpoint stored in it)",
    changed(partial(coarse, dtype="bfloat16"), *STORED),
    "weights in int8 by blocks of 32: every 32 inputs share a step; wte, too (known from: GGML's Q8_0)",
    changed(partial(in_int8, axis=0, block=32), *MATRICES) | changed(partial(in_int8, axis=1, block=32), "wte.weight"),
    "weights in int8 by output: every output of a linear map has a step of its own "
    "(known from: torch's dynamic quantisation by channel)",
    changed(partial(in_int8, axis=0), *MATRICES),
    "weights in int8 by row: every row of a matrix has a step of its own; wte and wpe, too "
    "(known from: axis -1 of a Conv1D's [in, out])",
    changed(partial(in_int8, axis=1), *MATRICES, "wte.weight", "wpe.weight"),
)


counted = MODEL["positions"]  # 0, 1, 2, … [T]
WITHOUT_POSITIONS: Formulas = {"wpe": lambda s: MODEL["wpe"](s) * 0}
EMBEDDINGS = rows(
    "positions off by one: the first token has position 1, not 0 (known from: counting from 1)",
    {"positions": lambda s: counted(s) + 1},
    "positions off by two: the first token has position 2, not 0 (known from: OPT's offset)",
    {"positions": lambda s: counted(s) + 2},
    "positions all zero: every token has position 0 (known from: a cached loop that never counts)",
    {"positions": lambda s: counted(s) * 0},
    "positions missing: wpe is not added (known from: left out)",
    WITHOUT_POSITIONS,
    "positions looked up in wte: wte has rows for positions, too; wpe is not used (known from: one name for another)",
    {"wpe": lambda s: s["wte.weight"][s["positions"]][None]},
    "positions used as tokens: wte's row of token t is taken for the token at t (known from: arange for the ids)",
    {"wte": lambda s: np.repeat(s["wte.weight"][s["positions"]][None], len(s["token_ids"]), axis=0)},
    "embedding scaled: wte's rows are multiplied by √C (known from: the first Transformer, Gemma)",
    {"wte": lambda s: s["wte.weight"][s["token_ids"]] * math.sqrt(s.config.n_embd)},
)


def rotated(letter: str, halves: bool) -> Formula:
    """Return the formula of queries or keys turned by their position, by halves of a head or by neighbours."""

    def formula(s: Scope) -> Array:
        x = BLOCK[f"attn.{letter}"](s)
        D = x.shape[-1]
        if D % 2:  # by a wrong number of heads as well
            return x
        angles = s["positions"][:, None] * 10000.0 ** (-np.arange(0, D, 2) / D)
        cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
        a, b = np.split(x, 2, axis=-1) if halves else (x[..., ::2], x[..., 1::2])
        pair = [a * cos - b * sin, b * cos + a * sin]
        return np.concatenate(pair, axis=-1) if halves else np.stack(pair, axis=-1).reshape(x.shape)

    return formula


ROTARY: Table = {
    f"rotary positions {place}, {by}: queries and keys are turned by their position{less} (known from: {source})": {
        "attn.q": rotated("q", halves),
        "attn.k": rotated("k", halves),
        **more,
    }
    for by, halves, source in (("by halves", True, "LLaMA, GPT-NeoX"), ("by neighbours", False, "RoFormer, GPT-J"))
    for place, less, more in (("for wpe", ", wpe is not added", WITHOUT_POSITIONS), ("besides wpe", "", {}))
}


def half_precision(dtype: str) -> Table:
    """Return mistakes of what half precision does not suffice for."""

    def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
        mean = coarse(x.mean(axis=-1, keepdims=True), dtype)
        variance = coarse(x.var(axis=-1, keepdims=True), dtype)
        return (x - mean) / np.sqrt(variance + epsilon) * weight + bias

    return rows(
        f"softmax in {dtype}: scores are rounded to {dtype} before the softmax, and its result after it "
        "(known from: autocast left on around attention)",
        {"softmax": lambda s: lambda x: coarse(softmax(coarse(x, dtype)), dtype)},
        f"LayerNorm in {dtype}: mean and variance are rounded to {dtype} "
        "(known from: statistics kept in the activations' dtype)",
        {"layer_norm": lambda s: layer_norm},
    )


def padded_log_softmax(s: Scope) -> Array:
    """Return log-probabilities over a vocabulary filled up with logits of 0 to a multiple of 64."""
    logits = s["logits"]
    V = logits.shape[-1]
    more = np.zeros((*logits.shape[:-1], -V % 64), logits.dtype)
    return log_softmax(np.concatenate([logits, more], axis=-1))[..., :V]


def inputs(config: Config) -> Table:
    """Return mistakes in what is run."""
    end = config.vocab_size - 1 if config.vocab_size != 50304 else 50256
    return rows(
        f"BOS prepended: a token ({end}, <|endoftext|>) stands before the prompt "
        "(known from: add_bos_token, a tokenizer's add_special_tokens)",
        {"token_ids": lambda s: np.insert(s.run.token_ids, 0, end, axis=1)},
        f"EOS appended: a token ({end}, <|endoftext|>) stands behind the prompt "
        "(known from: a tokenizer's add_special_tokens)",
        {"token_ids": lambda s: np.insert(s.run.token_ids, s.run.token_ids.shape[1], end, axis=1)},
        "first token missing: the prompt's first token was not run (known from: ids[1:], to cut off a BOS)",
        {"token_ids": lambda s: s.run.token_ids[:, 1:]},
        "last token missing: the prompt's last token was not run (known from: ids[:-1])",
        {"token_ids": lambda s: s.run.token_ids[:, :-1]},
        "ids one too high: every id is that of the next token (known from: counting from 1)",
        {"token_ids": lambda s: (s.run.token_ids + 1) % config.vocab_size},
        "ids one too low: every id is that of the token before (known from: counting from 1)",
        {"token_ids": lambda s: (s.run.token_ids - 1) % config.vocab_size},
    )


OUTPUTS = rows(
    "logits of the previous position: each position has the logits of the one before it "
    "(known from: an index of −2, targets shifted twice)",
    {"logits": lambda s: np.concatenate([s["unembedded"][:, :1], s["unembedded"][:, :-1]], axis=1)},
    "logits one id too high: an id has the logit of the one before it (known from: a vocabulary that begins at 1)",
    {"logits": lambda s: np.roll(s["unembedded"], 1, axis=-1)},
    "logits one id too low: an id has the logit of the next one (known from: a vocabulary that begins at 1)",
    {"logits": lambda s: np.roll(s["unembedded"], -1, axis=-1)},
    "log-softmax given as logits: these are log-probabilities, no logits; the probabilities are the same "
    "(known from: log_softmax in the model)",
    {"logits": lambda s: log_softmax(s["unembedded"])},
    "probabilities given as logits: these are probabilities, no logits (known from: softmax in the model)",
    {"logits": lambda s: softmax(s["unembedded"])},
    "logits capped at 30: 30 tanh(logits / 30) (known from: Gemma 2, nanochat)",
    {"logits": lambda s: np.tanh(s["unembedded"] / 30) * 30},
    "logits capped at 50: 50 tanh(logits / 50) (known from: Gemma 2's attention)",
    {"logits": lambda s: np.tanh(s["unembedded"] / 50) * 50},
    "logits divided by √C: the output head's are divided by √C (known from: T5)",
    {"logits": lambda s: s["unembedded"] / math.sqrt(s.config.n_embd)},
    "vocabulary padded and not masked: the softmax runs over the rows that pad the vocabulary to a multiple of 64, "
    "too (known from: nanoGPT's and llm.c's padded wte)",
    {"log_probabilities": padded_log_softmax},
    "output head tied: the logits are made with wte, and the model has an output head of its own "
    "(known from: tie_word_embeddings=True)",
    {"lm_head.weight": lambda s: s["wte.weight"]},
    "output head reshaped: wte [V, C] is reshaped to [C, V], not transposed (known from: view for transpose)",
    {"lm_head.weight": lambda s: MODEL["lm_head.weight"](s).reshape(s.config.n_embd, -1).T},
    "logits centred: each position's mean is subtracted; the probabilities are the same "
    "(known from: TransformerLens's center_unembed)",
    {"logits": lambda s: s["unembedded"] - s["unembedded"].mean(axis=-1, keepdims=True)},
)
PADDING = rows(
    "positions count the padding: positions begin at the padding on the left, not at the first token of the text "
    "(known from: transformers' own forward without position_ids)",
    {"positions": lambda s: counted(s) + s.run.padding},
)


def caches(chunks: Sequence[int]) -> Table:
    """Return mistakes of a run in chunks, with keys and values kept."""
    starts = np.cumsum((0, *chunks[:-1]))

    def chunk(s: Scope) -> NDArray[np.intp]:
        """Return the chunk of every token [T]."""
        return (counted(s)[:, None] >= starts).sum(axis=1) - 1

    def within(s: Scope) -> NDArray[np.intp]:
        """Return every token's place in its chunk [T]."""
        return counted(s) - starts[chunk(s)]

    def later(by: int) -> Formula:
        """Return positions so much too far in every chunk but the first, within those that the model has."""
        return lambda s: np.clip(counted(s) + by * (chunk(s) > 0), 0, s.config.n_positions - 1)

    own = "(known from: a key-value cache of one's own)"
    return rows(
        f"cache positions one too far: later chunks begin one position too late {own}",
        {"positions": later(1)},
        f"cache positions one short: later chunks begin one position too early {own}",
        {"positions": later(-1)},
        f"cache positions never advance: every chunk's positions begin at 0 {own}",
        {"positions": within},
        f"cache not extended: a chunk does not see the tokens before it {own}",
        {"visible": lambda s: MODEL["visible"](s) & (chunk(s)[:, None] == chunk(s))},
        f"causal mask missing in chunks: a token sees those that follow it in its chunk {own}",
        {"visible": lambda s: chunk(s)[:, None] >= chunk(s)},
        "causal mask from the upper left: a chunk's first token sees the first token of all alone, its second two, … "
        "(known from: scaled_dot_product_attention's is_causal with a past)",
        {"visible": lambda s: within(s)[:, None] >= counted(s)},
    )
