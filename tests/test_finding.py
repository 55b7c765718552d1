from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from npgpt.checkpoints import find, places
from npgpt.errors import NpgptError
from tests.support import writers
from tests.support.models import random_arrays, small
from tests.support.places import VARIABLES


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use an empty working folder and home, without environment variables."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def put(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").touch()
    return folder


def snapshot(cache: Path, repository: str, commit: str = "abc", main: bool = True) -> Path:
    base = cache / f"models--{repository.replace('/', '--')}"
    if main:
        (base / "refs").mkdir(parents=True, exist_ok=True)
        (base / "refs" / "main").write_text(commit)
    return put(base / "snapshots" / commit)


def test_nothing_named_is_the_embedded_model() -> None:
    location = find.find()
    assert location.name == "austen"
    assert location.weights.parent == places.EMBEDDED_WEIGHTS / "austen"
    put(Path("weights/austen"))
    assert location == find.find("austen")
    put(Path("austen"))
    assert location == find.find()
    assert find.find("austen").weights.parent == Path("austen")


def test_a_folder_and_a_file(tmp_path: Path) -> None:
    folder = put(tmp_path / "mine")
    assert find.find(folder).weights == folder / "model.safetensors"
    assert find.find(str(folder / "model.safetensors")).weights.parent == folder
    (folder / "other.safetensors").touch()
    assert find.find(folder / "other.safetensors").weights.name == "other.safetensors"
    put(Path("relative"))
    assert find.find("relative").weights == Path("relative/model.safetensors")


def test_a_published_name_is_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = snapshot(tmp_path / "home" / ".cache" / "huggingface" / "hub", "gpt2")
    assert find.find("gpt2").weights.parent == home
    monkeypatch.setenv("NPGPT_WEIGHTS", str(tmp_path / "own"))
    assert find.find("gpt2").weights.parent == home
    own = put(tmp_path / "own" / "gpt2")
    assert find.find("gpt2").weights.parent == own
    put(Path("weights/gpt2"))
    assert find.find("gpt2").weights.parent == Path("weights/gpt2")
    assert find.find("openai-community/gpt2").weights.parent == Path("weights/gpt2")
    put(Path("weights/openai-community/gpt2"))
    assert find.find("openai-community/gpt2").weights.parent == Path("weights/openai-community/gpt2")


@pytest.mark.parametrize(
    ("variable", "value", "hub"),
    [
        ("HF_HUB_CACHE", "hub-cache", "hub-cache"),
        ("HUGGINGFACE_HUB_CACHE", "hub-cache", "hub-cache"),
        ("HF_HOME", "hf-home", "hf-home/hub"),
        ("XDG_CACHE_HOME", "xdg", "xdg/huggingface/hub"),
    ],
)
def test_the_hugging_face_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, hub: str
) -> None:
    folder = snapshot(tmp_path / hub, "openai-community/gpt2-xl")
    monkeypatch.setenv(variable, str(tmp_path / value))
    assert find.find("gpt2-xl").weights.parent == folder
    assert find.find("openai-community/gpt2-xl").weights.parent == folder


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("gpt2", "gpt2"),
        ("gpt2", "openai-community/gpt2"),
        ("openai-community/gpt2", "gpt2"),
        ("gpt2-medium", "openai-community/gpt2-medium"),
        ("distilgpt2", "distilbert/distilgpt2"),
        ("distilbert/distilgpt2", "distilgpt2"),
        ("somebody/story-gpt", "somebody/story-gpt"),
    ],
)
def test_both_spellings_of_the_old_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stored: str
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = snapshot(tmp_path, stored)
    assert find.find(name).weights.parent == folder


def test_the_snapshot_is_mains_else_the_newest_with_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    old = snapshot(tmp_path, "gpt2", "old", main=False)
    older = snapshot(tmp_path, "gpt2", "zzz", main=False)
    os.utime(older, (1, 1))
    assert find.find("gpt2").weights.parent == old
    new = snapshot(tmp_path, "gpt2", "new")
    (tmp_path / "models--gpt2" / "snapshots" / "unfinished").mkdir()
    assert find.find("gpt2").weights.parent == new


def test_a_snapshot_without_weights_gives_way_to_one_that_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = snapshot(tmp_path, "gpt2", "whole")
    for ref in (b"unfinished", b"", b"\xff\xfe"):
        (tmp_path / "models--gpt2" / "refs" / "main").write_bytes(ref)
        if ref == b"\xff\xfe":
            with pytest.raises(NpgptError, match="no model"):
                find.find("gpt2")
        else:
            assert find.find("gpt2").weights.parent == folder


# not: only a snapshot with model.safetensors counted
def test_a_snapshot_of_any_form_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "models--org--name" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    arrays = random_arrays(small(), dtype="float32")
    writers.write(folder, {"pytorch_model.bin": writers.torch_zip(arrays)})
    assert find.find("org/name").weights == folder / "pytorch_model.bin"


def test_an_unknown_home_or_a_cache_that_hangs_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "~no-such-user/cache")
    monkeypatch.setenv("NPGPT_WEIGHTS", "~no-such-user/weights")
    put(Path("weights/gpt2"))
    assert find.find("gpt2").weights.parent == Path("weights/gpt2")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "hub" / "models--gpt2" / "refs").mkdir(parents=True)
    os.mkfifo(tmp_path / "hub" / "models--gpt2" / "refs" / "main")
    assert find.find("gpt2").weights.parent == Path("weights/gpt2")


def test_not_found_names_every_place_and_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPGPT_WEIGHTS", str(tmp_path / "own"))
    with pytest.raises(NpgptError) as error:
        find.find("gpt2")
    message = str(error.value)
    assert "\n" not in message
    for place in ("weights/gpt2", "own/gpt2", "models--gpt2", "models--openai-community--gpt2"):
        assert place in message
    assert message.endswith("put model.safetensors and config.json into weights/gpt2/")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "a model's name must be a folder, a file, or a name"),
        ("/no/such/folder", "/no/such/folder does not exist"),
        ("../missing", r"\.\./missing does not exist"),
        ("a/b/c", "a/b/c does not exist"),
        ("~no-such-user", "~no-such-user does not exist"),
        ("/dev/null", "/dev/null is neither a folder nor a regular file"),
        ("a\0b", "no model"),
        (b"gpt2", "a model's name must be"),
        ("nobody", "no model 'nobody' here"),
        ("nobody/gpt2", "no model 'nobody/gpt2' here"),
        ("../here", r"the folder \.\./here has no checkpoint that npgpt reads; it holds "),
        ("empty/folder", "the folder empty/folder has no checkpoint that npgpt reads; it is empty"),
    ],
)
def test_other_names(name: Any, message: str) -> None:
    put(Path("weights/gpt2"))
    Path("empty/folder").mkdir(parents=True)
    with pytest.raises(NpgptError, match=message):
        find.find(name)


def cached(cache: Path, repository: str, model_type: str) -> Path:
    """Put a model whose config.json states an architecture into the cache."""
    folder = snapshot(cache, repository)
    (folder / "config.json").write_text(f'{{"model_type" : "{model_type}"}}')
    return folder


def test_models_are_those_that_a_name_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPGPT_WEIGHTS", str(tmp_path / "own"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert places.names() == ["austen"]
    own = put(tmp_path / "own" / "mine")
    story = put(Path("weights/org/story"))
    gpt2, tuned = (cached(tmp_path / "cache", name, "gpt2") for name in ("openai-community/gpt2", "org/tuned"))
    cached(tmp_path / "cache", "org/bert", "bert")
    put(Path("weights/mine"))
    (tmp_path / "cache" / "models--org--begun" / "snapshots" / "abc").mkdir(parents=True)
    (Path("weights") / "notes.txt").touch()
    found = {name: find.find(name).weights.parent for name in places.names() if name != "org/begun"}
    expected = {"mine": Path("weights/mine"), "org/story": story, "gpt2": gpt2, "org/tuned": tuned}
    assert found == {"austen": places.EMBEDDED_WEIGHTS / "austen"} | expected
    assert own != found["mine"], "weights/ comes before $NPGPT_WEIGHTS"
    assert "org/begun" in places.names()


def test_places_that_cannot_be_listed_hold_no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NPGPT_WEIGHTS", str(tmp_path / "file"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "missing"))
    assert places.names() == ["austen"]


@pytest.mark.parametrize("name", ["missing.pth", "model.safetensors", "org/model.GGUF", "~/gpt2.bin"])
def test_a_missing_file_is_told_as_such(name: str) -> None:
    """No folder weights/missing.pth/ is suggested."""
    with pytest.raises(NpgptError) as error:
        find.find(name)
    assert str(error.value) == f"{os.path.expanduser(name)} does not exist"


def test_the_nearest_name_is_one_of_this_machine_too() -> None:
    put(Path("weights/org/my-story"))
    with pytest.raises(NpgptError, match=r"no model 'my_storry' here \(did you mean org/my-story\?\)"):
        find.find("my_storry")
