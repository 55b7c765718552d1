"""Another implementation's numbers out of a file: arrays by name, ids and attention mask."""

from __future__ import annotations

import csv
import json
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import formats, llmc, torch_zip
from ..checkpoints.tensor import Tensor, check_file
from ..config import Config
from ..errors import NpgptError
from .naming import flat
from .outputs import as_array

IDS = ("token_ids", "input_ids", "ids", "tokens")
MASKS = ("attention_mask", "mask")
NAMELESS = r"arr_\d+|"  # NumPy's, and that of a tensor alone
METADATA = "metadata"  # npgpt trace's
GREEDY = ("greedy_ids", "generated_ids", "sequences")
TEXTS = (".json", ".csv")
INTEGERS = {"I64": "int64", "I32": "int32", "I16": "int16", "U8": "uint8", "BOOL": "bool"}  # safetensors' names
INTEGERS |= {name: name for name in ("int64", "int32", "int16", "uint8", "bool")}  # torch.save's


@dataclass(frozen=True)
class Given:
    """What a file holds: stages by the names that they have there, ids, a mask, greedy ids."""

    arrays: Mapping[str, NDArray[Any]]
    token_ids: NDArray[Any] | None = None
    attention_mask: NDArray[Any] | None = None
    greedy_ids: NDArray[Any] | None = None
    flat: NDArray[Any] | None = None  # logits of a width that only the model tells, and more behind them
    left: tuple[str, ...] = ()  # names of what is no array

    def stages(self, config: Config) -> Mapping[str, NDArray[Any]]:
        """The arrays, flat logits cut out for this model. Raises NpgptError where these are too few."""
        if self.flat is None or self.token_ids is None:
            return self.arrays
        count = self.token_ids.size * config.vocab_size
        if self.flat.size < count:
            raise NpgptError(
                f"the reference state has {self.flat.size} numbers behind its ids, too few for {count} logits"
            )
        return {"logits": self.flat[:count].reshape(*self.token_ids.shape, config.vocab_size)}


def read(path: Path, shape: Sequence[int] = (), dtype: str = "float32") -> Given:
    """Read .npz, .npy, .safetensors, .pt, .json, .csv, llm.c's debug state, or, with a shape, raw little-endian numbers
    of dtype.

    Raises NpgptError for a file of another kind, and for one that is damaged; OSError where it cannot be opened.
    """
    check_file(path)
    with path.open("rb") as file:
        head = file.read(8)
    if shape:
        return Given({"logits": _raw(path, tuple(shape), dtype)})
    if path.suffix in TEXTS:
        return _text(path)
    if head.startswith(llmc.STATE):
        return _debug_state(path)
    if head.startswith(b"\x93NUMPY"):
        return Given({"logits": _load(path)})
    if head.startswith(b"PK") and _is_npz(path):
        return _sorted(_load(path))
    if path.suffix == ".bin" and not head.startswith(b"PK"):
        raise NpgptError(
            f"{path} begins with {head!r}, no form that npgpt knows: raw numbers need --shape, such as 16,50257 "
            "(check(…, shape=(16, 50257)))"
        )
    contents = torch_zip.read_outputs(path) if head.startswith(b"PK") else formats.read(path)
    return _sorted({name: _array(tensor) for name, tensor in contents.tensors.items()})


def _is_npz(path: Path) -> bool:
    """Whether a ZIP holds .npy files; torch.save's holds a pickle."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def _load(path: Path) -> Any:
    """NumPy's own reader, which runs nothing of the file."""
    try:
        found = np.load(path, allow_pickle=False)
        return found if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise NpgptError(f"{path} cannot be read as NumPy's: {error}") from None


def _array(tensor: Tensor) -> NDArray[Any]:
    """Floats as they are, bfloat16 widened; whole numbers for ids and masks."""
    if tensor.dtype in INTEGERS:
        dtype = np.dtype(INTEGERS[tensor.dtype]).newbyteorder(">" if tensor.big_endian else "<")
        strides = None if tensor.strides is None else [stride * dtype.itemsize for stride in tensor.strides]
        return np.ndarray(tensor.shape, dtype, tensor.data, tensor.begin, strides).copy()
    return tensor.load("float32") if tensor.dtype == "bfloat16" else tensor.stored()


def _sorted(arrays: Mapping[str, NDArray[Any]]) -> Given:
    """Ids and mask told from stages by their names."""

    def take(names: tuple[str, ...]) -> NDArray[Any] | None:
        return next((arrays[name] for name in names if name in arrays), None)

    arrays = _positional(arrays)
    rest = {name: array for name, array in arrays.items() if name not in (*IDS, *MASKS, *GREEDY, METADATA)}
    return Given(rest, take(IDS), take(MASKS), take(GREEDY))


def _positional(arrays: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    """Name what np.savez(file, logits) and torch.save(logits, file) leave without a name: floats are logits, whole
    numbers the ids, and one number is a loss. Raises NpgptError where two could be one.
    """
    found: dict[str, NDArray[Any]] = {}
    for name, array in arrays.items():
        if not array.ndim and re.fullmatch(NAMELESS, name):
            continue
        meant = name if re.fullmatch(NAMELESS, name) is None else IDS[0] if array.dtype.kind in "iu" else "logits"
        if meant in found:
            raise NpgptError(f"{name} has no name that says what it is: save it as logits=…, input_ids=…")
        found[meant] = array
    return found


def _text(path: Path) -> Given:
    """Numbers as text: JSON's nested lists are logits, an object's are stages by name; rows of a CSV are logits."""
    try:
        text = path.read_text("utf-8-sig")
        if path.suffix == ".json":
            found = json.loads(text)
            whole = flat(found) if isinstance(found, dict) else {"logits": found}
            lists = {name: as_array(value) for name, value in whole.items() if isinstance(value, list)}
            return replace(_sorted(lists), left=tuple(name for name in whole if name not in lists))
        rows = [[float(number) for number in row] for row in csv.reader(text.splitlines()) if row]
        return Given({"logits": as_array(rows)})
    except (ValueError, RecursionError, csv.Error) as error:
        form = "nested lists of numbers" if path.suffix == ".json" else "rows of numbers with commas and no header"
        raise NpgptError(f"{path} cannot be read as {form}: {' '.join(str(error).split()):.200}") from None


def _raw(path: Path, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Numbers without a header. Raises NpgptError where the file's size is another."""
    stored = np.dtype("<u2" if dtype == "bfloat16" else np.dtype(dtype).newbyteorder("<"))
    size, expected = path.stat().st_size, prod(shape) * stored.itemsize
    if size != expected:
        raise NpgptError(f"{path} has {size} bytes; {list(shape)} in {dtype} takes {expected}")
    found = np.fromfile(path, stored).reshape(shape)
    return (found.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else found


def _debug_state(path: Path) -> Given:
    """llm.c's reference state: 256 int32, ids [B, T], targets [B, T], logits [B, T, V], the loss, then gradients.

    Nothing in it states V, so that the logits are flat here, with all that follows them; Given.stages cuts them out.
    """
    content = np.memmap(path, "<i4", "r", shape=(path.stat().st_size // 4,))
    if len(content) < 256 or content[1] not in (1, 2):
        raise NpgptError(f"{path} is no reference state of llm.c's that npgpt knows, or cut short")
    B, T = int(content[2]), int(content[3])
    begin = 256 + 2 * B * T
    if B < 1 or T < 1 or len(content) < begin:
        raise NpgptError(f"{path} is cut short: its header says [{B}, {T}]")
    ids = np.array(content[256 : 256 + B * T]).reshape(B, T)
    return Given({}, ids, flat=content[begin:].view("<f4"))
