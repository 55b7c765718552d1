"""Settings of this process: the threads of NumPy's BLAS, memory, signals. Imports no NumPy."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# BLAS libraries read these when NumPy is imported; the most common one comes first.
THREAD_VARIABLES = (
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "OMP_NUM_THREADS",
)
SHORT_TIMEOUT = 20  # 2²⁰ ticks, 0.4 ms: shorter than attention, longer than the gap between two products of a token
# mallopt's parameters (malloc.h) and values, for arrays of some megabytes that come and go: allocate them on the heap,
# not by mmap; never return the heap; grow it by 64 MiB at a time
MALLOC_PARAMETERS = {-3: 2**30, -1: 2**31 - 1, -2: 2**26}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD


def tune_process() -> list[str]:
    """Set this process up to run GPT-2 on a CPU, before NumPy is imported; return a line for each setting.

    The command line calls this. In Python it is up to the user, because the effects reach beyond npgpt.
    OPENBLAS_THREAD_TIMEOUT lets OpenBLAS's threads sleep soon after a product, so that npgpt's own threads find free
    cores. glibc is told to keep freed memory for the next array; otherwise it returns large arrays to the system, and
    every page of the next array is faulted in and zeroed. Variables that are set in the environment keep their values.
    """
    variable, value = "OPENBLAS_THREAD_TIMEOUT", str(SHORT_TIMEOUT)
    if variable in os.environ:
        threads = f"{variable}={os.environ[variable]} stays as it was set"
    elif "numpy" in sys.modules:
        threads = f"{variable}={value} comes too late: NumPy is already imported in this process"
    else:
        os.environ[variable] = value
        threads = f"{variable}={value}"
    return [threads, keep_freed_memory()]


def keep_freed_memory() -> str:
    """Make glibc keep freed memory in the process, unless the user has tuned it; return what was done, in words."""
    if not has_glibc():
        return "freed memory is left to the allocator, which is not glibc's"
    users = sorted(name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES")
    if users:
        return f"freed memory is left to the allocator: {', '.join(users)} is set"
    import ctypes

    mallopt = ctypes.CDLL(None).mallopt
    if 0 in [mallopt(parameter, value) for parameter, value in MALLOC_PARAMETERS.items()]:
        return "freed memory is left to the allocator, which refused mallopt"
    return "freed memory is kept for the next array (mallopt)"


def has_glibc() -> bool:
    """Return whether the C library is glibc."""
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):  # another system, or a C library that does not know the name
        return False


def thread_count() -> int:
    """Return how many threads of npgpt's own pay off: as many as the BLAS has, or 1 if OpenBLAS's threads stay awake.

    After a product, OpenBLAS's threads stay awake for 2²⁶ clock ticks by default (some 26 ms), and other threads on the
    same cores then gain nothing.
    """
    if not 0 < _number("OPENBLAS_THREAD_TIMEOUT") <= SHORT_TIMEOUT:
        return 1
    return blas_threads()


def blas_threads() -> int:
    """Return how many threads NumPy's matrix products use: what the environment says, at most one per core."""
    return min(cores(), next(filter(None, map(_number, THREAD_VARIABLES)), cores()))


@contextmanager
def handling(names: Sequence[str], handler: Callable[[int, Any], object] | signal.Handlers) -> Iterator[None]:
    """Handle signals this way within the context. Only the main thread can; in any other thread this does nothing."""
    main = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in names if main and hasattr(signal, name)]
    previous = [(number, signal.signal(number, handler)) for number in numbers]
    try:
        yield
    finally:
        for number, before in previous:
            signal.signal(number, before)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _number(variable: str) -> int:
    """Return the number in an environment variable; 0 if it holds none."""
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else 0
