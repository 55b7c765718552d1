"""The attention weights of a text, layer by layer and head by head: which token attends to which."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ..errors import NpgptError, checked, printable, whole_number
from ..language_model import LanguageModel, opened
from ..parameters import Array
from ..text.tokenizer import shown
from . import heads, page

TEMPLATE = Path(__file__).with_name("attention_page.html")
LARGEST = 64 * 2**20  # bytes; a browser opens a page of this size without delay
# a weight is stored as a multiple of 1 / 65535 ≈ 1.5e-5, so to within 7.6e-6; 4 decimals are shown
STEPS = 2**16 - 1
FRAME = 900  # pixels of a page's height in a notebook


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """The weights of some layers and heads over T tokens: weights[i, j, query, key] belong to layers[i], heads[j].

    Every row is a softmax over the keys and sums to 1. Above the diagonal all keys are masked, and their weights are 0.
    A notebook shows the page of npgpt attend --html.
    """

    model: str
    n_layer: int
    n_head: int
    token_ids: tuple[int, ...]
    pieces: tuple[bytes, ...]  # a token's bytes; its id in digits if it has no text
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    weights: Array  # [len(layers), len(heads), T, T]

    def __repr__(self) -> str:
        """Return the model, the layers and heads, and the shape."""
        layers, chosen = (
            f"all {count} {kind}s" if len(numbers) == count else f"{kind} {numbers[0]}"
            for kind, numbers, count in (("layer", self.layers, self.n_layer), ("head", self.heads, self.n_head))
        )
        array = f"weights {self.weights.dtype}{list(self.weights.shape)}"
        return printable(f"AttentionWeights({self.model!r}: {layers}, {chosen}, {array})")

    @property
    def texts(self) -> tuple[str, ...]:
        """The pieces as printable text, in the notation of shown(); a newline is \\n."""
        return tuple(printable(shown(piece)) for piece in self.pieces)

    def page(self) -> str:
        """Return a page of HTML to explore by mouse, touch or keyboard. Raises NpgptError if it would be too large."""
        check_size(len(self.layers), len(self.heads), len(self.token_ids))
        labels = [[heads.label(head) for head in layer] for layer in self.weights]
        data = {
            "model": self.model,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "layers": self.layers,
            "heads": self.heads,
            "ids": self.token_ids,
            "pieces": self.texts,
            "labels": [[one and (one.name, round(one.score, 4)) for one in layer] for layer in labels],
            "least": heads.LEAST,
            "start": heads.most_telling(self.weights),
            "weights": base64.b64encode(packed(self.weights)).decode(),
        }
        return page.filled("npgpt attend", TEMPLATE, data)

    def _repr_html_(self) -> str | None:
        """Return the page for a notebook; None, which shows the repr, if the page would be too large."""
        try:
            return page.in_notebook(self.page(), FRAME)
        except NpgptError:
            return None


@checked
def attend(
    text: str | ArrayLike,
    model: LanguageModel | str | os.PathLike[str] | None = None,
    *,
    layer: int | None = None,
    head: int | None = None,
    special: bool = False,
) -> AttentionWeights:
    """Return the attention weights of a text or ids [T] in one layer or all (the default), one head or all.

    model: a loaded model, a name or a path; the default is the embedded model. special: encode <|endoftext|> and the
    like as special tokens. Raises NpgptError for a layer or head that does not exist, text or ids that do not fit the
    model, and weights that are not finite.
    """
    model = opened(model)
    config = model.config
    layers = selected("layer", layer, config.n_layer, model.name)
    chosen = selected("head", head, config.n_head, model.name)
    token_ids = model.text_ids(text, special=special)
    T = len(token_ids)
    weights = np.zeros((len(layers), len(chosen), T, T), model.parameters.wte.weight.dtype)
    places = {f"h.{number}.attn.weights": place for place, number in enumerate(layers)}

    def record(name: str, array: Array) -> None:
        if name in places:
            weights[places[name]] = array[0, list(chosen)]

    model(token_ids, record=record, logits_from=-1)
    if not np.isfinite(weights).all():
        raise NpgptError(f"{model.name} has attention weights that are not finite: see npgpt inspect for its values")
    pieces = tuple(model.piece(token_id) or b"%d" % token_id for token_id in token_ids)
    return AttentionWeights(
        model.name, config.n_layer, config.n_head, tuple(token_ids), pieces, layers, chosen, weights
    )


def selected(kind: str, number: int | None, count: int, name: str) -> tuple[int, ...]:
    """Return a layer's or head's number, or all of them for None. Raises NpgptError if it does not exist."""
    if number is None:
        return tuple(range(count))
    if not 0 <= (number := whole_number(kind, number, low=-(2**31))) < count:
        raise NpgptError(
            f"{kind} {number} does not exist: {name} has {count}, from 0 to {count - 1}; give one of these or none"
        )
    return (number,)


def check_size(layers: int, heads: int, tokens: int) -> None:
    """Raise NpgptError if a page with that many layers, heads and tokens would be too large."""
    size = layers * heads * tokens * (tokens + 1) // 2 * 2 * 4 // 3
    if size > LARGEST:
        raise NpgptError(
            f"a page of {layers} layers × {heads} heads × {tokens} tokens would take {size / 2**20:.0f} MiB, "
            f"and may take {LARGEST // 2**20}: give one layer (--layer), one head (--head) or a shorter text"
        )


def packed(weights: Array) -> bytes:
    """Return the lower triangles of weights [L, H, T, T], row by row, as uint16 with the low byte first."""
    query, key = np.tril_indices(weights.shape[-1])
    return np.rint(np.multiply(weights[:, :, query, key], STEPS, dtype=np.float64)).astype("<u2").tobytes()
