"""How many threads the user wants, and work shared out among them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextvars import copy_context
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


def thread_count() -> int:
    """As many threads as NumPy's matrix products use: what the environment says, or every core of this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    said = (os.environ.get(variable, "") for variable in VARIABLES)
    return min([cores, *(int(number) for number in said if number.isdecimal() and int(number) > 0)][:2])


def in_threads(threads: int, run: Callable[[T], object], jobs: Iterable[T]) -> None:
    """run(job) for every job, each taken by the first of so many threads that is free; this thread is one of them.

    The threads end with the call, so that nothing outlives it, a fork included. They see the caller's context
    (np.errstate lives there). An exception of run comes out of here, once every thread has ended.
    """
    queue = list(jobs)
    helpers = min(threads, len(queue)) - 1
    remaining = iter(queue)

    def work() -> None:
        for job in remaining:
            run(job)

    if helpers < 1:
        work()
        return
    from concurrent.futures import ThreadPoolExecutor  # 8 ms that a short prompt never needs

    with ThreadPoolExecutor(helpers) as pool:
        others = [pool.submit(copy_context().run, work) for _ in range(helpers)]
        work()
        for other in others:
            other.result()
