"""Naming schemes: each program's names for the tensors of GPT-2.

A new scheme is a Scheme in SCHEMES; CONTRIBUTING.md has an example. Its table maps the program's layers to canonical
ones, with `*` for the block index. Separate layers for queries, keys and values map to "h.*.attn.query",
"h.*.attn.key" and "h.*.attn.value". A `*` only in the canonical name means that the tensor stacks all blocks. The same
tables serve files, state dicts and single parts of a module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..config import MOST_LAYERS
from ..errors import NpgptError, nearest
from .tensor import Source, Tensor, same_bits

BLOCK = re.compile(r"(?<=[.h])\d+(?=[./]|\Z)")  # a block index: h.3.ln_1, model/h3/ln_1
THIRDS = ("query", "key", "value")  # the order of their columns in c_attn


@dataclass(frozen=True)
class Scheme:
    """One program's names for GPT-2's layers, and how to recognise and read its checkpoints."""

    name: str
    title: str
    layers: Mapping[str, str]  # {program's layer: canonical layer}
    ends: Mapping[str, str] = field(default_factory=lambda: {".weight": ".weight", ".bias": ".bias"})
    dropped: str = r"(?!)"  # pattern of full names to ignore: buffers, optimizer state
    out_in: bool = False  # matrices are stored [out, in], as in torch.nn.Linear
    leading_1: bool = False  # matrices are stored [1, in, out], as convolutions of width 1
    may_lack_biases: str = r"(?!)"  # pattern of canonical layers; their biases are zeros if a file has none
    known_by: str = "h.*.attn.c_attn.weight"  # the canonical tensor that, with condition, identifies the scheme
    condition: Callable[[Mapping[str, Tensor]], bool] = lambda tensors: True
    assumes: Mapping[str, Any] = field(default_factory=dict)  # the program's configuration, unless stated otherwise
    guesses_gelu: bool = False  # another program uses the same names with another activation
    ties: bool = False  # a configuration without a statement on the output head means that it is tied to wte

    @cached_property
    def tensors(self) -> dict[str, tuple[str, int]]:
        """Return {program's tensor: (canonical tensor, index of the part)}."""
        found: dict[str, tuple[str, int]] = {}
        for layer, ours in self.layers.items():
            module, _, last = ours.rpartition(".")
            whole, part = (f"{module}.c_attn", THIRDS.index(last)) if last in THIRDS else (ours, 0)
            found |= {layer + end: (whole + kind, part) for end, kind in self.ends.items()}
        return found

    def recognises(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether unwrapped tensors have this scheme's names."""
        known = {theirs for theirs, (ours, _) in self.tensors.items() if ours == self.known_by}
        return any(_starred(name)[0] in known for name in tensors) and self.condition(tensors)

    def translate(self, tensors: Mapping[str, Tensor]) -> dict[str, Source]:
        """Return {canonical name: source} of unwrapped tensors, without those that the scheme drops.

        Unknown names, and second names for the same tensor, stay unchanged; loading reports them.
        """
        found: dict[str, dict[int, Source]] = {}
        for name, tensor in tensors.items():
            starred, block = _starred(name)
            ours, part = self.tensors.get(starred, (name, -1))
            is_matrix = part >= 0 and ".c_" in ours and ours.endswith(".weight")
            source = Source((name,), self.out_in and is_matrix)
            if part < 0:
                made = {} if re.fullmatch(self.dropped, name) else {name: source}
            elif "*" in ours and "*" not in starred and tensor.shape and tensor.shape[0]:
                layers = range(min(tensor.shape[0], MOST_LAYERS + 1))  # one too many is enough for Config to reject it
                made = {ours.replace("*", str(layer)): source._replace(entry=layer) for layer in layers}
            else:
                entry = 0 if self.leading_1 and is_matrix and tensor.shape[:-2] == (1,) else None
                made = {ours.replace("*", block or "*"): source._replace(entry=entry)}
            for canonical, source in made.items():
                taken = part in found.get(canonical, {})
                found.setdefault(name if taken else canonical, {})[-1 if taken else part] = source
        sources = {}
        for canonical, parts in found.items():
            ordered = [parts[part] for part in sorted(parts)]
            sources[canonical] = ordered[0]._replace(parts=tuple(source.parts[0] for source in ordered))
        weights = (name.removesuffix(".weight") for name in sources if name.endswith(".weight"))
        biases = [f"{layer}.bias" for layer in weights if re.fullmatch(self.may_lack_biases, layer)]
        return sources if any(bias in sources for bias in biases) else sources | dict.fromkeys(biases, Source(()))


def _starred(name: str) -> tuple[str, str]:
    """Return the name with `*` for the block index, and that index as text, empty if there is none."""
    match = BLOCK.search(name)
    return (f"{name[: match.start()]}*{name[match.end() :]}", match[0]) if match else (name, "")


def _linear_is_out_in(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the first c_attn is [3C, C]."""
    shapes = (tensor.shape for name, tensor in tensors.items() if _starred(name)[0] == "h.*.attn.c_attn.weight")
    shape = next(shapes, ())
    return len(shape) == 2 and shape[0] == 3 * shape[1] > 0


def _is_mingpt(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether there are biases and an output head that differs from wte; only these identify minGPT."""
    head, wte = tensors.get("lm_head.weight"), tensors.get("wte.weight")
    if head is None or wte is None or "ln_f.bias" not in tensors:
        return False
    return _linear_is_out_in(tensors) and not same_bits(head, wte)


LAYERS = "wte wpe h.*.ln_1 h.*.attn.c_attn h.*.attn.c_proj h.*.ln_2 h.*.mlp.c_fc h.*.mlp.c_proj ln_f lm_head".split()


def _in_order(theirs: str, ours: Sequence[str] = LAYERS) -> dict[str, str]:
    """Return {program's layer: canonical layer}; both are in the same order."""
    return dict(zip(theirs.split(), ours, strict=True))


# The canonical names. A saved GPT2LMHeadModel adds a prefix and, in some versions, two buffers per block.
HUGGING_FACE = Scheme(
    "huggingface",
    "Hugging Face's names",
    layers={layer: layer for layer in LAYERS} | {"lm_head.decoder": "lm_head"},
    dropped=r"h\.\d+\.attn\.(?:bias|masked_bias)",
    ties=True,
)
# karpathy/nanoGPT, model.py: the exact (erf) GELU, no biases by default, an output head that shares wte's storage.
# karpathy/build-nanogpt has the same names, but biases and the tanh GELU.
NANOGPT = replace(
    HUGGING_FACE,
    name="nanogpt",
    title="nanoGPT's names",
    out_in=True,
    may_lack_biases=r"h\..*|ln_f",
    condition=_linear_is_out_in,
    assumes={"activation_function": "gelu"},
    guesses_gelu=True,
    ties=False,
)
# karpathy/minGPT, mingpt/model.py: the tanh GELU, biases, a separate output head.
MINGPT = replace(
    NANOGPT, name="mingpt", title="minGPT's names", condition=_is_mingpt, assumes={"activation_function": "gelu_new"}
)
# rasbt/LLMs-from-scratch, ch04: GPTModel, its variant with a KV cache, and GPTModelFast (qkv, proj, PyTorch's
# LayerNorm). Queries, keys and values have biases only with qkv_bias; the output head is separate.
LLMS_FROM_SCRATCH = Scheme(
    "llms-from-scratch",
    "LLMs-from-scratch's names",
    layers=_in_order(
        "tok_emb pos_emb trf_blocks.*.norm1 trf_blocks.*.att.qkv trf_blocks.*.att.out_proj "
        "trf_blocks.*.norm2 trf_blocks.*.ff.layers.0 trf_blocks.*.ff.layers.2 final_norm out_head"
    )
    | {"trf_blocks.*.att.proj": "h.*.attn.c_proj"}
    | {f"trf_blocks.*.att.W_{third}": f"h.*.attn.{third}" for third in THIRDS},
    ends={".weight": ".weight", ".bias": ".bias", ".scale": ".weight", ".shift": ".bias"},
    dropped=r"trf_blocks\.\d+\.att\.(?:mask|cache_k|cache_v)",
    out_in=True,
    may_lack_biases=r"h\.\d+\.attn\.c_attn",
    known_by="h.*.ln_1.weight",
)
# openai/gpt-2, src/model.py. A training run adds optimizer slots, step counters and the object graph.
OPENAI = Scheme(
    "openai",
    "OpenAI's TensorFlow names",
    layers={"model/" + layer.replace("h.*", "h*").replace(".", "/"): layer for layer in LAYERS[:-1]},
    ends={"": ".weight", "/g": ".weight", "/w": ".weight", "/b": ".bias"},
    dropped=r"(?s)(?!model/).*|.*/(?:Adam|Adam_1|Adafactor|Momentum|\.OPTIMIZER_SLOT/.*)",
    leading_1=True,
    known_by="wte.weight",
)
# ggml-org/llama.cpp, gguf-py, tensor_mapping.py
LLAMA_CPP = Scheme(
    "llama.cpp",
    "llama.cpp's names",
    layers=_in_order(
        "token_embd position_embd blk.*.attn_norm blk.*.attn_qkv blk.*.attn_output "
        "blk.*.ffn_norm blk.*.ffn_up blk.*.ffn_down output_norm output"
    ),
    out_in=True,
    known_by="wpe.weight",
)
# karpathy/llm.c, train_gpt2.c, ParameterTensors: 16 arrays, stacked over blocks; no output head
LLM_C = Scheme(
    "llm.c",
    "llm.c's names",
    layers=_in_order("wte wpe ln1 qkv attproj ln2 fc fcproj lnf", LAYERS[:-1]),
    ends={"": ".weight", "w": ".weight", "b": ".bias"},
    out_in=True,
)
# In the order in which they are tried: minGPT's names are also nanoGPT's, and both are also Hugging Face's.
SCHEMES = (MINGPT, NANOGPT, HUGGING_FACE, LLMS_FROM_SCRATCH, OPENAI, LLAMA_CPP, LLM_C)


def choose(name: str | None, tensors: Mapping[str, Tensor], source: str) -> Scheme:
    """Return the scheme with the given name, or, for None, the first one that recognises the unwrapped tensors.

    Raises NpgptError if there is none.
    """
    for scheme in SCHEMES:
        if scheme.name == name or (name is None and scheme.recognises(tensors)):
            return scheme
    if name is not None:
        known = ", ".join(scheme.name for scheme in SCHEMES)
        like = nearest(name, (scheme.name for scheme in SCHEMES))
        raise NpgptError(f"unknown naming scheme {name!r:.80}{like}: give one of {known}")
    names = ", ".join([*[tensor.name for tensor in tensors.values()][:3], "…"]) if tensors else "no tensors"
    known = ", ".join(scheme.title for scheme in SCHEMES)
    raise NpgptError(f"{source} is not a GPT-2 that npgpt knows: it has {names:.300}, but npgpt knows {known}")
