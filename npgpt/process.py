"""What this process asks of the system and of the libraries under NumPy: threads, memory, signals. Imports no NumPy."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# The libraries under NumPy read these as it is imported; the most common comes first.
THREAD_VARIABLES = (
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "OMP_NUM_THREADS",
)
SHORT_TIMEOUT = 20  # 2²⁰ ticks, 0.4 ms: less than attention takes, more than passes between two products of a token
# mallopt's parameters (malloc.h) and values for arrays of some megabytes that come and go: they are taken from the
# heap, not from mmap; the heap is never given back, and grows by 64 MiB at a time
MALLOC_PARAMETERS = {-3: 2**30, -1: 2**31 - 1, -2: 2**26}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD


def tune_process() -> list[str]:
    """Set this process up to run GPT-2 on a CPU, before NumPy is imported; return a line for each thing done or left.

    The command line calls it. In Python it is left to the user, since its effects reach beyond npgpt.
    OPENBLAS_THREAD_TIMEOUT lets OpenBLAS's threads sleep soon after a product, so that npgpt's own find free cores.
    glibc is told to keep freed memory for the next array: it would otherwise return a large array to the system, and
    every page of the next one would be faulted in and zeroed. What the user has set in the environment stays.
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
    """Make glibc keep freed memory in the process, unless the user has tuned it; return what was done."""
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
    """Tell whether the C library is glibc."""
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):  # another system, or another library that does not know the name
        return False


def thread_count() -> int:
    """Return how many threads of npgpt's own pay: as many as NumPy's products use, or 1 where OpenBLAS's stay awake.

    Between two products OpenBLAS's threads stay awake, by default for 2²⁶ ticks of the clock (some 26 ms), and other
    threads on the same cores then gain nothing. The environment says how many threads products use, up to every core
    of this process.
    """
    if not 0 < _number("OPENBLAS_THREAD_TIMEOUT") <= SHORT_TIMEOUT:
        return 1
    return blas_threads()


def blas_threads() -> int:
    """Return how many threads NumPy's products use: as many as the environment says, up to every core."""
    return min(cores(), next(filter(None, map(_number, THREAD_VARIABLES)), cores()))


@contextmanager
def handling(names: Sequence[str], handler: Callable[[int, Any], object] | signal.Handlers) -> Iterator[None]:
    """Handle signals this way within the context; in another thread than the main one, which takes them, do nothing."""
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
    """Return the number in an environment variable, 0 where it holds none."""
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else 0
