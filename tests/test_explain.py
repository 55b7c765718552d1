"""npgpt.explain: model.py's lines, the stages they compute, and the page's data."""

from __future__ import annotations

import ast
import base64
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt.config import PUBLISHED, Config
from npgpt.language_model import LanguageModel
from npgpt.oracle.naming import STAGES
from npgpt.parameters import Array
from npgpt.pictures.explain import Explanation, explain, letters
from npgpt.pictures.source import source, walk
from tests.support.attention_page import data_of
from tests.support.models import SHAPES, random_ids, random_parameters, small
from tests.support.thorough import only_thorough

TEXT = "It is a truth </script> \u202eé\x1b\n“acknowledged”"


def random_model(config: Config) -> LanguageModel:
    return LanguageModel("random", config, random_parameters(config, dtype="float32"))


def values_of(held: dict[str, Any], row: int) -> dict[int, float]:
    """Return a page's values for a row of a stage, by column."""
    group, edge, width = held["group"], held["edge"], held["width"]
    kept = range(group) if 2 * edge >= group else [*range(edge), *range(group - edge, group)]
    columns = [start + column for start in range(0, width, group) for column in kept]
    halves = np.frombuffer(base64.b64decode(held["values"]), "<f2").reshape(-1, len(columns))
    scaled = np.ldexp(halves[row].astype(np.float64), held["exponents"][row])
    return dict(zip(columns, scaled.tolist(), strict=True))


def values_in(data: Any, name: str, row: int) -> dict[int, float]:
    """Return a page's values for any stage; queries, keys and values are columns of c_attn."""
    held = data["stages"][name]
    if "of" not in held:
        return values_of(held, row)
    start = held["part"] * held["width"]
    found = values_in(data, held["of"], row).items()
    return {column - start: value for column, value in found if start <= column < start + held["width"]}


def largest(array: Array, row: int) -> float:
    return float(abs(rows_of(array)[row]).max())


def rows_of(array: Array) -> Array:
    """Return a stage as rows of tokens; heads side by side, written out without model.py's functions."""
    if array.ndim == 4:
        return np.concatenate(list(array[0]), axis=-1)
    return array.reshape(-1, array.shape[-1])


def test_the_source_is_the_text_of_the_file_that_runs() -> None:
    text = (Path(npgpt.__file__).parent / "model.py").read_text("utf-8")
    data = data_of(explain([1026]).page())
    assert "\n".join("".join(part[0] for part in line) for line in data["source"]) + "\n" == text  # type: ignore[attr-defined]


def test_every_call_of_record_and_stage_is_a_step() -> None:
    calls = [node for node in ast.walk(ast.parse(source())) if isinstance(node, ast.Call) and len(node.args) == 2]
    lines = sorted(node.lineno for node in calls if ast.unparse(node.func) in ("record", "stage"))
    steps = walk()[0].values()
    assert sorted(number for step in steps for number in step.lines if "return x + h" not in text_of(number)) == lines
    marked = [what for spans in walk()[1].values() for *_, kind, what in spans if kind == "@"]
    assert sorted(set(marked)) == sorted(step.stage for step in steps)


def text_of(line: int) -> str:
    return source().splitlines()[line - 1]


def test_a_step_names_its_line_and_the_functions_it_calls() -> None:
    steps = walk()[0]
    assert "return x + h" in text_of(steps["h.{layer}"].lines[0])
    assert 'stage(f"h.{layer}", block(' in text_of(steps["h.{layer}"].lines[1])
    assert {stage.removeprefix("h.{layer}."): step.functions for stage, step in steps.items() if step.functions} == {
        "ln_1": ("layer_norm",),
        "attn.c_attn": ("linear",),
        "attn.q": ("split_heads",),
        "attn.k": ("split_heads",),
        "attn.v": ("split_heads",),
        "attn.scores": ("attention_scores",),
        "attn.weights": ("attention_weights",),
        "attn.heads": ("attention",),
        "attn.c_proj": ("linear", "merge_heads"),
        "ln_2": ("layer_norm",),
        "mlp.c_fc": ("linear",),
        "mlp.act": ("activation",),
        "mlp.c_proj": ("linear",),
        "ln_f": ("layer_norm",),
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_the_steps_are_the_stages_of_a_run_in_the_order_of_computation(shape: str) -> None:
    model, recorded = random_model(SHAPES[shape]), list[str]()
    ids = random_ids(model.config, (5,))
    model(ids, record=lambda name, _: recorded.append(name))
    explanation = explain(ids, model)
    assert [name for name, _ in explanation.order()] == recorded == list(explanation.stages)
    assert len(list(explanation.steps())) == len(recorded) + 1


@pytest.mark.parametrize("name", walk()[0])
def test_the_letters_of_a_shape_are_those_of_the_table_of_stages(name: str) -> None:
    table = STAGES[name.removeprefix("h.{layer}").removeprefix(".")].shape
    assert letters(name) == {"1 T C": "T C", "B H T T": "B H T S"}.get(table, table)


@pytest.mark.parametrize("T", [1, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_page_holds_the_numbers_of_the_model(shape: str, T: int) -> None:
    explanation = explain(random_ids(SHAPES[shape], (T,)), random_model(SHAPES[shape]))
    data: Any = data_of(explanation.page())
    check_numbers(explanation, data)
    assert data["activation"] == ("gelu_erf" if shape == "erf" else "gelu")


def check_numbers(explanation: Explanation, data: Any) -> None:
    T = len(explanation.token_ids)
    for name, array in explanation.stages.items():
        held = data["stages"][name]
        assert held["shape"] == list(array.shape)
        if name.endswith(("scores", "weights")):
            lower = array[0][:, np.tril_indices(T)[0], np.tril_indices(T)[1]]
            halves = np.frombuffer(base64.b64decode(held["values"]), "<f2").reshape(lower.shape).astype(np.float64)
            np.testing.assert_allclose(np.ldexp(halves, np.array(held["exponents"])[:, None]), lower, 5e-4, 1e-9)
            continue
        rows = rows_of(array)
        np.testing.assert_allclose(held["means"], rows.mean(axis=1, dtype=np.float64), 1e-5, 1e-12)
        np.testing.assert_allclose(held["variances"], rows.var(axis=1, dtype=np.float64), 1e-5, 1e-12)
        assert abs(held["largest"][0]) == pytest.approx(abs(rows).max(), rel=1e-5)
        assert rows[tuple(held["largest"][1:])] == pytest.approx(held["largest"][0], rel=1e-5)
        for row in range(T):
            found = values_in(data, name, row)
            allowed = (
                largest(explanation.stages[held.get("of", name)], row) * 2.0**-39
            )  # of values beside one that is far larger
            np.testing.assert_allclose(list(found.values()), rows[row, list(found)], 2.0**-11, allowed)


def test_the_embedded_models_numbers_are_all_there_and_an_outlier_hides_none() -> None:
    model = npgpt.load()
    data: Any = data_of(explain("It is a truth", model).page())
    assert all(len(values_in(data, name, 0)) == held["width"] for name, held in data["stages"].items()
               if "width" in held and name != "logits")  # fmt: skip
    wpe = model.parameters.wpe.weight.copy()
    wpe[:, 7] = 30000
    parameters = model.parameters._replace(wpe=model.parameters.wpe._replace(weight=wpe))
    outlying = explain([1, 2, 3], dataclasses.replace(model, parameters=parameters))
    check_numbers(outlying, data_of(outlying.page()))


@pytest.mark.parametrize("vocab_size", [21, 63, 84])
def test_stages_are_grouped_by_head_where_the_vocabulary_is_as_large_as_a_stage_is_wide(vocab_size: int) -> None:
    config = small(vocab_size=vocab_size)
    data: Any = data_of(explain([1, 2, 3], random_model(config)).page())
    groups = {name: held["group"] for name, held in data["stages"].items() if "group" in held}
    assert groups == {name: vocab_size if name == "logits" else config.head_width for name in groups}


@only_thorough
def test_a_page_of_30_tokens_of_gpt2_takes_3_megabytes() -> None:
    model = random_model(PUBLISHED["gpt2"])
    page = explain(random_ids(model.config, (30,)), model).page()
    assert len(page.encode()) <= 3_000_000
    data: Any = data_of(page)
    assert len(values_in(data, "h.5.attn.k", 3)) == 12 * 2 * 3  # the first and last 3 of each head


def test_a_text_that_is_too_long_is_refused_before_it_is_run() -> None:
    model = random_model(Config(vocab_size=10, n_positions=3000, n_embd=8, n_layer=4, n_head=8, n_inner=8))
    with pytest.raises(
        npgpt.NpgptError, match=r"a page of 2000 tokens, 4 layers and 8 heads would take .* may take 32"
    ):
        explain([1] * 2000, model)


def test_values_that_are_not_finite_are_refused_by_the_stages_name() -> None:
    model = npgpt.load()
    bias = np.full_like(model.parameters.h[2].mlp.c_fc.bias, np.inf)
    fc = model.parameters.h[2].mlp.c_fc._replace(bias=bias)
    h = list(model.parameters.h)
    h[2] = h[2]._replace(mlp=h[2].mlp._replace(c_fc=fc))
    broken = dataclasses.replace(model, parameters=model.parameters._replace(h=tuple(h)))
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(npgpt.NpgptError, match=r"austen: h\.2\.mlp\.c_fc has values that are not finite"),
    ):
        explain("It", broken)


def test_foreign_text_stays_text() -> None:
    page = explain(TEXT).page()
    data: Any = data_of(page)
    assert page.count("</script>") == 2
    text = page.split('id="data">')[1].split("</script>")[0]
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert all(piece.isprintable() for piece in data["pieces"])
    assert re.search(r"default-src 'none'", page)


def test_the_stream_and_the_next_tokens_are_the_models() -> None:
    model = npgpt.load()
    explanation = explain("It is a truth", model)
    data: Any = data_of(explanation.page())
    stages = explanation.stages
    before, added, after = (
        stages[name][0, -1].astype(float) for name in ("h.2", "h.3.attn.c_proj", "h.3.attn.residual")
    )
    entry = next(entry for entry in data["stream"] if entry["stage"] == "h.3.attn.residual")
    assert entry["norm"][-1] == pytest.approx(np.linalg.norm(after), rel=1e-5)
    assert entry["added"][-1] == pytest.approx(np.linalg.norm(added), rel=1e-5)
    cosine = before @ added / np.linalg.norm(before) / np.linalg.norm(added)
    assert entry["cosine"][-1] == pytest.approx(cosine, abs=1e-5)
    logits = stages["logits"][0, -1].astype(float)
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    best = np.argsort(-probabilities)[:10]
    assert [p for _, p in data["lens"][-1][-1]] == pytest.approx(probabilities[best], abs=1e-5)
    assert [text for text, _ in data["lens"][-1][-1]] == [model.tokenizer.piece(int(one)).decode() for one in best]
    assert len(data["lens"]) == model.config.n_layer + 1


def test_a_model_without_text_or_logits_says_so() -> None:
    model = dataclasses.replace(random_model(SHAPES["3 heads x 7"]), no_logits="it is a classifier")
    explanation = explain([1, 2, 39], model)
    data: Any = data_of(explanation.page())
    assert data["pieces"] == ["1", "2", "39"]
    assert data["noLogits"] == "it is a classifier"
    assert "logits" not in data["stages"]
    assert list(explanation.steps())[-1] == "no next token: it is a classifier"


def test_an_explanation_shows_itself_in_a_notebook_and_has_a_short_repr() -> None:
    explanation = npgpt.explain("It is")
    assert repr(explanation) == "Explanation('austen': 2 tokens, 95 stages)"
    assert explanation._repr_html_().startswith("<iframe srcdoc=")


@pytest.mark.parametrize("name", ["wpe", "h.0.attn.q", "h.0.attn.scores", "h.0.mlp.c_proj", "logits"])
def test_the_walk_has_the_spread_of_values_whose_squares_exceed_float32(name: str) -> None:
    explanation = explain("It is a truth")
    large = explanation.stages[name] * np.float32(1e30)
    walked = dataclasses.replace(explanation, stages=explanation.stages | {name: large})  # type: ignore[operator]
    spread = large[np.isfinite(large)].std(dtype=np.float64)
    assert f"spread {spread:.3g}, " in next(step for step in walked.steps() if f"  {name} [" in step)
