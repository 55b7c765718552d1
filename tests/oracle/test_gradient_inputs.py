"""A loss and gradients as a user has them: under any program's names, in mappings, files and functions."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt import parameters
from npgpt.checkpoints import llmc, safetensors
from npgpt.errors import NpgptError
from npgpt.gradients import loss_and_gradients
from npgpt.language_model import LanguageModel
from npgpt.oracle.gradient_names import told_apart, translated
from npgpt.oracle.mappings import ONLY_FORWARD
from npgpt.oracle.report import Report
from npgpt.parameters import Array
from npgpt.testing import assert_matches
from tests.support.command import here
from tests.support.models import no_text, random_arrays, random_ids, small, store

pytestmark = pytest.mark.usefixtures("few_mistakes")
CONFIG = small(n_embd=12, n_head=2)
ARRAYS = random_arrays(CONFIG, dtype="float32")
MODEL = LanguageModel("bare", CONFIG, parameters.from_arrays(CONFIG, ARRAYS), no_text("its ids are nobody's"))
IDS = random_ids(CONFIG, (2, 6))
TARGETS = random_ids(CONFIG, (2, 6), seed=1)
TARGETS[0, 2] = TARGETS[1, 4:] = -100


def step(targets: Any = TARGETS, config: npgpt.Config = CONFIG) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    """Return loss, gradients by canonical name, and stages with their "d." gradients, in float32."""
    arrays = ARRAYS if config.tie_word_embeddings else ARRAYS | {"lm_head.weight": ARRAYS["wte.weight"].copy()}
    stages: dict[str, Array] = {}
    weights = parameters.from_arrays(config, arrays)
    loss, gradients = loss_and_gradients(weights, config, IDS, targets, record=stages.__setitem__)
    npgpt.forward(weights, config, IDS, record=stages.__setitem__)
    return np.array([loss], np.float32), parameters.to_arrays(gradients), stages


LOSS, GRADIENTS, STAGES = step()
MATRICES = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def nanogpt(gradients: dict[str, Array]) -> dict[str, Array]:
    return {f"transformer.{name}": g.T if name.endswith(MATRICES) else g for name, g in gradients.items()}


def book(gradients: dict[str, Array]) -> dict[str, Array]:
    """LLMs-from-scratch's names: queries, keys and values apart."""
    found: dict[str, Array] = {}
    names = {"ln_1": "norm1", "ln_2": "norm2", "attn.c_proj": "att.out_proj", "mlp.c_fc": "ff.layers.0"}
    names |= {
        "mlp.c_proj": "ff.layers.2",
        "wte": "tok_emb",
        "wpe": "pos_emb",
        "ln_f": "final_norm",
        "lm_head": "out_head",
    }
    for name, g in gradients.items():
        layer, _, kind = name.rpartition(".")
        block, _, local = layer.removeprefix("h.").partition(".") if layer.startswith("h.") else ("", "", layer)
        prefix = f"trf_blocks.{block}." if block else ""
        kind = {"weight": "scale", "bias": "shift"}[kind] if local.startswith("ln") else kind
        g = g.T if name.endswith(MATRICES) else g
        if local == "attn.c_attn":
            thirds = np.split(g, 3, axis=0)
            found |= {
                f"{prefix}att.W_{third}.{kind}": x for third, x in zip(("query", "key", "value"), thirds, strict=True)
            }
        else:
            found[f"{prefix}{names[local]}.{kind}"] = g
    return found


def stacked(gradients: dict[str, Array]) -> dict[str, Array]:
    """llm.c's names: [out, in], each stacked over the blocks."""
    ours = dict(zip(llmc.shapes(1, 1, 1, 1), npgpt_order(), strict=True))
    found = {}
    for name, layer in ours.items():
        each = [gradients[layer.replace("*", str(block))] for block in range(CONFIG.n_layer if "*" in layer else 1)]
        each = [g.T if layer.endswith(MATRICES) else g for g in each]
        found[name] = np.stack(each) if "*" in layer else each[0]
    return found


def npgpt_order() -> list[str]:
    block = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    of_blocks = [f"h.*.{layer}.{kind}" for layer in block for kind in ("weight", "bias")]
    return ["wte.weight", "wpe.weight", *of_blocks, "ln_f.weight", "ln_f.bias"]


def marked(mark: str) -> dict[str, Array]:
    return {mark.format(name): g for name, g in GRADIENTS.items()}


def right(report: Report, rows: int) -> None:
    assert report.matches, str(report)
    assert len(report.rows) == rows, str(report)


FORMS: dict[str, Callable[[], dict[str, Any]]] = {
    "bare": lambda: GRADIENTS,
    "d.": lambda: marked("d.{}"),
    ".grad": lambda: marked("{}.grad"),
    "nested": lambda: {"gradients": GRADIENTS},
    "nanoGPT": lambda: nanogpt(GRADIENTS),
    "compiled nanoGPT": lambda: {f"_orig_mod.{name}.grad": g for name, g in nanogpt(GRADIENTS).items()},
    "LLMs-from-scratch": lambda: book(GRADIENTS),
    "llm.c": lambda: {"gradients": stacked(GRADIENTS)},
    "both heads": lambda: GRADIENTS | {"lm_head.weight": GRADIENTS["wte.weight"]},
}


@pytest.mark.parametrize("form", FORMS)
def test_names_of_every_program_mean_the_same(form: str) -> None:
    """Bit for bit, without a comparison."""
    from npgpt.oracle.naming import flat

    mine, others = told_apart(flat(FORMS[form]()), CONFIG, True)
    found = translated(others, CONFIG)
    assert (found.problems, found.notes) == ([], [])
    whole = {**mine, **found.arrays}
    assert whole.keys() == {f"d.{name}" for name in GRADIENTS}
    assert all(np.array_equal(whole[f"d.{name}"], g) for name, g in GRADIENTS.items())


def test_a_right_step_matches() -> None:
    right(npgpt.check({"loss": LOSS, **nanogpt(GRADIENTS)}, IDS, MODEL, targets=TARGETS), 1 + len(GRADIENTS))


def test_stages_and_their_gradients_match_beside_the_rest() -> None:
    report = npgpt.check({"loss": LOSS, **STAGES, "gradients": GRADIENTS}, IDS, MODEL, targets=TARGETS)
    right(report, 1 + len(STAGES) + len(GRADIENTS))


def test_the_next_tokens_are_the_targets_of_gradients_true() -> None:
    loss, gradients, _ = step(None)
    assert_matches({"loss": loss, **gradients}, IDS, MODEL, gradients=True)
    assert_matches(lambda ids, targets: {"loss": loss, "gradients": gradients}, IDS, MODEL, gradients=True)
    with pytest.raises(AssertionError, match="loss is the first stage"):
        assert_matches({"loss": loss * 2}, IDS, MODEL, gradients=True)


def test_a_head_of_its_own_has_a_gradient_of_its_own() -> None:
    loss, gradients, _ = step(TARGETS, small(n_embd=12, n_head=2, tie_word_embeddings=False))
    report = npgpt.check({"loss": loss, **book(gradients)}, IDS, MODEL, targets=TARGETS)
    right(report, 2 + len(GRADIENTS))


def test_a_frozen_parameter_is_told_by_name() -> None:
    theirs = {"loss": LOSS, **book(GRADIENTS)} | {"trf_blocks.1.att.W_key.weight": None}
    report = npgpt.check(theirs, IDS, MODEL, targets=TARGETS)
    assert not report.matches
    assert report.problems == [
        "no gradient (None) for trf_blocks.1.att.W_key.weight: frozen, or detached from the loss"
    ]
    assert "d.h.1.attn.c_attn.weight" not in {row.stage for row in report.rows}
    assert len(report.rows) == len(GRADIENTS)


def test_a_frozen_head_of_its_own_leaves_wte_its_part() -> None:
    loss, gradients, _ = step(TARGETS, small(n_embd=12, n_head=2, tie_word_embeddings=False))
    theirs = {"loss": loss, **book(gradients | {"lm_head.weight": gradients["wte.weight"]}), "out_head.weight": None}
    report = npgpt.check(theirs, IDS, MODEL, targets=TARGETS)
    assert report.problems == ["no gradient (None) for out_head.weight: frozen, or detached from the loss"]
    assert report.first is None
    report = npgpt.check({"loss": loss, "d.ln_f.weight": None}, IDS, MODEL, targets=TARGETS)
    assert report.problems == ["no gradient (None) for ln_f.weight: frozen, or detached from the loss"]


def test_what_was_not_given_is_told() -> None:
    some = {name: g for name, g in GRADIENTS.items() if ".ln_" not in name}
    report = npgpt.check({"loss": LOSS, **some}, IDS, MODEL, targets=TARGETS)
    assert report.matches
    assert "No gradient was given for h.*.ln_1.weight, h.*.ln_1.bias, h.*.ln_2.weight and 1 more." in report.notes


def test_rows_of_a_padded_vocabulary() -> None:
    zeros = np.zeros((8, 12), np.float32)
    padded = GRADIENTS | {"wte.weight": np.r_[GRADIENTS["wte.weight"], zeros]}
    report = npgpt.check({"loss": LOSS, **padded}, IDS, MODEL, targets=TARGETS)
    right(report, 1 + len(GRADIENTS))
    assert "The 8 rows of the gradient of wte.weight beyond the model's 40 are 0." in report.notes
    padded["wte.weight"][-1, 0] = np.nan
    (problem,) = npgpt.check({"loss": LOSS, **padded}, IDS, MODEL, targets=TARGETS).problems
    assert problem == (
        "the rows of the gradient of wte.weight beyond the 40 of the model are not 0: a softmax over all columns"
    )


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "shape": ({}, {"targets": TARGETS[:1]}, r"targets are \[1, 6\] and must be as token_ids are, \[2, 6\]"),
    "range": ({}, {"targets": TARGETS + 39}, "token id .* out of range: vocab_size is 40"),
    "-1": ({}, {"targets": np.where(TARGETS < 0, -1, TARGETS)}, "targets have -1, .* give -100"),
    "floats": ({}, {"targets": TARGETS.astype(float)}, "targets must be integers .*, not float64"),
    "ignored": ({}, {"targets": np.full((2, 6), -100)}, "no target counts"),
    "ragged": ({}, {"targets": [[1, 2], [3]]}, "targets must be one row or rows of equal length"),
    "a text": ({}, {"targets": "next"}, "targets must be integers"),
    "two": ({"targets": TARGETS}, {"targets": IDS}, "the mapping has other targets"),
    "none": ({}, {}, "d.wte.weight is a gradient, which depends on the targets of the loss: give targets=, or"),
    "chunks": ({}, {"targets": TARGETS, "chunks": (5, 1)}, "chunks= describes a run with a cache"),
    "twice": ({"wte.weight.grad": GRADIENTS["wte.weight"]}, {"targets": TARGETS}, "wte.weight was given twice"),
    "integers": ({"ln_f.bias": np.ones(12, int)}, {"targets": TARGETS}, "gradient of ln_f.bias must be floats"),
    "a loss of rows": ({"loss": np.ones(2)}, {"targets": TARGETS}, "loss has shape"),
    "a strange name": ({"gradients": {"wet.weight": LOSS}}, {"targets": TARGETS}, "wet.weight is not the name"),
    "a strange shape": ({"h.0.mlp.c_fc.weight": np.ones((12, 13))}, {"targets": TARGETS}, r"\[12, 13\] and must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    more, options, message = REFUSED[case]
    with pytest.raises(NpgptError, match=message) as error:
        npgpt.check({"d.wte.weight": GRADIENTS["wte.weight"], "logits": STAGES["logits"]} | more, IDS, MODEL, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("theirs", [STAGES["logits"], {"logits": STAGES["logits"]}], ids=["logits", "a mapping"])
@pytest.mark.parametrize("options", [{"targets": TARGETS}, {"gradients": True}], ids=["targets", "gradients"])
def test_targets_without_a_loss_or_gradients_are_refused(theirs: Any, options: dict[str, Any]) -> None:
    with pytest.raises(NpgptError, match="targets are for a loss and gradients, but theirs has neither"):
        npgpt.check(theirs, IDS, MODEL, **options)


def test_square_matrices_alone_do_not_say_which_way_they_are_stored() -> None:
    name = "h.0.attn.c_proj.weight"
    with pytest.raises(NpgptError, match="square shapes do not tell: give all of them"):
        npgpt.check({name: GRADIENTS[name]}, IDS, MODEL, targets=TARGETS)
    assert npgpt.check({f"d.{name}": GRADIENTS[name]}, IDS, MODEL, targets=TARGETS).matches


def test_a_loss_without_targets_is_told_and_left_out() -> None:
    report = npgpt.check({"loss": 99.0, "logits": STAGES["logits"]}, IDS, MODEL)
    assert report.matches
    assert ONLY_FORWARD in report.notes


def test_a_step_that_raises_is_told() -> None:
    def broken(ids: Any, targets: Any) -> Any:
        raise RuntimeError("no\nluck")

    with pytest.raises(NpgptError, match=r"broken\(ids, targets\).* raises RuntimeError: no luck"):
        npgpt.check(broken, IDS, MODEL, gradients=True)


def state(tail: bytes, targets: Any = TARGETS) -> bytes:
    """Return llm.c's debug state of the run, with these bytes behind the logits."""
    header = struct.pack("<256i", 20240327, 2, *IDS.shape, *[0] * 252)
    numbers = (IDS.astype("<i4"), targets.astype("<i4"), STAGES["logits"].astype("<f4"))
    return header + b"".join(array.tobytes() for array in numbers) + tail


def tail(padding: float = 0.0) -> bytes:
    """Return the loss and the gradients in llm.c's order, wte padded to 128 rows."""
    gradients = stacked(GRADIENTS)
    gradients["wte"] = np.r_[gradients["wte"], np.full((88, 12), padding, np.float32)]
    return LOSS.tobytes() + b"".join(gradients[name].astype("<f4").tobytes() for name in llmc.shapes(1, 1, 1, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store(tmp_path_factory.mktemp("model"), CONFIG)


def test_llm_c_s_state_is_compared_backwards(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "gpt2_124M_debug_state.bin"
    path.write_bytes(state(tail()))
    right(npgpt.check(path, None, MODEL), 2 + len(GRADIENTS))
    assert here("check", str(path), "--model", str(folder))[0] == 0
    path.write_bytes(state(tail(padding=1e-3)))
    assert "beyond the 40 of the model are not 0" in npgpt.check(path, None, MODEL).problems[0]
    path.write_bytes(state(LOSS.tobytes()))
    right(npgpt.check(path, None, MODEL), 2)
    path.write_bytes(state(b""))
    right(npgpt.check(path, None, MODEL), 1)
    for cut in (4, 12, 48, 88 * 48 + 4):
        path.write_bytes(state(tail()[:-cut]))
        with pytest.raises(NpgptError, match="is it truncated, or of another model"):
            npgpt.check(path, None, MODEL)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_files_state_their_targets(tmp_path: Path, suffix: str) -> None:
    path, arrays = tmp_path / f"step.{suffix}", {"loss": LOSS, **{f"{name}.grad": g for name, g in GRADIENTS.items()}}
    if suffix == "npz":
        whole: dict[str, Any] = {"token_ids": IDS, "targets": TARGETS, **arrays}
        np.savez(path, **whole)
        right(npgpt.check(path, None, MODEL), 1 + len(GRADIENTS))
    else:
        safetensors.write(path, arrays)
        right(npgpt.check(path, IDS, MODEL, targets=TARGETS), 1 + len(GRADIENTS))
    if suffix == "npz":
        with pytest.raises(NpgptError, match=r"step\.npz has other targets than"):
            npgpt.check(path, None, MODEL, targets=IDS)


def test_a_loss_in_json_is_a_number(tmp_path: Path) -> None:
    held = {"input_ids": IDS.tolist(), "targets": TARGETS.tolist(), "loss": float(LOSS[0])}
    (tmp_path / "a.json").write_text(json.dumps(held))
    right(npgpt.check(tmp_path / "a.json", None, MODEL), 1)


def test_a_file_without_targets_has_the_next_tokens(tmp_path: Path, folder: Path) -> None:
    loss, gradients, _ = step(None)
    whole: dict[str, Any] = {"token_ids": IDS, "loss": loss, **{f"d.{name}": g for name, g in gradients.items()}}
    np.savez(tmp_path / "a.npz", **whole)
    code, out, _ = here("check", str(tmp_path / "a.npz"), "--model", str(folder))
    assert code == 0, out
    assert "No targets are stated: the gradients are compared with those of the next tokens" in " ".join(out.split())
    targets = ";".join(",".join(map(str, row)) for row in TARGETS.tolist())
    np.savez(tmp_path / "b.npz", token_ids=IDS, loss=LOSS)
    assert here("check", str(tmp_path / "b.npz"), "--model", str(folder), f"--targets={targets}")[0] == 0
    code, _, error = here("check", str(tmp_path / "b.npz"), "--model", str(folder), "--targets", "1,x")
    assert (code, "--targets must be whole numbers" in error) == (2, True)
