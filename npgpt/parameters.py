"""GPT-2's parameters: the names and shapes of all tensors, and typed structures that hold them.

Shapes: C n_embd, F inner width, N n_positions, V vocab_size. A field's path is its canonical name in a checkpoint:
parameters.h[0].attn.c_attn.weight is "h.0.attn.c_attn.weight". Matrices are stored [in, out], so a linear layer is
x @ weight + bias.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .config import Config
from .errors import NpgptError

Array: TypeAlias = NDArray[np.floating[Any]]  # float32 or float64
Padding: TypeAlias = NDArray[np.int64] | int  # [B, 1, 1, 1], or 0 if no row is padded: see KVCache.padding
Shape: TypeAlias = tuple[int, ...]
Record: TypeAlias = Callable[[str, Array], None]  # the user's: a stage's name and a copy of it
Stage: TypeAlias = Array | Callable[[], Array]  # an intermediate, or a function that computes one if it is recorded
StageRecord: TypeAlias = Callable[[str, Stage], Any]  # passes a stage on and returns it


class Kept(dict[str, Array]):
    """A record of stages as the run has them: not copied, and without those that are computed only if recorded."""

    def __call__(self, name: str, stage: Stage) -> None:
        """Keep a stage."""
        if not callable(stage):
            self[name] = stage


def recorder(record: Record | None, prefix: str = "") -> StageRecord:
    """Return a function that passes a copy of each stage to `record`, if there is one, and returns the stage."""

    def observe(name: str, stage: Stage) -> Stage:
        if isinstance(record, Kept):
            record(prefix + name, stage)
        elif record is not None:
            record(prefix + name, stage() if callable(stage) else stage.copy())
        return stage

    return observe


class Embedding(NamedTuple):
    """A table with a row for each id or position."""

    weight: Array


class LayerNorm(NamedTuple):
    """Gain and bias of a LayerNorm."""

    weight: Array  # [C]
    bias: Array  # [C]


class Linear(NamedTuple):
    """A linear layer, x @ weight + bias."""

    weight: Array  # [in, out]
    bias: Array  # [out]


class Attention(NamedTuple):
    """Attention: c_attn makes queries, keys and values, C columns each; c_proj follows the merged heads."""

    c_attn: Linear  # [C, 3C]
    c_proj: Linear  # [C, C]

    def __repr__(self) -> str:
        return in_short(self)


class MLP(NamedTuple):
    """The MLP: c_fc up to width F, the activation, c_proj down to width C."""

    c_fc: Linear  # [C, F]
    c_proj: Linear  # [F, C]

    def __repr__(self) -> str:
        return in_short(self)


class Block(NamedTuple):
    """One of the n_layer blocks."""

    ln_1: LayerNorm
    attn: Attention
    ln_2: LayerNorm
    mlp: MLP

    def __repr__(self) -> str:
        return in_short(self)


class Parameters(NamedTuple):
    """All parameters of a GPT-2. A tied output head is the same object as wte."""

    wte: Embedding  # [V, C]
    wpe: Embedding  # [N, C]
    h: tuple[Block, ...]
    ln_f: LayerNorm
    lm_head: Embedding  # [V, C]

    def __repr__(self) -> str:
        return in_short(self)


def in_short(value: object) -> str:
    """Return a part of the parameters as text, with the arrays' shapes in place of their numbers."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, (Embedding, LayerNorm, Linear, Attention, MLP, Block, Parameters)):
        fields = [f"{name}={in_short(part)}" for name, part in value._asdict().items()]
        return f"{type(value).__name__}({', '.join(fields)})"
    return f"<{len(value)} blocks>" if isinstance(value, tuple) else repr(value)


def schema(config: Config) -> dict[str, Shape]:
    """Return every tensor's name and shape in order of computation; lm_head.weight only if it is untied."""
    C, F, N, V = config.n_embd, config.inner_width, config.n_positions, config.vocab_size
    block: dict[str, Shape] = {
        "ln_1.weight": (C,),
        "ln_1.bias": (C,),
        "attn.c_attn.weight": (C, 3 * C),
        "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C),
        "attn.c_proj.bias": (C,),
        "ln_2.weight": (C,),
        "ln_2.bias": (C,),
        "mlp.c_fc.weight": (C, F),
        "mlp.c_fc.bias": (F,),
        "mlp.c_proj.weight": (F, C),
        "mlp.c_proj.bias": (C,),
    }
    return {
        "wte.weight": (V, C),
        "wpe.weight": (N, C),
        **{f"h.{layer}.{name}": shape for layer in range(config.n_layer) for name, shape in block.items()},
        "ln_f.weight": (C,),
        "ln_f.bias": (C,),
        **({} if config.tie_word_embeddings else {"lm_head.weight": (V, C)}),
    }


def count_blocks(names: Iterable[str]) -> int:
    """Return the number of different blocks h.N among canonical names."""
    return len({match[0] for name in names if (match := re.match(r"h\.\d+\.", name))})


def check_shapes(
    config: Config, shapes: Mapping[str, Shape | None], source: str, stated: str = "its configuration"
) -> None:
    """Compare the names and shapes of a checkpoint with the schema; the shape None always fits.

    In errors, source names the checkpoint and stated its configuration. Raises one NpgptError that lists all faults:
    missing tensors, unexpected tensors and wrong shapes.
    """
    blocks = count_blocks(shapes)
    depth = "" if blocks == config.n_layer else f"it has {blocks} blocks and n_layer is {config.n_layer}"
    if config.n_layer > 10 * blocks + 100:  # the schema would be longer than the file
        raise NpgptError(f"{source} does not fit {stated}: {depth}")
    expected = schema(config)
    faults = [(name, "is missing") for name in expected if name not in shapes]
    faults += [(name, "is unexpected") for name in shapes if name not in expected]
    faults += [
        (name, f"is {list(found)} and must be {list(shape)}")
        for name, shape in expected.items()
        if (found := shapes.get(name)) is not None and found != shape
    ]
    if faults:
        raise NpgptError(f"{source} does not fit {stated}: {depth and depth + '; '}{_in_short(faults)}")


def _in_short(faults: Iterable[tuple[str, str]]) -> str:
    """Return the faults as text: the same fault in several blocks once, and at most 50 in all."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, fault in faults:
        alike.setdefault((re.sub(r"^h\.\d+\.", "h.*.", name), fault), []).append(name)
    lines = [
        f"{names[0]} {fault}" if len(names) == 1 else f"{pattern} {fault} (in {len(names)} blocks)"
        for (pattern, fault), names in alike.items()
    ]
    return "; ".join(lines[:50]) + (f"; and {len(lines) - 50} more" if len(lines) > 50 else "")


def from_arrays(config: Config, arrays: Mapping[str, Array]) -> Parameters:
    """Return Parameters made of {canonical name: array}. The arrays are not copied.

    Raises NpgptError as check_arrays does.
    """
    check_arrays(config, arrays, "the set of arrays")

    def norm(name: str) -> LayerNorm:
        return LayerNorm(arrays[f"{name}.weight"], arrays[f"{name}.bias"])

    def linear(name: str) -> Linear:
        return Linear(arrays[f"{name}.weight"], arrays[f"{name}.bias"])

    def block(name: str) -> Block:
        attn = Attention(linear(f"{name}.attn.c_attn"), linear(f"{name}.attn.c_proj"))
        mlp = MLP(linear(f"{name}.mlp.c_fc"), linear(f"{name}.mlp.c_proj"))
        return Block(norm(f"{name}.ln_1"), attn, norm(f"{name}.ln_2"), mlp)

    wte = Embedding(arrays["wte.weight"])
    return Parameters(
        wte=wte,
        wpe=Embedding(arrays["wpe.weight"]),
        h=tuple(block(f"h.{layer}") for layer in range(config.n_layer)),
        ln_f=norm("ln_f"),
        lm_head=wte if config.tie_word_embeddings else Embedding(arrays["lm_head.weight"]),
    )


def check_arrays(config: Config, arrays: Mapping[str, Array], source: str) -> None:
    """Raise NpgptError as check_shapes does, and if the dtypes are not all float32 or all float64."""
    check_shapes(config, {name: array.shape for name, array in arrays.items()}, source)
    dtypes = {str(array.dtype) for array in arrays.values()}
    if dtypes not in ({"float32"}, {"float64"}):
        raise NpgptError(f"parameters must be all float32 or all float64, not {', '.join(sorted(dtypes))}")


def check_fit(config: Config, parameters: Parameters, source: str) -> None:
    """Raise NpgptError if parameters are incomplete or do not fit the configuration."""
    try:
        arrays = to_arrays(parameters)
    except (AttributeError, TypeError, RecursionError):
        raise NpgptError(f"{source} has parameters that are not arrays") from None
    check_arrays(config, arrays, source)


def to_arrays(parameters: Parameters) -> dict[str, Array]:
    """Return {canonical name: array}, the inverse of from_arrays. The arrays are not copied."""

    def walk(part: Any, prefix: str) -> Iterator[tuple[str, Array]]:
        if isinstance(part, np.ndarray):
            yield prefix, part
        elif hasattr(part, "_fields"):
            for name in part._fields:
                yield from walk(getattr(part, name), f"{prefix}.{name}" if prefix else name)
        else:
            for index, item in enumerate(part):
                yield from walk(item, f"{prefix}.{index}")

    arrays = dict(walk(parameters, ""))
    if parameters.lm_head is parameters.wte:
        del arrays["lm_head.weight"]
    return arrays


def sha256(config: Config, parameters: Parameters) -> str:
    """Return the sha256 of the configuration and of every parameter's name, dtype and values, in hexadecimal."""
    import hashlib  # takes 5 ms, which a prompt never needs

    digest = hashlib.sha256(repr(config).encode())
    for name, array in to_arrays(parameters).items():
        digest.update(f"{name} {array.dtype} ".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def count(config: Config) -> dict[str, int]:
    """Return the number of parameters in each part: wte, wpe, h.*.attn.c_attn and so on for all blocks, ln_f, lm_head.

    A tied head is not counted, so the numbers add up to the model's size (124,439,808 for gpt2).
    """
    counts: dict[str, int] = {}
    for name, shape in schema(config).items():
        part = ".".join(name.split(".")[2:-1]) if name.startswith("h.") else name.split(".")[0]
        part = f"h.*.{part}" if name.startswith("h.") else part
        counts[part] = counts.get(part, 0) + prod(shape)
    return counts
