"""Time `npgpt.check` on gpt2's real shape: python -m benchmarks.oracle [--model gpt2] [--tokens 16]

The model has random weights and merges its attention heads without the transpose. It is checked from all stages, from
logits alone, and from logits that no catalogued mistake explains. All run in one process, so loading is not included.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

import npgpt
from npgpt.config import PUBLISHED
from npgpt.oracle.arithmetic import plain
from npgpt.oracle.mistakes import catalogue
from npgpt.oracle.references import in_float64
from npgpt.oracle.textbook import Pass, stages, textbook

from . import weights


def main() -> None:
    """Run the checks and print their seconds."""
    parser = argparse.ArgumentParser("python -m benchmarks.oracle", description=__doc__)
    parser.add_argument("--model", choices=[*PUBLISHED, "toy"], default="gpt2")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--mistake", default="heads merged without transpose")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / "cache")
    options = parser.parse_args()
    started = time.perf_counter()
    from .workloads import plan

    model = npgpt.load(weights.make(options.cache, options.model, plan(options.model).config), dtype="float64")
    print(f"loading in float64: {time.perf_counter() - started:.1f} s")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, options.tokens))
    (entry,) = (entry for entry in catalogue(model.config, options.tokens) if entry.name == options.mistake)
    single = {name: array.astype(np.float32) for name, array in in_float64(model).items()}
    run = Pass(entry.change(textbook(model.config, single)), ids)
    theirs = {stage: plain(run[stage]).astype(np.float32) for stage in stages(model.config.n_layer)}
    del theirs["log_probabilities"]
    noise = 0.01 * np.random.default_rng(1).standard_normal(theirs["logits"].shape).astype(np.float32)
    for title, given in (
        ("from all stages", theirs),
        ("from logits", {"logits": theirs["logits"]}),
        ("from logits with noise, which has no name", {"logits": theirs["logits"] + noise}),
    ):
        started = time.perf_counter()
        report = npgpt.check(given, ids, model)
        print(f"{title}: {time.perf_counter() - started:.1f} s; {report.verdict}")


if __name__ == "__main__":
    main()
