from __future__ import annotations

import os
import threading

import numpy as np
import pytest

from npgpt.threads import VARIABLES, in_threads, thread_count


@pytest.fixture
def no_variable(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for variable in VARIABLES:
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


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_job_is_done_once_and_nothing_outlives_the_call(threads: int) -> None:
    for jobs in (0, 1, 2, 100):
        before, done, ran_in = threading.active_count(), [], set()

        def run(job: int) -> None:
            ran_in.add(threading.get_ident())  # noqa: B023
            done.append(job)  # noqa: B023

        in_threads(threads, run, range(jobs))
        assert sorted(done) == list(range(jobs))
        assert len(ran_in) <= min(threads, max(jobs, 1))
        assert threading.active_count() == before


def test_jobs_run_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=30)  # passes only when three threads wait at it
    in_threads(3, lambda _: together.wait(), range(3))


@pytest.mark.parametrize("threads", [1, 3])
def test_an_exception_and_the_callers_error_state_cross_over(threads: int) -> None:
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        in_threads(threads, lambda job: np.float32(1e38) * job, [np.float32(1), np.float32(1), np.float32(1000)])
    with np.errstate(over="ignore"):
        in_threads(threads, lambda job: np.float32(1e38) * job, [np.float32(1000)] * 50)
