"""Measure the peak memory of npgpt score for one long text and for many, beside that for 1 MB.

    python -m benchmarks.long_texts [--mb 50] [--ways sums resume json html files]

The model is tiny (1 block of width 8, random weights), because the question is how much of a text is kept. It has the
embedded model's vocabulary, and the text is random words of that model. 50 MB take a few minutes for each way.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import npgpt
from npgpt.checkpoints.find import find
from npgpt.config import Config

from .weights import make

MB = 10**6
SMALL = 5_000  # bytes in each of many files
WAYS = {
    "sums": [],
    "resume": ["--resume", "out.jsonl"],
    "json": ["--json"],
    "html": ["--html", "out.html"],
    "files": [],
}


def main() -> None:
    """Score 1 MB and the large text in each way, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=50, help="size of the long text (default: 50)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["sums", "files"], help="default: sums files")
    options = parser.parse_args()
    config = Config(vocab_size=4096, n_positions=256, n_embd=8, n_layer=1, n_head=1)
    print("| way | text | seconds | peak memory | above that for 1 MB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        model = make(Path(folder), "tiny", config)
        shutil.copy(find(None).weights.parent / "vocab.tiktoken", model)
        for way in options.ways:
            peaks = []
            for size in (1, options.mb):
                names = write(Path(folder), size * MB, SMALL if way == "files" else size * MB)
                seconds, peak = watched(Path(folder), [*names, "--model", str(model), *WAYS[way]])
                peaks.append(peak)
                above = f"{(peak - peaks[0]) / MB:,.0f} MB"
                print(f"| {way} | {len(names):,} × {size * MB / len(names) / MB:g} MB | {seconds:,.0f} | ", end="")
                print(f"{peak / MB:,.0f} MB | {above} |", flush=True)


def write(folder: Path, size: int, each: int) -> list[str]:
    """Write that many bytes of text to files of `each` bytes, and return the files' names."""
    rng = random.Random(0)
    pieces = npgpt.load().tokenizer.ranks
    words = [word for piece in pieces if (word := piece.decode("utf-8", "ignore").strip()).isalpha()]
    names = [f"{number}.txt" for number in range(size // each)]
    for name in names:
        with open(folder / name, "wb") as file:
            while (left := each - file.tell()) > 0:
                line = " ".join(rng.choices(words, k=12)).encode() + b".\n"
                file.write(line if len(line) <= left else b"x" * left)
    return names


def watched(folder: Path, arguments: list[str]) -> tuple[float, int]:
    """Run npgpt score; return its seconds and its peak memory in bytes."""
    for old in folder.glob("out.*"):
        old.unlink()
    started = time.perf_counter()
    command = [sys.executable, "-m", "npgpt", "score", *arguments]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": path})
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"npgpt ended with {status}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
