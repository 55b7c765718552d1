"""A PyTorch module as it stands: its own tensors under canonical names, and its stages by forward hooks.

torch is never imported: everything goes through the module's own methods.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import names
from ..checkpoints.configs import complete
from ..checkpoints.names import Scheme
from ..checkpoints.tensor import Tensor
from ..config import Config
from ..errors import NpgptError
from ..parameters import Array, check_shapes
from .arithmetic import rounded

# Where a module's outputs, or inputs, are stages; (pattern of its path, its stage, whether the input is meant).
# Paths are without what wraps the model: "transformer.", "_orig_mod.", "module.".
NAMED = r"h\.(\d+)\."
HUGGING_FACE = (
    (r"wte", "wte", False),
    (r"wpe", "wpe", False),
    (r"drop", "embedding", False),
    (NAMED + r"ln_1", r"h.\1.ln_1", False),
    (NAMED + r"attn\.c_attn", r"h.\1.attn.c_attn", False),
    (NAMED + r"attn\.c_proj", r"h.\1.attn.merged", True),
    (NAMED + r"attn\.c_proj", r"h.\1.attn.c_proj", False),
    (NAMED + r"ln_2", r"h.\1.attn.residual", True),
    (NAMED + r"ln_2", r"h.\1.ln_2", False),
    (NAMED + r"mlp\.c_fc", r"h.\1.mlp.c_fc", False),
    (NAMED + r"mlp\.(?:act|gelu)", r"h.\1.mlp.act", False),
    (NAMED + r"mlp\.c_proj", r"h.\1.mlp.c_proj", False),
    (r"h\.(\d+)", r"h.\1", False),
    (r"ln_f", "ln_f", False),
)
BOOK_BLOCK = r"trf_blocks\.(\d+)\."
LLMS_FROM_SCRATCH = (
    (r"tok_emb", "wte", False),
    (r"pos_emb", "wpe", False),
    (r"drop_emb", "embedding", False),
    (BOOK_BLOCK + r"norm1", r"h.\1.ln_1", False),
    (BOOK_BLOCK + r"att\.W_query", r"h.\1.attn.query", False),
    (BOOK_BLOCK + r"att\.W_key", r"h.\1.attn.key", False),
    (BOOK_BLOCK + r"att\.W_value", r"h.\1.attn.value", False),
    (BOOK_BLOCK + r"att\.(?:out_)?proj", r"h.\1.attn.merged", True),
    (BOOK_BLOCK + r"att\.(?:out_)?proj", r"h.\1.attn.c_proj", False),
    (BOOK_BLOCK + r"norm2", r"h.\1.attn.residual", True),
    (BOOK_BLOCK + r"norm2", r"h.\1.ln_2", False),
    (BOOK_BLOCK + r"ff\.layers\.0", r"h.\1.mlp.c_fc", False),
    (BOOK_BLOCK + r"ff\.layers\.1", r"h.\1.mlp.act", False),
    (BOOK_BLOCK + r"ff\.layers\.2", r"h.\1.mlp.c_proj", False),
    (r"trf_blocks\.(\d+)", r"h.\1", False),
    (r"final_norm", "ln_f", False),
)
WRAPPING = re.compile(r"^(?:(?:_orig_mod|module|model|transformer)\.)+")


@dataclass(frozen=True)
class Module:
    """A module opened: its scheme, its own tensors as float64 by canonical name, and the configuration they tell."""

    module: Any
    scheme: Scheme
    tensors: Mapping[str, Array]
    config: Config
    dtype: str


def is_module(theirs: object) -> bool:
    """Whether it has what a PyTorch module has."""
    return all(callable(getattr(theirs, name, None)) for name in ("state_dict", "named_modules", "parameters"))


def as_array(tensor: Any) -> NDArray[Any]:
    """A tensor of any framework, as an array; bfloat16 as float32."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        if str(tensor.dtype) == "torch.bfloat16":
            tensor = tensor.float()
        return np.asarray(tensor.numpy())
    return np.asarray(tensor)


def dtype_of(module: Any) -> str:
    """The dtype of a module's parameters."""
    return str(next(iter(module.parameters())).dtype).removeprefix("torch.")


def open_module(module: Any, n_head: int | None, config: Config | None) -> Module:
    """The module's own weights are taken as they are, its n_head as it states it; all else is GPT-2's, unless config
    says otherwise. Raises NpgptError where its names are nobody's, and where it does not say n_head.
    """
    name = type(module).__name__
    state = {key: as_array(value) for key, value in module.state_dict().items()}
    found = {
        key: Tensor(Path(name), key, np.ascontiguousarray(array).reshape(-1).data, str(array.dtype), array.shape, 0)  # type: ignore[arg-type]
        for key, array in state.items()
        if array.dtype.kind == "f"
    }
    bare = names.unwrapped(found)
    scheme = names.choose(None, bare, name)
    sources = scheme.translate(bare)
    shapes = {key: source.shape(bare) for key, source in sources.items()}
    head, wte = (sources.get(key) for key in ("lm_head.weight", "wte.weight"))
    tied = head is None or (
        wte is not None and np.array_equal(bare[head.parts[0]].stored(), bare[wte.parts[0]].stored())
    )
    if tied:
        sources.pop("lm_head.weight", None)
        shapes.pop("lm_head.weight", None)
    if config is None:
        stated = {"activation_function": "gelu_new", "tie_word_embeddings": tied}
        known = {key: shape for key, shape in shapes.items() if shape is not None}
        config = complete(stated, known, n_head or stated_n_head(module), name)
    check_shapes(config, shapes, f"{name} ({scheme.title})", "its own sizes")
    tensors = {}
    for key, source in sources.items():
        if source.parts:
            tensors[key] = np.ascontiguousarray(source.stored(bare)[0].astype(np.float64))
        else:
            width = 3 * config.n_embd if key.endswith("c_attn.bias") else config.n_embd
            tensors[key] = np.zeros(config.inner_width if key.endswith("c_fc.bias") else width)
    return Module(module, scheme, tensors, config, dtype_of(module))


def stated_n_head(module: Any) -> int:
    """What the module says of its heads: an attention's num_heads or n_head, else its config's."""
    places = [part for _, part in module.named_modules()]
    places += [config for part in places if (config := getattr(part, "config", None)) is not None]
    for place in places:
        for name in ("num_heads", "n_head", "n_heads"):
            value = place.get(name) if isinstance(place, dict) else getattr(place, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    raise NpgptError(f"{type(module).__name__} does not say how many heads it has (num_heads or n_head): give n_head=")


def dropout(module: Any) -> list[str]:
    """The first part that drops out as the module stands, as a problem; none where nothing does."""
    for path, part in module.named_modules():
        p = getattr(part, "p", 0)
        if getattr(part, "training", False) and "Dropout" in type(part).__name__ and isinstance(p, float) and p > 0:
            what = f"{path} ({type(part).__name__}, p = {p})"
            return [f"the module is in training mode, and {what} drops out: call .eval()"]
    return []


def ids_for(module: Any, token_ids: NDArray[np.integer[Any]]) -> Any:
    """Ids as the module's own kind of tensor; by way of float64, which holds every id."""
    parameter = next(iter(module.parameters())).detach().double()
    return parameter.new_tensor(token_ids.tolist()).long()


def logits_of(output: Any) -> NDArray[Any]:
    """The logits in whatever a model returns: a tensor, a tuple that begins with it, an object or dict with .logits."""
    if hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, Mapping):
        if "logits" not in output:
            raise NpgptError(f"it gives no logits, but {', '.join(map(str, output))}: is the output head left out?")
        output = output["logits"]
    elif isinstance(output, (tuple, list)) and not isinstance(output[0], (int, float)):
        output = output[0]
    return as_array(output)


def run_module(module: Module, token_ids: NDArray[np.integer[Any]]) -> dict[str, Array]:
    """Run it as it stands on ids [B, T], and take every stage that its parts show."""
    seen: dict[str, Array] = {}
    handles = []
    places = LLMS_FROM_SCRATCH if module.scheme.name == "llms-from-scratch" else HUGGING_FACE

    def keep(stage: str, value: Any) -> None:
        array = as_array(value[0] if isinstance(value, (tuple, list)) else value).astype(np.float64)
        B, T = token_ids.shape
        if stage not in seen and array.ndim in (2, 3) and array.shape[-2] == T:
            seen[stage] = (
                array.reshape(-1, T, array.shape[-1])
                if stage == "wpe"
                else np.broadcast_to(array, (B, *array.shape[-2:]))
            )

    def after(stage: str) -> Callable[..., None]:
        return lambda part, inputs, output: keep(stage, output)

    def before(stage: str) -> Callable[..., None]:
        return lambda part, inputs: keep(stage, inputs)

    for path, part in module.module.named_modules():
        bare = WRAPPING.sub("", path + ".").rstrip(".")
        for pattern, stage, is_input in places:
            if match := re.fullmatch(pattern, bare):
                name = match.expand(stage)
                hook = part.register_forward_pre_hook if is_input else part.register_forward_hook
                handles.append(hook(before(name) if is_input else after(name)))
    try:
        output = module.module(ids_for(module.module, token_ids))
    finally:
        for handle in handles:
            handle.remove()
    return {**seen, "logits": logits_of(output).astype(np.float64)}


def compare_weights(theirs: Mapping[str, Array], reference: Mapping[str, Array]) -> list[str]:
    """What is wrong with weights that should be the reference's, bit for bit, tensor by tensor; nothing if they are."""
    problems: dict[str, list[str]] = {}
    for name, expected in reference.items():
        found = theirs.get(name)
        if found is None:
            problems.setdefault("missing", []).append(name)
        elif found.shape != expected.shape:
            problems.setdefault(f"of shape {list(found.shape)}, not {list(expected.shape)}", []).append(name)
        elif not np.array_equal(found, expected):
            problems.setdefault(_how(name, found, expected, reference), []).append(name)
    return [f"{_listed(names)} {'is' if len(names) == 1 else 'are'} {how}" for how, names in problems.items()]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _how(name: str, found: Array, expected: Array, reference: Mapping[str, Array]) -> str:
    """In which way one tensor differs."""
    if not found.any():
        return "zero: dropped, or never loaded"
    if found.ndim == 2 and found.shape[0] == found.shape[1] and np.array_equal(found, expected.T):
        return "transposed"
    if ".c_attn." in name:
        thirds = np.split(expected, 3, axis=-1)
        if found.ndim == 2 and np.array_equal(found, np.concatenate([third.T for third in thirds], axis=-1)):
            return "transposed in each of q, k, v"
        for order in permutations(range(3)):
            if np.array_equal(found, np.concatenate([thirds[place] for place in order], axis=-1)):
                return f"permuted: {', '.join('qkv'[place] for place in order)} in place of q, k, v"
    for dtype in ("float16", "bfloat16", "float32"):
        if np.array_equal(found, rounded(expected, dtype)):
            return f"rounded to {dtype}"
    block = re.match(r"h\.(\d+)\.(.+)", name)
    if block:
        for other, array in reference.items():
            if (
                other != name
                and other.endswith("." + block[2])
                and other.startswith("h.")
                and np.array_equal(found, array)
            ):
                return f"another block's (h.{other.split('.')[1]} for h.{block[1]}): the layers are in another order"
    gap = np.abs(found - expected).max()
    return f"other numbers, by up to {gap:.3g}"
