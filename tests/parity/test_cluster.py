"""Dask's executor over processes of their own, one of which is killed."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt.scoring import score

pytestmark = pytest.mark.parity
distributed = pytest.importorskip("distributed", reason="extra cluster is not installed")

TEXTS = [f"Letter {number}. It is a truth universally acknowledged. " * (1 + number % 5) for number in range(60)]


def test_a_killed_worker_of_a_cluster_changes_nothing() -> None:
    model = npgpt.load()
    expected = list(score(TEXTS, model, context=64, top=2))
    with (
        distributed.LocalCluster(
            n_workers=3, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        before = set(client.run(os.getpid).values())
        assert os.getpid() not in before
        assert len(before) == 3
        scores = score(TEXTS, model, client.get_executor(), context=64, top=2)
        found = [next(scores)]
        os.kill(sorted(before)[0], signal.SIGKILL)
        found += scores
        client.wait_for_workers(3, timeout=60)  # a new one has taken its place
        after = set(client.run(os.getpid).values())
    assert sorted(before)[0] not in after
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.pieces == theirs.pieces
        # a worker of Dask has one BLAS thread, and this process all of them: OpenBLAS may cut a product differently,
        # which shows in the last bits of float32
        np.testing.assert_allclose(mine.log_probs, theirs.log_probs, rtol=0, atol=2e-5)
        np.testing.assert_array_equal(mine.token_ids, theirs.token_ids)


def test_with_as_many_threads_the_cluster_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serial here means one process of the cluster's own kind."""
    model = npgpt.load()
    found = []
    for workers in (1, 2):
        with (
            distributed.LocalCluster(
                n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
            ) as cluster,
            distributed.Client(cluster) as client,
        ):
            found.append(list(score(TEXTS[:20], model, client.get_executor(), context=64)))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one.log_probs, other.log_probs)


def test_the_readmes_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    """The block as it stands there, with a cluster on this machine and the embedded model for gpt2."""
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    (block,) = (text for text in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "distributed" in text)
    with distributed.LocalCluster(n_workers=1, processes=True, dashboard_address=None, host="127.0.0.1") as cluster:
        names: dict[str, Any] = {"npgpt": npgpt, "texts": TEXTS[:3]}
        address = repr(cluster.scheduler_address)
        exec(block.replace('"scheduler:8786"', address).replace('npgpt.load("gpt2")', "npgpt.load()"), names)
        names["Client"].current().close()
    assert len(capsys.readouterr().out.splitlines()) == 3
