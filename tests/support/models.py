"""Models for the tests, with odd shapes and weights in which no parameter has its default of zero or one."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from npgpt import parameters
from npgpt.checkpoints import configs, safetensors
from npgpt.config import Config
from npgpt.errors import NpgptError
from npgpt.parameters import Array, Parameters
from npgpt.text.tokenizer import Tokenizer


def small(**fields: Any) -> Config:
    """Return a configuration of 3 heads × 7, 2 blocks, 40 ids and 24 positions, changed by the given fields."""
    return Config(**{"vocab_size": 40, "n_positions": 24, "n_embd": 21, "n_layer": 2, "n_head": 3} | fields)


SHAPES = {
    "3 heads x 7": small(),
    "1 head": small(n_embd=10, n_head=1, n_layer=1),
    "8 heads x 1": small(n_embd=8, n_head=8, n_layer=3),
    "untied": small(n_embd=12, n_head=2, tie_word_embeddings=False),
    "n_inner": small(n_inner=17),
    "unscaled": small(scale_attn_weights=False),
    "scaled by layer": small(n_layer=3, scale_attn_by_inverse_layer_idx=True),
    "erf": small(activation_function="gelu"),
    "epsilon": small(layer_norm_epsilon=1e-3),
}


def random_arrays(config: Config, seed: int = 0, dtype: str = "float64") -> dict[str, Array]:
    """Return random weights with activations near 1, attention far from uniform, and biases that matter."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, Array] = {}
    for name, shape in parameters.schema(config).items():
        values = rng.standard_normal(shape)
        if len(shape) == 2 and name not in ("wte.weight", "wpe.weight"):
            values /= np.sqrt(shape[0] if name != "lm_head.weight" else shape[1])
        elif ".ln_" in name or name.startswith("ln_f"):
            values = 0.3 * values + name.endswith("weight")
        else:
            values *= 0.5
        arrays[name] = values.astype(np.float32).astype(
            dtype
        )  # float32 values, so that both dtypes hold the same model
    return arrays


def random_parameters(config: Config, seed: int = 0, dtype: str = "float64") -> Parameters:
    """Return random_arrays() as Parameters."""
    return parameters.from_arrays(config, random_arrays(config, seed, dtype))


def no_text(reason: str) -> Callable[[], Tokenizer]:
    """Return a function that raises NpgptError with this reason instead of opening a tokenizer."""

    def open_tokenizer() -> Tokenizer:
        raise NpgptError(reason)

    return open_tokenizer


def random_ids(config: Config, shape: tuple[int, ...], seed: int = 0) -> np.typing.NDArray[np.int64]:
    """Return random ids from the whole vocabulary."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape)


def put(folder: Path, arrays: dict[str, Array], config: dict[str, Any] | None) -> Path:
    """Write a model folder with weights and, unless it is None, config.json; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.write(folder / "model.safetensors", arrays)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def store(folder: Path, config: Config, **changes: Any) -> Path:
    """Write a model folder of random weights, with changes in its config.json."""
    return put(folder, random_arrays(config, dtype="float32"), configs.to_dict(config) | changes)


def stored(path: Path, arrays: Mapping[str, Array]) -> Path:
    """Write a safetensors file and return its path."""
    safetensors.write(path, dict(arrays))
    return path


def from_dict(mapping: Mapping[str, Any], source: str = "the configuration") -> Config:
    """Return the Config of a checkpoint that has this mapping as config.json and no tensors."""
    fields, _ = configs.read_fields(mapping, source)
    return configs.complete(fields, {}, None, source)


def speaking(folder: Path) -> Path:
    """Write a model of 257 ids whose vocabulary is the bytes and <|endoftext|>; its weights lie in two shards."""
    config = small(vocab_size=257, n_positions=64)
    arrays = random_arrays(config, dtype="float32")
    folder.mkdir(parents=True, exist_ok=True)
    shards = {"one.safetensors": list(arrays)[:5], "two.safetensors": list(arrays)[5:]}
    for shard, names in shards.items():
        safetensors.write(folder / shard, {name: arrays[name] for name in names})
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(configs.to_dict(config)))
    ranks = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
    (folder / "vocab.tiktoken").write_bytes(ranks)
    return folder
