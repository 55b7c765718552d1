"""A GPT-2 inside other modules: paths to it, tensors beside it, several in one file, other heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npgpt
from npgpt import cli
from npgpt.checkpoints import configs, wrappers
from npgpt.checkpoints.inspect import inspect
from npgpt.errors import NpgptError
from npgpt.language_model import LanguageModel
from npgpt.parameters import Array, from_arrays, to_arrays
from npgpt.tracing import trace
from tests.support.models import random_arrays, small, stored
from tests.support.namings import llms_from_scratch, transposed
from tests.support.thorough import examples

ARRAYS = random_arrays(small(), dtype="float32")
UNTIED = random_arrays(small(tie_word_embeddings=False), dtype="float32")
BOOK = llms_from_scratch(ARRAYS)
OTHER = np.ones((3, 2), np.float32)


def under(path: str, arrays: dict[str, Array], **others: Array) -> dict[str, Array]:
    """Return arrays under a path and others beside it; double underscores in names become dots."""
    return {f"{path}{name}": array for name, array in arrays.items()} | {
        name.replace("__", "."): array for name, array in others.items()
    }


def same(model: LanguageModel, arrays: dict[str, Array] = ARRAYS) -> None:
    found = to_arrays(model.parameters)
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())


PATHS = (
    "module.",
    "_module.",
    "_orig_mod.",
    "_forward_module.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "transformer.",
    "transformer.transformer.",
    "gpt2.",
    "model.",
    "pretrained_model.",
    "gpt2.transformer.",
    "model.transformer.",
    "pretrained_model.transformer.",
    "my_own_attribute.",
    "net.decoder.gpt.transformer.",
    "_forward_module.model._orig_mod.module.transformer.",
    "classifier.",
    "score.transformer.",
    "h.",
    "0.",
    "layers.0.",
)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_to_a_gpt2(tmp_path: Path, path: str) -> None:
    same(npgpt.load(stored(tmp_path / "a", under(path, ARRAYS)), n_head=3))
    nano = {name: array for name, array in transposed(ARRAYS).items() if not name.endswith("bias")}
    model = npgpt.load(stored(tmp_path / "b", under(path, nano)), n_head=3)
    np.testing.assert_array_equal(model.parameters.h[1].mlp.c_fc.weight, ARRAYS["h.1.mlp.c_fc.weight"])
    same(npgpt.load(stored(tmp_path / "c", under(path, BOOK)), n_head=3))
    head = {"lm_head.weight": UNTIED["lm_head.weight"]}
    body = {name: array for name, array in UNTIED.items() if name not in head}
    for place in ("", path, path.removesuffix("transformer.")):
        same(npgpt.load(stored(tmp_path / "d", under(path, body) | under(place, head)), n_head=3), UNTIED)


WITHIN = ("_orig_mod", "module", "_module", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
PARTS = st.sampled_from([*WITHIN, "transformer", "model", "gpt2", "a_b", "x"])


@given(st.lists(PARTS, max_size=5), st.sampled_from(WITHIN), st.sampled_from(["h", "0", "attn", "mlp", "c_fc", "ln_1"]))
@settings(max_examples=examples(15, 100))
def test_wrappers_in_any_nesting_and_within_names(
    tmp_path_factory: pytest.TempPathFactory, path: list[str], wrapper: str, part: str
) -> None:
    """A wrapper around a part of every block, or of the first, occurs in the middle of a name."""
    inner = {name.replace(f"{part}.", f"{part}.{wrapper}.", 1): array for name, array in ARRAYS.items()}
    file = stored(tmp_path_factory.mktemp("w") / "m", under("".join(f"{one}." for one in path), inner))
    model = npgpt.load(file, n_head=3)
    same(model)
    assert model.notes == ()


def test_what_lies_beside_is_said_and_left_out(tmp_path: Path) -> None:
    arrays = under(
        "gpt.transformer.",
        ARRAYS,
        clip_project__weight=OTHER,
        metric=OTHER[0],
        gpt__lm_head__weight=ARRAYS["wte.weight"],
    )
    model = npgpt.load(stored(tmp_path / "a", arrays), n_head=3)
    same(model)
    assert model.notes == ("ignored, not part of the GPT-2: clip_project.weight [3, 2], metric [2]",)
    many = under("model.", ARRAYS, **{f"encoder__{n}__weight": OTHER for n in range(5)})
    model = npgpt.load(stored(tmp_path / "a", many), n_head=3)
    assert model.notes[0].endswith(
        "encoder.0.weight [3, 2], encoder.1.weight [3, 2], encoder.2.weight [3, 2] and 2 more"
    )


@pytest.mark.parametrize("wrapper", ["module.", "module.model.", "_orig_mod.module.transformer."])
def test_what_lies_beside_a_wrapper(tmp_path: Path, wrapper: str) -> None:
    """An AveragedModel has a counter beside its model in `module.`."""
    arrays = under(wrapper, ARRAYS, n_averaged=OTHER[0, 0], lm_head__weight=UNTIED["lm_head.weight"])
    model = npgpt.load(stored(tmp_path / "a", arrays), n_head=3)
    assert model.notes == ("ignored, not part of the GPT-2: n_averaged []",)
    same(model, ARRAYS | {"lm_head.weight": UNTIED["lm_head.weight"]})


@pytest.mark.parametrize("path", ["", "transformer.", "gpt.transformer."])
@pytest.mark.parametrize("name", ["rotary.freqs", "h.0.attn.rotary", "h.2.ln_1.weight", "adapter"])
def test_what_lies_within_is_no_other_part(tmp_path: Path, path: str, name: str) -> None:
    """A GPT-2 with an additional tensor, beside its `transformer` or in it, is another model."""
    for place in (path, path.removesuffix("transformer.")):
        with pytest.raises(NpgptError, match=r"unexpected|is missing"):
            npgpt.load(stored(tmp_path / "a", under(path, ARRAYS) | {place + name: OTHER}), n_head=3)


@pytest.mark.parametrize(
    ("paths", "shown"),
    [
        (("model.transformer.", "ref_model.transformer."), r"model\.transformer\.\*, ref_model\.transformer\.\*"),
        (("", "teacher."), r"\*, teacher\.\*"),
        (("transformer.", "model."), r"transformer\.\*, model\.\*"),
        (("module.", ""), r"module\.\*, \*"),
        (tuple(f"m{n}." for n in range(40)), r"m0\.\*, m1\.\*"),
    ],
)
def test_several_are_named(tmp_path: Path, paths: tuple[str, ...], shown: str) -> None:
    arrays = {name: array for path in paths for name, array in under(path, ARRAYS).items()}
    with pytest.raises(NpgptError, match=rf"a contains several GPT-2s, {shown}.*: save the one to use by itself"):
        npgpt.load(stored(tmp_path / "a", arrays), n_head=3)


def test_several_of_different_programs_are_named(tmp_path: Path) -> None:
    arrays = under("student.", BOOK) | under("teacher.transformer.", ARRAYS)
    with pytest.raises(
        NpgptError, match=r"contains several GPT-2s, teacher\.transformer\.\*, student\.\*: save the one"
    ):
        npgpt.load(stored(tmp_path / "a", arrays), n_head=3)


def test_one_whole_beside_a_part_of_one(tmp_path: Path) -> None:
    """The whole model is read, and a note says that the other is left out."""
    part = {name: array for name, array in ARRAYS.items() if not name.startswith("h.1.mlp")}
    model = npgpt.load(stored(tmp_path / "a", under("model.", ARRAYS) | under("student.", part)), n_head=3)
    same(model)
    assert model.notes[0].startswith("ignored, not part of the GPT-2: student.wte.weight [40, 21], ")
    with pytest.raises(NpgptError, match=r"mlp\.c_fc\.weight is missing"):
        npgpt.load(stored(tmp_path / "a", under("student.", part)), n_head=3)


HEADS = {
    "v_head.summary.weight": (1, 21),
    "v_head.summary.bias": (1,),
    "score.weight": (2, 21),
    "classifier.weight": (5, 21),
    "classifier.bias": (5,),
    "multiple_choice_head.summary.weight": (1, 21),
    "qa_outputs.weight": (2, 21),
    "qa_outputs.bias": (2,),
    "summary.summary.weight": (1, 21),
}


@pytest.mark.parametrize("path", ["", "transformer.", "model.", "pretrained_model.transformer.", "gpt."])
@pytest.mark.parametrize("name", HEADS)
def test_other_heads_are_left_out_and_said(tmp_path: Path, name: str, path: str) -> None:
    head = np.ones(HEADS[name], np.float32)
    for place in {"", path, path.removesuffix("transformer.")}:
        arrays = under(path, ARRAYS) | {place + name: head}
        model = npgpt.load(stored(tmp_path / "a", arrays), n_head=3)
        same(model)
        assert model.notes == (f"ignored, not a language model's head: {place}{name} {list(head.shape)}",)


def test_what_is_left_out_is_said_by_every_verb(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m" / "model.safetensors"
    path.parent.mkdir()
    stored(path, under("transformer.", ARRAYS, score__weight=OTHER))
    (path.parent / "config.json").write_text(json.dumps(configs.to_dict(small())))
    line = "ignored, not a language model's head: score.weight [3, 2]"
    assert inspect(path.parent).notes == (line,)
    for arguments in (["generate", "--ids", "1,2", "--max-tokens", "1"], ["attend", "--ids", "1,2"]):
        assert cli.main([*arguments, "--model", str(path.parent)]) == 0
        assert f"npgpt: {line}\n" in capfd.readouterr().err
    assert cli.main(["inspect", str(path.parent)]) == 0
    assert f"note            {line}\n" in capfd.readouterr().out
    assert cli.main(["convert", str(path.parent), str(tmp_path / "out")]) == 0
    assert f"note     {line}\n" in capfd.readouterr().out
    report = npgpt.check(npgpt.load(path.parent)([1, 2]), [1, 2], path.parent)
    assert f"The reference, {path.parent}: {line}." in report.notes


def test_a_decoder_is_the_head(tmp_path: Path) -> None:
    head = UNTIED["lm_head.weight"]
    body = {name: array for name, array in UNTIED.items() if name != "lm_head.weight"}
    for path in ("", "transformer."):
        same(npgpt.load(stored(tmp_path / "a", under(path, body, lm_head__decoder__weight=head)), n_head=3), UNTIED)
    both = under("transformer.", body, lm_head__decoder__weight=head, lm_head__weight=head)
    with pytest.raises(NpgptError, match=r"lm_head\.(decoder\.)?weight is unexpected"):
        npgpt.load(stored(tmp_path / "a", both), n_head=3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("path", ["", "module.", "model."])
def test_llms_from_scratchs_classifier_is_a_body(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], path: str, bias: bool
) -> None:
    book = {"context_length": 24, "emb_dim": 21, "n_heads": 3, "n_layers": 2, "vocab_size": 40}
    (tmp_path / "config.json").write_text(json.dumps(book))
    arrays = BOOK | {"out_head.weight": np.ones((2, 21), np.float32)}
    arrays |= {"out_head.bias": np.ones(2, np.float32)} if bias else {}
    file = stored(tmp_path / "review_classifier", under(path, arrays))
    model = npgpt.load(file)
    why = "its head has 2 classes, not 40 ids: npgpt reads the body but cannot generate text"
    assert (model.notes, model.no_logits) == ((why,), why)
    same(model)
    calls: tuple[Any, ...] = (
        lambda: model([1, 2]),
        lambda: list(model.generate([1, 2])),
        lambda: list(model.steps([1, 2], max_tokens=1, sampling=npgpt.Sampling())),
        lambda: list(model.steps_many([[1, 2]], max_tokens=1, sampling=npgpt.Sampling())),
        lambda: npgpt.save(model, tmp_path / "saved"),
    )
    for call in calls:
        with pytest.raises(NpgptError, match="its head has 2 classes"):
            call()
    seen: list[str] = []
    model([1, 2], record=lambda name, array: seen.append(name))
    assert "ln_f" in seen
    assert list(trace([1, 2], model))[-1] == "ln_f"
    with pytest.raises(NpgptError, match="gives no logits: its head has 2 classes"):
        trace([1, 2], model, only=["logits"])
    for arguments in (["generate", "--ids", "1", "--model"], ["convert"]):
        assert cli.main([*arguments, str(file), *([str(tmp_path / "out")] if arguments == ["convert"] else [])]) == 2
        captured = capfd.readouterr()
        assert captured.out == ""
        assert "its head has 2 classes, not 40 ids" in captured.err.splitlines()[-1]
    with pytest.raises(NpgptError, match="cannot be the reference: its head has 2 classes"):
        npgpt.check(np.zeros((2, 40)), [1, 2], file)
    assert not (tmp_path / "out").exists()


def test_a_head_of_nearly_all_ids_is_no_classifier(tmp_path: Path) -> None:
    arrays = UNTIED | {"lm_head.weight": UNTIED["lm_head.weight"][:21]}
    with pytest.raises(NpgptError, match=r"lm_head\.weight is unexpected"):
        npgpt.load(stored(tmp_path / "a", arrays), n_head=3)
    arrays = UNTIED | {"lm_head.weight": UNTIED["lm_head.weight"][:20]}
    assert npgpt.load(stored(tmp_path / "a", arrays), n_head=3).no_logits


def test_paths_of_which_some_are_no_path() -> None:
    """A name that ends like the table's without a preceding dot is another tensor's."""
    tensors: dict[str, Any] = dict.fromkeys(("xwte.weight", "a.b_tok_emb.weight", "wte.weights"))
    assert list(wrappers.located(tensors, "it").tensors) == list(tensors)


@pytest.mark.parametrize("part", ["a", "transformer", "module", "model", "_orig_mod"])
def test_a_name_of_very_many_parts_takes_no_time(tmp_path: Path, part: str) -> None:
    """The name has 100,000 parent paths."""
    path = f"{part}." * 100_000
    same(npgpt.load(stored(tmp_path / "a", under("gpt.", ARRAYS, score__weight=OTHER) | {f"{path}x": OTHER}), n_head=3))
    with pytest.raises(NpgptError, match="does not fit its own sizes"):
        npgpt.load(stored(tmp_path / "a", ARRAYS | {f"{path}wte.weight": OTHER}), n_head=3)


def test_a_state_dict_given_to_check() -> None:
    """It is found inside other dictionaries, as in a file, and guesses are reported."""
    nano = transposed(ARRAYS)
    model = LanguageModel("it", small(activation_function="gelu"), from_arrays(small(), ARRAYS))
    logits = model([1, 2, 3])
    report = npgpt.check(logits, [1, 2, 3], under("policy.", nano, value__weight=OTHER), n_head=3)
    assert report.matches
    assert any(
        note.startswith("The reference, weights: the checkpoint does not state its GELU") for note in report.notes
    )
    with pytest.raises(NpgptError, match=r"weights contains several GPT-2s, policy\.\*, teacher\.\*"):
        npgpt.check(logits, [1, 2, 3], under("policy.", nano) | under("teacher.", nano), n_head=3)
