"""Stages in other people's forms: axes, TransformerLens's processing, the table of names."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt import parameters
from npgpt.cli import main
from npgpt.errors import NpgptError
from npgpt.language_model import LanguageModel
from npgpt.oracle.arithmetic import rounded
from npgpt.oracle.mistakes import catalogue
from npgpt.oracle.naming import canonical, is_hook, names
from npgpt.oracle.report import Report
from npgpt.oracle.textbook import Pass, Textbook, stages, textbook
from npgpt.parameters import Array
from tests.support.models import no_text, random_arrays, random_ids, small
from tests.support.reports import said
from tests.support.thorough import THOROUGH, examples

CONFIG = small(n_embd=24, n_head=4)
ARRAYS = random_arrays(CONFIG)
MODEL = LanguageModel("bare", CONFIG, parameters.from_arrays(CONFIG, ARRAYS), no_text("its ids are nobody's"))
IDS = random_ids(CONFIG, (2, 8))
RIGHT = Pass(textbook(CONFIG, ARRAYS), IDS)
LOGITS = RIGHT["logits"].astype(np.float32)
MASK = np.array([[1] * 8, [1] * 5 + [0] * 3])


def wrong(name: str, ids: np.typing.NDArray[Any] = IDS) -> Pass:
    (entry,) = (entry for entry in catalogue(CONFIG, ids.shape[1]) if entry.name == name)
    return Pass(entry.change(textbook(CONFIG, ARRAYS)), ids)


@pytest.mark.usefixtures("few_mistakes")
@pytest.mark.parametrize("name", ["", "erf GELU"])
def test_a_padded_positions_logits_given_as_the_answer(name: str) -> None:
    """Logits [B, V] at -1 of a right-padded batch contain the padding's values for the shorter row."""
    logits = (wrong(name) if name else RIGHT)["logits"][:, -1].astype(np.float32)
    report = npgpt.check(logits, IDS, MODEL, attention_mask=MASK)
    assert (report.code, report.names) == (1, [name] if name else [])
    assert report.problems == [
        "the output of row 1 is not that of the last token, at 4: was it taken at -1, in the padding?"
    ]
    if name and not THOROUGH:
        return
    logits[1] = 123.0
    assert npgpt.check(logits, IDS, MODEL, attention_mask=MASK).problems == report.problems
    three = np.concatenate([logits, logits[1:]]), np.concatenate([IDS, IDS[1:]])
    report = npgpt.check(*three, MODEL, attention_mask=np.concatenate([MASK, MASK[1:]]))
    assert report.problems[0].startswith("the output of rows 1, 2 together is not that of the last token, at 4, 4")


@pytest.mark.usefixtures("few_mistakes")
def test_a_shorter_rows_last_token_is_compared() -> None:
    """Logits are gathered at each row's length, or belong to a single row, possibly the padded one."""
    logits = np.stack([LOGITS[0, 7], LOGITS[1, 4]])
    report = npgpt.check(logits, IDS, MODEL, attention_mask=MASK)
    assert report.matches
    assert "3 of 16 positions are padding and are not compared." in said(report)
    assert "Row 1 is padded on the right, and its output has one position" in said(report)
    assert npgpt.check(LOGITS[1, 4], IDS[1], MODEL, attention_mask=MASK[1]).matches
    assert not npgpt.check(LOGITS[1, 7], IDS[1], MODEL, attention_mask=MASK[1]).matches
    wrong_too = wrong("erf GELU")["logits"].astype(np.float32)
    report = npgpt.check(np.stack([wrong_too[0, 7], wrong_too[1, 4]]), IDS, MODEL, attention_mask=MASK)
    assert (report.names, report.problems) == (["erf GELU"], [])


@pytest.mark.parametrize("name", ["last token missing", "BOS prepended"])
def test_a_padded_batch_with_another_number_of_positions(name: str) -> None:
    """The stages are right up to the padding, or wrong from the first token on."""
    report = npgpt.check(wrong(name)["logits"].astype(np.float32), IDS, MODEL, attention_mask=MASK)
    assert report.names == [name], said(report)


@pytest.mark.usefixtures("few_mistakes")
def test_columns_beyond_the_vocabulary_are_told() -> None:
    report = npgpt.check(np.concatenate([LOGITS, np.full((2, 8, 24), -1e4)], axis=-1), IDS, MODEL)
    assert report.matches
    assert "The 24 columns of logits beyond the 40 ids are ignored." in report.notes
    report = npgpt.check(np.concatenate([LOGITS, np.full((2, 8, 24), 1e4)], axis=-1), IDS, MODEL)
    assert report.matches
    assert "At 16 of 16 positions one of them is larger than every real logit" in said(report)
    report = npgpt.check(np.concatenate([LOGITS, np.full((2, 8, 24), np.nan)], axis=-1), IDS, MODEL)
    assert report.problems == [
        "the 24 columns of logits beyond the 40 ids contain NaN or infinity, which spoils a softmax over all columns"
    ]


@pytest.mark.usefixtures("few_mistakes")
@pytest.mark.parametrize(
    ("order", "logits", "ids"),
    [
        ("[V, T]", LOGITS[0].T, IDS[0]),
        ("[B, V, T]", LOGITS.transpose(0, 2, 1), IDS),
        ("[T, B, V]", LOGITS.transpose(1, 0, 2), IDS),
        ("[V, B]", LOGITS[:, -1].T, IDS),
    ],
)
def test_other_orders_of_axes_are_recognised(order: str, logits: Array, ids: Array) -> None:
    report = npgpt.check(logits, ids, MODEL)
    assert report.matches
    assert f"logits was given as {order} and was transposed" in said(report)


def test_an_order_that_could_be_two_is_refused() -> None:
    """With 40 tokens and 40 ids, [V, T] and [T, V] look alike, and [T, V] is assumed."""
    ids = random_ids(CONFIG, (2, 2))
    with pytest.raises(NpgptError, match=r"logits has shape \[2, 40, 5\]"):
        npgpt.check(np.zeros((2, 40, 5)), ids, MODEL)
    with pytest.raises(NpgptError, match=r"logits has shape \[40, 2, 2\]"):
        npgpt.check(np.zeros((40, 2, 2)), ids, MODEL)


def hooks(run: Pass) -> dict[str, Array]:
    """Return a whole cache with TransformerLens's names and shapes."""
    found = {"hook_embed": run["wte"], "hook_pos_embed": np.repeat(run["wpe"], 2, axis=0)}
    for layer in range(CONFIG.n_layer):
        block, before = f"blocks.{layer}", "embedding" if not layer else f"h.{layer - 1}"
        found[f"{block}.hook_resid_pre"] = run[before]
        for hook, stage in (
            ("ln1.hook_normalized", "ln_1"),
            ("hook_attn_out", "attn.c_proj"),
            ("hook_resid_mid", "attn.residual"),
            ("ln2.hook_normalized", "ln_2"),
            ("mlp.hook_pre", "mlp.c_fc"),
            ("mlp.hook_post", "mlp.act"),
            ("hook_mlp_out", "mlp.c_proj"),
            ("attn.hook_attn_scores", "attn.scores"),
            ("attn.hook_pattern", "attn.weights"),
        ):
            found[f"{block}.{hook}"] = run[f"h.{layer}.{stage}"]
        for hook, stage in (("hook_q", "q"), ("hook_k", "k"), ("hook_v", "v"), ("hook_z", "heads")):
            found[f"{block}.attn.{hook}"] = run[f"h.{layer}.attn.{stage}"].transpose(0, 2, 1, 3)
    found[f"blocks.{CONFIG.n_layer - 1}.hook_resid_post"] = run[f"h.{CONFIG.n_layer - 1}"]
    found |= {"ln_final.hook_normalized": run["ln_f"], "logits": run["logits"]}
    return {name: array.astype(np.float32) for name, array in found.items()}


def processed(found: dict[str, Array]) -> dict[str, Array]:
    """Return the cache after TransformerLens's default processing (see its from_pretrained)."""
    out = dict(found)
    for name, array in found.items():
        if name.startswith("hook_") or "hook_resid" in name or name.endswith("_out"):
            out[name] = array - array.mean(axis=-1, keepdims=True)
        elif name.endswith("hook_normalized"):
            norm = {"ln1": "ln_1", "ln2": "ln_2"}.get(name.split(".")[-2], "ln_f")
            path = norm if norm == "ln_f" else f"h.{name.split('.')[1]}.{norm}"
            out[name] = (array - ARRAYS[f"{path}.bias"]) / ARRAYS[f"{path}.weight"]
        elif name.endswith(("hook_v", "hook_z")):
            bias = ARRAYS[f"h.{name.split('.')[1]}.attn.c_attn.bias"][48:]
            out[name] = array - bias.reshape(4, 6)
        elif name == "logits":
            out[name] = array - array.mean(axis=-1, keepdims=True)
    return {name: array.astype(np.float32) for name, array in out.items()}


@dataclass
class ActivationCache:
    """A mapping like TransformerLens's, which is not a dict."""

    cache_dict: dict[str, Array]


@pytest.mark.usefixtures("few_mistakes")
def test_transformer_lenss_default_processing_is_recognised() -> None:
    report = npgpt.check(ActivationCache(processed(hooks(RIGHT))), IDS, MODEL)
    assert report.matches, said(report)
    for part in ("gain and bias", "value biases", "mean over the channels", "mean over the ids"):
        assert part in said(report)
    report = npgpt.check(hooks(RIGHT), IDS, MODEL)
    assert report.matches, said(report)
    assert "processed" not in said(report)


@pytest.mark.parametrize(
    "name", ["erf GELU", "attention scale missing", "MLP residual missing", "positions missing"][:: examples(2, 1)]
)
def test_mistakes_are_found_through_the_processing(name: str) -> None:
    report = npgpt.check(processed(hooks(wrong(name))), IDS, MODEL)
    assert report.names == [name], said(report)


@pytest.mark.parametrize("name", ["values split without transpose", "heads interleaved", "layers 0 and 1 swapped"])
def test_what_is_not_processed_is_not_called_so(name: str) -> None:
    report = npgpt.check(hooks(wrong(name)), IDS, MODEL)
    assert report.names == [name], said(report)
    assert "processed" not in said(report)


@pytest.mark.usefixtures("few_mistakes")
def test_what_is_unknown_in_a_cache_is_listed_and_left_out() -> None:
    cache = hooks(RIGHT) | {"blocks.0.ln1.hook_scale": np.ones((2, 8, 1))}
    report = npgpt.check(ActivationCache(cache), IDS, MODEL)
    assert report.matches
    assert "Ignored, since they are not stages: blocks.0.ln1.hook_scale." in report.notes
    with pytest.raises(NpgptError, match="is not a stage that npgpt knows"):
        npgpt.check({"blocks.0.ln1.hook_scale": np.ones((2, 8, 1))}, IDS, MODEL)


@pytest.mark.usefixtures("few_mistakes")
def test_flaxs_intermediates() -> None:
    """capture_intermediates returns nested dictionaries with a tuple for each module's calls."""
    block = {
        "ln_1": {"__call__": (RIGHT["h.0.ln_1"],)},
        "attn": {"c_attn": {"__call__": (RIGHT["h.0.attn.c_attn"],)}},
        "__call__": ((RIGHT["h.0"],),),
    }
    whole = {"transformer": {"h": {"0": block}}, "__call__": ({"logits": RIGHT["logits"]},)}
    report = npgpt.check({"intermediates": whole}, IDS, MODEL)
    assert report.matches, said(report)
    assert [row.stage for row in report.rows] == ["h.0.ln_1", "h.0.attn.c_attn", "h.0", "logits"]
    report = npgpt.check({"hidden_states": np.stack([RIGHT["embedding"], RIGHT["h.0"], RIGHT["ln_f"]])}, IDS, MODEL)
    assert report.matches, said(report)


@pytest.mark.usefixtures("few_mistakes")
@pytest.mark.parametrize(
    ("heads", "merged"), [("q", "query"), ("k", "key"), ("v", "value"), ("heads", "merged")][:: examples(3, 1)]
)
def test_heads_are_read_in_every_shape(heads: str, merged: str) -> None:
    """Heads may have an axis before or after the tokens, or be side by side, under either name."""
    split = RIGHT[f"h.1.attn.{heads}"]
    joined = RIGHT[f"h.1.attn.{merged}"]
    for name in (heads, merged):
        for array, stage in ((split, heads), (split.transpose(0, 2, 1, 3), heads), (joined, merged)):
            report = npgpt.check({f"h.1.attn.{name}": array}, IDS, MODEL)
            assert report.matches, said(report)
            assert [row.stage for row in report.rows] == [f"h.1.attn.{stage}"]


def written(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value) if path.suffix == ".json" else value, "utf-8")
    return path


@pytest.mark.usefixtures("few_mistakes")
def test_numbers_as_text(tmp_path: Path) -> None:
    """Lists in JSON and rows of a CSV are logits; an object's lists are stages."""
    rows = LOGITS[0].tolist()
    assert npgpt.check(written(tmp_path / "a.json", rows), IDS[0], MODEL).matches
    named = {"model": "mine", "logits": rows, "h.0": RIGHT["h.0"][0].tolist(), "input_ids": IDS[0].tolist()}
    report = npgpt.check(written(tmp_path / "b.json", named), weights=MODEL)
    assert report.matches
    assert [row.stage for row in report.rows] == ["h.0", "logits"]
    assert "Ignored, since they are not arrays: model." in report.notes
    text = "\n".join(",".join(map(repr, row)) for row in rows) + "\n"
    assert npgpt.check(written(tmp_path / "c.csv", text), IDS[0], MODEL).matches


@pytest.mark.usefixtures("few_mistakes")
def test_arrays_without_a_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", LOGITS)
    assert npgpt.check(tmp_path / "a.npz", IDS, MODEL).matches
    np.savez(tmp_path / "b.npz", IDS, LOGITS)
    assert npgpt.check(tmp_path / "b.npz", weights=MODEL).matches
    np.savez(tmp_path / "c.npz", LOGITS, LOGITS)
    with pytest.raises(NpgptError, match="arr_1 has no name that says what it is"):
        npgpt.check(tmp_path / "c.npz", IDS, MODEL)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '{"logits": '),
        ("b.json", "[" * 100_000),
        ("c.json", '{"logits": [[1, 2], [3]]}'),
        ("d.json", '{"logits": null}'),
        ("e.json", '["a", "b"]'),
        ("f.csv", "a,b\n1,2\n"),
        ("g.csv", "1,2\n3\n"),
        ("h.csv", ""),
        ("i.txt", "1 2 3"),
        ("j.json", "3"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / name, "")
    path.write_text(content, "utf-8")
    assert main(["check", str(path), "--ids", "1,2"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("npgpt: error: ")
    assert captured.err.count("\n") == 1


@pytest.mark.usefixtures("few_mistakes")
def test_rows_of_ids_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    austen = npgpt.load()
    np.save(tmp_path / "logits.npy", austen([[1, 2, 3], [4, 5, 6]]))
    assert main(["check", str(tmp_path / "logits.npy"), "--ids", "1,2,3;4,5,6"]) == 0
    assert main(["check", str(tmp_path / "logits.npy"), "--ids", "1,2,3;4,5"]) == 2
    assert "rows have different lengths" in capsys.readouterr().err


@pytest.mark.usefixtures("few_mistakes")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_inside_and_float32_outside(dtype: str) -> None:
    """Under autocast only linear maps round. A mistake is named by the tolerance of that dtype."""

    def linear(name: str, source: str) -> Any:
        def formula(s: Any) -> Array:
            x, weight = (rounded(array.astype(np.float32), dtype) for array in (s[source], s[f"{name}.weight"]))
            return rounded(x @ weight + rounded(s[f"{name}.bias"].astype(np.float32), dtype), dtype)

        return formula

    sources = {"attn.c_attn": "ln_1", "attn.c_proj": "attn.merged", "mlp.c_fc": "ln_2", "mlp.c_proj": "mlp.act"}
    autocast = textbook(CONFIG, {name: array.astype(np.float32) for name, array in ARRAYS.items()})
    autocast = autocast.altered({name: linear(name, source) for name, source in sources.items()})
    shown = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    wanted = ["embedding", *(f"h.{layer}.{local}" for layer in range(2) for local in shown), "ln_f", "logits"]

    def report(book: Textbook) -> Report:
        run = Pass(book, IDS)
        return npgpt.check({name: run[name].astype(np.float32) for name in wanted}, IDS, MODEL)

    right = report(autocast)
    assert (right.matches, right.dtype) == (True, dtype)
    assert f"All linear maps return {dtype}, as under autocast" in said(right)
    (entry,) = (entry for entry in catalogue(CONFIG, 8) if entry.name == "attention scale missing")
    assert report(entry.change(autocast)).names == ["attention scale missing"]


def documented() -> dict[str, list[str]]:
    """Return the cells of the table of stages in docs/checking.md."""
    text = (Path(__file__).parents[2] / "docs" / "checking.md").read_text("utf-8")
    table = text.split("| stage | shape |")[1].split("\n\n")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return {line[0].strip("`"): line[1:] for line in lines}


def test_the_table_of_stages_is_true() -> None:
    """Each stage has the stated shape in the textbook, record= and a module's report, and foreign names are unique."""
    table, letters = documented(), {"B": 2, "T": 8, "C": 24, "3C": 72, "F": 96, "H": 4, "D": 6, "V": 40, "1": 1}
    found = {name.replace("h.0", "h.N"): RIGHT[name] for name in stages(1)}
    assert list(table) == list(found)
    recorded: dict[str, Array] = {}
    MODEL(IDS, record=recorded.__setitem__)
    recorded = {name.replace("h.0", "h.N"): array for name, array in recorded.items() if "h.1" not in name}
    other = {"h.N.attn.query", "h.N.attn.key", "h.N.attn.value", "h.N.attn.merged", "log_probabilities"}
    assert recorded.keys() == table.keys() - other
    sizes = {name: tuple(letters[letter] for letter in row[0].strip("[]").split(", ")) for name, row in table.items()}
    assert {name: array.shape for name, array in found.items()} == sizes
    assert {name: array.shape for name, array in recorded.items() if name != "wpe"} == {
        name: sizes[name] for name in recorded if name != "wpe"
    }
    hooks_told = set()
    for name, (_, hugging_face, hook) in table.items():
        for cell in (hugging_face, hook):
            if quoted := re.match("`(.*?)`(.*)", cell):
                written = quoted[1].replace("N+1", "1").replace("n_layer", "2").replace("N", "0")
                assert canonical(written, CONFIG) == (name.replace("h.N", "h.0"), "H" in quoted[2])
                hooks_told.add(written)
    assert {name for name in names(1) if is_hook(name)} <= hooks_told


@pytest.mark.usefixtures("few_mistakes")
def test_what_record_writes_is_read() -> None:
    recorded: dict[str, Array] = {}
    MODEL(IDS, record=recorded.__setitem__)
    report = npgpt.check(recorded, IDS, MODEL)
    assert report.matches
    assert [row.stage for row in report.rows] == [name for name in stages(2) if name in recorded]
