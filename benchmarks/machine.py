"""Measure the machine's own limits in the same run: rates that no forward pass can exceed."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from npgpt.config import Config
from npgpt.parameters import count

from .workloads import times

READ = 2**29  # bytes read at a time, far more than any cache holds
SGEMM = (1024, 768, 3072)
PACKAGES = (
    *("numpy", "torch", "transformers", "onnxruntime", "openvino", "openvino-genai", "ctranslate2"),
    *("llama-cpp-python", "llms-from-scratch"),
)


def bandwidth(threads: int) -> float:
    """Return the bytes a second that `threads` threads together read from memory while summing squares."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    parts = np.array_split(np.ones(READ // 4, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:  # NumPy releases the GIL in a product
        seconds = list(times(lambda: list(pool.map(np.vdot, parts, parts))))
    return READ / statistics.median(seconds)


def sgemm() -> float:
    """Return the floating-point operations a second of NumPy's float32 product of 1024 × 768 by 768 × 3072."""
    import numpy as np

    m, k, n = SGEMM
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((m, k), np.float32), generator.standard_normal((k, n), np.float32)
    a @ b
    return 2 * m * k * n / statistics.median(times(lambda: a @ b))


def prefill_operations(config: Config, length: int) -> float:
    """Return the operations a prefill needs: the blocks' products, half the attention square, one row of the head."""
    C, F = config.n_embd, config.inner_width
    products = 2 * length * (4 * C * C + 2 * C * F)
    square = 2 * 2 * C * length * (length + 1) / 2  # scores and values, a key for every query that sees it
    return config.n_layer * (products + square) + 2 * C * config.vocab_size


def token_bytes(config: Config, seen: float, batch: int = 1) -> float:
    """Return the bytes a decoding step must read: all weights once, and keys and values of `seen` tokens a row."""
    # wte serves as the head; only one row of wpe is read
    weights = sum(count(config).values()) - config.n_positions * config.n_embd
    return 4 * (weights + batch * seen * 2 * config.n_layer * config.n_embd)


def blas() -> str:
    """Return the BLAS library and kernel that NumPy uses, if threadpoolctl is installed."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return "unknown (threadpoolctl is not installed)"
    import numpy as np  # noqa: F401  (loads its BLAS)

    found = [library for library in threadpool_info() if library["user_api"] == "blas"]
    return ", ".join(f"{x['internal_api']} {x['version']} {x.get('architecture', '')}".strip() for x in found)


def processor() -> str:
    """Return the processor's name as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    wide = " (AVX-512)" if "avx512f" in named.get("flags", "") else ""
    return f"{named.get('model name', 'unknown')} family {named.get('cpu family', '?')}{wide}"


def environment() -> dict[str, str]:
    """Return the environment of a run: processor, cores, Python, NumPy's BLAS, and all packages' versions."""
    return {
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "blas": blas(),
        "packages": ", ".join(versions()),
    }


def versions() -> Iterator[str]:
    """Return the versions of the packages that are installed."""
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield f"{package} {metadata.version(package)}"
