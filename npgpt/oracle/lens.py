"""TransformerLens's default processing of a model, recognised by what it leaves in the numbers.

Weights that write to the stream have their mean over the channels taken away, the output head its mean over the ids,
value biases are moved into the output's bias, gain and bias of a LayerNorm into what follows it. The probabilities stay
the same. Here the reference is processed in the same way, so that stages can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..config import Config
from ..parameters import Array
from .naming import HEADS, described
from .textbook import Pass, located, textbook
from .theirs import Case, Taken

# what is in the stream, or enters it
STREAM = ("wte", "wpe", "embedding", "attn.c_proj", "attn.residual", "mlp.c_proj", "")
WRITERS = ("wte.weight", "wpe.weight", "attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias")
VALUES = ("attn.v", "attn.value", "attn.heads", "attn.merged")
NORMS = ("ln_1", "ln_2", "ln_f")
EQUAL = 1e-2  # of a bias' mean square, within which values differ by it
ZERO = 1e-3  # of a root mean square, below which a mean is zero, of channels
ZERO_OUTPUT = 1e-4  # and of ids, which are more


def undone(config: Config, tensors: Mapping[str, Array], taken: Taken) -> tuple[Config, dict[str, Array], Taken]:
    """Return the reference with the processing that theirs has had, theirs with LayerNorms' gains, and notes on it."""
    found, told, cases = dict(tensors), [], taken.cases
    if not taken.hooks:
        return config, found, taken
    theirs, ours = cases[0].theirs, Pass(textbook(config, tensors), cases[0].token_ids)
    kinds = (NORMS, VALUES, STREAM, ("logits",))
    norms, values, stream, logits = ([stage for stage in theirs if located(stage)[1] in kind] for kind in kinds)
    if bare := [stage for stage in norms if _is_bare(stage, theirs[stage], ours)]:
        told.append("LayerNorms without their gain and bias, which were put in")
        cases = [
            replace(case, theirs={**case.theirs, **{s: _with_gain(s, case.theirs[s], tensors) for s in bare}})
            for case in cases
        ]
    head = tensors["wte.weight" if config.tie_word_embeddings else "lm_head.weight"]
    centred = _is_processed(stream, cases, tensors["wte.weight"], ZERO)
    if values and _has_no_bias(values[0], theirs[values[0]], ours, centred):  # the first, on which fewest mistakes tell
        told.append("value biases moved into attn.c_proj's")
        _fold_values(config, found)
    if centred:
        told.append("the stream without its mean over the channels")
        writers = [name for name in found if located(name)[1] in WRITERS]
        found |= {name: found[name] - found[name].mean(axis=-1, keepdims=True) for name in writers}
        found["lm_head.weight"] = head
    if _is_processed(logits, cases, head.T, ZERO_OUTPUT):
        told.append("logits without their mean over the ids")
        found["lm_head.weight"] = head - head.mean(axis=0)
    if not told:
        return config, found, taken
    note = f"Theirs is processed, as by TransformerLens ({'; '.join(told)}): the reference was processed likewise."
    untied = replace(config, tie_word_embeddings="lm_head.weight" not in found)
    return untied, found, replace(taken, cases=cases, notes=[*taken.notes, note])


def _size(array: Array) -> float:
    return float(np.square(array).mean())


def _is_zero(array: Array, limit: float) -> bool:
    """Whether the mean over the last axis is zero everywhere, against the numbers themselves."""
    return _size(array.mean(axis=-1)) <= limit**2 * _size(array)


def _is_processed(stages: Sequence[str], cases: Sequence[Case], weight: Array, limit: float) -> bool:
    """Whether there are such stages, all with a mean of zero, and ours have another: the weight has."""
    zero = [_is_zero(case.theirs[stage], limit) for case in cases for stage in stages]
    return bool(zero) and all(zero) and not _is_zero(weight, limit)


def _with_gain(stage: str, array: Array, tensors: Mapping[str, Array]) -> Array:
    return array * tensors[f"{stage}.weight"] + tensors[f"{stage}.bias"]


def _is_bare(stage: str, theirs: Array, ours: Pass) -> bool:
    """Whether a LayerNorm has a mean of zero, and is nearer to ours with its gain and bias put in than as it is."""
    whole = _with_gain(stage, theirs, ours.book.tensors)
    return _is_zero(theirs, ZERO) and _size(whole - ours[stage]) < _size(theirs - ours[stage])


def _has_no_bias(stage: str, theirs: Array, ours: Pass, roughly: bool) -> bool:
    """Whether values are ours without the value bias; roughly: whether they are nearer to that than to ours with it."""
    bias = np.split(ours.book.tensors[f"h.{located(stage)[0]}.attn.c_attn.bias"], 3)[2]
    if described(stage).shape == HEADS:
        bias = bias.reshape(ours.book.config.n_head, 1, -1)
    gap = theirs - ours[stage]
    return _size(gap + bias) < (_size(gap) if roughly else EQUAL * _size(bias))


def _fold_values(config: Config, tensors: dict[str, Array]) -> None:
    for layer in range(config.n_layer):
        own, out = f"h.{layer}.attn.c_attn.bias", f"h.{layer}.attn.c_proj"
        *kept, moved = np.split(tensors[own], 3)
        tensors[own] = np.concatenate([*kept, np.zeros_like(moved)])
        tensors[f"{out}.bias"] = tensors[f"{out}.bias"] + moved @ tensors[f"{out}.weight"]
