"""Corners of the formats, one small test each; above it stands the mistake that it would catch."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt.checkpoints import formats, safetensors, tensorflow, torch_zip
from npgpt.checkpoints import names as naming
from npgpt.checkpoints.open import open_checkpoint
from npgpt.checkpoints.tensor import same_bits
from npgpt.errors import NpgptError
from npgpt.parameters import to_arrays
from tests.checkpoints import test_gguf as in_gguf
from tests.checkpoints.test_llmc import tokenizer_file
from tests.checkpoints.test_naming import NAMINGS, stored
from tests.checkpoints.test_opening import CONFIG, put
from tests.support import writers
from tests.support.models import random_arrays
from tests.support.writers import Call, Global


# not: cache_v taken out of the rule that drops buffers
def test_llms_from_scratchs_buffers_are_dropped(tmp_path: Path) -> None:
    arrays = random_arrays(CONFIG, dtype="float32")
    buffers = {f"trf_blocks.1.att.{name}": np.ones((1, 2), np.float32) for name in ("mask", "cache_k", "cache_v")}
    model = npgpt.load(stored(tmp_path / "a", NAMINGS["llms-from-scratch"](arrays) | buffers), n_head=3)
    for name, array in to_arrays(model.parameters).items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)


# not: WRAPPERS without the + after its first group
def test_wrappers_within_wrappers() -> None:
    names = ("module.model.a", "_orig_mod.model.b", "model._orig_mod.module.c", "model.module.d")
    assert list(naming.unwrapped(dict.fromkeys(names))) == ["a", "b", "c", "d"]  # type: ignore[arg-type]


# not: the second condition of unwrapped left out: one of two tensors is lost without a word
@pytest.mark.parametrize("names", [("module.a", "a"), ("a", "module.a"), ("module.a", "_orig_mod.a", "a")])
def test_no_tensor_is_lost_where_names_do_not_stay_apart(names: tuple[str, ...]) -> None:
    tensors: dict[str, Any] = {name: object() for name in names}
    found = naming.unwrapped(tensors)
    assert len(found) == len(names)
    assert found["a"] is tensors["a"]
    assert set(map(id, found.values())) == set(map(id, tensors.values()))


# not: Source.stored without the comparison of dtypes: float32 parts read as if they were float16 or bfloat16
def test_queries_keys_and_values_of_different_dtypes(tmp_path: Path) -> None:
    arrays = NAMINGS["llms-from-scratch"](random_arrays(CONFIG, dtype="float32"))
    name = "trf_blocks.0.att.W_key.weight"
    path = stored(tmp_path / "a", arrays | {name: arrays[name].astype(np.float16)})
    with pytest.raises(NpgptError, match=r"W_query\.weight is float32 and trf_blocks\.0\.att\.W_key\.weight float16"):
        npgpt.load(path, n_head=3)


# not: same_bits comparing values instead of bits
def test_a_head_is_tied_by_its_bits_and_not_by_its_values(tmp_path: Path) -> None:
    """0 and -0 are equal and differ, a NaN is the same and unequal."""
    arrays = random_arrays(CONFIG, dtype="float32")
    arrays["wte.weight"][3, :2] = 0.0, np.nan
    head = arrays["wte.weight"].copy()
    path = stored(tmp_path / "same", arrays | {"lm_head.weight": head})
    assert open_checkpoint(path, n_head=3).config.tie_word_embeddings
    head = head.copy()
    head[3, 0] = -0.0
    path = stored(tmp_path / "differs", arrays | {"lm_head.weight": head})
    assert not open_checkpoint(path, n_head=3).config.tie_word_embeddings


# not: one key left out of the search for contradictions
@pytest.mark.parametrize(
    ("key", "inside", "beside"),
    [
        ("n_layer", 2, 3),
        ("n_embd", 21, 24),
        ("n_positions", 24, 25),
        ("vocab_size", 40, 41),
        ("layer_norm_epsilon", 1e-5, 1e-6),
        ("activation_function", "gelu_new", "gelu"),
        ("tie_word_embeddings", True, False),
        ("scale_attn_weights", True, False),
        ("scale_attn_by_inverse_layer_idx", False, True),
        ("bos_token_id", 3, 4),
        ("eos_token_id", 3, 4),
        ("pad_token_id", 3, 4),
    ],
)
def test_every_key_may_contradict(tmp_path: Path, within: Any, key: str, inside: object, beside: object) -> None:
    within({"n_head": 3, key: inside})
    path = put(tmp_path / "m", config={key: beside})
    with pytest.raises(NpgptError, match=rf"model_args in .* says that {key} is .*, and .*config\.json that it is"):
        open_checkpoint(path)
    put(tmp_path / "m", config={key: inside})
    assert open_checkpoint(path).config == CONFIG


# not: what a scheme assumes put above what is stated
def test_what_is_stated_counts_for_more_than_what_a_scheme_assumes(tmp_path: Path) -> None:
    """nanoGPT's names, and the tanh form of its early versions."""
    path = put(tmp_path / "m", "nanogpt", config={"n_head": 3, "activation_function": "gelu_new"})
    assert open_checkpoint(path).config == CONFIG


# not: the metadata of _rebuild_tensor_v2 not looked at: weights of the wrong sign
def test_a_negated_tensor_is_refused(tmp_path: Path) -> None:
    storage = writers.Storage("FloatStorage", "0", 6)
    arguments = (storage, 0, (6,), (1,), False, Call(Global("collections", "OrderedDict")), {"neg": True})
    tensor = Call(Global("torch._utils", "_rebuild_tensor_v2"), arguments)
    program = writers.pickled({"w": tensor})
    content = writers.zip_archive(writers.torch_members(program, {"0": np.ones(6, np.float32).tobytes()}))
    with pytest.raises(NpgptError, match=r"a tensor is kept negated or conjugated: save tensor\.resolve_neg\(\)"):
        torch_zip.read(writers.write(tmp_path, {"m.pth": content}))


# not: split.count not looked at
def test_one_of_several_parts_is_refused(tmp_path: Path) -> None:
    keys = [*in_gguf.KEYS, ("split.count", 2, struct.pack("<H", 2))]
    path = in_gguf.put(tmp_path / "m.gguf", keys, {"w": np.ones(8)})
    with pytest.raises(NpgptError, match=r"m\.gguf is one of several parts: join them with llama-gguf-split --merge"):
        formats.read(path)


# not: bos_token_id (or eos_token_id) not taken over
def test_the_ids_of_the_texts_ends_are_taken_over(tmp_path: Path) -> None:
    ends = [(f"tokenizer.ggml.{end}_token_id", 4, struct.pack("<I", n)) for end, n in (("bos", 5), ("eos", 7))]
    arrays = NAMINGS["llama.cpp"](random_arrays(CONFIG, dtype="float32"))
    npgpt.convert(in_gguf.put(tmp_path / "m.gguf", in_gguf.KEYS + ends, arrays), tmp_path / "out")
    stated = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (stated["bos_token_id"], stated["eos_token_id"]) == (5, 7)


# not: overlapping blocks allowed: a hundred thousand entries may lead to one block without keys, each read anew
def test_a_block_that_many_entries_lead_to_is_refused(tmp_path: Path) -> None:
    block = writers.table_block([])
    index = [(bytes([97 + n]), writers.varint(0) + writers.varint(len(block) - 5)) for n in range(3)]
    content, handles = block, b""
    for part in (writers.table_block([]), writers.table_block(index, every=1)):
        handles += writers.varint(len(content)) + writers.varint(len(part) - 5)
        content += part
    content += handles.ljust(40, b"\0") + tensorflow.MAGIC
    path = writers.write(tmp_path, {"model.ckpt.index": content})
    with pytest.raises(NpgptError, match="the block at 0 begins within the one that ends at 8"):
        formats.read(path)


# not: a file that is longer than its header says taken for whole
def test_a_byte_too_many(tmp_path: Path) -> None:
    content = writers.llmc(CONFIG, random_arrays(CONFIG, dtype="float32"))
    path = writers.write(tmp_path, {"m.bin": content + b"\0"})
    with pytest.raises(
        NpgptError, match=rf"by its header it ends at byte {len(content)}, the file at {len(content) + 1}"
    ):
        formats.read(path)


# not: another name within a shard, which no index lists, taken for a tensor too many
def test_another_name_within_a_shard(tmp_path: Path) -> None:
    """safetensors' save_model notes it in the file's metadata."""
    arrays = random_arrays(CONFIG, dtype="float32")
    safetensors.write(tmp_path / "a.safetensors", arrays, {"lm_head.weight": "wte.weight"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(arrays, "a.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(tmp_path / "model.safetensors.index.json", n_head=3)
    assert checkpoint.config.tie_word_embeddings


# not: only a snapshot with model.safetensors counted
def test_a_snapshot_of_any_form_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "models--org--name" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    arrays = random_arrays(CONFIG, dtype="float32")
    writers.write(folder, {"pytorch_model.bin": writers.torch_zip(arrays)})
    assert npgpt.checkpoints.find.find("org/name").weights == folder / "pytorch_model.bin"


# not: same_bits without the strides: a head that is wte's transpose, in one storage, taken for wte itself
def test_two_views_from_one_place_need_not_be_the_same(tmp_path: Path) -> None:
    storage = writers.Storage("FloatStorage", "0", 4)
    views = {"a": writers.View(storage, 0, (2, 2), (2, 1)), "b": writers.View(storage, 0, (2, 2), (1, 2))}
    program = writers.pickled(writers.StateDict(views))
    members = writers.torch_members(program, {"0": np.arange(4, dtype=np.float32).tobytes()})
    tensors = torch_zip.read(writers.write(tmp_path, {"m.pth": writers.zip_archive(members)})).tensors
    assert same_bits(tensors["a"], tensors["a"])
    assert not same_bits(tensors["a"], tensors["b"])


# not: data of a big-endian file read as little-endian (test_damage.py alone has such a file)
def test_both_byte_orders(tmp_path: Path) -> None:
    arrays = random_arrays(CONFIG, dtype="float32")
    content = writers.gguf(writers.llamacpp(arrays), writers.gguf_keys(CONFIG), version=2, order=">")
    model = npgpt.load(writers.write(tmp_path, {"m.gguf": content}))
    for name, array in to_arrays(model.parameters).items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)


# not: a tensor of a type that has no size here takes no place at all
def test_two_quantised_tensors_in_one_place(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {"v": (12, (256, 1), 0, bytes(144)), "w": (12, (256, 1), 0, b"")}
    path = in_gguf.put(tmp_path / "m.gguf", [in_gguf.ARCHITECTURE], tensors)
    with pytest.raises(NpgptError, match="w begins at 0 of the data, within v"):
        formats.read(path)


# not: only short headers recognised: gpt2-xl's has 60 KB
def test_a_long_header_is_recognised(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "x", {f"h.{n}.{'long' * 10}": np.zeros(1, np.float32) for n in range(2000)})
    assert len(formats.read(tmp_path / "x").tensors) == 2000


# not: parts written in the byte order that they have
def test_parts_of_the_other_byte_order(tmp_path: Path) -> None:
    x = np.arange(3, dtype=np.float32)
    for order in "<>":
        swapped = x.astype(x.dtype.newbyteorder(order))  # type: ignore[arg-type]
        safetensors.write_parts(tmp_path / "x", {"x": ("float32", (3,))}, lambda _, part=swapped: [part])  # type: ignore[misc]
        np.testing.assert_array_equal(safetensors.read(tmp_path / "x").tensors["x"].load(), x)


# not: keys in any order, so that of two entries with one name the last counts without a word
def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    entry = writers.bundle_entry(1, (1,), 0, 0, bytes(4))
    rows = [(b"", writers.bundle_header()), (b"model/wte", entry), (b"model/wte", entry)]
    files = {"m.index": writers.table([rows]), "m.data-00000-of-00001": bytes(4)}
    with pytest.raises(NpgptError, match="its keys are not in order at b'model/wte'"):
        formats.read(writers.write(tmp_path, files))


# not: data of a big-endian bundle read as little-endian (test_damage.py alone has such a file)
def test_a_big_endian_bundle(tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = writers.write(tmp_path, writers.bundle({"model/wte": x}, big_endian=True))
    np.testing.assert_array_equal(formats.read(path).tensors["model/wte"].load(), x)


# not: an entry that claims more bytes than its shape takes
@pytest.mark.parametrize("size", [20, 28])
def test_a_size_that_contradicts_the_shape(tmp_path: Path, size: int) -> None:
    entry = writers.bundle_entry(1, (2, 3), 0, 0, bytes(24), size=size)
    rows = [(b"", writers.bundle_header()), (b"model/wte", entry)]
    files = {"m.index": writers.table([rows]), "m.data-00000-of-00001": bytes(64)}
    with pytest.raises(NpgptError, match=rf"model/wte, \[2, 3\] of float32, does not take the {size} bytes it has"):
        formats.read(writers.write(tmp_path, files))


# not: a shard beyond those that the header counts, where a file of that name lies there
def test_a_shard_too_many(tmp_path: Path) -> None:
    rows = [(b"", writers.bundle_header()), (b"model/wte", writers.bundle_entry(1, (1,), 1, 0, bytes(4)))]
    files = {"m.index": writers.table([rows]), "m.data-00001-of-00001": bytes(4)}
    with pytest.raises(NpgptError, match=r"model/wte lies in m\.data-00001-of-00001, data file 2 of 1: it is not here"):
        formats.read(writers.write(tmp_path, files))


# not: a folder with the name of a checkpoint taken for one
def test_a_folder_with_a_checkpoints_name_is_none(tmp_path: Path) -> None:
    path = put(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").mkdir()
    assert formats.find(tmp_path / "m") == path


# not: other names that stand in the index's metadata not looked at
def test_another_name_in_an_index(tmp_path: Path) -> None:
    arrays = random_arrays(CONFIG, dtype="float32")
    safetensors.write(tmp_path / "a.safetensors", arrays)
    weight_map = dict.fromkeys(arrays, "a.safetensors")
    index = {"metadata": {"total_size": 3, "lm_head.weight": "wte.weight"}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = formats.read(tmp_path / "model.safetensors.index.json").tensors
    assert tensors["lm_head.weight"] is tensors["wte.weight"]


# not: a dangling link as the destination followed
def test_a_link_to_nowhere_is_no_destination(tmp_path: Path) -> None:
    path = put(tmp_path / "m")
    (tmp_path / "out").symlink_to("nowhere")
    with pytest.raises(NpgptError, match="out is there and not a folder: choose another name"):
        npgpt.convert(path, tmp_path / "out", n_head=3)
    assert not (tmp_path / "nowhere").exists()


# not: a tensor that is there displaced by another name in the metadata
def test_another_name_displaces_no_tensor(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "x", {"a": np.zeros(1, np.float32), "b": np.ones(1, np.float32)}, {"b": "a"})
    assert safetensors.read(tmp_path / "x").tensors["b"].load().tolist() == [1.0]


# not: a tokenizer cut at the end of a token, fewer than its header counts
def test_a_tokenizer_with_fewer_tokens_than_it_counts(tmp_path: Path) -> None:
    tokens = [bytes([n]) for n in range(256)] + [b"ab"]
    (tmp_path / "gpt2_tokenizer.bin").write_bytes(tokenizer_file(tokens)[:-3])
    with pytest.raises(NpgptError, match=r"is no tokenizer of llm\.c's, or cut short: 256 tokens of 257"):
        npgpt.text.vocabularies.from_llmc(tmp_path / "gpt2_tokenizer.bin", 300)


# not: OpenAI's pair renamed although Hugging Face's lies there too, which it would overwrite
def test_openais_vocabulary_beside_hugging_faces(tmp_path: Path) -> None:
    path = put(tmp_path / "m")
    for name in ("vocab.json", "merges.txt", "encoder.json", "vocab.bpe"):
        (path.parent / name).write_text(name)
    npgpt.convert(path, tmp_path / "out", n_head=3)
    for name in ("vocab.json", "merges.txt", "encoder.json", "vocab.bpe"):
        assert (tmp_path / "out" / name).read_text() == name


# not: companions of a vocabulary that is not there
def test_companions_alone_stay_behind(tmp_path: Path) -> None:
    path = put(tmp_path / "m", tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    npgpt.convert(path, tmp_path / "out", n_head=3)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
