"""Measure npgpt score with worker processes: tokens a second and total memory, on Linux.

    python -m benchmarks.scoring [--model gpt2] [--workers 1 2 4] [--tokens 20000]

The command and its workers map the same weight file. Proportional set size (Pss in /proc/PID/smaps) divides a shared
page among its processes, so the sum is what is really in memory: the weights once, and for each process Python, NumPy
and, in a worker, the logits of one window.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from npgpt.config import PUBLISHED
from npgpt.text.vocabularies import load_tokenizer

from .weights import make

CACHE = Path(__file__).parent / "cache"
MB = 1e6


def main() -> None:
    """Score the same texts with each number of workers, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PUBLISHED, default="gpt2", help="whose shapes (default: gpt2)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=20_000, help="how many to score (default: 20000)")
    options = parser.parse_args()
    model = make(CACHE, options.model, PUBLISHED[options.model])
    on_disk = (model / "model.safetensors").stat().st_size
    ids = [(1_103_515_245 * number + 12_345) % 40_000 for number in range(options.tokens)]
    text = load_tokenizer("gpt2").decode(ids)
    print(
        f"{options.model}'s shapes, float32, {on_disk / MB:,.0f} MB of weights; sums over all processes at their peak\n"
    )
    print("| workers | tokens/s | Rss of the weights | Pss of the weights | Pss of all else |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.txt"
        file.write_bytes(text.encode())
        for workers in options.workers:
            command = ["score", str(file), "--model", str(model), "--workers", str(workers)]
            seconds, mapped, weights, rest, tokens = watched(command, str(model.resolve()))
            sizes = " | ".join(f"{size / MB:,.0f} MB" for size in (mapped, weights, rest))
            print(f"| {workers} | {tokens / seconds:,.0f} | {sizes} |")


def watched(command: list[str], weights: str) -> tuple[float, int, int, int, int]:
    """Run npgpt; return seconds, tokens, and its processes' peak bytes: Rss and Pss of weights, Pss of the rest."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "npgpt", *command], stdout=subprocess.PIPE, text=True)
    most = (0, 0, 0)
    while process.poll() is None:
        sums = [
            sum(column)
            for column in zip(
                *(memory(worker, weights) for worker in [process.pid, *children(process.pid)]), strict=True
            )
        ]
        if sums and sums[1] + sums[2] > most[1] + most[2]:
            most = (sums[0], sums[1], sums[2])
        time.sleep(0.2)  # reading smaps stops the process
    seconds = time.perf_counter() - started
    out, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"npgpt ended with {process.returncode}")
    return seconds, *most, int(out.split(": ")[1].split()[0].replace(",", ""))


def children(parent: int) -> list[int]:
    """Return the ids of its worker processes."""
    try:
        ids = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return [int(number) for number in ids if b"spawn_main" in Path(f"/proc/{number}/cmdline").read_bytes()]
    except OSError:  # it has exited
        return []


def memory(process: int, weights: str) -> tuple[int, int, int]:
    """Return bytes of a process: Rss and Pss of the weights' files, and Pss of everything else."""
    mapped, share, rest, inside = 0, 0, 0, False
    try:
        lines = Path(f"/proc/{process}/smaps").read_text().splitlines()
    except OSError:
        return 0, 0, 0
    for line in lines:
        key, *values = line.split()
        if not key.endswith(":"):
            inside = weights in line
        elif key == "Rss:" and inside:
            mapped += 1024 * int(values[0])
        elif key == "Pss:":
            share += 1024 * int(values[0]) * inside
            rest += 1024 * int(values[0]) * (not inside)
    return mapped, share, rest


if __name__ == "__main__":
    main()
