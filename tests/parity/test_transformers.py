"""npgpt and transformers' GPT2LMHeadModel, compared stage by stage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import npgpt
from npgpt import parameters
from npgpt.cache import KVCache
from npgpt.checkpoints import configs, find
from npgpt.config import PUBLISHED, Config
from npgpt.language_model import LanguageModel
from npgpt.model import forward
from npgpt.parameters import Array
from npgpt.text.generation import generate_many
from npgpt.text.sampling import Sampling
from tests.support.models import SHAPES, no_text, random_arrays, random_ids, small
from tests.support.tolerances import largest_difference, relative_error, rounding_bound
from tests.support.verification import Report

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="extra parity is not installed")
transformers = pytest.importorskip("transformers", reason="extra parity is not installed")
peers = pytest.importorskip("tests.support.peers", reason="llms-from-scratch 1.0.19 is not installed")

FLOAT64 = 1e-10  # relative to a tensor's largest absolute value


def ours(config: Config, arrays: dict[str, Array], ids: np.typing.NDArray[np.int64]) -> dict[str, Array]:
    record: dict[str, Array] = {}
    forward(parameters.from_arrays(config, arrays), config, ids, record=record.__setitem__)
    return record


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ids_shape", [(1, 1), (3, 24)])
def test_float64(shape: str, ids_shape: tuple[int, int], difference: Report) -> None:
    config = SHAPES[shape]
    arrays, ids = random_arrays(config), random_ids(config, ids_shape)
    theirs = peers.transformers_outputs(peers.transformers_model(config, arrays), ids)
    mine = ours(config, arrays, ids)
    for name, array in theirs.items():
        assert array.dtype == np.float64
        error = largest_difference(array, mine[name])
        difference("model", "transformers: every stage", "float64", error)
        assert error < FLOAT64, name


@pytest.mark.parametrize("shape", SHAPES)
def test_float32(shape: str, difference: Report) -> None:
    """Both float32 results are within the rounding bound of the float64 result (tests/support/tolerances.py)."""
    config = SHAPES[shape]
    ids = random_ids(config, (3, 24))
    theirs = peers.transformers_outputs(peers.transformers_model(config, random_arrays(config, dtype="float32")), ids)
    mine, truth = ours(config, random_arrays(config, dtype="float32"), ids), ours(config, random_arrays(config), ids)
    bound = rounding_bound(config, 24, "float32")
    for name, array in theirs.items():
        assert array.dtype == np.float32
        assert relative_error(array, truth[name]) < bound, name
        assert relative_error(mine[name], truth[name]) < bound, name
        difference("model", "transformers: every stage", "float32", largest_difference(array, mine[name]))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_true_size_of_gpt2(dtype: str, difference: Report) -> None:
    config = PUBLISHED["gpt2"]
    arrays, ids = random_arrays(config, dtype=dtype), random_ids(config, (1, 80))
    theirs = peers.transformers_outputs(peers.transformers_model(config, arrays), ids)
    mine = ours(config, arrays, ids)
    bound = rounding_bound(config, 80, "float32")
    for name, array in theirs.items():
        if dtype == "float64":
            assert largest_difference(array, mine[name]) < FLOAT64, name
        else:  # two float32 results, each with its own rounding
            assert relative_error(array, mine[name]) < 2 * bound, name
        difference("model", "transformers: every stage, gpt2's shape", dtype, largest_difference(array, mine[name]))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("ids_shape", [(1, 400), (2, 80), (7, 80)])
def test_tiles_blocks_and_threads_at_the_true_size(
    monkeypatch: pytest.MonkeyPatch, dtype: str, ids_shape: tuple[int, int], difference: Report
) -> None:
    """A prompt is processed in tiles and threads, then one token per row, with more rows than the head takes."""
    monkeypatch.setattr("npgpt.kernels.thread_count", lambda: 2)
    monkeypatch.setattr("npgpt.kernels.MIN_SHARED_SCORES", 1)
    config = PUBLISHED["gpt2"]
    arrays, ids = random_arrays(config, dtype=dtype), random_ids(config, ids_shape)
    model, p = peers.transformers_model(config, arrays), parameters.from_arrays(config, arrays)
    cache = npgpt.KVCache(config, *ids_shape, dtype)
    bound = FLOAT64 if dtype == "float64" else 2 * rounding_bound(config, ids_shape[1], "float32")
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids)).logits.numpy()[:, -2:]
    for start, expected in ((0, theirs[:, :1]), (ids_shape[1] - 1, theirs[:, 1:])):
        stop = ids_shape[1] - 1 if start == 0 else ids_shape[1]
        mine = forward(p, config, ids[:, start:stop], cache, logits_from=-1)
        assert relative_error(mine, expected) < bound
        row = "transformers: logits, gpt2's shape, in tiles, blocks and threads"
        difference("model", row, dtype, largest_difference(expected, mine))


def test_what_is_saved_here_loads_there(tmp_path: Path) -> None:
    for shape, config in SHAPES.items():
        arrays, ids = random_arrays(config, dtype="float32"), random_ids(config, (2, 9))
        model = LanguageModel(shape, config, parameters.from_arrays(config, arrays), no_text("none"))
        npgpt.save(model, tmp_path / shape)
        theirs, report = transformers.GPT2LMHeadModel.from_pretrained(
            tmp_path / shape, dtype=torch.float32, output_loading_info=True
        )
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            logits = theirs(torch.from_numpy(ids)).logits.numpy()
        assert relative_error(logits, model(ids)) < 2 * rounding_bound(config, 9, "float32")


@pytest.mark.parametrize("shape", ["3 heads x 7", "untied", "erf", "n_inner", "scaled by layer"])
def test_what_is_saved_there_loads_here(tmp_path: Path, shape: str) -> None:
    config = SHAPES[shape]
    theirs = peers.transformers_model(config, random_arrays(config, dtype="float32"))
    theirs.save_pretrained(tmp_path)
    mine = npgpt.load(tmp_path)
    assert mine.config == config
    assert configs.read_fields(json.loads((tmp_path / "config.json").read_text()), "theirs")[1] == []
    ids = random_ids(config, (2, 9))
    np.testing.assert_array_equal(
        mine(ids), forward(parameters.from_arrays(config, random_arrays(config, dtype="float32")), config, ids)
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_of_theirs(tmp_path: Path, dtype: str) -> None:
    config = small()
    theirs = peers.transformers_model(config, random_arrays(config, dtype="float32")).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path)
    mine = npgpt.load(tmp_path)
    weight = theirs.transformer.h[1].mlp.c_fc.weight.detach().to(torch.float32).numpy()
    np.testing.assert_array_equal(mine.parameters.h[1].mlp.c_fc.weight, weight)


def test_greedy_text_of_the_embedded_model(difference: Report) -> None:
    mine = npgpt.load()
    folder = find.find().weights.parent
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = mine.tokenizer.encode("It is a truth universally acknowledged")
    out = theirs.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False, pad_token_id=4095)
    text = "".join(mine.generate("It is a truth universally acknowledged", max_tokens=60, temperature=0))
    assert text == mine.tokenizer.decode(out[0, len(prompt) :].tolist())
    difference("text", "transformers: greedy text of the embedded model", "ids", 0)


def test_the_cache_against_theirs(difference: Report) -> None:
    config = small()
    arrays, ids = random_arrays(config), random_ids(config, (2, 20))
    model, p = peers.transformers_model(config, arrays), parameters.from_arrays(config, arrays)
    cache, past = npgpt.KVCache(config, 2, 20, "float64"), None
    for start, stop in ((0, 7), (7, 8), (8, 9), (9, 20)):
        with torch.no_grad():
            out = model(torch.from_numpy(ids[:, start:stop]), past_key_values=past, use_cache=True)
        past = out.past_key_values
        error = largest_difference(out.logits.numpy(), forward(p, config, ids[:, start:stop], cache))
        difference("model", "transformers: logits, token by token through both caches", "float64", error)
        assert error < FLOAT64


@pytest.mark.parametrize("shape", ["3 heads x 7", "untied", "scaled by layer"])
def test_left_padding_is_their_attention_mask(shape: str) -> None:
    """Positions follow the mask as in generate(); then come single tokens and greedy generation."""
    config, padding = SHAPES[shape], [4, 0, 7]
    arrays, ids = random_arrays(config), random_ids(config, (3, 12))
    theirs = peers.transformers_model(config, arrays)
    mask = torch.tensor([[column >= empty for column in range(12)] for empty in padding]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), attention_mask=mask, position_ids=positions).logits.numpy()
    mine = parameters.from_arrays(config, arrays)
    cache = KVCache(config, 3, 12, "float64", padding)
    logits = [
        forward(mine, config, ids[:, :9], cache),
        *(forward(mine, config, ids[:, n : n + 1], cache) for n in (9, 10, 11)),
    ]
    for row, empty in enumerate(padding):
        whole = np.concatenate(logits, axis=1)[row, empty:]
        assert largest_difference(expected[row, empty:], whole) < FLOAT64
    with torch.no_grad():
        written = theirs.generate(
            torch.tensor(ids),
            attention_mask=mask,
            max_new_tokens=10,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        ).numpy()
    steps = generate_many(
        mine,
        config,
        [row[empty:] for row, empty in zip(ids, padding, strict=True)],
        max_tokens=10,
        sampling=Sampling(temperature=0),
    )
    found: list[list[int]] = [[], [], []]
    for step in steps:
        if step.token_id is not None:
            found[step.sample].append(step.token_id)
    assert found == written[:, 12:].tolist()
