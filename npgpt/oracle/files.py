"""Read another implementation's numbers from a file or folder: arrays by name, ids and attention mask."""

from __future__ import annotations

import csv
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import formats, llmc, raw, stand_ins, torch_zip
from ..checkpoints.files import Kind, is_input, naming, read_bytes, reading
from ..checkpoints.strict_json import no_duplicates
from ..checkpoints.tensor import Tensor
from ..config import Config
from ..errors import NpgptError, numbers
from .naming import flat
from .outputs import as_array

IDS = ("token_ids", "input_ids", "ids", "tokens")
MASKS = ("attention_mask", "mask")
TARGETS = ("targets", "target_ids")
NAMELESS = r"arr_\d+|"  # NumPy's, and that of a tensor alone
NUMPY = "NumPy's"
NUMBERS = Kind("list of numbers", 2**31)  # gpt2's logits of a whole context take 1 GB as text
# What an .npz may unpack to: as much as gpt2's logits of a whole context in float64, which may be zeros and compress a
# thousandfold, or more where the file itself is large; float32 of a model compress to a half at best, masked ones to an
# eighth.
UNPACKED, RATIO = 2**29, 8
METADATA = "metadata"  # npgpt trace's
GREEDY = ("greedy_ids", "generated_ids", "sequences")
# safetensors' names of what is no float; torch.save's are NumPy's.
INTEGERS = {"I64": "int64", "I32": "int32", "I16": "int16", "U8": "uint8", "BOOL": "bool"}


@dataclass(frozen=True)
class Given:
    """What a file holds: stages by the names that they have there, ids, a mask, greedy ids, the targets of a loss."""

    path: Path
    arrays: Mapping[str, NDArray[Any]]
    token_ids: NDArray[Any] | None = None
    attention_mask: NDArray[Any] | None = None
    greedy_ids: NDArray[Any] | None = None
    targets: NDArray[Any] | None = None
    flat: NDArray[Any] | None = None  # logits of a width that only the model tells, and more behind them
    left: tuple[str, ...] = ()  # names of what is no array
    notes: tuple[str, ...] = ()  # what else is to be said of the file

    def ids(self, stated: NDArray[Any] | None) -> NDArray[Any]:
        """The ids, or those that are stated. Raises NpgptError where there are none, or two that differ."""
        found = stated if self.token_ids is None else self.token_ids
        if found is None:
            raise NpgptError(
                f"{self.path} holds no ids: give what it was run on, --prompt TEXT or --ids 1,2,3 (check(…, prompt=))"
            )
        told = found.reshape(-1).tolist()
        if stated is not None and stated.reshape(-1).tolist() != told:
            raise NpgptError(f"{self.path} holds other ids than --prompt or --ids says: {told!r:.200}")
        return found

    def stages(self, config: Config) -> Mapping[str, Any]:
        """The arrays; for a reference state logits, loss and gradients, cut out for this model. Raises NpgptError where
        the state has another number of them.
        """
        if self.flat is None or self.token_ids is None:
            return self.arrays
        shape = (*self.token_ids.shape, config.vocab_size)
        if self.flat.size < prod(shape):
            raise NpgptError(
                f"the reference state has {self.flat.size} numbers behind its ids, too few for {prod(shape)} logits"
            )
        logits, rest = np.split(self.flat, [prod(shape)])
        found: dict[str, Any] = {"logits": logits.reshape(shape)}
        if rest.size > 1:
            found["gradients"] = llmc.cut(rest[1:], config)
        return found | ({"loss": rest[0]} if rest.size else {})

    @property
    def is_greedy(self) -> bool:
        """Whether it holds greedy ids alone."""
        return self.greedy_ids is not None and not self.arrays


def read(path: str | os.PathLike[str], shape: Sequence[int] = (), dtype: str | None = None) -> Given:
    """Read .npz, .npy, .safetensors, .pt, .json, .csv, llm.c's debug state, or a folder of raw arrays.

    With a shape, the file holds nothing but little-endian numbers of dtype (None: float32). Raises NpgptError for a
    file of another kind and for a damaged one, OSError if it cannot be opened.
    """
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        return _folder(path)
    with reading(path) as file:
        is_input(path)
        head = file.read(stand_ins.HEAD)
    if shape:
        return Given(path, {"logits": _raw(path, tuple(shape), dtype or "float32")})
    if head.startswith(llmc.STATE):
        return _debug_state(path)
    if path.suffix in (".json", ".csv"):
        stand_ins.refuse(head, str(path))
        return _text(path)
    if head.startswith(b"\x93NUMPY"):
        with _foreign(path, NUMPY):
            return Given(path, {"logits": np.load(path, allow_pickle=False)})
    if head.startswith(b"PK") and _is_npz(path):
        return _npz(path)
    if path.suffix == ".bin" and not head.startswith(b"PK"):
        if what := stand_ins.by_content(head):
            raise NpgptError(f"{path} is {what}")
        raise NpgptError(
            f"{path} begins with {head[:8]!r}, no form that npgpt knows: raw numbers need --shape, such as 16,50257 "
            "(check(…, shape=(16, 50257)))"
        )
    contents = torch_zip.read_outputs(path) if head.startswith(b"PK") else formats.read(path)
    given = _sorted(path, {name: _array(tensor) for name, tensor in contents.tensors.items()})
    return replace(given, notes=contents.notes)


def _folder(path: Path) -> Given:
    """Return the arrays of a folder of raw arrays; its manifest may state the ids."""
    arrays, manifest = raw.read(path)
    given = _sorted(path, arrays)
    if manifest.get("token_ids") is None:
        return given
    stated = numbers(f"token_ids of {path / raw.MANIFEST}", manifest["token_ids"])
    if given.token_ids is not None and stated.reshape(-1).tolist() != given.token_ids.reshape(-1).tolist():
        raise NpgptError(f"{path} has a file of ids that differ from token_ids in {raw.MANIFEST}: remove one of them")
    return given if given.token_ids is not None else replace(given, token_ids=stated)


def _is_npz(path: Path) -> bool:
    """Whether a ZIP holds .npy files; torch.save's holds a pickle."""
    try:
        with _foreign(path, "a ZIP archive"), zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except NpgptError:  # the reader of torch.save's says what is wrong
        return False


@contextmanager
def _foreign(source: object, form: str) -> Iterator[None]:
    """Name the file where NumPy, zipfile or json fail on its content.

    What they raise for damaged files is of a dozen types, tokenize.TokenError among them, so that nothing of npgpt's
    own runs within this context: its mistakes would be taken for the file's.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, error.strerror, str(source)) from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NpgptError(f"{source} cannot be read as {form}: {reason:.200}") from None


def _npz(path: Path) -> Given:
    """NumPy's own reader, which runs nothing of the file. Raises NpgptError where it would unpack to too much."""
    with _foreign(path, NUMPY), zipfile.ZipFile(path) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        twice = len(archive.infolist()) - len(sizes)
    packed, unpacked = path.stat().st_size, sum(sizes.values())
    if twice:
        raise NpgptError(f"{path} has {twice} members that stand twice in the archive")
    if unpacked > (most := max(UNPACKED, RATIO * packed)):
        raise NpgptError(
            f"{path} takes {packed} bytes and would unpack to {unpacked}, above {most}: keep only what is to be "
            "compared, or save it without compression (numpy.savez)"
        )
    with _foreign(path, NUMPY):
        archive = np.load(path, allow_pickle=False)
    found = {}
    with archive:
        for name in archive.files:
            with _foreign(f"{path}: {name}", NUMPY):
                found[name] = archive[name]
    arrays = {name: array for name, array in found.items() if isinstance(array, np.ndarray)}
    return _sorted(path, arrays, [name for name in found if name not in arrays])


def _array(tensor: Tensor) -> NDArray[Any]:
    """Floats as they are, bfloat16 widened; whole numbers for ids and masks."""
    kind = INTEGERS.get(tensor.dtype, tensor.dtype)
    if kind not in INTEGERS.values():
        return tensor.load("float32") if kind == "bfloat16" else tensor.stored()
    dtype = np.dtype(kind).newbyteorder(">" if tensor.big_endian else "<")
    strides = None if tensor.strides is None else [stride * dtype.itemsize for stride in tensor.strides]
    return np.ndarray(tensor.shape, dtype, tensor.data, tensor.begin, strides).copy()


def _sorted(path: Path, arrays: Mapping[str, NDArray[Any]], left: Sequence[str] = ()) -> Given:
    """Ids and mask told from stages by their names. Of what np.savez(file, logits) and torch.save(logits, file) leave
    without a name, floats are logits, whole numbers the ids, and one number is a loss. Raises NpgptError for two of one
    meaning.
    """
    found: dict[str, NDArray[Any]] = {}
    for name, array in arrays.items():
        meant = name
        if re.fullmatch(NAMELESS, name):
            if not array.ndim:
                continue
            meant = IDS[0] if array.dtype.kind in "iu" else "logits"
        if meant in found:
            raise NpgptError(f"{name} has no name that says what it is: save it as logits=…, input_ids=…")
        found[meant] = array
    meanings = (IDS, MASKS, GREEDY, TARGETS)
    rest = {name: array for name, array in found.items() if name not in (*chain(*meanings), METADATA)}
    ids, mask, greedy, targets = (_only(path, found, meaning) for meaning in meanings)
    return Given(path, rest, ids, mask, greedy, targets, left=tuple(left))


def _only(path: Path, arrays: Mapping[str, NDArray[Any]], meaning: Sequence[str]) -> NDArray[Any] | None:
    """The array that has one of these names, None for none. Raises NpgptError for two that differ."""
    names = [name for name in meaning if name in arrays]
    for other in names[1:]:
        if not np.array_equal(arrays[names[0]], arrays[other]):
            raise NpgptError(f"{path} holds {names[0]} and {other}, which mean the same and differ: keep one of them")
    return arrays[names[0]] if names else None


def _text(path: Path) -> Given:
    """Numbers as text: JSON's nested lists are logits, an object's are stages by name; rows of a CSV are logits."""
    form = "nested lists of numbers" if path.suffix == ".json" else "rows of numbers with commas and no header"
    content = read_bytes(path, NUMBERS)
    with _foreign(path, form):
        text = content.decode("utf-8-sig")
    if path.suffix == ".json":
        with _foreign(path, form):
            found = json.loads(text, object_pairs_hook=no_duplicates)
        whole = flat(found) if isinstance(found, dict) else {"logits": found}
        if type(whole.get("loss")) in (int, float):
            whole["loss"] = [whole["loss"]]
        lists = {name: _numbers(path, name, value) for name, value in whole.items() if isinstance(value, list)}
        return _sorted(path, lists, [name for name in whole if name not in lists])
    with _foreign(path, form):
        rows = [[float(number) for number in row] for row in csv.reader(text.splitlines()) if row]
    return Given(path, {"logits": _numbers(path, "logits", rows)})


def _numbers(path: Path, name: str, rows: list[Any]) -> NDArray[Any]:
    """Nested lists as an array. Raises NpgptError where they are ragged or hold anything but numbers."""
    try:
        return as_array(rows)
    except NpgptError as error:
        raise NpgptError(f"{path}: {name}: {error}") from None


def _raw(path: Path, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Numbers without a header. Raises NpgptError where the file's size is another."""
    stored = np.dtype("<u2" if dtype == "bfloat16" else np.dtype(dtype).newbyteorder("<"))
    size, expected = path.stat().st_size, prod(shape) * stored.itemsize
    if size != expected:
        raise NpgptError(f"{path} has {size} bytes; {list(shape)} in {dtype} takes {expected}")
    with naming(path):
        found = np.fromfile(path, stored).reshape(shape)
    return (found.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else found


def _debug_state(path: Path) -> Given:
    """llm.c's reference state: 256 int32, ids [B, T], targets [B, T], logits [B, T, V], the loss, then gradients.

    Nothing in it states V, so that the logits are flat here, with all that follows them; Given.stages cuts them out.
    """
    with naming(path):
        content = np.memmap(path, "<i4", "r", shape=(path.stat().st_size // 4,))
    if len(content) < 256 or content[1] not in (1, 2):
        raise NpgptError(f"{path} is not a reference state of llm.c's that npgpt knows, or is truncated")
    B, T = int(content[2]), int(content[3])
    begin = 256 + 2 * B * T
    if B < 1 or T < 1 or len(content) < begin:
        raise NpgptError(f"{path} is truncated: its header says [{B}, {T}]")
    ids, targets = np.array(content[256:begin]).reshape(2, B, T)
    return Given(path, {}, ids, targets=targets, flat=content[begin:].view("<f4"))
