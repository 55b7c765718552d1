"""Run one engine in a fresh process: python -m benchmarks.worker '{"engine": …, "task": …}'.

It prints a line of JSON for each measure; whatever engines print goes to stderr. The main process sets the number of
threads in the environment, before any library reads it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    """Do one task: "environment", "ceilings", "export", "load", "first" (a token), "memory" or "measure"."""
    order = json.loads(sys.argv[1])
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**result: object) -> None:
        print(json.dumps(result), file=results, flush=True)

    if order["task"] == "ceilings":
        from . import machine

        say(sgemm=machine.sgemm(), bandwidth=machine.bandwidth(order["threads"]))
        return
    if order["task"] == "environment":
        from . import machine

        say(**machine.environment())
        return
    if order["task"] == "export":
        from .exports import export

        say(path=str(export(order["engine"], Path(order["path"]))))
        return
    if order["task"] == "load":
        say(**loading(order["path"]))
        return
    if order["engine"].startswith("npgpt"):  # as its users do, and as the command line does
        import npgpt

        npgpt.tune_process()
    from .engines import ENGINES

    engine = ENGINES[order["engine"]](Path(order["path"]), order["threads"])
    if order["task"] == "first":
        say(ids=engine.generate([order["prompt"]], 1))
        os._exit(0)  # some engines take long to shut down, which is not timed
    from .workloads import measure, plan, prefill, prompts

    planned = plan(order["model"])
    if order["task"] == "memory":
        engine.generate(prompts(prefill(order["length"]), planned.config), 1)
        say(**memory())
        return
    for name in order["workloads"]:
        try:
            found = measure(engine, planned.named(name), planned.config, planned.least)
        except NotImplementedError:
            continue
        say(workload=name, seconds=found.seconds, ids=found.ids, log_probabilities=found.log_probabilities)


def loading(path: str) -> dict[str, float]:
    """Return the seconds for mapping the weights, with header and shapes checked, and for npgpt.load."""
    import npgpt
    from npgpt import parameters
    from npgpt.checkpoints import find
    from npgpt.checkpoints.open import open_checkpoint

    npgpt.load()  # load another model first, to exclude imports
    started = time.perf_counter()
    checkpoint = open_checkpoint(find.find(path).weights)
    parameters.from_arrays(checkpoint.config, {name: checkpoint.load(name, "float32") for name in checkpoint.sources})
    mapped = time.perf_counter()
    npgpt.load(path)
    return {"mapping the weights": mapped - started, "npgpt.load": time.perf_counter() - mapped}


def memory() -> dict[str, int]:
    """Return peak resident bytes, mapped files included, and the current proportional set size (Linux only)."""
    peak = field("/proc/self/status", "VmHWM:")
    return {"peak": peak, "proportional": field("/proc/self/smaps_rollup", "Pss:")}


def field(path: str, name: str) -> int:
    """Return a size that a file in /proc states in kB, in bytes."""
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
