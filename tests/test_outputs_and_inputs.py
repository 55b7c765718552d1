"""An output never overwrites an input or another output of the same run, whatever its path."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import npgpt
from npgpt import tracing
from npgpt.checkpoints import files
from npgpt.errors import NpgptError
from tests.support.command import COMMAND, ROOT, here, refused
from tests.support.conversion import listed
from tests.support.models import speaking

MODEL = ("one.safetensors", "two.safetensors", "model.safetensors.index.json", "config.json", "vocab.tiktoken")
# a verb that writes: its arguments in a folder with the model m, text t.txt and theirs x.npz, and what else it reads
WRITERS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "trace": (("trace", "ab", "--model", "m", "-o"), ".safetensors", ()),
    "attend": (("attend", "ab", "--model", "m", "--html"), ".html", ()),
    "score": (("score", "t.txt", "--model", "m", "--html"), ".html", ("t.txt",)),
    "score --resume": (("score", "t.txt", "--model", "m", "--resume"), ".jsonl", ("t.txt",)),
    "check": (("check", "x.npz", "--model", "m", "--html"), ".html", ("x.npz",)),
}


def link_to_a_link(path: Path, file: Path) -> None:
    path.with_name("l").symlink_to(file)
    path.symlink_to("l")


# how another path can lead to a file
WAYS: dict[str, Callable[[Path, Path], None]] = {
    "link": lambda path, file: path.symlink_to(file),
    "hard link": lambda path, file: path.hardlink_to(file),
    "link to a link": link_to_a_link,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, a text, and a file to check that the model itself produced."""
    folder = tmp_path_factory.mktemp("whole")
    speaking(folder / "m")
    (folder / "t.txt").write_text("ab")
    np.savez(folder / "x.npz", logits=npgpt.load(folder / "m")([97, 98]), input_ids=[[97, 98]])
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("few_mistakes")
@pytest.mark.parametrize("verb", WRITERS)
def test_a_verb_does_not_write_onto_what_it_reads(tmp_path: Path, whole: Path, verb: str) -> None:
    """Each file that a verb reads is tried under its own name and through each kind of link."""
    folder = Path(shutil.copytree(whole, tmp_path / "w"))
    arguments, suffix, others = WRITERS[verb]
    before = contents(folder)
    for name in (*(f"m/{file}" for file in MODEL), *others):
        outputs = [name] if suffix == Path(name).suffix or verb != "trace" else []
        for way, lead in WAYS.items():
            lead(folder / f"{way}{suffix}", folder / name)
            outputs.append(f"{way}{suffix}")
        for output in outputs:
            if verb == "trace" and Path(os.path.realpath(folder / output)).suffix not in tracing.FILES:
                continue  # refused for its suffix, which is that of the file that the link leads to
            error = refused(*arguments, output, cwd=folder)
            assert f"{arguments[-1]} {output} would replace " in error, (name, output)
            assert f"{Path(name).name}, which this run reads: choose another path for the output" in error
        for path in (*folder.glob("*link*"), folder / "l"):
            path.unlink(missing_ok=True)
    assert contents(folder) == before


@pytest.mark.usefixtures("few_mistakes")
@pytest.mark.parametrize("verb", WRITERS)
def test_a_verb_writes_beside_what_it_reads(tmp_path: Path, whole: Path, verb: str) -> None:
    """Outputs may go into the model's folder and replace older outputs."""
    folder = Path(shutil.copytree(whole, tmp_path / "w"))
    arguments, suffix, _ = WRITERS[verb]
    before = contents(folder)
    for _ in range(2):
        code, _, error = here(*arguments, f"m/output{suffix}", cwd=folder)
        assert code == 0, error
    assert contents(folder).items() > before.items()


@pytest.mark.parametrize("file", [file for file in MODEL if not file.endswith("index.json")])
def test_a_conversion_does_not_replace_a_folder_that_its_source_leads_into(tmp_path: Path, file: str) -> None:
    out = tmp_path / "out"
    npgpt.convert(speaking(tmp_path / "first"), out)
    target = "model.safetensors" if file.endswith(".safetensors") else file
    source = speaking(tmp_path / "source")
    (source / file).unlink()
    (source / file).symlink_to(Path("..") / "out" / target)
    before = contents(out)
    with pytest.raises(NpgptError, match=rf"out/{target} would replace .*, which this run reads"):
        npgpt.convert(source, out, overwrite=True)
    assert "which this run reads" in refused("convert", str(source), str(out), "--overwrite")
    assert contents(out) == before
    assert listed(tmp_path) == ["first", "out", "source"]


def test_a_conversion_replaces_an_older_one(tmp_path: Path) -> None:
    source, out = speaking(tmp_path / "source"), tmp_path / "out"
    for _ in range(2):
        npgpt.convert(source, out, overwrite=True)
    assert listed(out) == ["config.json", "model.safetensors", "vocab.tiktoken"]


def test_in_python_a_trace_does_not_replace_the_models_weights(tmp_path: Path) -> None:
    folder = speaking(tmp_path / "m")
    model, before = npgpt.load(folder), contents(folder)
    about = tracing.metadata(model, [1], None)
    for name in ("one.safetensors", "two.safetensors"):
        with pytest.raises(NpgptError, match=f"{name} holds the model's own weights"):
            tracing.write(folder / name, tracing.trace([1], model), about)
    assert contents(folder) == before
    for _ in range(2):
        tracing.write(folder / "trace.safetensors", tracing.trace([1], model), about)


def test_in_python_save_takes_no_folder_that_holds_the_model(tmp_path: Path) -> None:
    folder = speaking(tmp_path / "m")
    before = contents(folder)
    with pytest.raises(NpgptError, match="is not empty"):
        npgpt.save(npgpt.load(folder), folder)
    assert contents(folder) == before


def test_an_output_is_no_standard_stream_either(tmp_path: Path, whole: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "w"))
    command = f"'{COMMAND[0]}' -m npgpt score - --model m --html t.txt < t.txt"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, env=environment)
    message = b"npgpt: error: --html t.txt and standard input are the same file: give the output its own file\n"
    assert (done.returncode, done.stderr) == (2, message)
    assert (folder / "t.txt").read_text() == "ab"


@pytest.mark.parametrize(("number", "name"), [(0, "input"), (1, "output"), (2, "error")])
def test_a_standard_stream_is_told_by_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    path, fstat = tmp_path / "x", os.fstat
    path.write_text("")
    monkeypatch.setattr(os, "fstat", lambda of: os.stat(path) if of == number else fstat(of))
    with files.one_run(), pytest.raises(NpgptError, match=f"--html x and standard {name}"):
        files.is_output(path, "--html x")


def test_two_outputs_are_two_files(tmp_path: Path) -> None:
    """No verb has two outputs yet. Neither the order of reading and writing nor the file's existence matters."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    with files.one_run():
        files.is_output(tmp_path / "folder" / "x", "--one")
        with files.one_run(), pytest.raises(NpgptError, match="--two and --one are the same file"):
            files.is_output(tmp_path / "link" / "x", "--two")
        files.is_output(tmp_path / "folder" / "x", "--one")
        with pytest.raises(NpgptError, match=r"--one would replace .*/link/x, which this run reads"):
            files.is_input(tmp_path / "link" / "x")
        files.is_input(tmp_path / "y")
        with pytest.raises(NpgptError, match=r"--three would replace .*/y, which this run reads"):
            files.is_output(tmp_path / "link" / ".." / "y", "--three")
    files.is_input(tmp_path / "folder" / "x")  # the run is over
