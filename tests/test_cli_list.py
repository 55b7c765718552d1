"""npgpt list on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from npgpt.checkpoints import find, places
from tests.support.command import here
from tests.support.models import small, store
from tests.support.places import VARIABLES


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a model into ./weights/, a damaged one into $NPGPT_WEIGHTS, and one into the cache."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NPGPT_WEIGHTS", str(tmp_path / "own"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    store(tmp_path / "weights" / "tiny", small())
    for empty in ("empty", "also/empty"):
        (tmp_path / "weights" / empty).mkdir(parents=True)
    store(tmp_path / "cache" / "models--org--story" / "snapshots" / "abc", small(n_layer=1))
    damaged = store(tmp_path / "own" / "broken", small()) / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    return tmp_path


def test_models_with_size_and_place(machine: Path) -> None:
    code, out, error = here("list")
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert (code, error) == (0, "")
    assert list(rows) == ["austen", "tiny", "broken", "org/story"]
    assert rows["austen"].split() == ["austen", "7.0", "MB", str(places.EMBEDDED_WEIGHTS / "austen/model.safetensors")]
    assert rows["tiny"].endswith(" 0.1 MB  weights/tiny/model.safetensors")
    assert "unreadable: own/broken" in rows["broken"].replace(f"{machine}/", "")
    assert rows["org/story"].endswith("cache/models--org--story/snapshots/abc/model.safetensors")


def test_json(machine: Path) -> None:
    code, out, _ = here("list", "--json", terminal=True, COLUMNS="40")
    found: dict[str, Any] = {row["name"]: row for row in map(json.loads, out.splitlines())}
    assert code == 0
    size = (machine / "weights/tiny/model.safetensors").stat().st_size
    assert found["tiny"] == {
        "name": "tiny",
        "path": "weights/tiny/model.safetensors",
        "bytes": size,
        "parameters": found["tiny"]["parameters"],
        "error": None,
    }
    assert found["austen"]["parameters"] == 3_505_152
    assert found["broken"]["bytes"] is None
    assert "own/broken/model.safetensors" in found["broken"]["error"]


def test_every_readable_model_is_found_by_its_name(machine: Path) -> None:
    for row in map(json.loads, here("list", "--json")[1].splitlines()):
        if row["error"] is None:
            assert str(find.find(row["name"]).weights) == row["path"]
            assert here("inspect", row["name"])[0] == 0


def test_a_long_line_breaks_between_words_on_a_terminal(machine: Path) -> None:
    for line in here("list", terminal=True, COLUMNS="60")[1].splitlines():
        assert len(line) <= 60 or " " not in line.strip()
