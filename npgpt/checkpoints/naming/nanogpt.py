"""nanoGPT's and minGPT's names: Hugging Face's, with linear layers stored [out, in] as torch.nn.Linear has them.

karpathy/nanoGPT, model.py: the exact (erf) GELU, no biases by default, an output head that shares wte's storage.
karpathy/minGPT, mingpt/model.py: the tanh form, biases, an output head of its own. Nothing else tells the two apart.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..tensor import Tensor, same_bits
from .huggingface import C_ATTN, RULES
from .scheme import Rule, Scheme, Source, translated, with_absent_biases

LINEAR = Rule(r"(?:transformer\.)?(h\.\d+\.(?:attn|mlp)\.c_(?:attn|proj|fc)\.weight)", r"\1", transposed=True)


def translate(tensors: Mapping[str, Tensor]) -> dict[str, Source]:
    """The names without their prefix, linear layers transposed, and zeros where a checkpoint has no bias at all."""
    return with_absent_biases(translated(tensors, [LINEAR, *RULES]), r"(h\.\d+|ln_f)\..*bias")


def _out_in(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the first c_attn is [3C, C]."""
    shape = next((tensor.shape for name, tensor in tensors.items() if C_ATTN.fullmatch(name)), ())
    return len(shape) == 2 and shape[0] == 3 * shape[1] > 0


def recognises_mingpt(tensors: Mapping[str, Tensor]) -> bool:
    """Whether there are biases and an output head that differs from wte."""
    named = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    head, wte = named.get("lm_head.weight"), named.get("wte.weight")
    if not _out_in(tensors) or "ln_f.bias" not in named or head is None or wte is None:
        return False
    return not same_bits(head, wte)


NANOGPT = Scheme("nanogpt", "nanoGPT's names", _out_in, translate, {"activation_function": "gelu"})
MINGPT = Scheme("mingpt", "minGPT's names", recognises_mingpt, translate)
