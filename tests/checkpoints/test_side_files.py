"""Files beside the weights must be regular and bounded in size, and system errors name the file."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import re
import shutil
import signal
import socket
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt.checkpoints import find, safetensors, strict_json
from npgpt.checkpoints.files import Kind, read_bytes
from npgpt.errors import NpgptError
from npgpt.text import vocabularies
from npgpt.text.companions import COMPANIONS
from tests.fixtures.tensorflow import make
from tests.support.command import here, refused
from tests.support.conversion import listed
from tests.support.models import small, speaking, store

posix = pytest.mark.skipif(os.name != "posix", reason="FIFOs, sockets and limits of POSIX")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def local_socket(path: Path) -> None:
    """Create a socket, whose path is limited to a hundred characters."""
    before = Path.cwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(before)


def sparse(path: Path) -> None:
    """Create a sparse file of ten gigabytes."""
    path.write_bytes(b"{")
    os.truncate(path, 10**10)


THINGS: dict[str, tuple[Callable[[Path], None], str]] = {  # in a file's place, and what is said of it
    "FIFO": (fifo, "is not a regular file"),
    "socket": (local_socket, "is not a regular file"),
    "folder": (lambda path: path.mkdir(), "is not a regular file"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "is not a regular file"),
    "sparse": (sparse, r"is too large for a [a-z ]+: 10000000000 bytes exceed the limit of \d+"),
}
VOCABULARY = ("vocab.tiktoken", "vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "tokenizer.json")


@pytest.fixture
def bounded(thing: str) -> Iterator[None]:
    """Fail if the test hangs or reads a large file."""

    def hangs(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(20)
    if thing == "sparse":
        tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 30_000_000  # 0 where it does not run
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def model(folder: Path, name: str) -> Path:
    """Return a model of 257 ids that would read this file, which does not exist yet."""
    source = speaking(folder / "source")
    (source / name).unlink(missing_ok=True)
    for pair in vocabularies.PAIRS:
        if name in pair:
            (source / "vocab.tiktoken").unlink()
            for other in pair:
                (source / other).write_text("{}")
            (source / name).unlink()
    if name in ("tokenizer.json", vocabularies.LLMC):
        (source / "vocab.tiktoken").unlink()
    return source


@posix
@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("name", ["config.json", "hparams.json", "model.safetensors.index.json"])
def test_a_configuration_is_a_regular_file_of_a_bounded_size(tmp_path: Path, name: str, thing: str) -> None:
    place, message = THINGS[thing]
    source = model(tmp_path, name)
    place(source / name)
    weights = source / name if name.endswith("index.json") else source
    for use in (npgpt.load, lambda path: npgpt.convert(path, tmp_path / "out"), vocabularies.load_tokenizer):
        with pytest.raises(NpgptError) as caught:
            use(weights)
        if weights == source:
            assert re.search(f"{name} {message}", str(caught.value))
    assert listed(tmp_path) == ["source"]


@posix
@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("thing", ["FIFO", "sparse"])
@pytest.mark.parametrize("name", [*VOCABULARY, vocabularies.LLMC])
def test_a_vocabulary_is_a_regular_file_of_a_bounded_size(tmp_path: Path, name: str, thing: str) -> None:
    place, message = THINGS[thing]
    source = model(tmp_path, name)
    place(source / name)
    assert re.search(f"{name} {message}", npgpt.load(source).why_no_text)
    assert re.search(f"{name} {message}", refused("tokens", "a", "--model", str(source)))
    assert re.search(f"{name} {message}", refused("convert", str(source), str(tmp_path / "out")))
    assert listed(tmp_path) == ["source"]


@posix
@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("thing", ["FIFO", "sparse"])
@pytest.mark.parametrize("name", ["spiece.model", "vocab.txt", *COMPANIONS])
def test_what_is_copied_beside_a_vocabulary_is_a_regular_file_too(tmp_path: Path, name: str, thing: str) -> None:
    place, message = THINGS[thing]
    source = speaking(tmp_path / "source")
    place(source / name)
    assert re.search(f"{name} {message}", refused("convert", str(source), str(tmp_path / "out")))
    assert listed(tmp_path) == ["source"]


@posix
@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("thing", THINGS)
def test_of_several_tensorflow_checkpoints_the_one_that_is_named(tmp_path: Path, thing: str) -> None:
    for name in ("one.index", "two.index"):
        shutil.copy(Path(make.__file__).parent / "saver" / "model.ckpt.index", tmp_path / name)
    place, message = THINGS[thing]
    place(tmp_path / "checkpoint")
    with pytest.raises(NpgptError, match=f"checkpoint {message}" if thing == "sparse" else "several checkpoints"):
        find.find(tmp_path)


@posix
@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("thing", THINGS)
def test_the_caches_name_of_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thing: str) -> None:
    """An invalid name does not hide the newest revision."""
    repository = tmp_path / "models--openai-community--gpt2"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    store(snapshot, small())
    THINGS[thing][0](repository / "refs" / "main")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert find.find("gpt2").weights == snapshot / "model.safetensors"


def test_a_file_as_large_as_may_be_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_bytes(path, Kind("list", 5)) == b"12345"
    with pytest.raises(NpgptError, match=r"x is too large for a list: 5 bytes exceed the limit of 4$"):
        read_bytes(path, Kind("list", 4))
    path.write_text('{"a": 1}')
    assert strict_json.read_file(path) == {"a": 1}


# --- where the system fails ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def limited(name: str, soft: int) -> Iterator[None]:
    """Lower a limit of this process within the context."""
    import resource

    kind = getattr(resource, name)
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@posix
def test_too_many_open_files(tmp_path: Path) -> None:
    """The limit is reached by the file or by its mapping."""
    source = speaking(tmp_path / "source")
    here("inspect", str(source))  # imports what it needs
    free = os.dup(0)
    os.close(free)
    for left in (0, 1):
        with limited("RLIMIT_NOFILE", free + left):
            code, _, error = here("inspect", str(source))
        assert code == 2
        assert re.fullmatch(rf"npgpt: error: {source}[^']*: too many open files\n", error), error


def test_too_little_memory_for_a_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    source = store(tmp_path, small())
    monkeypatch.setattr(mmap, "mmap", exhausted)
    for verb in (("inspect", str(source)), ("check", str(source / "model.safetensors"), "--ids", "1")):
        assert refused(*verb) == f"npgpt: error: {source}/model.safetensors: cannot allocate memory\n"


WRITING: dict[str, tuple[str, ...]] = {  # verbs that write, with the output last
    "trace": ("trace", "ab", "--model", "m", "-o", "out.npz"),
    "trace in safetensors": ("trace", "ab", "--model", "m", "-o", "out.safetensors"),
    "attend": ("attend", "ab", "--model", "m", "--html", "out.html"),
    "score": ("score", "t.txt", "--model", "m", "--html", "out.html"),
    "score --resume": ("score", "t.txt", "--model", "m", "--resume", "out.jsonl"),
    "check": ("check", "x.npz", "--model", "m", "--html", "out.html"),
    "convert": ("convert", "m", "out"),
}


@posix
@pytest.mark.usefixtures("few_mistakes")
@pytest.mark.parametrize("verb", WRITING)
def test_a_file_too_large_is_named_and_leaves_nothing(tmp_path: Path, verb: str) -> None:
    source, output = speaking(tmp_path / "m"), WRITING[verb][-1]
    (tmp_path / "t.txt").write_text("ab")
    np.savez(tmp_path / "x.npz", logits=npgpt.load(source)([97]), input_ids=[[97]])
    with limited("RLIMIT_FSIZE", 100):
        code, _, error = here(*WRITING[verb], cwd=tmp_path)
    assert code == 2
    last = error.splitlines()[-1]
    assert re.fullmatch(rf"npgpt: error: [^']*\b{output}: file too large", last), last
    held = listed(tmp_path)
    assert held in (["m", "t.txt", "x.npz"], ["m", output, "t.txt", "x.npz"] if verb == "score --resume" else [])


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = speaking(tmp_path / "m")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"\[Errno 28\].*/out'$"):
        npgpt.save(npgpt.load(source), tmp_path / "out")
    with pytest.raises(OSError, match=r"\[Errno 28\].*/x'$"):
        safetensors.write(tmp_path / "x", {"a": np.zeros(1)})
    assert listed(tmp_path) == ["m"]


def test_an_old_folder_that_cannot_be_deleted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = speaking(tmp_path / "m"), tmp_path / "out"
    npgpt.convert(source, out)
    (out / "config.json").write_text(json.dumps({"old": True}))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    message = r"out is written, but the folder it replaced cannot be deleted: .*/\.out\.[0-9a-f]{8}\.old remains"
    with pytest.warns(UserWarning, match=message):
        npgpt.convert(source, out, overwrite=True)
    assert "old" not in json.loads((out / "config.json").read_text())
    code, written, error = here("convert", str(source), str(out), "--overwrite")
    assert code == 0
    assert "written" in written
    assert re.fullmatch(f"npgpt: .*{message}\n", error)
