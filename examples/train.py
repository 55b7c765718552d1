"""Train a small GPT-2 on text files with NumPy alone: npgpt's gradients, AdamW, and a cosine schedule.

    python examples/train.py novels/*.txt --out weights/mine
    npgpt generate --model mine "It is a truth"

The model has the sizes and the vocabulary of the embedded one. The last 4 % of every text are held out. A run that was
ended, by whatever, goes on where OUT.npz was last written, and ends with the same numbers as without the break.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import npgpt

npgpt.tune_process()

import numpy as np
from numpy.typing import NDArray

from npgpt import parameters
from npgpt.checkpoints.atomic import check_new, writing
from npgpt.config import Config
from npgpt.parameters import Array

Ids = NDArray[np.int64]
Weights = dict[str, Array]


def initial(config: Config, rng: np.random.Generator) -> Weights:
    """Return GPT-2's initial weights: matrices N(0, 0.02²), less on the way into the residual stream, biases 0."""
    weights = {}
    for name, shape in parameters.schema(config).items():
        deviation = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02
        weights[name] = np.full(shape, "bias" not in name, np.float32)
        if len(shape) == 2:
            weights[name] = rng.standard_normal(shape, np.float32) * np.float32(deviation)
    return weights


def learning_rate(step: int, steps: int, peak: float, warm_up: int) -> float:
    """Return the rate of step 1, 2, … `steps`: a line up to the peak, then half a cosine down to 0."""
    if step <= warm_up:
        return peak * step / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def adamw(
    w: Array, g: Array, m: Array, v: Array, step: int, rate: float, betas: Any, epsilon: float, decay: float
) -> None:
    """Update a weight and its two moments in place; step counts from 1.

    m and v are running means of g and g². Divided by 1 − β^step they are unbiased, though they begin at 0. Loshchilov &
    Hutter 2019, "Decoupled Weight Decay Regularization": the decay acts on w directly and not by way of g.
    """
    m += (1 - betas[0]) * (g - m)
    v += (1 - betas[1]) * (g * g - v)
    w -= rate * decay * w
    w -= rate / (1 - betas[0] ** step) * m / (np.sqrt(v / (1 - betas[1] ** step)) + epsilon)


def clipped(gradients: Weights, largest: float = 1.0) -> Weights:
    """Return the gradients, scaled so that the norm of all of them together is at most `largest`."""
    norm = math.sqrt(sum(float(np.vdot(g, g)) for g in gradients.values()))
    return {name: g * min(1.0, largest / norm) for name, g in gradients.items()}


def masks(weights: Weights, drop: float, rng: np.random.Generator) -> Weights:
    """Return for every matrix of a block 0 in the place of a share `drop` of its entries and 1 / (1 − share) elsewhere.

    The share is a multiple of 1/256. Wan et al. 2013, "Regularization of Neural Networks using DropConnect".
    """
    bound = round(256 * drop)
    names = [name for name, w in weights.items() if w.ndim == 2 and name.startswith("h.")] if bound else []
    keep = np.float32(256 / (256 - bound))
    return {name: keep * (rng.integers(0, 256, weights[name].shape, np.uint8) >= bound) for name in names}


def windows(ids: Ids, length: int, seed: int) -> Iterator[Ids]:
    """Yield windows of length + 1 ids without end: every pass through the text begins elsewhere and is shuffled."""
    for epoch in range(sys.maxsize):
        rng = np.random.default_rng([seed, epoch])
        begin = int(rng.integers(length))
        for start in rng.permutation(np.arange(begin, len(ids) - length, length)):
            yield ids[start : start + length + 1]


def held_out_loss(model: parameters.Parameters, config: Config, ids: Ids) -> float:
    """Return nats a token over windows side by side: each token but the first is scored once, a shorter rest never."""
    length = config.n_positions
    rows = len(ids[1:]) // length
    x, y = (part[: rows * length].reshape(rows, length) for part in (ids, ids[1:]))
    some = [slice(row, row + 8) for row in range(0, rows, 8)]
    return sum(npgpt.loss(model, config, x[part], y[part]) * len(x[part]) for part in some) / rows


def read(paths: list[Path], model: npgpt.LanguageModel) -> tuple[Ids, Ids]:
    """Return the ids to train on and those held out, the last 4 % of every text."""
    texts = [np.array([*model.begin_ids, *model.tokenizer.encode(path.read_text("utf-8"))]) for path in paths]
    parts = [np.split(ids, [len(ids) * 24 // 25]) for ids in texts]
    trained, held_out = (np.concatenate(part) for part in zip(*parts, strict=True))
    return trained, held_out


def train(options: argparse.Namespace) -> None:
    """Train, or go on where DIR.npz ends, and write the model to DIR. Raises NpgptError if DIR.npz has other settings."""
    check_new(options.out)
    base, file = npgpt.load(), options.out.with_name(options.out.name + ".npz")
    config = replace(base.config, n_layer=options.layers)
    ids, held_out = read(options.texts, base)
    settings = ["rows", "steps", "rate", "drop", "layers", "seed"]
    told = f"{len(ids)} ids, " + ", ".join(f"--{name} {getattr(options, name)}" for name in settings)
    state: Weights = {}
    for name, w in initial(config, np.random.default_rng(options.seed)).items():
        state |= {f"w.{name}": w, f"m.{name}": np.zeros_like(w), f"v.{name}": np.zeros_like(w)}
    state |= {"losses": np.zeros(0), "held_out": np.zeros((0, 2)), "seconds": np.zeros(1), "settings": np.array(told)}
    if file.exists():
        state = dict(np.load(file))
        if str(state["settings"]) != told:
            raise npgpt.NpgptError(f"{file} was begun with {state['settings']}, not {told}: give another --out")
    w, m, v = ({name: state[f"{kind}.{name}"] for name in parameters.schema(config)} for kind in "wmv")
    losses, begun = [*state["losses"]], time.perf_counter() - state["seconds"][0]
    rows = itertools.islice(windows(ids, config.n_positions, options.seed), len(losses) * options.rows, None)
    for step in range(len(losses) + 1, options.steps + 1):
        batch = np.stack([next(rows) for _ in range(options.rows)])
        mask = masks(w, options.drop, np.random.default_rng([options.seed, step]))
        thinned = parameters.from_arrays(config, w | {name: w[name] * kept for name, kept in mask.items()})
        loss, found = npgpt.loss_and_gradients(thinned, config, batch[:, :-1], batch[:, 1:])
        gradients = parameters.to_arrays(found)
        gradients = clipped(gradients | {name: gradients[name] * kept for name, kept in mask.items()})
        rate = learning_rate(step, options.steps, options.rate, options.steps // 20)
        for name, g in gradients.items():
            adamw(w[name], g, m[name], v[name], step, rate, (0.9, 0.98), 1e-8, 0.1 if g.ndim == 2 else 0.0)
        losses.append(loss)
        speed = batch[:, 1:].size * step / (time.perf_counter() - begun)
        bar = "#" * (30 * step // options.steps)
        print(
            f"\r[{bar:30}] {step} of {options.steps}, loss {loss:.3f}, {speed:,.0f} tokens/s ", end="", file=sys.stderr
        )
        if step % options.every == 0 or step == options.steps:
            score = held_out_loss(parameters.from_arrays(config, w), config, held_out)
            print(f"\r{step:6}  loss {np.mean(losses[-options.every :]):.4f}  held out {score:.4f}{'':40}", flush=True)
            state["held_out"] = np.concatenate([state["held_out"], [[step, score]]])
            state |= {"losses": np.array(losses), "seconds": np.array([time.perf_counter() - begun])}
            with writing(file) as out:
                np.savez(out, **state)
    npgpt.save(
        npgpt.LanguageModel(options.out.name, config, parameters.from_arrays(config, w), base.open_tokenizer),
        options.out,
    )


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("texts", nargs="+", type=Path, metavar="TEXT", help="text files in UTF-8")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the model; DIR.npz is the run itself")
    add("--steps", type=int, default=2851)
    add("--rows", type=int, default=16, help="windows in a step, each as long as the model's context")
    add("--rate", type=float, default=1.5e-3, help="the learning rate's peak")
    add("--drop", type=float, default=0.1, help="share of the matrices' entries that a step does without")
    add("--layers", type=int, default=6)
    add("--seed", type=int, default=0)
    add("--every", type=int, default=100, metavar="STEPS", help="how often DIR.npz is written")
    try:
        train(parser.parse_args())
    except (npgpt.NpgptError, OSError, ValueError) as error:
        parser.exit(2, f"train.py: error: {error}\n")


if __name__ == "__main__":
    main()
