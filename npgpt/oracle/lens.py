"""Recognise TransformerLens's default processing of a model by its traces in the numbers.

TransformerLens subtracts the mean over the channels from weights that write to the residual stream, and the mean over
the ids from the output head. It folds value biases into the bias of attn.c_proj, and the gain and bias of a LayerNorm
into the next layer. The probabilities do not change. The reference is processed in the same way, so stages compare.
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

# stages in the residual stream, or added to it
STREAM = ("wte", "wpe", "embedding", "attn.c_proj", "attn.residual", "mlp.c_proj", "")
WRITERS = ("wte.weight", "wpe.weight", "attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias")
VALUES = ("attn.v", "attn.value", "attn.heads", "attn.merged")
NORMS = ("ln_1", "ln_2", "ln_f")
EQUAL = 1e-2  # share of a bias' mean square within which values count as without it
ZERO = 1e-3  # share of a root mean square below which a mean over channels is zero
ZERO_OUTPUT = 1e-4  # the same for a mean over ids, which are more


def undone(config: Config, tensors: Mapping[str, Array], taken: Taken) -> tuple[Config, dict[str, Array], Taken]:
    """Return the reference processed as theirs was, and theirs with the gains of LayerNorms restored and a note."""
    found, told, cases = dict(tensors), [], taken.cases
    if not taken.hooks:
        return config, found, taken
    theirs, ours = cases[0].theirs, Pass(textbook(config, tensors), cases[0].token_ids)
    kinds = (NORMS, VALUES, STREAM, ("logits",))
    norms, values, stream, logits = ([stage for stage in theirs if located(stage)[1] in kind] for kind in kinds)
    if bare := [stage for stage in norms if _is_bare(stage, theirs[stage], ours)]:
        told.append("LayerNorms without gain and bias, which were added")
        cases = [
            replace(case, theirs={**case.theirs, **{s: _with_gain(s, case.theirs[s], tensors) for s in bare}})
            for case in cases
        ]
    head = tensors["wte.weight" if config.tie_word_embeddings else "lm_head.weight"]
    centred = _is_processed(stream, cases, tensors["wte.weight"], ZERO)
    if values and _has_no_bias(values[0], theirs[values[0]], ours, centred):  # the first: fewest mistakes affect it
        told.append("value biases folded into the bias of attn.c_proj")
        _fold_values(config, found)
    if centred:
        told.append("the residual stream without its mean over the channels")
        writers = [name for name in found if located(name)[1] in WRITERS]
        found |= {name: found[name] - found[name].mean(axis=-1, keepdims=True) for name in writers}
        found["lm_head.weight"] = head
    if _is_processed(logits, cases, head.T, ZERO_OUTPUT):
        told.append("logits without their mean over the ids")
        found["lm_head.weight"] = head - head.mean(axis=0)
    if not told:
        return config, found, taken
    note = f"Theirs was processed as by TransformerLens ({'; '.join(told)}): the reference was processed likewise."
    untied = replace(config, tie_word_embeddings="lm_head.weight" not in found)
    return untied, found, replace(taken, cases=cases, notes=[*taken.notes, note])


def _size(array: Array) -> float:
    return float(np.square(array).mean())


def _is_zero(array: Array, limit: float) -> bool:
    """Return whether the mean over the last axis is zero everywhere, relative to the numbers."""
    return _size(array.mean(axis=-1)) <= limit**2 * _size(array)


def _is_processed(stages: Sequence[str], cases: Sequence[Case], weight: Array, limit: float) -> bool:
    """Return whether all these stages (at least one) have a mean of zero, but the weight, and so ours, does not."""
    zero = [_is_zero(case.theirs[stage], limit) for case in cases for stage in stages]
    return bool(zero) and all(zero) and not _is_zero(weight, limit)


def _with_gain(stage: str, array: Array, tensors: Mapping[str, Array]) -> Array:
    return array * tensors[f"{stage}.weight"] + tensors[f"{stage}.bias"]


def _is_bare(stage: str, theirs: Array, ours: Pass) -> bool:
    """Return whether a LayerNorm has a mean of zero, and is nearer to ours once its gain and bias are added."""
    whole = _with_gain(stage, theirs, ours.book.tensors)
    return _is_zero(theirs, ZERO) and _size(whole - ours[stage]) < _size(theirs - ours[stage])


def _has_no_bias(stage: str, theirs: Array, ours: Pass, roughly: bool) -> bool:
    """Return whether values lack the value bias. roughly: whether they are nearer to ours without it than with it."""
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
