"""All known mistakes, each with the change to the textbook's pass that reproduces it.

A mistake that depends on the model's sizes (n_head, the order of layers) is an entry for every size that it can have.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..config import Config
from .mistake import Mistake, replaced
from .mistakes_in_data import caches, embeddings, loading, orders, outputs
from .mistakes_in_formulas import activations, attention, heads, layer_norms, masks, precisions, residuals
from .textbook import Formula


def catalogue(config: Config, tokens: int, chunks: Sequence[int] = (), padded: bool = False) -> list[Mistake]:
    """Every entry that can be made in a model of this shape with so many tokens.

    chunks: how many tokens were run at a time with a cache, where that is known; padded: on the left.
    """
    found = [
        *activations(),
        *layer_norms(),
        *attention(),
        *heads(config),
        *masks(),
        *residuals(),
        *loading(config),
        *embeddings(config, tokens),
        *orders(config.n_layer),
        *precisions(),
        *outputs(config, tokens),
    ]
    if padded:
        late: dict[str, Formula] = {"positions": lambda s: np.arange(s["token_ids"].shape[1]) + s.run.padding}
        found.append(
            Mistake(
                "positions count the padding",
                "positions begin at the padding on the left, not at the first token of the text",
                "transformers' own forward without position_ids",
                replaced(late),
            )
        )
    return found + (list(caches(tuple(chunks))) if len(chunks) > 1 else [])
