"""GPT-2's parameters: typed structures whose fields carry their shapes, and the one schema read off them.

Shapes: C n_embd, F inner width, N n_positions, V vocab_size. A field's path is its canonical name in a checkpoint:
parameters.h[0].attn.c_attn.weight is "h.0.attn.c_attn.weight". Matrices are stored [in, out], so that the
linear map is x @ weight + bias.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import Annotated, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .config import Config
from .errors import NpgptError

Array: TypeAlias = NDArray[np.floating[Any]]  # float32 or float64
Shape: TypeAlias = tuple[int, ...]
Record: TypeAlias = Callable[[str, Array], None]


class Embedding(NamedTuple):
    """One row for each id or position."""

    weight: Array


class LayerNorm(NamedTuple):
    """Gain and bias after normalisation."""

    weight: Array
    bias: Array


class Linear(NamedTuple):
    """x @ weight + bias."""

    weight: Array  # [in, out]
    bias: Array  # [out]


class Attention(NamedTuple):
    """Queries, keys and values side by side, C columns each, and the projection that follows the heads."""

    c_attn: Annotated[Linear, "C", "3C"]
    c_proj: Annotated[Linear, "C", "C"]


class MLP(NamedTuple):
    """Up, activation, down."""

    c_fc: Annotated[Linear, "C", "F"]
    c_proj: Annotated[Linear, "F", "C"]


class Block(NamedTuple):
    """One of the n_layer blocks."""

    ln_1: Annotated[LayerNorm, "C"]
    attn: Attention
    ln_2: Annotated[LayerNorm, "C"]
    mlp: MLP


class Parameters(NamedTuple):
    """A whole GPT-2. A tied output head is the very same object as wte."""

    wte: Annotated[Embedding, "V", "C"]
    wpe: Annotated[Embedding, "N", "C"]
    h: tuple[Block, ...]
    ln_f: Annotated[LayerNorm, "C"]
    lm_head: Annotated[Embedding, "V", "C"]


def schema(config: Config) -> dict[str, Shape]:
    """Every canonical name with its shape, in the order of computation; lm_head.weight only where it is untied."""
    return dict(_shapes(Parameters, config, ""))


def _shapes(structure: type, config: Config, prefix: str) -> Iterator[tuple[str, Shape]]:
    C = config.n_embd
    sizes = {"C": C, "3C": 3 * C, "F": config.inner_width, "N": config.n_positions, "V": config.vocab_size}
    for name, hint in structure.__annotations__.items():
        path = prefix + name
        if name == "h":
            for layer in range(config.n_layer):
                yield from _shapes(Block, config, f"h.{layer}.")
        elif not hasattr(hint, "__metadata__"):
            yield from _shapes(hint, config, path + ".")
        elif not (name == "lm_head" and config.tie_word_embeddings):
            shape = tuple(sizes[size] for size in hint.__metadata__)
            yield path + ".weight", shape
            if "bias" in _bare(hint)._fields:
                yield path + ".bias", shape[-1:]


def _bare(hint: Any) -> Any:
    """The structure that a field holds, without its shape."""
    return getattr(hint, "__origin__", hint) if hasattr(hint, "__metadata__") else hint


def count_blocks(names: Iterable[str]) -> int:
    """How many different h.N there are among canonical names."""
    return len({match[0] for name in names if (match := re.match(r"h\.\d+\.", name))})


def check_shapes(
    config: Config, shapes: Mapping[str, Shape | None], source: str, stated: str = "its configuration"
) -> None:
    """Compare what a checkpoint holds with the schema, strictly; a shape that is None fits. source names it in errors,
    stated what says the sizes.

    Raises one NpgptError with all faults: names missing, names left over, shapes that differ.
    """
    blocks = count_blocks(shapes)
    depth = "" if blocks == config.n_layer else f"it holds {blocks} blocks and n_layer is {config.n_layer}"
    if config.n_layer > 10 * blocks + 100:  # the schema would be longer than the file
        raise NpgptError(f"{source} does not fit {stated}: {depth}")
    expected = schema(config)
    faults = [(name, "is missing") for name in expected if name not in shapes]
    faults += [(name, "is left over") for name in shapes if name not in expected]
    faults += [
        (name, f"is {list(found)} and must be {list(shape)}")
        for name, shape in expected.items()
        if (found := shapes.get(name)) is not None and found != shape
    ]
    if faults:
        raise NpgptError(f"{source} does not fit {stated}: {depth and depth + '; '}{_in_short(faults)}")


def _in_short(faults: Iterable[tuple[str, str]]) -> str:
    """All faults, the same fault of several blocks told once, and a count in place of what is beyond reading."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, fault in faults:
        alike.setdefault((re.sub(r"^h\.\d+\.", "h.*.", name), fault), []).append(name)
    lines = [
        f"{names[0]} {fault}" if len(names) == 1 else f"{pattern} {fault} (in {len(names)} blocks)"
        for (pattern, fault), names in alike.items()
    ]
    return "; ".join(lines[:50]) + (f"; and {len(lines) - 50} more" if len(lines) > 50 else "")


def from_arrays(config: Config, arrays: Mapping[str, Array]) -> Parameters:
    """The structure out of {canonical name: array}, strictly: every array in place, none left over, one dtype.

    Raises NpgptError as check_shapes does, and where dtypes are mixed or none of float32 and float64.
    """
    check_shapes(config, {name: array.shape for name, array in arrays.items()}, "the set of arrays")
    dtypes = {str(array.dtype) for array in arrays.values()}
    if dtypes not in ({"float32"}, {"float64"}):
        raise NpgptError(f"parameters must be all float32 or all float64, not {', '.join(sorted(dtypes))}")

    def build(structure: Any, prefix: str) -> Any:
        """One structure out of the arrays whose names begin with the prefix."""
        hints = structure.__annotations__.items()
        return structure(
            *(
                arrays[prefix + name] if hint == Array else build(_bare(hint), f"{prefix}{name}.")
                for name, hint in hints
            )
        )

    wte = build(Embedding, "wte.")
    return Parameters(
        wte=wte,
        wpe=build(Embedding, "wpe."),
        h=tuple(build(Block, f"h.{layer}.") for layer in range(config.n_layer)),
        ln_f=build(LayerNorm, "ln_f."),
        lm_head=wte if config.tie_word_embeddings else build(Embedding, "lm_head."),
    )


def to_arrays(parameters: Parameters) -> dict[str, Array]:
    """{canonical name: array}, the inverse of from_arrays; the arrays are the same, not copies."""

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


def count(config: Config) -> dict[str, int]:
    """How many parameters each part has: wte, wpe, one block's attn and mlp and norms times n_layer, ln_f, lm_head.

    A tied head counts nothing, so that the values add up to the model's size (124,439,808 for gpt2).
    """
    counts: dict[str, int] = {}
    for name, shape in schema(config).items():
        part = ".".join(name.split(".")[2:-1]) if name.startswith("h.") else name.split(".")[0]
        part = f"h.*.{part}" if name.startswith("h.") else part
        counts[part] = counts.get(part, 0) + prod(shape)
    return counts
