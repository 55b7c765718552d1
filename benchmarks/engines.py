"""npgpt as an engine to be measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from . import peers

if TYPE_CHECKING:
    from .workloads import Engine


class Npgpt:
    """The loop a user would write: forward with a cache, then the largest logit."""

    def __init__(self, folder: Path, dtype: Literal["float32", "float64"]) -> None:
        import npgpt

        self.model = npgpt.load(folder, dtype=dtype)
        self.dtype = dtype

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """Return greedy ids."""
        import numpy as np

        import npgpt

        cache = npgpt.KVCache(self.model.config, len(prompts), len(prompts[0]) + new - 1, self.dtype)
        ids = np.array(prompts)
        drawn = []
        for _ in range(new):
            ids = self.model(ids, cache, logits_from=-1)[:, -1].argmax(axis=-1)[:, None]
            drawn.append(ids)
        found: list[list[int]] = np.concatenate(drawn, axis=1).tolist()
        return found

    def score(self, ids: list[int]) -> list[float]:
        """Return log-probabilities."""
        return peers.log_probabilities(self.model(ids)[0], ids)


OURS: dict[str, Callable[[Path, int], Engine]] = {
    "npgpt": lambda folder, threads: Npgpt(folder, "float32"),
    "npgpt, misaligned file": lambda folder, threads: Npgpt(folder, "float32"),
    "npgpt float64": lambda folder, threads: Npgpt(folder, "float64"),
}
ENGINES = {**OURS, **peers.ENGINES}
