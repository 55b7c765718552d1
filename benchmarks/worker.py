"""One engine in one fresh process: python -m benchmarks.worker '{"engine": …, "task": …}', a line of JSON a measure.

The main run starts it with the thread count in the environment, before any library reads it. What engines print
themselves goes to stderr.
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
    if order["engine"].startswith("npgpt"):  # as its users do, and as the command line does for them
        import npgpt

        npgpt.tune_process()
    from .engines import ENGINES

    engine = ENGINES[order["engine"]](Path(order["path"]), order["threads"])
    if order["task"] == "first":
        say(ids=engine.generate([order["prompt"]], 1))
        os._exit(0)  # what follows is not timed, and some engines take long over it
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
    """Seconds to map the weights, header and shapes checked, and of npgpt.load."""
    import npgpt
    from npgpt import parameters
    from npgpt.checkpoints import find
    from npgpt.checkpoints.open import open_checkpoint

    npgpt.load()  # another model first, so that imports are not counted
    started = time.perf_counter()
    checkpoint = open_checkpoint(find.find(path).weights)
    parameters.from_arrays(checkpoint.config, {name: checkpoint.load(name, "float32") for name in checkpoint.sources})
    mapped = time.perf_counter()
    npgpt.load(path)
    return {"mapping the weights": mapped - started, "npgpt.load": time.perf_counter() - mapped}


def memory() -> dict[str, int]:
    """Bytes: the peak of what was resident, mapped files included, and the proportional share now. Linux has both."""
    peak = field("/proc/self/status", "VmHWM:")
    return {"peak": peak, "proportional": field("/proc/self/smaps_rollup", "Pss:")}


def field(path: str, name: str) -> int:
    """A size that a file of /proc gives in kB."""
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
