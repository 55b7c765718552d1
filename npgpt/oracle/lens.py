"""TransformerLens's default processing of a model, recognised by what it leaves in the numbers.

Weights that write to the stream have their mean over the channels taken away, the output head its mean over the ids,
value biases are moved into the output's bias, gain and bias of a LayerNorm into what follows it. The probabilities stay
the same. Here the reference is processed in the same way, so that stages can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from ..config import Config
from ..parameters import Array
from .naming import HEADS, described
from .textbook import Pass, located, textbook
from .theirs import Case, Taken

# what is in the stream, or enters it
STREAM = ("wte", "wpe", "embedding", "attn.c_proj", "attn.residual", "mlp.c_proj", "")
WRITERS = ("wte.weight", "wpe.weight")
BLOCK_WRITERS = ("attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias")
VALUES = ("attn.v", "attn.value", "attn.heads", "attn.merged")
NORMS = ("ln_1", "ln_2", "ln_f")
EQUAL = 1e-2  # of a bias' mean square, within which values differ by it
ZERO = 1e-3  # of a root mean square, below which a mean is zero, of channels
ZERO_OUTPUT = 1e-4  # and of ids, which are more


def undone(config: Config, tensors: Mapping[str, Array], taken: Taken) -> tuple[Config, dict[str, Array], Taken]:
    """Return the reference with the processing that theirs has had, theirs with LayerNorms' gains, and notes on it."""
    found, told, given = dict(tensors), [], taken.cases
    if not taken.hooks:
        return config, found, taken
    ours = Pass(textbook(config, tensors), given[0].token_ids)
    if bare := [stage for stage in _given(given[:1], NORMS) if _is_bare(stage, given[0].theirs[stage], ours)]:
        told.append("LayerNorms without their gain and bias, which were put in")
        given = [_with_gains(case, bare, tensors) for case in given]
    values = next(_given(given[:1], VALUES), None)  # the first, on which the fewest mistakes tell
    centred = _is_processed(STREAM, given, tensors["wte.weight"], ZERO)
    if values is not None and _has_no_bias(values, given[0].theirs[values], ours, centred):
        told.append("value biases moved into attn.c_proj's")
        _fold_values(config, found)
    head = tensors["wte.weight" if config.tie_word_embeddings else "lm_head.weight"]
    if centred:
        told.append("the stream without its mean over the channels")
        found["lm_head.weight"] = head
        writers = [f"h.{layer}.{name}" for layer in range(config.n_layer) for name in BLOCK_WRITERS]
        found |= {name: found[name] - found[name].mean(axis=-1, keepdims=True) for name in (*WRITERS, *writers)}
    if _is_processed(("logits",), given, head.T, ZERO_OUTPUT):
        told.append("logits without their mean over the ids")
        found["lm_head.weight"] = head - head.mean(axis=0)
    if not told:
        return config, found, taken
    note = f"Theirs is processed, as by TransformerLens ({'; '.join(told)}): the reference was processed likewise."
    untied = replace(config, tie_word_embeddings="lm_head.weight" not in found)
    return untied, found, replace(taken, cases=given, notes=[*taken.notes, note])


def _given(cases: list[Case], locals_: tuple[str, ...]) -> Iterator[str]:
    """The stages of these names within their block that theirs has."""
    names = dict.fromkeys(stage for case in cases for stage in case.theirs)
    return (stage for stage in names if located(stage)[1] in locals_)


def _is_zero(array: Array, limit: float) -> bool:
    """Whether the mean over the last axis is zero everywhere, against the numbers themselves."""
    return _size(array.mean(axis=-1)) <= limit**2 * _size(array)


def _is_processed(names: tuple[str, ...], cases: list[Case], weight: Array, limit: float) -> bool:
    """Whether stages of these names are given, all with a mean of zero, and ours have another: the weight has."""
    arrays = [case.theirs[stage] for case in cases for stage in _given([case], names)]
    return bool(arrays) and all(_is_zero(array, limit) for array in arrays) and not _is_zero(weight, limit)


def _is_bare(stage: str, theirs: Array, ours: Pass) -> bool:
    """Whether a LayerNorm has a mean of zero, and is nearer to ours with its gain and bias put in than as it is."""
    gain, bias = (ours.book.tensors[f"{stage}.{kind}"] for kind in ("weight", "bias"))
    return _is_zero(theirs, ZERO) and _size(theirs * gain + bias - ours[stage]) < _size(theirs - ours[stage])


def _has_no_bias(stage: str, theirs: Array, ours: Pass, roughly: bool) -> bool:
    """Whether values are ours without the value bias; roughly: whether they are nearer to that than to ours with it."""
    bias = np.split(ours.book.tensors[f"h.{located(stage)[0]}.attn.c_attn.bias"], 3)[2]
    if described(stage).shape == HEADS:
        bias = bias.reshape(ours.book.config.n_head, 1, -1)
    gap = theirs - ours[stage]
    return _size(gap + bias) < (_size(gap) if roughly else EQUAL * _size(bias))


def _size(array: Array) -> float:
    return float(np.square(array).mean())


def _with_gains(case: Case, stages: list[str], tensors: Mapping[str, Array]) -> Case:
    with_gains = {
        stage: case.theirs[stage] * tensors[f"{stage}.weight"] + tensors[f"{stage}.bias"]
        for stage in stages
        if stage in case.theirs
    }
    return replace(case, theirs={**case.theirs, **with_gains})


def _fold_values(config: Config, tensors: dict[str, Array]) -> None:
    C = config.n_embd
    for layer in range(config.n_layer):
        attn = f"h.{layer}.attn"
        bias = tensors[f"{attn}.c_attn.bias"].copy()
        moved = bias[2 * C :] @ tensors[f"{attn}.c_proj.weight"]
        bias[2 * C :] = 0
        tensors |= {f"{attn}.c_attn.bias": bias, f"{attn}.c_proj.bias": tensors[f"{attn}.c_proj.bias"] + moved}
