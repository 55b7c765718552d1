"""check_part: compare a single part of a GPT-2, since people build one part after another."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..errors import NpgptError, checked, numbers, whole_number
from ..parameters import Array, schema
from . import conditions, modules
from .arithmetic import computed_in, known_dtype
from .comparison import compare
from .mistakes import Mistake, catalogue
from .outputs import as_array
from .report import Report
from .running import Kind, invoke, ways, working
from .textbook import BLOCK
from .theirs import Case
from .weights import listed, what_cannot_show

# For each part: its input stage, its output stage, and the prefixes of its tensors' names.
PARTS = {
    "attention": ("h.0.ln_1", "h.0.attn.c_proj", ("attn.",)),
    "layer_norm": ("embedding", "h.0.ln_1", ("ln_1.",)),
    "gelu": ("h.0.mlp.c_fc", "h.0.mlp.act", ()),
    "mlp": ("h.0.ln_2", "h.0.mlp.c_proj", ("mlp.",)),
    "block": ("embedding", "h.0", ("ln_1.", "attn.", "ln_2.", "mlp.")),
}
TOKENS = (12, 8, 6, 5, 4, 3, 2)  # numbers of tokens to try in turn, since a part may have a short context


@dataclass(frozen=True)
class Ran:
    """The output [B, T, C] of a part, its input, and a note if it was called in an unusual way."""

    output: NDArray[Any]
    x: Array
    notes: list[str]


@checked
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
    """Compare one part of a GPT-2 with the reference, and name the mistakes in it.

    part: "attention", "layer_norm", "gelu", "mlp" or "block". theirs: a PyTorch module, or a function of x. A function
    needs weights by canonical names, {"attn.c_attn.weight": [C, 3C], …}; a module has its own. A function may take
    arrays, tensors or lists, [B, T, C] or [T, C]. x: the input [B, T, C] (any numbers for "gelu"); by default one that
    tells the known mistakes apart. perturb: as in check, for a module's own weights. The weights are taken as correct.
    Raises NpgptError if weights are missing or do not fit.
    """
    if part not in PARTS:
        raise NpgptError(f"{part!r} is not a part that npgpt checks; known are {', '.join(PARTS)}")
    known_dtype("float32" if dtype is None else dtype)
    if n_head is not None:
        n_head = whole_number("n_head", n_head)
    given, stage, own = PARTS[part]
    if x is not None and not (x := numbers("x", x, "iuf").astype(np.float64)).size * x.ndim:
        raise NpgptError(f"x must be numbers [B, T, C], not of shape {list(x.shape)}")
    local = {re.sub(r"^h\.\d+\.", "", name): as_array(array) for name, array in (weights or {}).items()}
    # weights of a whole model may be given
    tensors: dict[str, Array] = {n: array.astype(np.float64) for n, array in local.items() if n.startswith(own)}
    is_module, has_heads = modules.is_module(theirs), part in ("attention", "block")
    if has_heads and not n_head and not is_module:
        raise NpgptError(f"{part} needs n_head=, the number of heads")
    heads = n_head or (modules.stated_n_head(theirs) if has_heads else 1)
    reads = is_module and part != "gelu" and not tensors
    notes = conditions.evaluated(theirs) if is_module else []
    if changed := _fresh(part, theirs) if perturb and reads else {}:
        notes.append(conditions.PERTURBED.format(listed(changed, 0)))
    rng = np.random.default_rng(whole_number("seed", seed, low=0))
    with conditions.as_judged(theirs, list(changed.values())) if is_module else nullcontext():
        tensors = modules.part_tensors(part, theirs) if reads else tensors
        given_width, width, inner = _widths(part, tensors, x)
        whole = _input(part, given_width, rng) if x is None else x
        whole = whole.reshape(-1, *whole.shape[-2:]) if whole.ndim > 1 else whole[None, None]
        if whole.shape[-1] != given_width:
            raise NpgptError(f"{part} takes an input of width {given_width}, but x has shape {list(whole.shape)}")
        ran = _run(part, theirs, whole, width, TOKENS if x is None else whole.shape[1:2], dtype)
    is_typed = is_module and any(True for _ in theirs.parameters())
    judged_in = dtype or (modules.dtype_of(theirs) if is_typed else computed_in(ran.output))
    tokens = ran.x.shape[1]
    config = Config(vocab_size=2, n_positions=tokens, n_embd=width, n_layer=1, n_head=heads, n_inner=inner)
    case = Case(np.zeros(ran.x.shape[:2], int), {stage: ran.output.astype(np.float64)}, given={given: ran.x})
    notes += ran.notes + what_cannot_show(tensors, 0)
    entries = _entries(config, tokens, square=given_width == width)
    judge = partial(compare, config, _complete(tensors, config, rng), [case], judged_in, notes=notes, entries=entries)
    report = judge()
    if dtype is None and judged_in == "float64" and report.diagnosis.unexplained is not None:
        return judge(coarser="float32")  # float64 numbers that may have been computed in float32
    return report


def _run(part: str, theirs: Any, x: Array, width: int, counts: Sequence[int], dtype: str | None) -> Ran:
    """Run theirs with the first number of tokens and the first kind of input for which it works.

    counts: numbers of tokens, the largest first. Raises NpgptError if all fail or the output has the wrong shape.
    """

    def call(given: Any) -> NDArray[Any]:
        output = invoke(theirs, given, getattr(theirs, "forward", theirs))
        return as_array(output[0] if isinstance(output, tuple) else output)

    calls = ways(_kinds(theirs, dtype), call)
    if part == "gelu":
        calls["one number after another"] = lambda x: np.reshape([float(theirs(float(n))) for n in x.flat], x.shape)
    failed: dict[str, str] = {}
    misshapen = ""
    for count in counts:
        some = np.ascontiguousarray(x[:, np.linspace(0, x.shape[1] - 1, count).astype(int)])
        expected = (*some.shape[:2], width)
        for kind, found in working(calls, some, failed):
            if found.shape == expected:
                fewer = f" {count} tokens in" if count < counts[0] else ""
                said = (f"It was given{fewer} {kind}, since otherwise it raises {error}." for error in failed.values())
                return Ran(found, some, [*said][:1])
            sizes = f"{list(found.shape)} for an input of shape {list(some.shape)}, not {list(expected)}"
            misshapen = misshapen or f"{part} returns the shape {sizes}"
    raise NpgptError(misshapen or f"{part} raises {next(iter(failed.values()))}")


def _kinds(theirs: Any, dtype: str | None) -> list[Kind]:
    """Return the kinds of input that a part may take, the usual one first."""
    exact = "float32" if dtype not in (None, "float64") else "float64"
    found: dict[str, Callable[[Array], Any]] = {}
    if modules.is_module(theirs):
        like = next(iter(theirs.parameters()), None)  # a GELU has no parameters
        found["a tensor"] = lambda x: _tensor(x, "float32") if like is None else _tensor(x, "float64").to(like)
    else:
        found |= {
            "a NumPy array": lambda x: x.astype(exact),
            "a NumPy array of float32": lambda x: x.astype(np.float32),
        }
        if "torch" in sys.modules:
            found |= {f"a torch tensor of {kind}": partial(_tensor, dtype=kind) for kind in (exact, "float32")}
        found["lists"] = lambda x: x.astype(exact).tolist()
    return [Kind(name, f"{name} of [T, C]", convert) for name, convert in found.items()]


def _tensor(x: Array, dtype: str) -> Any:
    torch = sys.modules["torch"]
    return torch.tensor(x.tolist(), dtype=getattr(torch, dtype))


def _fresh(part: str, module: Any) -> dict[str, tuple[Any, Any]]:
    """Return the part's parameters that hold one number throughout, with other data for them."""
    before, found = modules.part_tensors(part, module), {}
    for name, parameter, data in conditions.perturbation(module):
        with conditions.as_judged(module, [(parameter, data)]):
            after = modules.part_tensors(part, module)
        if any(not np.array_equal(array, before[tensor]) for tensor, array in after.items()):
            found[name] = (parameter, data)
    return found


def _input(part: str, width: int, rng: np.random.Generator) -> Array:
    """Return uneven numbers, which show means, variances and orders, with small rows, which show an epsilon."""
    most = TOKENS[0]
    if part == "gelu":
        return np.linspace(-6, 6, 2 * most * width).reshape(2, most, width)
    return rng.standard_normal((2, most, width)) * np.geomspace(0.02, 3, most)[:, None] + 0.3


def _entries(config: Config, tokens: int, square: bool) -> list[Mistake]:
    """Return the mistakes that a single part can have. Outside the blocks, they replace only parameters of ln_f.

    square: whether the input is as wide as the output. If not, mistakes in c_attn and its weight are excluded.
    """
    known = {*BLOCK, "ln_f.weight", "ln_f.bias"} - (set() if square else {"attn.c_attn", "attn.c_attn.weight"})
    return [entry for entry in catalogue(config, tokens) if known.issuperset(entry.stages)]


def _widths(part: str, tensors: Mapping[str, Array], x: Array | None) -> tuple[int, int, int]:
    """Return the widths of the input, which may differ in attention, of the output and of the MLP. Raises NpgptError
    if weights are missing.
    """
    if part == "gelu":
        return (64 if x is None else int(np.shape(x)[-1]),) * 3
    kinds = (".weight", ".bias") if part == "layer_norm" else (".weight",)
    needed = [name for name in BLOCK if name.startswith(PARTS[part][2]) and name.endswith(kinds)]
    if missing := [name for name in needed if name not in tensors]:
        raise NpgptError(f"{part} needs its weights, but {', '.join(missing)} cannot be found: give weights={{…}}")
    first = tensors[needed[0]]
    width = first.shape[1] // 3 if part == "attention" else len(first)
    return len(first), width, tensors["mlp.c_fc.weight"].shape[1] if "mlp.c_fc.weight" in tensors else 4 * width


def _complete(tensors: Mapping[str, Array], config: Config, rng: np.random.Generator) -> dict[str, Array]:
    """Return a whole model around the part. The part does not see the other tensors, which are random."""
    found = {}
    for name, shape in schema(config).items():
        local = name.removeprefix("h.0.")
        found[name] = tensors[local] if local in tensors else rng.standard_normal(shape)
        if found[name].shape != shape and (local != "attn.c_attn.weight" or found[name].shape[1:] != shape[1:]):
            raise NpgptError(f"{local} is {list(found[name].shape)} and must be {list(shape)}")
    return found
