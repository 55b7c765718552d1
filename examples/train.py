"""Train a small GPT-2 on text files: python examples/train.py novels/*.txt --out weights/mine

AdamW with npgpt's gradients and a cosine schedule. Sizes, vocabulary and settings are the embedded model's. The last
4 % of every text are held out. The run is in DIR.npz: the same command goes on from there, and ends with the same bits.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import npgpt

if __name__ == "__main__":
    npgpt.tune_process()  # before NumPy is imported

import numpy as np

from npgpt.checkpoints.atomic import check_new, writing
from npgpt.cli.options import read_file
from npgpt.kernels import in_pieces
from npgpt.parameters import Array, Parameters, from_arrays, schema, to_arrays

Ids = np.typing.NDArray[np.int64]
SETTINGS = {"steps": 2851, "rows": 16, "rate": 1.5e-3, "drop": 0.05, "layers": 6, "seed": 0, "every": 100}


def initial(config: npgpt.Config, rng: np.random.Generator) -> dict[str, Array]:
    """Return GPT-2's initial weights: matrices N(0, 0.02²), less on the way into the residual stream, and biases 0."""
    weights = {name: np.full(shape, "bias" not in name, np.float32) for name, shape in schema(config).items()}
    for name, w in weights.items():
        if w.ndim == 2:
            w[:] = rng.standard_normal(w.shape, np.float32)
            w *= 0.02 / math.sqrt(2 * config.n_layer if name.endswith("c_proj.weight") else 1)
    return weights


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of step 1, 2, … `steps`: up to the peak in the first twentieth, then half a cosine down to 0."""
    warm_up = max(steps // 20, 1)
    angle = math.pi * (step - warm_up) / max(steps - warm_up, 1)
    return peak * step / warm_up if step <= warm_up else peak * 0.5 * (1 + math.cos(angle))


def adamw(w: Array, g: Array, m: Array, v: Array, t: int, lr: float, beta1: float, beta2: float, decay: float) -> None:
    """Update a weight and its two moments in place; t counts the steps from 1.

    m and v are running means of g and g². Divided by 1 − βᵗ they are unbiased, though they begin at 0. Loshchilov &
    Hutter 2019, "Decoupled Weight Decay Regularization": the decay acts on w directly and not by way of g.
    """
    m += (1 - beta1) * (g - m)
    v += (1 - beta2) * (g * g - v)
    w -= lr * (decay * w + m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + 1e-8))


def masks(w: dict[str, Array], drop: float, rng: np.random.Generator) -> dict[str, Array]:
    """Return 0 or 1 / (1 − drop) for each number of the blocks' matrices, else 1 (DropConnect, Wan et al. 2013)."""
    counts = {k: round(256 * drop) * (x.ndim == 2 and k.startswith("h.")) for k, x in w.items()}  # of 256
    return {
        k: np.float32(256 / (256 - n)) * (rng.integers(0, 256, w[k].shape, np.uint8) >= n) for k, n in counts.items()
    }


def windows(ids: Ids, length: int, seed: int) -> Iterator[Ids]:
    """Yield windows of length + 1 ids without end: every pass through the text begins elsewhere and is shuffled."""
    for epoch in itertools.count():
        rng = np.random.default_rng([seed, epoch])
        for start in rng.permutation(np.arange(int(rng.integers(length)), len(ids) - length, length)):
            yield ids[start : start + length + 1]


def held_out_loss(model: Parameters, config: npgpt.Config, ids: Ids) -> float:
    """Return nats a token in windows side by side: each token but the first is scored once, and a short rest is not."""
    length, n = config.n_positions, len(ids[1:]) // config.n_positions
    x, y = (part[: n * length].reshape(n, length) for part in (ids, ids[1:]))
    return sum(npgpt.loss(model, config, x[i : i + 8], y[i : i + 8]) * len(x[i : i + 8]) for i in range(0, n, 8)) / n


def read(paths: list[str], model: npgpt.LanguageModel) -> tuple[Ids, Ids]:
    """Return the ids to train on and those held out. Raises NpgptError if they are not enough for two windows."""
    texts = [np.array([*model.begin_ids, *model.tokenizer.encode(read_file(path))]) for path in paths]
    trained, held_out = zip(*(np.split(ids, [len(ids) * 24 // 25]) for ids in texts), strict=True)
    if min(sum(map(len, trained)) // 2, sum(map(len, held_out))) <= model.config.n_positions:
        raise npgpt.NpgptError(f"{sum(map(len, texts))} tokens of text are too few to train on and to hold out")
    return np.concatenate(trained), np.concatenate(held_out)


def train(options: argparse.Namespace) -> None:
    """Train, or go on where DIR.npz ends, and write the model. Raises NpgptError if DIR.npz has other settings."""
    if min(options.steps, options.rows, options.every) < 1 or not 0 <= options.drop <= 0.9:
        raise npgpt.NpgptError("--steps, --rows and --every must be at least 1, and --drop from 0 to 0.9")
    check_new(options.out)
    base, file = npgpt.load(), options.out.with_name(f"{options.out.name}.npz")
    config = replace(base.config, n_layer=options.layers)
    ids, held_out = read(options.texts, base)
    told = f"{len(ids)} ids of sum {ids.sum()}, " + ", ".join(f"--{name} {getattr(options, name)}" for name in SETTINGS)
    state = {f"w.{name}": w for name, w in initial(config, np.random.default_rng(options.seed)).items()}
    state |= {f"{kind}.{name}": np.zeros(shape, np.float32) for kind in "mv" for name, shape in schema(config).items()}
    state |= {"losses": np.zeros(0), "held_out": np.zeros((0, 2)), "seconds": np.zeros(1), "settings": np.array(told)}
    state = dict(np.load(file)) if file.exists() else state
    if (before := str(state.get("settings"))) != told:
        raise npgpt.NpgptError(f"{file} was begun with {before}, and not with {told}: give another --out")
    w, m, v = ({name: state[f"{kind}.{name}"] for name in schema(config)} for kind in "wmv")
    losses, begun = state["losses"].tolist(), time.perf_counter() - float(state["seconds"][0])
    rows = itertools.islice(windows(ids, config.n_positions, options.seed), len(losses) * options.rows, None)
    for step in range(len(losses) + 1, options.steps + 1):
        batch = np.stack([next(rows) for _ in range(options.rows)])
        mask = masks(w, options.drop, np.random.default_rng([options.seed, step]))
        thinned = from_arrays(config, {name: w[name] * mask[name] for name in w})
        loss, found = npgpt.loss_and_gradients(thinned, config, batch[:, :-1], batch[:, 1:])
        gradients = {name: g * mask[name] for name, g in to_arrays(found).items()}
        norm = math.sqrt(sum(float(np.vdot(g, g)) for g in gradients.values()))
        rate, factor = learning_rate(step, options.steps, options.rate), min(1.0, 1.0 / norm)  # clipped to a norm of 1
        for name, g in gradients.items():
            update = partial(adamw, t=step, lr=rate, beta1=0.9, beta2=0.98, decay=0.1 if g.ndim == 2 else 0.0)
            in_pieces(update, w[name], g * factor, m[name], v[name])
        losses.append(loss)
        if not math.isfinite(loss):
            raise npgpt.NpgptError(f"the loss of step {step} is {loss}: begin again with a lower --rate")
        speed = batch[:, 1:].size * step / (time.perf_counter() - begun)
        bar = f"[{'#' * (30 * step // options.steps):30}] {step} of {options.steps}"
        print(f"\r{bar}, loss {loss:.3f}, {speed:,.0f} tokens/s ", end="", file=sys.stderr, flush=True)
        if step % options.every == 0 or step == options.steps:
            score = held_out_loss(from_arrays(config, w), config, held_out)
            print(f"\r{step:6}  loss {np.mean(losses[-options.every :]):.4f}  held out {score:.4f}{'':40}", flush=True)
            state["held_out"] = np.concatenate([state["held_out"], [[step, score]]])
            state |= {"losses": np.array(losses), "seconds": np.array([time.perf_counter() - begun])}
            with writing(file) as out:
                np.savez(out, **state)  # type: ignore[arg-type]  # to NumPy 2.0 allow_pickle is an array
    npgpt.save(npgpt.LanguageModel(options.out.name, config, from_arrays(config, w), base.open_tokenizer), options.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="text files in UTF-8")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the finished model")
    for name, value in SETTINGS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"{value} by default")
    try:
        train(parser.parse_args())
    except (npgpt.NpgptError, OSError, ValueError, zipfile.BadZipFile) as error:
        parser.exit(2, f"train.py: error: {error}\n")
