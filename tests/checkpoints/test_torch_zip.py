"""torch.save's archives: what is read in place, and what is refused."""

from __future__ import annotations

import io
import re
import tracemalloc
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import npgpt
from npgpt import cli
from npgpt.checkpoints import torch_zip, training
from npgpt.checkpoints.inspect import inspect
from npgpt.checkpoints.open import open_checkpoint
from npgpt.checkpoints.tensor import Contents, same_bits
from npgpt.errors import NpgptError
from npgpt.language_model import LanguageModel
from npgpt.parameters import to_arrays
from tests.support import writers
from tests.support.models import random_arrays, random_parameters, small
from tests.support.thorough import examples
from tests.support.writers import Call, Global, Member, StateDict, Storage, View

SIX = np.arange(6, dtype=np.float32)
FLOAT6 = Storage("FloatStorage", "0", 6)
WHOLE = View(FLOAT6, 0, (2, 3), (3, 1))


def put(path: Path, value: object, storages: dict[str, bytes] | None = None, **options: Any) -> Path:
    """Write an archive of a pickled value and storages, by default SIX."""
    storages = {"0": SIX.tobytes()} if storages is None else storages
    return writers.write(
        path.parent,
        {path.name: writers.zip_archive(writers.torch_members(writers.pickled(value), storages, **options))},
    )


def read(path: Path, views: dict[str, View], storages: dict[str, bytes] | None = None, **options: Any) -> Contents:
    return torch_zip.read(put(path, StateDict(views), storages, **options))


def same(found: dict[str, NDArray[Any]], expected: writers.Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zip64", [False, True])
def test_python_reads_the_archives_that_the_tests_write(zip64: bool) -> None:
    """This shows that later refusals are due to the inserted fault, not to the test's own writer."""
    content = writers.torch_zip({"a": SIX}, zip64=zip64)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["archive/data.pkl", "archive/byteorder", "archive/data/0", "archive/version"]
        assert archive.read("archive/data/0") == SIX.tobytes()


@pytest.mark.parametrize("form", [form for form in writers.FORMS if form.startswith("torch zip")])
def test_a_model_is_read_bit_for_bit(tmp_path: Path, form: str) -> None:
    arrays = random_arrays(small(), dtype="float32")
    model = npgpt.load(writers.write(tmp_path, writers.FORMS[form](small(), arrays)), n_head=3)
    assert model.config == small()
    same(to_arrays(model.parameters), arrays)


VALUES = {
    "Float": np.array([1.5, -2, 3e38], np.float32),
    "Double": np.array([1.5, -2, 1e300]),
    "Half": np.array([1.5, -2, 65504], np.float16),
    "BFloat16": np.array([0x3FC0, 0xC000, 0x7F7F], np.uint16),
    "Long": np.array([1, -2, 2**62]),
    "Int": np.array([1, -2, 2**30], np.int32),
    "Short": np.array([1, -2, 2**14], np.int16),
    "Char": np.array([1, -2, 127], np.int8),
    "Byte": np.array([1, 2, 255], np.uint8),
    "Bool": np.array([True, False, True]),
}


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("kind", VALUES)
def test_every_type_of_storage(tmp_path: Path, kind: str, order: writers.Order) -> None:
    values = VALUES[kind]
    content = values.astype(values.dtype.newbyteorder(order)).tobytes()
    views = {"a.weight": View(Storage(f"{kind}Storage", "0", 3), 0, (3,), (1,))}
    tensor = read(tmp_path / "x", views, {"0": content}, byteorder=order).tensors["a.weight"]
    if kind in ("Float", "Double", "Half", "BFloat16"):
        expected = np.array([1.5, -2, (2 - 2**-7) * 2.0**127]) if kind == "BFloat16" else values.astype(np.float64)
        np.testing.assert_array_equal(tensor.load("float64"), expected)
    else:
        name = {"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"}
        with pytest.raises(NpgptError, match=f"a.weight is {name[kind]}, not one of float16"):
            tensor.load()


def test_without_a_byte_order_it_is_little(tmp_path: Path) -> None:
    """PyTorch before 2.1 wrote none."""
    np.testing.assert_array_equal(
        read(tmp_path / "x", {"a": WHOLE}, byteorder=None).tensors["a"].load(), [SIX[:3], SIX[3:]]
    )


def test_views_of_one_storage(tmp_path: Path) -> None:
    """Views are transposed, offset, strided, empty, scalar, or of size 1 with a meaningless stride."""
    views = {
        "whole": WHOLE,
        "again": WHOLE,
        "parameter": WHOLE._replace(parameter=True),
        "transposed": View(FLOAT6, 0, (3, 2), (1, 3)),
        "offset": View(FLOAT6, 2, (2, 2), (2, 1)),
        "strided": View(FLOAT6, 1, (3,), (2,)),
        "overlapping": View(FLOAT6, 0, (3, 2), (1, 1)),
        "scalar": View(FLOAT6, 5, (), ()),
        "empty": View(FLOAT6, 6, (0, 2), (2, 1)),
        "empty, far away": View(FLOAT6, 10**15, (3, 0), (10**15, 1)),
        "one": View(FLOAT6, 4, (1, 1), (2**58, 0)),
        "deep": View(FLOAT6, 3, (1,) * 64, (1,) * 64),
    }
    found = {name: tensor.load() for name, tensor in read(tmp_path / "x", views).tensors.items()}
    assert {name: array.tolist() for name, array in found.items() if name != "deep"} == {
        "whole": [[0, 1, 2], [3, 4, 5]],
        "again": [[0, 1, 2], [3, 4, 5]],
        "parameter": [[0, 1, 2], [3, 4, 5]],
        "transposed": [[0, 3], [1, 4], [2, 5]],
        "offset": [[2, 3], [4, 5]],
        "strided": [1, 3, 5],
        "overlapping": [[0, 1], [1, 2], [2, 3]],
        "scalar": 5,
        "empty": [],
        "empty, far away": [[], [], []],
        "one": [[4]],
    }
    assert (found["deep"].ndim, found["deep"].item()) == (64, 3)


AXES = st.tuples(st.slices(6), st.slices(5), st.slices(4))


@given(AXES, st.permutations(range(3)), st.sampled_from(["f2", "f4", "f8"]), st.sampled_from(["little", "big"]))
@settings(max_examples=examples(60, 200))
def test_any_view_is_what_numpy_has(
    tmp_path_factory: pytest.TempPathFactory, cuts: Any, axes: list[int], dtype: str, order: writers.Order
) -> None:
    """Views are forward slices and permutations of a storage of 120 elements."""
    values = np.arange(120).astype(dtype).reshape(6, 5, 4)
    forwards = tuple(slice(cut.start, cut.stop, abs(cut.step or 1)) for cut in cuts)
    view = values[forwards].transpose(axes)
    offset = (view.__array_interface__["data"][0] - values.__array_interface__["data"][0]) // values.itemsize
    strides = tuple(stride // values.itemsize for stride in view.strides)
    storage = Storage({"f2": "Half", "f4": "Float", "f8": "Double"}[dtype] + "Storage", "0", 120)
    tensors = read(
        tmp_path_factory.getbasetemp() / "view",
        {"a": View(storage, offset, view.shape, strides)},
        {"0": values.astype(values.dtype.newbyteorder(order)).tobytes()},
        byteorder=order,
    ).tensors
    np.testing.assert_array_equal(tensors["a"].stored(), view)
    np.testing.assert_array_equal(tensors["a"].load("float64"), view.astype("float64"))


def test_aligned_float32_is_the_mapping_itself(tmp_path: Path) -> None:
    """Transposed arrays too, which products accept; anything else is copied."""
    views = {"whole": WHOLE, "transposed": View(FLOAT6, 0, (3, 2), (1, 3)), "strided": View(FLOAT6, 0, (3,), (2,))}
    tensors = read(tmp_path / "x", views).tensors
    mapping = np.frombuffer(tensors["whole"].data, np.uint8)
    for name, shared in (("whole", True), ("transposed", True), ("strided", False)):
        assert np.shares_memory(tensors[name].load(), mapping) == shared
        assert np.shares_memory(tensors[name].stored(), mapping)
        assert not tensors[name].stored().flags.writeable
    arrays = random_arrays(small(), dtype="float32")
    model = npgpt.load(writers.write(tmp_path, {"model.pth": writers.torch_zip(arrays)}), n_head=3)
    assert all(not array.flags.owndata for array in to_arrays(model.parameters).values())
    squeezed = npgpt.load(writers.write(tmp_path, {"model.pth": writers.torch_zip(arrays, alignment=1)}), n_head=3)
    same(to_arrays(squeezed.parameters), arrays)


def test_a_head_that_shares_the_storage_of_wte_is_tied(tmp_path: Path) -> None:
    """Both may be transposed views."""
    arrays = random_arrays(small(), dtype="float32")
    views, storages = writers.in_storages(arrays)
    for strides in ((21, 1), (1, 40)):
        shared = views["wte.weight"]._replace(strides=strides)
        path = put(tmp_path / "m.pth", StateDict(views | {"wte.weight": shared, "lm_head.weight": shared}), storages)
        model = npgpt.load(path, n_head=3)
        assert model.config.tie_word_embeddings
        expected = arrays["wte.weight"] if strides[1] == 1 else arrays["wte.weight"].reshape(21, 40).T
        np.testing.assert_array_equal(model.parameters.wte.weight, expected)


# not: same_bits without the strides: a head that is wte's transpose, in one storage, taken for wte itself
def test_two_views_from_one_place_need_not_be_the_same(tmp_path: Path) -> None:
    storage = writers.Storage("FloatStorage", "0", 4)
    views = {"a": writers.View(storage, 0, (2, 2), (2, 1)), "b": writers.View(storage, 0, (2, 2), (1, 2))}
    program = writers.pickled(writers.StateDict(views))
    members = writers.torch_members(program, {"0": np.arange(4, dtype=np.float32).tobytes()})
    tensors = torch_zip.read(writers.write(tmp_path, {"m.pth": writers.zip_archive(members)})).tensors
    assert same_bits(tensors["a"], tensors["a"])
    assert not same_bits(tensors["a"], tensors["b"])


# --- where a training checkpoint keeps the weights -------------------------------------------------------------------

WRAPPED: dict[str, Callable[[StateDict], object]] = {
    "bare": lambda state: state,
    **{key: (lambda state, key=key: {key: state}) for key in training.WEIGHTS_KEYS},  # type: ignore[misc]
    "an unknown key": lambda state: {"ema": state},
    "beside a loss of no dimensions": lambda state: {"model": state, "best_val_loss": View(FLOAT6, 0, (), ())},
    "an unknown key beside a loss": lambda state: {"ema": state, "best_val_loss": View(FLOAT6, 0, (), ())},
    "beside a smaller state dict": lambda state: {"state_dict": state, "ema": {"a": WHOLE}},
    "beside an optimizer's state": lambda state: {
        "model": state,
        "optimizer": {
            "state": {0: {"step": View(FLOAT6, 0, (), ()), "exp_avg": WHOLE}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "params": [0, 1], "foreach": None, "fused": True}],
        },
        "iter_num": 5000,
        "device": Call(Global("torch", "device"), ("cuda", 0)),
        "shape": Call(Global("torch", "Size"), ((2, 3),)),
        "rng_state": View(Storage("ByteStorage", "rng", 8), 0, (8,), (1,)),
    },
    "OrderedDict": lambda state: Call(OrderedDict, (), {"a": 1}) and OrderedDict(model=state),
}


@pytest.mark.parametrize("form", WRAPPED)
def test_where_the_weights_lie(tmp_path: Path, form: str) -> None:
    arrays = random_arrays(small(), dtype="float32")
    views, storages = writers.in_storages(arrays)
    views = {
        name: view._replace(storage=view.storage._replace(key=f"w{view.storage.key}")) for name, view in views.items()
    }
    held = {f"w{key}": content for key, content in storages.items()} | {"0": SIX.tobytes(), "rng": bytes(8)}
    path = put(tmp_path / "m.pth", WRAPPED[form](StateDict(views)), held)
    same(to_arrays(npgpt.load(path, n_head=3).parameters), arrays)


@pytest.mark.parametrize("key", training.CONFIG_KEYS)
def test_the_configuration_beside_the_weights(tmp_path: Path, key: str) -> None:
    arrays = random_arrays(small(), dtype="float32")
    views, storages = writers.in_storages(arrays)
    stated = {
        "n_layer": 2,
        "n_heads": 3,
        "hidden_size": 21,
        "optimizer": Call(Global("torch", "Size"), ((1,),)),
        5: None,
    }
    path = put(tmp_path / "m.pth", {"model": StateDict(views), key: stated}, storages)
    assert npgpt.load(path).config == small()
    stated["n_layer"] = 3
    put(path, {"model": StateDict(views), key: stated}, storages)
    with pytest.raises(NpgptError, match=rf"does not fit {key} in .*m\.pth: it has 2 blocks and n_layer is 3"):
        npgpt.load(path)


SIZES = {"n_layer": 2, "n_head": 3, "n_embd": 21}
CONFIG = Global("train_gpt2", "GPTConfig")


def omegaconf(fields: dict[str, Any]) -> Call:
    """Return a DictConfig, whose nodes hold the values."""
    node, about = Global("omegaconf.nodes", "AnyNode"), {"_metadata": None, "_parent": None}
    nodes = {
        key: value if isinstance(value, Call) else Call(node, (), about | {"_val": value})
        for key, value in fields.items()
    }
    return Call(Global("omegaconf.dictconfig", "DictConfig"), (), {"_metadata": None, "_content": nodes})


def of_numpy(value: int) -> Call:
    """Return an int64 with its bytes in protocol 2's form."""
    dtype = Call(Global("numpy", "dtype"), ("i8", False, True), (3, "<", None, None, None, -1, -1, 0))
    content = Call(Global("_codecs", "encode"), (value.to_bytes(8, "little").decode("latin1"), "latin1"))
    return Call(Global("numpy._core.multiarray", "scalar"), (dtype, content))


class Items(dict[str, Any]):
    """A subclass of dict, like Lightning's AttributeDict."""


STATED: dict[str, dict[str, Any]] = {
    "a dataclass": {"config": Call(CONFIG, (), SIZES)},
    "a dataclass with slots": {"config": Call(CONFIG, (), (None, SIZES))},
    "a namespace": {"args": Call(Global("argparse", "Namespace"), (), SIZES | {"lr": 1e-3, "out": Call(CONFIG)})},
    "a dictionary's subclass": {"hyper_parameters": Items(SIZES)},
    "a dataclass among hyperparameters": {"hyper_parameters": Items(lr=0.1, config=Call(CONFIG, (), SIZES))},
    "omegaconf": {"cfg": omegaconf(SIZES)},
    "omegaconf in omegaconf": {"cfg": Call(CONFIG, (), {"_content": {"config": omegaconf(SIZES)}})},
    "under a model's name, as Hydra has it": {"cfg": omegaconf({"data": "a", "model": omegaconf(SIZES)})},
    "within what states a size itself": {"args": Call(CONFIG, (), {"n_embd": 21, "model": Call(CONFIG, (), SIZES)})},
    "more under a usual key than under another": {"config": Call(CONFIG, (), SIZES), "conf": SIZES | {"n_head": 7}},
    "NumPy's numbers": {"config": {"n_layer": of_numpy(2), "n_head": of_numpy(3), "n_embd": of_numpy(21)}},
    "an enum": {"config": SIZES | {"activation_function": Call(Global("train", "Act"), ("gelu_new",))}},
    "another key": {"conf": Call(CONFIG, (), SIZES)},
    "after one that states nothing": {"args": Call(CONFIG, (), {"n_head_dim": 3}), "config": Call(CONFIG, (), SIZES)},
}


@pytest.mark.parametrize("form", STATED)
def test_an_object_states_the_configuration(tmp_path: Path, form: str) -> None:
    views, storages = writers.in_storages(random_arrays(small(), dtype="float32"))
    path = put(tmp_path / "m.pth", {"model": StateDict(views)} | STATED[form], storages)
    assert npgpt.load(path).config == small()  # n_head is in no shape
    checkpoint = open_checkpoint(path)
    assert checkpoint.stated["n_embd"] == 21
    assert type(checkpoint.stated["n_embd"]) is int


@pytest.mark.parametrize(
    "value", [3, [1], Call(CONFIG), Call(CONFIG, (), 3), Call(CONFIG, (1, 2)), Call(CONFIG, (), {})]
)
def test_an_object_that_states_nothing(tmp_path: Path, value: object) -> None:
    views, storages = writers.in_storages(random_arrays(small(), dtype="float32"))
    path = put(tmp_path / "m.pth", {"model": StateDict(views), "config": value, "conf": {"n_head": 7}}, storages)
    with pytest.raises(NpgptError, match="does not state n_head, and no shape depends on it"):
        npgpt.load(path)
    assert npgpt.load(path, n_head=3).config == small()


def of_type(kind: Global, function: Global = Global("torch._utils", "_rebuild_tensor_v2")) -> Call:  # noqa: B008
    """Return a tensor of a type, or with attributes."""
    hooks = Call(Global("collections", "OrderedDict"))
    return Call(
        Global("torch._tensor", "_rebuild_from_type_v2"),
        (function, kind, (FLOAT6, 0, (2, 3), (3, 1), False, hooks), {"name": Call(CONFIG)}),
    )


def test_a_tensor_with_attributes(tmp_path: Path) -> None:
    for module, name in (("torch", "Tensor"), ("torch.nn.parameter", "Parameter"), ("torch.nn.parameter", "Buffer")):
        path = put(tmp_path / "x", {"a": of_type(Global(module, name))})
        np.testing.assert_array_equal(torch_zip.read(path).tensors["a"].load(), SIX.reshape(2, 3))


def test_a_state_dict_with_something_else_in_it(tmp_path: Path) -> None:
    """The majority decides: a few values that are not tensors are left out, with a note."""
    arrays = random_arrays(small(), dtype="float32")
    views, storages = writers.in_storages(arrays)
    path = put(tmp_path / "m.pth", {"model": views | {"_extra_state": Call(CONFIG), "version": 3}}, storages)
    model = npgpt.load(path, n_head=3)
    same(to_arrays(model.parameters), arrays)
    assert model.notes == ("ignored, not a tensor: '_extra_state', 'version'",)
    put(path, views | {"lm_head.weight": Call(CONFIG), "args": Call(CONFIG)}, storages)
    assert npgpt.load(path, n_head=3).notes == ("ignored, not a tensor: 'lm_head.weight'",)


UNREAD: dict[str, tuple[object, str]] = {
    "a type of storage": (
        WHOLE._replace(storage=FLOAT6._replace(kind="ComplexFloatStorage")),
        "torch.ComplexFloatStor",
    ),
    "a way to build": (
        Call(Global("torch._utils", "_rebuild_sparse_tensor"), (1,)),
        "torch._utils._rebuild_sparse_ten",
    ),
    "a subclass": (of_type(Global("my.types", "Quantized")), "my.types.Quantized"),
    "another way to build": (of_type(Global("torch", "Tensor"), Global("my.types", "build")), "my.types.build"),
    "a storage": (WHOLE._replace(storage=Call(Global("os", "system"), ("a",))), "os.system"),
    "an offset": (WHOLE._replace(offset=Call(Global("os", "system"))), "os.system"),
    "a shape": (WHOLE._replace(shape=(2, Call(Global("os", "system")))), "os.system"),
    "a stride": (WHOLE._replace(strides=(Global("os", "system"), 1)), "os.system"),
    "a parameter": (
        Call(Global("torch._utils", "_rebuild_parameter"), (Call(Global("torch._utils", "_rebuild_x")),)),
        "_rebuild_x",
    ),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_only_a_tensor_that_needs_a_name_is_refused(tmp_path: Path, kind: str) -> None:
    """An unknown object is inert beside the weights, and refused by name as a weight."""
    arrays = random_arrays(small(), dtype="float32")
    views, storages = writers.in_storages(arrays)
    tensor, name = UNREAD[kind]
    state = {"exp_avg": tensor, "step": 3}
    path = put(tmp_path / "m.pth", {"model": StateDict(views), "optimizer": {"state": {0: state}}}, storages)
    same(to_arrays(npgpt.load(path, n_head=3).parameters), arrays)
    for value in (views | {"h.0.ln_1.bias": tensor}, {"model": views | {"h.0.ln_1.bias": tensor}, "epoch": 3}):
        with pytest.raises(
            NpgptError, match=rf"m\.pth: h\.0\.ln_1\.bias asks for \S*{re.escape(name)}\S*, which npgpt does"
        ):
            npgpt.load(put(path, value, storages), n_head=3)


def test_a_whole_module_is_named(tmp_path: Path) -> None:
    module = Call(Global("model", "GPT"), (), {"_modules": {"wte": Call(Global("torch.nn", "Embedding"))}})
    for value in (module, {"model": module}, {"epoch": 3, "net": module}, {"state_dict": {"a": module}}):
        with pytest.raises(NpgptError, match=r"asks for model\.GPT, which npgpt does not run: .*model\.state_dict\(\)"):
            torch_zip.read(put(tmp_path / "x", value))


def test_weights_in_a_subclass_of_dict(tmp_path: Path) -> None:
    arrays = random_arrays(small(), dtype="float32")
    views, storages = writers.in_storages(arrays)
    for value in (Items(views), Items(model=Items(views))):
        same(to_arrays(npgpt.load(put(tmp_path / "m.pth", value, storages), n_head=3).parameters), arrays)


ARRAY = Call(Global("numpy._core.multiarray", "_reconstruct"), (Global("numpy", "ndarray"), (0,)), (1, (3,)))


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"logits": ARRAY}, "logits"),
        ({"logits": WHOLE, "h.0": ARRAY}, "h.0"),
        ((WHOLE, ARRAY), "arr_1"),
        ({"logits": WHOLE, "hidden_states": (WHOLE, ARRAY)}, "hidden_states.1"),
    ],
)
def test_numpys_arrays_are_no_outputs_that_are_passed_over(tmp_path: Path, value: object, name: str) -> None:
    with pytest.raises(
        NpgptError, match=rf"x: {name} asks for numpy\._core\.multiarray\._reconstruct, which npgpt does"
    ):
        torch_zip.read_outputs(put(tmp_path / "x", value))


def test_one_list_of_outputs_under_many_names(tmp_path: Path) -> None:
    """Reading the list under every name would give 4,000,000 outputs."""
    items = [WHOLE] * 2000
    with pytest.raises(NpgptError, match="x contains more than 100000 outputs in lists"):
        torch_zip.read_outputs(put(tmp_path / "x", {f"a{n}": items for n in range(2000)}))


def test_what_is_left_out_of_outputs_is_said(tmp_path: Path) -> None:
    """transformers' outputs are a subclass of dict."""
    held = {"logits": WHOLE, "past_key_values": Call(Global("cache_utils", "DynamicCache")), "hidden_states": (WHOLE,)}
    for value in (held, Items(held)):
        found = torch_zip.read_outputs(put(tmp_path / "x", value))
        assert list(found.tensors) == ["logits", "hidden_states.0"]
        assert found.notes == ("Ignored, not a tensor: past_key_values",)
    put(tmp_path / "x", {"logits": View(FLOAT6, 0, (1, 6), (6, 1)), "config": Call(CONFIG)})
    report = npgpt.check(
        tmp_path / "x", [1], LanguageModel("it", small(vocab_size=6), random_parameters(small(vocab_size=6)))
    )
    assert "Ignored, not a tensor: config." in report.notes


def test_a_second_state_dict_of_the_same_size_is_said(tmp_path: Path) -> None:
    views, storages = writers.in_storages(random_arrays(small(), dtype="float32"))
    states = {"ema": StateDict(views), "model": StateDict(views), "smaller": {"a": views["wte.weight"]}}
    assert torch_zip.read(put(tmp_path / "m.pth", states, storages)).notes == (
        "the weights are taken from 'model', not from 'ema'",
    )
    assert torch_zip.read(put(tmp_path / "m.pth", {"model": states["model"]}, storages)).notes == ()
    bare = views | {"ema": StateDict(views)}
    assert torch_zip.read(put(tmp_path / "m.pth", bare, storages)).notes == (
        "the weights are taken from the file itself, not from 'ema'",
    )


def test_several_state_dicts_of_unknown_keys(tmp_path: Path) -> None:
    path = put(tmp_path / "m.pth", {"ema": {"a": WHOLE}, "teacher": {"a": WHOLE}})
    with pytest.raises(NpgptError, match="has several state dicts, 'ema', 'teacher': save the one to use"):
        torch_zip.read(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([WHOLE], "contains a list, not a state dict or a dictionary with one"),
        (WHOLE, "contains a tensor, not a state dict"),
        (None, "contains a NoneType, not a state dict"),
        ({}, "has no state dict; its keys are $"),
        ({"epoch": 3, 5: "a"}, "has no state dict; its keys are 'epoch', 5"),
        ({"model": {}}, "has no state dict; its keys are 'model'"),
        ({"model": {"a": WHOLE, "b": 3}}, "has no state dict; its keys are 'model'"),
        ({"model": {"deeper": {"a": WHOLE}}}, "has no state dict; its keys are 'model'"),
    ],
)
def test_no_state_dict(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(NpgptError, match=message):
        torch_zip.read(put(tmp_path / "x", value))


def test_one_dictionary_under_many_keys_is_read_once(tmp_path: Path) -> None:
    """Reading it under every key would give 2,000 × 2,000 entries."""
    state = {f"t{n}": WHOLE for n in range(2000)}
    path = put(tmp_path / "x", {f"d{n}": state for n in range(2000)})
    tracemalloc.start()
    with pytest.raises(NpgptError, match="has several state dicts"):
        torch_zip.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


# --- what is not asked for is not touched ----------------------------------------------------------------------------


def training_checkpoint(spare: bytes, **options: Any) -> list[Member]:
    """Return a model's archive members, with an optimizer's state in its own storage."""
    arrays = random_arrays(small(), dtype="float32")
    views, storages = writers.in_storages(arrays)
    adam = View(Storage("FloatStorage", "adam", len(spare) // 4), 0, (len(spare) // 4,), (1,))
    value = {"model": StateDict(views), "optimizer": {"state": {0: {"exp_avg": adam}}}}
    members = writers.torch_members(writers.pickled(value), storages)
    return [*members, Member("archive/data/adam", spare, **options)]


def test_an_optimizers_state_is_not_read(tmp_path: Path) -> None:
    """The wrong checksum of its 32 MB goes unnoticed because they are not read."""
    content = writers.zip_archive(training_checkpoint(bytes(2**25), crc=12345))
    path = writers.write(tmp_path, {"ckpt.pt": content})
    tracemalloc.start()
    model = npgpt.load(path, n_head=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    same(to_arrays(model.parameters), random_arrays(small(), dtype="float32"))


def test_a_storage_that_only_the_optimizer_has_may_be_missing_or_of_another_size(tmp_path: Path) -> None:
    for spare in (training_checkpoint(bytes(64))[:-1], training_checkpoint(bytes(64), size=32, stored=32)):
        path = writers.write(tmp_path, {"ckpt.pt": writers.zip_archive(spare)})
        assert npgpt.load(path, n_head=3).config == small()


# --- what is refused -------------------------------------------------------------------------------------------------


def loaded(path: Path) -> dict[str, NDArray[Any]]:
    return {name: tensor.load() for name, tensor in torch_zip.read(path).tensors.items()}


def refused(content: bytes, folder: Path, message: str) -> None:
    """Return the message of a refusal, one line that names the file."""
    path = writers.write(folder, {"bad.pth": content})
    with pytest.raises(NpgptError, match=message) as error:
        loaded(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600 + len(str(path))


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (View(FLOAT6, 1, (2, 3), (3, 1)), r"h\.0, \[2, 3\] with strides \[3, 1\] from 1, does not fit .* 6 elements"),
        (View(FLOAT6, 6, (1,), (1,)), r"h\.0, .* does not fit"),
        (View(FLOAT6, 6, (), ()), r"h\.0, .* does not fit"),
        (View(FLOAT6, 10**15, (1,), (1,)), r"h\.0, .* does not fit"),
        (View(FLOAT6, 0, (2,), (6,)), r"h\.0, .* does not fit"),
        (View(FLOAT6, 0, (2,), (2**58,)), r"h\.0, .* does not fit"),
        (View(FLOAT6, 0, (7,), (1,)), r"h\.0, .* does not fit"),
        (View(FLOAT6, 0, (7,), (0,)), r"h\.0, .* does not fit"),
        (View(FLOAT6, 0, (10**15,), (0,)), r"h\.0, .* does not fit"),
        (View(FLOAT6, 0, (3, 3), (1, 1)), r"h\.0, .* does not fit"),
        (View(FLOAT6, 0, (2**40, 2**40), (0, 0)), r"h\.0 has an impossible shape"),
        (View(FLOAT6, 0, (0, 2**58, 2**58), (0, 0, 0)), r"h\.0 has an impossible shape"),
        (View(FLOAT6, -1, (1,), (1,)), "malformed: .*a tensor's storage, offset, size or stride"),
        (View(FLOAT6, 5, (2, 3), (-3, -1)), "a tensor's storage, offset, size or stride"),
        (View(FLOAT6, 0, (-2, -3), (3, 1)), "a tensor's storage, offset, size or stride"),
        (View(FLOAT6, 0, (6,), (1, 1)), "a tensor's storage, offset, size or stride"),
        (View(FLOAT6, 0, (1,) * 65, (1,) * 65), "a tensor's storage, offset, size or stride"),
        (View(FLOAT6, 0, (1,), (2**61,)), "a tensor's storage, offset, size or stride"),
        (View(FLOAT6, 0, [6], [1]), "a tensor's storage, offset, size or stride"),
        (View(FLOAT6, 0, (6.0,), (1,)), "a tensor's storage, offset, size or stride"),
        (View(FLOAT6, 0, (True,), (1,)), "a tensor's storage, offset, size or stride"),
        (View(FLOAT6, False, (6,), (1,)), "a tensor's storage, offset, size or stride"),
        (View(None, 0, (6,), (1,)), "a tensor's storage, offset, size or stride"),
        (View(WHOLE, 0, (6,), (1,)), "a tensor's storage, offset, size or stride"),
        (View(FLOAT6._replace(numel=5), 0, (1,), (1,)), r"h\.0 is in archive/data/0, which has 24 bytes .* have 20"),
        (View(FLOAT6._replace(numel=7), 0, (1,), (1,)), r"h\.0 is in .* which has 24 bytes but must have 28"),
        (View(FLOAT6._replace(kind="DoubleStorage"), 0, (1,), (1,)), r"must have 48: 6 × float64"),
        (View(FLOAT6._replace(numel=-6), 0, (1,), (1,)), "a persistent id is not a storage"),
        (View(FLOAT6._replace(numel=2**60), 0, (1,), (1,)), "a persistent id is not a storage"),
        (View(FLOAT6._replace(key="1"), 0, (1,), (1,)), r"h\.0 is in archive/data/1, which is missing"),
        (
            View(FLOAT6._replace(key="../data.pkl"), 0, (1,), (1,)),
            r"is in archive/data/\.\./data\.pkl, which is missing",
        ),
        (View(FLOAT6._replace(kind="ComplexFloatStorage"), 0, (1,), (1,)), r"asks for torch\.ComplexFloatStorage"),
        (View(FLOAT6._replace(kind="UntypedStorage"), 0, (1,), (1,)), r"asks for torch\.UntypedStorage"),
    ],
)
def test_a_tensor_that_does_not_fit(tmp_path: Path, view: View, message: str) -> None:
    members = writers.torch_members(writers.pickled(StateDict({"h.0": view})), {"0": SIX.tobytes()})
    refused(writers.zip_archive(members), tmp_path, message)


PROGRAM = writers.pickled(StateDict({"a": WHOLE, "b": View(Storage("FloatStorage", "1", 6), 0, (6,), (1,))}))
PICKLE, ORDER, FIRST, SECOND, VERSION = writers.torch_members(PROGRAM, {"0": SIX.tobytes(), "1": bytes(24)})


# not: the metadata of _rebuild_tensor_v2 not looked at: weights of the wrong sign
def test_a_negated_tensor_is_refused(tmp_path: Path) -> None:
    storage = writers.Storage("FloatStorage", "0", 6)
    arguments = (storage, 0, (6,), (1,), False, Call(Global("collections", "OrderedDict")), {"neg": True})
    tensor = Call(Global("torch._utils", "_rebuild_tensor_v2"), arguments)
    program = writers.pickled({"w": tensor})
    content = writers.zip_archive(writers.torch_members(program, {"0": np.ones(6, np.float32).tobytes()}))
    with pytest.raises(NpgptError, match=r"a tensor is lazily negated or conjugated: save tensor\.resolve_neg\(\)"):
        torch_zip.read(writers.write(tmp_path, {"m.pth": content}))


def place(number: int) -> int:
    """Return the offset of a member's header in the valid archive."""
    content = writers.zip_archive([PICKLE, ORDER, FIRST, SECOND, VERSION])
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.infolist()[number].header_offset


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([PICKLE, ORDER, SECOND], "a is in archive/data/0, which is missing"),
        ([PICKLE, FIRST._replace(content=bytes(23)), SECOND], "a is in archive/data/0, which has 23 bytes but must"),
        ([PICKLE, FIRST._replace(content=bytes(25)), SECOND], "a is in archive/data/0, which has 25 bytes but must"),
        ([PICKLE, FIRST._replace(size=20), SECOND], "data/0 should have 20 bytes, but 24 are stored"),
        ([PICKLE, FIRST._replace(size=28), SECOND], "data/0 should have 28 bytes, but 24 are stored"),
        ([PICKLE, FIRST._replace(size=20, stored=20), SECOND], "which has 20 bytes but must have 24"),
        ([PICKLE, FIRST._replace(size=200, stored=200), SECOND], "data/1 at byte .* overlaps archive/data/0"),
        (
            [PICKLE, FIRST, SECOND._replace(size=2**31, stored=2**31)],
            "data/1 should have 2147483648 bytes, but .* left",
        ),
        ([PICKLE, FIRST, FIRST, SECOND], "data/0 is in the archive twice"),
        ([PICKLE, ORDER, ORDER, FIRST, SECOND], "byteorder is in the archive twice"),
        ([PICKLE, FIRST._replace(deflated=True), SECOND], "data/0 is compressed, but torch.save only stores files"),
        ([PICKLE._replace(deflated=True), FIRST, SECOND], "data.pkl is compressed"),
        ([PICKLE, FIRST, SECOND._replace(flags=1)], "data/1 is encrypted"),
        ([PICKLE, ORDER, FIRST, SECOND._replace(place=place(2))], "data/1 should begin at .* another member does"),
        ([PICKLE, ORDER, FIRST._replace(place=place(3)), SECOND], "data/0 should begin at .* another member does"),
        (
            [PICKLE, ORDER, FIRST, SECOND._replace(place=place(0), name="archive/data.pkl")],
            "data.pkl is in the archive twice|2 data.pkl",
        ),
        ([PICKLE, FIRST._replace(local_name="archive/data/1"), SECOND], "data/0 should begin at .* another member"),
        ([PICKLE, FIRST._replace(place=7), SECOND], "data/0 has no header at byte 7"),
        ([PICKLE, FIRST._replace(place=2**31), SECOND], "data/0 has no header at byte 2147483648"),
        (
            [ORDER, FIRST, SECOND],
            r"ZIP archive but not a checkpoint of torch.save: it has 0 data.pkl, and contains archive/byteorder",
        ),
        ([PICKLE, PICKLE._replace(name="other/data.pkl"), FIRST, SECOND], "it has 2 data.pkl"),
        ([PICKLE._replace(name="data.pkl"), FIRST, SECOND], "it has 0 data.pkl"),
        ([PICKLE, Member("archive/constants.pkl", b"N."), FIRST, SECOND], "is a TorchScript program"),
        ([PICKLE, Member("archive/byteorder", b"middle"), FIRST, SECOND], "byteorder is b'middle', neither little nor"),
        ([PICKLE, Member("archive/byteorder", b"little\n"), FIRST, SECOND], "neither little nor big"),
        ([PICKLE, Member("archive/byteorder", b"little" * 10**5), FIRST, SECOND], "neither little nor big"),
        ([PICKLE, ORDER._replace(crc=1), FIRST, SECOND], "byteorder is damaged"),
        ([PICKLE._replace(crc=1), FIRST, SECOND], r"data.pkl is damaged: its CRC-32 is .*, not 00000001"),
        ([PICKLE, FIRST._replace(crc=1), SECOND], "data/0 is damaged: its CRC-32 is .*, not 00000001"),
        ([PICKLE, FIRST, SECOND._replace(crc=1)], "data/1 is damaged"),
        ([PICKLE._replace(content=b"N."), FIRST, SECOND], "contains a NoneType"),
        ([PICKLE._replace(content=b""), FIRST, SECOND], "its pickle is malformed"),
        (
            [PICKLE._replace(content=bytes(2**24 + 1)), FIRST, SECOND],
            "data.pkl takes 16777217 bytes, more than 16777216",
        ),
        ([], "no checkpoint that npgpt reads|not a valid ZIP archive|0 data.pkl"),
    ],
)
def test_an_archive_that_is_not_as_torch_writes_it(tmp_path: Path, members: list[Member], message: str) -> None:
    refused(writers.zip_archive(members), tmp_path, message)


def test_the_honest_archive_and_what_may_be_there_besides(tmp_path: Path) -> None:
    """Extra members, any order, a checksum of 0 (none), no version, a comment and a prefix are accepted."""
    more = [Member("archive/.data/serialization_id", b"123"), Member("archive/.format_version", b"1")]
    for members in (
        [PICKLE, ORDER, FIRST, SECOND, VERSION],
        [SECOND, *more, VERSION, FIRST, ORDER, PICKLE],
        [member._replace(crc=0) for member in (PICKLE, ORDER, FIRST, SECOND)],
        [PICKLE, FIRST, Member("archive/data/", b""), SECOND],
        [PICKLE, FIRST._replace(listed=False), FIRST, SECOND],
    ):
        for zip64 in (False, True):
            path = writers.write(tmp_path, {"x.pth": writers.zip_archive(members, zip64=zip64)})
            tensors = torch_zip.read(path).tensors
            np.testing.assert_array_equal(tensors["a"].load(), SIX.reshape(2, 3))
            np.testing.assert_array_equal(tensors["b"].load(), np.zeros(6))
    path = writers.write(tmp_path, {"x.pth": writers.zip_archive([PICKLE, FIRST, SECOND], comment=b"by hand")})
    np.testing.assert_array_equal(torch_zip.read(path).tensors["a"].load(), SIX.reshape(2, 3))


def test_a_damaged_weight_is_reported_by_every_way_in(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arrays = random_arrays(small(), dtype="float32")
    content = bytearray(writers.torch_zip(arrays))
    at = content.index(arrays["h.1.mlp.c_fc.weight"].tobytes()) + 777
    content[at] ^= 1
    path = writers.write(tmp_path, {"m.pth": bytes(content)})
    for use in (lambda: npgpt.load(path, n_head=3), lambda: inspect(path, n_head=3)):
        with pytest.raises(NpgptError, match=r"m\.pth: archive/data/\d+ is damaged: its CRC-32 is"):
            use()
    assert cli.main(["convert", str(path), str(tmp_path / "out"), "--n-head", "3"]) == 2
    assert re.fullmatch(r"npgpt: error: .*m\.pth: archive/data/\d+ is damaged.*\n", capfd.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_zip_bomb(tmp_path: Path) -> None:
    """The file of 50 KB expands to 50 MB of zeros."""
    members = [PICKLE, FIRST._replace(content=bytes(50_000_000), deflated=True), SECOND]
    content = writers.zip_archive(members)
    assert len(content) < 60_000
    tracemalloc.start()
    refused(content, tmp_path, "data/0 is compressed")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_many_tensors_in_one_storage_are_no_model(tmp_path: Path) -> None:
    """964 tensors share a storage of 16 KB and would make a model of 1 MB with 80 blocks."""
    config = small(n_layer=80, n_embd=16, n_head=1, vocab_size=16, n_positions=16)
    storage = Storage("FloatStorage", "0", 4096)
    shapes = {name: array.shape for name, array in random_arrays(config).items()}
    views = {
        name: View(storage, 0, shape, tuple(prod(shape[axis + 1 :]) for axis in range(len(shape))))
        for name, shape in shapes.items()
    }
    path = put(tmp_path / "m.pth", StateDict(views), {"0": bytes(4096 * 4)})
    claimed = 4 * sum(map(prod, shapes.values()))
    assert claimed > 2 * path.stat().st_size
    with pytest.raises(
        NpgptError, match=rf"its tensors take {claimed} bytes, but its files only .*: they share storage"
    ):
        npgpt.load(path, n_head=1)


def test_a_storage_is_checked_once_however_many_tensors_lie_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint's parameters may all be views of one flat buffer."""
    arrays = random_arrays(small(), dtype="float32")
    flat = np.concatenate([array.ravel() for array in arrays.values()])
    views: dict[str, View] = {}
    begin = 0
    for name, array in arrays.items():
        strides = tuple(prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
        views[name] = View(Storage("FloatStorage", "0", flat.size), begin, array.shape, strides)
        begin += array.size
    path = put(tmp_path / "m.pth", StateDict(views), {"0": flat.tobytes()})
    lengths: list[int] = []
    crc32 = zlib.crc32

    def watched(data: memoryview) -> int:
        lengths.append(len(data))
        return crc32(data)

    monkeypatch.setattr(zlib, "crc32", watched)
    checkpoint = open_checkpoint(path, n_head=3)
    same({name: checkpoint.load(name) for name in checkpoint.sources}, arrays)
    assert lengths.count(flat.nbytes) == 1
