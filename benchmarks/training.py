"""Time a training step of npgpt beside PyTorch's and llm.c's: python -m benchmarks.training --out FILE

A step is the loss, all gradients and AdamW's update, in float32. PyTorch runs transformers' model as it is, not
compiled; llm.c is compiled with its own flags, with OpenMP. All start from the same random weights, ids and targets,
take turns in processes of their own with the same number of threads, and must agree on the losses of the first steps.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from npgpt.config import PUBLISHED, Config
from npgpt.process import THREAD_VARIABLES, tune_process

SMALL = Config(vocab_size=4096, n_positions=256, n_embd=192, n_layer=6, n_head=6)  # the embedded model's
STEPS = [("embedded", SMALL, 4, 64), ("embedded", SMALL, 16, 256), ("gpt2", PUBLISHED["gpt2"], 4, 64)]
AGREE = 1e-4  # of a loss: AdamW's first update is the gradient's sign, so rounding moves some weights by the whole rate
RATE, BETAS, DECAY = 1e-4, (0.9, 0.98), 0.1
FLAGS = ["-Ofast", "-march=native", "-fopenmp", "-DOMP"]  # of llm.c's Makefile
PROGRAM = """
#define TESTING
#include "train_gpt2.c"
int main(int argc, char **argv) {
    GPT2 model;
    gpt2_build_from_checkpoint(&model, "model.bin");
    int rows = atoi(argv[1]), tokens = atoi(argv[2]), n = rows * tokens;
    int *ids = malloc(2 * n * sizeof(int));
    FILE *file = fopen("ids.bin", "rb");
    if (fread(ids, sizeof(int), 2 * n, file) != 2 * n) return 1;
    double total = 0, fastest = 1e9;
    for (int step = 1; step <= 4 || total < 5; step++) {
        struct timespec begin, end;
        clock_gettime(CLOCK_MONOTONIC, &begin);
        gpt2_forward(&model, ids, ids + n, rows, tokens);
        gpt2_zero_grad(&model);
        gpt2_backward(&model);
        gpt2_update(&model, RATE, BETA_1, BETA_2, 1e-8f, DECAY, step);
        clock_gettime(CLOCK_MONOTONIC, &end);
        double seconds = end.tv_sec - begin.tv_sec + 1e-9 * (end.tv_nsec - begin.tv_nsec);
        total += seconds;
        fastest = seconds < fastest ? seconds : fastest;
        if (step <= 3) fprintf(stderr, "%.9g ", model.mean_loss);
    }
    fprintf(stderr, "%.9g", fastest);
}
"""


def main() -> None:
    """Take turns, and print a table or write it to a file."""
    parser = argparse.ArgumentParser("python -m benchmarks.training", description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llm.c", type=Path, dest="llmc", metavar="DIR", help="a checkout of llm.c")
    parser.add_argument("--out", type=Path, help="the file to write")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, number = options.worker
        print(json.dumps(ENGINES[name](*STEPS[int(number)][1:], options)))
        return
    from .machine import environment  # here, because it imports NumPy, before which npgpt's worker is tuned
    from .report import circumstances

    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(options.threads)), HF_HUB_OFFLINE="1")
    engines = [name for name in ENGINES if options.llmc or name != "llm.c"]
    against = [f"npgpt against {name}" for name in engines[1:]]
    table = [
        "| shape | rows × tokens | " + " | ".join(engines + against) + " |",
        "| --- " * (1 + 2 * len(engines)) + "|",
    ]
    for number in range(len(STEPS)):
        table.append(measured(number, engines, options))
        print(table[-1], file=sys.stderr)
    arguments = shlex.join("DIR" if Path(word) == options.llmc else word for word in sys.argv[1:])
    settings = {"threads": options.threads, "rounds": options.rounds, "day": f"{datetime.now():%Y-%m-%d}"}
    run = {"command": f"python -m {__spec__.name} {arguments}", "environment": environment(), **settings}
    text = [
        "# A training step",
        "",
        *circumstances(run),
        "A step is the loss, all gradients and AdamW's update, in float32 with random weights. Times are the medians "
        "over the rounds of a process's fastest step. Ratios are taken round by round: above 1 npgpt is faster, in "
        "brackets the lowest and the highest.",
        "",
        *table,
    ]
    written = "\n".join(text) + "\n"
    if options.out is None:
        print(written, end="")
    else:
        options.out.write_text(written, "utf-8")


def measured(number: int, engines: list[str], options: argparse.Namespace) -> str:
    """Return the row of the table for one of STEPS, of all rounds."""
    shape, _, rows, tokens = STEPS[number]
    found: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(options.rounds):
        losses = {}
        for name in engines:
            command = [sys.executable, "-m", __spec__.name, "--threads", str(options.threads)]
            command += ["--worker", name, str(number), *(["--llm.c", str(options.llmc)] if name == "llm.c" else [])]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            seconds, losses[name] = json.loads(done.stdout)
            found[name].append(seconds)
        first, *others = losses.values()
        if any(abs(a - b) > AGREE * b for other in others for a, b in zip(other, first, strict=True)):
            raise SystemExit(f"the losses differ: {losses}")
    ours, *theirs = found.values()

    def cells() -> Iterator[str]:
        yield from (f"{statistics.median(times):.3f} s" for times in found.values())
        for times in theirs:
            ratios = [b / a for a, b in zip(ours, times, strict=True)]
            yield f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"

    return f"| {shape} | {rows} × {tokens} | " + " | ".join(cells()) + " |"


Step = Callable[[int], float]  # does step 1, 2, … and returns the loss before it
Times = tuple[float, list[float]]  # the seconds of the fastest step, and the first three losses


def timed(start_engine: Callable[[Config, int, int, int], Step]) -> Callable[..., Times]:
    """Return a function that times an engine's steps."""

    def run(config: Config, rows: int, tokens: int, options: argparse.Namespace) -> Times:
        step = start_engine(config, rows, tokens, options.threads)
        losses: list[float] = []
        times: list[float] = []
        while len(losses) < 4 or sum(times) < 5:
            started = time.perf_counter()
            losses.append(step(len(losses) + 1))
            times.append(time.perf_counter() - started)
        return min(times), losses[:3]

    return run


@timed
def npgpt_step(config: Config, rows: int, tokens: int, threads: int) -> Step:
    """Return npgpt's step."""
    tune_process()
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import numpy as np
    from train import adamw  # type: ignore[import-not-found]

    from npgpt import gradients, kernels, parameters

    settings = {"lr": RATE, "beta1": BETAS[0], "beta2": BETAS[1], "decay": DECAY}
    w, x, y = start(config, rows, tokens)
    m, v = ({name: np.zeros_like(array) for name, array in w.items()} for _ in range(2))

    def step(t: int) -> float:
        loss, found = gradients.loss_and_gradients(parameters.from_arrays(config, w), config, x, y)
        for name, g in parameters.to_arrays(found).items():
            kernels.in_pieces(partial(adamw, t=t, **settings), w[name], g, m[name], v[name])
        return loss

    return step


@timed
def torch_step(config: Config, rows: int, tokens: int, threads: int) -> Step:
    """Return PyTorch's step, on transformers' model."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(threads)
    sizes = {name: getattr(config, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **none, bos_token_id=None, eos_token_id=None, use_cache=False))
    weights, *ids = start(config, rows, tokens)
    named = {f"transformer.{name}": torch.from_numpy(array) for name, array in weights.items()}
    model.load_state_dict(named | {"lm_head.weight": named["transformer.wte.weight"]})
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY)
    x, y = (torch.from_numpy(each).contiguous() for each in ids)

    def step(t: int) -> float:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def llmc_times(config: Config, rows: int, tokens: int, options: argparse.Namespace) -> Times:
    """Compile llm.c's program for the processor, run it, and return its times."""
    from npgpt.checkpoints import llmc
    from npgpt.parameters import from_arrays

    weights, *ids = start(config, rows, tokens)
    numbers = {"RATE": RATE, "BETA_1": BETAS[0], "BETA_2": BETAS[1], "DECAY": DECAY}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        llmc.write_model(folder / "model.bin", config, from_arrays(config, weights))
        (folder / "ids.bin").write_bytes(b"".join(each.astype("int32").tobytes() for each in ids))
        (folder / "step.c").write_text(PROGRAM, "utf-8")
        defined = [f"-D{name}={value}f" for name, value in numbers.items()]
        source = ["-w", "-I", str(options.llmc.resolve()), "step.c", "-o", "step", "-lm"]
        subprocess.run(["cc", *FLAGS, *defined, *source], cwd=folder, check=True)
        command = ["./step", str(rows), str(tokens)]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True)
    *losses, seconds = map(float, done.stderr.split())
    return seconds, losses


def start(config: Config, rows: int, tokens: int) -> tuple[dict[str, Any], Any, Any]:
    """Return random float32 weights by canonical name, and ids and targets [rows, tokens]."""
    import numpy as np

    from npgpt import parameters

    rng = np.random.default_rng(0)
    shapes = parameters.schema(config)
    weights = {name: 0.02 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for name in weights:
        if name.endswith("weight") and weights[name].ndim == 1:
            weights[name] += 1
    ids = rng.integers(0, config.vocab_size, (rows, tokens + 1))
    return weights, ids[:, :-1], ids[:, 1:]


ENGINES: dict[str, Callable[..., Times]] = {"npgpt": npgpt_step, "PyTorch": torch_step, "llm.c": llmc_times}

if __name__ == "__main__":
    main()
