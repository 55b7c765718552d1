"""Processes of this machine that compute for this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

from ..process import THREAD_VARIABLES, cores, tune_process


@contextmanager
def processes(count: int, threads: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """Give an executor of so many new processes, each with so many BLAS threads, by default its share of the cores.

    They are started afresh, since a fork of threads may hang. They leave Ctrl-C to this process, and end with it, even
    where it is killed; an exception within ends them at once, whatever they are at.
    """
    threads = threads or max(1, cores() // count)
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _start, (threads,)) as pool:
        started = _started(pool, count)
        try:
            yield pool
        except BaseException:
            for process in started:
                process.terminate()
            raise


def _started(pool: ProcessPoolExecutor, count: int) -> list[BaseProcess]:
    """Start a pool's processes, which find Ctrl-C ignored from their first moment on."""
    others = multiprocessing.active_children()
    main = threading.current_thread() is threading.main_thread()  # signals are its alone
    heeded = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        for _ in range(count):  # each starts one, while none of them is ready for more
            pool.submit(int)
    finally:
        if main:
            signal.signal(signal.SIGINT, heeded)
    return [process for process in multiprocessing.active_children() if process not in others]


def _start(threads: int) -> None:
    """Set a process up before it imports NumPy, and let it end with its parent: it would wait for work for ever."""
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    tune_process()

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
