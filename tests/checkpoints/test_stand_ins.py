"""A file mistaken for a checkpoint, or for a file beside one, is named for what it is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

import npgpt
from npgpt.checkpoints import find, stand_ins
from npgpt.checkpoints.download import repository_name
from npgpt.errors import NpgptError
from npgpt.oracle import files
from tests.support import writers
from tests.support.models import random_arrays, small, store
from tests.support.places import VARIABLES

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"
CONTENTS = {
    "pointer": (POINTER, "a Git LFS pointer, not the file itself: fetch it with git lfs pull"),
    "HDF5": (b"\x89HDF\r\n\x1a\n\0\0", "HDF5 (Keras), which npgpt does not read: use the model's safetensors"),
    "msgpack": (b"\x81\xabtransformer\x84\xa1h\x8c", "msgpack (Flax), which npgpt does not read: use"),
    "two of msgpack": (b"\x82\xa6params\x81\xa1h\x8c", "msgpack (Flax), which npgpt does not read: use"),
    "ONNX of torch": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\xe1", "ONNX, which npgpt does not read: use"),
    "ONNX of nobody": (b"\x08\x0a:\xe1\x02", "ONNX, which npgpt does not read: use"),
    "page": (b"<!doctype html>\n<html class=''>", "a web page, not the file itself: use the file's download link"),
    "capitals": (b"<!DOCTYPE HTML PUBLIC '-//W3C//DTD HTML 4.01//EN'>", "a web page, not the file itself"),
    "white space": (b"\n\r\n\t  " + b" " * 300 + b"<!doctype html>", "a web page, not the file itself"),
    "mark": (b"\xef\xbb\xbf\n<Html lang='en'>", "a web page, not the file itself"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page, not the file"),
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use an empty working folder and home, without environment variables."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def refused(model: str | Path) -> str:
    """Return the message of loading, which equals that of converting."""
    with pytest.raises(NpgptError) as error:
        npgpt.load(model)
    with pytest.raises(NpgptError) as again:
        npgpt.convert(model, "never")
    assert str(error.value) == str(again.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "ckpt.pt", "model.npz"])
def test_in_place_of_weights(kind: str, name: str) -> None:
    content, message = CONTENTS[kind]
    writers.write(Path("m"), {name: content})
    assert f"m/{name} is {message}" in refused(f"m/{name}")
    assert f"{name} is {message}" in refused("m")  # a name that is no usual one: among what the folder holds
    with pytest.raises(NpgptError) as error:
        files.read(f"m/{name}")
    assert f"m/{name} is {message}" in str(error.value)


@pytest.mark.parametrize("kind", ["pointer", "page", "white space"])
def test_in_place_of_a_file_beside_them(kind: str) -> None:
    content, message = CONTENTS[kind]
    for name in ("config.json", "hparams.json", "model.safetensors.index.json", "adapter_config.json"):
        store(Path(name), small())
        where: str | Path = name
        if name == "model.safetensors.index.json":
            where = f"{name}/{name}"
        elif name == "adapter_config.json":
            os.rename(f"{name}/model.safetensors", f"{name}/adapter_model.safetensors")
        Path(name, name).write_bytes(content)
        assert f"{name}/{name} is {message}" in refused(where)
    characters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 256 + 68))]
    vocabulary = json.dumps({text: number for number, text in enumerate(characters)}).encode()
    own = {"vocab.json": vocabulary, "merges.txt": b"#version: 0.2\n", "tokenizer.json": None, "vocab.tiktoken": None}
    for name in own:
        store(Path(name), small(vocab_size=256))
        beside = {key: value for key, value in own.items() if value is not None and own[name] is not None}
        writers.write(Path(name), beside | {name: content})
        assert f"{name}/{name} is {message}" in npgpt.load(name).why_no_text
        with pytest.raises(NpgptError) as error:  # and not copied
            npgpt.convert(name, "never")
        assert f"{name}/{name} is {message}" in str(error.value)


def test_a_configuration_is_no_checkpoint() -> None:
    store(Path("m"), small())
    assert refused("m/config.json").endswith("no weight_map from tensors to files; give the folder or the weights file")


def test_an_answer_of_the_hubs_that_is_json() -> None:
    writers.write(Path("m"), {"model.safetensors": b'{"error":"Repository not found"}'})
    assert "is an error message of the hub, 'Repository not found': download the file again" in refused("m")


def shards() -> dict[str, bytes]:
    arrays = random_arrays(small(), dtype="float32")
    halves = [dict(list(arrays.items())[part::2]) for part in (0, 1)]
    return {f"model-0000{n}-of-00002.safetensors": writers.safetensors(half) for n, half in enumerate(halves, 1)}


def test_shards_without_their_index_and_one_of_them_alone() -> None:
    writers.write(Path("m"), shards())
    message = "model-00001-of-00002.safetensors is one of 2 shards without an index: put model.safetensors.index.json"
    assert message in refused("m")
    assert message in refused("m/model-00001-of-00002.safetensors")
    Path("m/model.safetensors.index.json").write_text("{}")
    shard = refused("m/model-00002-of-00002.safetensors")
    assert shard.endswith("is one of 2 shards: give the index, model.safetensors.index.json, or the folder")
    writers.write(Path("one"), {"model-00001-of-00001.safetensors": next(iter(shards().values()))})
    assert "one/model-00001-of-00001.safetensors" in refused("one")  # lacks tensors, but is no part


@pytest.mark.parametrize("kind", ["pointer", "page"])
def test_in_place_of_a_shard(kind: str) -> None:
    content, message = CONTENTS[kind]
    files = shards()
    index = {"weight_map": dict.fromkeys(random_arrays(small()), "model-00002-of-00002.safetensors")}
    writers.write(Path("m"), files | {"model-00002-of-00002.safetensors": content})
    Path("m/model.safetensors.index.json").write_text(json.dumps(index))
    assert refused("m").startswith(f"m/model-00002-of-00002.safetensors is {message}")


# not: what cannot be read ends the search for a name
def test_what_cannot_be_read_explains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cached()

    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(stand_ins, "unfinished", denied)
    assert refused("org/name").startswith("no model 'org/name' here; looked for")
    assert refused(folder).endswith("it holds blobs, snapshots")


# not: what torch.save wrote of a model whose tensors DeepSpeed keeps elsewhere taken for a model of no width
def test_a_stub_of_zero_3() -> None:
    arrays = {name: np.zeros(0, "f4") for name in random_arrays(small())} | {"h.0.attn.bias": np.ones((1, 1, 4, 4))}
    message = "wte.weight has no elements: this is a stub that belongs to a DeepSpeed ZeRO checkpoint: join it"
    for name, content in (
        ("pytorch_model.bin", writers.torch_zip(arrays)),
        ("model.safetensors", writers.safetensors(arrays)),
    ):
        assert message in refused(writers.write(Path(name), {name: content}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", "one rank's part of a DeepSpeed ZeRO checkpoint: join it"),
        ("bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "one rank's part of a DeepSpeed ZeRO checkpoint"),
        ("__0_0.distcp", "part of a distributed checkpoint (FSDP): join it with python -m torch.distributed"),
        (".metadata", "part of a distributed checkpoint (FSDP)"),
        ("4b5f.incomplete", "an interrupted download: resume it with npgpt download NAME, or with the command"),
        ("model.ckpt.data-00000-of-00001", "part of a TensorFlow checkpoint: give its .index file, or the folder"),
    ],
)  # fmt: skip
def test_a_part_is_no_checkpoint_though_its_form_is_read(name: str, message: str) -> None:
    content = writers.torch_zip(random_arrays(small(), dtype="float32"))
    path = writers.write(Path("m"), {name: content})
    assert f"m/{name} is {message}" in refused(path)
    assert f"the folder m has no checkpoint that npgpt reads; it holds {name}; {name} is {message}" in refused("m")
    writers.write(Path("m"), {name.replace("0", "1"): content})
    assert f"{name} is {message}" in refused("m")  # and not: several checkpoints


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zero_to_fp32.py", "zero_to_fp32.py is part of a DeepSpeed ZeRO checkpoint: join it"),
        ("global_step500/x", "global_step500 is part of a DeepSpeed ZeRO"),
        (
            "pytorch_model_fsdp_0/x",
            "pytorch_model_fsdp_0 is a distributed checkpoint (FSDP): join it with python -m torch",
        ),
        ("tf_model.h5", "tf_model.h5 is HDF5 (Keras), which npgpt does not read"),
        ("flax_model.msgpack", "flax_model.msgpack is msgpack (Flax), which npgpt does not read"),
        ("model.onnx", "model.onnx is ONNX, which npgpt does not read"),
        (
            ".cache/huggingface/download/x.incomplete",
            "x.incomplete is an interrupted download: resume it with npgpt download NAME",
        ),
    ],
)
def test_what_a_folder_holds_is_named(name: str, message: str) -> None:
    path = Path("m", "config.json")
    path.parent.mkdir()
    path.write_text("{}")
    Path("m", name).parent.mkdir(parents=True, exist_ok=True)
    Path("m", name).write_bytes(b"anything")
    assert message in refused("m")


def cached(snapshot: str = "abc") -> Path:
    """Put a repository whose snapshot has only a configuration into the cache."""
    folder = Path(".cache/huggingface/hub/models--org--name")
    (folder / "snapshots" / snapshot).mkdir(parents=True)
    (folder / "snapshots" / snapshot / "config.json").write_text("{}")
    (folder / "blobs").mkdir()
    return folder


def test_an_interrupted_download_in_the_cache() -> None:
    folder = cached()
    (folder / "blobs" / "4b5f.incomplete").write_bytes(b"1234")
    message = "4b5f.incomplete is an interrupted download: resume it with npgpt download NAME"
    assert f"hub/models--org--name: {message}" in refused("org/name")
    assert message in refused(folder)
    assert message in refused(folder / "snapshots" / "abc")
    assert message in refused(folder / "blobs" / "4b5f.incomplete")


def test_a_link_to_nothing_in_the_cache() -> None:
    folder = cached()
    link = folder / "snapshots" / "abc" / "model.safetensors"
    link.symlink_to("../../blobs/4b5f")
    message = (
        "is a link to ../../blobs/4b5f, which does not exist: resume it with npgpt download NAME, or with the command"
    )
    assert f"models--org--name: model.safetensors {message}" in refused("org/name")
    assert f"model.safetensors {message}" in refused(folder)
    assert f"model.safetensors {message}" in refused(link.parent)
    assert refused(link).startswith(f"the model {link} {message}")


def test_a_shard_that_was_not_fetched() -> None:
    folder = cached() / "snapshots" / "abc"
    (folder.parent.parent / "blobs" / "4b5f.incomplete").touch()
    index = {"weight_map": {"wte.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "but that file is not beside it; a download was interrupted" in refused(folder)


def test_a_folder_of_the_cache_is_its_snapshot() -> None:
    folder = cached()
    store(folder / "snapshots" / "abc", small())
    store(folder / "snapshots" / "def", small())
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    assert find.find(folder) == find.Location(str(folder), folder / "snapshots" / "abc" / "model.safetensors")


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("https://huggingface.co/openai-community/gpt2", "openai-community/gpt2"),
        ("https://huggingface.co/openai-community/gpt2/", "openai-community/gpt2"),
        ("https://huggingface.co/openai-community/gpt2/tree/main", "openai-community/gpt2"),
        ("HTTPS://HuggingFace.co/gpt2/resolve/main/model.safetensors?download=true", "gpt2"),
        ("huggingface.co/gpt2#files", "gpt2"),
        ("https://www.hf.co/a/b/blob/main/config.json", None),
        ("http://hf.co/a/b", "a/b"),
        ("hf://a/b", "a/b"),
        ("https://huggingface.co/datasets/a/b", None),
        ("https://huggingface.co/", None),
        ("https://example.com/model.safetensors", None),
    ],
)
def test_an_address_tells_the_name(address: str, name: str | None) -> None:
    assert find.hub_page(address) == find.hub_page(str(Path(address))) == name
    if name is None:
        assert "is an address, and npgpt opens files of this machine: download it first" in refused(address)
        return
    assert refused(address) == (
        f"{address} is a page of the hub: npgpt download {name} fetches the model, --model {name} uses it"
    )
    with pytest.raises(NpgptError) as error:
        repository_name(address)
    assert f"{address!r} (did you mean {name}?) cannot be downloaded: give one of" in str(error.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("gpt-2", "gpt2"),
        ("GPT2", "gpt2"),
        ("gpt_2_medium", "gpt2-medium"),
        ("gpt2-meduim", "gpt2-medium"),
        ("gpt2xl", "gpt2-xl"),
        ("openai/gpt2", "gpt2"),
        ("distil-gpt2", "distilgpt2"),
        ("Austen", "austen"),
        ("models--org--name", "org/name"),
        ("nobody", None),
        ("gpt3", None),
        ("EleutherAI/gpt-neo-125m", None),
        ("gpt2", None),
        ("openai-community/gpt2", None),
    ],
)
def test_the_nearest_name_is_suggested(name: str, meant: str | None) -> None:
    assert find.suggestion(name) == ("" if meant is None else f" (did you mean {meant}?)")
    message = refused(name)
    assert message.startswith(f"no model {name!r} here{find.suggestion(name)}; looked for model.safetensors or")
    assert ("put model.safetensors" in message) == (meant is None or "/" in name)


# not: a header's length taken for the beginning of something else
@pytest.mark.parametrize("size", [0x480, 0xAB80, 0xAB81, 0x1F08, 0x8B1F])
def test_what_is_read_is_never_taken_for_something_else(size: int) -> None:
    """A safetensors file begins with its header's length, which may be any bytes."""
    arrays = {"logits": np.zeros((1, 2, 4096), "f4")}
    content = writers.safetensors(arrays)
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].ljust(size)
    padded = size.to_bytes(8, "little") + header + content[8 + length :]
    path = writers.write(Path("m"), {"theirs.safetensors": padded})
    assert files.read(path).arrays.keys() == {"logits"}
    assert find.find("m").weights == path
