"""Files of numbers cannot claim more than they can hold."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npgpt.errors import NpgptError
from npgpt.oracle import files


def npy(shape: tuple[int, ...], content: bytes, version: tuple[int, int] = (1, 0)) -> bytes:
    """Return a .npy whose header states a shape of float32, whatever its content."""
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    write = np.lib.format.write_array_header_1_0 if version == (1, 0) else np.lib.format.write_array_header_2_0
    write(file, header)
    return file.getvalue() + content


def test_compressed_numbers_are_read(tmp_path: Path) -> None:
    """Half of all causal weights are zeros, and a mask may be constant."""
    weights = np.tril(np.random.default_rng(0).random((1, 2, 64, 64))).astype("f4")
    arrays: dict[str, Any] = {"h.0.attn.weights": weights, "attention_mask": np.ones((1, 10**6), "i8")}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    found = files.read(tmp_path / "a.npz")
    assert found.arrays["h.0.attn.weights"].tobytes() == weights.tobytes()
    assert found.attention_mask is not None
    assert found.attention_mask.sum() == 10**6


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("shape", [(3,), (2**20, 2**30), (2**40, 0, 5), ()])
def test_a_header_that_states_more_than_the_file_holds(
    tmp_path: Path, shape: tuple[int, ...], version: tuple[int, int]
) -> None:
    content = npy(shape, bytes(4), version)
    (tmp_path / "a.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("logits.npy", content)
    for name in ("a.npy", "a.npz"):
        if np.prod(shape, dtype=object) <= 1:
            assert files.read(tmp_path / name).arrays["logits"].shape == shape
            continue
        with pytest.raises(NpgptError, match=rf"{name}.* cannot be read as NumPy's"):
            files.read(tmp_path / name)
