"""Measure the memory and time of a conversion at a published model's real shapes.

    python -m benchmarks.conversion [--model gpt2-xl] [--dtype float32]

Random weights under nanoGPT's names, whose matrices must be transposed, are written once to benchmarks/cache/. A
separate process converts them while its anonymous memory is sampled every few milliseconds (RssAnon, which excludes
mapped pages of the source). Only Linux reports that figure.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path

import numpy as np

from npgpt import parameters
from npgpt.checkpoints import safetensors
from npgpt.config import PUBLISHED

from .weights import normal

CACHE = Path(__file__).parent / "cache"
MATRICES = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
MB = 1e6


def main() -> None:
    """Convert once and print time and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PUBLISHED, default="gpt2-xl", help="whose shapes (default: gpt2-xl)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    options = parser.parse_args()
    source = make_source(options.model)
    largest = 4 * max(map(prod, parameters.schema(PUBLISHED[options.model]).values()))
    base, _ = watched("-c", "import npgpt; npgpt.convert; input()", closing=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        arguments = ["-m", "npgpt", "convert", str(source), f"{folder}/out", "--dtype", options.dtype]
        peak, seconds = watched(*arguments)
    print(f"{options.model}'s shapes, nanoGPT's names, {source.stat().st_size / MB:,.0f} MB, to {options.dtype}")
    print(f"  {seconds:.1f} s, {source.stat().st_size / MB / seconds:,.0f} MB/s of the source")
    print(f"  anonymous memory: peak {peak / MB:.0f} MB, of which {base / MB:.0f} MB are Python and NumPy")
    print(f"  above that {(peak - base) / MB:.0f} MB; the largest tensor takes {largest / MB:.0f} MB in float32")


def make_source(model: str) -> Path:
    """Write random float32 weights under nanoGPT's names, with matrices [out, in]."""
    path = CACHE / f"{model}-nanogpt" / "model.safetensors"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    layout = {
        f"transformer.{name}": ("float32", shape[::-1] if name.endswith(MATRICES) else shape)
        for name, shape in parameters.schema(PUBLISHED[model]).items()
    }
    generator = np.random.default_rng(0)
    safetensors.write_parts(path, layout, lambda name: normal(generator, layout[name][1]))
    return path


def watched(*arguments: str, closing: bool = False) -> tuple[int, float]:
    """Run Python; return its peak RssAnon in bytes and its seconds. closing: the process waits until stdin closes."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        found = [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")]
        peak = max(peak, *found, 0)
        if closing and time.perf_counter() - started > 3:
            process.communicate(b"\n")
        time.sleep(0.003)
    if process.wait() != 0:
        raise SystemExit(f"the process ended with {process.returncode}")
    return peak, time.perf_counter() - started


if __name__ == "__main__":
    main()
