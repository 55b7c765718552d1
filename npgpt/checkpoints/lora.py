"""Merge LoRA adapters of the package peft into their base model on load: W + alpha / r · B A.

    adapter_config.json, and adapter_model.safetensors or .bin, or a complete state dict that was saved unmerged

A layer's two factors are A [r, in] and B [out, r]. They are merged under canonical names, where a matrix is [in, out].
An adapter of Hugging Face's model therefore fits that model in every format and naming scheme that npgpt reads.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import NpgptError
from ..parameters import Shape
from . import formats, strict_json
from .find import find
from .formats import ADAPTER_CONFIG, ADAPTERS
from .names import BLOCK, SCHEMES, THIRDS
from .tensor import Contents, Source, Tensor, cast, same_bits

# Settings that npgpt honours, and settings that only describe training: their effect is in the tensors already.
HONOURED = frozenset("peft_type base_model_name_or_path r lora_alpha use_rslora rank_pattern alpha_pattern".split())
WITHOUT_EFFECT = frozenset(
    """
    auto_mapping bias ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode layers_pattern
    layers_to_transform loftq_config lora_dropout megatron_config megatron_core modules_to_save peft_version
    qalora_group_size runtime_config target_modules task_type
    """.split()
)
# values of init_lora_weights that leave the base's weights unchanged
INNOCENT = (True, False, None, "gaussian", "eva", "orthogonal")
PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
FOREIGN = re.compile(r"(?:^|\.)(?:lora_|lora\.|token_adapter\.|ia3_|original_module\.|prompt_)")
WHOLE = {"wte.weight", "wpe.weight", "ln_f.weight"}  # tensors that a complete model has and an adapter rarely has
# An adapter's own vocabulary replaces the base's; if it is of another kind, reading it is an error, not skipped.
VOCABULARIES = ("tokenizer.json", "vocab.json", "encoder.json", "vocab.tiktoken", "spiece.model", "tokenizer.model")
ENLARGED = ("wte.weight", "lm_head.weight")  # these may have additional rows for new tokens
BOOK = re.compile(r"(.+\.)?lora\.[AB]")  # LLMs-from-scratch, appendix E; A is [in, r], B is [r, out]
BY_HAND = (
    "no file states alpha: add alpha * (lora.A @ lora.B).T to each linear.weight, replace each LoRA layer by its "
    "linear layer, and save that model"
)
MERGE = "merge it in peft (model.merge_and_unload()) and save the complete model"


class LowRank(NamedTuple):
    """A low-rank update of a matrix, scale · B A; third selects queries, keys or values, None the whole matrix."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scale: float
    third: int | None

    def added(self, matrix: NDArray[np.float64], in_out: bool) -> NDArray[np.float64]:
        """Return the matrix, [in, out] or [out, in], plus the update, in float64."""
        product = self.scale * (self.b.load("float64") @ self.a.load("float64"))
        product = product.T if in_out else product
        if self.third is None:
            return matrix + product
        thirds = np.split(matrix, 3, axis=-1)
        thirds[self.third] = thirds[self.third] + product
        return np.concatenate(thirds, axis=-1)


Updates = Mapping[str, tuple[LowRank, ...]]  # by canonical name


@dataclass(frozen=True)
class Adapter:
    """An adapter's settings and tensors: factors {layer: {"A" or "B": tensor}}, and tensors that replace the base's."""

    path: Path
    settings: Mapping[str, Any]
    factors: Mapping[str, Mapping[str, Tensor]]
    replaced: Mapping[str, Tensor]

    def merged(
        self, tensors: Mapping[str, Tensor], sources: Mapping[str, Source]
    ) -> tuple[dict[str, Tensor], dict[str, Source], Updates]:
        """Return the base's tensors and sources with the adapter's replacements, and the low-rank updates.

        Raises NpgptError for a layer that the base lacks, a shape that does not fit, or a change to only one of two
        tied tensors.
        """
        tensors, sources = dict(tensors), dict(sources)
        updates: dict[str, tuple[LowRank, ...]] = {}
        for name, tensor in self.replaced.items():
            layer, _, end = name.rpartition(".")
            ours, third = _canonical(layer)
            ours += f".{end}"
            theirs = sources.get("wte.weight" if ours == "lm_head.weight" else ours)
            if theirs is None or third is not None or (".c_" in ours and end == "weight"):
                raise NpgptError(f"{self.path} contains {tensor.name:.200}, which npgpt cannot merge: {MERGE}")
            expected = theirs.shape(tensors) or tensor.shape
            rows = tensor.shape[:1] if ours in ENLARGED else expected[:1]
            _check(self.path, tensor, (*rows, *expected[1:]))
            tensors[tensor.name], sources[ours] = tensor, Source((tensor.name,))
        for layer, found in self.factors.items():
            ours, third = _canonical(layer)
            ours += ".weight"
            if not (".c_" in ours or ours == "lm_head.weight") or (shape := _shape(sources, tensors, ours)) is None:
                raise NpgptError(f"{self.path} adapts {layer:.200}, which is not a matrix of its base model: {MERGE}")
            if found.keys() != {"A", "B"}:
                raise NpgptError(f"{self.path} is incomplete: it has only factor {''.join(found)} of {layer:.200}")
            n_in, n_out = shape if ".c_" in ours else shape[::-1]
            rank = self._stated("rank_pattern", layer, "r")
            _check(self.path, found["A"], (rank, n_in))
            _check(self.path, found["B"], (n_out if third is None else n_out // 3, rank))
            if any(update.third == third for update in updates.get(ours, ())):
                raise NpgptError(f"{self.path} adapts {ours} twice, once as {layer:.200}: {MERGE}")
            scale = self._scale(layer, found["A"].shape[0])
            updates[ours] = (*updates.get(ours, ()), LowRank(found["A"], found["B"], scale, third))
        self._check_ties(tensors, sources, updates)
        return tensors, sources, updates

    def _scale(self, layer: str, rank: int) -> float:
        """Return alpha / r, or alpha / √r if use_rslora is set. Raises NpgptError if that is not a finite number."""
        alpha = self._stated("alpha_pattern", layer, "lora_alpha")
        if type(alpha) not in (int, float) or not abs(alpha) <= sys.float_info.max or rank < 1:
            raise NpgptError(f"{self.path}: {layer:.200} has alpha {alpha!r:.40} and r {rank}, which give no scale")
        return float(alpha / math.sqrt(rank) if self.settings.get("use_rslora") else alpha / rank)

    def _stated(self, pattern: str, layer: str, default: str) -> Any:
        """Return a layer's setting: that of the first pattern that matches the end of its name, else the default."""
        patterns = self.settings.get(pattern) or {}
        if not isinstance(patterns, dict) or not all(re.fullmatch(r"\^?[\w.]+", key) for key in patterns):
            raise _refusal(self.path, pattern, patterns)
        name = layer.removeprefix(PREFIX)
        found = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)
        return self.settings.get(default) if found is None else patterns[found]

    def _check_ties(self, tensors: Mapping[str, Tensor], sources: Mapping[str, Source], updates: Updates) -> None:
        """Raise NpgptError if the base ties head and embeddings, and the adapter changes only one of them."""
        own = {tensor.name for tensor in self.replaced.values()}
        head, wte = (sources.get(name) for name in ("lm_head.weight", "wte.weight"))
        changed = [name for name, source in (("lm_head", head), ("wte", wte)) if source and source.parts[0] in own]
        changed += ["lm_head"] if "lm_head.weight" in updates else []
        if not changed or wte is None:
            return
        tied = head is None or same_bits(tensors[head.parts[0]], tensors[wte.parts[0]])
        if tied and len(set(changed)) == 1:
            raise NpgptError(f"{self.path} changes only {changed[0]}, but the base ties lm_head to wte: {MERGE}")


def opened(path: Path, contents: Contents) -> tuple[Path, Contents, Adapter | None]:
    """Return a checkpoint unchanged, or, for an adapter, its base model and the adapter.

    The path returned is that of the file whose folder has the configuration. Raises NpgptError for an adapter that is
    not LoRA, for a setting that npgpt does not honour, and if adapter_config.json or the base model is missing.
    """
    if path.name not in ADAPTERS and not any(map(FOREIGN.search, contents.tensors)):
        return path, contents, None
    source, example = path.with_name(ADAPTER_CONFIG), next(filter(FOREIGN.search, contents.tensors), "its name")
    if BOOK.fullmatch(example):
        raise NpgptError(f"{path} has unmerged LoRA layers ({example:.200}), and {BY_HAND}")
    if not source.is_file():
        raise NpgptError(
            f"{path} is an unmerged adapter ({example:.200}), but {ADAPTER_CONFIG}, which states alpha and the base "
            f"model, is not beside it: put it there, or {MERGE}"
        )
    settings = strict_json.read_file(source)
    _check_settings(source, settings)
    factors, rest = _sorted(path, contents.tensors)
    names = {f"{_canonical(name.rpartition('.')[0])[0]}.{name.rpartition('.')[2]}" for name in rest}
    if names >= WHOLE and all(f"{layer}.weight" in rest for layer in factors):
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in rest.items()}
        whole = dataclasses.replace(contents, format=f"{contents.format}, LoRA adapter merged", tensors=tensors)
        return path, whole, Adapter(path, settings, factors, {})
    base = _base(path, source, settings)
    found = formats.read(base)
    if base.name in ADAPTERS or any(map(FOREIGN.search, found.tensors)):
        raise NpgptError(f"{path}: its base {base} is an adapter too, but npgpt merges only one: {MERGE}")
    has_vocabulary = any((path.parent / name).exists() for name in VOCABULARIES)
    whole = dataclasses.replace(
        found,
        format=f"{found.format} with the LoRA adapter {path}",
        files=(*found.files, *contents.files, source),
        outdated=frozenset({"vocab_size"} if "wte.weight" in names else ()),
        home=path if has_vocabulary else base,
        vocabulary=None if has_vocabulary else found.vocabulary,  # embedded in a GGUF file
    )
    return base, whole, Adapter(path, settings, factors, rest)


def check_merged(tensors: Iterable[str], title: str) -> None:
    """Raise NpgptError if a module's tensors include an adapter's; title names the module in errors."""
    if (example := next(filter(FOREIGN.search, tensors), None)) is not None:
        out = f", and {BY_HAND}" if BOOK.fullmatch(example) else ": give model.merge_and_unload()"
        raise NpgptError(f"{title} has an unmerged adapter ({example:.200}){out}")


def updated(stored: NDArray[Any], dtype: str, name: str, updates: Iterable[LowRank]) -> tuple[NDArray[Any], str]:
    """Return a canonical tensor with low-rank updates added, and its dtype, float64."""
    matrix = cast(stored, dtype, "float64", name)
    with np.errstate(over="ignore", invalid="ignore"):  # a damaged factor: inspect reports non-finite values
        for update in updates:
            matrix = update.added(matrix, in_out=".c_" in name)
    return matrix, "float64"


def _check_settings(source: Path, settings: Mapping[str, Any]) -> None:
    """Raise NpgptError for a setting that affects the result and that npgpt does not honour."""
    if settings.get("peft_type") != "LORA":
        raise _refusal(source, "peft_type", settings.get("peft_type"))
    if (init := settings.get("init_lora_weights")) not in INNOCENT:  # PiSSA and OLoRA change the base too
        raise _refusal(source, "init_lora_weights", init)
    if type(rslora := settings.get("use_rslora")) not in (bool, type(None)):  # the string "false" is true in Python
        raise _refusal(source, "use_rslora", rslora)
    known = HONOURED | WITHOUT_EFFECT | {"init_lora_weights"}
    for key, value in settings.items():
        if value and key not in known and (key, value) != ("revision", "main"):
            raise _refusal(source, key, value)


def _refusal(source: Path, key: str, value: object) -> NpgptError:
    return NpgptError(f"{source}: {key:.80} is {value!r:.80}, which npgpt does not support: {MERGE}")


def _sorted(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return the factors by layer, and all other tensors by their names in the base model.

    Raises NpgptError for a tensor that is neither, and if there is no adapter or more than one.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    adapters: set[str] = set()
    for name, tensor in tensors.items():
        if match := FACTOR.fullmatch(name):
            factors.setdefault(match["module"], {})[match["factor"]] = tensor
            adapters.add(match["adapter"] or "default")
            continue
        bare = re.sub(r"\.modules_to_save(?:\.default)?(?=\.)", "", name.replace(".base_layer.", "."))
        if ".original_module." in name and name.replace("original_module", "modules_to_save.default") in tensors:
            continue  # the copy in modules_to_save replaces it
        if FOREIGN.search(bare) or bare in rest:
            raise NpgptError(f"{path} contains {name:.200}, which npgpt cannot merge: {MERGE}")
        rest[bare] = tensor
    if not factors or len(adapters) > 1:
        what = f"several LoRA adapters, {', '.join(sorted(adapters)):.200}" if factors else "no LoRA adapter"
        raise NpgptError(f"{path} contains {what}, but npgpt merges exactly one: {MERGE}")
    return factors, rest


def _canonical(layer: str) -> tuple[str, int | None]:
    """Return a layer's canonical name, without any prefix, and its third of c_attn; an unknown name is unchanged."""
    words = layer.split(".")
    for start in range(len(words)):
        theirs = ".".join(words[start:])
        match = BLOCK.search(theirs)
        starred = f"{theirs[: match.start()]}*{theirs[match.end() :]}" if match else theirs
        if ours := next((scheme.layers[starred] for scheme in SCHEMES if starred in scheme.layers), None):
            canonical = ours.replace("*", match[0] if match else "*")
            module, _, last = canonical.rpartition(".")
            return (f"{module}.c_attn", THIRDS.index(last)) if last in THIRDS else (canonical, None)
    return layer, None


def _shape(sources: Mapping[str, Source], tensors: Mapping[str, Tensor], name: str) -> Shape | None:
    """Return the shape of a canonical tensor, or None if it is missing or not a matrix."""
    shape = sources[name].shape(tensors) if name in sources else None
    return shape if shape is not None and len(shape) == 2 else None


def _check(path: Path, tensor: Tensor, expected: tuple[Any, ...]) -> None:
    if tensor.shape != expected:
        shapes = f"is {list(tensor.shape)}, but its base and settings need {list(expected)}"
        raise NpgptError(f"{path}: {tensor.name:.200} {shapes}: {MERGE}")


def _base(path: Path, source: Path, settings: Mapping[str, Any]) -> Path:
    """Return the weights of an adapter's base model, found by its name or in a folder of that name beside the adapter.

    Raises NpgptError if the name is missing or leads to no model.
    """
    name = settings.get("base_model_name_or_path")
    if not isinstance(name, str) or not name.strip("/."):
        raise NpgptError(
            f"{source}: base_model_name_or_path is {name!r:.80}: set it to a folder, or to a name such as gpt2"
        )
    beside = path.parent / PurePath(name).name
    missing: NpgptError | None = None
    for place in (name, beside):
        try:
            return find(place).weights
        except NpgptError as error:
            missing = missing or error
    raise NpgptError(f"{path} is a LoRA adapter whose base model is missing: {missing}; or put it into {beside}/")
