"""Processes of this machine that compute for this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from ..process import THREAD_VARIABLES, cores, tune_process


@contextmanager
def processes(count: int, threads: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """An executor of so many new processes, each with so many BLAS threads, by default its share of the cores.

    They are started afresh, since a fork of threads may hang. They leave Ctrl-C to this process, and end with it, even
    where it is killed; an exception within ends them at once, whatever they are at.
    """
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_start)
    others = multiprocessing.active_children()
    with pool:
        with _inherited(str(threads or max(1, cores() // count))):
            for _ in range(count):  # each starts one, while none of them is ready for more
                pool.submit(int)
        started = [child for child in multiprocessing.active_children() if child not in others]
        try:
            yield pool
        except BaseException:
            for child in started:
                child.terminate()
            raise


@contextmanager
def _inherited(threads: str) -> Iterator[None]:
    """What new processes find: so many threads, which NumPy reads as it is imported, and Ctrl-C ignored."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    main = threading.current_thread() is threading.main_thread()  # signals are its alone
    heeded = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, threads))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        if main:
            signal.signal(signal.SIGINT, heeded)


def _start() -> None:
    """Set up a pool's process, and end it with its parent: it would wait for work for ever."""
    tune_process()

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
