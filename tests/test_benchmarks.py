"""The benchmark at toy size, and its verdicts on invented figures. No time is asserted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from benchmarks import __main__, machine, report
from benchmarks.workloads import Workload, plan, prefill
from npgpt.config import PUBLISHED
from tests.support.thorough import only_thorough

ROOT = Path(__file__).parent.parent


def toy(folder: Path, *arguments: str) -> str:
    """Run the benchmark at toy size and return its report."""
    command = [sys.executable, "-m", "benchmarks", "--model", "toy", "--rounds", "1", "--threads", "1", *arguments]
    command += ["--out", str(folder / "RESULTS.md"), "--cache", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (folder / "RESULTS.md").read_text()


def test_one_workload_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run starts from this process with known machine limits, because measuring those takes longest."""
    process = __main__.process

    def known(folder: Path | None = None, **order: Any) -> tuple[list[dict[str, Any]], float]:
        if order["task"] == "ceilings":
            return [{"sgemm": 1e11, "bandwidth": 1e10}], 0.0
        return process(folder, **order)

    command = ["benchmarks", "--model", "toy", "--rounds", "1", "--threads", "1", "--cache", str(tmp_path)]
    command += ["--engine", "npgpt", "npgpt, misaligned file", "--workload", "prefill 4"]
    monkeypatch.setattr(__main__, "process", known)
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "RESULTS.md")])
    monkeypatch.chdir(ROOT)
    with mock.patch.dict(os.environ):
        __main__.main()
    text = (tmp_path / "RESULTS.md").read_text()
    assert re.search(r"^\| npgpt, misaligned file \| .*[0-9] s ", text, re.MULTILINE)
    assert "not counted" not in text
    header = (tmp_path / "toy.misaligned" / "model.safetensors").read_bytes()[:8]
    assert int.from_bytes(header, "little") % 4 == 3


@only_thorough
def test_a_run_at_toy_size_writes_a_report(tmp_path: Path) -> None:
    text = toy(tmp_path, "--engine", "npgpt", "npgpt, misaligned file")
    for workload in plan("toy").workloads:
        assert re.search(rf"\| {workload.name}\b", text), workload
    for row in (
        "npgpt",
        "npgpt, misaligned file",
        "`mapping the weights`",
        "the machine's limit",
        "`npgpt --help`",
        "weights and cache alone",
    ):
        assert f"| {row} |" in text
    assert "python -m benchmarks --model toy" in text
    assert "not counted" not in text
    assert "not run" not in text
    assert json.loads((tmp_path / "RESULTS.json").read_text())[0]["measures"]


def made_up(npgpt: float, peer: float) -> dict[str, Any]:
    """Return three rounds on gpt2's shape with the given seconds for every workload."""
    measures = [
        {"engine": engine, "round": round_, "workload": workload.name, "seconds": seconds, "agrees": True}
        for workload in plan("gpt2").workloads
        for engine, seconds in (("npgpt", npgpt), ("peer", peer))
        for round_ in range(3)
    ]
    ceilings = [{"sgemm": 200e9, "bandwidth": 50e9}] * 3
    found = {"measures": measures, "ceilings": ceilings, "first": [], "starts": [], "memory": [], "skipped": {}}
    where = {"processor": "", "cores": "2", "system": "", "python": "", "blas": "", "packages": ""}
    run = {"model": "gpt2", "threads": 2, "rounds": 3, "command": "python -m benchmarks", "day": "2026-11-24"}
    return {**run, "environment": where, **found}


@pytest.mark.parametrize(("npgpt", "peer", "ahead"), [(1.0, 1.2, True), (1.2, 1.0, False), (1.0, 1.0, False)])
def test_ahead_is_told_from_behind(npgpt: float, peer: float, ahead: bool) -> None:
    met = {aim: reached for aim, _, reached in report.aims(made_up(npgpt, peer))}
    assert met["prefill 128: ahead of every float32 peer"] is ahead
    assert met["decode after 128: ahead of every float32 peer"] is (npgpt <= peer)  # a tie is enough


@pytest.mark.parametrize(("seconds", "reached"), [(1.2, True), (1.22, False)])
def test_the_share_of_the_ceiling(seconds: float, reached: bool) -> None:
    """193.5 GFLOP take 0.968 s at 200 GFLOP/s, and 1.209 s at 80 % of that rate."""
    aims = {aim: (found, met) for aim, found, met in report.aims(made_up(seconds, 2.0))}
    assert aims["prefill 1024: at least 80 % of sgemm"] == ("81% (81%–81%)" if reached else "79% (79%–79%)", reached)


def test_ids_that_are_others_do_not_count() -> None:
    result = made_up(1.0, 0.5)
    for line in result["measures"]:
        line["agrees"] = line["engine"] == "npgpt"
    text = report.markdown([result], "chart.svg")
    assert "not counted, since its ids are others: peer, prefill 1024" in text
    assert "behind" not in text


def test_what_has_to_be_computed_and_read() -> None:
    """gpt2 needs 193.5 GFLOP for 1024 tokens and reads 0.49 GB for each new token."""
    config = PUBLISHED["gpt2"]
    assert machine.prefill_operations(config, 1024) == pytest.approx(193.5e9, rel=1e-3)
    assert machine.token_bytes(config, 0) == 4 * (124_439_808 - 1024 * 768)
    # keys and values of 100 tokens in two rows: 12 blocks of 2 × 768 floats
    assert machine.token_bytes(config, 100, 2) - machine.token_bytes(config, 0) == 2 * 100 * 12 * 2 * 768 * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--workload", "prefill 3"], "no workload prefill 3; there are batch 1"), (["--rounds", "0"], "--rounds 0")],
)
def test_a_run_that_cannot_be_is_refused(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["benchmarks", "--model", "toy", *arguments, "--out", str(tmp_path / "R.md")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="2"):
        __main__.main()
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("ours", "peer", "met"), [(0.2, 0.3, True), (0.3, 0.2, False), (0.6, 0.7, False)])
def test_the_first_token_has_to_be_soon_and_first(ours: float, peer: float, met: bool) -> None:
    result = made_up(1.0, 1.0)
    result["first"] = [
        {"engine": engine, "round": 0, "seconds": seconds}
        for engine, seconds in (("npgpt", ours), ("peer", peer), ("llama.cpp Q8_0", 0.01))
    ]
    assert [reached for aim, _, reached in report.aims(result) if "first token" in aim] == [met]


def test_figures_are_given_as_readers_expect() -> None:
    assert report.figure(prefill(128), 0.1234) == "0.123 s"
    assert report.figure(Workload("batch 8", "decode", 32, batch=8, new=32), 0.02) == "400"
    assert report.figure(Workload("decode", "decode", 32, new=32), 0.0123) == "81.3"


def test_growth_has_a_shape_a_column() -> None:
    small, large = made_up(1.0, 2.0), made_up(4.0, 6.0) | {"model": "gpt2-medium"}
    large["measures"] = [m for m in large["measures"] if m["workload"] in ("prefill 128", "prefill 1024")]
    lines = list(report.growth([small, large]))
    assert lines[:4] == [
        "| prefill 128 | gpt2 | gpt2-medium |",
        "| --- | --- | --- |",
        "| npgpt | 1.000 s | 4.000 s |",
        "| peer | 2.000 s | 6.000 s |",
    ]
    assert [line for line in lines if line.startswith("| prefill")] == [
        lines[0],
        "| prefill 1024 | gpt2 | gpt2-medium |",
    ]
