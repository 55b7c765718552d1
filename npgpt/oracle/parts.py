"""A part alone, since that is how people build: attention, LayerNorm, GELU, the MLP, a block."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..config import Config
from ..errors import NpgptError
from ..parameters import Array, schema
from . import conditions, modules, outputs
from .check import compare
from .mistakes import Mistake, catalogue
from .report import Report
from .textbook import BLOCK
from .theirs import Case

# The stage that each part is given, the one that it ends in, and where its tensors' names begin.
PARTS = {
    "attention": ("h.0.ln_1", "h.0.attn.c_proj", ("attn.",)),
    "layer_norm": ("embedding", "h.0.ln_1", ("ln_1.",)),
    "gelu": ("h.0.mlp.c_fc", "h.0.mlp.act", ()),
    "mlp": ("h.0.ln_2", "h.0.mlp.c_proj", ("mlp.",)),
    "block": ("embedding", "h.0", ("ln_1.", "attn.", "ln_2.", "mlp.")),
}
TOKENS = 12


def check_part(
    part: str,
    theirs: Any,
    *,
    x: Array | None = None,
    weights: Mapping[str, Array] | None = None,
    n_head: int | None = None,
    dtype: str | None = None,
    seed: int = 0,
) -> Report:
    """Compare one part of a GPT-2 with the textbook's, and name the mistake in it.

    part: "attention", "layer_norm", "gelu", "mlp" or "block". theirs: a PyTorch module, or a function of x whose
    weights are given by canonical names without the block, {"attn.c_attn.weight": [C, 3C], …}; a module's own are read
    off it. x: the input [B, T, C] (numbers for "gelu"); by default one that tells the known mistakes apart. The weights
    are taken as true. Raises NpgptError where they cannot be told, or do not fit.
    """
    if part not in PARTS:
        raise NpgptError(f"there is no part {part!r}; there are {', '.join(PARTS)}")
    is_module = modules.is_module(theirs)
    tensors: dict[str, Array] = {name: np.asarray(array, np.float64) for name, array in (weights or {}).items()}
    if not tensors and is_module and part != "gelu":
        tensors = modules.part_tensors(part, theirs)
    given_width, width = _widths(part, tensors, x)
    heads = n_head or 1
    if part in ("attention", "block") and not n_head:
        if not is_module:
            raise NpgptError(f"{part} needs n_head=, the number of heads")
        heads = modules.stated_n_head(theirs)
    problems = conditions.dropout(theirs) if is_module else []
    rng = np.random.default_rng(seed)
    if x is None:  # uneven, so that means, variances and orders show; small rows too, so that an epsilon does
        x = rng.standard_normal((2, TOKENS, given_width)) * np.geomspace(0.02, 3, TOKENS)[:, None] + 0.3
        x = np.linspace(-6, 6, 2 * TOKENS * width).reshape(2, TOKENS, width) if part == "gelu" else x
    x = np.asarray(x, np.float64)
    x = x.reshape(-1, *x.shape[-2:]) if x.ndim > 1 else x[None, None]
    inner = tensors["mlp.c_fc.weight"].shape[1] if "mlp.c_fc.weight" in tensors else 4 * width
    inner = x.shape[-1] if part == "gelu" else inner
    config = Config(vocab_size=2, n_positions=x.shape[1], n_embd=width, n_layer=1, n_head=heads, n_inner=inner)
    output, dtype = _run(theirs, x, dtype)
    if x.shape[-1] != given_width:
        raise NpgptError(f"{part} takes an input of width {given_width}, and x is {list(x.shape)}")
    if output.shape != (expected := (*x.shape[:2], width)):
        raise NpgptError(
            f"{part} gives {list(output.shape)} for an input of {list(x.shape)}: it must be {list(expected)}"
        )
    given, stage, _ = PARTS[part]
    case = Case(np.zeros(x.shape[:2], int), {stage: output}, given={given: x})
    entries = _entries(part, config, x.shape[1], square=given_width == width)
    return compare(config, _complete(tensors, config, rng), [case], dtype, problems, entries=entries)


def _entries(part: str, config: Config, tokens: int, square: bool) -> list[Mistake]:
    """Return those that a part alone can have: they replace no stage outside the blocks but ln_f's parameters.

    square: whether its input is as wide as its output, without which c_attn is neither transposed nor given the input.
    """
    known = {*BLOCK, "config", "ln_f.weight", "ln_f.bias"}
    if not square:
        known -= {"attn.c_attn", "attn.c_attn.weight"}
    return [entry for entry in catalogue(config, tokens) if known.issuperset(entry.stages)]


def _widths(part: str, tensors: Mapping[str, Array], x: Array | None) -> tuple[int, int]:
    """Of input and output, by the tensors or the input; an attention alone may have two. Raises NpgptError for none."""
    if part == "gelu":
        return (width := 64 if x is None else int(np.shape(x)[-1])), width
    kinds = (".weight", ".bias") if part == "layer_norm" else (".weight",)
    needed = [name for name in BLOCK if name.startswith(PARTS[part][2]) and name.endswith(kinds)]
    if missing := [name for name in needed if name not in tensors]:
        raise NpgptError(f"{part} needs its weights, and {', '.join(missing)} cannot be told: give weights={{…}}")
    first = tensors[needed[0]]
    return len(first), first.shape[1] // 3 if part == "attention" else len(first)


def _run(theirs: Callable[..., Any], x: Array, dtype: str | None) -> tuple[Array, str]:
    """Their output in float64, and the dtype in which it was computed."""
    given: Any
    if not modules.is_module(theirs):
        dtype = dtype or "float64"
        given = x.astype(dtype if dtype in ("float32", "float64") else "float32")
    elif (parameter := next(iter(theirs.parameters()), None)) is not None:  # type: ignore[attr-defined]
        dtype = dtype or modules.dtype_of(theirs)
        given = parameter.detach().double().new_tensor(x.tolist()).to(parameter.dtype)
    else:  # a module without parameters, such as a GELU, has no tensor to make one by
        dtype, torch = dtype or "float32", sys.modules["torch"]
        given = torch.tensor(x.tolist(), dtype=torch.float32)
    output = theirs(given)
    return outputs.as_array(output[0] if isinstance(output, tuple) else output).astype(np.float64), dtype


def _complete(tensors: Mapping[str, Array], config: Config, rng: np.random.Generator) -> dict[str, Array]:
    """The rest of a model, which the part does not see."""
    found = {}
    for name, shape in schema(config).items():
        local = name.removeprefix("h.0.")
        found[name] = tensors[local] if local in tensors else rng.standard_normal(shape)
        if found[name].shape != shape and (local != "attn.c_attn.weight" or found[name].shape[1:] != shape[1:]):
            raise NpgptError(f"{local} is {list(found[name].shape)}, and must be {list(shape)}")
    return found
