"""Conversion is exact, atomic and streamed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import npgpt
from npgpt.checkpoints import configs, formats, safetensors
from npgpt.checkpoints import names as naming
from npgpt.checkpoints.open import open_checkpoint
from npgpt.checkpoints.tensor import cast, row_blocks
from npgpt.errors import NpgptError
from npgpt.parameters import to_arrays
from tests.support.command import ROOT, here, refused, run
from tests.support.conversion import listed, put
from tests.support.models import SHAPES, random_arrays, small
from tests.support.namings import NAMINGS
from tests.support.thorough import examples

CONFIG = small()


# --- what is written ---


@pytest.mark.parametrize("scheme", NAMINGS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_what_was_written_loads_back_bit_for_bit(tmp_path: Path, scheme: str, dtype: str) -> None:
    source = put(tmp_path / "source", scheme, dtype)
    npgpt.convert(source, tmp_path / "out", n_head=3)
    assert listed(tmp_path / "out") == ["config.json", "model.safetensors"]
    first, second = npgpt.load(source, n_head=3), npgpt.load(tmp_path / "out")
    assert second.config == first.config
    arrays = to_arrays(second.parameters)
    for name, array in to_arrays(first.parameters).items():
        np.testing.assert_array_equal(array.view(np.uint32), arrays[name].view(np.uint32), err_msg=name)
    file = formats.read(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in file.tensors.values()} == {"float32"}
    assert file.tensors["wte.weight"].load().flags.c_contiguous


@pytest.mark.parametrize("shape", SHAPES)
def test_every_configuration_survives(tmp_path: Path, shape: str) -> None:
    config = SHAPES[shape]
    (tmp_path / "source").mkdir()
    safetensors.write(tmp_path / "source" / "w", random_arrays(config, dtype="float32"))
    (tmp_path / "source" / "config.json").write_text(json.dumps(configs.to_dict(config) | {"pad_token_id": 7}))
    npgpt.convert(tmp_path / "source", tmp_path / "out")
    assert npgpt.load(tmp_path / "out").config == config
    stated = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (stated["pad_token_id"], stated["eos_token_id"], stated["model_type"]) == (7, None, "gpt2")


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 10), ("bfloat16", 7)])
def test_half_precision_is_the_nearest(tmp_path: Path, dtype: str, bits: int) -> None:
    source = put(tmp_path / "source")
    npgpt.convert(source, tmp_path / "out", n_head=3, dtype=dtype)
    file = formats.read(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in file.tensors.values()} == {dtype}
    for name, array in random_arrays(CONFIG, dtype="float32").items():
        found = file.tensors[name].load()
        np.testing.assert_array_less(np.abs(found - array), np.abs(array) * 2.0 ** -(bits + 1) * 1.0001 + 1e-7)


FLOAT32 = hnp.arrays(np.uint32, st.integers(0, 40)).map(lambda bits: bits.view(np.float32))


@given(FLOAT32)
@example(np.array([1.0, 1 + 2**-8, 1 + 2**-7 + 2**-8, -0.0, 1e-40, 3e38, np.inf, -np.inf, np.nan], np.float32))
@example(np.array([0x7F800001, 0xFF80FFFF], np.uint32).view(np.float32))  # a NaN whose payload is in the lower half
@settings(max_examples=examples(50, 300))
def test_bfloat16_is_the_nearest_float_with_7_bits_and_ties_go_to_the_even_one(x: Any) -> None:
    """The definition: the nearest multiple of the spacing at x."""
    try:
        bits = cast(x, "float32", "bfloat16", "x")
    except NpgptError as error:
        assert "too large for bfloat16" in str(error)  # noqa: PT017
        assert np.abs(x[np.isfinite(x)]).max() >= (2 - 2.0**-8) * 2.0**127
        return
    found = cast(bits, "bfloat16", "float64", "x")
    with np.errstate(invalid="ignore"):  # signalling NaN
        x = x.astype(np.float64)
    for value, near in zip(x, found, strict=True):
        if np.isnan(value):
            assert np.isnan(near)
        elif np.isinf(value):
            assert near == value
        else:
            spacing = 2.0 ** (max(np.frexp(value)[1] - 1, -126) - 7)
            steps = value / spacing  # exact, and round() of Python takes the even one of two equally near
            assert near == round(steps) * spacing


def test_literal_casts() -> None:
    x = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -2.5, 0.0], np.float32)
    assert cast(x, "float32", "bfloat16", "x").tolist() == [0x3F80, 0x3F80, 0x3F82, 0xC020, 0]
    assert cast(x, "float32", "float32", "x") is x
    big = x.astype(">f4")
    assert cast(big, "float32", "float32", "x").dtype == np.float32
    np.testing.assert_array_equal(cast(big, "float32", "float64", "x"), x)
    for dtype, value in (("float16", 65520.0), ("bfloat16", 3.4e38), ("float32", 1e39)):
        with pytest.raises(NpgptError, match=f"w has values too large for {dtype}: use a wider dtype"):
            cast(np.array([value]), "float64", dtype, "w")


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9)), st.integers(1, 200))
def test_blocks_of_rows_are_the_array(array: Any, size: int) -> None:
    parts = list(row_blocks(array, size))
    assert b"".join(part.tobytes() for part in parts) == array.tobytes()
    assert array.ndim == 0 or all(part.nbytes <= max(size, array[:1].nbytes) for part in parts)


# --- the vocabulary ---


def test_openais_vocabulary_gets_the_names_that_transformers_knows(tmp_path: Path) -> None:
    source = put(tmp_path / "source", encoder_json='{"a": 0}', vocab_bpe="#version: 0.2\n")
    npgpt.convert(source, tmp_path / "out", n_head=3)
    assert listed(tmp_path / "out") == ["config.json", "merges.txt", "model.safetensors", "vocab.json"]
    assert (tmp_path / "out" / "vocab.json").read_text() == '{"a": 0}'


def test_a_vocabulary_travels_as_it_is_with_what_belongs_to_it(tmp_path: Path) -> None:
    source = put(tmp_path / "source", vocab_json="{", merges_txt="x", tokenizer_config_json="{}")
    (source / "spiece.model").write_bytes(b"\0")
    npgpt.convert(source, tmp_path / "out", n_head=3)
    names = ["config.json", "merges.txt", "model.safetensors", "spiece.model", "tokenizer_config.json", "vocab.json"]
    assert listed(tmp_path / "out") == names
    assert (tmp_path / "out" / "vocab.json").read_text() == "{"


def test_the_embedded_model_converts_with_its_text(tmp_path: Path) -> None:
    npgpt.convert("austen", tmp_path / "out", dtype="float16")
    model = npgpt.load(tmp_path / "out")
    stated = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (stated["bos_token_id"], stated["eos_token_id"]) == (4095, 4095)
    text = "".join(npgpt.load().generate("It is", max_tokens=8, temperature=0))
    assert "".join(model.generate("It is", max_tokens=8, temperature=0)) == text


# not: OpenAI's pair renamed although Hugging Face's lies there too, which it would overwrite
def test_openais_vocabulary_beside_hugging_faces(tmp_path: Path) -> None:
    path = put(tmp_path / "m")
    for name in ("vocab.json", "merges.txt", "encoder.json", "vocab.bpe"):
        (path / name).write_text(name)
    npgpt.convert(path, tmp_path / "out", n_head=3)
    for name in ("vocab.json", "merges.txt", "encoder.json", "vocab.bpe"):
        assert (tmp_path / "out" / name).read_text() == name


# not: companions of a vocabulary that is not there
def test_companions_alone_stay_behind(tmp_path: Path) -> None:
    path = put(tmp_path / "m", tokenizer_config_json='{"tokenizer_class": "GPT2Tokenizer"}')
    npgpt.convert(path, tmp_path / "out", n_head=3)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


# --- whole or not at all ---


def test_nothing_is_overwritten_unless_told(tmp_path: Path) -> None:
    source, out = put(tmp_path / "source"), tmp_path / "out"
    npgpt.convert(source, out, n_head=3)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(NpgptError, match=r"out is not empty: .* npgpt convert --overwrite"):
        npgpt.convert(source, out, n_head=3, dtype="float16")
    assert (out / "model.safetensors").read_bytes() == before
    (out / "vocab.json").write_text("of another model")
    npgpt.convert(source, out, n_head=3, dtype="float16", overwrite=True)
    assert listed(out) == ["config.json", "model.safetensors"]
    assert len((out / "model.safetensors").read_bytes()) < len(before)
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(NpgptError, match=r"out contains thesis\.tex, so it is not just a converted model"):
        npgpt.convert(source, out, n_head=3, overwrite=True)
    assert (out / "thesis.tex").read_text() == "precious"
    assert listed(tmp_path) == ["out", "source"]


def test_the_source_is_never_its_own_destination(tmp_path: Path) -> None:
    source = put(tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    for folder in (source, tmp_path / "link", source / ".." / "source"):
        with pytest.raises(NpgptError, match=r"contains the source, model\.safetensors: convert into another folder"):
            npgpt.convert(source, folder, n_head=3, overwrite=True)
    with pytest.raises(NpgptError, match=r"model\.safetensors exists and is not a folder"):
        npgpt.convert(source, source / "model.safetensors", n_head=3, overwrite=True)
    assert listed(source) == ["model.safetensors"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    npgpt.convert(put(tmp_path / "source"), tmp_path / "out", n_head=3)
    assert (tmp_path / "out").is_symlink()
    assert listed(tmp_path / "disk") == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("broken", ["fsync", "replace", "rename", "too large"])
def test_a_conversion_broken_off_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, overwrite: bool
) -> None:
    source, out = put(tmp_path / "source", "huggingface"), tmp_path / "out"
    if overwrite:
        npgpt.convert(source, out, n_head=3)
    before = {path.name: path.read_bytes() for path in out.iterdir()} if overwrite else {}

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    if broken == "too large":
        arrays = NAMINGS["huggingface"](random_arrays(CONFIG, dtype="float32"))
        arrays["transformer.ln_f.bias"][3] = 70000
        safetensors.write(source / "model.safetensors", arrays)
        with pytest.raises(NpgptError, match=r"transformer\.ln_f\.bias has values too large for float16"):
            npgpt.convert(source, out, n_head=3, dtype="float16", overwrite=overwrite)
    else:
        monkeypatch.setattr(Path if broken == "rename" else os, broken, interrupt)
        with pytest.raises(KeyboardInterrupt):
            npgpt.convert(source, out, n_head=3, dtype="float16", overwrite=overwrite)
        monkeypatch.undo()
    assert ({path.name: path.read_bytes() for path in out.iterdir()} if out.exists() else {}) == before
    assert [name for name in listed(tmp_path) if name not in ("source", "out")] == []


def test_the_second_rename_broken_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = put(tmp_path / "source"), tmp_path / "out"
    npgpt.convert(source, out, n_head=3)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError("disk on fire")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="disk on fire"):
        npgpt.convert(source, out, n_head=3, overwrite=True)
    assert listed(tmp_path) == ["out", "source"]
    assert npgpt.load(out).config.n_head == 3


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path: Path) -> None:
    source = put(tmp_path / "source")
    with pytest.raises(NpgptError, match="dtype must be one of float32, float16, bfloat16, not 'float64'"):
        npgpt.convert(source, tmp_path / "out", n_head=3, dtype="float64")
    with pytest.raises(NpgptError, match="does not state n_head"):
        npgpt.convert(source, tmp_path / "out")
    assert listed(tmp_path) == ["source"]


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    checkpoint = npgpt.convert(
        put(tmp_path / "source"), tmp_path / "out", n_head=3, dtype="bfloat16", progress=lambda *done: seen.append(done)
    )
    total = 2 * sum(array.size for array in random_arrays(CONFIG).values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) == len(checkpoint.sources)


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
def test_memory_stays_far_below_the_models(tmp_path: Path) -> None:
    """Every tensor is transposed or rounded, 16 MB at a time, and rounding needs a few copies of that."""
    config = small(vocab_size=30_000, n_embd=512, n_head=8, n_layer=8)
    layout = {
        name: ("float32", shape[::-1] if ".c_" in name and len(shape) == 2 else shape)
        for name, shape in npgpt.parameters.schema(config).items()
    }
    safetensors.write_parts(tmp_path / "m", layout, lambda name: [np.full(layout[name][1], 0.5, np.float32)])
    size = (tmp_path / "m").stat().st_size
    assert size > 160e6
    program = (
        "import sys, threading, time, npgpt; npgpt.convert; peak = [0, 0]\n"
        "def read(): return 1024 * next(int(l.split()[1]) for l in open('/proc/self/status') if 'RssAnon' in l)\n"
        "base = read()\n"
        "def seen(*done): peak[0] = max(peak[0], read())\n"
        "npgpt.convert(sys.argv[1], sys.argv[2], n_head=8, dtype=sys.argv[3], progress=seen)\n"
        "print(peak[0] - base)\n"
    )
    for dtype in ("bfloat16", "float32")[: examples(1, 2)]:
        arguments = [sys.executable, "-c", program, str(tmp_path / "m"), str(tmp_path / dtype), dtype]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=ROOT)
        assert 0 < int(done.stdout) < 130e6 < size  # 8 × 16 MB and change; a whole model in memory is 164 MB


# --- the command ---


GUESS = (
    "the checkpoint does not state its GELU, and the erf form (nanoGPT's) is a guess: "
    "choose with --activation gelu (erf) or gelu_new (tanh), or load(…, activation=…)"
)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_a_stated_activation_is_written_down(tmp_path: Path, activation: str) -> None:
    put(tmp_path / "source")
    code, out, _ = here("convert", "source", "out", "--n-head", "3", "--activation", activation, cwd=tmp_path)
    assert code == 0
    assert "guess" not in out
    assert f"{'erf' if activation == 'gelu' else 'tanh'} GELU, tied head" in out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["activation_function"] == activation
    assert npgpt.load(tmp_path / "out").notes == ()


def test_the_command_says_what_it_found_and_what_comes_next(tmp_path: Path) -> None:
    put(tmp_path / "source")
    code, out, error = run("convert", "source", "out", "--n-head", "3", cwd=tmp_path)
    assert (code, error) == (0, "")
    assert out.splitlines() == [
        "read     source/model.safetensors: safetensors, nanoGPT's names, float32",
        "model    2 blocks, 21 = 3 heads × 7, 24 positions, 40 ids, erf GELU (a guess, written down), tied head",
        f"note     {GUESS}",
        "written  out: config.json, model.safetensors; 28 tensors float32",
        "next     npgpt inspect out",
    ]
    code, out, _ = here("convert", "source", "out", "--n-head", "3", "--dtype", "float16", "--overwrite", cwd=tmp_path)
    assert (code, out.splitlines()[3][-17:]) == (0, " float16, rounded")


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    put(tmp_path / "source")
    assert "does not state n_head" in refused("convert", "source", "out", cwd=tmp_path)
    assert "does not exist" in refused("convert", "/no/such", "out", cwd=tmp_path)
    assert "unknown naming scheme 'x': give one of" in refused(
        "convert", "source", "out", "--name-scheme", "x", cwd=tmp_path
    )
    error = refused("convert", "source", "out", "--name-scheme", "Open-AI", cwd=tmp_path)
    assert "unknown naming scheme 'Open-AI' (did you mean openai?): give one of" in error
    assert "--dtype must be float32, float16 or bfloat16, not 'int8'" in refused(
        "convert", "source", "out", "--dtype", "int8", cwd=tmp_path
    )
    assert "is the current folder" in refused("convert", "source", ".", "--n-head", "3", cwd=tmp_path)
    put(tmp_path / "full")
    assert "--overwrite" in refused("convert", "source", "full", "--n-head", "3", cwd=tmp_path)
    (tmp_path / "file").touch()
    assert "file/out cannot be a folder: " in refused("convert", "source", "file/out", "--n-head", "3", cwd=tmp_path)
    assert listed(tmp_path) == ["file", "full", "source"]


def test_the_help_names_every_scheme() -> None:
    help_text = " ".join(here("convert", "--help")[1].split())
    assert ", ".join(sorted(scheme.name for scheme in naming.SCHEMES)) == ", ".join(
        sorted(help_text.partition("guesses wrong: ")[2].partition(" --n-head")[0].split(", "))
    )


def test_a_source_that_was_not_converted_is_said_so_on_stderr(tmp_path: Path) -> None:
    put(tmp_path / "source", config_json='{"n_head": 3}')
    code, out, error = here(
        "generate", "--model", "source", "--ids", "1,2", "--max-tokens", "1", "--temperature", "0", cwd=tmp_path
    )
    assert (code, error) == (0, f"npgpt: source/model.safetensors: safetensors, nanoGPT's names\nnpgpt: {GUESS}\n")
    code, out, _ = here("inspect", "source", cwd=tmp_path)
    assert "  format          safetensors, nanoGPT's names\n" in out


def test_the_bar_is_for_terminals_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from npgpt.cli import progress

    with progress.bar("MB", 1e6) as draw:
        assert draw is None
    monkeypatch.setattr(progress, "INTERVAL", -1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.bar("MB", 1e6) as draw:
        assert draw is not None
        draw(250_000_000, 1_000_000_000)
    drawn = capsys.readouterr().err
    assert drawn.startswith("\r[")
    assert "250 of 1,000 MB, " in drawn
    assert drawn.endswith(" s left\x1b[K\r\x1b[K")


def test_a_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(put(tmp_path / "source") / "model.safetensors", n_head=3)
    assert checkpoint.stored_name("h.0.attn.c_attn.weight") == "_orig_mod.transformer.h.0.attn.c_attn.weight"
    assert checkpoint.dtypes() == {"float32"}


def test_a_full_disk_is_told_with_the_folder_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    put(tmp_path / "source")
    monkeypatch.setattr(safetensors, "write_parts", full)
    error = refused("convert", "source", "new/out", "--n-head", "3", cwd=tmp_path)
    assert error == "npgpt: error: new/out: no space left on device\n"
    assert listed(tmp_path) == ["source"]
