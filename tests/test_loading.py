from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import npgpt
from npgpt import parameters
from npgpt.checkpoints import configs, find, safetensors
from npgpt.checkpoints.inspect import inspect
from npgpt.checkpoints.open import Checkpoint, open_checkpoint
from npgpt.config import PUBLISHED, Config
from npgpt.errors import NpgptError
from npgpt.text import vocabularies
from tests.support.austen import CARD_GREEDY, CARD_IDS, CARD_PROMPT, CARD_SHA256, CARD_TOP5
from tests.support.models import SHAPES, put, random_arrays, random_ids, small, store


@pytest.fixture
def distilgpt2(tmp_path: Path) -> Path:
    """Return a folder with sparse weights of distilgpt2's shapes and no configuration."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in parameters.schema(PUBLISHED["distilgpt2"]).items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return tmp_path


# --- the embedded model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "within"), [("float64", 6e-7), ("float32", 2e-4)])
def test_the_embedded_model_does_what_its_card_says(dtype: str, within: float) -> None:
    """The card has six decimals, so the tolerance is half of the last one; float32 adds the rounding of 6 blocks."""
    model = npgpt.load(dtype=dtype)
    assert model.tokenizer.encode(CARD_PROMPT) == CARD_IDS
    logits = model(CARD_IDS)[0, -1]
    assert logits.dtype == dtype
    assert [int(i) for i in np.argsort(-logits)[:5]] == [token_id for token_id, _ in CARD_TOP5]
    np.testing.assert_allclose(np.sort(logits)[:-6:-1], [value for _, value in CARD_TOP5], rtol=0, atol=within)
    count = len(model.tokenizer.encode(CARD_GREEDY)) - len(CARD_IDS)
    assert CARD_PROMPT + "".join(model.generate(CARD_PROMPT, max_tokens=count, temperature=0)) == CARD_GREEDY


def test_the_embedded_model_in_short() -> None:
    found = inspect()
    assert found.files[found.path][1] == CARD_SHA256
    assert sum(found.counts.values()) == 3_505_152
    assert (found.dtypes, found.non_finite, found.unknown_keys, found.published_name) == ({"float16": 76}, {}, [], None)


# --- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_save_and_load(tmp_path: Path, shape: str, dtype: str) -> None:
    config = SHAPES[shape]
    model = npgpt.load(store(tmp_path / "first", config), dtype=dtype)
    npgpt.save(model, tmp_path / "second")
    again = npgpt.load(tmp_path / "second", dtype=dtype)
    assert again.config == config
    ids = random_ids(config, (2, 9))
    np.testing.assert_array_equal(model(ids), again(ids))


def test_save_takes_the_vocabulary_along_and_fills_only_empty_folders(tmp_path: Path) -> None:
    model = npgpt.load()
    npgpt.save(model, tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        "config.json",
        "model.safetensors",
        "vocab.tiktoken",
    ]
    assert npgpt.load(tmp_path / "copy").tokenizer.encode(CARD_PROMPT) == CARD_IDS
    with pytest.raises(
        NpgptError, match="is not empty: choose a new folder; npgpt convert --overwrite"
    ):  # save has none
        npgpt.save(model, tmp_path / "copy")


def test_float32_weights_are_used_where_they_lie(tmp_path: Path) -> None:
    model = npgpt.load(store(tmp_path / "m", small()))
    assert not model.parameters.h[0].mlp.c_fc.weight.flags.owndata
    assert not model.parameters.wte.weight.flags.writeable
    assert model.parameters.lm_head is model.parameters.wte


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_dtypes_are_converted(tmp_path: Path, dtype: str) -> None:
    arrays = {name: array.astype(dtype) for name, array in random_arrays(small()).items()}
    model = npgpt.load(put(tmp_path / "m", arrays, configs.to_dict(small())))
    np.testing.assert_array_equal(model.parameters.wpe.weight, arrays["wpe.weight"].astype(np.float32))


def test_transformers_prefix_and_mask_buffers(tmp_path: Path) -> None:
    arrays = {f"transformer.{name}": array for name, array in random_arrays(small(), dtype="float32").items()}
    arrays |= {f"transformer.h.{i}.attn.bias": np.ones((1, 1, 24, 24), np.float32) for i in range(2)}
    arrays["transformer.h.0.attn.masked_bias"] = np.full((), -1e4, np.float32)
    model = npgpt.load(put(tmp_path / "m", arrays, configs.to_dict(small())))
    np.testing.assert_array_equal(model.parameters.wte.weight, arrays["transformer.wte.weight"])


def test_all_faults_of_the_names_and_shapes_come_in_one_message(tmp_path: Path) -> None:
    arrays = random_arrays(small(), dtype="float32")
    arrays["h.1.attn.c_attn.weight"] = arrays["h.1.attn.c_attn.weight"].T
    arrays["scores.weight"] = arrays.pop("ln_f.bias")
    with pytest.raises(NpgptError) as error:
        npgpt.load(put(tmp_path / "m", arrays, configs.to_dict(small())))
    with pytest.raises(NpgptError, match=r"ln_f\.bias is missing"):
        inspect(tmp_path / "m")
    for part in (
        "ln_f.bias is missing",
        "scores.weight is unexpected",
        "c_attn.weight is [63, 21] and must be [21, 63]",
    ):
        assert part in str(error.value)


def test_an_untied_head_that_equals_wte_is_tied_and_one_that_differs_is_used(tmp_path: Path) -> None:
    config, arrays = small(), random_arrays(small(), dtype="float32")
    same = arrays | {"lm_head.weight": arrays["wte.weight"]}
    other = arrays | {"lm_head.weight": 2 * arrays["wte.weight"]}
    for stated in (configs.to_dict(config), configs.to_dict(config) | {"tie_word_embeddings": False}, None):
        tied = npgpt.load(put(tmp_path / "same", same, stated), n_head=3)
        assert tied.config.tie_word_embeddings
        assert tied.parameters.lm_head is tied.parameters.wte
        (tmp_path / "same" / "config.json").unlink(missing_ok=True)
    for stated in (configs.to_dict(config) | {"tie_word_embeddings": False}, None):
        untied = npgpt.load(put(tmp_path / "other", other, stated), n_head=3)
        np.testing.assert_array_equal(untied([1, 2]), 2 * tied([1, 2]))
        (tmp_path / "other" / "config.json").unlink(missing_ok=True)
    with pytest.raises(NpgptError, match=r"lm_head.weight differs from wte.weight, but .* ties them"):
        npgpt.load(put(tmp_path / "other", other, configs.to_dict(config)))
    with pytest.raises(NpgptError, match=r"differs from wte.weight, but the given config ties them"):
        npgpt.load(tmp_path / "other", config=config)
    apart = small(tie_word_embeddings=False)
    assert npgpt.load(put(tmp_path / "same", same, None), config=apart).config == apart


# --- how many heads --------------------------------------------------------------------------------------------------


def test_a_swap_that_divides_is_caught_by_the_published_shapes(distilgpt2: Path) -> None:
    """distilgpt2's 6 layers divide 768 as well as its 12 heads do, so only the published size reveals the swap."""
    size = PUBLISHED["distilgpt2"]
    folder = distilgpt2
    (folder / "config.json").write_text(json.dumps(configs.to_dict(size) | {"n_head": 6}))
    with pytest.raises(NpgptError) as error:
        npgpt.load(folder)
    assert str(error.value) == (
        f"{folder / 'config.json'} says n_head = 6, but the weights have the shapes of distilgpt2, whose n_head is 12 "
        "(6 is its n_layer): 768 = 12 × 64; correct it, or insist with --n-head 6 (load(…, n_head=6))"
    )
    assert npgpt.load(folder, n_head=6).config.n_head == 6
    (folder / "config.json").write_text(json.dumps(configs.to_dict(size) | {"n_head": 6, "n_layer": 12}))
    with pytest.raises(NpgptError, match=r"says n_head = 6, but the weights have the shapes of distilgpt2"):
        npgpt.load(folder)
    (folder / "config.json").write_text(json.dumps(configs.to_dict(size) | {"n_head": 6}))
    values = mock.patch.object(Checkpoint, "load", return_value=np.zeros(1))
    with values, mock.patch("npgpt.checkpoints.inspect.sha256"):  # of 330 MB
        found = inspect(folder, n_head=6)
    assert (found.published_name, found.config.n_head) == ("distilgpt2", 6)
    insisted = Config(**{**size.__dict__, "n_head": 24})
    assert npgpt.load(folder, config=insisted).config.n_head == 24


def test_gpt2_xl_with_layers_for_heads_fails_before_any_weight_is_looked_at(tmp_path: Path) -> None:
    config = configs.to_dict(PUBLISHED["gpt2-xl"]) | {"n_layer": 25, "n_head": 48}
    folder = put(tmp_path / "m", random_arrays(small(), dtype="float32"), config)
    with pytest.raises(
        NpgptError, match=r"1600 / 48 = 33.33 .* 48 is the n_layer of gpt2-xl .* its n_head is 25: 1600 = 25 × 64"
    ):
        npgpt.load(folder)


def test_without_a_configuration_a_published_shape_tells_the_heads(distilgpt2: Path) -> None:
    assert open_checkpoint(find.find(distilgpt2).weights).config == PUBLISHED["distilgpt2"]


def test_without_a_configuration_another_shape_asks(tmp_path: Path) -> None:
    config = small(n_inner=30)
    folder = put(tmp_path / "m", random_arrays(config, dtype="float32"), None)
    with pytest.raises(
        NpgptError, match=r"does not state n_head, and no shape depends on it: give it \(--n-head N.*n_embd = 21"
    ):
        npgpt.load(folder)
    assert npgpt.load(folder, n_head=3).config == config
    with pytest.raises(NpgptError, match="n_embd = 21 is not divisible by n_head = 4"):
        npgpt.load(folder, n_head=4)
    with pytest.raises(NpgptError, match=r"must be an npgpt\.Config, not dict"):
        npgpt.load(folder, config={"n_head": 3})  # type: ignore[arg-type]
    with pytest.raises(NpgptError, match="not both"):
        npgpt.load(folder, n_head=3, config=config)


def test_a_configuration_that_contradicts_the_weights(tmp_path: Path) -> None:
    with pytest.raises(NpgptError, match=r"wte.weight is \[40, 21\] and must be \[50, 21\]"):
        npgpt.load(store(tmp_path / "a", small(), vocab_size=50))
    with pytest.raises(NpgptError, match=r"has 2 blocks and n_layer is 3; h\.2\.ln_1\.weight is missing"):
        npgpt.load(store(tmp_path / "b", small(), n_layer=3))


@pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")
@pytest.mark.parametrize("kind", ["dangling link", "folder", "pipe"])
def test_a_config_json_that_cannot_be_read_is_not_ignored(tmp_path: Path, kind: str) -> None:
    path = store(tmp_path / "m", small()) / "config.json"
    path.unlink()
    if kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises((NpgptError, OSError), match=r"config\.json"):
        npgpt.load(path.parent, n_head=3)


def test_a_head_of_hostile_shape(tmp_path: Path) -> None:
    for shape in ((), (0, 3)):
        arrays = random_arrays(small(), dtype="float32")
        arrays["wte.weight"] = arrays["lm_head.weight"] = np.zeros(shape, np.float32)
        with pytest.raises(NpgptError, match=r"wte\.weight is \["):
            npgpt.load(put(tmp_path / "m", arrays, configs.to_dict(small())))


def test_save_leaves_nothing_unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    model = npgpt.load()
    monkeypatch.setattr(safetensors, "write_parts", interrupt)
    with pytest.raises(KeyboardInterrupt):
        npgpt.save(model, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "empty").mkdir()
    npgpt.save(model, "~/empty")
    assert (tmp_path / "empty" / "vocab.tiktoken").is_file()


def test_a_truncated_ranks_file_is_found_out_by_the_end_of_text(tmp_path: Path) -> None:
    npgpt.save(npgpt.load(), tmp_path / "m")
    ranks = tmp_path / "m" / "vocab.tiktoken"
    ranks.write_bytes(b"".join(ranks.read_bytes().splitlines(keepends=True)[:3000]))
    model = npgpt.load(tmp_path / "m")
    with pytest.raises(NpgptError, match=r"3000 ranks, which makes .* 3000, .* eos_token_id is 4095"):
        model.generate("a")
    assert model([1, 2]).shape == (1, 2, 4096)


@pytest.mark.parametrize("content", [b'{"n_head": 3, "n_head": 7}', b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"null"])
def test_a_broken_config_json(tmp_path: Path, content: bytes) -> None:
    folder = store(tmp_path / "m", small())
    (folder / "config.json").write_bytes(content)
    with pytest.raises(NpgptError, match=r"config\.json") as error:
        npgpt.load(folder)
    assert "\n" not in str(error.value)


def test_dtypes_of_a_model() -> None:
    assert npgpt.load(dtype=np.float64).parameters.wte.weight.dtype == np.float64
    bad: list[Any] = ["float16", "int32", "nonsense", None]
    for dtype in bad:
        with pytest.raises(NpgptError, match=f"float32 or float64, not {dtype}"):
            npgpt.load(dtype=dtype)


# --- looking at files ------------------------------------------------------------------------------------------------


def test_inspect_finds_what_is_wrong(tmp_path: Path) -> None:
    arrays = random_arrays(small(), dtype="float32")
    arrays["h.0.mlp.c_fc.bias"][:3] = [np.nan, np.inf, -np.inf]
    folder = put(tmp_path / "m", arrays, configs.to_dict(small()) | {"rotary": True})
    found = inspect(folder)
    assert found.non_finite == {"h.0.mlp.c_fc.bias": (1, 2)}
    assert found.unknown_keys == ["rotary"]
    assert found.misaligned == []
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.write_bytes((length + 3).to_bytes(8, "little") + content[8 : 8 + length] + b"   " + content[8 + length :])
    assert len(inspect(folder).misaligned) == len(arrays)
    assert npgpt.load(folder).parameters.wte.weight.flags.aligned


def test_a_tokenizer_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert vocabularies.load_tokenizer("gpt2-xl").encode("hello") == [31373]
    assert vocabularies.load_tokenizer().encode(CARD_PROMPT) == CARD_IDS
    with pytest.raises(NpgptError, match="no model 'nobody' here"):
        vocabularies.load_tokenizer("nobody")
    with pytest.raises(NpgptError, match="has no text"):
        vocabularies.load_tokenizer(store(tmp_path / "m", small()))


def test_all_that_is_public_is_listed() -> None:
    assert {"load", "score", "check", "convert", "forward", "LanguageModel", "__version__"} <= set(dir(npgpt))
