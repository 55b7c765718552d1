"""Naming schemes: what each program calls the tensors of GPT-2.

A new scheme is a Scheme in SCHEMES; CONTRIBUTING.md has an example. Its table maps their layers to ours, with `*` for
the block's number. Queries, keys and values that are separate layers are "h.*.attn.query", "h.*.attn.key" and
"h.*.attn.value". A layer with `*` in our name only is a stack over all blocks. The same tables serve files, state dicts
and single parts of a module.
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

BLOCK = re.compile(r"(?<=[.h])\d+(?=[./]|\Z)")  # a block's number: h.3.ln_1, model/h3/ln_1
THIRDS = ("query", "key", "value")  # of c_attn, side by side


@dataclass(frozen=True)
class Scheme:
    """One program's names for GPT-2's layers, and how its checkpoints are recognised and read."""

    name: str
    title: str
    layers: Mapping[str, str]  # {their layer: ours}
    ends: Mapping[str, str] = field(default_factory=lambda: {".weight": ".weight", ".bias": ".bias"})
    dropped: str = r"(?!)"  # a pattern for whole names: buffers, an optimizer's state
    out_in: bool = False  # matrices are stored [out, in], as torch.nn.Linear has them
    leading_1: bool = False  # matrices are stored [1, in, out], as a convolution of width 1
    may_lack_biases: str = r"(?!)"  # a pattern for our layers: zeros where a checkpoint has none of these biases
    known_by: str = "h.*.attn.c_attn.weight"  # the tensor of ours that tells the scheme, together with condition
    condition: Callable[[Mapping[str, Tensor]], bool] = lambda tensors: True
    assumes: Mapping[str, Any] = field(default_factory=dict)  # true of the program's models where nothing is stated
    guesses_gelu: bool = False  # another program's models have the same names and another activation
    ties: bool = False  # a configuration that says nothing of the output head means that it is wte

    @cached_property
    def tensors(self) -> dict[str, tuple[str, int]]:
        """Return {their tensor: (ours, which part of it)}."""
        found: dict[str, tuple[str, int]] = {}
        for layer, ours in self.layers.items():
            module, _, last = ours.rpartition(".")
            whole, part = (f"{module}.c_attn", THIRDS.index(last)) if last in THIRDS else (ours, 0)
            found |= {layer + end: (whole + kind, part) for end, kind in self.ends.items()}
        return found

    def recognises(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether unwrapped tensors have these names."""
        known = {theirs for theirs, (ours, _) in self.tensors.items() if ours == self.known_by}
        return any(_starred(name)[0] in known for name in tensors) and self.condition(tensors)

    def translate(self, tensors: Mapping[str, Tensor]) -> dict[str, Source]:
        """Return {canonical name: source} of unwrapped tensors, without what is dropped.

        A name that the scheme does not know, or a second name for the same tensor, stays as it is: loading reports it.
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
                layers = range(min(tensor.shape[0], MOST_LAYERS + 1))  # Config refuses the last
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
    """Return the name with `*` for its block's number, and that number, empty where there is none."""
    match = BLOCK.search(name)
    return (f"{name[: match.start()]}*{name[match.end() :]}", match[0]) if match else (name, "")


def _linear_is_out_in(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the first c_attn is [3C, C]."""
    shapes = (tensor.shape for name, tensor in tensors.items() if _starred(name)[0] == "h.*.attn.c_attn.weight")
    shape = next(shapes, ())
    return len(shape) == 2 and shape[0] == 3 * shape[1] > 0


def _is_mingpt(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether there are biases and an output head that differs from wte: nothing else tells minGPT."""
    head, wte = tensors.get("lm_head.weight"), tensors.get("wte.weight")
    if head is None or wte is None or "ln_f.bias" not in tensors:
        return False
    return _linear_is_out_in(tensors) and not same_bits(head, wte)


LAYERS = "wte wpe h.*.ln_1 h.*.attn.c_attn h.*.attn.c_proj h.*.ln_2 h.*.mlp.c_fc h.*.mlp.c_proj ln_f lm_head".split()


def _in_order(theirs: str, ours: Sequence[str] = LAYERS) -> dict[str, str]:
    """Return {their layer: ours} of a program's names, which are in the same order as ours."""
    return dict(zip(theirs.split(), ours, strict=True))


# The canonical names. A saved GPT2LMHeadModel has a prefix too and, for a time, had two buffers.
HUGGING_FACE = Scheme(
    "huggingface",
    "Hugging Face's names",
    layers={layer: layer for layer in LAYERS} | {"lm_head.decoder": "lm_head"},
    dropped=r"h\.\d+\.attn\.(?:bias|masked_bias)",
    ties=True,
)
# karpathy/nanoGPT, model.py: the exact (erf) GELU, no biases by default, an output head that shares wte's storage.
# karpathy/build-nanogpt has the same names, biases and the tanh form.
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
# karpathy/minGPT, mingpt/model.py: the tanh form, biases, an output head of its own.
MINGPT = replace(
    NANOGPT, name="mingpt", title="minGPT's names", condition=_is_mingpt, assumes={"activation_function": "gelu_new"}
)
# rasbt/LLMs-from-scratch, ch04: GPTModel, its variant with a KV cache, and GPTModelFast (qkv, proj, PyTorch's own
# LayerNorm). Biases of queries, keys and values only with qkv_bias; an output head of its own.
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
# openai/gpt-2, src/model.py. A training run keeps more: slots and step counters, the graph of objects.
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
# karpathy/llm.c, train_gpt2.c, ParameterTensors: 16 arrays, those of blocks stacked; no output head
LLM_C = Scheme(
    "llm.c",
    "llm.c's names",
    layers=_in_order("wte wpe ln1 qkv attproj ln2 fc fcproj lnf", LAYERS[:-1]),
    ends={"": ".weight", "w": ".weight", "b": ".bias"},
    out_in=True,
)
# in the order in which they are tried: minGPT's names are nanoGPT's too, and both are Hugging Face's
SCHEMES = (MINGPT, NANOGPT, HUGGING_FACE, LLMS_FROM_SCRATCH, OPENAI, LLAMA_CPP, LLM_C)


def choose(name: str | None, tensors: Mapping[str, Tensor], source: str) -> Scheme:
    """Return the scheme of that name, or, for None, the first one that recognises the unwrapped tensors.

    Raises NpgptError where there is none.
    """
    for scheme in SCHEMES:
        if scheme.name == name or (name is None and scheme.recognises(tensors)):
            return scheme
    if name is not None:
        known = ", ".join(scheme.name for scheme in SCHEMES)
        like = nearest(name, (scheme.name for scheme in SCHEMES))
        raise NpgptError(f"there is no naming scheme {name!r:.80}{like}; there are {known}")
    names = ", ".join([tensor.name for tensor in tensors.values()][:3]) or "no tensors at all"
    known = ", ".join(scheme.title for scheme in SCHEMES)
    raise NpgptError(f"{source} is no GPT-2 that npgpt knows: it has {names:.300}, …, and known are {known}")
