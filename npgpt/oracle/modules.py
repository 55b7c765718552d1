"""Open and run a PyTorch module, and bring its tensors to canonical names.

torch is never imported: the module's own methods are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import lora, names
from ..checkpoints.configs import complete, guess
from ..checkpoints.tensor import Source, Tensor
from ..checkpoints.wrappers import located
from ..config import GPT2_VOCAB_SIZES, Config
from ..errors import NpgptError
from ..language_model import LanguageModel
from ..parameters import Array, check_shapes, from_arrays, schema
from ..text.tokenizer import Tokenizer
from ..text.vocabularies import load_tokenizer
from .arithmetic import UNIT
from .conditions import PERTURBED, as_judged, perturbation
from .firings import Firings, Place, places
from .outputs import as_array, logits_of, raised
from .running import Ids, invoke
from .weights import HEAD, WTE, listed

# Prefixes of the names of a part's tensors within a block.
PREFIXES = {"attention": "attn.", "mlp": "mlp.", "layer_norm": "ln_1.", "block": ""}
# Other names of a LayerNorm's gain and bias.
OF_NORMS = dict.fromkeys(("gamma", "gain", "g", "a_2"), "weight") | dict.fromkeys(("beta", "b", "b_2"), "bias")


@dataclass(frozen=True)
class Stored:
    """Unwrapped tensors by their own names, and the sources of canonical ones. strange: names that GPT-2 lacks.

    head: the source of an output head under a name of its own, which may equal wte nevertheless.
    """

    bare: Mapping[str, Tensor]
    sources: Mapping[str, Source]
    config: Config
    strange: Sequence[str]
    head: Source | None = None
    note: str = ""  # about a guess

    def in_float64(self, name: str) -> Array:
        """Return a canonical tensor in float64; zeros for a bias that the program does not have."""
        source = self.sources[name]
        if not source.parts:
            return np.zeros(schema(self.config)[name])
        return np.ascontiguousarray(source.stored(self.bare)[0], np.float64)


@dataclass(frozen=True)
class Module:
    """An opened module: its tensors in float64 by canonical name, the dtype they are stored in, and where stages are.

    changed: parameters, each with the data that replaces its own during a run.
    """

    module: Any
    tensors: Mapping[str, Array]
    stored: Stored
    dtype: str
    places: Sequence[Place]
    changed: Sequence[tuple[Any, Any]] = ()

    @property
    def config(self) -> Config:
        """The configuration that the tensors imply."""
        return self.stored.config

    def run(self, token_ids: Ids) -> Mapping[str, NDArray[Any]]:
        """Run the module on ids [B, T], and return every stage that its parts show."""
        return self.observed(token_ids).stages

    def observed(self, token_ids: Ids) -> Firings:
        """Run the module on ids [B, T], and record what ran. Raises NpgptError if it raises or returns no logits."""
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

    def trained(self) -> Module:
        """Return the module with an untied configuration if its output head is a parameter of its own, equal or not:
        then each table has its own gradient.
        """
        head, held = self.stored.head, dict(self.module.named_parameters(remove_duplicate=False))
        if head is None or not self.config.tie_word_embeddings:
            return self
        one, other = (held.get(self.stored.bare[x.parts[0]].name) for x in (head, self.stored.sources[WTE]))
        if one is None or one is other:
            return self
        stored = replace(
            self.stored,
            sources={**self.stored.sources, HEAD: head},
            config=replace(self.config, tie_word_embeddings=False),
        )
        return replace(self, stored=stored, tensors={**self.tensors, HEAD: stored.in_float64(HEAD)})

    def perturbed(self) -> tuple[Module, list[str]]:
        """Return the module with other values in parameters that hold one number throughout, and a note on it.

        Its tensors, with which the reference is run, have the same values.
        """
        bare, sources = self.stored.bare, self.stored.sources
        own = {bare[part].name for source in sources.values() for part in source.parts}
        changed = perturbation(self.module, own)
        if not changed:
            return self, []
        data = {name: as_array(value) for name, _, value in changed}
        bare = {key: array_tensor(x.path, x.name, data[x.name]) if x.name in data else x for key, x in bare.items()}
        stored = replace(self.stored, bare=bare)
        moved = [name for name, source in sources.items() if any(bare[part].name in data for part in source.parts)]
        tensors = {**self.tensors, **{name: stored.in_float64(name) for name in moved}}
        pairs = [(parameter, value) for _, parameter, value in changed]
        return replace(self, tensors=tensors, changed=pairs), [PERTURBED.format(listed(moved, self.config.n_layer))]


def is_module(theirs: object) -> bool:
    """Return whether an object has the methods of a PyTorch module."""
    return all(callable(getattr(theirs, name, None)) for name in ("state_dict", "named_modules", "parameters"))


def dtype_of(module: Any) -> str:
    """Return the dtype of a module's first float parameter. Raises NpgptError if there is none of a known dtype."""
    kinds = [str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()]
    if known := next((kind for kind in kinds if kind in UNIT), None):
        return known
    kind = kinds[0] if kinds else "unknown"
    raise NpgptError(f"the dtype of {type(module).__name__} is {kind}, but must be one of {', '.join(UNIT)}")


def stored_tensors(state: Mapping[str, Any], title: str) -> dict[str, Tensor]:
    """Return arrays of any framework in the form of a file's tensors."""
    arrays = {str(name): as_array(value) for name, value in state.items() if hasattr(value, "shape")}
    return {name: array_tensor(Path(title), name, array) for name, array in arrays.items() if array.dtype.kind == "f"}


def array_tensor(path: Path, name: str, array: NDArray[Any]) -> Tensor:
    """Return an array in the form of a file's tensor."""
    data = np.ascontiguousarray(array).reshape(-1).data
    return Tensor(path, name, data, str(array.dtype), array.shape, 0)  # type: ignore[arg-type]


def stored(theirs: Any, n_head: int | None, config: Config | None) -> Stored:
    """Return the tensors of a module or a state dict, with the configuration that they imply unless one is given.

    A module states its n_head, and GPT-2 determines the rest; for a state dict, its naming scheme does. Raises
    NpgptError if the names are unknown, a tensor is missing or of the wrong shape, or n_head cannot be determined.
    """
    is_whole = is_module(theirs)
    title = type(theirs).__name__ if is_whole else "weights"
    held = stored_tensors(theirs.state_dict() if is_whole else state_of(theirs), title)
    lora.check_merged(held, title)
    found = located(held, title)
    bare = found.tensors
    scheme = names.choose(None, bare, title)
    sources = scheme.translate(bare)
    own_head = sources.get(HEAD)
    head, wte = (bare[sources[key].parts[0]].stored() if key in sources else None for key in (HEAD, WTE))
    tied = head is None or (wte is not None and np.array_equal(head, wte))
    if tied:
        sources.pop(HEAD, None)
    shapes = {key: source.shape(bare) for key, source in sources.items()}
    guesses = config is None and not is_whole and scheme.guesses_gelu
    if config is None:
        n_head = n_head or (stated_n_head(theirs) if is_whole else None)
        assumed = {"activation_function": "gelu_new"} | ({} if is_whole else dict(scheme.assumes))
        config = complete(assumed | {"tie_word_embeddings": tied}, shapes, n_head, title)
    known = schema(config)
    strange = [key for key in sources if key not in known and key != HEAD]
    if all(key in sources for key in known):  # else a strange tensor may be the missing one
        shapes = {key: shape for key, shape in shapes.items() if key not in strange}
    check_shapes(config, shapes, f"{title} ({scheme.title})", "its own sizes")
    left = [bare[part].name for key in strange for part in sources[key].parts]
    left += [tensor.name for tensor in (*found.heads, *found.beside)]
    known_sources = {key: source for key, source in sources.items() if key in known}
    return Stored(bare, known_sources, config, left, own_head, guess(config.activation_function) if guesses else "")


def state_of(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state dict in a mapping: itself, or the first nested one, as in a training checkpoint."""
    states = (mapping, *(value for value in mapping.values() if isinstance(value, Mapping)))
    return next((state for state in states if any(hasattr(value, "shape") for value in state.values())), mapping)


def as_language_model(theirs: Any, n_head: int | None) -> LanguageModel:
    """Return the model for the weights of a module or state dict, in float64. Its tokenizer is GPT-2's, if ids fit."""
    found = stored(theirs, n_head, None)
    title = type(theirs).__name__ if is_module(theirs) else "weights"

    def tokenizer() -> Tokenizer:
        if found.config.vocab_size not in GPT2_VOCAB_SIZES:
            raise NpgptError(f"there is no vocabulary: {found.config.vocab_size} ids are not GPT-2's; give ids")
        return load_tokenizer("gpt2")

    arrays = {name: found.in_float64(name) for name in found.sources}
    parameters, notes = from_arrays(found.config, arrays), (found.note,) if found.note else ()
    return LanguageModel(title, found.config, parameters, tokenizer, notes=notes)


def open_module(module: Any, n_head: int | None, config: Config | None) -> Module:
    """Open a module with its own weights; n_head is the module's own and all else GPT-2's, unless given. Raises
    NpgptError as stored does.
    """
    found = stored(module, n_head, config)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    strange = [name for name in found.strange if name in parameters]  # buffers are not weights
    owners = {key: [found.bare[part].name for part in source.parts] for key, source in found.sources.items()}
    tensors = {name: found.in_float64(name) for name in found.sources}
    return Module(module, tensors, replace(found, strange=strange), dtype_of(module), list(places(owners)))


def part_tensors(part: str, module: Any) -> dict[str, Array]:
    """Return the tensors of a single part in float64, by canonical names without the block; zeros for missing biases.

    Wrapped submodules are recognised too, since only the end of a name counts.
    """
    is_conv = any(type(each).__name__ == "Conv1D" for _, each in module.named_modules())
    state = stored_tensors(module.state_dict(), type(module).__name__)
    found: dict[str, Array] = {}
    for scheme in (names.LLMS_FROM_SCRATCH, names.HUGGING_FACE if is_conv else names.NANOGPT):
        whole: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if key := _whole_name(scheme, part, name):
                whole.setdefault(key, tensor)
        for canonical, source in scheme.translate(whole).items():
            if source.parts:
                array = np.ascontiguousarray(source.stored(whole)[0], np.float64)
                found.setdefault(canonical.removeprefix("h.0."), array)
    if part == "mlp" and not {"mlp.c_fc.weight", "mlp.c_proj.weight"} <= found.keys():
        found = _by_order(module) or found
    weights = {name.removesuffix("weight"): array for name, array in found.items() if name.endswith("weight")}
    return {f"{name}bias": np.zeros(array.shape[-1]) for name, array in weights.items()} | found


def _whole_name(scheme: names.Scheme, part: str, name: str) -> str:
    """Return the name that a tensor of a part would have in a whole model, judged by its end, or ""."""
    path, _, last = name.rpartition(".")
    name = f".{path}.{OF_NORMS.get(last, last)}"
    ends = [(PREFIXES[part], 3)]
    if part == "block":  # by the name within the block, else within attention or the MLP
        ends = [("", 2), ("mlp." if "mlp" in path or "ff" in path else "attn.", 3)]
    for own, outer in ends:
        for theirs, (ours, _) in scheme.tensors.items():
            if ours.startswith(f"h.*.{own}") and name.endswith(f".{theirs.split('.', outer)[-1]}"):
                return theirs.replace("*", "0")
    return ""


def _by_order(module: Any) -> dict[str, Array]:
    """Return the tensors of an MLP by the order of its two linear layers, whatever their names (nn.Sequential)."""
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
    """Return the number of heads that the module states: num_heads or n_head of attention, else of its config."""
    places = [part for _, part in module.named_modules()]
    places += [config for part in places if (config := getattr(part, "config", None)) is not None]
    for place in places:
        for name in ("num_heads", "n_head", "n_heads"):
            value = place.get(name) if isinstance(place, dict) else getattr(place, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    raise NpgptError(f"{type(module).__name__} does not state its number of heads (num_heads or n_head): give n_head=")


def ids_for(module: Any, token_ids: Ids) -> Any:
    """Return ids as the module's own kind of tensor. They pass through float32, which represents every id."""
    return next(iter(module.parameters())).detach().float().new_tensor(token_ids.tolist()).long()
