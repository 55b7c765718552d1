from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from npgpt import process
from npgpt.process import THREAD_VARIABLES, thread_count


@pytest.fixture
def no_variable(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for variable in THREAD_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("OPENBLAS_THREAD_TIMEOUT", "20")
    return monkeypatch


def test_as_many_threads_as_the_user_says_and_never_more_than_cores(no_variable: pytest.MonkeyPatch) -> None:
    cores = thread_count()
    assert 1 <= cores <= (os.cpu_count() or 1)
    for said, expected in (("1", 1), ("100000", cores), ("0", cores), ("", cores), ("two", cores), ("-1", cores)):
        no_variable.setenv("OMP_NUM_THREADS", said)
        assert thread_count() == expected, said
    no_variable.setenv("OMP_NUM_THREADS", "100000")
    no_variable.setenv("OPENBLAS_NUM_THREADS", "1")  # the library's own word comes first
    assert thread_count() == 1


@pytest.mark.parametrize(("timeout", "more"), [("20", True), ("4", True), ("21", False), ("", False), ("soon", False)])
def test_none_beside_openblas_threads_that_stay_awake(
    no_variable: pytest.MonkeyPatch, timeout: str, more: bool
) -> None:
    no_variable.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    no_variable.setenv("OPENBLAS_THREAD_TIMEOUT", timeout)
    assert thread_count() == (3 if more else 1)
    no_variable.delenv("OPENBLAS_THREAD_TIMEOUT")
    assert thread_count() == 1


# --- what is asked of OpenBLAS and of the allocator ------------------------------------------------------------------

KEPT = "freed memory is kept for the next array (mallopt)"
TUNED = ("OPENBLAS_THREAD_TIMEOUT", "GLIBC_TUNABLES")


def in_new_process(code: str, **environment: str) -> Any:
    """Return the JSON that code prints in a new process with only the given variables of those concerned."""
    plain = {k: v for k, v in os.environ.items() if k not in TUNED and not k.startswith("MALLOC_")}
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", f"import json, os, npgpt.process as process\n{code}"]
    done = subprocess.run(command, capture_output=True, cwd=root, env=plain | environment, check=True)
    return json.loads(done.stdout)


def tuned(before: str, **environment: str) -> tuple[list[str], dict[str, str]]:
    """Return what tune_process reports after `before`, and the resulting environment variables."""
    shown = f"print(json.dumps([process.tune_process(), {{k: os.environ[k] for k in {TUNED} if k in os.environ}}]))"
    said, variables = in_new_process(f"process.keep_freed_memory = lambda: 'memory'\n{before}\n{shown}", **environment)
    return said, variables


def test_openblas_threads_sleep_soon_unless_the_user_says_when() -> None:
    assert tuned("") == (["OPENBLAS_THREAD_TIMEOUT=20", "memory"], {"OPENBLAS_THREAD_TIMEOUT": "20"})
    stays = ["OPENBLAS_THREAD_TIMEOUT=26 stays as it was set", "memory"]
    assert tuned("", OPENBLAS_THREAD_TIMEOUT="26") == (stays, {"OPENBLAS_THREAD_TIMEOUT": "26"})


def test_once_numpy_is_there_openblas_is_told_nothing() -> None:
    """A variable set too late has no effect, but thread_count would trust it."""
    late = "OPENBLAS_THREAD_TIMEOUT=20 comes too late: NumPy is already imported in this process"
    assert tuned("import numpy") == ([late, "memory"], {})


def test_importing_npgpt_and_loading_a_model_changes_nothing_in_the_process() -> None:
    code = "before = dict(os.environ); import npgpt; npgpt.load()([1]); print(json.dumps(before == dict(os.environ)))"
    assert in_new_process(code) is True


@pytest.mark.skipif(not process.has_glibc(), reason="mallopt is glibc's")
@pytest.mark.parametrize("environment", [{}, {"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}])
def test_freed_memory_is_kept_unless_the_user_has_his_own_wishes(environment: dict[str, str]) -> None:
    """64 MB are 16,384 pages, each faulted in again if glibc returns freed memory."""
    code = """
said = process.keep_freed_memory()
import resource
faults = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(b'1') * 2**26
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([said, faults[-1]]))
"""
    said, faults = in_new_process(code, **environment)
    left = f"freed memory is left to the allocator: {', '.join(environment)} is set"
    assert said == (left if environment else KEPT)
    assert faults < 1000 if not environment else faults > 10_000


def test_another_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in (ValueError("unrecognized configuration name"), OSError(22, "Invalid argument")):

        def confstr(name: str, answer: Exception = answer) -> str:
            raise answer

        monkeypatch.setattr(os, "confstr", confstr)
        assert process.keep_freed_memory() == "freed memory is left to the allocator, which is not glibc's"
