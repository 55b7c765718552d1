"""How fast the forward pass is at gpt2's true shape, with the machine's own limits from the same run.

    python -m benchmarks.forward [--threads 2] [--rounds 7]

Random weights of the 124M shape are written once to benchmarks/cache/ and mapped like any model's. Every figure is
taken in a process of its own and is the median of its rounds. Peak resident memory counts the mapped weights.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from npgpt.cli.options import set_threads

CACHE = Path(__file__).parent / "cache" / "gpt2-shape"
PROMPT, DECODED = 128, 64
MEASURES = ("prefill 128", "prefill 1024", "decode", "sgemm", "bandwidth")


def main() -> None:
    """Run every measure in turn and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="for NumPy's matrix products (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="runs of each measure, the median of which counts")
    parser.add_argument("--only", choices=MEASURES, help=argparse.SUPPRESS)  # how this starts itself
    options = parser.parse_args()
    set_threads(options.threads)
    if options.only:
        seconds = measure(options.only, options.rounds, options.threads)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "peak": peak}))
        return
    make_weights()
    import numpy as np

    print(
        f"gpt2's shape (124M), float32, {options.threads} threads, median of {options.rounds}, NumPy {np.__version__}"
    )
    for name in MEASURES:
        command = [sys.executable, "-m", "benchmarks.forward", "--only", name]
        command += ["--threads", str(options.threads), "--rounds", str(options.rounds)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        result = json.loads(done.stdout)
        print(f"  {describe(name, result['seconds'], result['peak'])}", flush=True)


def describe(name: str, seconds: float, peak: float) -> str:
    """One line of the table; peak in MiB."""
    if name == "decode":
        return f"{'decode after 128':<20} {1 / seconds:7.1f} tokens/s   peak memory {peak:5.0f} MiB"
    if name == "sgemm":
        return f"{'sgemm':<20} {sgemm_flops() / seconds / 1e9:7.0f} GFLOP/s   1024 x 768 x 3072"
    if name == "bandwidth":
        return (
            f"{'read bandwidth':<20} {BANDWIDTH_BYTES / seconds / 1e9:7.1f} GB/s      a token reads 0.5 GB of weights"
        )
    return f"{name + ' tokens':<20} {seconds:7.3f} s          peak memory {peak:5.0f} MiB"


def make_weights() -> None:
    """Random weights as GPT-2 is initialised, N(0, 0.02²), written once."""
    if (CACHE / "config.json").exists():
        return
    import numpy as np

    from npgpt import config, parameters
    from npgpt.checkpoints import safetensors

    print(f"writing random weights to {CACHE}", file=sys.stderr)
    gpt2, rng = config.PUBLISHED["gpt2"], np.random.default_rng(0)
    arrays = {
        name: rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02) + np.float32(len(shape) == 1)
        for name, shape in parameters.schema(gpt2).items()
    }
    CACHE.mkdir(parents=True, exist_ok=True)
    safetensors.write(CACHE / "model.safetensors", arrays)
    (CACHE / "config.json").write_text(json.dumps(config.to_dict(gpt2)))


BANDWIDTH_BYTES = 2**29


def sgemm_flops() -> int:
    """Multiplications and additions of the product measured."""
    return 2 * 1024 * 768 * 3072


def measure(name: str, rounds: int, threads: int) -> float:
    """Median seconds of one measure: a prefill, a token, a product, a read of BANDWIDTH_BYTES."""
    import numpy as np

    if name == "sgemm":
        a, b = np.ones((1024, 768), np.float32), np.ones((768, 3072), np.float32)
        return median(lambda: a @ b, 5 * rounds)
    if name == "bandwidth":
        from concurrent.futures import ThreadPoolExecutor

        parts = np.array_split(np.ones(BANDWIDTH_BYTES // 4, np.float32), threads)
        with ThreadPoolExecutor(threads) as pool:  # NumPy releases the GIL in a product
            return median(lambda: list(pool.map(np.dot, parts, parts)), rounds)
    import npgpt

    model = npgpt.load(CACHE)
    if name == "decode":
        cache = npgpt.KVCache(model.config, 1, PROMPT + DECODED)
        model(np.arange(PROMPT), cache, last_only=True)

        def decode() -> None:
            if cache.length == cache.capacity:
                cache.length = PROMPT
            model([262], cache, last_only=True)

        return median(decode, DECODED * rounds)
    ids = np.arange(int(name.split()[1]))
    return median(lambda: model(ids, npgpt.KVCache(model.config, 1, len(ids)), last_only=True), rounds)


def median(run: Callable[[], object], rounds: int) -> float:
    """The median seconds of a call, after one that does not count."""
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
