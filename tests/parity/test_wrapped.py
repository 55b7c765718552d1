"""Weights wrapped in other things, as real programs save them: objects beside them, names before theirs."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import enum
import pathlib
import types
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt.errors import NpgptError
from npgpt.parameters import Array, to_arrays
from tests.support.models import random_arrays, small

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="extra parity is not installed")
transformers = pytest.importorskip("transformers", reason="extra parity is not installed")
nanogpt = pytest.importorskip("tests.support.nanogpt", reason="extra parity is not installed")

CONFIG = small(n_embd=12, n_head=2)
ERF = small(n_embd=12, n_head=2, activation_function="gelu")


@dataclasses.dataclass
class GPTConfig:
    """As build-nanogpt has it."""

    block_size: int = 24
    vocab_size: int = 40
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 12


@dataclasses.dataclass(slots=True)
class Slotted:
    """Its state is a tuple."""

    n_layer: int = 2
    n_head: int = 2


class Act(enum.Enum):
    """An activation."""

    GELU = "gelu"


class Items(dict[str, Any]):
    """As Lightning's AttributeDict."""


def same(model: npgpt.LanguageModel, arrays: dict[str, Array]) -> None:
    found = to_arrays(model.parameters)
    assert found.keys() == arrays.keys()
    assert all(found[name].tobytes() == array.tobytes() for name, array in arrays.items())


def harmless() -> dict[str, Any]:
    """One of everything that a training loop keeps and PyTorch's weights_only does not take, and of what it takes."""
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
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
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
    model = npgpt.load(tmp_path / "x.pt")  # n_head is in no shape
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
