"""A part alone, since that is how people build: attention, LayerNorm, GELU, the MLP, a block."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from ..config import Config
from ..errors import NpgptError
from ..parameters import Array, schema
from . import conditions, modules, outputs
from .check import compare
from .mistakes import Mistake, catalogue
from .report import Report
from .running import run
from .textbook import BLOCK
from .theirs import Case
from .weights import listed, what_cannot_show

# The stage that each part is given, the one that it ends in, and where its tensors' names begin.
PARTS = {
    "attention": ("h.0.ln_1", "h.0.attn.c_proj", ("attn.",)),
    "layer_norm": ("embedding", "h.0.ln_1", ("ln_1.",)),
    "gelu": ("h.0.mlp.c_fc", "h.0.mlp.act", ()),
    "mlp": ("h.0.ln_2", "h.0.mlp.c_proj", ("mlp.",)),
    "block": ("embedding", "h.0", ("ln_1.", "attn.", "ln_2.", "mlp.")),
}
TOKENS = (12, 8, 6, 5, 4, 3, 2)  # tried one after the other, since a part may have a short context


def check_part(
    part: str,
    theirs: Any,
    *,
    x: Array | None = None,
    weights: Mapping[str, Any] | None = None,
    n_head: int | None = None,
    dtype: str | None = None,
    seed: int = 0,
    perturb: bool = True,
) -> Report:
    """Compare one part of a GPT-2 with the textbook's, and name the mistake in it.

    part: "attention", "layer_norm", "gelu", "mlp" or "block". theirs: a PyTorch module, or a function of x whose
    weights are given by canonical names, {"attn.c_attn.weight": [C, 3C], …}; a module's own are read off it. A function
    may take arrays, tensors or lists, [B, T, C] or [T, C]. x: the input [B, T, C] (numbers for "gelu"); by default one
    that tells the known mistakes apart. perturb: as check has it, of a module's own weights. The weights are taken as
    true. Raises NpgptError where they cannot be told, or do not fit.
    """
    if part not in PARTS:
        raise NpgptError(f"there is no part {part!r}; there are {', '.join(PARTS)}")
    given = {re.sub(r"^h\.\d+\.", "", name): outputs.as_array(array) for name, array in (weights or {}).items()}
    own = PARTS[part][2]  # a whole model's may be given
    tensors: dict[str, Array] = {n: array.astype(np.float64) for n, array in given.items() if n.startswith(own)}
    has_heads = part in ("attention", "block")
    if not modules.is_module(theirs):
        if has_heads and not n_head:
            raise NpgptError(f"{part} needs n_head=, the number of heads")
        return _compared(part, theirs, tensors, x, n_head or 1, dtype, seed, [])
    notes: list[str] = []
    if what := conditions.dropping(theirs):
        notes.append(conditions.EVALUATED.format(what))
    reads = part != "gelu" and not tensors
    if changed := _fresh(part, theirs) if perturb and reads else {}:
        notes.append(conditions.PERTURBED.format(listed(changed, 0)))
    with conditions.as_judged(theirs, list(changed.values())):
        tensors = modules.part_tensors(part, theirs) if reads else tensors
        heads = n_head or (modules.stated_n_head(theirs) if has_heads else 1)
        return _compared(part, theirs, tensors, x, heads, dtype, seed, notes)


def _fresh(part: str, module: Any) -> dict[str, tuple[Any, Any]]:
    """Parameters that one number fills, and other data for them; not those that are none of the part's tensors."""
    before, found = modules.part_tensors(part, module), {}
    for name, parameter, data in conditions.perturbation(module):
        with conditions.as_judged(module, [(parameter, data)]):
            after = modules.part_tensors(part, module)
        if any(not np.array_equal(array, before[tensor]) for tensor, array in after.items()):
            found[name] = (parameter, data)
    return found


def _compared(
    part: str,
    theirs: Callable[..., Any],
    tensors: dict[str, Array],
    x: Array | None,
    n_head: int,
    dtype: str | None,
    seed: int,
    notes: list[str],
) -> Report:
    """Run both on the same input, and compare."""
    given_width, width = _widths(part, tensors, x)
    inner = tensors["mlp.c_fc.weight"].shape[1] if "mlp.c_fc.weight" in tensors else 4 * width
    inner = given_width if part == "gelu" else inner
    rng = np.random.default_rng(seed)
    whole = _input(part, given_width, rng) if x is None else np.asarray(x, np.float64)
    whole = whole.reshape(-1, *whole.shape[-2:]) if whole.ndim > 1 else whole[None, None]
    if whole.shape[-1] != given_width:
        raise NpgptError(f"{part} takes an input of width {given_width}, and x is {list(whole.shape)}")
    ran = run(part, theirs, whole, width, TOKENS if x is None else whole.shape[1:2], dtype)
    x, judged_in = ran.x, dtype or ran.dtype
    config = Config(vocab_size=2, n_positions=x.shape[1], n_embd=width, n_layer=1, n_head=n_head, n_inner=inner)
    given, stage, _ = PARTS[part]
    case = Case(np.zeros(x.shape[:2], int), {stage: ran.output}, given={given: x})
    entries = _entries(part, config, x.shape[1], square=given_width == width)
    notes = notes + ran.notes + what_cannot_show(tensors, 0)
    judge = partial(compare, config, _complete(tensors, config, rng), [case], judged_in, notes=notes, entries=entries)
    report = judge()
    if dtype is None and judged_in == "float64" and report.diagnosis.unexplained is not None:
        return judge(coarser="float32")  # float64 that is finer than it computes
    return report


def _input(part: str, width: int, rng: np.random.Generator) -> Array:
    """Return uneven numbers, so that means, variances and orders show; small rows too, so that an epsilon does."""
    most = TOKENS[0]
    if part == "gelu":
        return np.linspace(-6, 6, 2 * most * width).reshape(2, most, width)
    return rng.standard_normal((2, most, width)) * np.geomspace(0.02, 3, most)[:, None] + 0.3


def _entries(part: str, config: Config, tokens: int, square: bool) -> list[Mistake]:
    """Return those that a part alone can have: they replace no stage outside the blocks but ln_f's parameters.

    square: whether its input is as wide as its output, without which c_attn is neither transposed nor given the input.
    """
    known = {*BLOCK, "ln_f.weight", "ln_f.bias"}
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


def _complete(tensors: Mapping[str, Array], config: Config, rng: np.random.Generator) -> dict[str, Array]:
    """The rest of a model, which the part does not see."""
    found = {}
    for name, shape in schema(config).items():
        local = name.removeprefix("h.0.")
        found[name] = tensors[local] if local in tensors else rng.standard_normal(shape)
        if found[name].shape != shape and (local != "attn.c_attn.weight" or found[name].shape[1:] != shape[1:]):
            raise NpgptError(f"{local} is {list(found[name].shape)}, and must be {list(shape)}")
    return found
