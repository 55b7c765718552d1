"""Attention weights as numbers, as lines of text, and as a page's data."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npgpt import NpgptError, forward
from npgpt.language_model import LanguageModel, load
from npgpt.parameters import Array
from npgpt.pictures import terminal
from npgpt.pictures.attention import AttentionWeights, attend, check_size
from tests.support.attention_page import CODES, data_of, weights_of
from tests.support.models import no_text, random_parameters, small
from tests.support.thorough import examples

HALF_A_STEP = 0.5 / 65535 * (1 + 1e-9)  # by which a stored weight may be off
THREE = np.array([[1, 0, 0], [0.04, 0.96, 0], [0, 0.5, 0.5]])


def bare() -> LanguageModel:
    """Return a model of 40 ids without a vocabulary."""
    return LanguageModel("bare", small(), random_parameters(small()), no_text("it has none"))


def random_weights(layers: int, heads: int, tokens: int, seed: int = 0) -> Array:
    """Return causal softmax rows from flat to sharp: [layers, heads, tokens, tokens]."""
    scores = 3 * np.random.default_rng(seed).standard_normal((layers, heads, tokens, tokens)).astype(np.float32)
    weights: Array = np.exp(np.where(np.tri(tokens, dtype=bool), scores, -np.inf))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def attended(weights: Array, *pieces: bytes) -> AttentionWeights:
    """Return the weights as if a model had computed them."""
    layers, heads, T, _ = weights.shape
    pieces = pieces or tuple(b" %d" % number for number in range(T))
    chosen = tuple(range(layers)), tuple(range(heads))
    return AttentionWeights("random", layers, heads, (7,) * T, pieces, *chosen, weights)


def test_weights_are_those_that_the_forward_pass_records() -> None:
    model, ids = bare(), [3, 1, 39, 1, 0]
    recorded: dict[str, Array] = {}
    forward(model.parameters, model.config, ids, record=recorded.__setitem__)
    every = np.stack([recorded[f"h.{layer}.attn.weights"][0] for layer in range(2)])
    whole = attend(ids, model)
    assert whole.weights.shape == (2, 3, 5, 5)
    np.testing.assert_array_equal(whole.weights, every)
    np.testing.assert_allclose(whole.weights.sum(-1), 1, rtol=1e-14)
    assert not np.triu(whole.weights, 1).any()
    assert (whole.layers, whole.heads, whole.n_layer, whole.n_head) == ((0, 1), (0, 1, 2), 2, 3)
    one = attend(ids, model, layer=1, head=2)
    np.testing.assert_array_equal(one.weights, every[1:, 2:])
    assert (one.layers, one.heads) == ((1,), (2,))
    assert one.pieces == (b"3", b"1", b"39", b"1", b"0")


def test_pieces_are_the_tokens_bytes() -> None:
    model = load()
    found = attend("It is é\n語", model, layer=0, head=0)
    assert b"".join(found.pieces) == "It is é\n語".encode()
    assert "".join(found.texts) == "It is é\\n\\xe8\\xaa\\x9e"


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"layer": 2}, "layer 2 does not exist: bare has 2, from 0 to 1; give one of these or none"),
        ({"layer": -1}, "layer -1 does not exist"),
        ({"layer": 0, "head": 3}, "head 3 does not exist: bare has 3, from 0 to 2"),
    ],
)
def test_what_does_not_exist(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(NpgptError, match=re.escape(message)):
        attend([1, 2], bare(), **chosen)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = bare()
    model.parameters.wte.weight[1] = np.nan
    with pytest.raises(NpgptError, match="bare has attention weights that are not finite"):
        attend([1, 2], model)


def test_a_large_map() -> None:
    assert terminal.head_map(THREE, ["I", " can", "not"], 80, terminal.SHADED) == [
        "         ␣",
        "         c n",
        "         a o",
        "       I n t",
        "0 I    ██· ·",
        "1 ␣can ░░██·",
        "2 not    ▓▓▓▓",
    ]
    assert terminal.head_map(THREE, ["é", " can", "not"], 80, terminal.ASCII)[-3:] == [
        "0 \\xe9 ##- -",
        "1 _can ..##-",
        "2 not    ****",
    ]


def test_a_large_map_in_colour() -> None:
    lines = terminal.head_map(THREE, ["I", " can", "not"], 80, terminal.COLOURED)
    assert lines[-3] == "0 I    \x1b[48;5;226m  \x1b[0m"
    assert lines[-2] == "1 ␣can \x1b[48;5;24m  \x1b[0m\x1b[48;5;226m  \x1b[0m"
    assert lines[-1] == "2 not  \x1b[48;5;53m  \x1b[0m\x1b[48;5;149m  \x1b[0m\x1b[48;5;149m  \x1b[0m"


def test_a_layers_heads_one_after_another() -> None:
    found = replace(attended(np.stack([THREE, THREE[::-1, ::-1].T])[None], b"I", b" can", b"not"), heads=(0, 11))
    assert terminal.picture(found, 120, terminal.SHADED) == [
        "random, layer 0: weights [1, 2, 3, 3], a map for each head (--head H for one alone, --html FILE for a page)",
        "Rows are queries, columns are keys; softmax over the keys: each row sums to 1. Later keys are masked: ·.",
        "",
        "head 0: own token 0.73",
        *terminal.head_map(found.weights[0, 0], found.texts, 120, terminal.SHADED),
        "",
        "head 11: own token 0.98",
        *terminal.head_map(found.weights[0, 1], found.texts, 120, terminal.SHADED),
        "",
        "blank 0, ░ 0.016, ▒ 0.14, ▓ 0.39, █ 0.77 to 1",
    ]


@pytest.mark.parametrize("palette", [terminal.SHADED, terminal.COLOURED, terminal.ASCII])
def test_what_masked_cells_look_like_is_told(palette: terminal.Palette) -> None:
    told = " ".join(terminal.picture(attended(random_weights(1, 2, 3)), 80, palette))
    shown = {terminal.SHADED: "·", terminal.COLOURED: "no colour", terminal.ASCII: "-"}[palette]
    assert f"Later keys are masked: {shown}. " in told


def test_ascii_where_there_is_no_more_and_colours_where_they_may_be() -> None:
    assert terminal.palette_for("utf-8", coloured=True) is terminal.COLOURED
    assert terminal.palette_for("utf-8", coloured=False) is terminal.SHADED
    for encoding in ("ascii", "latin-1", None):
        assert terminal.palette_for(encoding, coloured=True) is terminal.ASCII


def test_tokens_share_a_cell_where_there_is_no_room() -> None:
    weights = np.eye(40)
    weights[39] = [0.96, *[0.04 / 39] * 39]
    lines = terminal.head_map(weights, ["x"] * 40, 36, terminal.SHADED)
    assert " ".join(lines[:3]) == "(no room for every token: a cell is 2 by 2, of which it shows the largest)"
    assert lines[3] == " " * 13 + "0         20"
    assert len(lines) == 4 + 20
    assert lines[4] == " 0-1 xx      █···················"
    assert lines[-1] == "38-39 xx     █                  █"


@given(T=st.integers(1, 70), columns=st.integers(20, 140), seed=st.integers(0, 9), data=st.data())
@settings(max_examples=examples(25, 100))
def test_no_line_is_too_wide_and_cells_stand_below_each_other(
    T: int, columns: int, seed: int, data: st.DataObject
) -> None:
    pieces = data.draw(st.lists(st.binary(max_size=9) | st.text(max_size=7).map(str.encode), min_size=T, max_size=T))
    weights = random_weights(1, 3, T, seed)
    texts = attended(weights, *pieces).texts
    assert all(text.isprintable() for text in texts)
    for palette in (terminal.SHADED, terminal.COLOURED, terminal.ASCII):
        lines = terminal.head_map(weights[0, 0], texts, columns, palette)
        layer = terminal.picture(attended(weights, *pieces), columns, palette)
        plain = [CODES.sub("", line) for line in [*lines, *layer[:-1]]]  # the last one tells the shades
        assert all(line.isprintable() for line in plain)
        assert all(terminal.width(line) <= columns for line in plain)
    rows = terminal.head_map(weights[0, 0], texts, columns, terminal.COLOURED)
    shared = re.search(r"a cell is (\d+)", " ".join(rows[:-1]))
    n = -(-T // (int(shared[1]) if shared else 1))
    ends = [terminal.width(CODES.sub("", row)) for row in rows[-n:]]  # a row ends with its own key's cell
    assert n == 1 or set(np.diff(ends)) in ({1}, {2})


def test_a_number_is_above_its_cell_or_nowhere() -> None:
    assert terminal.ruler(22, 5) == "0         50"
    assert terminal.ruler(23, 5) == "0         50        100"
    assert terminal.ruler(1, 1) == "0"


@given(T=st.integers(1, 40), group=st.integers(1, 7))
def test_sharing_shows_the_largest_and_masks_what_is_masked(T: int, group: int) -> None:
    weights = random_weights(1, 1, T)[0, 0]
    cells = terminal.pooled(weights, group)
    for row in range(len(cells)):
        for column in range(len(cells)):
            part = weights[row * group : (row + 1) * group, column * group : (column + 1) * group]
            assert cells[row, column] == (part.max() if column <= row else -1)


def test_shades_are_ordered_and_none_looks_like_what_is_masked() -> None:
    weights = np.linspace(0, 1, 1001)
    for palette in (terminal.SHADED, terminal.COLOURED, terminal.ASCII):
        steps = len(palette.shades)
        found = terminal.levels(weights, steps)
        assert (np.diff(found) >= 0).all()
        assert set(found) == set(range(steps))
        assert len({palette.cell(level, 2) for level in range(-1, steps)}) == steps + 1
    assert terminal.levels(np.array([-1.0]), 5) == [-1]
    assert terminal.scale(terminal.SHADED) == "blank 0, ░ 0.016, ▒ 0.14, ▓ 0.39, █ 0.77 to 1"
    assert terminal.scale(terminal.ASCII) == "blank 0, . 0.016, : 0.14, * 0.39, # 0.77 to 1"
    assert terminal.scale(terminal.COLOURED).startswith("\x1b[48;5;53m \x1b[0m 0, \x1b[48;5;54m \x1b[0m 0.0039, ")
    assert terminal.width(CODES.sub("", terminal.scale(terminal.COLOURED))) < 80
    for bound, level in ((0.0157, 1), (0.0155, 0), (0.142, 2), (0.139, 1), (0.767, 4), (0.764, 3)):
        assert terminal.levels(np.array(bound), 5) == level


def test_colours_become_lighter() -> None:
    cube = [0, 95, 135, 175, 215, 255]
    linear = [((value / 255 + 0.055) / 1.055) ** 2.4 if value else 0 for value in cube]
    light = []
    for number in terminal.COLOURED.shades:
        assert isinstance(number, int)
        red, rest = divmod(number - 16, 36)
        light.append(0.2126 * linear[red] + 0.7152 * linear[rest // 6] + 0.0722 * linear[rest % 6])
    assert light == sorted(light)


def test_width() -> None:
    assert [terminal.width(text) for text in ("a", "語", "e\u0301", "🤯", "ｱ", "")] == [1, 2, 1, 2, 1, 0]
    assert terminal.fitted("日本語", 4, terminal.SHADED) == "日… "
    assert terminal.characters("e\u0301語") == ["e\u0301", "語"]
    assert unicodedata.category("\u0301") == "Mn"


@given(layers=st.integers(1, 3), heads=st.integers(1, 3), T=st.integers(1, 30), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_a_page_holds_the_weights_to_within_half_a_step(layers: int, heads: int, T: int, seed: int) -> None:
    weights = random_weights(layers, heads, T, seed)
    data = data_of(attended(weights).page())
    assert np.abs(weights_of(data) - weights).max() <= HALF_A_STEP


def test_a_page_is_closed_to_the_network_and_to_its_text() -> None:
    pieces = (b"</script><script>alert(1)</script>", b"<!--", b"{{data}}", "\u2028é'\"".encode())
    found = attended(random_weights(1, 1, 4), *pieces)
    text = found.page()
    assert "alert(1)</script>" not in text
    assert text.count("<!--") == 0
    assert text.count("</script>") == 2
    assert data_of(text)["pieces"] == list(found.texts)
    assert "default-src 'none'" in text
    assert not re.findall(r"(?:src|href|url)\s*[=(]|https?:|import\b", text.replace("default-src 'none'", ""))


def test_a_page_of_50_tokens_on_gpt2s_shape_is_small() -> None:
    text = attended(random_weights(12, 12, 50)).page()
    assert len(text.encode()) < 600_000


def test_a_page_that_would_be_too_large_is_refused() -> None:
    wide = replace(attended(np.eye(2)[None, None]), token_ids=(7,) * 12000)
    with pytest.raises(NpgptError, match="1 layers × 1 heads × 12000 tokens would take 183 MiB"):
        wide.page()
    assert wide._repr_html_() is None
    check_size(1, 12, 1024)
    with pytest.raises(
        NpgptError, match=r"12 layers × 12 heads × 1024 tokens would take 192 MiB, and may take 64: give"
    ):
        check_size(12, 12, 1024)
