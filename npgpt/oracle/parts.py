"""A part alone, since that is how people build: attention, LayerNorm, GELU, the MLP, a block."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..errors import NpgptError
from ..parameters import Array, schema
from . import conditions, modules, outputs
from .check import compare, computed_in
from .mistakes import Mistake, catalogue
from .report import Report
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
    ran = _run(part, theirs, whole, width, TOKENS if x is None else whole.shape[1:2], dtype)
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


@dataclass(frozen=True)
class Ran:
    """What a part gave in float64, for which input, the dtype in which it seems to compute, and how it was called."""

    output: Array
    x: Array
    dtype: str
    notes: list[str]


def _run(part: str, theirs: Any, x: Array, width: int, counts: Sequence[int], dtype: str | None) -> Ran:
    """Run theirs on so many tokens, fewer where it raises, in the first kind of input that it takes.

    Raises NpgptError where it raises with all of them, and where what it gives has another shape.
    """
    failed: list[str] = []
    misshapen = ""
    for count in counts:
        some = np.ascontiguousarray(x[:, np.linspace(0, x.shape[1] - 1, count).astype(int)])
        for kind, called in _ways(part, theirs, dtype).items():
            try:
                found = called(some)
            except Exception as error:  # of any kind, since it is foreign
                failed.append(outputs.raised(error))
                continue
            if found.shape == (*some.shape[:2], width):
                judged = modules.dtype_of(theirs) if _parameter(theirs) is not None else computed_in(found)
                fewer = f" {count} tokens in" if count < counts[0] else ""
                note = f"It was given{fewer} {kind}: otherwise it raises {failed[0]}." if failed else ""
                return Ran(found.astype(np.float64), some, judged, [note] if note else [])
            expected = [*some.shape[:2], width]
            misshapen = misshapen or f"{list(found.shape)} for an input of {list(some.shape)}: it must be {expected}"
    raise NpgptError(f"{part} gives {misshapen}" if misshapen else f"{part} raises {failed[0]}")


def _ways(part: str, theirs: Any, dtype: str | None) -> dict[str, Callable[[Array], NDArray[Any]]]:
    """How a part can be called, by the kind of its input, the usual one first: x [B, T, C] → [B, T, C]."""
    kinds: dict[str, Callable[[Array], Any]] = {}
    torch, exact = sys.modules.get("torch"), "float32" if dtype not in (None, "float64") else "float64"
    if (parameter := _parameter(theirs)) is not None:
        kinds["a tensor"] = lambda x: parameter.detach().double().new_tensor(x.tolist()).to(parameter.dtype)
    elif modules.is_module(theirs):  # such as a GELU: no tensor to make one by
        kinds["a tensor"] = lambda x: _tensor(x, "float32")
    else:
        kinds["a NumPy array"] = lambda x: x.astype(exact)
        if torch is not None:
            kinds |= {f"a torch tensor of {exact}": lambda x: _tensor(x, exact)}
            kinds |= {"a torch tensor of float32": lambda x: _tensor(x, "float32")}
        kinds["lists"] = lambda x: x.astype(exact).tolist()
    forward = getattr(theirs, "forward", theirs)

    def call(given: Any) -> NDArray[Any]:
        output = outputs.invoke(theirs, given, forward)
        return outputs.as_array(output[0] if isinstance(output, tuple) else output)

    def whole(convert: Callable[[Array], Any]) -> Callable[[Array], NDArray[Any]]:
        return lambda x: call(convert(x))

    def by_rows(convert: Callable[[Array], Any]) -> Callable[[Array], NDArray[Any]]:
        return lambda x: np.stack([call(convert(row)) for row in x])

    ways = {kind: whole(convert) for kind, convert in kinds.items()}
    ways |= {f"{kind} of [T, C], row by row": by_rows(convert) for kind, convert in kinds.items()}
    if part == "gelu":
        ways["one number after another"] = lambda x: np.array([theirs(float(n)) for n in x.ravel()]).reshape(x.shape)
    return ways


def _parameter(theirs: Any) -> Any:
    """The first parameter of a module, None where there is none."""
    return next(iter(theirs.parameters()), None) if modules.is_module(theirs) else None


def _tensor(x: Array, dtype: str) -> Any:
    torch = sys.modules["torch"]
    return torch.tensor(x.tolist(), dtype=getattr(torch, dtype))


def _complete(tensors: Mapping[str, Array], config: Config, rng: np.random.Generator) -> dict[str, Array]:
    """The rest of a model, which the part does not see."""
    found = {}
    for name, shape in schema(config).items():
        local = name.removeprefix("h.0.")
        found[name] = tensors[local] if local in tensors else rng.standard_normal(shape)
        if found[name].shape != shape and (local != "attn.c_attn.weight" or found[name].shape[1:] != shape[1:]):
            raise NpgptError(f"{local} is {list(found[name].shape)}, and must be {list(shape)}")
    return found
