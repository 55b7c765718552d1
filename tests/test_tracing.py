from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt import tracing
from npgpt.checkpoints import configs
from npgpt.checkpoints.places import EMBEDDED_WEIGHTS
from npgpt.errors import NpgptError
from npgpt.oracle import files
from tests.support.austen import AUSTEN
from tests.support.command import here, refused
from tests.support.thorough import examples

TEXT = "It is a truth"
WEIGHTS = EMBEDDED_WEIGHTS / "austen" / "model.safetensors"


def recorded(dtype: str = "float32") -> dict[str, Any]:
    model = npgpt.load(dtype=dtype)
    stages: dict[str, Any] = {}
    model(model.encode_prompt(TEXT), record=stages.__setitem__)
    return stages


def test_a_trace_is_what_the_forward_pass_records() -> None:
    model, expected = AUSTEN, recorded()
    found = tracing.trace(TEXT, model)
    assert list(found) == list(expected)
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])
        assert array.dtype == np.float32


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["logits"], ["logits"]),
        (["h.3"], ["h.3"]),
        (["*.attn.weights"], [f"h.{layer}.attn.weights" for layer in range(6)]),
        (["logits", "h.0.mlp.*"], ["h.0.mlp.c_fc", "h.0.mlp.act", "h.0.mlp.c_proj", "logits"]),
        (["h.[01].ln_?", "wte"], ["wte", "h.0.ln_1", "h.0.ln_2", "h.1.ln_1", "h.1.ln_2"]),
    ],
)
def test_only_what_fits_a_pattern(patterns: list[str], names: list[str]) -> None:
    assert list(tracing.trace([1, 2], AUSTEN, only=patterns)) == names


@pytest.mark.parametrize("pattern", ["logitz", "LOGITS", "h.6.*", ""])
def test_a_pattern_that_fits_nothing_is_told(pattern: str) -> None:
    with pytest.raises(
        NpgptError, match=r"no intermediate is called .*wte, wpe, embedding, h\.0\.ln_1, .*, h\.0, ln_f,"
    ):
        tracing.trace([1, 2], only=["logits", pattern])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_files_hold_names_ids_and_what_it_was_computed_from(tmp_path: Path, suffix: str, dtype: str) -> None:
    path, expected = tmp_path / f"trace{suffix}", recorded(dtype)
    code, out, error = here("trace", TEXT, "-o", str(path), "--dtype", dtype, cwd=tmp_path)
    size = sum(array.nbytes for array in expected.values())
    assert (code, out) == (0, "")
    assert error == f"npgpt: {path}: {len(expected)} intermediates of 4 tokens, {dtype}, {size:,} bytes\n"
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
            assert archive.files == ["metadata", "token_ids", *expected]
        about = json.loads(bytes(arrays.pop("metadata")))
    else:
        given = files.read(path)
        assert given.token_ids is not None
        arrays = dict(given.arrays) | {"token_ids": given.token_ids}
        texts = header(path)
        assert texts.pop("format") == "pt"
        plain = ("npgpt", "model", "dtype", "text")
        about = {key: text if key in plain else json.loads(text) for key, text in texts.items()}
    ids = arrays.pop("token_ids")
    assert (ids.dtype, ids.tolist()) == (np.int64, [about["token_ids"]])
    assert list(arrays) == list(expected) or suffix == ".safetensors"
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, expected[name])
    assert about == {
        "npgpt": npgpt.__version__,
        "model": "austen",
        "weights": {"model.safetensors": hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()},
        "config": configs.to_dict(AUSTEN.config),
        "dtype": dtype,
        "text": TEXT,
        "token_ids": AUSTEN.encode_prompt(TEXT),
    }
    assert [path.name for path in tmp_path.iterdir()] == [path.name]


def header(path: Path) -> dict[str, str]:
    """Return a safetensors file's metadata without using npgpt."""
    content = path.read_bytes()
    found: dict[str, str] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    return found


@pytest.mark.usefixtures("few_mistakes")
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"][: examples(1, 2)])
def test_check_reads_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"trace{suffix}"
    assert here("trace", TEXT, "-o", str(path), "--only", "logits", "--only", "h.2.attn.*")[0] == 0
    code, out, _ = here("check", str(path))
    assert (code, out.splitlines()[0]) == (0, "Matches: rounding in float32 explains every difference, in 10 stages.")


def test_a_model_without_text(bare: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    assert here("trace", "--ids", "3,39", "--model", str(bare), "-o", str(path))[0] == 0
    with np.load(path) as archive:
        assert archive["token_ids"].tolist() == [[3, 39]]
        assert json.loads(bytes(archive["metadata"]))["text"] is None
        assert archive["logits"].shape == (1, 2, 40)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([TEXT], "-o"),
        ([TEXT, "-o", "trace.txt"], "trace.txt must end in .npz or .safetensors, or give --to raw"),
        ([TEXT, "-o", "no/trace.npz"], "-o no/trace.npz: there is no folder no"),
        ([TEXT, "-o", "old.npz", "--only", "h.9.*"], "no intermediate is called 'h.9.*'"),
        (["", "-o", "old.npz"], "the text is empty"),
        (["-o", "old.npz"], "there is no text"),
        (["--ids", "1,4096", "-o", "old.npz"], "4096"),
        (["--ids", "one", "-o", "old.npz"], "--ids takes whole numbers"),
        (["truth " * 300, "-o", "old.npz"], "the context holds 256"),
    ],
)
def test_bad_input_is_one_line_and_the_old_file_stays(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "old.npz").write_bytes(b"old")
    assert message in refused("trace", *arguments, cwd=tmp_path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("old.npz", b"old")]


def test_a_disk_that_is_full_is_told_with_the_file_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace.npz"
    path.write_bytes(b"old")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    model = AUSTEN
    with pytest.raises(OSError, match=r"No space left on device: '.*trace\.npz'"):
        tracing.write(path, tracing.trace([1], model), tracing.metadata(model, [1], None))
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("trace.npz", b"old")]


@pytest.mark.parametrize("function", [npgpt.trace, npgpt.attend, npgpt.explain])
def test_functions_of_a_text_take_special_tokens_and_refuse_no_text(function: Any) -> None:
    plain, special = (len(AUSTEN.text_ids("<|endoftext|>", special=special)) for special in (False, True))
    assert (plain > 1, special) == (True, 1)
    function("<|endoftext|>", AUSTEN, special=True)
    with pytest.raises(NpgptError, match="the text is empty, and at least one token is needed"):
        function("", AUSTEN)
    with pytest.raises(NpgptError, match="one row of ids is expected, not 2"):
        function([[1], [2]], AUSTEN)
