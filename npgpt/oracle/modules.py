"""A PyTorch module as it stands: its own tensors under canonical names, and its stages by forward hooks.

torch is never imported: everything goes through the module's own methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import names
from ..checkpoints.configs import complete
from ..checkpoints.tensor import Tensor
from ..config import Config
from ..errors import NpgptError
from ..parameters import Array, check_shapes, schema
from .arithmetic import rounded
from .textbook import BLOCK, located

Place = tuple[str, str, bool]  # the path of a module's part, the stage that it shows, and whether as its input
THIRDS = ("attn.query", "attn.key", "attn.value")  # of linear layers that together are attn.c_attn
INPUTS = {"attn.c_proj": "attn.merged", "ln_2": "attn.residual"}  # what a part is given
BESIDE = {"wte": (("drop", "drop_emb"), "embedding"), "mlp.c_fc": (("act", "gelu", "1"), "mlp.act")}  # without tensors
# What a part alone lacks in front of its tensors' names, for them to be a whole model's.
PREFIXES = {
    "attention": ("h.0.attn.", "trf_blocks.0.att."),
    "mlp": ("h.0.mlp.", "trf_blocks.0.ff."),
    "layer_norm": ("trf_blocks.0.norm1.",),
    "block": ("h.0.", "trf_blocks.0."),
}


@dataclass(frozen=True)
class Module:
    """A module opened: its own tensors as float64 by canonical name, the configuration they tell, where stages are."""

    module: Any
    tensors: Mapping[str, Array]
    config: Config
    dtype: str
    places: Sequence[Place]

    def run(self, token_ids: NDArray[np.integer[Any]]) -> dict[str, NDArray[Any]]:
        """Run it as it stands on ids [B, T], and take every stage that its parts show."""
        seen: dict[str, NDArray[Any]] = {}
        B, T = token_ids.shape

        def keep(stage: str, value: Any) -> None:
            array = as_array(value[0] if isinstance(value, (tuple, list)) else value).astype(np.float64)
            if stage not in seen and array.ndim in (2, 3) and array.shape[-2] == T:
                whole = array.reshape(-1, *array.shape[-2:])
                seen[stage] = whole if stage == "wpe" else np.broadcast_to(whole, (B, *whole.shape[1:]))

        parts, handles = dict(self.module.named_modules()), []
        for path, stage, is_input in self.places:
            if path in parts and is_input:
                handles.append(parts[path].register_forward_pre_hook(lambda _, given, s=stage: keep(s, given)))
            elif path in parts:
                handles.append(parts[path].register_forward_hook(lambda _, given, output, s=stage: keep(s, output)))
        try:
            output = self.module(ids_for(self.module, token_ids))
        finally:
            for handle in handles:
                handle.remove()
        return {**seen, "logits": logits_of(output).astype(np.float64)}


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


def stored_tensors(module: Any) -> dict[str, Tensor]:
    """Its parameters and buffers, as those of a file."""
    state = {name: as_array(value) for name, value in module.state_dict().items()}
    path = Path(type(module).__name__)
    return {
        name: Tensor(path, name, np.ascontiguousarray(array).reshape(-1).data, str(array.dtype), array.shape, 0)  # type: ignore[arg-type]
        for name, array in state.items()
        if array.dtype.kind == "f"
    }


def open_module(module: Any, n_head: int | None, config: Config | None) -> Module:
    """The module's own weights are taken as they are, its n_head as it states it; all else is GPT-2's, unless config
    says otherwise. Raises NpgptError where its names are nobody's, and where it does not say n_head.
    """
    name = type(module).__name__
    bare = names.unwrapped(stored_tensors(module))
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
    zeros = schema(config)
    tensors = {
        key: np.ascontiguousarray(source.stored(bare)[0], np.float64) if source.parts else np.zeros(zeros[key])
        for key, source in sources.items()
    }
    owners = {key: [bare[part].name.rpartition(".")[0] for part in source.parts] for key, source in sources.items()}
    return Module(module, tensors, config, dtype_of(module), list(places(owners)))


def places(owners: Mapping[str, Sequence[str]]) -> Iterator[Place]:
    """Where a module shows its stages. owners: by canonical name of a tensor, the paths of the parts that hold it."""
    for name, paths in owners.items():
        part, _, kind = name.rpartition(".")
        layer, local = located(part)
        if kind != "weight" or part == "lm_head":
            continue
        block = "" if layer is None else f"h.{layer}."
        parent = paths[0].rpartition(".")[0]
        shown = [local] if len(paths) == 1 else THIRDS
        yield from ((path, block + stage, False) for path, stage in zip(paths, shown, strict=True))
        if local in INPUTS:
            yield paths[0], block + INPUTS[local], True
        if local in BESIDE:
            beside, stage = BESIDE[local]
            yield from ((f"{parent}.{path}".lstrip("."), block + stage, False) for path in beside)
        if local == "ln_1":
            yield parent, f"h.{layer}", False


def part_tensors(part: str, module: Any) -> dict[str, Array]:
    """The tensors of a part alone in float64, by canonical names without the block; zeros for biases that it lacks.

    Parts of the part may be wrapped: the end of a name is enough.
    """
    is_conv = any(type(each).__name__ == "Conv1D" for _, each in module.named_modules())
    schemes = {"h": "huggingface" if is_conv else "nanogpt", "trf_blocks": "llms-from-scratch"}
    whole: dict[str, dict[str, Tensor]] = {scheme: {} for scheme in schemes.values()}
    for name, tensor in stored_tensors(module).items():
        prefixes = PREFIXES[part]
        if part == "block":
            prefixes += PREFIXES["mlp" if "mlp" in name or "ff" in name else "attention"]
        ends = name.split(".")
        for prefix, start in product(prefixes, range(len(ends))):
            scheme, key = schemes[prefix.split(".")[0]], prefix + ".".join(ends[start:])
            sources = names.choose(scheme, {}, "").translate({key: tensor})
            if any(source.parts and canonical.removeprefix("h.0.") in BLOCK for canonical, source in sources.items()):
                whole[scheme].setdefault(key, tensor)
                break
    found: dict[str, Array] = {}
    for scheme, tensors in whole.items():
        for canonical, source in names.choose(scheme, {}, "").translate(tensors).items():
            local = canonical.removeprefix("h.0.")
            if source.parts and local in BLOCK:
                found.setdefault(local, np.ascontiguousarray(source.stored(tensors)[0], np.float64))
    weights = {name.removesuffix("weight"): array for name, array in found.items() if name.endswith("weight")}
    return {f"{name}bias": np.zeros(array.shape[-1]) for name, array in weights.items()} | found


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


def call(theirs: Callable[..., Any], token_ids: NDArray[np.integer[Any]]) -> dict[str, NDArray[Any]]:
    """What a function of ids gives: its logits alone."""
    return {"logits": logits_of(theirs(token_ids))}


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
    ways = _mistaken(name, expected, reference)
    gap = f"other numbers, by up to {np.abs(found - expected).max():.3g}"
    return next((how for how, array in ways if np.array_equal(found, array)), gap)


def _mistaken(name: str, expected: Array, reference: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """What every known mistake in loading makes of a tensor."""
    yield "zero: dropped, or never loaded", np.zeros_like(expected)
    yield "transposed", expected.T
    if ".c_attn." in name:
        thirds = np.split(expected, 3, axis=-1)
        yield "transposed in each of q, k, v", np.concatenate([third.T for third in thirds], axis=-1)
        for order in permutations(range(3)):
            how = f"permuted: {', '.join('qkv'[place] for place in order)} in place of q, k, v"
            yield how, np.concatenate([thirds[place] for place in order], axis=-1)
    for dtype in ("float16", "bfloat16", "float32"):
        yield f"rounded to {dtype}", rounded(expected, dtype)
    layer, local = located(name)
    for other, array in reference.items():
        place, same = located(other)
        if layer is not None and place is not None and same == local:
            yield f"another block's (h.{place} for h.{layer}): the layers are in another order", array
