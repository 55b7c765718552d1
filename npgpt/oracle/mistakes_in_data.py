"""Known mistakes in what is computed on and given: weights, positions, layers, ids, logits, caches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..parameters import Array
from .arithmetic import rounded
from .mistake import Mistake, replaced
from .textbook import BLOCK, MODEL, Formula, Scope, log_softmax


def loading(config: Config) -> Iterator[Mistake]:
    """Weights that went wrong on their way."""

    def zero(*parts: str) -> dict[str, Formula]:
        return {f"{part}.bias": (lambda s, name=f"{part}.bias": s.tensor(name) * 0) for part in parts}  # type: ignore[misc]

    def without_key(s: Scope) -> Array:
        bias = s.tensor("attn.c_attn.bias").copy()
        bias[s.config.n_embd : 2 * s.config.n_embd] = 0
        return bias

    everywhere = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    yield Mistake(
        "c_attn bias dropped", "queries, keys and values have no bias", "qkv_bias=False", replaced(zero("attn.c_attn"))
    )
    yield Mistake("all biases dropped", "no linear map has a bias", "bias=False", replaced(zero(*everywhere)))
    yield Mistake(
        "key bias dropped",
        "the keys have no bias: the softmax cancels it, so that no output ever shows it",
        "OpenAI's Whisper",
        replaced({"attn.c_attn.bias": without_key}),
    )

    def thirds(s: Scope) -> Array:
        return np.concatenate([third.T for third in np.split(s.tensor("attn.c_attn.weight"), 3, axis=1)], axis=1)

    yield Mistake(
        "attn.c_proj transposed",
        "the square attn.c_proj.weight was loaded transposed; its shape does not tell",
        "Conv1D is [in, out], Linear [out, in]",
        replaced({"attn.c_proj.weight": lambda s: s.tensor("attn.c_proj.weight").T}),
    )
    yield Mistake(
        "q, k, v weights transposed",
        "the square weights of queries, keys and values were loaded transposed",
        "Conv1D is [in, out], Linear [out, in]",
        replaced({"attn.c_attn.weight": thirds}),
    )
    for dtype in ("float16", "bfloat16"):
        names = [name for name in (*BLOCK, *MODEL) if name.endswith((".weight", ".bias")) and name != "lm_head.weight"]
        coarse: dict[str, Formula] = {
            name: (lambda s, name=name, dtype=dtype: rounded(s.tensor(name), dtype).astype(s.tensor(name).dtype))  # type: ignore[misc]
            for name in names
        }
        yield Mistake(
            f"weights rounded to {dtype}",
            f"every weight has been through {dtype}",
            "a checkpoint stored in it",
            replaced(coarse),
        )


def embeddings(config: Config, tokens: int) -> Iterator[Mistake]:
    """Positions and tokens."""
    for name, shift, source in (("one", 1, "counting from 1"), ("two", 2, "OPT's offset")):
        if tokens + shift <= config.n_positions:
            yield Mistake(
                f"positions off by {name}",
                f"the first token has position {shift}, not 0",
                source,
                replaced({"positions": lambda s, shift=shift: np.arange(s["token_ids"].shape[1]) + shift}),  # type: ignore[misc]
            )
    yield Mistake(
        "positions all zero",
        "every token has position 0",
        "a cached loop that never counts",
        replaced({"positions": lambda s: np.zeros(s["token_ids"].shape[1], int)}),
    )
    yield Mistake(
        "positions missing",
        "wpe is not added",
        "left out",
        replaced({"wpe": lambda s: s["wpe.weight"][s["positions"]][None] * 0}),
    )
    yield Mistake(
        "embedding scaled",
        "wte's rows are multiplied by √C",
        "the first Transformer, Gemma",
        replaced({"wte": lambda s: s["wte.weight"][s["token_ids"]] * math.sqrt(s.config.n_embd)}),
    )


def orders(n_layer: int) -> Iterator[Mistake]:
    """Blocks in another order."""

    def layers(name: str, explanation: str, source: str, order: Sequence[int]) -> Mistake:
        first = next((depth for depth, layer in enumerate(order) if depth != layer), min(n_layer, len(order)))
        return Mistake(
            name, explanation, source, lambda book: replace(book, layers=tuple(order)), min(first, n_layer - 1)
        )

    usual = list(range(n_layer))
    if n_layer > 2:
        yield layers("layers reversed", "the last block comes first", "a list read from its end", usual[::-1])
    if n_layer > 10:
        yield layers(
            "layers sorted as text",
            "blocks stand in the order 0, 1, 10, 11, 2, …",
            "sorted() over names",
            sorted(usual, key=str),
        )
    for i in range(n_layer - 1):
        swapped = [*usual[:i], i + 1, i, *usual[i + 2 :]]
        yield layers(
            f"layers {i} and {i + 1} swapped", f"block {i + 1} comes before block {i}", "assignment by hand", swapped
        )
        instead = [*usual[: i + 1], i, *usual[i + 2 :]]
        yield layers(
            f"layer {i} in place of layer {i + 1}",
            f"block {i}'s weights are in block {i + 1}, too",
            "an index off by one",
            instead,
        )
    for i in usual:
        if n_layer > 1:
            yield layers(f"layer {i} missing", f"block {i} is left out", "a loop too short", usual[:i] + usual[i + 1 :])
        yield layers(
            f"layer {i} run twice", f"block {i} is applied twice", "a loop too long", [*usual[: i + 1], *usual[i:]]
        )


def outputs(config: Config, tokens: int) -> Iterator[Mistake]:
    """Right numbers in the wrong place, or of another kind."""
    bos = config.vocab_size - 1 if config.vocab_size != 50304 else 50256
    if tokens < config.n_positions:
        yield Mistake(
            "BOS prepended",
            f"a token ({bos}, <|endoftext|>) stands before the prompt",
            "add_bos_token, a tokenizer's add_special_tokens",
            replaced({"token_ids": lambda s: np.insert(s.run.token_ids, 0, bos, axis=1)}),
        )
    if tokens > 1:
        yield Mistake(
            "last token missing",
            "the prompt's last token was not run",
            "ids[:-1]",
            replaced({"token_ids": lambda s: s.run.token_ids[:, :-1]}),
        )
        previous: Formula = lambda s: np.concatenate([s["unembedded"][:, :1], s["unembedded"][:, :-1]], axis=1)  # noqa: E731
        yield Mistake(
            "logits of the previous position",
            "each position has the logits of the one before it",
            "an index of −2, targets shifted twice",
            replaced({"logits": previous}),
        )
    yield Mistake(
        "log-softmax given as logits",
        "these are log-probabilities, no logits; the probabilities are the same",
        "log_softmax in the model",
        replaced({"logits": lambda s: log_softmax(s["unembedded"])}),
    )
    if config.vocab_size % 64:
        yield Mistake(
            "vocabulary padded and not masked",
            "the softmax runs over the rows that pad the vocabulary to a multiple of 64, too",
            "nanoGPT's and llm.c's padded wte",
            replaced({"log_probabilities": padded_log_softmax}),
        )
    if not config.tie_word_embeddings:
        yield Mistake(
            "output head tied",
            "the logits are made with wte, and the model has an output head of its own",
            "tie_word_embeddings=True",
            replaced({"lm_head.weight": lambda s: s["wte.weight"]}),
        )
    yield Mistake(
        "logits centred",
        "each position's mean is subtracted; the probabilities are the same",
        "TransformerLens's center_unembed",
        replaced({"logits": lambda s: s["unembedded"] - s["unembedded"].mean(axis=-1, keepdims=True)}),
    )


def padded_log_softmax(s: Scope) -> Array:
    """Over a vocabulary filled up with logits of 0 to a multiple of 64."""
    logits = s["logits"]
    V = logits.shape[-1]
    more = np.zeros((*logits.shape[:-1], -V % 64), logits.dtype)
    return log_softmax(np.concatenate([logits, more], axis=-1))[..., :V]


def caches(chunks: tuple[int, ...]) -> Iterator[Mistake]:
    """Run in chunks, with keys and values kept."""
    ends = np.cumsum(chunks)

    def chunk(s: Scope) -> NDArray[np.intp]:
        """The chunk of every token."""
        return np.minimum(np.searchsorted(ends, np.arange(s["token_ids"].shape[1]), side="right"), len(chunks) - 1)

    def later(by: int) -> Formula:
        """Positions in every chunk but the first, by so much too far."""
        return lambda s: np.clip(np.arange(len(chunk(s))) + by * (chunk(s) > 0), 0, s.config.n_positions - 1)

    def anew(s: Scope) -> NDArray[np.intp]:
        """Positions that begin at 0 in every chunk."""
        return np.arange(len(chunk(s))) - np.array((0, *ends[:-1]))[chunk(s)]

    def own(s: Scope) -> NDArray[np.bool_]:
        """A token sees its chunk alone."""
        return (chunk(s)[:, None] == chunk(s)) & np.tri(len(chunk(s)), dtype=bool)

    for name, explanation, change in (
        ("cache positions one too far", "later chunks begin one position too late", {"positions": later(1)}),
        ("cache positions one short", "later chunks begin one position too early", {"positions": later(-1)}),
        ("cache positions never advance", "every chunk's positions begin at 0", {"positions": anew}),
        ("cache not extended", "a chunk does not see the tokens before it", {"visible": own}),
    ):
        yield Mistake(name, explanation, "a key-value cache of one's own", replaced(change))
