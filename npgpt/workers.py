"""Processes of this machine that compute for this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from .threads import VARIABLES, cores


@contextmanager
def processes(count: int, threads: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """An executor of so many new processes, each with so many BLAS threads, by default its share of the cores.

    They are started afresh, since a fork of threads may hang. They leave Ctrl-C to this process, and end with it, even
    where it is killed.
    """
    share = str(threads or max(1, cores() // count))
    before = {name: os.environ.get(name) for name in VARIABLES}
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_end_with_parent)
    main = threading.current_thread() is threading.main_thread()
    heeded = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None  # which new processes inherit
    os.environ.update(dict.fromkeys(VARIABLES, share))  # likewise, and NumPy reads it as it is imported
    try:
        pool.submit(int)  # starts all of them
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        if main:
            signal.signal(signal.SIGINT, heeded)
    with pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """A pool's process waits for work for ever, since it holds both ends of the queue itself."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
