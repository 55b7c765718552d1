"""The same model with its channels, heads and units in another order: exactly the same function, and every sum is
rounded anew. What differs between such runs is what rounding alone can do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..parameters import Array
from .textbook import located


@dataclass(frozen=True)
class Redraw:
    """Orders of the residual channels [C]; by block of heads [H], queries' and values' columns [C], units [F]."""

    channels: NDArray[np.intp]
    heads: list[NDArray[np.intp]]
    queries: list[NDArray[np.intp]]
    values: list[NDArray[np.intp]]
    units: list[NDArray[np.intp]]

    def tensors(self, config: Config, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """The model's tensors in this order."""
        c = self.channels  # take is four times as fast as brackets
        found = {
            name: tensors[name].take(c, axis=-1) for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")
        }
        if not config.tie_word_embeddings:
            found["lm_head.weight"] = tensors["lm_head.weight"].take(c, axis=1)
        for layer in range(config.n_layer):
            C, values, units = config.n_embd, self.values[layer], self.units[layer]
            thirds = np.concatenate([self.queries[layer], C + self.queries[layer], 2 * C + values])
            orders = {
                "ln_1": (None, c),
                "attn.c_attn": (c, thirds),
                "attn.c_proj": (values, c),
                "ln_2": (None, c),
                "mlp.c_fc": (c, units),
                "mlp.c_proj": (units, c),
            }
            for part, (rows, columns) in orders.items():
                weight, bias = (tensors[f"h.{layer}.{part}.{kind}"] for kind in ("weight", "bias"))
                if rows is not None and len(rows) == len(weight):  # an attention alone may have another input width
                    weight = weight.take(rows, axis=0)
                found[f"h.{layer}.{part}.weight"], found[f"h.{layer}.{part}.bias"] = (
                    weight.take(columns, axis=-1),
                    bias[columns],
                )
        return found

    def drawn(self, stage: str, array: Array) -> Array:
        """A stage of the model in this order, the inverse of restored."""
        places = self.restored(stage, np.arange(array.size, dtype=np.float64).reshape(array.shape)).astype(np.intp)
        out = np.empty_like(array)
        out.reshape(-1)[places.reshape(-1)] = array.reshape(-1)
        return out

    def restored(self, stage: str, array: Array) -> Array:
        """A stage of that model in the model's own order."""
        layer, local = located(stage)
        out = np.empty_like(array)
        if layer is None:
            if stage in ("logits", "log_probabilities"):
                return array
            out[..., self.channels] = array
        elif local in ("attn.scores", "attn.weights"):
            out[:, self.heads[layer]] = array
        elif local in ("attn.q", "attn.k", "attn.v", "attn.heads"):
            columns = self.queries[layer] if local in ("attn.q", "attn.k") else self.values[layer]
            width = array.shape[-1]
            for place, head in enumerate(self.heads[layer]):
                out[:, head][..., columns[place * width : (place + 1) * width] - head * width] = array[:, place]
        elif local == "attn.c_attn":
            C = len(self.channels)
            thirds = np.concatenate([self.queries[layer], C + self.queries[layer], 2 * C + self.values[layer]])
            out[..., thirds] = array
        elif local in ("attn.query", "attn.key"):
            out[..., self.queries[layer]] = array
        elif local in ("attn.value", "attn.merged"):
            out[..., self.values[layer]] = array
        elif local in ("mlp.c_fc", "mlp.act"):
            out[..., self.units[layer]] = array
        elif array.shape[-1] == len(self.channels):
            out[..., self.channels] = array
        else:
            return array  # the input of an attention alone
        return out


def redraw(config: Config, generator: np.random.Generator) -> Redraw:
    """Another order of everything."""
    D, layers = config.head_width, range(config.n_layer)
    heads = [generator.permutation(config.n_head) for _ in layers]

    def columns(order: NDArray[Any]) -> NDArray[np.intp]:
        return np.concatenate([head * D + generator.permutation(D) for head in order])

    return Redraw(
        generator.permutation(config.n_embd),
        heads,
        [columns(order) for order in heads],
        [columns(order) for order in heads],
        [generator.permutation(config.inner_width) for _ in layers],
    )
