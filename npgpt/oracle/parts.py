"""A part alone, since that is how people build: attention, LayerNorm, GELU, the MLP, a block."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..config import Config
from ..errors import NpgptError
from ..parameters import Array, schema
from . import modules
from .checking import compare
from .evidence import Case
from .mistakes import Mistake, catalogue
from .report import Report

# The stage that each part is given, and the one that it ends in.
PARTS = {
    "attention": ("h.0.ln_1", "h.0.attn.c_proj"),
    "layer_norm": ("embedding", "h.0.ln_1"),
    "gelu": ("h.0.mlp.c_fc", "h.0.mlp.act"),
    "mlp": ("h.0.ln_2", "h.0.mlp.c_proj"),
    "block": ("embedding", "h.0"),
}
LINEAR = {  # the end of a linear layer's path in a module, and its canonical name
    "attention": (
        ("c_proj", "attn.c_proj"),
        ("out_proj", "attn.c_proj"),
        ("proj", "attn.c_proj"),
        ("c_attn", "attn.c_attn"),
    ),
    "mlp": (("c_fc", "mlp.c_fc"), ("c_proj", "mlp.c_proj"), ("layers.0", "mlp.c_fc"), ("layers.2", "mlp.c_proj")),
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
    tensors: dict[str, Array] = {name: np.asarray(array, np.float64) for name, array in (weights or {}).items()}
    if not tensors and modules.is_module(theirs) and part != "gelu":
        tensors = _own(part, theirs)
    given_width, width = _widths(part, tensors, x)
    has_heads, is_module = part in ("attention", "block"), modules.is_module(theirs)
    heads = n_head or (modules.stated_n_head(theirs) if has_heads and is_module else None)
    if has_heads and heads is None:
        raise NpgptError(f"{part} needs n_head=, the number of heads")
    problems = modules.dropout(theirs) if is_module else []
    rng = np.random.default_rng(seed)
    if x is None:  # uneven, so that means, variances and orders show; small rows too, so that an epsilon does
        x = rng.standard_normal((2, TOKENS, given_width)) * np.geomspace(0.02, 3, TOKENS)[:, None] + 0.3
        x = np.linspace(-6, 6, 2 * TOKENS * width).reshape(2, TOKENS, width) if part == "gelu" else x
    x = np.asarray(x, np.float64)
    x = x.reshape(-1, *x.shape[-2:]) if x.ndim > 1 else x[None, None]
    if part == "gelu":
        inner = x.shape[-1]
    else:
        inner = tensors["mlp.c_fc.weight"].shape[1] if "mlp.c_fc.weight" in tensors else 4 * width
    config = Config(vocab_size=2, n_positions=x.shape[1], n_embd=width, n_layer=1, n_head=heads or 1, n_inner=inner)
    output, dtype = _run(theirs, x, tensors, dtype)
    given, stage = PARTS[part]
    if x.shape[-1] != given_width:
        raise NpgptError(f"{part} takes an input of width {given_width}, and x is {list(x.shape)}")
    if output.shape != (expected := (*x.shape[:2], width)):
        raise NpgptError(
            f"{part} gives {list(output.shape)} for an input of {list(x.shape)}: it must be {list(expected)}"
        )
    whole = _complete(tensors, config, rng)
    ids = np.zeros(x.shape[:2], int)
    return compare(
        config,
        whole,
        [Case(ids, {stage: output}, given={given: x})],
        dtype,
        problems,
        entries=_entries(part, config, x.shape[1], square=given_width == width),
    )


def _entries(part: str, config: Config, tokens: int, square: bool) -> list[Mistake]:
    """Return those that a part alone can have: they replace no stage outside the blocks, nor the order of the blocks.

    square: whether its input is as wide as its output, without which c_attn is neither transposed nor given the input.
    """
    foreign = {"layers", "token_ids", "positions", "wte", "wte.weight", "wpe", "ln_f", "logits"}
    if not square:
        foreign |= {"attn.c_attn", "attn.c_attn.weight"}
    return [entry for entry in catalogue(config, tokens) if foreign.isdisjoint(entry.stages)]


def _own(part: str, module: Any) -> dict[str, Array]:
    """A module's tensors by canonical names, a torch.nn.Linear's [out, in] turned round."""
    linears = {
        path: m for path, m in module.named_modules() if hasattr(m, "weight") and modules.as_array(m.weight).ndim == 2
    }
    found: dict[str, Array] = {}

    def take(path: str, name: str) -> None:
        layer = linears[path]
        weight = modules.as_array(layer.weight).astype(np.float64)
        stored_in_out = type(layer).__name__ == "Conv1D"
        found[f"{name}.weight"] = weight if stored_in_out else weight.T
        bias = getattr(layer, "bias", None)
        found[f"{name}.bias"] = (
            np.zeros(found[f"{name}.weight"].shape[1]) if bias is None else modules.as_array(bias).astype(np.float64)
        )

    kinds = ("attention", "mlp") if part == "block" else (part,)
    for path in linears:
        for kind in kinds:
            if part == "block" and ("mlp" in path or "ff" in path) != (kind == "mlp"):
                continue
            for ending, name in LINEAR.get(kind, ()):
                if f".{path}".endswith(f".{ending}") and f"{name}.weight" not in found:
                    take(path, name)
    thirds = [next((p for p in linears if p.endswith(name)), None) for name in ("W_query", "W_key", "W_value")]
    if all(thirds):
        for path in thirds:
            take(str(path), f"third.{path}")
        for kind in ("weight", "bias"):
            found[f"attn.c_attn.{kind}"] = np.concatenate(
                [found.pop(f"third.{path}.{kind}") for path in thirds], axis=-1
            )
    norms = [("ln_1", ("ln_1", "norm1")), ("ln_2", ("ln_2", "norm2"))] if part == "block" else [("ln_1", ("",))]
    for name, paths in norms if part in ("block", "layer_norm") else ():
        for path, m in module.named_modules():
            gain, shift = (getattr(m, a, getattr(m, b, None)) for a, b in (("weight", "scale"), ("bias", "shift")))
            if path in paths and gain is not None:
                found[f"{name}.weight"] = modules.as_array(gain).astype(np.float64)
                found[f"{name}.bias"] = (
                    np.zeros(len(gain)) if shift is None else modules.as_array(shift).astype(np.float64)
                )
    return found


def _widths(part: str, tensors: Mapping[str, Array], x: Array | None) -> tuple[int, int]:
    """Of input and output, by the tensors or the input; an attention alone may have two. Raises NpgptError for none."""
    needed = {
        "attention": ("attn.c_attn.weight", "attn.c_proj.weight"),
        "layer_norm": ("ln_1.weight", "ln_1.bias"),
        "gelu": (),
        "mlp": ("mlp.c_fc.weight", "mlp.c_proj.weight"),
        "block": (
            "ln_1.weight",
            "attn.c_attn.weight",
            "attn.c_proj.weight",
            "ln_2.weight",
            "mlp.c_fc.weight",
            "mlp.c_proj.weight",
        ),
    }[part]
    if missing := [name for name in needed if name not in tensors]:
        raise NpgptError(f"{part} needs its weights, and {', '.join(missing)} cannot be told: give weights={{…}}")
    if part == "gelu":
        return (width := 64 if x is None else int(np.shape(x)[-1])), width
    first = tensors[needed[0]]
    return len(first), first.shape[1] // 3 if part == "attention" else len(first)


def _run(theirs: Callable[..., Any], x: Array, tensors: Mapping[str, Array], dtype: str | None) -> tuple[Array, str]:
    """Their output in float64, and the dtype in which it was computed."""
    if modules.is_module(theirs):
        parameter = next(iter(theirs.parameters()), None)  # type: ignore[attr-defined]
        if parameter is not None:
            given = parameter.detach().double().new_tensor(x.tolist()).to(parameter.dtype)
            return modules.as_array(_first(theirs(given))).astype(np.float64), dtype or modules.dtype_of(theirs)
        torch = sys.modules["torch"]  # a module without parameters, such as a GELU, has no tensor to make one by
        given = torch.tensor(x.tolist(), dtype=torch.float32)
        return modules.as_array(_first(theirs(given))).astype(np.float64), dtype or "float32"
    dtype = dtype or "float64"
    given = x.astype(dtype if dtype in ("float32", "float64") else "float32")
    return modules.as_array(_first(theirs(given))).astype(np.float64), dtype


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _complete(tensors: Mapping[str, Array], config: Config, rng: np.random.Generator) -> dict[str, Array]:
    """The rest of a model, which the part does not see."""
    found = {}
    for name, shape in schema(config).items():
        local = name.removeprefix("h.0.")
        found[name] = tensors[local] if local in tensors else rng.standard_normal(shape)
        if found[name].shape != shape and (local != "attn.c_attn.weight" or found[name].shape[1:] != shape[1:]):
            raise NpgptError(f"{local} is {list(found[name].shape)}, and must be {list(shape)}")
    return found
