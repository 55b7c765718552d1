"""Known mistakes in the loss, the output head and the embeddings of the backward pass. mistakes.py describes rows,
backward.py names and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..parameters import Array
from .arithmetic import once
from .backward import IGNORED, MODEL_BACKWARD, lines, outer, softmax_backward
from .functions import log_softmax, softmax
from .rows import Formulas, Table, rows
from .textbook import Scope

Ids = NDArray[np.integer[Any]]


def shared(share: Callable[[Scope], Any]) -> Formulas:
    """Return the formulas of a loss in which positions have other shares, [B, T]."""
    return {"share": lambda s: np.asarray(share(s) * s["counting"]).astype(s["logits"].dtype)}


def divided(steps: int) -> Formulas:
    """Return the formulas of a loss that is divided by a number of steps."""
    return shared(lambda s: 1 / (steps * max(1, s["counting"].sum())))


def by_row(s: Scope) -> Array:
    """Return each position's share in the mean of the rows' means. Rows without targets are left out."""
    counts = s["counting"].sum(axis=1, keepdims=True)
    return np.asarray(1 / (np.maximum(counts, 1) * (counts > 0).sum()))


def aimed(targets: Callable[[Scope, Ids], Ids]) -> Formulas:
    """Return the formulas of a loss with other targets: targets(scope, the right ones)."""
    return {"targets": lambda s: targets(s, MODEL_BACKWARD["targets"](s))}


def moved(ids: Ids, by: int, rest: int = IGNORED) -> Ids:
    """Return ids [B, T] moved this many positions to the left, or to the right if by < 0."""
    fill = np.full_like(ids[:, : abs(by)], rest)
    return np.concatenate([ids[:, by:], fill] if by > 0 else [fill, ids[:, :by]], axis=1)[:, : ids.shape[1]]


def filled(value: Callable[[Scope], Any]) -> Formulas:
    """Return the formulas of a loss in which ignored targets have this value."""
    return aimed(lambda s, targets: np.where(targets == IGNORED, value(s), targets))


def of_probabilities(s: Scope) -> Array:
    """Return the gradient of logits if the cross-entropy takes their softmax for logits."""
    p = softmax(s["logits"])
    return softmax_backward((softmax(p) - s["aim"]) * s["share"][..., None], p)


def losses(config: Config) -> Table:
    """Return mistakes of the loss and of the targets."""
    end = config.vocab_size - 1 if config.vocab_size != 50304 else 50256  # nanoGPT pads GPT-2's 50257 ids
    return rows(
        "loss summed: the loss is the sum over the targets, not their mean (known from: reduction='sum')",
        shared(lambda s: 1.0),
        "gradients of the summed loss: the loss is a mean, but its gradients are those of the sum "
        "(known from: 1/n forgotten where the backward pass begins)",
        {"d.logits": lambda s: MODEL_BACKWARD["d.logits"](s) * max(1, s["counting"].sum())},
        "gradients of the negated loss: all gradients, of stages too, have the opposite sign "
        "(known from: the target's 1 minus softmax, (-loss).backward())",
        {"d.logits": lambda s: -MODEL_BACKWARD["d.logits"](s)},
        "log-likelihood given as the loss: the loss and all gradients have the opposite sign "
        "(known from: a sign forgotten in −log p)",
        shared(lambda s: -MODEL_BACKWARD["share"](s)),
        "loss averaged over rows alone: the sum over the targets is divided by the number of rows "
        "(known from: reduction='batchmean')",
        shared(lambda s: 1 / len(s["counting"])),
        "loss averaged over positions alone: the sum over the targets is divided by the number of positions of a row "
        "(known from: the size of the wrong axis)",
        shared(lambda s: 1 / s["counting"].shape[1]),
        "loss averaged row by row: the mean of the rows' means, in which a target of a short row weighs more "
        "(known from: a loss for each sequence, gradient accumulation over unequal batches)",
        shared(by_row),
        "ignored targets in the mean: the sum is right, but is divided by the number of all targets, the ignored "
        "included (known from: a mask multiplied in before .mean())",
        shared(lambda s: 1 / s["counting"].size),
        "ignored targets counted as id 0: each ignored target counts as id 0 (known from: padding with 0)",
        filled(lambda s: 0),
        f"ignored targets counted as id {end}: each ignored target counts as the last id, <|endoftext|> in GPT-2 "
        "(known from: padding with <|endoftext|>)",
        filled(lambda s: end),
        "ignored targets counted as the next token: each ignored target counts as the id that follows "
        "(known from: ignore_index not set)",
        filled(lambda s: moved(s["token_ids"], 1)),
        "targets not shifted: each position predicts its own token (known from: logits and ids compared as they are)",
        aimed(lambda s, targets: np.where(targets == IGNORED, IGNORED, s["token_ids"])),
        "targets not shifted at all positions: each position predicts its own token, and ignored targets count "
        "(known from: logits and ids compared as they are)",
        aimed(lambda s, targets: s["token_ids"]),
        "targets shifted twice: each position predicts the token after the next "
        "(known from: shifted targets given as labels to transformers, which shifts them again)",
        aimed(lambda s, targets: moved(targets, 1)),
        "targets shifted the wrong way: each position predicts the token before it (known from: a mixed-up slice)",
        aimed(lambda s, targets: moved(s["token_ids"], -1)),
        "cross-entropy of probabilities: the loss takes probabilities for logits, and softmax is applied twice "
        "(known from: cross_entropy of softmax(logits))",
        {
            "loss": lambda s: -((log_softmax(softmax(s["logits"])) * s["aim"]).sum(-1) * s["share"]).sum().reshape(1),
            "d.logits": of_probabilities,
        },
        "label smoothing: a tenth of each target is spread over all ids (known from: label_smoothing=0.1)",
        {"aim": lambda s: MODEL_BACKWARD["aim"](s) * 0.9 + s["counting"][..., None] * 0.1 / s.config.vocab_size},
        "loss in bits: the loss is in bits, its gradients are those of nats (known from: log2 in a report)",
        {"loss": lambda s: MODEL_BACKWARD["loss"](s) / math.log(2)},
        "perplexity given as the loss: this is exp(loss) (known from: a report)",
        {"loss": lambda s: np.exp(MODEL_BACKWARD["loss"](s))},
        "loss's gradient without the targets: the gradient of the logits is their softmax, from which nothing is "
        "subtracted (known from: an omission)",
        {"d.logits": lambda s: np.exp(s["log_probabilities"]) * s["share"][..., None]},
    ) | {
        f"loss divided by {steps}: the loss and its gradients are divided by {steps} "
        f"(known from: gradient accumulation over {steps} steps, of which one was run)": divided(steps)
        for steps in (2, 4, 8, 16, 32)
    }


def embedded(part: Callable[[Scope], Array]) -> Formulas:
    """Return the formulas in which the embedding's part of wte's gradient is another one [V, C]."""
    return {"d.wte.part": part}


def overwritten(first: bool) -> Callable[[Scope], Array]:
    """Return the formula of a scatter that keeps the first or the last use of each id, not the sum."""

    def formula(s: Scope) -> Array:
        ids, step = s["token_ids"].reshape(-1), -1 if first else 1

        def kept(dy: Array) -> Array:
            found = np.zeros((s.config.vocab_size, dy.shape[-1]), dy.dtype)
            found[ids[::step]] = lines(dy)[::step]
            return found

        return once(kept, s["d.wte"])

    return formula


def overwritten_head(s: Scope) -> Array:
    """Return the head's part of wte's gradient, with the last use in the rows of the batch's ids."""
    used = np.bincount(s["token_ids"].ravel(), minlength=s.config.vocab_size) > 0
    return overwritten(first=False)(s) + s["d.head.part"] * ~used[:, None]


EMBEDDINGS_BACKWARD = rows(
    "embedding's gradient overwritten: of an id's several uses, only the last reaches wte "
    "(known from: grad[ids] += dy, which adds once)",
    embedded(overwritten(first=False)),
    "embedding's gradient from the first use: of an id's several uses, only the first reaches wte "
    "(known from: a loop over unique ids)",
    embedded(overwritten(first=True)),
    "embedding's gradient averaged: an id's gradient is the mean over its uses, not their sum "
    "(known from: scale_grad_by_freq)",
    embedded(
        lambda s: (
            MODEL_BACKWARD["d.wte.part"](s)
            / np.maximum(1, np.bincount(s["token_ids"].ravel(), minlength=s.config.vocab_size))[:, None].astype(
                s["d.wte"].dtype
            )
        )
    ),
    "wpe's gradient from the first row: only the first row of the batch reaches wpe (known from: an omission)",
    {"d.wpe": lambda s: s["d.embedding"][:1]},
    "wpe's gradient from the last row: only the last row of the batch reaches wpe (known from: = instead of +=)",
    {"d.wpe": lambda s: s["d.embedding"][-1:]},
    "wpe's gradient averaged over rows: the mean over the batch reaches wpe, not the sum (known from: mean(0))",
    {"d.wpe": lambda s: s["d.embedding"].mean(axis=0, keepdims=True)},
    "output head reads the block's output in its gradient: the head's gradient is from the input of ln_f "
    "(known from: the wrong buffer)",
    {"d.head.part": lambda s: outer(s["d.unembedded"], s["last"])},
)
TIED = rows(  # one wte for embedding and head
    "wte's gradient without the head's part: only the embedding's part reaches wte "
    "(known from: tied weights that are copies, detach() in the head)",
    {"d.wte.weight": lambda s: s["d.wte.part"]},
    "wte's gradient without the embedding's part: only the output head's part reaches wte "
    "(known from: an embedding by one-hot rows without gradient, = instead of +=)",
    {"d.wte.weight": lambda s: s["d.head.part"]},
    "wte's gradient overwritten by the embedding's part: the ids of the batch have only their last use, the others the "
    "head's part (known from: grad[ids] = dy)",
    {"d.wte.weight": overwritten_head},
    "head's part of wte's gradient twice: the output head's part is added twice (known from: += in two places)",
    {"d.wte.weight": lambda s: s["d.wte.part"] + s["d.head.part"] * 2},
    "embedding's part of wte's gradient twice: the embedding's part is added twice (known from: += in two places)",
    {"d.wte.weight": lambda s: s["d.wte.part"] * 2 + s["d.head.part"]},
)
