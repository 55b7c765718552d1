"""The catalogue of known mistakes. Each entry is a line of the report and the formulas of textbook.py that it replaces.

To add a mistake, add a row to a table in attention_mistakes.py, block_mistakes.py (the rest of a block) or
model_mistakes.py. The key of a row is the line of the report, "name: explanation (known from: source)". Its value maps
each wrong stage to the wrong formula. Reports list mistakes in the order of the rows. A mistake that depends on the
model's sizes (n_head, the order of layers) has an entry for every possible size. A mistake within a block has an entry
for all blocks together, and one each for the first, a middle and the last block alone.

textbook.py describes the shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from ..config import Config
from .attention_mistakes import ATTENTION, HEADS, MASKS, SCALES_BY_LAYER, THIRDS, scales, windows
from .backward import is_backward
from .block_mistakes import ACTIVATIONS, BIASES, LAYER_NORMS, RESIDUALS, TRANSPOSED, epsilons
from .gradient_mistakes import ATTENTION_BACKWARDS, DERIVATIVES, HEADS_BACKWARDS, NORM_BACKWARDS, RESIDUAL_BACKWARDS
from .loss_mistakes import EMBEDDINGS_BACKWARD, TIED, losses
from .model_mistakes import EMBEDDINGS, OUTPUTS, PADDING, ROTARY, ROUNDED, caches, half_precision, inputs
from .parameter_mistakes import DETACHED, EMBEDDINGS_FROZEN, FROZEN, PARAMETER_GRADIENTS, WITH_HEAD, training
from .rows import Table
from .textbook import BLOCK, NORM, Textbook

Change = Callable[[Textbook], Textbook]
BEHIND = {"ln_f.weight", "ln_f.bias", "ln_f", "lm_head.weight", "unembedded", "logits", "log_probabilities"}
# what ln_f shows of a formula that it shares with the blocks' LayerNorms; "ln_f" itself in the forward pass
OF_LN_F = {"d.layer_norm": "d.last", "d.ln_f.weight": "d.ln_f.weight", "d.ln_f.bias": "d.ln_f.bias"}
BEHIND |= OF_LN_F.keys()


@dataclass(frozen=True)
class Mistake:
    """An entry of the catalogue.

    source: where it is known from. change: makes it in a Textbook. stages: what it replaces; "layers" is a field there.
    """

    name: str
    explanation: str
    source: str
    change: Change
    first: int = 0  # blocks below this one are unchanged
    stages: tuple[str, ...] = ()
    layer: int | None = None  # the only block that is changed, n_layer for ln_f; None if there are several
    of: str = ""  # if layer is set: name of the same mistake in the whole model
    outside: frozenset[str] = frozenset()  # if layer is n_layer: the formulas outside the blocks that it replaces

    def replaces(self, other: Mistake) -> bool:
        """Return whether this is of the backward pass and would take the place of another mistake's formulas."""
        shared, apart = {*self.stages} & {*other.stages}, None not in (self.layer, other.layer)
        return any(map(is_backward, shared)) and not (apart and self.layer != other.layer)


def catalogue(config: Config, tokens: int, chunks: Sequence[int] = (), padded: bool = False) -> list[Mistake]:
    """Return every entry that is possible in a model of this shape with this number of tokens.

    chunks: numbers of tokens that were run at a time with a cache, if known. padded: whether rows are left-padded.
    """
    n_layer, exact = config.n_layer, config.activation_function == "gelu"
    possible = {
        "erf GELU": not exact,
        "tanh GELU": exact,
        "attention scaled by layer": n_layer > 1 and not config.scale_attn_by_inverse_layer_idx,
        "attention scaled as in GPT-2": config.attention_scale(n_layer - 1) != 1 / math.sqrt(config.head_width),
        "scale after the softmax": config.scale_attn_weights and config.head_width > 1,
        "keys reshaped": config.head_width > 1,
        "heads split as [D, H]": config.head_width > 1,
        "heads split and merged as [D, H]": config.head_width > 1,
        "positions off by one": tokens + 1 <= config.n_positions,
        "positions off by two": tokens + 2 <= config.n_positions,
        "positions looked up in wte": tokens <= config.vocab_size,
        "positions used as tokens": tokens <= config.vocab_size,
        "weights in int8 by blocks of 32": config.n_embd % 32 == config.inner_width % 32 == 0,
        "BOS prepended": tokens + 1 <= config.n_positions,
        "EOS appended": tokens + 1 <= config.n_positions,
        "first token missing": tokens > 1,
        "last token missing": tokens > 1,
        "logits of the previous position": tokens > 1,
        "vocabulary padded and not masked": config.vocab_size % 64 > 0,
        "output head tied": not config.tie_word_embeddings,
        "output head reshaped": config.vocab_size != config.n_embd,
        "causal mask missing in chunks": max(chunks, default=0) > 1,
    }
    attention = scales(config, tokens) | ATTENTION | (HEADS if config.n_head > 1 else {}) | THIRDS
    found = (
        *in_blocks(ACTIVATIONS | epsilons(config) | LAYER_NORMS, n_layer),
        *entries(SCALES_BY_LAYER, n_layer),
        *in_blocks(attention, n_layer),
        *head_counts(config),
        *in_blocks(MASKS | windows(tokens) | RESIDUALS | BIASES | TRANSPOSED, n_layer),
        *entries(ROUNDED | EMBEDDINGS | (ROTARY if config.head_width % 2 == 0 else {}), n_layer),
        *orders(n_layer),
        *entries(half_precision("float16") | half_precision("bfloat16"), n_layer, flips=True),
        *entries(inputs(config) | OUTPUTS, n_layer),
        *entries((PADDING if padded else {}) | (caches(chunks) if len(chunks) > 1 else {}), n_layer),
    )
    return [entry for entry in found if possible.get(entry.of or entry.name, True)]


def backward_catalogue(
    config: Config, rows: int, ignored: bool, stages: bool, norm: float, largest: float
) -> list[Mistake]:
    """Return every entry of the backward pass that is possible in a batch of this many rows.

    ignored: whether there are targets that do not count. stages: whether gradients of stages are given, which tell a
    backward pass that was run twice from gradients that were not reset. norm, largest: of all the right gradients.
    """
    n_layer, exact, several = config.n_layer, config.activation_function == "gelu", rows > 1
    possible = {
        "erf GELU's derivative": not exact,
        "tanh GELU's derivative": exact,
        "loss averaged row by row": several and ignored,
        "ignored targets in the mean": ignored,
        "targets not shifted at all positions": ignored,
        "gradients of the negated loss": stages,
        "wte and wpe frozen": stages or config.tie_word_embeddings,
        "output head frozen": not config.tie_word_embeddings,
    }
    found = (
        *entries(losses(config), n_layer),
        *entries(EMBEDDINGS_BACKWARD | (TIED if config.tie_word_embeddings else {}) | EMBEDDINGS_FROZEN, n_layer),
        *in_blocks(DERIVATIVES | NORM_BACKWARDS, n_layer),
        *in_blocks(ATTENTION_BACKWARDS | (HEADS_BACKWARDS if config.n_head > 1 else {}), n_layer),
        *in_blocks(RESIDUAL_BACKWARDS | PARAMETER_GRADIENTS | FROZEN | DETACHED, n_layer),
        *entries(WITH_HEAD, n_layer),
        *entries(training(config, norm, largest), n_layer),
    )
    possible |= {f"backward pass run {times}": stages for times in ("twice", "three times", "four times")}

    def may_be(name: str) -> bool:
        """Return whether a mistake is one in this batch, and another one than that of a longer name in one row."""
        return possible.get(name, True) and (several or not name.endswith(OF_ROWS))

    twin = "LayerNorms frozen in ln_f alone"  # of "ln_f frozen"
    return [entry for entry in found if may_be(entry.of or entry.name) and entry.name != twin]


# What only several rows show. In one row, a token's position is its number.
OF_ROWS = (
    " row",
    " row alone",
    " token alone",
    " over rows",
    " over rows alone",
    " over positions",
    " positions alone",
)


def entries(table: Table, n_layer: int = 1, flips: bool = False) -> Iterator[Mistake]:
    """Yield the mistakes of a table. flips: whether their formulas round internally."""
    for text, formulas in table.items():
        first = n_layer if all(name in BEHIND or is_backward(name) for name in formulas) else 0
        yield entry(text, partial(Textbook.altered, formulas=formulas, flips=flips), tuple(formulas), first)


def in_blocks(table: Table, n_layer: int) -> Iterator[Mistake]:
    """Yield the mistakes of a table, each in the whole model, in single blocks (first, middle, last) and in ln_f."""
    for whole, formulas in zip(entries(table, n_layer), table.values(), strict=True):
        yield whole
        stages = tuple(name for name in formulas if name in BLOCK)
        places = {layer: f"block {layer}" for layer in (0, n_layer // 2, n_layer - 1) if n_layer > 1 and stages}
        outside = [name for name in formulas if name in BEHIND or name in NORM]
        last = tuple(dict.fromkeys(OF_LN_F.get(name, "ln_f") for name in outside))
        if stages and last:
            places[n_layer] = "ln_f"
        for layer, place in places.items():
            yield replace(
                whole,
                name=f"{whole.name} in {place} alone",
                change=partial(Textbook.altered, formulas=formulas, layer=layer),
                first=layer,
                stages=last if layer == n_layer else stages,
                layer=layer,
                of=whole.name,
                outside=frozenset(outside if layer == n_layer else ()),
            )


def entry(text: str, change: Change, stages: tuple[str, ...], first: int = 0) -> Mistake:
    """Return the mistake for the text of a row."""
    name, _, rest = text.partition(": ")
    explanation, _, source = rest.removesuffix(")").partition(" (known from: ")
    return Mistake(name, explanation, source, change, first, stages)


def head_counts(config: Config) -> Iterator[Mistake]:
    """Yield a mistake for every number of heads that divides the width, except the model's own."""
    for n_head in range(1, config.n_embd + 1):
        if config.n_embd % n_head == 0 and n_head != config.n_head:
            note = ", which is n_layer" if n_head == config.n_layer else ""
            yield entry(
                f"n_head {n_head}: {n_head} heads{note}; the model has {config.n_head}, which no weight's shape shows "
                "(known from: n_layer used as n_head, the configuration of another size)",
                partial(replace, config=replace(config, n_head=n_head)),
                ("attn.q", "attn.k", "attn.v", "attn.scale"),
            )


def orders(n_layer: int) -> Iterator[Mistake]:
    """Yield a mistake for every wrong order of blocks. Equal orders have one entry, the last and most exact."""
    usual, last = list(range(n_layer)), n_layer - 1

    def with_part(start: int, end: int, *part: int) -> list[int]:
        """Return the usual order with blocks start to end (exclusive) replaced by part."""
        return [*usual[:start], *part, *usual[end:]]

    found = {
        "layers reversed: the last block comes first (known from: a list read in reverse)": usual[::-1],
        "layers sorted as text: blocks are in the order 0, 1, 10, 11, 2, … (known from: sorted() applied to names)": (
            sorted(usual, key=str)
        ),
        "layer 0 in every place: block 0 is used for all blocks (known from: [Block()] * n)": [0] * n_layer,
        f"layer {last} in every place: block {last} is used for all blocks (known from: late binding in a loop)": (
            [last] * n_layer
        ),
    }
    for i, j in pairwise(usual):
        found |= {
            f"layers {i} and {j} swapped: block {j} comes before block {i} (known from: manual weight assignment)": (
                with_part(i, j + 1, j, i)
            ),
            f"layer {i} in place of layer {j}: block {j} has the weights of block {i} "
            "(known from: an index off by one)": with_part(j, j + 1, i),
        }
    for i in usual:
        found |= {
            f"layer {i} missing: block {i} is left out (known from: a loop that ends early)": with_part(i, i + 1),
            f"layer {i} run twice: block {i} is applied twice (known from: an overlong loop)": with_part(i, i, i),
        }
    wrong = list(found.values())
    for number, (text, order) in enumerate(found.items()):
        if order in ([], usual, *wrong[number + 1 :]):
            continue
        first = next((depth for depth, layer in enumerate(order) if depth != layer), len(order))
        yield entry(text, partial(replace, layers=tuple(order)), ("layers",), min(first, last))
