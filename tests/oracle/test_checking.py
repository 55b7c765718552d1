"""A user's input: arrays, files, callables, masks and chunks, and refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt import parameters
from npgpt.checkpoints import llmc, safetensors
from npgpt.cli import main
from npgpt.errors import NpgptError
from npgpt.language_model import LanguageModel
from npgpt.oracle import files
from npgpt.oracle.arithmetic import as_computed, computed_in, plain
from npgpt.oracle.comparison import compare
from npgpt.oracle.mistakes import catalogue
from npgpt.oracle.naming import canonical
from npgpt.oracle.page import page
from npgpt.oracle.textbook import Pass, stages, textbook
from npgpt.oracle.theirs import cases
from npgpt.testing import assert_greedy, assert_matches
from tests.support.command import here
from tests.support.models import no_text, random_arrays, random_ids, small
from tests.support.reports import said
from tests.support.thorough import THOROUGH, examples

CONFIG = small(n_embd=24, n_head=4)
ARRAYS = random_arrays(CONFIG)
MODEL = LanguageModel("bare", CONFIG, parameters.from_arrays(CONFIG, ARRAYS), no_text("its ids are nobody's"))
IDS = random_ids(CONFIG, (1, 8))
USUAL = Pass(textbook(CONFIG, ARRAYS), IDS)


def wrong(name: str, ids: np.typing.NDArray[Any] = IDS) -> Pass:
    (entry,) = (entry for entry in catalogue(CONFIG, ids.shape[1]) if entry.name == name)
    return Pass(entry.change(textbook(CONFIG, ARRAYS)), ids)


def single(array: np.typing.NDArray[Any]) -> np.typing.NDArray[np.float32]:
    return array.astype(np.float32)


FORMS = {"batch": np.s_[:], "row": np.s_[0], "last": np.s_[0, -1], "last of a batch": np.s_[:, -1:]}


@pytest.mark.usefixtures("few_mistakes")
@pytest.mark.parametrize("form", FORMS)
def test_logits_in_every_form(form: str) -> None:
    assert npgpt.check(single(USUAL["logits"][FORMS[form]]), IDS, MODEL).matches


@pytest.mark.usefixtures("few_mistakes")
@pytest.mark.parametrize("form", [*FORMS][:: examples(2, 1)])
def test_a_mistake_in_logits_of_every_form(form: str) -> None:
    report = npgpt.check(single(wrong("ReLU")["logits"][FORMS[form]]), IDS[0].tolist(), MODEL)
    assert (report.code, report.names) == (1, ["ReLU"])


@pytest.mark.usefixtures("few_mistakes")
def test_a_padded_vocabulary_and_log_probabilities() -> None:
    padded = np.concatenate([USUAL["logits"], np.zeros((1, 8, 24))], axis=-1)
    assert npgpt.check({"logits": padded}, IDS, MODEL).matches
    assert npgpt.check({"log_probs": single(USUAL["log_probabilities"])}, IDS, MODEL).matches
    assert npgpt.check({"logits": single(USUAL["log_probabilities"])}, IDS, MODEL).names == [
        "log-softmax given as logits"
    ]


@pytest.mark.usefixtures("few_mistakes")
def test_a_constant_shift_is_seen() -> None:
    report = npgpt.check(single(USUAL["logits"] + 3), IDS, MODEL)
    assert not report.matches
    assert "The logits differ only by a constant at each position" in said(report)
    assert report.logits is not None
    assert abs(report.logits.shift - 3) < 1e-5
    assert report.logits.top_1 == report.logits.top_10 == 1


@pytest.mark.usefixtures("few_mistakes")
def test_a_callable_is_run_and_one_that_draws_is_caught() -> None:
    assert npgpt.check(lambda ids: single(Pass(textbook(CONFIG, ARRAYS), ids)["logits"]), IDS, MODEL).matches
    rng = np.random.default_rng(0)
    report = npgpt.check(lambda ids: single(USUAL["logits"] + rng.standard_normal()), IDS, MODEL)
    assert "differ from run to run" in str(report)
    assert report.code == 1


def test_the_last_positions_class() -> None:
    """From the last logits alone, a missing last token cannot be told from the previous position's logits."""
    report = npgpt.check(single(wrong("last token missing")["logits"][0, -1]), IDS, MODEL)
    assert report.names == ["last token missing or logits of the previous position"]
    assert npgpt.check(single(wrong("BOS prepended")["logits"]), IDS, MODEL).names == ["BOS prepended"]


@pytest.mark.usefixtures("few_mistakes")
@pytest.mark.parametrize("left", [True, False])
def test_padded_positions_are_not_judged(left: bool) -> None:
    """Two rows have 8 and 5 tokens, and arbitrary values at the padding."""
    ids = random_ids(CONFIG, (2, 8))
    mask = np.ones((2, 8), int)
    mask[1, slice(0, 3) if left else slice(5, 8)] = 0
    logits = np.full((2, 8, CONFIG.vocab_size), 1e6)
    for row in range(2):
        logits[row, mask[row] == 1] = Pass(textbook(CONFIG, ARRAYS), ids[row : row + 1, mask[row] == 1])["logits"][0]
    assert npgpt.check(single(logits), ids, MODEL, attention_mask=mask).matches
    if left:
        late = {"positions": lambda s: np.arange(5) + 3}
        late_run = Pass(textbook(CONFIG, ARRAYS).altered(late), ids[1:, 3:])
        logits[1, 3:] = late_run["logits"][0]
        report = npgpt.check(single(logits), ids, MODEL, attention_mask=mask)
        assert "positions count the padding" in " ".join(report.names)


@pytest.mark.parametrize(
    "name",
    ["cache positions one too far", "cache positions one short", "cache positions never advance", "cache not extended"][
        :: examples(3, 1)
    ],
)
def test_mistakes_of_a_cache(name: str) -> None:
    (entry,) = (entry for entry in catalogue(CONFIG, 8, (5, 2, 1)) if entry.name == name)
    logits = Pass(entry.change(textbook(CONFIG, ARRAYS)), IDS)["logits"]
    assert npgpt.check(single(logits), IDS, MODEL, chunks=(5, 2, 1)).names == [name]


@pytest.mark.usefixtures("few_mistakes")
def test_names_of_others() -> None:
    assert canonical("hidden_states.0", CONFIG) == ("embedding", False)
    assert canonical("hidden_states.1", CONFIG) == ("h.0", False)
    assert canonical("hidden_states.2", CONFIG) == ("ln_f", False)
    assert canonical("attentions.1", CONFIG) == ("h.1.attn.weights", False)
    assert canonical("blocks.1.attn.hook_z", CONFIG) == ("h.1.attn.heads", True)
    assert canonical("blocks.1.hook_resid_pre", CONFIG) == ("h.0", False)
    assert canonical("blocks.0.hook_resid_pre", CONFIG) == ("embedding", False)
    assert canonical("blocks.1.hook_resid_post", CONFIG) == ("h.1", False)
    assert canonical("hook_pos_embed", CONFIG) == ("wpe", False)
    theirs = {
        "hidden_states.2": USUAL["ln_f"],
        "attentions.0": USUAL["h.0.attn.weights"],
        "blocks.0.attn.hook_z": USUAL["h.0.attn.heads"].transpose(0, 2, 1, 3),
        "blocks.0.attn.hook_attn_scores": np.maximum(USUAL["h.0.attn.scores"], -1e9),
        "wpe": USUAL["wpe"],
        **{name: USUAL[name] for name in stages(2) if name.startswith("h.1")},
    }
    assert npgpt.check(theirs, IDS, MODEL, dtype="float64").matches


@pytest.mark.parametrize(
    ("theirs", "ids", "options", "message"),
    [
        ({}, IDS, {}, "nothing to compare"),
        ({"h.0.attn.qq": IDS}, IDS, {}, "is not a stage that npgpt knows"),
        ({"h.2.ln_1": IDS}, IDS, {}, "the model has 2 blocks"),
        ({"hidden_states.3": IDS}, IDS, {}, "the model has 2 blocks"),
        ({"ln_f": np.zeros((1, 8, 23))}, IDS, {}, r"ln_f has shape \[1, 8, 23\].* \[1, 8, 24\]"),
        (np.zeros((1, 5, 40)), IDS, {}, "5 positions, but there are 8 ids"),
        (np.zeros((1, 8, 39)), IDS, {}, r"\[1, 8, 39\]"),
        (np.zeros((1, 8, 40), bool), IDS, {}, "must be numbers, not bool"),
        (np.array(["a", "b"]), IDS, {}, "must be numbers, not <U1"),
        (np.zeros((1, 8, 40)), [40], {}, "token id 40"),
        (np.zeros((1, 8, 40)), "text", {}, "nobody's"),
        (np.zeros((1, 8, 40)), IDS, {"dtype": "float8"}, "not float8"),
        (np.zeros((1, 8, 40)), IDS, {"attention_mask": [[1, 0, 1, 1, 1, 1, 1, 1]]}, "one run of ones"),
        (np.zeros((1, 8, 40)), IDS, {"attention_mask": [[1, 1]]}, "attention_mask must be"),
        (np.zeros((1, 8, 40)), IDS, {"attention_mask": [[1], [1, 1]]}, "attention_mask must be"),
        (np.zeros((1, 8, 40)), IDS, {"chunks": (3, 3)}, "6 tokens, but there are 8"),
        (
            {"embedding": USUAL["embedding"], "hidden_states.0": USUAL["embedding"]},
            IDS,
            {},
            "which was given before under another name",
        ),
        (np.zeros((1, 8, 40)), IDS, {"chunks": (0, 8)}, "chunks must be whole numbers from 1"),
        (np.zeros((1, 8, 40)), IDS, {"chunks": "5,3"}, "chunks must be whole numbers from 1"),
    ],
)
def test_what_cannot_be_compared(theirs: Any, ids: Any, options: Any, message: str) -> None:
    with pytest.raises(NpgptError, match=message):
        npgpt.check(theirs, ids, MODEL, **options)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["wte.weight", "h.1.attn.c_attn.bias", "ln_f.weight"])
def test_a_reference_whose_weights_are_not_finite_is_refused(name: str, value: float) -> None:
    broken = {**ARRAYS, name: np.full_like(ARRAYS[name], value)}
    model = LanguageModel("broken", CONFIG, parameters.from_arrays(CONFIG, broken), no_text("its ids are nobody's"))
    message = f"broken cannot be the reference: {name} has values that are not finite"
    for judge in (lambda: npgpt.check(USUAL["logits"], IDS, model), lambda: npgpt.check_greedy([1, 2], IDS[0], model)):
        with pytest.raises(NpgptError, match=re.escape(message)):
            judge()


@pytest.mark.usefixtures("few_mistakes")
def test_assertions_have_the_report_as_their_message() -> None:
    assert_matches(single(USUAL["logits"]), IDS, MODEL)
    with pytest.raises(AssertionError, match="erf GELU"):
        assert_matches(single(wrong("erf GELU")["logits"]), IDS, MODEL)


def test_greedy_text_is_judged_by_its_margin() -> None:
    ids: list[int] = IDS[0].tolist()
    drawn: list[int] = []
    for _ in range(4):
        row = Pass(textbook(CONFIG, ARRAYS), np.array([ids + drawn]))["logits"][0, -1]
        drawn.append(int(row.argmax()))
    assert_greedy(drawn, IDS, MODEL)
    assert_greedy(ids + drawn, IDS, MODEL)
    other = [*drawn[:2], (drawn[2] + 1) % CONFIG.vocab_size, 0]
    with pytest.raises(AssertionError, match=rf"token 2 is {other[2]}, the reference has {drawn[2]}"):
        assert_greedy(other, IDS, MODEL)
    tie = ARRAYS | {"wte.weight": ARRAYS["wte.weight"].copy()}
    twin = (drawn[0] + 1) % CONFIG.vocab_size
    tie["wte.weight"][twin] = tie["wte.weight"][drawn[0]] * (1 - 1e-8)  # the same logit but for 1e-8 of it
    model = LanguageModel("tie", CONFIG, parameters.from_arrays(CONFIG, tie), no_text("none"))
    assert not {twin, drawn[0]} & set(ids)  # or the prompt itself would be another
    row = Pass(textbook(CONFIG, tie), IDS)["logits"][0, -1]
    assert row.argmax() in (twin, drawn[0])
    loser = drawn[0] + twin - int(row.argmax())
    assert "near tie" in str(npgpt.check_greedy([loser], IDS, model))


def saved(tmp_path: Path, **arrays: Any) -> Path:
    np.savez(tmp_path / "theirs.npz", **arrays)
    return tmp_path / "theirs.npz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model") / "small"
    single_model = LanguageModel(
        "small", CONFIG, parameters.from_arrays(CONFIG, {k: single(v) for k, v in ARRAYS.items()}), no_text("none")
    )
    npgpt.save(single_model, place)
    return place


@pytest.mark.usefixtures("few_mistakes")
def test_the_command(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = saved(tmp_path, logits=single(USUAL["logits"]), input_ids=IDS)
    assert main(["check", str(good), "--model", str(folder)]) == 0
    assert capsys.readouterr().out.startswith("Matches: rounding in float32")
    bad = saved(tmp_path, logits=single(wrong("n_head 2")["logits"]))
    ids = ",".join(map(str, IDS[0]))
    html = tmp_path / "report.html"
    assert main(["check", str(bad), "--model", str(folder), "--ids", ids, "--html", str(html)]) == 1
    out = capsys.readouterr().out
    assert "the cause is n_head 2" in out.splitlines()[0]
    assert all(len(line) <= 100 for line in out.splitlines())
    assert "n_head 2" in html.read_text()
    assert not re.search(r"https?://|<script [^>]*src", html.read_text())
    assert html.read_text().count("<script") == 1
    assert main(["check", str(bad), "--ids", ids, "--prompt", "It is"]) == 2
    assert "--prompt and --ids exclude each other" in capsys.readouterr().err
    assert main(["check", str(bad), "--ids", ids, "--html", str(tmp_path / "none" / "x.html")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["check", str(bad), "--model", str(folder), "--ids", ids, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["mistakes"][0]["one_of"][0]["name"] == "n_head 2"
    assert found["stages"][0]["stage"] == "logits"


STORED = ("npy", "safetensors", "bin", "float16 bin", "bfloat16 safetensors")


@pytest.mark.usefixtures("few_mistakes")
@pytest.mark.parametrize("form", STORED[:: examples(2, 1)])
def test_files_of_every_form(tmp_path: Path, folder: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    logits, path = single(USUAL["logits"][0]), tmp_path / f"theirs.{form.split()[-1]}"
    options = ["--ids", ",".join(map(str, IDS[0]))]
    if form == "npy":
        np.save(path, logits)
    elif form == "safetensors":
        safetensors.write(path, {"logits": logits})
    elif form == "bfloat16 safetensors":
        bits = (logits.view(np.uint32) >> 16).astype(np.uint16)
        safetensors.write_parts(path, {"logits": ("bfloat16", logits.shape)}, lambda _: [bits])
        options += ["--their-dtype", "bfloat16"]
    else:
        dtype = "float16" if "float16" in form else "float32"
        path.write_bytes(logits.astype(dtype).tobytes())
        options += ["--shape", "8,40", "--their-dtype", dtype]
    assert main(["check", str(path), "--model", str(folder), *options]) == 0, capsys.readouterr()
    said = dict(zip(options[::2], options[1::2], strict=True))
    shape, their_dtype = (8, 40) if "--shape" in said else (), said.get("--their-dtype")
    report = npgpt.check(path, IDS, MODEL, dtype=their_dtype, shape=shape)
    assert (report.matches, str(report) + "\n") == (True, capsys.readouterr().out)
    if form == "npy" or THOROUGH:  # what nothing explains takes long
        assert not npgpt.check(str(path), (IDS + 1) % 40, MODEL, dtype=their_dtype, shape=shape).matches


@pytest.mark.usefixtures("few_mistakes")
def test_a_file_is_checked_in_python_too(tmp_path: Path) -> None:
    """The file contains its ids and mask. Missing ids must be given, and nothing may be given twice."""
    ids, mask = random_ids(CONFIG, (2, 8)), np.ones((2, 8), int)
    mask[1, 5:] = 0
    logits = Pass(textbook(CONFIG, ARRAYS), ids)["logits"].copy()
    logits[1, 5:] = 1e6
    path = saved(tmp_path, logits=single(logits), input_ids=ids, attention_mask=mask)
    assert npgpt.check(path, weights=MODEL).matches
    assert not npgpt.check(path, weights=MODEL, attention_mask=np.ones((2, 8), int)).matches
    assert_matches(str(path), ids, MODEL)
    with pytest.raises(NpgptError, match="holds other ids than"):
        npgpt.check(path, ids[::-1], MODEL)
    path = saved(tmp_path, logits=single(wrong("ReLU")["logits"]))
    assert npgpt.check(path, IDS, MODEL).names == ["ReLU"]
    with pytest.raises(NpgptError, match="holds no ids"):
        npgpt.check(path, weights=MODEL)
    with pytest.raises(NpgptError, match="there is no prompt"):
        npgpt.check(USUAL["logits"], weights=MODEL)
    with pytest.raises(NpgptError, match="does not exist"):
        npgpt.check(tmp_path / "nothing.npz", IDS, MODEL)


def test_the_report_fits_a_terminal(tmp_path: Path, folder: Path) -> None:
    """In a narrow terminal the table has two columns fewer; in a pipe it has all of them."""
    bad = saved(tmp_path, logits=single(wrong("n_head 2")["logits"]), input_ids=IDS)
    arguments = ("check", str(bad), "--model", str(folder))
    for columns in (80, 90, 200):
        lines = here(*arguments, terminal=True, COLUMNS=str(columns))[1].splitlines()
        assert max(map(len, lines)) <= min(columns, 100)
        (head,) = (line for line in lines if line.startswith("stage  "))
        assert head.endswith("  from their input")
        assert ("ulps" in head, " dB " in head) == (columns >= 100,) * 2
        (row,) = (line for line in lines if re.match(r"logits +[0-9]", line))
        assert len(row.split()) == len(head.split()) - 2 - (not row.endswith(("matches", "differs")))
    assert "ulps" in here(*arguments, COLUMNS="80")[1]


def test_greedy_ids_in_a_file(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = int(USUAL["logits"][0, -1].argmax())
    page_path = tmp_path / "page.html"
    for drawn, code in ((best, 0), ((best + 1) % 40, 1)):
        path = saved(tmp_path, greedy_ids=np.array([drawn]), input_ids=IDS)
        assert npgpt.check_greedy(path, weights=MODEL).code == code
        assert main(["check", str(path), "--model", str(folder), "--json", "--html", str(page_path)]) == code
        captured = capsys.readouterr()
        assert json.loads(captured.out)["matches"] == (code == 0)
        assert "no page was written" in captured.err
        assert not page_path.exists()
    assert str(npgpt.check_greedy([best], IDS, MODEL)) == "Matches: all greedy tokens equal the reference's."
    with pytest.raises(NpgptError, match="not float8"):
        npgpt.check_greedy([best], IDS, MODEL, dtype="float8")
    with pytest.raises(NpgptError, match="one row at a time, but the prompt has 2 rows"):
        npgpt.check_greedy([best], random_ids(CONFIG, (2, 8)), MODEL)
    with pytest.raises(NpgptError, match=r"no logits: use npgpt\.check_greedy"):
        npgpt.check(path, weights=MODEL)
    with pytest.raises(NpgptError, match=r"logits or stages: use npgpt\.check$"):
        npgpt.check_greedy(saved(tmp_path, logits=USUAL["logits"], input_ids=IDS), weights=MODEL)


@pytest.mark.usefixtures("few_mistakes")
def test_llmcs_debug_state(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = np.zeros(256, np.int32)
    header[:4] = 20240327, 2, 1, 8
    loss, gradients = npgpt.loss_and_gradients(MODEL.parameters, MODEL.config, IDS, IDS)
    path = tmp_path / "state.bin"
    for logits, code in ((USUAL["logits"], 0), (wrong("ReLU")["logits"], 1)):
        llmc.write_state(path, IDS, IDS, logits, loss, gradients)
        assert main(["check", str(path), "--model", str(folder)]) == code
        assert npgpt.check(path, weights=MODEL).code == code
    capsys.readouterr()
    content = path.read_bytes()
    version_9 = header.copy()
    version_9[1] = 9
    for damaged, message in (
        (content[:2000], "too few"),
        (content[:1030], "its header says [1, 8]"),
        (version_9.tobytes(), "not a reference state of llm.c's that npgpt knows"),
    ):
        path.write_bytes(damaged)
        assert main(["check", str(path), "--model", str(folder)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"", [], "begins with|empty"),
        (b"hello, world", [], "begins with"),
        (b"\x93NUMPY broken", [], "cannot be read as NumPy's"),
        (b"PK\x03\x04 broken", [], "."),
        (b"1234", ["--shape", "8,40"], r"has 4 bytes; \[8, 40\] in float32 takes 1280"),
        (b"1234", ["--shape", "8,x"], "--shape must be whole numbers"),
    ],
)
def test_bad_files_are_one_line(
    tmp_path: Path, folder: Path, content: bytes, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "theirs.bin"
    path.write_bytes(content)
    assert main(["check", str(path), "--model", str(folder), "--ids", "1,2", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1


def test_ids_are_told_or_refused(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, logits=single(USUAL["logits"]))
    assert main(["check", str(path), "--model", str(folder)]) == 2
    assert "holds no ids" in capsys.readouterr().err
    path = saved(tmp_path, logits=single(USUAL["logits"]), input_ids=IDS)
    assert main(["check", str(path), "--model", str(folder), "--ids", "1,2,3"]) == 2
    assert "holds other ids" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "nothing.npz"), "--model", str(folder)]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.usefixtures("few_pairs")
def test_another_models_weights_are_no_named_mistake() -> None:
    """Another model of the same shape is unexplained, and nothing is guessed."""
    other = random_arrays(CONFIG, seed=9)
    report = npgpt.check(single(Pass(textbook(CONFIG, other), IDS)["logits"]), IDS, MODEL)
    assert (report.code, report.names, report.diagnosis.unexplained) == (1, [], "logits")


def test_a_page_has_every_stage() -> None:
    theirs = {name: single(wrong("quick GELU")[name]) for name in stages(2) if name not in ("log_probabilities",)}
    report = npgpt.check({k: np.nan_to_num(v, neginf=-1e9) for k, v in theirs.items()}, IDS, MODEL)
    text = page(report)
    assert report.names == ["quick GELU"]
    assert text.count("<td style") >= len(theirs)
    assert "prefers-color-scheme" in text or "color-scheme: light dark" in text


def test_reading_alone_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "object.npy"
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(NpgptError, match="allow_pickle"):
        files.read(path)


def test_cases_of_a_batch_keep_their_rows() -> None:
    ids = random_ids(CONFIG, (2, 8))
    (case,) = cases({"logits": np.zeros((2, 40))}, CONFIG, ids)
    assert case.theirs["logits"].shape == (2, 1, 40)


@pytest.mark.usefixtures("few_mistakes")
def test_what_can_be_run_is_experimented_with() -> None:
    """The callable has an unknown MLP and no causal mask: T = 1 differs too, and a later token has an effect."""

    def strange(ids: np.typing.NDArray[Any], mask: bool = True) -> np.typing.NDArray[np.float32]:
        formulas: dict[str, Any] = {"mlp.act": lambda s: np.sin(s["mlp.c_fc"])}
        if not mask:
            formulas["visible"] = lambda s: np.ones((ids.shape[1], ids.shape[1]), bool)
        return single(Pass(textbook(CONFIG, ARRAYS).altered(formulas), ids)["logits"])

    report = npgpt.check(strange, IDS, MODEL)
    assert "Tried: the first token alone also differs." in report.notes
    assert "Tried: another last token does not change earlier positions." in report.notes
    said = " ".join(str(report).split())
    assert "No known mistake explains logits. Are the weights and the ids the same? stage" in said  # and then the table
    said = " ".join(str(npgpt.check(strange(IDS), IDS, MODEL)).split())
    assert "Are the weights and the ids the same? Two experiments help most: does the first token alone" in said
    notes = npgpt.check(lambda ids: strange(ids, mask=False), IDS, MODEL).notes
    assert "Tried: another last token changes earlier positions." in notes


@pytest.mark.usefixtures("few_mistakes")
def test_the_dtype_is_told_from_the_numbers() -> None:
    """Widened bfloat16, float16 and float32 are common and must not raise an alarm."""
    for dtype in ("bfloat16", "float16", "float32"):
        rough = {name: as_computed(array, dtype) for name, array in ARRAYS.items()}
        logits = plain(Pass(textbook(CONFIG, rough), IDS)["logits"])
        report = npgpt.check(logits, IDS, MODEL)
        assert (report.dtype, report.matches) == (dtype, True)
        assert f"All numbers fit {dtype}, though stored as float64" in str(report)
        if dtype == "float32" or THOROUGH:  # what nothing explains takes long
            assert npgpt.check(logits, IDS, MODEL, dtype="float64").code == 1
    assert computed_in(np.zeros(100)) == "float64"
    assert computed_in(USUAL["logits"]) == "float64"


@pytest.mark.usefixtures("few_mistakes")
@pytest.mark.parametrize("left", [True, False])
def test_padded_stages_are_not_judged(left: bool) -> None:
    """Padding is ignored in weights [B, H, T, T], heads, the stream, and the last position's logits."""
    ids, mask = random_ids(CONFIG, (1, 8)), np.ones((1, 8), int)
    judged = slice(3, 8) if left else slice(0, 5)
    mask[0] = 0
    mask[0, judged] = 1
    run = Pass(textbook(CONFIG, ARRAYS), ids[:, judged])
    theirs = {name: np.full((1, 8, 24), 1e6) for name in ("h.0", "ln_f")}
    theirs |= {"h.0.attn.weights": np.full((1, 4, 8, 8), 0.5), "h.0.attn.heads": np.full((1, 4, 8, 6), 1e6)}
    theirs["h.0.attn.weights"][:, :, judged, judged] = run["h.0.attn.weights"]
    theirs["h.0.attn.heads"][:, :, judged] = run["h.0.attn.heads"]
    for name in ("h.0", "ln_f"):
        theirs[name][:, judged] = run[name]
    theirs["logits"] = run["logits"][:, -1]  # of the row's own last token, on the right too
    report = npgpt.check(theirs, ids, MODEL, attention_mask=mask, dtype="float64")
    assert report.matches, str(report)
    assert "logits" in [row.stage for row in report.rows]


@pytest.mark.usefixtures("few_mistakes")
def test_hidden_states_in_one_array(tmp_path: Path) -> None:
    stacked = single(np.stack([USUAL[name] for name in ("embedding", "h.0", "ln_f")]))
    report = npgpt.check(saved(tmp_path, hidden_states=stacked, input_ids=IDS), weights=MODEL)
    assert report.matches
    assert [row.stage for row in report.rows] == ["embedding", "h.0", "ln_f"]


@pytest.mark.usefixtures("few_mistakes")
def test_other_embeddings_are_told() -> None:
    other = random_arrays(CONFIG, seed=9)
    theirs = {"embedding": single(Pass(textbook(CONFIG, other), IDS)["embedding"])}
    assert "are these the same weights, and the same ids?" in said(npgpt.check(theirs, IDS, MODEL))


@pytest.mark.usefixtures("few_mistakes")
def test_a_callable_that_agrees_once_is_caught_by_its_second_run() -> None:
    runs = iter([USUAL["logits"], USUAL["logits"] + 1])
    report = npgpt.check(lambda ids: single(next(runs)), IDS, MODEL)
    assert (report.code, report.first) == (1, None)
    assert "differs: " in report.verdict
    assert "differ from run to run" in report.verdict
    assert "differ from run to run" in page(report)


@pytest.mark.usefixtures("few_mistakes")
def test_too_faint_a_difference_is_not_named() -> None:
    """Just above rounding, mistakes cannot be told apart."""
    noise = 1e-4 * np.random.default_rng(0).standard_normal(USUAL["logits"].shape)
    given = cases({"logits": USUAL["logits"] + noise}, CONFIG, IDS)
    ratio = compare(CONFIG, ARRAYS, given, "float32", entries=[]).rows[0].difference.ratio
    report = npgpt.check(USUAL["logits"] + noise * 1.2 / ratio, IDS, MODEL, dtype="float32")
    assert (report.code, report.names) == (1, [])
    assert "too small to name a mistake (" in report.verdict


@pytest.mark.usefixtures("few_mistakes")
def test_a_callable_that_takes_only_its_own_prompt() -> None:
    """Further experiments that cannot be compared are no reason to fail."""
    book = textbook(CONFIG, ARRAYS).altered({"mlp.act": lambda s: np.sin(s["mlp.c_fc"])})
    wrong_logits = single(Pass(book, IDS)["logits"])
    notes = npgpt.check(lambda ids: wrong_logits, IDS, MODEL).notes
    assert any(note.startswith("Tried: the output for the first token alone cannot be compared (") for note in notes)
    one = IDS[:, :1]
    assert npgpt.check(lambda ids: wrong_logits[:, :1], one, MODEL).notes == []


def test_a_page_names_what_cannot_be_told_apart() -> None:
    text = page(npgpt.check(single(wrong("last token missing")["logits"][0, -1]), IDS, MODEL))
    assert "At logits, one of these mistakes, which this data cannot tell apart:" in text
    assert "<dt>last token missing</dt>" in text
    assert "<dt>logits of the previous position</dt>" in text


@pytest.mark.usefixtures("few_mistakes")
def test_a_page_has_an_empty_cell_for_a_stage_that_is_not_there() -> None:
    stages_of_two = {name: USUAL[name] for name in ("h.0.ln_1", "h.1.mlp.act")}
    assert page(npgpt.check(stages_of_two, IDS, MODEL)).count('<td class="none"></td>') == 2
