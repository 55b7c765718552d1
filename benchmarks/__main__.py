"""Measure npgpt's speed beside every installed engine and the limits of the machine.

    python -m benchmarks [--model gpt2] [--threads 2] [--rounds 7] [--engine NAME …] [--before FOLDER] [--out FILE]

Random weights of the real shape are written once to benchmarks/cache/, together with each engine's own export of them.
Engines take turns (A B C A B C), each in a fresh process with the same number of threads. An engine's times count only
if its greedy ids equal those of npgpt in float64. The extra `bench` installs the peers; a missing one is skipped and
named.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from npgpt.config import PUBLISHED
from npgpt.process import SHORT_TIMEOUT, THREAD_VARIABLES

from . import report, weights
from .engines import ENGINES
from .peers import INT8
from .report import BEFORE
from .workloads import plan, prefill, prompts

REFERENCE = "npgpt float64"
STARTS = {  # whole processes, timed until they exit
    "python": ["-c", ""],
    "import npgpt": ["-c", "import npgpt; npgpt.load"],
    "import torch, transformers": ["-c", "import torch; from transformers import GPT2LMHeadModel"],
    "import onnxruntime": ["-c", "import onnxruntime"],
    "import openvino_genai": ["-c", "import openvino_genai"],
    "import ctranslate2": ["-c", "import ctranslate2"],
    "import llama_cpp": ["-c", "import llama_cpp"],
    "npgpt --help": ["-m", "npgpt", "--help"],
}


def main() -> None:
    """Run all workloads and write the report."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=(*PUBLISHED, "toy"), nargs="+", default=["gpt2"], help="shapes to run")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for every engine (default: all cores)")
    parser.add_argument("--rounds", type=int, default=7, help="processes of each engine (default: 7)")
    parser.add_argument("--engine", choices=ENGINES, nargs="+", default=list(ENGINES), help="only these")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="an earlier checkout, as one more engine")
    parser.add_argument("--workload", nargs="+", help='only these, such as "prefill 128"; no starts, no memory')
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "RESULTS.md", help="the report")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / "cache", help="where weights are kept")
    options = parser.parse_args()
    known = {workload.name for model in options.model for workload in plan(model).workloads}
    if unknown := set(options.workload or ()) - known:
        parser.error(f"no workload {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    if min(options.threads, options.rounds) < 1:
        parser.error(f"--threads {options.threads} and --rounds {options.rounds} must be at least 1")
    # inherited by every process; npgpt.tune_process sets the same OpenBLAS timeout
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(options.threads)), HF_HUB_OFFLINE="1")
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", str(SHORT_TIMEOUT))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = [run(model, options) for model in options.model]
    options.out.with_suffix(".json").write_text(json.dumps(results))
    options.out.write_text(report.markdown(results, options.out.with_suffix(".svg").name))
    print(options.out.read_text())
    report.chart(results, options.out.with_suffix(".svg"))


def run(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return all samples for one model's shape: {"measures": [...], "ceilings": [...], "first": [...], …}."""
    planned = plan(model)
    source = weights.make(options.cache, model, planned.config)
    names = [w.name for w in planned.workloads if not options.workload or w.name in options.workload]
    found: dict[str, Any] = {"model": model, "threads": options.threads, "rounds": options.rounds, "skipped": {}}
    found |= {"command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]), "day": str(datetime.date.today())}
    found |= {"ceilings": [], "measures": [], "first": [], "starts": [], "memory": []}
    engines = [engine for engine in options.engine if engine != REFERENCE]  # slow, and always run once anyway
    engines += [BEFORE] if options.before else []
    paths = dict(prepared(engines, source, found["skipped"]))

    def run_engine(engine: str, **order: Any) -> tuple[list[dict[str, Any]], float]:
        folder, engine = (options.before, "npgpt") if engine == BEFORE else (None, engine)
        return process(folder, engine=engine, model=model, threads=options.threads, **order)

    order = {"model": model, "threads": options.threads}
    reference = {
        line["workload"]: line
        for line in process(task="measure", engine=REFERENCE, path=str(source), workloads=names, **order)[0]
    }
    for name, line in reference.items():
        found["measures"].append(
            {"engine": REFERENCE, "round": 0, "workload": name, "agrees": True, "seconds": line["seconds"]}
        )
    for round_ in range(options.rounds):
        lines, _ = process(task="ceilings", **order)
        found["ceilings"] += lines
        for engine, path in list(paths.items()):
            say(f"{model}, round {round_ + 1} of {options.rounds}: {engine}")
            try:
                lines, _ = run_engine(engine, task="measure", path=str(path), workloads=names)
                if not options.workload:
                    prompt = prompts(prefill(planned.first), planned.config)[0]
                    _, seconds = run_engine(engine, task="first", path=str(path), prompt=prompt)
                    found["first"].append({"engine": engine, "round": round_, "seconds": seconds})
            except Failed as error:
                found["skipped"][engine] = str(error)
                del paths[engine]
                continue
            for line in lines:
                line["agrees"] = engine in INT8 or agree(line, reference[line["workload"]])
                del line["ids"], line["log_probabilities"]
                found["measures"].append({"engine": engine, "round": round_, **line})
        if not options.workload:
            found["starts"] += starts(round_)
            seconds_of = process(task="load", path=str(source))[0][0]
            found["starts"] += [{"name": name, "round": round_, "seconds": took} for name, took in seconds_of.items()]
    for engine, path in paths.items() if not options.workload else ():
        for length in planned.memory:
            say(f"{model}, memory at {length} tokens: {engine}")
            try:
                lines, _ = run_engine(engine, task="memory", path=str(path), length=length)
                found["memory"].append({"engine": engine, "length": length, **lines[0]})
            except Failed as error:
                found["skipped"][engine] = str(error)
    found["environment"] = process(task="environment", **order)[0][0]
    return found


def prepared(engines: Iterable[str], source: Path, skipped: dict[str, str]) -> Iterator[tuple[str, Path]]:
    """Return each engine that can run and the path it opens; record in `skipped` why the others cannot."""
    for engine in engines:
        say(f"preparing {engine}")
        try:
            exported = process(task="export", engine="npgpt" if engine == BEFORE else engine, path=str(source))
            yield engine, Path(exported[0][0]["path"])
        except Failed as error:
            skipped[engine] = str(error)
            say(f"skipped {engine}: {error}")


class Failed(Exception):
    """A worker process failed; the message is its last line."""


def process(folder: Path | None = None, **order: Any) -> tuple[list[dict[str, Any]], float]:
    """Run one worker from the checkout in `folder`; return its lines and the seconds until the first one."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.worker", json.dumps(order)]
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True) as worker:
            assert worker.stdout is not None
            first = worker.stdout.readline()
            seconds = time.perf_counter() - started
            lines = [first, *worker.stdout]
        errors.seek(0)
        if worker.returncode:
            said = errors.read().decode(errors="replace").strip().splitlines()
            raise Failed(said[-1][:300] if said else f"ended with {worker.returncode}")
    return [json.loads(line) for line in lines if line], seconds


def starts(round_: int) -> Iterator[dict[str, Any]]:
    """Return the seconds that whole processes take: imports and the command line's help."""
    for name, arguments in STARTS.items():
        started = time.perf_counter()
        done = subprocess.run([sys.executable, *arguments], capture_output=True)
        if done.returncode == 0:
            yield {"name": name, "round": round_, "seconds": time.perf_counter() - started}


def agree(line: dict[str, Any], reference: dict[str, Any]) -> bool:
    """Return whether greedy ids are equal and log-probabilities within 1e-3 (float32's own error is about 1e-5)."""
    if (line["ids"], len(line["log_probabilities"])) != (reference["ids"], len(reference["log_probabilities"])):
        return False
    pairs = zip(line["log_probabilities"], reference["log_probabilities"], strict=True)
    return all(abs(a - b) < 1e-3 for a, b in pairs)


def say(message: str) -> None:
    """Print progress on stderr."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
