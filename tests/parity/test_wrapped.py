"""Weights wrapped as real programs save them: beside other objects, or with prefixed names."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import enum
import json
import pathlib
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt.checkpoints import configs
from npgpt.errors import NpgptError
from npgpt.parameters import Array, from_arrays, to_arrays
from tests.support.models import random_arrays, random_ids, small

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="extra parity is not installed")
transformers = pytest.importorskip("transformers", reason="extra parity is not installed")
nanogpt = pytest.importorskip("tests.support.nanogpt", reason="extra parity is not installed")
peers = pytest.importorskip("tests.support.peers", reason="llms-from-scratch 1.0.19 is not installed")
ch04 = pytest.importorskip("llms_from_scratch.ch04", reason="llms-from-scratch 1.0.19 is not installed")

CONFIG = small(n_embd=12, n_head=2)
ERF = small(n_embd=12, n_head=2, activation_function="gelu")


@dataclasses.dataclass
class GPTConfig:
    """build-nanogpt's configuration."""

    block_size: int = 24
    vocab_size: int = 40
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 12


@dataclasses.dataclass(slots=True)
class Slotted:
    """A class whose pickled state is a tuple."""

    n_layer: int = 2
    n_head: int = 2


class Act(enum.Enum):
    """An activation."""

    GELU = "gelu"


class Items(dict[str, Any]):
    """A dictionary like Lightning's AttributeDict."""


def same(model: npgpt.LanguageModel, arrays: dict[str, Array]) -> None:
    found = to_arrays(model.parameters)
    assert found.keys() == arrays.keys()
    assert all(found[name].tobytes() == array.tobytes() for name, array in arrays.items())


def harmless() -> dict[str, Any]:
    """Return one of each object that a training loop saves, whether PyTorch's weights_only accepts it or not."""
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu")
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return {
        "namespace": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("a/b")),
        "simple namespace": types.SimpleNamespace(a=1),
        "path": pathlib.PurePosixPath("/a/b"),
        "here": pathlib.Path(),
        "scalars": [np.float64(0.5), np.int64(3), np.float32(1.5), np.bool_(True), np.float16(1), np.str_("a")],
        "dtypes": [np.dtype("float32"), torch.int8, torch.float32, torch.complex64],
        "array": np.arange(3),
        "random state": np.random.default_rng(0).bit_generator.state,
        "enum": Act.GELU,
        "enum as a key": {Act.GELU: 1, ("a", 1): 2, torch.float32: 3, np.int64(4): 5},
        "when": datetime.datetime(2024, 5, 6, tzinfo=datetime.timezone.utc),
        "took": datetime.timedelta(seconds=3),
        "defaultdict": collections.defaultdict(list, a=[1]),
        "counter": collections.Counter("aab"),
        "deque": collections.deque([1, 2]),
        "set": {1, "a"},
        "frozen set": frozenset({2}),
        "complex": 1j,
        "bytes": b"\0\xff" * 30,
        "bytearray": bytearray(b"ab"),
        "range": range(3),
        "slice": slice(1, 2),
        "class": GPTConfig,
        "function": harmless,
        "device": torch.device("cpu"),
        "generator": torch.Generator().get_state(),
        "optimizer": optimizer.state_dict(),
        "optimizer itself": optimizer,
        "scaler": scaler.state_dict(),
        "scaler itself": scaler,
        "scheduler": scheduler.state_dict(),
        "scheduler itself": scheduler,
        "sparse": torch.ones(2, 2).to_sparse(),
        "complex tensor": torch.ones(2, dtype=torch.complex64),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "meta": torch.ones(2, device="meta"),
        "float8": torch.ones(2).to(torch.float8_e4m3fn),
        "uint16": torch.ones(2).to(torch.uint16),
        "module": layer,
        "nested": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        "training arguments": transformers.GenerationConfig(),
        "size": torch.Size([1]),
        "finfo": torch.finfo(torch.float32).max,
        "ellipsis": ...,
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("protocol", [2, 5])
def test_no_object_beside_the_weights_costs_them(tmp_path: pathlib.Path, protocol: int) -> None:
    arrays = random_arrays(ERF, dtype="float32")
    state = nanogpt.filled(ERF, arrays).state_dict()
    values = harmless()
    for name, value in values.items():
        torch.save({name: value, "model": state}, tmp_path / "x.pt", pickle_protocol=protocol)
        same(npgpt.load(tmp_path / "x.pt", n_head=2), arrays)
    torch.save(values | {"model": state}, tmp_path / "x.pt", pickle_protocol=protocol)
    same(npgpt.load(tmp_path / "x.pt", n_head=2), arrays)


CONFIGURATIONS = {
    "dataclass": GPTConfig(),
    "slots": Slotted(),
    "namespace": argparse.Namespace(n_layer=2, n_head=2, lr=0.1),
    "simple namespace": types.SimpleNamespace(n_layer=2, n_head=2),
    "dictionary": {"n_head": np.int64(2)},
    "subclass": Items(n_head=2),
    "within": {"config": GPTConfig()},
    "transformers": transformers.GPT2Config(vocab_size=40, n_positions=24, n_embd=12, n_layer=2, n_head=2),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_an_object_states_the_configuration(tmp_path: pathlib.Path, kind: str, protocol: int) -> None:
    arrays = random_arrays(ERF, dtype="float32")
    whole = {"model": nanogpt.filled(ERF, arrays).state_dict(), "config": CONFIGURATIONS[kind], "step": 3}
    torch.save(whole, tmp_path / "x.pt", pickle_protocol=protocol)
    model = npgpt.load(tmp_path / "x.pt")  # no shape reveals n_head
    assert model.config.n_head == 2
    same(model, arrays)


def test_a_tensor_that_needs_another_name_is_refused(tmp_path: pathlib.Path) -> None:
    state = nanogpt.filled(ERF, random_arrays(ERF, dtype="float32")).state_dict()
    for tensor, name in (
        (torch.ones(12).to_sparse(), r"torch\._utils\._rebuild_sparse_tensor"),
        (torch.ones(12).to(torch.complex64), r"torch\.ComplexFloatStorage"),
    ):
        torch.save(state | {"transformer.ln_f.bias": tensor}, tmp_path / "x.pt")
        with pytest.raises(NpgptError, match=rf"transformer\.ln_f\.bias asks for {name}, which npgpt does not run"):
            npgpt.load(tmp_path / "x.pt", n_head=2)


HEADS = {
    "GPT2DoubleHeadsModel": "multiple_choice_head.summary.weight [1, 12]",
    "GPT2ForSequenceClassification": "score.weight [2, 12]",
    "GPT2ForTokenClassification": "classifier.weight [2, 12]",
    "GPT2ForQuestionAnswering": "qa_outputs.weight [2, 12]",
}


@pytest.mark.parametrize("kind", HEADS)
def test_the_other_heads_of_transformers(tmp_path: pathlib.Path, kind: str) -> None:
    """transformers' language model reads the same tensors from the same folder."""
    config = transformers.GPT2Config(vocab_size=40, n_positions=24, n_embd=12, n_layer=2, n_head=2, num_labels=2)
    getattr(transformers, kind)(config).save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    model = npgpt.load(tmp_path)
    (note,) = model.notes
    assert note.startswith("ignored, not a language model's head: ")
    assert HEADS[kind] in note
    same(model, {name: tensor.numpy() for name, tensor in theirs.transformer.state_dict().items()})
    with torch.no_grad():
        expected = theirs(torch.tensor([[1, 2, 3]])).logits.numpy()
    np.testing.assert_allclose(model([1, 2, 3]), expected, rtol=0, atol=1e-5)


class Held(torch.nn.Module):  # type: ignore[misc,name-defined]
    """A module with the model in an attribute, and optionally another object beside it."""

    def __init__(self, name: str, held: Any, beside: Any = None) -> None:
        super().__init__()
        self.held = name
        setattr(self, name, held)
        if beside is not None:
            self.beside = beside

    def forward(self, ids: Any) -> Any:
        """Run the model."""
        return getattr(self, self.held)(ids)


def wrapped(kind: str, model: Any) -> Any:
    """Return the model in a real wrapper or in attributes."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    if kind == "checkpointed blocks":
        blocks = [checkpoint_wrapper(block) for block in model.transformer.h]
        model.transformer.h = torch.nn.ModuleList(blocks)
        return model
    makers: dict[str, Callable[[], Any]] = {
        "an attribute": lambda: Held("gpt", model),
        "attributes": lambda: Held("trunk", Held("net", model)),
        "compiled in an attribute": lambda: Held("model", torch.compile(model, backend="eager")),
        "parallel": lambda: Held("policy", torch.nn.DataParallel(model)),
        "averaged": lambda: torch.optim.swa_utils.AveragedModel(model),
        "sequential": lambda: torch.nn.Sequential(model),
        "beside another": lambda: Held("gpt", model, torch.nn.Linear(2, 3)),
    }
    return makers[kind]()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind",
    ["an attribute", "attributes", "compiled in an attribute", "parallel", "averaged", "sequential", "beside another",
     "checkpointed blocks"],
)  # fmt: skip
def test_real_wrappers_in_files_and_in_check(tmp_path: pathlib.Path, kind: str) -> None:
    arrays = random_arrays(CONFIG, dtype="float32")
    module = wrapped(kind, peers.transformers_model(CONFIG, arrays)).eval()
    torch.save(module.state_dict(), tmp_path / "x.pt")
    model = npgpt.load(tmp_path / "x.pt", n_head=2)
    same(model, arrays)
    beside = {"beside another": "beside.weight [3, 2], beside.bias [3]", "averaged": "n_averaged []"}.get(kind)
    assert model.notes == ((f"ignored, not part of the GPT-2: {beside}",) if beside else ())
    if "compiled" not in kind:  # slow: a compiled model is recompiled for every way of observing it
        report = npgpt.check(module, [1, 2, 3], n_head=2)
        assert report.matches, str(report)
        assert any("beside.bias" in note for note in report.notes) == (kind == "beside another")


def test_the_books_classifier(tmp_path: pathlib.Path) -> None:
    """Chapter 6 replaces the output head by a two-class one."""
    book = {"vocab_size": 40, "context_length": 24, "emb_dim": 12, "n_heads": 2, "n_layers": 2}
    model = ch04.GPTModel(book | {"drop_rate": 0.0, "qkv_bias": True})
    model.out_head = torch.nn.Linear(12, 2)
    torch.save(model.state_dict(), tmp_path / "review_classifier.pth")
    mine = npgpt.load(tmp_path / "review_classifier.pth", n_head=2)
    assert mine.no_logits == "its head has 2 classes, not 40 ids: npgpt reads the body but cannot generate text"
    stages: dict[str, Array] = {}
    mine([1, 2, 3], record=stages.__setitem__)
    model.out_head = torch.nn.Identity()
    with torch.no_grad():
        expected = model.eval()(torch.tensor([[1, 2, 3]])).numpy()
    np.testing.assert_allclose(stages["ln_f"], expected, rtol=0, atol=1e-5)


def test_the_names_of_the_two_gelus_are_transformers() -> None:
    """Every known name means the expected form, and no other activation of transformers equals either form."""
    from transformers.activations import ACT2FN

    x = torch.linspace(-20, 20, 20001, dtype=torch.float64)
    forms = {"gelu": torch.nn.functional.gelu(x), "gelu_new": torch.nn.functional.gelu(x, approximate="tanh")}
    same_as: dict[str, str] = {}
    for name in ACT2FN:
        if name not in ("prelu", "xielu"):  # these have parameters
            distances = {form: (ACT2FN[name](x) - expected).abs().max() for form, expected in forms.items()}
            nearest = min(distances, key=distances.__getitem__)
            if distances[nearest] < 1e-11:
                same_as[name] = nearest
    known = {"gelu": "gelu", "gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new"}
    assert same_as == known | configs.GELUS


@pytest.mark.parametrize("activation", ["gelu_fast", "gelu_python", "gelu_accurate", "gelu_python_tanh"])
def test_a_configuration_as_transformers_reads_it(tmp_path: pathlib.Path, activation: str) -> None:
    """The GELU has another name, and n_ctx differs from n_positions."""
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=24, n_ctx=12, n_embd=12, n_layer=2, n_head=2, activation_function=activation
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["n_ctx"] == 12
    model = npgpt.load(tmp_path)
    assert model.notes == (f"{tmp_path / 'config.json'} states n_ctx 12 and n_positions 24: wpe has 24 rows",)
    ids = random_ids(CONFIG, (2, 24))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(model(ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_build_nanogpts_checkpoint(tmp_path: pathlib.Path, activation: str) -> None:
    """The checkpoint does not state its GELU; once stated, the converted model keeps it."""
    config = small(n_embd=12, n_head=2, activation_function=activation)
    arrays = random_arrays(config, dtype="float32")
    theirs = nanogpt.filled(config, arrays).eval()
    torch.save({"model": theirs.state_dict(), "config": GPTConfig(), "step": 3}, tmp_path / "x.pt")
    (note,) = npgpt.load(tmp_path / "x.pt").notes
    assert "the tanh form (build-nanogpt's, minGPT's) is a guess" in note
    npgpt.convert(tmp_path / "x.pt", tmp_path / "out", activation=activation)
    ids = random_ids(config, (2, 24))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids))
        expected = (expected[0] if isinstance(expected, tuple) else expected).numpy()
    for model in (npgpt.load(tmp_path / "x.pt", activation=activation), npgpt.load(tmp_path / "out")):
        assert (model.notes, model.config) == ((), config)
        np.testing.assert_allclose(model(ids), expected, rtol=0, atol=1e-5)
    report = npgpt.check(theirs, [1, 2, 3], theirs.state_dict(), n_head=2, config=config)
    assert any("does not state its GELU" in note for note in report.notes)  # a state dict does not state it


def test_outputs_of_transformers_as_they_are_saved(tmp_path: pathlib.Path) -> None:
    """Outputs are a dictionary subclass; a note reports that the cache, which is not a tensor, is left out."""
    arrays = random_arrays(CONFIG, dtype="float32")
    model = peers.transformers_model(CONFIG, arrays).eval()
    with torch.no_grad():
        torch.save(model(torch.tensor([[1, 2, 3]]), output_hidden_states=True, use_cache=True), tmp_path / "x.pt")
    reference = npgpt.LanguageModel("it", CONFIG, from_arrays(CONFIG, arrays))
    report = npgpt.check(tmp_path / "x.pt", [1, 2, 3], reference)
    assert report.matches, str(report)
    assert "Ignored, not a tensor: past_key_values." in report.notes
    assert {"logits", "h.0"} <= {row.stage for row in report.rows}
