"""How many threads the user wants, and work shared out among them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextvars import copy_context
from threading import Thread
from typing import TypeVar

T = TypeVar("T")

# What the libraries under NumPy read when it is imported, the most common first.
VARIABLES = (
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "OMP_NUM_THREADS",
)
SHORT_TIMEOUT = 20  # 2²⁰ ticks, 0.4 ms: less than attention takes, more than lies between two products of a token


def thread_count() -> int:
    """How many threads of our own pay: as many as NumPy's products use, or this one where OpenBLAS's stay awake.

    Between two products OpenBLAS's threads wait awake, for 2²⁶ ticks of the clock (some 26 ms) unless told otherwise,
    and threads on the same cores are then no gain. As many as products use is what the environment says, up to every
    core of this process.
    """
    if not 0 < _number("OPENBLAS_THREAD_TIMEOUT") <= SHORT_TIMEOUT:
        return 1
    return min(cores(), next(filter(None, map(_number, VARIABLES)), cores()))


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _number(variable: str) -> int:
    """What an environment variable says, 0 where that is no number."""
    said = os.environ.get(variable, "")
    return int(said) if said.isdecimal() else 0


def in_threads(threads: int, run: Callable[[T], object], jobs: Iterable[T]) -> None:
    """run(job) for every job, each taken by the first of so many threads that is free; this thread is one of them.

    The threads end with the call, so that nothing outlives it, a fork included. They see the caller's context
    (np.errstate lives there). An exception of run comes out of here, once every thread has ended.
    """
    queue = list(jobs)
    remaining = iter(queue)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for job in remaining:
                run(job)
        except BaseException as failure:  # for the caller, whichever thread it was in
            failures.append(failure)

    helpers = [Thread(target=copy_context().run, args=(work,)) for _ in range(min(threads, len(queue)) - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]
