"""The workloads, and how one measurement is taken with any engine."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from npgpt.config import PUBLISHED, Config

LEAST = 0.3  # seconds


class Engine(Protocol):
    """A model opened by some engine, with ids in and ids out."""

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """Return `new` greedy ids after each prompt (all of one length): one prefill, then new - 1 steps."""

    def score(self, ids: list[int]) -> list[float]:
        """Return the log-probability of each of ids[1:]. Raises NotImplementedError if the engine cannot."""


@dataclass(frozen=True)
class Workload:
    """One row of the table; a decode takes `new` steps after prompts of `length` tokens."""

    name: str
    kind: Literal["prefill", "decode", "score"]
    length: int
    batch: int = 1
    new: int = 0


@dataclass(frozen=True)
class Measure:
    """Seconds of one prefill, step or scoring, and its result: ids of every row, or log-probabilities."""

    seconds: float
    ids: list[list[int]]
    log_probabilities: list[float]


@dataclass(frozen=True)
class Plan:
    """A model's shape and its workloads."""

    config: Config
    workloads: tuple[Workload, ...]
    memory: tuple[int, ...]  # prompt lengths at which memory is read
    first: int  # prompt length of the first token after a process start
    least: float = LEAST  # seconds that the timed calls of one measure take together, at least

    def named(self, name: str) -> Workload:
        """Return the workload of that name."""
        return next(workload for workload in self.workloads if workload.name == name)


def prefill(length: int) -> Workload:
    """Return a workload that reads a whole prompt at once and wants the last token's logits."""
    return Workload(f"prefill {length}", "prefill", length)


def decode(after: int, new: int) -> Workload:
    """Return a workload that decodes one sequence token by token."""
    return Workload(f"decode after {after}", "decode", after, new=new)


def batch(size: int, length: int, new: int) -> Workload:
    """Return a workload that decodes `size` sequences side by side."""
    return Workload(f"batch {size}", "decode", length, batch=size, new=new)


TOY = Plan(
    Config(n_layer=2, n_head=2, n_embd=128, n_positions=64, vocab_size=512),
    (prefill(4), prefill(64), decode(8, 4), batch(1, 4, 4), batch(2, 4, 4), Workload("score 32", "score", 32)),
    memory=(64,),
    first=4,
    least=0.02,
)


def plan(model: str) -> Plan:
    """Return all workloads for gpt2, prefill and decoding for larger models, and tiny ones for "toy"."""
    if model == "toy":
        return TOY
    if model == "gpt2":
        prefills = tuple(prefill(length) for length in (16, 128, 512, 1024))
        decodes = (decode(128, 64), decode(900, 64))
        batches = tuple(batch(size, 32, 32) for size in (1, 2, 4, 8, 16))
        workloads = (*prefills, *decodes, *batches, Workload("score 1024", "score", 1024))
        return Plan(PUBLISHED[model], workloads, memory=(128, 1024), first=16)
    return Plan(PUBLISHED[model], (prefill(128), prefill(1024), decode(128, 16)), memory=(128, 1024), first=16)


def prompts(workload: Workload, config: Config) -> list[list[int]]:
    """Return random ids, the same in every process."""
    draw = random.Random(f"{workload.name} {config.vocab_size}")
    return [[draw.randrange(config.vocab_size) for _ in range(workload.length)] for _ in range(workload.batch)]


def measure(engine: Engine, workload: Workload, config: Config, least: float = LEAST) -> Measure:
    """Return the median of several calls after a warm-up. Raises NotImplementedError if the engine does."""
    ids = prompts(workload, config)
    if workload.kind == "score":
        log_probabilities = engine.score(ids[0])
        return Measure(statistics.median(times(lambda: engine.score(ids[0]), least)), [], log_probabilities)
    if workload.kind == "prefill":
        out = engine.generate(ids, 1)
        return Measure(statistics.median(times(lambda: engine.generate(ids, 1), least)), out, [])
    out = engine.generate(ids, workload.new + 1)
    engine.generate(ids, 1)
    long: list[float] = []
    short: list[float] = []
    for seconds in times(lambda: engine.generate(ids, workload.new + 1), least):
        long.append(seconds)
        short += times(lambda: engine.generate(ids, 1), least=0)
    return Measure((statistics.median(long) - statistics.median(short)) / workload.new, out, [])


def times(run: Callable[[], object], least: float = LEAST) -> Iterator[float]:
    """Return the seconds of repeated calls, until they add up to `least`."""
    total = 0.0
    while True:
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
        total += seconds
        yield seconds
        if total >= least:
            return
