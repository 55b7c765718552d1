"""Time a training step of npgpt beside PyTorch's: python -m benchmarks.training [--threads 2] [--rounds 5]

A step is the loss, all gradients and AdamW's update, in float32. PyTorch runs transformers' model as it is, not
compiled. Both start from the same random weights and ids, take turns in processes of their own with the same number of
threads, and must agree on the losses of the first steps. Times are the medians of the rounds' fastest steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from npgpt.config import PUBLISHED, Config
from npgpt.process import THREAD_VARIABLES, tune_process

SMALL = Config(vocab_size=4096, n_positions=256, n_embd=192, n_layer=6, n_head=6)  # the embedded model's
STEPS = [("embedded", SMALL, 4, 64), ("embedded", SMALL, 16, 256), ("gpt2", PUBLISHED["gpt2"], 4, 64)]
AGREE = 1e-4  # of a loss: AdamW's first update is the gradient's sign, so rounding moves some weights by the whole rate
RATE, BETAS, DECAY = 1e-4, (0.9, 0.98), 0.1


def main() -> None:
    """Take turns, and print a table."""
    parser = argparse.ArgumentParser("python -m benchmarks.training", description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, number = options.worker
        print(json.dumps(measured(ENGINES[name], *STEPS[int(number)][1:], options.threads)))
        return
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(options.threads)), HF_HUB_OFFLINE="1")
    print("| shape | rows × tokens | npgpt | PyTorch | npgpt against PyTorch |\n| --- | --- | --- | --- | --- |")
    for number, (shape, _, rows, tokens) in enumerate(STEPS):
        found: dict[str, list[float]] = {name: [] for name in ENGINES}
        for _ in range(options.rounds):
            losses = {}
            for name in ENGINES:
                command = ["--threads", str(options.threads), "--worker", name, str(number)]
                done = subprocess.run([sys.executable, "-m", __spec__.name, *command], capture_output=True, check=True)
                seconds, losses[name] = json.loads(done.stdout)
                found[name].append(seconds)
            one, other = losses.values()
            if any(abs(a - b) > AGREE * b for a, b in zip(one, other, strict=True)):
                raise SystemExit(f"the losses differ: {losses}")
        ours, theirs = (statistics.median(each) for each in found.values())
        ratios = [b / a for a, b in zip(*found.values(), strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        print(f"| {shape} | {rows} × {tokens} | {ours:.3f} s | {theirs:.3f} s | {spread} |", flush=True)


Step = Callable[[int], float]  # does step 1, 2, … and returns the loss before it


def measured(
    engine: Callable[..., Step], config: Config, rows: int, tokens: int, threads: int
) -> tuple[float, list[float]]:
    """Return the seconds of the fastest step, and the first three losses."""
    step = engine(config, rows, tokens, threads)
    losses: list[float] = []
    times: list[float] = []
    while len(losses) < 4 or sum(times) < 5:
        started = time.perf_counter()
        losses.append(step(len(losses) + 1))
        times.append(time.perf_counter() - started)
    return min(times), losses[:3]


def npgpt_step(config: Config, rows: int, tokens: int, threads: int) -> Step:
    """Return npgpt's step."""
    tune_process()
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import numpy as np
    from train import adamw  # type: ignore[import-not-found]

    from npgpt import gradients, parameters

    w, ids = start(config, rows, tokens)
    m, v = ({name: np.zeros_like(array) for name, array in w.items()} for _ in range(2))

    def step(t: int) -> float:
        loss, found = gradients.loss_and_gradients(parameters.from_arrays(config, w), config, ids)
        for name, g in parameters.to_arrays(found).items():
            adamw(w[name], g, m[name], v[name], t, RATE, *BETAS, DECAY)
        return loss

    return step


def torch_step(config: Config, rows: int, tokens: int, threads: int) -> Step:
    """Return PyTorch's step, on transformers' model."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(threads)
    sizes = {name: getattr(config, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **none, bos_token_id=None, eos_token_id=None, use_cache=False))
    weights, ids = start(config, rows, tokens)
    named = {f"transformer.{name}": torch.from_numpy(array) for name, array in weights.items()}
    model.load_state_dict(named | {"lm_head.weight": named["transformer.wte.weight"]})
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY)
    x = torch.from_numpy(ids)

    def step(t: int) -> float:
        optimizer.zero_grad()
        logits = model(x).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


def start(config: Config, rows: int, tokens: int) -> tuple[dict[str, Any], Any]:
    """Return random float32 weights by canonical name, and ids [rows, tokens]."""
    import numpy as np

    from npgpt import parameters

    rng = np.random.default_rng(0)
    shapes = parameters.schema(config)
    weights = {name: 0.02 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for name in weights:
        if name.endswith("weight") and weights[name].ndim == 1:
            weights[name] += 1
    return weights, rng.integers(0, config.vocab_size, (rows, tokens))


ENGINES = {"npgpt": npgpt_step, "PyTorch": torch_step}

if __name__ == "__main__":
    main()
