"""Dask's executor over separate processes, one of which is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import npgpt
from npgpt.process import THREAD_VARIABLES
from npgpt.scoring.scoring import score

pytestmark = pytest.mark.parity
distributed = pytest.importorskip("distributed", reason="extra cluster is not installed")

TEXTS = [f"Letter {number}. It is a truth universally acknowledged. " * (1 + number % 9) for number in range(90)]


def serial() -> list[Any]:
    """Return ids, log-probabilities and ranks from one process with one BLAS thread, as Dask's workers have."""
    code = (
        "import json, sys, npgpt\n"
        "found = npgpt.score(json.load(sys.stdin), context=64, top=2)\n"
        "print(json.dumps([[s.token_ids.tolist(), s.log_probs.tolist(), s.ranks.tolist()] for s in found]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(TEXTS),
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | dict.fromkeys(THREAD_VARIABLES, "1"),
    )
    found: list[Any] = json.loads(done.stdout)
    return found


def test_a_killed_worker_of_a_cluster_changes_nothing() -> None:
    """Results are complete, in order, and bit for bit those of a serial run."""
    with (
        distributed.LocalCluster(
            n_workers=3, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        before = set(client.run(os.getpid).values())
        assert os.getpid() not in before
        assert len(before) == 3
        executor = client.get_executor()
        submitted: list[Any] = []
        submit = executor.submit

        def noted(*work: Any) -> Any:
            submitted.append(submit(*work))
            return submitted[-1]

        executor.submit = noted
        scores = score(TEXTS, npgpt.load(), executor, context=64, top=2)
        found = [next(scores)]
        os.kill(sorted(before)[0], signal.SIGKILL)
        assert not all(future.done() for future in submitted), "it was not in the middle"
        found += scores
        client.wait_for_workers(3, timeout=60)  # a new worker has replaced it
        after = set(client.run(os.getpid).values())
    assert sorted(before)[0] not in after
    assert [[s.token_ids.tolist(), s.log_probs.tolist(), s.ranks.tolist()] for s in found] == serial()
