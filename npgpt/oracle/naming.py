"""The stages of a run: one table of their shapes and of their names in other programs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from ..config import Config
from ..errors import NpgptError
from .backward import is_parameter
from .textbook import COMPARED, located, stages


class Stage(NamedTuple):
    """The shape of a stage in letters, as in docs/checking.md, and its TransformerLens hook."""

    shape: str
    hook: str = ""


HEADS, HOOKED = "B H T D", "B T H D"  # TransformerLens puts the heads after the tokens
STAGES = {  # in a block, h.N. precedes the name and blocks.N. the hook
    "wte": Stage("B T C", "hook_embed"),
    "wpe": Stage("1 T C", "hook_pos_embed"),
    "embedding": Stage("B T C"),
    "ln_1": Stage("B T C", "ln1.hook_normalized"),
    "attn.c_attn": Stage("B T 3C"),
    "attn.query": Stage("B T C"),
    "attn.key": Stage("B T C"),
    "attn.value": Stage("B T C"),
    "attn.q": Stage(HEADS, "attn.hook_q"),
    "attn.k": Stage(HEADS, "attn.hook_k"),
    "attn.v": Stage(HEADS, "attn.hook_v"),
    "attn.scores": Stage("B H T T", "attn.hook_attn_scores"),
    "attn.weights": Stage("B H T T", "attn.hook_pattern"),
    "attn.heads": Stage(HEADS, "attn.hook_z"),
    "attn.merged": Stage("B T C"),
    "attn.c_proj": Stage("B T C", "hook_attn_out"),
    "attn.residual": Stage("B T C", "hook_resid_mid"),
    "ln_2": Stage("B T C", "ln2.hook_normalized"),
    "mlp.c_fc": Stage("B T F", "mlp.hook_pre"),
    "mlp.act": Stage("B T F", "mlp.hook_post"),
    "mlp.c_proj": Stage("B T C", "hook_mlp_out"),
    "": Stage("B T C", "hook_resid_post"),  # the block's output
    "ln_f": Stage("B T C", "ln_final.hook_normalized"),
    "logits": Stage("B T V"),
    "log_probabilities": Stage("B T V"),
}
SAME = {"attn.q": "attn.query", "attn.k": "attn.key", "attn.v": "attn.value", "attn.heads": "attn.merged"}  # merged
SPLIT = {merged: heads for heads, merged in SAME.items()}
LOG_PROBABILITIES = ("log_probs", "logprobs", "log_softmax")
STACKED = ("hidden_states", "attentions")  # an array or a tuple of all layers
CALL = "__call__"
AROUND = {"transformer", "intermediates", CALL}  # parts of flax's paths that do not name a stage


def described(stage: str) -> Stage:
    """Return the row of a stage, or of that whose gradient it is."""
    return STAGES[located(stage)[1].removeprefix("d.")]


@cache
def names(n_layer: int) -> dict[str, str]:
    """Return npgpt's name by every name of a stage: its own, Hugging Face's hidden_states.N (the last is after ln_f)
    and attentions.N, and TransformerLens's hooks.
    """
    found = {stage: stage for stage in stages(n_layer)} | dict.fromkeys(LOG_PROBABILITIES, "log_probabilities")
    for stage in stages(n_layer):
        if hook := described(stage).hook:
            layer = located(stage)[0]
            found[hook if layer is None else f"blocks.{layer}.{hook}"] = stage
    stream = ["embedding", *(f"h.{layer}" for layer in range(n_layer - 1))]  # the input of each block
    for mark in "._":
        found |= {f"hidden_states{mark}{number}": stage for number, stage in enumerate([*stream, "ln_f"])}
        found |= {f"attentions{mark}{layer}": f"h.{layer}.attn.weights" for layer in range(n_layer)}
    return found | {f"blocks.{layer}.hook_resid_pre": stream[layer] for layer in range(n_layer)}


def is_hook(name: str) -> bool:
    """Return whether a name is one of TransformerLens's."""
    return "hook_" in name


def is_known(name: str, config: Config) -> bool:
    """Return whether this is a stage, the loss or a gradient, even if this model lacks the block."""
    known = names(config.n_layer)
    likely = re.sub(r"\d+", "0", name, count=1)
    if name == "loss" or is_parameter(likely, config):
        return True
    if name.startswith("d."):  # of log-probabilities, nothing takes a gradient
        return known.get(name[2:], known.get(likely[2:])) not in (None, "log_probabilities")
    return name in known or likely in known


def canonical(name: str, config: Config) -> tuple[str, bool]:
    """Return npgpt's name of a stage, and whether its heads come after the tokens, [B, T, H, D].

    Raises NpgptError for an unknown name.
    """
    known = names(config.n_layer)
    if name == "loss" or is_parameter(name, config):
        return name, False
    mark = "d." if name.startswith("d.") else ""
    if name.removeprefix(mark) in known and is_known(name, config):
        stage = known[name.removeprefix(mark)]
        return mark + stage, is_hook(name) and described(stage).shape == HEADS
    if is_known(name, config):
        blocks = f"the model has {config.n_layer} blocks"
        if not name.removeprefix("d.").startswith("h."):
            raise NpgptError(f"{name}: {blocks}")
        raise NpgptError(f"there is no stage {name}: {blocks}, h.0 to h.{config.n_layer - 1}")
    raise NpgptError(
        f"{name!r:.80} is not a stage that npgpt knows; known are wte, wpe, embedding, h.N, "
        f"{', '.join('h.N.' + local for local in COMPARED if local)}, ln_f, logits, log_probabilities; hidden_states.N "
        "and attentions.N; and the hooks of TransformerLens; loss; and d.NAME, the gradient of a stage or parameter"
    )


def flat(theirs: Mapping[Any, Any]) -> dict[str, Any]:
    """Flatten nested names, as in flax's intermediates, and split a stack of layers into its layers."""
    found: dict[str, Any] = {}
    for key, value in theirs.items():
        parts = str(key).replace("/", ".").split(".")
        name = ".".join(part for part in parts if part not in AROUND)
        while CALL in parts and isinstance(value, tuple) and value:
            value = value[0]  # the first call, and the first of its outputs
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}".strip("."): array for inner, array in flat(value).items()}
        elif name in STACKED and hasattr(value, "shape"):  # [n_layer + 1, …], as torch.stack makes it
            found |= {f"{name}.{number}": array for number, array in enumerate(value)}
        else:
            found[name] = value
    return found


def shape_of(letters: str, config: Config, ids: tuple[int, int]) -> tuple[int, ...]:
    """Return a shape given in letters as numbers, for ids [B, T]."""
    sizes = {"B": ids[0], "T": ids[1], "1": 1, "C": config.n_embd, "3C": 3 * config.n_embd, "F": config.inner_width}
    sizes |= {"H": config.n_head, "D": config.head_width, "V": config.vocab_size}
    return tuple(sizes[letter] for letter in letters.split())
