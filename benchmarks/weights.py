"""Write random weights in the published models' real shapes, once."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npgpt import parameters
from npgpt.checkpoints import atomic, configs, safetensors
from npgpt.config import Config

ROWS = 1024  # written at a time


def make(cache: Path, name: str, config: Config) -> Path:
    """Return the folder cache/NAME with float32 model.safetensors and config.json.

    With GPT-2's own initialisation, N(0, 0.02²), a model repeats its last token whatever attention does. Here
    matrices are N(0, 4 / in) and embeddings N(0, 0.1²), so that the blocks outweigh the embedding and greedy ids vary.
    Biases are not zero.
    """
    folder = cache / name
    if (folder / "config.json").is_file():
        return folder
    print(f"writing random weights to {folder}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    layout = {tensor: ("float32", shape) for tensor, shape in parameters.schema(config).items()}
    generator = np.random.default_rng(0)

    def parts(tensor: str) -> Iterator[NDArray[Any]]:
        _, shape = layout[tensor]
        embedding, gain = tensor in ("wte.weight", "wpe.weight"), "ln_" in tensor and tensor.endswith(".weight")
        scale = 0.1 if embedding or len(shape) == 1 else 2 / math.sqrt(shape[0])
        for part in normal(generator, shape):
            part *= scale
            part += gain
            yield part

    safetensors.write_parts(folder / "model.safetensors", layout, parts)
    with atomic.writing(folder / "config.json") as file:
        file.write(json.dumps(configs.to_dict(config)).encode())
    return folder


def normal(generator: np.random.Generator, shape: tuple[int, ...]) -> Iterator[NDArray[np.float32]]:
    """Yield N(0, 1) of that shape a few rows at a time, because one tensor of gpt2-xl takes 322 MB."""
    for row in range(0, shape[0], ROWS):
        yield generator.standard_normal((min(ROWS, shape[0] - row), *shape[1:]), dtype=np.float32)
