"""A pool of worker processes for scoring on this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from ..process import THREAD_VARIABLES, cores, handling, tune_process


@contextmanager
def processes(count: int, threads: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """Provide an executor with `count` new processes, each with `threads` BLAS threads (default: its share of cores).

    The processes are spawned, because forking a process with threads may hang. They ignore Ctrl-C and end with this
    process, even if it is killed. An exception inside the context terminates them at once.
    """
    threads = threads or max(1, cores() // count)
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _start, (threads,)) as pool:
        with handling(["SIGINT"], signal.SIG_IGN):  # the processes inherit it
            for _ in range(count):  # each call starts one process, since none is idle yet
                pool.submit(int)
        started = [process for process in multiprocessing.active_children() if process not in others]
        try:
            yield pool
        except BaseException:
            for process in started:
                process.terminate()
            raise


def _start(threads: int) -> None:
    """Set up a worker before it imports NumPy, and end it with its parent; otherwise it would wait forever."""
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    tune_process()

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
