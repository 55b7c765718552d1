"""Training, in examples/: its formulas, what is held out, and runs that are killed and go on."""

from __future__ import annotations

import gzip
import itertools
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from argparse import Namespace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import npgpt
from examples import austen, curve, train
from tests.support.documents import ROOT
from tests.support.models import random_parameters, small
from tests.support.thorough import examples

STEPS = examples(8, 24)  # a run that is begun again gets two steps further at least, and is killed 2 or 8 times
SIGMAS = 5  # of a count of independent draws: one count in two million lies farther from its mean


def test_literal_adamw() -> None:
    """Two steps with the gradients ½ and −½: v̂ stays ¼, and m̂ is ½ and then −0.005 / 0.19."""
    w, m, v = (np.array([x]) for x in (1.0, 0.0, 0.0))
    train.adamw(w, np.array([0.5]), m, v, 1, 0.1, 0.9, 0.98, 0.1)
    assert w.item() == pytest.approx(0.89, abs=3e-9)  # 1 − 0.1 · 0.1 · 1 − 0.1 · 0.5 / (0.5 + 1e-8)
    train.adamw(w, np.array([-0.5]), m, v, 2, 0.1, 0.9, 0.98, 0.0)
    assert (m.item(), v.item()) == pytest.approx((-0.005, 0.0099), abs=1e-16)
    assert w.item() == pytest.approx(0.89 + 0.1 * 2 * 0.005 / 0.19, abs=5e-9)


def test_epsilon_limits_a_step() -> None:
    """A gradient of ε = 1e-8 moves the first step half as far as a large one."""
    w = np.zeros(1)
    train.adamw(w, np.array([1e-8]), np.zeros(1), np.zeros(1), 1, 1.0, 0.9, 0.98, 0.0)
    assert w.item() == pytest.approx(-0.5, abs=1e-12)


@pytest.mark.parity
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_torchs(decay: float) -> None:
    """In float64, after 30 steps of at most 1e-2: 30 · 20 roundings of numbers below 4 are 4 · 600 · 2⁻⁵³ < 3e-13."""
    torch = pytest.importorskip("torch", reason="extra parity is not installed")
    rng = np.random.default_rng(0)
    w = rng.uniform(-3, 3, (7, 5))
    theirs = torch.nn.Parameter(torch.from_numpy(w.copy()))
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.98), eps=1e-8, weight_decay=decay)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for step in range(1, 31):
        g = rng.standard_normal(w.shape)
        theirs.grad = torch.from_numpy(g)
        optimizer.step()
        train.adamw(w, g, m, v, step, 1e-2, 0.9, 0.98, decay)
    assert np.abs(w - theirs.detach().numpy()).max() < 3e-13


def test_literal_schedule() -> None:
    """Two steps of 40 lead up to the peak; in the middle of the cosine the rate is half of it, and 0 at its end."""
    found = [train.learning_rate(step, 40, 4.0) for step in (1, 2, 21, 40)]
    assert found == pytest.approx([2, 4, 2, 0])
    assert train.learning_rate(1, 1, 4.0) == 4


def test_first_weights_are_gpt2s() -> None:
    """Each deviation of n numbers is right within 5 σ, which is 5 / √(2 n) of it."""
    config = small(n_embd=24, n_layer=3)
    for name, array in train.initial(config, np.random.default_rng(0)).items():
        assert array.dtype == np.float32
        if array.ndim == 1:
            assert np.unique(array).tolist() == [0 if name.endswith("bias") else 1], name
        else:
            deviation = 0.02 / math.sqrt(6) if name.endswith("c_proj.weight") else 0.02
            assert array.std() == pytest.approx(deviation, rel=SIGMAS / math.sqrt(2 * array.size)), name


@given(st.integers(20, 200), st.integers(1, 18), st.integers(0, 99))
def test_every_pass_reads_each_window_once(size: int, T: int, seed: int) -> None:
    """One pass leaves out less than a window at either end, and begins elsewhere than the next."""
    ids, found = np.arange(size), train.windows(np.arange(size), T, seed)
    rest = size - 1  # places that have a target
    for _ in range(3):
        begun = next(found)
        count = len(range(int(begun[0]) % T, size - T, T))
        rows = [begun, *itertools.islice(found, count - 1)]
        starts = sorted(int(row[0]) for row in rows)
        assert starts == [*range(starts[0], size - T, T)]
        assert starts[0] < T
        assert rest - len(rows) * T < 2 * T
        assert all((row == ids[row[0] : row[0] + T + 1]).all() for row in rows)


def test_the_last_part_of_every_text_is_held_out(tmp_path: Path) -> None:
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for text, word in zip(texts, (" the", " and"), strict=True):
        text.write_text(word * 8000)
    model = npgpt.load()
    trained, held_out = train.read([str(text) for text in texts], model)
    the, end = model.tokenizer.encode(" the and")
    assert trained.tolist() == [4095, *[the] * 7679, 4095, *[end] * 7679]
    assert held_out.tolist() == [the] * 321 + [end] * 321


def test_the_held_out_loss_scores_each_token_but_the_first_once() -> None:
    config = small(n_positions=20)
    model, ids = random_parameters(config), np.random.default_rng(0).integers(40, size=220)
    each = [npgpt.loss(model, config, ids[a : a + 20], ids[a + 1 : a + 21]) for a in range(0, 200, 20)]
    assert train.held_out_loss(model, config, ids) == pytest.approx(np.mean(each), rel=1e-14)


@given(st.sampled_from([0.0, 0.125, 0.25, 0.5]), st.integers(0, 99))
def test_masks_drop_that_share_of_the_blocks_matrices(share: float, seed: int) -> None:
    weights = train.initial(small(), np.random.default_rng(0))
    found = train.masks(weights, share, np.random.default_rng(seed))
    dropped = total = 0
    for name, w in weights.items():
        mask = found[name]
        assert (mask.shape, str(mask.dtype)) == (w.shape, "float32")
        matrix = name.startswith("h.") and w.ndim == 2
        assert {*np.unique(mask)} <= ({0, np.float32(1 / (1 - share))} if matrix else {1})
        dropped, total = dropped + matrix * int((mask == 0).sum()), total + matrix * w.size
    assert abs(dropped - share * total) <= SIGMAS * math.sqrt(total * share * (1 - share))


def text(folder: Path) -> Path:
    """Write a text of some 9,000 tokens, 360 of which are held out: lines of base64."""
    path = folder / "text.txt"
    path.write_bytes((ROOT / "weights" / "austen" / "vocab.tiktoken").read_bytes()[:12000])
    return path


def command(out: Path, *options: str) -> list[str]:
    """Return a command of some steps of one row, on a model of one block, whose run is written after every second."""
    sizes = f"--layers 1 --rows 1 --steps {STEPS} --every 2 --drop 0.25".split()
    program, source = ROOT / "examples" / "train.py", text(out.parent)
    return [sys.executable, str(program), str(source), "--out", str(out), *sizes, *options]


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, *options), env=environment(), capture_output=True, text=True)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_run_that_is_killed_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """It is killed after a write or during one, and begun again."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run(whole)
    assert done.returncode == 0
    losses = [float(loss) for loss in re.findall(r"loss (\S+)  held out", done.stdout)]
    assert losses[0] == pytest.approx(math.log(4096), abs=0.3)
    assert losses[-1] < losses[0] - 0.3
    kills = 0
    for pattern in ("killed.npz", "*killed.npz.*") * examples(1, 4):
        begun = time.time_ns()
        process = subprocess.Popen(command(killed), env=environment(), stdout=subprocess.DEVNULL)
        while process.poll() is None and not any(written_since(tmp_path, pattern, begun)):
            time.sleep(0.0005)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills
    assert not killed.exists()
    assert run(killed).returncode == 0
    for name in ("model.safetensors", "config.json", "vocab.tiktoken"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    with np.load(tmp_path / "killed.npz") as ours, np.load(tmp_path / "whole.npz") as theirs:
        assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs if name != "seconds")
        assert ours["held_out"][:, 0].tolist() == [*range(2, STEPS + 1, 2)]
    assert "".join(npgpt.load(killed).generate("It is", max_tokens=3, seed=0))
    refused = run(killed)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"train.py: error: {killed} exists and is not an empty folder")


def written_since(folder: Path, pattern: str, begun: int) -> list[Path]:
    """Return the files of this pattern that were written since and do not vanish meanwhile."""
    return [file for file in folder.glob(pattern) if file.exists() and file.stat().st_mtime_ns > begun]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps, --rows and --every must be at least 1"),
        ({"rows": 0}, "--rows"),
        ({"every": 0}, "--every must be at least 1"),
        ({"drop": 1.0}, "--drop from 0 to 0.9"),
        ({"drop": math.nan}, "--drop from 0 to 0.9"),
        ({"layers": 0}, "n_layer"),
        ({}, "5 tokens of text are too few"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("It is a truth")
    given = Namespace(**train.SETTINGS | options, texts=[str(tmp_path / "text")], out=tmp_path / "out")
    with pytest.raises(npgpt.NpgptError, match=message):
        train.train(given)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    given = Namespace(
        **train.SETTINGS | {"layers": 1, "rate": math.inf}, texts=[str(text(tmp_path))], out=tmp_path / "o"
    )
    with (
        np.errstate(all="ignore"),
        pytest.raises(npgpt.NpgptError, match="the loss of step 2 is nan: begin again with"),
    ):
        train.train(given)
    assert not (tmp_path / "o").exists()


def test_a_text_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"caf\xe9")
    with pytest.raises(npgpt.NpgptError, match="text"):
        train.read([str(tmp_path / "text")], npgpt.load())


def test_another_run_is_not_continued(tmp_path: Path) -> None:
    np.savez(tmp_path / "out.npz", settings="--steps 5")
    given = Namespace(**train.SETTINGS | {"layers": 1}, texts=[str(text(tmp_path))], out=tmp_path / "out")
    with pytest.raises(npgpt.NpgptError, match=r"out.npz was begun with --steps 5, and not with \d+ ids"):
        train.train(given)


def test_a_curve_is_drawn(tmp_path: Path) -> None:
    held_out = [[100, 7.5], [200, 7.5], [300, 7.5]]
    np.savez(tmp_path / "run.npz", losses=8 - np.arange(1, 301) / 100, held_out=np.array(held_out))
    training_points, dots = curve.read(tmp_path / "run.npz")
    assert training_points[0] == pytest.approx((2, 8 - 0.02))
    assert dots == [(100, 7.5), (200, 7.5), (300, 7.5)]
    picture = ElementTree.fromstring(curve.svg(training_points, dots))
    assert len(picture.findall("{*}circle")) == 3
    (path,) = picture.findall("{*}path")
    assert path.get("d", "").count("L") == 99


def test_paragraphs_are_joined() -> None:
    assert austen.paragraphs("\n\nEMMA\n\n\n\nBy\nJane Austen\n\nI\n") == "EMMA\n\nBy Jane Austen\n\nI\n"


def test_the_novels_are_read_from_rs_database(tmp_path: Path) -> None:
    """Objects in R's XDR, as saveRDS(…, version = 2) writes them."""

    def strings(*texts: str) -> bytes:
        parts = [struct.pack(">ii", 0x40009, len(text)) + text.encode() for text in texts]
        return struct.pack(">ii", 16, len(texts)) + b"".join(parts)

    head, end = b"X\n" + struct.pack(">iii", 2, 0x40305, 0x20300), struct.pack(">i", 254)
    streams = [zlib.compress(head + strings(*lines)) for lines in (["EMMA", "", "Emma", "Woodhouse"], ["I", "am"])]
    data, places = b"", b""
    for stream in streams:
        places += struct.pack(">iiii", 13, 2, len(data), len(stream) + 4)
        data += struct.pack(">i", len(stream)) + stream
    symbol = struct.pack(">iiii", 0x402, 1, 0x40009, 5) + b"names"
    variables = struct.pack(">ii", 0x213, 2) + places + symbol + strings("emma", "persuasion") + end
    reference = struct.pack(">ii", 0x402, 0x1FF)  # the symbol again
    index = struct.pack(">ii", 0x213, 2) + variables + struct.pack(">iii", 10, 1, 1)
    index += reference + strings("variables", "compressed") + end
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "Rdata.rdb").write_bytes(data)
    (tmp_path / "data" / "Rdata.rdx").write_bytes(gzip.compress(head + index))
    assert austen.novels(tmp_path) == {"emma": "EMMA\n\nEmma Woodhouse\n", "persuasion": "I am\n"}
