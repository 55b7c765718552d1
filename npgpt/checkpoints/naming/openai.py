"""OpenAI's TensorFlow names (openai/gpt-2, src/model.py), as tf.train.Saver and tf.train.Checkpoint write them."""

from __future__ import annotations

from collections.abc import Mapping

from ..tensor import Tensor
from .scheme import Rule, Scheme, Source, translated

OBJECT = r"(?:/\.ATTRIBUTES/VARIABLE_VALUE)?"  # what tf.train.Checkpoint adds
# what a training run keeps beside the weights: the optimizer's slots and step counters, the graph of objects
LUMBER = r"(?s)(?!model/).*|.*/(?:Adam|Adam_1|Adafactor|Momentum|\.OPTIMIZER_SLOT/.*)"
RULES = [
    Rule(LUMBER, None),
    Rule(rf"model/(wte|wpe){OBJECT}", r"\1.weight"),
    Rule(rf"model/ln_f/g{OBJECT}", "ln_f.weight"),
    Rule(rf"model/ln_f/b{OBJECT}", "ln_f.bias"),
    Rule(rf"model/h(\d+)/(ln_[12])/g{OBJECT}", r"h.\1.\2.weight"),
    Rule(rf"model/h(\d+)/(ln_[12])/b{OBJECT}", r"h.\1.\2.bias"),
    # a convolution of width 1: [1, in, out]
    Rule(rf"model/h(\d+)/(attn|mlp)/(c_attn|c_proj|c_fc)/w{OBJECT}", r"h.\1.\2.\3.weight", entry=0),
    Rule(rf"model/h(\d+)/(attn|mlp)/(c_attn|c_proj|c_fc)/b{OBJECT}", r"h.\1.\2.\3.bias"),
]


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether there is a model/wte."""
    return any(name == "model/wte" or name.startswith("model/wte/.ATTRIBUTES/") for name in tensors)


def translate(tensors: Mapping[str, Tensor]) -> dict[str, Source]:
    """By the rules; a matrix without the leading 1 is taken too."""
    sources = translated(tensors, RULES)
    for name, source in sources.items():
        if source.entry is not None and tensors[source.parts[0]].shape[:-2] != (1,):
            sources[name] = source._replace(entry=None)
    return sources


SCHEME = Scheme("openai", "OpenAI's TensorFlow names", recognises, translate)
