"""Every catalogue entry changes the stages that it names and nothing before them."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from npgpt.config import Config
from npgpt.oracle import attention_mistakes, block_mistakes, model_mistakes
from npgpt.oracle.arithmetic import plain
from npgpt.oracle.mistakes import catalogue
from npgpt.oracle.rows import rows as table_of
from npgpt.oracle.textbook import Pass, Textbook, located, stages, textbook
from npgpt.parameters import Array
from tests.support.models import SHAPES, random_arrays, random_ids, small
from tests.support.thorough import examples

TOKENS, CHUNKS = 9, (4, 3, 1, 1)
DEEP = small(n_embd=32, n_head=4, n_layer=4)
CONFIGS = SHAPES | {"4 blocks": DEEP, "1 head x 64": small(n_embd=64, n_head=1, n_layer=2)}


def everything(book: Textbook, config: Config) -> dict[str, Array]:
    """Return every stage of one run."""
    run = Pass(book, random_ids(config, (1, TOKENS)))
    with np.errstate(all="ignore"):
        return {stage: plain(run[stage]) for stage in stages(len(book.layers))}


def same(one: Array | None, other: Array, tolerance: float = 1e-9) -> bool:
    return one is not None and one.shape == other.shape and np.allclose(one, other, tolerance, tolerance, True)


def fingerprint(run: dict[str, Array], order: list[str]) -> list[float]:
    """Return a number for each stage that changes with it, 0 for a missing stage."""
    finite = [np.nan_to_num(run.get(stage, np.zeros(0)), nan=3, posinf=2, neginf=1).ravel() for stage in order]
    return [float(np.clip(x, -1e6, 1e6) @ np.sin(np.arange(1, x.size + 1))) for x in finite]


def replaced(book: Textbook, altered: Textbook) -> set[str]:
    """Return the names of formulas that differ between two books."""
    fields = {"layers"} if book.layers != altered.layers else set()
    if book.config != altered.config:  # n_head, which these formulas rest on
        fields |= {"attn.q", "attn.k", "attn.v", "attn.scale"}
    return fields | {
        name
        for one, other in ((book.block, altered.block), (book.model, altered.model))
        for name in one
        if one[name] is not other[name]
    }


@pytest.mark.parametrize("shape", [*CONFIGS][: examples(1, len(CONFIGS))])
def test_every_entry_is_another_function_and_touches_only_what_it_says(shape: str) -> None:
    config = CONFIGS[shape]
    book = textbook(config, random_arrays(config))
    right = everything(book, config)
    found: dict[str, dict[str, Array]] = {}
    for entry in catalogue(config, TOKENS, CHUNKS):
        altered = entry.change(book)
        assert entry.name not in found
        assert replaced(book, altered) == set(entry.stages) or entry.stages == ("ln_f",), entry.name
        wrong = found[entry.name] = everything(altered, config)
        differing = [stage for stage, array in right.items() if not same(wrong.get(stage), array)]
        assert differing, entry.name
        layers = [layer for layer, _ in map(located, differing) if layer is not None]
        assert min(layers, default=config.n_layer) >= entry.first, (entry.name, differing[0])
        if entry.first:
            assert not {"wte", "wpe", "embedding"} & set(differing), entry.name
        if {"layers", "token_ids"}.isdisjoint(entry.stages):
            # with the right stages given below it, whatever differs rests on a formula that the entry replaces
            alone = Pass(altered, random_ids(config, (1, TOKENS)), dict(right))
            first = differing[0]
            assert not same(plain(alone.compute(first)), right[first]), (entry.name, first)
    names = [name for name in found if not name.startswith("LayerNorm epsilon")]  # of which some are nearly one
    prints = np.array([fingerprint(found[name], list(right)) for name in names])
    for at, row in enumerate(prints):
        twins = np.flatnonzero(np.abs(prints[:at] - row).max(axis=-1, initial=0) < 1e-9)
        assert not twins.size, (names[at], [names[twin] for twin in twins])


def test_a_mistake_in_one_block_alone_is_the_mistake_there_and_the_right_model_elsewhere() -> None:
    book = textbook(DEEP, random_arrays(DEEP))
    right = everything(book, DEEP)
    entries = catalogue(DEEP, TOKENS)
    whole = {entry.name: entry for entry in entries if entry.layer is None}
    alone = [entry for entry in entries if entry.layer is not None]
    assert len(alone) > 300
    ids = random_ids(DEEP, (1, TOKENS))
    for entry in alone[:: examples(3, 1)]:
        assert entry.layer is not None
        place = "ln_f" if entry.layer == DEEP.n_layer else f"block {entry.layer}"
        name = entry.name.removesuffix(f" in {place} alone")
        for layer in range(DEEP.n_layer):
            given = {"embedding": right["embedding"]} if not layer else {f"h.{layer - 1}": right[f"h.{layer - 1}"]}
            expected = whole[name] if layer == entry.layer else None
            one = Pass(entry.change(book), ids, dict(given))[f"h.{layer}"]
            other = Pass(book if expected is None else expected.change(book), ids, dict(given))[f"h.{layer}"]
            np.testing.assert_array_equal(one, other, err_msg=f"{entry.name}, block {layer}")
        last = {f"h.{DEEP.n_layer - 1}": right[f"h.{DEEP.n_layer - 1}"]}
        behind = (whole[name].change(book) if place == "ln_f" else book, entry.change(book))
        one, other = (Pass(each, ids, dict(last))["logits"] for each in behind)
        np.testing.assert_array_equal(one, other, err_msg=f"{entry.name}, logits")


C, H, D, T, V = 32, 4, 8, TOKENS, DEEP.vocab_size
ARRAYS = random_arrays(DEEP)
BOOK = textbook(DEEP, ARRAYS)
IDS = random_ids(DEEP, (1, T))
RIGHT = {name: array[0] for name, array in everything(BOOK, DEEP).items()}
CAUSAL = np.tri(T, dtype=bool)


def of_block(name: str) -> Array:
    """Return a tensor of block 0."""
    return ARRAYS[f"h.0.{name}"]


def rows(x: Array) -> Any:
    """Return the softmax of each row."""
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def tanh_gelu(x: Array, cubic: float = 0.044715) -> Any:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + cubic * x**3)))


def scores(scale: float = 1 / math.sqrt(D), keys: Array | None = None) -> Any:
    """Return the unmasked products of queries and keys [H, T, T]."""
    q, k = RIGHT["h.0.attn.q"], RIGHT["h.0.attn.k"].transpose(0, 2, 1) if keys is None else keys
    return np.einsum("htd,hds->hts", q, k) * scale


def hidden(x: Array, visible: NDArray[np.bool_] = CAUSAL, by: float = -np.inf) -> Any:
    return np.where(visible, x, by)


def turned(x: Array, halves: bool) -> Array:
    """Return heads [H, T, D] with rotary positions, computed one number at a time."""
    out = np.empty_like(x)
    for t in range(T):
        for i in range(D // 2):
            a, b = (i, i + D // 2) if halves else (2 * i, 2 * i + 1)
            angle = t / 10000 ** (2 * i / D)
            out[:, t, a] = x[:, t, a] * math.cos(angle) - x[:, t, b] * math.sin(angle)
            out[:, t, b] = x[:, t, b] * math.cos(angle) + x[:, t, a] * math.sin(angle)
    return out


def int8_column(column: Array, block: int = 32) -> Array:
    """Return a column of a matrix rounded to GGML's Q8_0."""
    out = column.copy()
    for start in range(0, len(column), block):
        part = column[start : start + block]
        step = np.abs(part).max() / 127
        out[start : start + block] = np.round(part / step) * float(np.float16(step))
    return out


def norm(x: Array, name: str = "ln_1") -> Any:
    """Return a LayerNorm of block 0, or ln_f, by name."""
    weight, bias = (ARRAYS[f"{name}.{kind}" if name == "ln_f" else f"h.0.{name}.{kind}"] for kind in ("weight", "bias"))
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


X, RESIDUAL, HIDDEN = RIGHT["embedding"], RIGHT["h.0.attn.residual"], RIGHT["h.0.mlp.c_fc"]
GAIN, OFFSET = of_block("ln_1.weight"), of_block("ln_1.bias")
CENTRED = X - X.mean(-1, keepdims=True)
UNBIASED = X.std(-1, keepdims=True, ddof=1)
LOGITS = RIGHT["logits"]
BIAS = of_block("attn.c_attn.bias")
BY_HAND: dict[str, tuple[str, Array]] = {  # the stage that is looked at, from the right ones below it
    "GELU with 0.44715": ("h.0.mlp.act", tanh_gelu(HIDDEN, 0.44715)),
    "GELU with 0.0044715": ("h.0.mlp.act", tanh_gelu(HIDDEN, 0.0044715)),
    "GELU with 0.044175": ("h.0.mlp.act", tanh_gelu(HIDDEN, 0.044175)),
    "GELU without ½": ("h.0.mlp.act", 2 * tanh_gelu(HIDDEN)),
    "GELU with √(2π)": (
        "h.0.mlp.act",
        0.5 * HIDDEN * (1 + np.tanh(math.sqrt(2 * math.pi) * (HIDDEN + 0.044715 * HIDDEN**3))),
    ),
    "SiLU": ("h.0.mlp.act", HIDDEN / (1 + np.exp(-HIDDEN))),
    "squared ReLU": ("h.0.mlp.act", np.maximum(HIDDEN, 0) ** 2),
    "activation missing": ("h.0.mlp.act", HIDDEN),
    "GELU before the bias": (
        "h.0.mlp.act",
        tanh_gelu(HIDDEN - of_block("mlp.c_fc.bias")) + of_block("mlp.c_fc.bias"),
    ),
    "standard deviation plus epsilon": ("h.0.ln_1", CENTRED / (UNBIASED + 1e-5) * GAIN + OFFSET),
    "unbiased variance": ("h.0.ln_1", CENTRED / np.sqrt(UNBIASED**2 + 1e-5) * GAIN + OFFSET),
    "variance without root": ("h.0.ln_1", CENTRED / (X.var(-1, keepdims=True) + 1e-5) * GAIN + OFFSET),
    "LayerNorm over tokens": ("h.0.ln_1", (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-5) * GAIN + OFFSET),
    "RMS norm": ("h.0.ln_1", X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-5) * GAIN),
    "RMS norm with bias": ("h.0.ln_1", X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-5) * GAIN + OFFSET),
    "LayerNorm gain dropped": ("h.0.ln_1", (norm(X) - OFFSET) / GAIN + OFFSET),
    "LayerNorm bias dropped": ("h.0.ln_1", norm(X) - OFFSET),
    "LayerNorm gain and bias dropped": ("h.0.ln_1", (norm(X) - OFFSET) / GAIN),
    "ln_1 in place of ln_2": ("h.0.ln_2", norm(RESIDUAL, "ln_1")),
    "ln_1 missing": ("h.0.ln_1", X),
    "ln_2 missing": ("h.0.ln_2", RESIDUAL),
    "final LayerNorm twice": ("ln_f", norm(RIGHT["ln_f"], "ln_f")),
    "attention scaled twice": ("h.0.attn.scores", hidden(scores(1 / 8))),
    "attention scaled up": ("h.0.attn.scores", hidden(scores(math.sqrt(8)))),
    "attention scaled by T": ("h.0.attn.scores", hidden(scores(1 / 3))),
    "attention scaled by H": ("h.0.attn.scores", hidden(scores(1 / 2))),
    "keys reshaped": ("h.0.attn.scores", hidden(scores(keys=RIGHT["h.0.attn.k"].reshape(H, D, T)))),
    "keys used as values": ("h.0.attn.v", RIGHT["h.0.attn.k"]),
    "queries used as keys": ("h.0.attn.k", RIGHT["h.0.attn.q"]),
    "heads split as [D, H]": ("h.0.attn.q", np.stack([RIGHT["h.0.attn.query"][:, head::H] for head in range(H)])),
    "heads split and merged as [D, H]": (
        "h.0.attn.merged",
        np.stack([RIGHT["h.0.attn.heads"][column % H, :, column // H] for column in range(C)], axis=-1),
    ),
    "mask of 0": ("h.0.attn.scores", hidden(scores(), by=0.0)),
    "mask after the softmax": ("h.0.attn.weights", rows(scores()) * CAUSAL),
    "sliding window of 4": (
        "h.0.attn.scores",
        hidden(scores(), np.array([[0 <= i - j < 4 for j in range(T)] for i in range(T)]), -1e30),
    ),
    "attention residual doubled": ("h.0.attn.residual", RESIDUAL + X),
    "MLP residual from after the norm": ("h.0", RIGHT["h.0"] - RESIDUAL + RIGHT["h.0.ln_2"]),
    "attention added twice": ("h.0.attn.residual", X + 2 * RIGHT["h.0.attn.c_proj"]),
    "MLP residual from the block's input": ("h.0", X + RIGHT["h.0.mlp.c_proj"]),
    "attention missing": ("h.0.attn.residual", X),
    "MLP missing": ("h.0", RESIDUAL),
    "parallel block": ("h.0.ln_2", norm(X, "ln_2")),
    "parallel block with one norm": (
        "h.0.mlp.c_fc",
        RIGHT["h.0.ln_1"] @ of_block("mlp.c_fc.weight") + of_block("mlp.c_fc.bias"),
    ),
    "value bias dropped": ("h.0.attn.c_attn", RIGHT["h.0.attn.c_attn"] - BIAS * (np.arange(3 * C) >= 2 * C)),
    "attn.c_proj bias dropped": ("h.0.attn.c_proj", RIGHT["h.0.attn.c_proj"] - of_block("attn.c_proj.bias")),
    "mlp.c_proj bias added twice": ("h.0.mlp.c_proj", RIGHT["h.0.mlp.c_proj"] + of_block("mlp.c_proj.bias")),
    "weights in int8 by blocks of 32": ("wte", np.stack([int8_column(row) for row in X - RIGHT["wpe"]])),
    "weights in int8 by output": (
        "h.0.mlp.c_proj",
        RIGHT["h.0.mlp.act"]
        @ (
            np.round(of_block("mlp.c_proj.weight") / (step := np.abs(of_block("mlp.c_proj.weight")).max(0) / 127))
            * step
        )
        + of_block("mlp.c_proj.bias"),
    ),
    "positions looked up in wte": ("wpe", ARRAYS["wte.weight"][:T]),
    "positions used as tokens": ("wte", ARRAYS["wte.weight"][:T]),
    "rotary positions on top of wpe, by halves": ("h.0.attn.k", turned(RIGHT["h.0.attn.k"], halves=True)),
    "rotary positions instead of wpe, by neighbours": ("h.0.attn.q", turned(RIGHT["h.0.attn.q"], halves=False)),
    "ids one too high": ("wte", ARRAYS["wte.weight"][(IDS[0] + 1) % V]),
    "ids one too low": ("wte", ARRAYS["wte.weight"][(IDS[0] - 1) % V]),
    "first token missing": ("wte", ARRAYS["wte.weight"][IDS[0, 1:]]),
    "EOS appended": ("wte", ARRAYS["wte.weight"][[*IDS[0], V - 1]]),
    "logits one id too high": ("logits", LOGITS[:, [V - 1, *range(V - 1)]]),
    "logits one id too low": ("logits", LOGITS[:, [*range(1, V), 0]]),
    "probabilities given as logits": ("logits", rows(LOGITS)),
    "logits capped at 30": ("logits", 30 * np.tanh(LOGITS / 30)),
    "logits divided by √C": ("logits", LOGITS / math.sqrt(C)),
    "output head reshaped": ("logits", RIGHT["ln_f"] @ ARRAYS["wte.weight"].reshape(C, V)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_an_entry_is_what_it_says(name: str) -> None:
    (entry,) = (entry for entry in catalogue(DEEP, T) if entry.name == name)
    stage, expected = BY_HAND[name]
    given = {other: array[None] for other, array in RIGHT.items() if other.startswith(("embedding", "h.", "ln_f"))}
    run = Pass(entry.change(BOOK), IDS, {} if stage == "wte" else given)
    np.testing.assert_allclose(plain(run.compute(stage))[0], expected, rtol=1e-11, atol=1e-12)


def test_a_table_is_texts_and_formulas_by_turns() -> None:
    one, other = {"ln_1": lambda s: s["input"]}, {"ln_2": lambda s: s["input"]}
    assert table_of("a: b (known from: c)", one, "d: e (known from: f)", other) == {
        "a: b (known from: c)": one,
        "d: e (known from: f)": other,
    }
    with pytest.raises(ValueError, match="shorter"):
        table_of("a: b (known from: c)", one, "d: e (known from: f)")


@pytest.mark.parametrize("module", [attention_mistakes, block_mistakes, model_mistakes])
def test_no_row_hides_another(module: Any) -> None:
    """A duplicate text in a table would silently replace another."""
    tree = ast.parse(Path(module.__file__).read_text("utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "rows"]
    texts = [ast.unparse(text) for call in calls for text in call.args[::2]]
    assert len(texts) == len(set(texts)) > 10
    for text in texts:
        assert re.fullmatch(r"""f?['"][^:]+: .+ (\(known from: .+\)|\{own\})['"]""", text), text


def test_masks_of_a_run_in_chunks() -> None:
    """The visible tokens of chunks of 4, 3, 1 and 1 are written by hand."""
    entries = {entry.name: entry for entry in catalogue(DEEP, T, CHUNKS)}
    inside = [4, 4, 4, 4, 7, 7, 7, 8, 9]
    upper_left = [1, 2, 3, 4, 1, 2, 3, 1, 1]
    for name, counts in (("causal mask missing in chunks", inside), ("causal mask from the upper left", upper_left)):
        visible = Pass(entries[name].change(BOOK), IDS)["visible"]
        assert visible.tolist() == [[key < count for key in range(T)] for count in counts]
    one = {entry.name for entry in catalogue(DEEP, T, (1,) * T)}
    assert "causal mask missing in chunks" not in one
    assert "causal mask from the upper left" in one


def test_one_block_used_for_all() -> None:
    orders = {entry.name: entry for entry in catalogue(DEEP, T) if entry.stages == ("layers",)}
    assert orders["layer 0 in every place"].change(BOOK).layers == (0, 0, 0, 0)
    assert orders["layer 3 in every place"].change(BOOK).layers == (3, 3, 3, 3)
    assert "layer 0 in every place" not in {entry.name for entry in catalogue(small(n_layer=2), T)}


def test_what_another_shape_makes_the_same_function_is_left_out() -> None:
    def names(**fields: Any) -> set[str]:
        return {entry.name for entry in catalogue(small(**fields), T)}

    assert "attention scaled by 8" not in names(n_embd=128, n_head=2)
    assert "attention scaled by 8" in names(n_embd=128, n_head=4)
    assert "attention scaled by T" not in names(n_embd=36, n_head=4)
    assert not [name for name in names(n_head=1) if name.startswith(("heads ", "attention scaled by H"))]
    assert "erf GELU" not in names(activation_function="gelu")
    assert "tanh GELU in block 0 alone" in names(activation_function="gelu")
    assert "LayerNorm epsilon 1e-5" in names(layer_norm_epsilon=1e-3)
    assert "LayerNorm epsilon 1e-3" not in names(layer_norm_epsilon=1e-3)
    assert "attention scaled as in GPT-2" in names(scale_attn_by_inverse_layer_idx=True)
    assert "attention scaled by layer" not in names(scale_attn_by_inverse_layer_idx=True)
    assert not [name for name in names(n_layer=1) if "block" in name and "alone" in name]
    assert {"erf GELU in block 1 alone"} == {name for name in names(n_layer=2) if "erf GELU in block 1" in name}
