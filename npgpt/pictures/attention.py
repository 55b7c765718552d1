"""The attention weights of a text, layer by layer and head by head: which token attends to which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import NpgptError, checked, printable, whole_number
from ..language_model import LanguageModel
from ..parameters import Array
from ..text.tokenizer import shown


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """The weights of some layers and heads over T tokens: weights[i, j, query, key] belong to layers[i], heads[j].

    Every row is a softmax over the keys and sums to 1. Above the diagonal all keys are masked, and their weights are 0.
    """

    model: str
    n_layer: int
    n_head: int
    token_ids: tuple[int, ...]
    pieces: tuple[bytes, ...]  # a token's bytes; its id in digits where it has no text
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    weights: Array = field(repr=False)  # [len(layers), len(heads), T, T]

    @property
    def texts(self) -> tuple[str, ...]:
        """The pieces as printable text, in the notation of shown(); a newline is \\n."""
        return tuple(printable(shown(piece)) for piece in self.pieces)


@checked
def attention_weights(
    model: LanguageModel, token_ids: Sequence[int], *, layer: int | None = None, head: int | None = None
) -> AttentionWeights:
    """Return the attention weights of token_ids [T] in one layer or all, one head or all.

    Raises NpgptError for a layer or head that does not exist, ids that do not fit, and weights that are not finite.
    """
    config = model.config
    layers = selected("layer", layer, config.n_layer, model.name)
    heads = selected("head", head, config.n_head, model.name)
    rows = config.token_rows(token_ids)
    if len(rows) != 1:
        raise NpgptError(f"attention is shown of one row of ids, not of {len(rows)}")
    token_ids, T = rows[0].tolist(), rows.shape[1]
    weights = np.zeros((len(layers), len(heads), T, T), model.parameters.wte.weight.dtype)
    places = {f"h.{number}.attn.weights": place for place, number in enumerate(layers)}

    def record(name: str, array: Array) -> None:
        if name in places:
            weights[places[name]] = array[0, list(heads)]

    model(token_ids, record=record, logits_from=-1)
    if not np.isfinite(weights).all():
        raise NpgptError(f"{model.name} has attention weights that are not finite: see npgpt inspect for its values")
    pieces = tuple(_piece(model, token_id) for token_id in token_ids)
    return AttentionWeights(model.name, config.n_layer, config.n_head, tuple(token_ids), pieces, layers, heads, weights)


def selected(kind: str, number: int | None, count: int, name: str) -> tuple[int, ...]:
    """Return the numbers of the layers or heads wanted: one, or all. Raises NpgptError for one that does not exist."""
    if number is None:
        return tuple(range(count))
    if not 0 <= (number := whole_number(kind, number, low=-(2**31))) < count:
        raise NpgptError(
            f"{kind} {number} does not exist: {name} has {count}, from 0 to {count - 1}; give one of these or none"
        )
    return (number,)


def _piece(model: LanguageModel, token_id: int) -> bytes:
    """Return a token's bytes, or its id in digits where the model or the id has no text."""
    if model.why_no_text or not model.tokenizer.has_text(token_id):
        return b"%d" % token_id
    return model.tokenizer.piece(token_id)
