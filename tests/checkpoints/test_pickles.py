"""Malicious pickles are refused or inert, and nothing that they name is imported or called."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import enum
import functools
import io
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npgpt
import npgpt.checkpoints.write  # which convert imports when it is first called
from npgpt import cli
from npgpt.checkpoints import pickles, torch_objects
from npgpt.checkpoints.inspect import inspect
from npgpt.errors import NpgptError
from npgpt.parameters import to_arrays
from npgpt.text.vocabularies import load_tokenizer
from tests.support import writers
from tests.support.models import random_arrays, small
from tests.support.thorough import examples
from tests.support.writers import Call, Global, Storage, View


def read(program: bytes) -> object:
    """Read a pickle as data.pkl."""
    return pickles.read(program, "data.pkl", torch_objects.CALLS, torch_objects.NAMES, torch_objects.storage_of)


def archive(program: bytes) -> bytes:
    """Return the archive of a whole checkpoint with another pickle."""
    _, storages = writers.in_storages(random_arrays(small(), dtype="float32"))
    return writers.zip_archive(writers.torch_members(program, storages))


def text(value: str) -> bytes:
    """Return a text by BINUNICODE."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


# --- programs that run something -------------------------------------------------------------------------------------


class Exploit:
    """An object whose pickle calls a function when it is read."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


SYSTEM = os.system.__module__ + ".system"  # posix.system: what Python's own pickler writes for os.system
POPEN = Global("subprocess", "Popen")

# Name: the program, what the refusal names, mostly the global, and whether Python's own pickle runs the command.
Attack = tuple[Callable[[str], bytes], str, bool]
ATTACKS: dict[str, Attack] = {
    f"REDUCE, protocol {protocol}": (lambda c, protocol=protocol: pickle.dumps(Exploit(c), protocol), SYSTEM, True)  # type: ignore[misc]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
}
ATTACKS |= {
    "GLOBAL and REDUCE, protocol 0": (
        lambda c: b"cos\nsystem\np0\n(V" + c.encode() + b"\ntp1\nRp2\n.",
        "os.system",
        True,
    ),
    "GLOBAL and REDUCE, protocol 1": (lambda c: b"cos\nsystem\n(" + text(c) + b"tR.", "os.system", True),
    "INST": (lambda c: b"(" + text(c) + b"ios\nsystem\n.", "os.system", True),
    "OBJ": (lambda c: b"(cos\nsystem\n" + text(c) + b"o.", "os.system", True),
    "NEWOBJ": (
        lambda c: b"cbuiltins\ntuple\n(cbuiltins\nmap\n(cos\nsystem\n(" + text(c) + b"lt\x81t\x81.",
        "builtins.tuple",
        True,
    ),
    "NEWOBJ_EX": (
        lambda c: b"cbuiltins\ntuple\n(cbuiltins\nmap\n(cos\nsystem\n(" + text(c) + b"lt}\x92t}\x92.",
        "builtins.tuple",
        True,
    ),
    "STACK_GLOBAL": (lambda c: text("os") + text("system") + b"\x93(" + text(c) + b"tR.", "os.system", True),
    "STACK_GLOBAL with a dotted name": (
        lambda c: b"\x80\4" + text("shutil") + text("os.system") + b"\x93(" + text(c) + b"tR.",
        "shutil.os.system",
        True,
    ),
    "BUILD with __setstate__": (
        lambda c: b"ctypes\nSimpleNamespace\n)R}" + text("__setstate__") + b"cos\nsystem\nsb" + text(c) + b"b.",
        "types.SimpleNamespace",
        True,
    ),
    "BUILD on an object that is allowed": (
        lambda c: b"ccollections\nOrderedDict\n)R}" + text("__setstate__") + b"cos\nsystem\nsb" + text(c) + b"b.",
        "has no state dict",  # an attribute is dropped
        True,
    ),
    "EXT1": (lambda c: b"\x82\1(" + text(c) + b"tR.", "EXT1", False),
    "eval": (lambda c: b"cbuiltins\neval\n(" + text(f"__import__('os').system({c!r})") + b"tR.", "builtins.eval", True),
    "exec": (
        lambda c: b"c__builtin__\nexec\n(" + text(f"import os; os.system({c!r})") + b"tR.",
        "__builtin__.exec",
        True,
    ),
    "getattr": (
        lambda c: (
            b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(" + text("os") + b"tR" + text("system") + b"tR"
            b"(" + text(c) + b"tR."
        ),
        "builtins.getattr",
        True,
    ),
    "POP of the outcome": (lambda c: b"N(cos\nsystem\n" + text(c) + b"\x85R0N0.", "needs the instruction POP", True),
    "an attribute of an allowed class": (
        lambda c: text("collections") + text("OrderedDict.fromkeys.__class__") + b"\x93(" + text(c) + b"tR.",
        "collections.OrderedDict.fromkeys.__class__",
        False,
    ),
    "subprocess.Popen as a value": (lambda c: writers.pickled({"model": POPEN}), "subprocess.Popen", False),
    "in a tensor's arguments": (
        lambda c: writers.pickled({"a": View(Storage("FloatStorage", "0", 1), 0, (Call(os.system, (c,)),), (1,))}),
        SYSTEM,
        False,  # where torch is not there
    ),
    "in the place of a storage": (
        lambda c: writers.pickled({"a": View(Call(Global("os", "system"), (c,)), 0, (1,), (1,))}),
        "os.system",
        False,
    ),
    "inside the persistent id": (
        lambda c: b"(" + text("storage") + b"cos\nsystem\n(" + text(c) + b"tR" + text("0") + text("cpu") + b"K\1tQ.",
        "os.system",
        True,
    ),
    "as the persistent id": (lambda c: b"cos\nsystem\n(" + text(c) + b"tRQ.", "os.system", True),
    "in the metadata of a state dict": (
        lambda c: writers.pickled(Call(OrderedDict, (), {"_metadata": Call(os.system, (c,))})),
        "has no state dict",
        True,
    ),
    "as a key": (lambda c: b"}cos\nsystem\n(" + text(c) + b"tRNs.", "os.system", True),
}
for module, name in (
    ("torch", "load"),
    ("torch", "hub.load"),
    ("torch.serialization", "load"),
    ("torch._utils", "_rebuild_tensor_v2.__globals__"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "os.system"),
    ("torch", "FloatStorage.from_file"),
    ("torch", "Float\u0455torage"),  # a Cyrillic letter
    ("numpy", "load"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("_codecs", "decode"),
    ("collections", "OrderedDict "),
    ("", "collections.OrderedDict"),
    ("__main__", "_tensor"),
    ("npgpt.checkpoints.torch_zip", "CALLS"),
):
    ATTACKS[f"the name {module} {name}"] = (
        lambda c, module=module, name=name: text(module) + text(name) + b"\x93(" + text(c) + b"tR.",  # type: ignore[misc]
        f"{module}.{name}",
        False,
    )


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """Return the file that every attack would create."""
    return tmp_path / "canary"


def command(canary: Path) -> str:
    return f'echo > "{canary}"'


class Python(pickle.Unpickler):
    """Python's own unpickler, as torch.load uses without weights_only."""

    def persistent_load(self, pid: object) -> object:
        return pid


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_by_name_and_nothing_runs(
    tmp_path: Path, canary: Path, capfd: pytest.CaptureFixture[str], attack: str
) -> None:
    program, name, _ = ATTACKS[attack]
    honest = writers.write(tmp_path, {"honest.pth": archive(pickle.dumps({"a": "text"}, 0))})  # imports a codec
    with pytest.raises(NpgptError, match="no state dict"):
        npgpt.load(honest)
    path = writers.write(tmp_path, {"evil.pth": archive(program(command(canary)))})
    modules = set(sys.modules)
    for use in (npgpt.load, inspect, load_tokenizer):
        with pytest.raises(NpgptError) as error:
            use(path)
        assert name in str(error.value)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    assert cli.main(["convert", str(path), str(tmp_path / "out")]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"npgpt: error: {path}")
    assert not canary.exists()
    assert not (tmp_path / "out").exists()
    assert set(sys.modules) == modules


BESIDE = [attack for attack in ATTACKS if attack != "POP of the outcome"]


@pytest.mark.parametrize("attack", BESIDE)
def test_an_attack_beside_the_weights_is_inert(tmp_path: Path, canary: Path, attack: str) -> None:
    """The weights load, because no tensor needs the attack beside them; nothing is imported or called."""
    arrays = random_arrays(small(), dtype="float32")
    views, storages = writers.in_storages(arrays)
    state, harm = writers.pickled(writers.StateDict(views)), ATTACKS[attack][0](command(canary))
    for program in (
        b"}" + text("model") + state[:-1] + b"s" + text("args") + harm[:-1] + b"s.",
        b"}" + text("args") + harm[:-1] + b"s" + text("model") + state[:-1] + b"s.",
    ):
        path = writers.write(tmp_path, {"m.pth": writers.zip_archive(writers.torch_members(program, storages))})
        modules = set(sys.modules) | {"encodings.raw_unicode_escape"}  # which text of protocol 0 is in
        found = to_arrays(npgpt.load(path, n_head=3).parameters)
        assert all(found[name].tobytes() == array.tobytes() for name, array in arrays.items())
        assert not canary.exists()
        assert set(sys.modules) <= modules


@pytest.mark.skipif(os.name != "posix", reason="echo and quotes as in sh")
@pytest.mark.parametrize("attack", [name for name, (_, _, runs) in ATTACKS.items() if runs])
def test_the_attacks_are_real(canary: Path, attack: str) -> None:
    """Python's own pickle runs the attacks that npgpt refuses."""
    with contextlib.suppress(TypeError, AttributeError, pickle.UnpicklingError):  # once the command has run
        Python(io.BytesIO(ATTACKS[attack][0](command(canary)))).load()
    assert canary.exists()


def test_what_a_pickle_names_is_not_imported(tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "npgpt_canary.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Canary: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    programs = (
        b"cnpgpt_canary\nCanary\n.",
        b"cnpgpt_canary\nCanary\n)R.",
        b"cnpgpt_canary\nCanary\n)\x81.",
        b"(inpgpt_canary\nCanary\n.",
        text("npgpt_canary") + text("Canary") + b"\x93.",
        writers.pickled({"model": Call(Global("npgpt_canary", "Canary"))}),
        writers.pickled({"model": View(Global("npgpt_canary", "Canary"), 0, (), ())}),
    )
    path = tmp_path / "evil.pth"
    for program in programs:
        path.write_bytes(archive(program))
        with pytest.raises(NpgptError, match=r"asks for npgpt_canary\.Canary, which npgpt does not run"):
            npgpt.load(path)
    assert "npgpt_canary" not in sys.modules
    assert not canary.exists()
    pickle.loads(programs[0])
    assert canary.exists()
    del sys.modules["npgpt_canary"]


@pytest.mark.skipif(os.name != "posix", reason="echo and quotes as in sh")
def test_on_the_command_line(tmp_path: Path, canary: Path) -> None:
    path = tmp_path / "evil.pth"
    path.write_bytes(archive(pickle.dumps(Exploit(command(canary)), 2)))
    arguments = [sys.executable, "-m", "npgpt", "generate", "hello", "--model", str(path)]
    outcome = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert outcome.stderr == (
        f"npgpt: error: {path}: its pickle asks for {SYSTEM}, which npgpt does not run: it reads only tensors and "
        "plain values; save only the weights with torch.save(model.state_dict(), …)\n"
    )
    assert not canary.exists()


def test_attributes_are_not_set() -> None:
    """BUILD may set a state dict's _metadata, which is dropped; contents and methods stay."""
    state = b"}(" + text("__setstate__") + b"N" + text("items") + b"N" + text("a") + b"Nu"
    assert read(b"ccollections\nOrderedDict\n)R" + state + b"b.") == {}
    assert read(b"}" + state + b"b.") == {}
    for target in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"]", b")", b"N", text("a")):
        with pytest.raises(NpgptError, match="attributes of a value that has none"):
            read(target + b"}" + text("__globals__") + b"Nsb.")


# --- programs that take time or memory -------------------------------------------------------------------------------

TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\nq\0"
STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\1tQq\2"
ALIKE = [k * (2**61 - 1) for k in range(1, 40_000)]  # Python's hash of each is 0


def long(number: int) -> bytes:
    """Return a number by LONG1."""
    encoded = pickle.encode_long(number)
    return b"\x8a" + bytes([len(encoded)]) + encoded


@functools.cache
def bombs(scale: int) -> dict[str, bytes]:
    """Return programs of about `scale` instructions that could exhaust time or memory."""
    many = b"(" + b"K\1" * (scale // 2)
    return {
        "lists copied by OrderedDict": b"ccollections\nOrderedDict\nq\0" + many + b"lq\1"
        + b"h\0h\1\x85R" * (scale // 8) + b".",
        "lists copied by dict": b"cbuiltins\ndict\nq\0" + many + b"lq\1" + b"h\0h\1\x85R" * (scale // 8) + b".",
        "arguments copied": b"ctorch\ndevice\nq\0" + many + b"tq\1" + b"h\0h\1R" * (scale // 6) + b".",
        "a tensor's arguments copied": TENSOR + many + b"tq\1" + b"h\0h\1R" * (scale // 6) + b".",
        "a long shape looked at again and again": TENSOR + many + b"tq\1" + STORAGE
        + b"h\0(h\2K\0h\1h\1tR" * (scale // 16) + b".",
        "keys of one hash": b"}(" + b"".join(long(k) + b"N" for k in ALIKE[: scale // 2]) + b"u.",
        "memo of one hash": b"N" + b"".join(b"p%d\n" % k for k in ALIKE[:scale]) + b".",
        "far memo": b"N" + b"".join(b"r" + struct.pack("<I", 2**32 - 1 - k) for k in range(scale)) + b".",
        "far memo in decimals": b"Np4294967295\np99999999999999999999\n.",
        "dictionaries": b"}" * scale + b".",
        "memo": b"N" + b"\x94" * scale + b".",
        "dictionaries with something in them": b"}K\1K\1s" * (scale // 4) + b".",
        "lists": b"]" * scale + b".",
        "marks": b"(" * scale + b".",
        "numbers": b"J\1\1\1\1" * scale + b".",
        "records": b"ca\nb\nq\0" + b"h\0)R" * (scale // 4) + b".",
        "records of long arguments": b"ca\nb\nq\0" + many + b"tq\1" + b"h\0h\1R" * (scale // 6) + b".",
        "records of long arguments, by NEWOBJ_EX": b"ca\nb\nq\0" + many + b"tq\1" + b"}q\2"
        + b"h\0h\1h\2\x92" * (scale // 8) + b".",
        "records in records": b"ca\nb\nq\0" + b"N" + b"\x85q\1h\0h\1R" * (scale // 7) + b".",
        "a record built on and on": b"ca\nb\n)R" + b"}b" * (scale // 2) + b".",
        "states of records, nested": b"N" + b"q\1ca\nb\n)Rh\1b" * (scale // 12) + b".",
        "a record of many names": b"".join(b"ca%d\nb\n" % n for n in range(scale // 8)) + b".",
        "texts encoded": b"c_codecs\nencode\nq\0" + text("a" * scale) + text("latin1") + b"\x86q\1"
        + b"h\0h\1R" * (scale // 6) + b".",
        "sets": b"\x8f" * scale + b".",
        "frozen sets": b"(\x91" * (scale // 2) + b".",
        "INST": b"(ia\nb\n" * (scale // 6) + b".",
        "keys of tuples": b"}(" + b")N" * (scale // 2) + b"u.",
        "names of EXT": b"\x82\1" * (scale // 2) + b".",
        "nested tuples": b")" + b"\x85" * scale + b".",
        "nested lists": b"]" * (scale // 2) + b"a" * (scale // 2 - 1) + b".",
        "nested dictionaries": (b"}" + text("a")) * (scale // 3) + b"N" + b"s" * (scale // 3) + b".",
        "nested keys": b")" + b"\x85" * (scale - 4) + b"q\0}h\0Ns.",
        "nested persistent id": b")" + b"\x85" * (scale - 4) + b"Q.",
        "nested arguments": b"ctorch\ndevice\n)" + b"\x85" * (scale - 4) + b"R.",
        "a list in itself": b"]q\0" + b"h\0a" * (scale // 2) + b".",
        "a dictionary in itself": b"}q\0" + (text("a") + b"h\0s") * (scale // 3) + b".",
        "a tuple in a list in it": b"(]q\0tq\1h\0h\1a0h\1.",
        "DUP": b"]" + b"2" * scale + b".",
        "POP": b"N0" * (scale // 2) + b"N.",
        "POP_MARK": b"(1" * (scale // 2) + b"N.",
        "frames": b"\x80\4" + (b"\x95" + struct.pack("<Q", 2**64 - 1)) * scale + b"N.",
        "protocols": b"\x80\2" * scale + b"N.",
        "an INT of many digits": b"I" + b"9" * 100_000 + b"\n.",
        "a LONG of many digits": b"L" + b"9" * 100_000 + b"L\n.",
        "a LONG4 of many digits": b"\x8b" + struct.pack("<i", scale) + b"\x7f" * scale + b".",
        "LONG4 below zero": b"\x8b" + struct.pack("<i", -1) + b".",
        "BINSTRING below zero": b"T" + struct.pack("<i", -1) + b".",
        "BINBYTES8 of absurd length": b"\x8e" + struct.pack("<Q", 2**63 - 1) + b"a.",
        "BINBYTES8 of absurder length": b"\x8e" + struct.pack("<Q", 2**64 - 1) + b"a.",
        "BYTEARRAY8 of absurd length": b"\x96" + struct.pack("<Q", 2**62) + b"a.",
        "BINUNICODE8 of absurd length": b"\x8d" + struct.pack("<Q", 2**62) + b"a.",
        "BINUNICODE of absurd length": b"X" + struct.pack("<I", 2**32 - 1) + b"a.",
        "a float that is none": b"F" + b"\\" * scale + b"\n.",
        "a line without end": b"c" + b"a" * scale,
        "too many instructions": b"N" * (10 * scale) + b".",
    }  # fmt: skip


@pytest.mark.parametrize("bomb", bombs(64))
def test_a_bomb_takes_memory_in_proportion(bomb: str) -> None:
    program = bombs(examples(4_000, 8_000))[bomb]
    tracemalloc.start()
    try:
        read(program)
    except NpgptError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert len(str(error)) < 500  # noqa: PT017
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 128 * len(program) + 2**17


IN_A_PROCESS = """
import resource, sys, time
from npgpt.errors import NpgptError
from tests.checkpoints.test_pickles import bombs, read
programs = bombs(int(sys.argv[1]))
with open("/proc/self/statm") as statm:
    size = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**26, size + 2**26))
for name, program in programs.items():
    start = time.process_time()
    try:
        read(program)
        outcome = "read"
    except NpgptError:
        outcome = "refused"
    except MemoryError:
        outcome = "out of memory"
    print(f"{outcome}\t{time.process_time() - start}\t{name}", flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
def test_a_large_bomb_takes_a_second_and_little_memory() -> None:
    """The bomb has a fifth of the allowed instructions (a hundredth in plain runs); its process may use 64 MB more."""
    root = Path(__file__).parents[2]
    arguments = [sys.executable, "-c", IN_A_PROCESS, str(examples(10_000, 200_000))]
    outcome = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=root)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    rows = [line.split("\t") for line in outcome.stdout.splitlines()]
    assert {name for _, _, name in rows} == bombs(64).keys()
    assert [row for row in rows if row[0] == "out of memory" or float(row[1]) > 3] == []


def test_too_many_instructions() -> None:
    with pytest.raises(NpgptError, match="more than 1000000 instructions"):
        read(b"N" * 1_100_000 + b".")


# --- programs that are honest ----------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**255), 2**255)
    | st.floats(allow_nan=False)
    | st.text(st.characters(), max_size=20)
)
KEYS = st.text(max_size=8) | st.integers(1 - 2**60, 2**60 - 1) | st.floats(allow_nan=False) | st.none() | st.booleans()
PLAIN_VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=5) | st.lists(inner, max_size=5).map(tuple) | st.dictionaries(KEYS, inner, max_size=5)
    ),
    max_leaves=20,
)


@given(PLAIN_VALUES, st.integers(0, pickle.HIGHEST_PROTOCOL))
@settings(max_examples=examples(50, 500))
def test_plain_values_are_read_as_python_reads_them(value: object, protocol: int) -> None:
    program = pickle.dumps(value, protocol)
    assert repr(read(program)) == repr(value)
    assert repr(read(program)) == repr(pickle.loads(program))


@given(PLAIN_VALUES)
@settings(max_examples=examples(50, 100))
def test_bytes_before_protocol_3_are_read_where_they_are_short(value: object) -> None:
    """Python wrote them as calls of _codecs.encode, which could copy a long text repeatedly."""
    both = {"value": value, "short": b"\0\xff" * 8, "bytes": b"\0\xff" * 200}
    assert repr(read(pickle.dumps(both, 4))) == repr(both)
    found = read(pickle.dumps(both, 2))
    assert isinstance(found, dict)
    assert repr(found.pop("bytes")) == "<_codecs.encode>"
    assert repr(found) == repr({"value": value, "short": b"\0\xff" * 8})


class Kind(enum.Enum):
    GELU = "gelu"


class Titles(dict[str, int]):
    """A subclass of dict with an attribute."""


class Numbers(list[int]):
    """A subclass of list."""


def described(value: Any) -> Any:
    """Return a value in which every record is its name, arguments, state and contents."""
    if isinstance(value, pickles.Global):
        return value.name
    if isinstance(value, pickles.Record):
        return value.name, *map(described, (value.arguments, value.state, value.contents))
    if isinstance(value, tuple | list):
        return type(value)(map(described, value))
    return {key: described(item) for key, item in value.items()} if isinstance(value, dict) else value


HERE = Kind.__module__
RECORDS: dict[str, tuple[object, int, object]] = {
    "an enum": (Kind.GELU, 2, (f"{HERE}.Kind", ("gelu",), None, None)),
    "a namespace": (argparse.Namespace(a=1), 2, ("argparse.Namespace", (), {"a": 1}, None)),
    "a namespace, protocol 0": (
        argparse.Namespace(a=1),
        0,
        ("copy_reg._reconstructor", ("argparse.Namespace", "__builtin__.object", None), {"a": 1}, None),
    ),
    "a path": (PurePosixPath("a/b"), 2, ("pathlib.PurePosixPath", ("a", "b"), None, None)),
    "a class": (Kind, 2, f"{HERE}.Kind"),
    "a set": ({1}, 2, ("__builtin__.set", ([1],), None, None)),
    "a set, protocol 4": ({1}, 4, [1]),
    "a frozen set, protocol 4": (frozenset({1}), 4, (1,)),
    "bytes, protocol 5": (bytearray(b"ab"), 5, bytearray(b"ab")),
    "a subclass of dict": (Titles(a=1), 2, (f"{HERE}.Titles", (), None, {"a": 1})),
    "a subclass of list": (Numbers([1, 2]), 2, (f"{HERE}.Numbers", (), None, [1, 2])),
    "defaultdict": (
        defaultdict[str, Any](list, a=1),
        2,
        ("collections.defaultdict", ("__builtin__.list",), None, {"a": 1}),
    ),
    "a date": (datetime.date(2024, 5, 6), 4, ("datetime.date", (b"\x07\xe8\x05\x06",), None, None)),
    "a partial": (
        functools.partial(str, errors="x"),
        2,
        ("functools.partial", ("__builtin__.unicode",), ("__builtin__.unicode", (), {"errors": "x"}, None), None),
    ),
    "NumPy's float": (np.float64(0.1), 2, 0.1),
    "NumPy's int": (np.int64(-5), 4, -5),
    "NumPy's float32": (np.float32(1.5), 4, 1.5),
    "NumPy's bool": (np.True_, 2, True),
    "a large number as a key": ({2**70: 1}, 4, {"<a key>": 1}),
    "a tuple as a key": ({("a", 1): 1}, 4, {"<a key>": 1}),
    "an enum as a key": ({Kind.GELU: 1}, 4, {f"<{HERE}.Kind>": 1}),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_an_object_becomes_a_record(kind: str) -> None:
    value, protocol, expected = RECORDS[kind]
    found = described(read(pickle.dumps(value, protocol)))
    assert ({str(key): item for key, item in found.items()} if isinstance(found, dict) else found) == expected


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (b"(K\1K\2ia\nb\n.", ("a.b", (1, 2), None, None)),
        (b"(ca\nb\nK\1o.", ("a.b", (1,), None, None)),
        (b"ca\nb\n)}\x92.", ("a.b", (), {}, None)),
        (b"ca\nb\n)}" + text("x") + b"K\1s\x92.", ("a.b", (), {"x": 1}, None)),
        (b"ca\nb\n)R)R.", ("a.b", (), None, None)),  # a call of what a call would have given
        (b"ca\nb\n)RK\1bK\2b.", ("a.b", (), 2, None)),
        (b"\x84\1\0\0\0.", "EXT4 1"),
        (b"(icollections\nOrderedDict\n.", {}),
        (b"ccollections\nOrderedDict\n)\x81.", {}),
        (b"ca\nb\n)Rq\0h\0a.", None),
    ],
)
def test_every_way_to_make_an_object(program: bytes, expected: object) -> None:
    if expected is None:  # a record in itself
        found = read(program)
        assert isinstance(found, pickles.Record)
        assert found.contents is not None
        assert found.contents[0] is found
    else:
        assert described(read(program)) == expected


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"", "without an end|exhausted"),
        (b"N", "exhausted before seeing STOP"),
        (b".", "the stack is empty"),
        (b"(.", "the stack is empty"),
        (b"t.", "there is no mark"),
        (b"u.", "there is no mark"),
        (b"(N(\x85.", "the stack is empty"),
        (b"NNs.", "the stack is empty"),
        (b"NNNs.", "it adds dict items"),
        (b"}(Nu.", "items must be pairs"),
        (b"NNa.", "it adds list items"),
        (b"}(]Nu.", "a key is a list or a dictionary"),
        (b"}(}Nu.", "a key is a list or a dictionary"),
        (b"N)\x81.", "calls a value that is not a function"),
        (b"ctorch\ndevice\n]\x81.", "calls a value that is not a function"),
        (b"(NNo.", "calls a value that is not a function"),
        (b"ctorch\ndevice\n)}" + text("a") + b"Ns\x92.", "with keyword arguments"),
        (b"Na.", "the stack is empty"),
        (b"cx\ny\n)R(NNu" + text("a") + b"a.", "it adds list items"),
        (b"\x8f(N\x90(NNu.", "it adds dict items"),
        (b"N}b.", "attributes of a value that has none"),
        (b"0.", "needs the instruction POP"),
        (b"h\0.", "malformed"),
        (b"NNR.", "calls a value that is not a function"),
        (b"ctorch\nFloatStorage\n)R.", "calls a value that is not a function"),
        (b"ctorch\ndevice\nNR.", "calls a value that is not a function"),
        (b"NN\x93.", "a global's name is not a string"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "missing 4 required positional arguments"),
        (b"ctorch._utils\n_rebuild_parameter\n(NtR.", "a parameter has no tensor"),
        (b"NQ.", "a persistent id is not a storage"),
        (b"Pstorage\n.", "no checkpoint needs the instruction PERSID"),
        (b"\x97.", "no checkpoint needs the instruction NEXT_BUFFER"),
        (b"\xff.", "unknown"),
        (b"I1e5\n.", "malformed"),
        (b"Fone\n.", "malformed"),
        (b"S'a\n.", "malformed"),
        (b"X\2\0\0\0\xff\xff.", "malformed"),
        (b"V\\uZZZZ\n.", "malformed"),
    ],
)
def test_whatever_is_malformed_is_refused_in_one_line(program: bytes, message: str) -> None:
    with pytest.raises(NpgptError, match=f"^data.pkl .*(?:{message})") as error:
        read(program)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
