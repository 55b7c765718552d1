"""npgpt download, run as a process against a small hub on loopback."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt.checkpoints import configs, find, safetensors
from tests.support.hub_server import Fault, Hub, Repository, serving
from tests.support.models import random_arrays, random_ids, small, store
from tests.support.places import VARIABLES

pytestmark = pytest.mark.parity
huggingface_hub = pytest.importorskip("huggingface_hub", reason="extra hub is not installed")

COMMAND = [sys.executable, "-m", "npgpt", "download"]
ROOT = Path(__file__).parent.parent
MODEL = small(n_embd=12, n_head=3)
GPT2 = "openai-community/gpt2"
CONFIG = {"config.json": json.dumps(configs.to_dict(MODEL)).encode()}
VOCABULARY = {"vocab.json": b'{"a": 0}', "merges.txt": b"#version: 0.2\n"}
OTHERS = {"README.md": b"# A card", "tf_model.h5": b"\x89HDF", "onnx/model.onnx": b"x", "spiece.model": b"x"}
CHUNK = 10 * 2**20  # bytes; what the library writes at a time
BIG = np.random.default_rng(0).bytes(2 * CHUNK + 12345)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Run a hub with a tiny GPT-2 and a model whose weights arrive slowly."""
    with serving({GPT2: Repository(CONFIG | VOCABULARY | OTHERS)}) as hub:
        hub.repositories["org/big"] = Repository(CONFIG | VOCABULARY | {"model.safetensors": BIG})
        yield hub


@pytest.fixture
def weights(hub: Hub, tmp_path: Path) -> Path:
    """Return the folder with the files of the hub's GPT-2."""
    folder = store(tmp_path / "source", MODEL)
    hub.repositories[GPT2].files["model.safetensors"] = (folder / "model.safetensors").read_bytes()
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty Hugging Face cache for this process and its children, in an empty working folder."""
    for variable in [*VARIABLES, *(name for name in os.environ if name.upper().endswith("_PROXY"))]:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # NumPy is imported faster
    settings = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    for variable, value in (settings | {"TRANSFORMERS_OFFLINE": "0", "PYTHONPATH": str(ROOT)}).items():
        monkeypatch.setenv(variable, value)
    for variable in ("HF_TOKEN", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_VERBOSITY", "HF_DEBUG"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "hf" / "hub"


def run(hub: Hub | str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run the command; return exit code, standard output and standard error."""
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, env=variables(hub) | environment, timeout=60)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def variables(hub: Hub | str) -> dict[str, str]:
    return os.environ | {"HF_ENDPOINT": hub if isinstance(hub, str) else hub.url}


def fetched(hub: Hub | str, *arguments: str, **environment: str) -> list[str]:
    """Run the command, expect success and nothing on standard error, and return the printed lines."""
    code, out, error = run(hub, *arguments, **environment)
    assert (code, error) == (0, "")
    return out.splitlines()


def refused(hub: Hub | str, *arguments: str, **environment: str) -> str:
    """Run the command, expect exit code 2, and return the single line of its error."""
    code, out, error = run(hub, *arguments, **environment)
    assert (code, out, error.count("\n")) == (2, "", 1), (out, error)
    assert error.startswith("npgpt: error: ")
    return error[14:-1]


def partial(cache: Path) -> list[Path]:
    return list(cache.rglob("*.incomplete"))


# --- what is fetched -------------------------------------------------------------------------------------------------


def test_a_published_name_from_the_hub_to_the_logits(hub: Hub, cache: Path, weights: Path) -> None:
    lines = fetched(hub, "gpt2", HF_HUB_ENABLE_HF_TRANSFER="1")  # which the library warns of
    files = {"config.json", "vocab.json", "merges.txt", "spiece.model", "model.safetensors"}
    commit = hub.repositories[GPT2].commit
    folder = cache / "models--openai-community--gpt2" / "snapshots" / commit
    size = (weights / "model.safetensors").stat().st_size
    assert lines[:2] == [f"{GPT2}: 5 of 5 files fetched", str(folder)]
    assert {line.split()[1] for line in lines[2:7]} == {path.name for path in folder.iterdir()} == files
    assert lines[6:] == [f"{size:>15,}  model.safetensors", 'next: npgpt generate --model gpt2 "It is a truth"']
    assert find.find("gpt2").weights.parent == find.find(GPT2).weights.parent == folder
    for file in files:
        assert (folder / file).resolve().parent.name == "blobs"
        assert (folder / file).read_bytes() == hub.repositories[GPT2].files[file]
    (folder / "vocab.json").unlink()  # which here is no vocabulary, and that is not what is asked
    (folder / "merges.txt").unlink()
    ids = random_ids(MODEL, (2, 9))
    np.testing.assert_array_equal(npgpt.load("gpt2")(ids), npgpt.load(weights)(ids))


def test_one_listing_and_then_the_files_of_its_commit_alone(hub: Hub, weights: Path) -> None:
    fetched(hub, GPT2)
    listings = [request for request in hub.requests if request.path.startswith("/api/")]
    assert [request.path for request in listings] == [f"/api/models/{GPT2}"]
    commit = hub.repositories[GPT2].commit
    files = ["config.json", "vocab.json", "merges.txt", "spiece.model", "model.safetensors"]
    expected = [(method, f"/{GPT2}/resolve/{commit}/{file}") for file in files for method in ("HEAD", "GET")]
    assert [tuple(request) for request in hub.requests[1:]] == expected


def test_another_name_is_org_and_name(hub: Hub, cache: Path, weights: Path) -> None:
    hub.repositories["some-body/story.gpt_2"] = hub.repositories[GPT2]
    lines = fetched(hub, "some-body/story.gpt_2")
    assert lines[-1] == "next: npgpt inspect some-body/story.gpt_2"
    assert find.find("some-body/story.gpt_2").weights.read_bytes() == (weights / "model.safetensors").read_bytes()


def test_a_revision(hub: Hub, cache: Path, weights: Path) -> None:
    commit = hub.repositories[GPT2].commit
    lines = fetched(hub, "gpt2", "--revision", commit)
    assert lines[-1] == f'next: npgpt generate --model {lines[1]} "It is a truth"'
    assert not (cache / "models--openai-community--gpt2" / "refs").exists()
    assert "openai-community/gpt2 has no revision v1.0/x: see" in refused(hub, "gpt2", "--revision", "v1.0/x")


def test_what_is_in_the_cache_is_not_fetched_again(hub: Hub, weights: Path) -> None:
    first = fetched(hub, "gpt2")
    hub.requests.clear()
    again = fetched(hub, "gpt2")
    assert [request.path for request in hub.requests] == [f"/api/models/{GPT2}"]
    assert again == [f"{GPT2}: already in the cache", *first[1:]]


def test_a_new_commit_brings_what_has_changed(hub: Hub, cache: Path, weights: Path) -> None:
    before = fetched(hub, "gpt2")[1]
    hub.repositories[GPT2].files["vocab.json"] = b'{"b": 0}'
    hub.requests.clear()
    (cache / "models--openai-community--gpt2" / "refs" / "main").write_bytes(b"\xff")  # which is put right
    after = fetched(hub, "gpt2")[1]
    assert before != after
    assert [request.file for request in hub.requests if request.method == "GET"][1:] == ["vocab.json"]
    assert str(find.find("gpt2").weights.parent) == after


def test_shards_are_fetched_whole_and_their_index_last(hub: Hub, cache: Path, weights: Path) -> None:
    arrays = random_arrays(MODEL, dtype="float32")
    shards: dict[str, dict[str, Any]] = {f"model-{number:05}-of-00003.safetensors": {} for number in (1, 2, 3)}
    for number, (name, array) in enumerate(arrays.items()):
        list(shards.values())[number % 3][name] = array
    files = dict(CONFIG)
    for file, part in shards.items():
        safetensors.write(weights / file, part)
        files[file] = (weights / file).read_bytes()
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.repositories["org/sharded"] = Repository(files | {"pytorch_model.bin": b"x"})
    lines = fetched(hub, "org/sharded")
    wanted = ["config.json", *shards, "model.safetensors.index.json"]
    assert [line.split()[1] for line in lines[2:-1]] == wanted
    ids = random_ids(MODEL, (1, 5))
    np.testing.assert_array_equal(npgpt.load("org/sharded")(ids), npgpt.load(weights / "model.safetensors")(ids))


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["pytorch_model.bin", "tf_model.h5"], ["pytorch_model.bin"]),
        (["pytorch_model.bin", "model.safetensors.index.json"], ["pytorch_model.bin"]),
        (
            ["pytorch_model.bin", "model.safetensors.index.json", "model-00001-of-00002.safetensors"],
            ["pytorch_model.bin"],
        ),
        (
            ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"],
            ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"],
        ),
    ],
)
def test_without_safetensors_it_is_pytorch_model_bin(hub: Hub, files: list[str], wanted: list[str]) -> None:
    hub.repositories["org/old"] = Repository(dict.fromkeys(files, b"weights"))  # and no config.json
    lines = fetched(hub, "org/old")
    assert [line.split()[1] for line in lines[2:-2]] == wanted
    assert lines[-2:] == [
        "next: npgpt inspect org/old",
        "as safetensors: npgpt convert org/old weights/org/old",
    ]


# --- what the hub does not have or give ------------------------------------------------------------------------------


def test_a_repository_without_weights_that_npgpt_reads(hub: Hub, cache: Path) -> None:
    error = refused(hub, "gpt2")
    assert error == (
        "openai-community/gpt2 has no model.safetensors or pytorch_model.bin, single or sharded, "
        "only onnx/model.onnx, tf_model.h5"
    )
    hub.repositories["org/empty"] = Repository({})
    assert refused(hub, "org/empty").endswith("single or sharded, and no other weights")
    assert not cache.exists()


def test_an_unknown_repository(hub: Hub) -> None:
    error = refused(hub, "org/private")
    assert f"has no model org/private, or the model is private: check the name at {hub.url}/models, or log in" in error


def test_a_gated_repository(hub: Hub) -> None:
    hub.repositories["org/gated"] = Repository(CONFIG | {"model.safetensors": b"x"}, gated=True)
    error = refused(hub, "org/gated")
    assert error == f"org/gated is gated: accept its terms at {hub.url}/org/gated, then log in with `hf auth login`"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b'{"model_type": "llama"}', "config.json of org/other: model_type is 'llama', but npgpt runs only 'gpt2'"),
        (b"{", "config.json of org/other is not valid JSON"),
        (b'{"model_type": "gpt2", "quantization_config": {"bits": 4}}', "quantization_config"),
    ],
)
def test_another_architecture_is_refused_before_its_weights(hub: Hub, config: bytes, message: str) -> None:
    hub.repositories["org/other"] = Repository({"config.json": config, "model.safetensors": BIG})
    assert message in refused(hub, "org/other")
    assert {request.file for request in hub.requests} == {"other", "config.json"}


@pytest.mark.parametrize("status", [404, 429, 503])
def test_a_hub_that_is_out_of_order(hub: Hub, status: int, weights: Path) -> None:
    hub.faults["GET /api"] = [Fault("status", status)]
    assert refused(hub, "gpt2") == (
        f"the hub at {hub.url} answers {status} for the list of files of openai-community/gpt2: "
        "try again later, or correct HF_ENDPOINT"
    )


def test_an_outage_between_two_files(hub: Hub, weights: Path) -> None:
    hub.faults["GET model.safetensors"] = [Fault("status", 503)]
    assert "answers 503 for model.safetensors of openai-community/gpt2: try again later" in refused(hub, "gpt2")
    hub.faults["HEAD model.safetensors"] = [Fault("status", 503)] * 2  # the library waits a second and asks again
    assert fetched(hub, "gpt2")[0] == f"{GPT2}: 1 of 5 files fetched"


def test_a_token_that_is_refused(hub: Hub, weights: Path) -> None:
    hub.faults["GET /api"] = [Fault("status", 403)]
    error = refused(hub, "gpt2", HF_TOKEN="hf_wrong")
    assert "denies access to the list of files of openai-community/gpt2 (403): log in with" in error
    hub.faults["HEAD config.json"] = [Fault("status", 403)]  # of which the library says that the cache lacks the file
    assert "denies access to config.json of openai-community/gpt2 (403): log in with" in refused(hub, "gpt2")


def test_what_is_no_hub(hub: Hub) -> None:
    hub.repositories["org/page"] = Repository({"api/models/a/b": b"<!DOCTYPE html>"})
    error = refused(f"{hub.url}/org/page/resolve/main", "a/b")
    assert error.startswith("the list of files of a/b cannot be fetched (")
    assert error.endswith("): correct HF_ENDPOINT or HF_TOKEN")
    assert "cannot connect to the hub at nonsense" in refused("nonsense", "gpt2")
    error = refused(hub, "gpt2", HF_HUB_ETAG_TIMEOUT="soon")
    assert error.startswith("huggingface_hub cannot be imported (")
    assert error.endswith("'soon'): correct its HF_ variables")


# --- no network ------------------------------------------------------------------------------------------------------


def nobody() -> str:
    """Return the address of a port without a listener."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_offline(hub: Hub) -> None:
    assert refused(hub, "gpt2", HF_HUB_OFFLINE="1") == (
        "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set and openai-community/gpt2 is not in the cache: "
        "unset it to download; a model in the cache needs no download"
    )
    assert hub.requests == []


def test_nobody_listens() -> None:
    address = nobody()
    error = refused(address, "gpt2")
    assert error.startswith(f"cannot connect to the hub at {address} (")
    assert error.endswith(": check the connection and try again; a model in the cache needs no download")


def test_a_hub_that_never_answers(hub: Hub) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        error = refused(address, "gpt2", HF_HUB_ETAG_TIMEOUT="1")
    assert "the download of the list of files of openai-community/gpt2 failed (" in error
    assert "timed out" in error


def test_without_a_network_what_the_cache_holds_is_enough(hub: Hub, weights: Path) -> None:
    first = fetched(hub, "gpt2")
    expected = [f"{GPT2}: already in the cache; the hub could not be asked for a newer version", *first[1:]]
    assert fetched(hub, "gpt2", HF_HUB_OFFLINE="1") == expected
    assert fetched(nobody(), "gpt2") == expected
    hub.faults["GET /api"] = [Fault("status", 503)]
    assert fetched(hub, "gpt2") == expected
    commit = hub.repositories[GPT2].commit
    assert fetched(nobody(), "gpt2", "--revision", commit)[:2] == expected[:2]
    assert "cannot connect to the hub" in refused(nobody(), "gpt2", "--revision", "other")
    del hub.repositories[GPT2]
    assert "has no model openai-community/gpt2" in refused(hub, "gpt2")


# --- transfers that fail ---------------------------------------------------------------------------------------------


def test_a_transfer_that_breaks_off_goes_on(hub: Hub, cache: Path) -> None:
    hub.faults["GET model.safetensors"] = [Fault("cut", CHUNK + 999)]
    lines = fetched(hub, "org/big")
    assert lines[0] == "org/big: 4 of 4 files fetched"
    assert (Path(lines[1]) / "model.safetensors").read_bytes() == BIG
    assert partial(cache) == []


@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_after_a_transfer_that_never_completes_whole_files_are_kept(hub: Hub, cache: Path, kind: str) -> None:
    hub.faults["GET model.safetensors"] = [Fault(kind, CHUNK + 999), *[Fault(kind, 0)] * 9]
    error = refused(hub, "org/big")
    assert error.startswith("the download of model.safetensors of org/big failed (")
    assert error.endswith("): run the same command again; complete files are kept")
    assert partial(cache) == []
    with pytest.raises(npgpt.NpgptError, match="no model 'org/big' here"):
        find.find("org/big")
    hub.faults.clear()
    hub.requests.clear()
    lines = fetched(hub, "org/big")
    assert lines[0] == "org/big: 1 of 4 files fetched"
    assert [request.file for request in hub.requests if request.method == "GET"][1:] == ["model.safetensors"]
    assert (Path(lines[1]) / "model.safetensors").read_bytes() == BIG


def test_after_a_kill_whole_files_are_kept(hub: Hub, cache: Path) -> None:
    hub.faults["GET model.safetensors"] = [Fault("hold", CHUNK + 999)]
    process = subprocess.Popen([*COMMAND, "org/big"], env=variables(hub))
    hub.wait_for(CHUNK + 999)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    lines = fetched(hub, "org/big")
    assert lines[0] == "org/big: 1 of 4 files fetched"
    assert (Path(lines[1]) / "model.safetensors").read_bytes() == BIG


def test_ctrl_c_ends_a_transfer_with_130(hub: Hub, cache: Path) -> None:
    hub.faults["GET model.safetensors"] = [Fault("hold", CHUNK + 999)]
    process = subprocess.Popen(
        [*COMMAND, "org/big"], env=variables(hub), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    hub.wait_for(CHUNK + 999)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (b"", b"")
    assert process.returncode == 130
    assert partial(cache) == []


@pytest.mark.parametrize(("file", "hashed"), [("model.safetensors", "sha256"), ("vocab.json", "sha1")])
def test_a_file_that_arrives_damaged_is_not_kept(hub: Hub, weights: Path, file: str, hashed: str) -> None:
    hub.faults[f"GET {file}"] = [Fault("wrong", 5)]
    error = refused(hub, "gpt2")
    assert error.startswith(f"{file} was damaged in transit: its {hashed} is ")
    assert error.endswith("; it was removed, so run the same command again")
    lines = fetched(hub, "gpt2")
    assert (Path(lines[1]) / file).read_bytes() == hub.repositories[GPT2].files[file]


def test_a_file_of_another_size(hub: Hub, weights: Path) -> None:
    hub.faults["GET model.safetensors"] = [Fault("short", 100)]
    error = refused(hub, "gpt2")
    assert "the download of model.safetensors of openai-community/gpt2 failed (" in error
    assert "has size 100" in error


def test_a_cache_that_cannot_be_written(hub: Hub, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = refused(hub, "gpt2", HF_HUB_CACHE=str(tmp_path / "file"))
    assert f"config.json of openai-community/gpt2 cannot be written to {tmp_path}/file (" in error
    assert error.endswith("): free some space, or change HF_HOME")


def test_a_disk_without_room(hub: Hub, cache: Path) -> None:
    """A limit on file sizes simulates the full disk."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    done = subprocess.run([*COMMAND, "org/big"], env=variables(hub), capture_output=True, preexec_fn=limit, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"model.safetensors of org/big cannot be written to {cache} (" in done.stderr
    assert partial(cache) == []


def test_on_a_terminal_there_is_a_progress_bar(hub: Hub) -> None:
    terminal, stderr = os.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    done = subprocess.run([*COMMAND, "org/big"], env=variables(hub), stdout=subprocess.PIPE, stderr=stderr, timeout=60)
    os.close(stderr)
    shown = b""
    try:
        while chunk := os.read(terminal, 2**16):
            shown += chunk
    except OSError:  # so ends a terminal that nobody writes to
        pass
    os.close(terminal)
    assert done.returncode == 0
    assert b"model.safetensors: 100%" in shown
    assert b"Warning" not in shown
