"""What another implementation gave, under npgpt's stage names and in npgpt's shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..config import Config
from ..errors import NpgptError
from ..parameters import Array
from .textbook import COMPARED, located, stages

OUTPUTS = ("logits", "log_probabilities")
HEADS_LAST = {"attn.q": "hook_q", "attn.k": "hook_k", "attn.v": "hook_v", "attn.heads": "hook_z"}  # [B, T, H, D] there
TRANSFORMER_LENS = {
    "attn.hook_attn_scores": "attn.scores",
    "attn.hook_pattern": "attn.weights",
    "hook_attn_out": "attn.c_proj",
    "hook_resid_mid": "attn.residual",
    "mlp.hook_pre": "mlp.c_fc",
    "mlp.hook_post": "mlp.act",
    "hook_mlp_out": "mlp.c_proj",
    "hook_resid_post": "",
} | {f"attn.{theirs}": ours for ours, theirs in HEADS_LAST.items()}
OTHERS = {"log_probs": "log_probabilities", "logprobs": "log_probabilities", "log_softmax": "log_probabilities"}
OTHERS |= {"hook_embed": "wte", "hook_pos_embed": "wpe"}


@dataclass(frozen=True)
class Case:
    """Rows of one length, run together: ids [B, T], their stages in their own order, each [B, …], and how they were
    run: chunks of tokens with a cache, where that is known; padding, tokens on the left that are not here; given,
    stages that both were handed, as a part's input is.
    """

    token_ids: NDArray[np.integer[Any]]
    theirs: Mapping[str, Array]
    chunks: tuple[int, ...] = ()
    padding: int = 0
    given: Mapping[str, Array] = field(default_factory=dict)

    def seen(self, stage: str, array: Array) -> Array:
        """A stage [B, T, …] on the positions that theirs has: all of them, or of an output the last alone."""
        last = stage in OUTPUTS and stage in self.theirs and self.theirs[stage].shape[1] == 1
        return array[:, -1:] if last else array


@cache
def names(n_layer: int) -> dict[str, str]:
    """Every name that a stage goes by, and npgpt's: npgpt's own, Hugging Face's hidden_states.N (the last one is after
    ln_f) and attentions.N, TransformerLens's hooks.
    """
    found = {stage: stage for stage in stages(n_layer)} | OTHERS
    stream = ["embedding", *(f"h.{layer}" for layer in range(n_layer))]
    for mark in "._":
        found |= {f"hidden_states{mark}{number}": stage for number, stage in enumerate([*stream[:-1], "ln_f"])}
        found |= {f"attentions{mark}{layer}": f"h.{layer}.attn.weights" for layer in range(n_layer)}
    for layer in range(n_layer):
        found[f"blocks.{layer}.hook_resid_pre"] = stream[layer]
        for hook, local in TRANSFORMER_LENS.items():
            found[f"blocks.{layer}.{hook}"] = f"h.{layer}.{local}".rstrip(".")
    return found


def canonical(name: str, config: Config) -> tuple[str, bool]:
    """npgpt's name of a stage, and whether its heads stand behind the tokens, [B, T, H, D].

    Raises NpgptError for a name that the table has not.
    """
    known = names(config.n_layer)
    if name in known:
        stage = known[name]
        return stage, name.startswith("blocks.") and located(stage)[1] in HEADS_LAST
    if re.sub(r"\d+", "0", name, count=1) in known:
        if not name.startswith("h."):
            raise NpgptError(f"{name}: the model has {config.n_layer} blocks")
        raise NpgptError(
            f"there is no stage {name}: the model has {config.n_layer} blocks, h.0 to h.{config.n_layer - 1}"
        )
    raise NpgptError(
        f"{name!r:.80} is no stage that npgpt knows; there are wte, wpe, embedding, h.N, "
        f"{', '.join('h.N.' + local for local in COMPARED if local)}, ln_f, logits, log_probabilities; hidden_states.N "
        "and attentions.N; and TransformerLens's hooks"
    )


def cases(
    arrays: Mapping[str, ArrayLike],
    config: Config,
    token_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    chunks: Sequence[int] = (),
) -> list[Case]:
    """Their arrays checked, named and shaped. Padded positions, on either side, are left out.

    Raises NpgptError for a name or a shape that cannot be, for ids that do not fit, and where nothing is to compare.
    """
    ids = config.token_rows(token_ids)
    if not arrays:
        raise NpgptError("there is nothing to compare: no logits and no stage")
    if chunks and sum(chunks) != ids.shape[1]:
        raise NpgptError(f"chunks {list(chunks)} are {sum(chunks)} tokens, and there are {ids.shape[1]}")
    theirs: dict[str, Array] = {}
    for name, array in arrays.items():
        stage, heads_last = canonical(name, config)
        if stage in theirs:
            raise NpgptError(f"{name} is {stage}, which is given twice")
        theirs[stage] = shaped(stage, name, array, config, ids.shape, heads_last)
    if attention_mask is None:
        return [Case(ids, theirs, tuple(chunks))]
    mask = np.atleast_2d(np.asarray(attention_mask))
    if mask.shape != ids.shape or not np.isin(mask, (0, 1)).all():
        raise NpgptError(f"attention_mask must be 0 or 1 for each of the ids {list(ids.shape)}, not {list(mask.shape)}")
    if mask.all():
        return [Case(ids, theirs, tuple(chunks))]
    found = []
    for row, judged in enumerate(mask.astype(bool)):
        places = np.flatnonzero(judged)
        if not len(places) or places[-1] - places[0] + 1 != len(places):
            raise NpgptError(f"attention_mask of row {row} must be one run of ones, with padding on one side")
        begin, end = int(places[0]), int(places[-1]) + 1
        found.append(Case(ids[row : row + 1, begin:end], _cut(theirs, row, begin, end, ids.shape[1]), (), begin))
    return found


def _cut(theirs: Mapping[str, Array], row: int, begin: int, end: int, tokens: int) -> dict[str, Array]:
    """One row's stages without its padding."""
    found = {}
    for stage, array in theirs.items():
        _, local = located(stage)
        part = array[row : row + 1] if stage != "wpe" or len(array) > 1 else array
        if local in ("attn.scores", "attn.weights"):
            part = part[:, :, begin:end, begin:end]
        elif local in HEADS_LAST:
            part = part[:, :, begin:end]
        elif part.shape[1] == tokens:
            part = part[:, begin:end]
        elif end != tokens:
            continue  # the last position of a row that is padded on the right
        found[stage] = part
    return found


def shaped(
    stage: str, name: str, array: ArrayLike, config: Config, ids: tuple[int, int], heads_last: bool = False
) -> Array:
    """A stage as [B, …] in float64, with the padding of a vocabulary cut off. Raises NpgptError where it cannot be one.

    Of outputs the last position alone may be there, or one more or one less than there are ids.
    """
    found = np.asarray(array)
    if found.dtype.kind not in "fiu":
        raise NpgptError(f"{name} must be numbers, not {found.dtype}")
    found = found.astype(np.float64)
    (B, T), H, C, F, V = ids, config.n_head, config.n_embd, config.inner_width, config.vocab_size
    _, local = located(stage)
    widths = {"attn.c_attn": 3 * C, "mlp.c_fc": F, "mlp.act": F, "logits": V, "log_probabilities": V}
    expected: tuple[int, ...] = (B, T, widths.get(local, C))
    if local in ("attn.scores", "attn.weights"):
        expected = (B, H, T, T)
    elif local in HEADS_LAST:
        expected = (B, T, H, config.head_width) if heads_last else (B, H, T, config.head_width)
    if stage in OUTPUTS:
        if found.ndim == 1:
            found = found[None]
        if found.ndim == 2:
            found = found[None] if B == 1 else found[:, None]
        if stage == "logits" and found.ndim == 3 and V <= found.shape[2] <= V + 1024:
            found = found[..., :V]  # padded to a multiple
        fits = found.ndim == 3 and (found.shape[0], found.shape[2]) == (B, V)
        if fits and found.shape[1] not in (1, T - 1, T, T + 1):
            raise NpgptError(
                f"{name} has {found.shape[1]} positions, and there are {T} ids: they do not belong together"
            )
    else:
        if found.ndim == len(expected) - 1 and (B == 1 or stage == "wpe"):
            found = found[None]
        fits = found.shape == expected or (stage == "wpe" and found.shape == (1, *expected[1:]))
    if not fits:
        raise NpgptError(f"{name} is {list(np.shape(array))}; for these ids and this model it is {list(expected)}")
    return found.transpose(0, 2, 1, 3) if heads_last else found
