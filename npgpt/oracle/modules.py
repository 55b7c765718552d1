"""A PyTorch module: its own tensors under canonical names, opened and run.

torch is never imported: everything goes through the module's own methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import names
from ..checkpoints.configs import complete
from ..checkpoints.tensor import Source, Tensor
from ..config import GPT2_VOCAB_SIZES, Config
from ..errors import NpgptError
from ..language_model import LanguageModel
from ..parameters import Array, check_shapes, from_arrays, schema
from ..text.tokenizer import Tokenizer
from ..text.vocabularies import load_tokenizer
from .arithmetic import UNIT
from .conditions import PERTURBED, as_judged, perturbation
from .firings import THIRDS, Firings, Place
from .outputs import as_array, logits_of, raised
from .running import Ids, invoke
from .textbook import BLOCK, located
from .weights import HEAD, WTE, listed

INPUTS = {"attn.c_proj": "attn.merged", "ln_2": "attn.residual"}  # what a part is given
BESIDE = {"wte": (("drop", "drop_emb"), "embedding"), "mlp.c_fc": (("act", "gelu", "1"), "mlp.act")}  # without tensors
# What a part alone lacks in front of its tensors' names, for them to be a whole model's.
PREFIXES = {
    "attention": ("h.0.attn.", "trf_blocks.0.att."),
    "mlp": ("h.0.mlp.", "trf_blocks.0.ff."),
    "layer_norm": ("trf_blocks.0.norm1.",),
    "block": ("h.0.", "trf_blocks.0."),
}
# What people call a LayerNorm's gain and bias.
OF_NORMS = dict.fromkeys(("gamma", "gain", "g", "a_2"), "weight") | dict.fromkeys(("beta", "b", "b_2"), "bias")


@dataclass(frozen=True)
class Stored:
    """Tensors by their own names, unwrapped, and of which of them each canonical one is made. strange: whole names of
    those that no GPT-2 has.
    """

    bare: Mapping[str, Tensor]
    sources: Mapping[str, Source]
    config: Config
    strange: Sequence[str]

    def in_float64(self, name: str) -> Array:
        """Return a canonical tensor, zeros where it is a bias that the program leaves out."""
        source = self.sources[name]
        if not source.parts:
            return np.zeros(schema(self.config)[name])
        return np.ascontiguousarray(source.stored(self.bare)[0], np.float64)


@dataclass(frozen=True)
class Module:
    """A module opened: its own tensors as float64 by canonical name, the configuration they tell, where stages are.

    changed: parameters, and what takes the place of their data in a run.
    """

    module: Any
    tensors: Mapping[str, Array]
    stored: Stored
    dtype: str
    places: Sequence[Place]
    changed: Sequence[tuple[Any, Any]] = ()

    @property
    def config(self) -> Config:
        """What the tensors tell."""
        return self.stored.config

    def run(self, token_ids: Ids) -> Mapping[str, NDArray[Any]]:
        """Run it on ids [B, T], and take every stage that its parts show."""
        return self.observed(token_ids).stages

    def observed(self, token_ids: Ids) -> Firings:
        """Run it on ids [B, T], and see what ran. Raises NpgptError for what it raises, and where it has no logits."""
        rows, tokens = token_ids.shape
        seen = Firings(self.places, (rows, tokens))
        try:
            with seen.of(self.module), as_judged(self.module, self.changed):
                output = invoke(self.module, ids_for(self.module, token_ids), self.module.forward)
        except NpgptError:
            raise
        except Exception as error:
            raise NpgptError(f"{type(self.module).__name__} raises {raised(error)}") from error
        seen.stages["logits"] = logits_of(output, self.config.vocab_size).astype(np.float64)
        return seen

    def perturbed(self) -> tuple[Module, list[str]]:
        """Return the same with other values where a parameter holds one number throughout, and a note that says so.

        They are its tensors too, by which the reference is run.
        """
        own = {part for source in self.stored.sources.values() for part in source.parts}
        changed = perturbation(self.module, {self.stored.bare[part].name for part in own})
        if not changed:
            return self, []
        data = {name: value for name, _, value in changed}
        bare = {
            key: _tensor(tensor.path, tensor.name, as_array(data[tensor.name])) if tensor.name in data else tensor
            for key, tensor in self.stored.bare.items()
        }
        stored = replace(self.stored, bare=bare)
        moved = [
            name
            for name, source in stored.sources.items()
            if any(bare[part].name in data for part in source.parts) and name in self.tensors
        ]
        note = PERTURBED.format(listed(moved, self.config.n_layer))
        tensors = {**self.tensors, **{name: stored.in_float64(name) for name in moved}}
        pairs = [(parameter, value) for _, parameter, value in changed]
        return replace(self, tensors=tensors, stored=stored, changed=pairs), [note]


def is_module(theirs: object) -> bool:
    """Whether it has what a PyTorch module has."""
    return all(callable(getattr(theirs, name, None)) for name in ("state_dict", "named_modules", "parameters"))


def dtype_of(module: Any) -> str:
    """The dtype of a module's first parameter that is a float. Raises NpgptError where none is one that npgpt knows."""
    kinds = [str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()]
    if known := next((kind for kind in kinds if kind in UNIT), None):
        return known
    raise NpgptError(f"{type(module).__name__} holds {kinds[0] if kinds else 'nothing'}; known are {', '.join(UNIT)}")


def stored_tensors(state: Mapping[str, Any], title: str) -> dict[str, Tensor]:
    """Return arrays of any framework as the tensors of a file."""
    arrays = {str(name): as_array(value) for name, value in state.items() if hasattr(value, "shape")}
    return {name: _tensor(Path(title), name, array) for name, array in arrays.items() if array.dtype.kind == "f"}


def _tensor(path: Path, name: str, array: NDArray[Any]) -> Tensor:
    data = np.ascontiguousarray(array).reshape(-1).data
    return Tensor(path, name, data, str(array.dtype), array.shape, 0)  # type: ignore[arg-type]


def stored(
    state: Mapping[str, Any], title: str, n_head: Callable[[], int | None], config: Config | None, **stated: Any
) -> Stored:
    """Return the tensors of a module's state or of a state dict, with the configuration that they tell.

    n_head is asked for where config is None; stated is what is known besides. Raises NpgptError where the names are
    nobody's, and where a tensor is missing or has another shape.
    """
    bare = unwrapped(stored_tensors(state, title))
    scheme = names.choose(None, bare, title)
    sources = scheme.translate(bare)
    head, wte = (sources.get(key) for key in (HEAD, WTE))
    tied = head is None or (
        wte is not None and np.array_equal(bare[head.parts[0]].stored(), bare[wte.parts[0]].stored())
    )
    if tied:
        sources.pop(HEAD, None)
    shapes = {key: source.shape(bare) for key, source in sources.items()}
    if config is None:
        fields = {"activation_function": "gelu_new", **scheme.assumes, "tie_word_embeddings": tied, **stated}
        config = complete(fields, {key: shape for key, shape in shapes.items() if shape is not None}, n_head(), title)
    known = schema(config)
    strange = [key for key in sources if key not in known and key != HEAD]
    if all(key in sources for key in known):  # else what is strange may be what is missing
        shapes = {key: shape for key, shape in shapes.items() if key not in strange}
    check_shapes(config, shapes, f"{title} ({scheme.title})", "its own sizes")
    left = [bare[part].name for key in strange for part in sources[key].parts]
    return Stored(bare, {key: source for key, source in sources.items() if key in known}, config, left)


def state_of(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state dict in a mapping: itself, or the first within it, as training programs keep one."""
    inner = [value for value in mapping.values() if isinstance(value, Mapping)]
    if any(hasattr(value, "shape") for value in mapping.values()):
        return mapping
    return next((each for each in inner if any(hasattr(value, "shape") for value in each.values())), mapping)


def as_language_model(title: str, found: Stored) -> LanguageModel:
    """Return the model in float64; text is GPT-2's where its ids are."""

    def tokenizer() -> Tokenizer:
        if found.config.vocab_size not in GPT2_VOCAB_SIZES:
            raise NpgptError(f"{found.config.vocab_size} ids are not GPT-2's: give ids")
        return load_tokenizer("gpt2")

    arrays = {name: found.in_float64(name) for name in schema(found.config)}
    return LanguageModel(title, found.config, from_arrays(found.config, arrays), tokenizer)


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without what wraps the model: the wrappers that are known, and an attribute that holds it."""
    bare = names.unwrapped(tensors)
    for attribute in ("", *dict.fromkeys(name.partition(".")[0] + "." for name in bare)):
        inner = {name.removeprefix(attribute): tensor for name, tensor in bare.items() if name.startswith(attribute)}
        inner = names.unwrapped(inner)
        if any(scheme.recognises(inner) for scheme in names.SCHEMES):
            return {name: tensor for name, tensor in bare.items() if not name.startswith(attribute)} | inner
    return bare


def open_module(module: Any, n_head: int | None, config: Config | None) -> Module:
    """The module's own weights are taken as they are, its n_head as it states it; all else is GPT-2's, unless config
    says otherwise. Raises NpgptError where its names are nobody's, and where it does not say n_head.
    """
    title = type(module).__name__
    found = stored(
        module.state_dict(), title, lambda: n_head or stated_n_head(module), config, activation_function="gelu_new"
    )
    parameters = dict(module.named_parameters(remove_duplicate=False))
    strange = [name for name in found.strange if name in parameters]  # a buffer is no weight
    owners = {
        key: [found.bare[part].name.rpartition(".")[0] for part in source.parts]
        for key, source in found.sources.items()
    }
    tensors = {name: found.in_float64(name) for name in found.sources}
    return Module(module, tensors, replace(found, strange=strange), dtype_of(module), list(places(owners)))


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
    for name, tensor in stored_tensors(module.state_dict(), type(module).__name__).items():
        prefixes = PREFIXES[part]
        if part == "block":
            prefixes += PREFIXES["mlp" if "mlp" in name or "ff" in name else "attention"]
        ends = name.split(".")
        ends[-1] = OF_NORMS.get(ends[-1], ends[-1])
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
    if part == "mlp" and not {"mlp.c_fc.weight", "mlp.c_proj.weight"} <= found.keys():
        found = _by_order(module) or found
    weights = {name.removesuffix("weight"): array for name, array in found.items() if name.endswith("weight")}
    return {f"{name}bias": np.zeros(array.shape[-1]) for name, array in weights.items()} | found


def _by_order(module: Any) -> dict[str, Array]:
    """The tensors of an MLP whatever its names, such as an nn.Sequential: of its two linear layers, up and down."""
    parts = [part for _, part in module.named_modules()]
    layers = [part for part in parts if len(getattr(getattr(part, "weight", None), "shape", ())) == 2]
    found: dict[str, Array] = {}
    for name, layer in zip(("mlp.c_fc", "mlp.c_proj"), layers if len(layers) == 2 else (), strict=False):
        weight = as_array(layer.weight).astype(np.float64)
        found[f"{name}.weight"] = weight if type(layer).__name__ == "Conv1D" else np.ascontiguousarray(weight.T)
        if layer.bias is not None:
            found[f"{name}.bias"] = as_array(layer.bias).astype(np.float64)
    return found


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


def ids_for(module: Any, token_ids: Ids) -> Any:
    """Ids as the module's own kind of tensor; by way of float32, which holds every id."""
    return next(iter(module.parameters())).detach().float().new_tensor(token_ids.tolist()).long()
