"""The source of model.py beside what each of its lines computes for a text, as a page or as text."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .. import model as forward_pass
from ..errors import NpgptError, checked, counted, printable
from ..kernels import product
from ..language_model import LanguageModel, opened
from ..parameters import Array, LayerNorm
from ..text.tokenizer import shown
from .page import filled, in_notebook
from .source import OUTPUT, Step, segments, source, walk

TEMPLATE = Path(__file__).with_name("explain_page.html")
SHAPES = {  # of stages that are not B T C
    "wpe": "T C",
    "attn.c_attn": "B T 3C",
    **dict.fromkeys(("attn.q", "attn.k", "attn.v", "attn.heads"), "B H T D"),
    **dict.fromkeys(("attn.scores", "attn.weights"), "B H T S"),
    **dict.fromkeys(("mlp.c_fc", "mlp.act"), "B T F"),
    "logits": "B T V",
}
PARTS = ("attn.q", "attn.k", "attn.v")
SQUARES = ("attn.scores", "attn.weights")
LARGEST = 32 * 2**20  # bytes of a page
NUMBERS = 1_000_000  # bytes for single values, before base64; then 30 tokens of gpt2's shape take less than 3 MB
POINTS = 128  # columns of a picture of [T, C], at most
LIKELIEST = 10


@dataclass(frozen=True, eq=False)
class Explanation:
    """Every stage of one run over T tokens, by the names of record=. A notebook shows the page."""

    model: LanguageModel = field(repr=False)
    token_ids: tuple[int, ...]
    stages: Mapping[str, Array] = field(repr=False)

    def __repr__(self) -> str:
        tokens = counted(len(self.token_ids), "token")
        return printable(f"Explanation({self.model.name!r}: {tokens}, {len(self.stages)} stages)")

    def _repr_html_(self) -> str:
        return in_notebook(self.page(), 900)

    def word(self, token_id: int) -> str:
        """Return a token as printable text; its id if it has no text."""
        return printable(shown(self.model.piece(token_id))) or str(token_id)

    def order(self) -> Iterator[tuple[str, Step]]:
        """Yield each stage's name and step in the order of computation, block by block."""
        steps = [step for step in walk()[0].values() if not (step.stage == "logits" and self.model.no_logits)]
        layers = [step for step in steps if step.stage.startswith(OUTPUT)]
        for step in steps[: steps.index(layers[0])]:
            yield step.stage, step
        for layer in range(self.model.config.n_layer):
            yield from ((step.stage.format(layer=layer), step) for step in layers)
        for step in steps[steps.index(layers[-1]) + 1 :]:
            yield step.stage, step

    def steps(self) -> Iterator[str]:
        """Yield the walk as text: each stage's line of model.py with its figures, and then the next token."""
        lines, last = source().splitlines(), len(self.token_ids) - 1
        for name, step in self.order():
            array, code = self.stages[name], lines[step.lines[0] - 1].split("  # ")[0].strip()
            rows = as_rows(array)
            mean, spread, token, channel = figures(rows)
            beginning = rows[last, : min(4, array.shape[-1])]
            numbers = " ".join(f"{value:.3g}" for value in beginning) + " …" * (len(beginning) < array.shape[-1])
            yield (
                f"model.py:{step.lines[0]}  {code}\n"
                f"  {name} [{', '.join(letters(name).split())}] = {list(array.shape)}: mean {mean:.3g}, "
                f"spread {spread:.3g}, largest {rows[token, channel]:.4g} at {place(array, token, channel)}\n"
                f"  token {last} “{self.word(self.token_ids[last])}”{', head 0' * (array.ndim == 4)}: {numbers}"
            )
        if self.model.no_logits:
            yield f"no next token: {self.model.no_logits}"
        else:
            found = likeliest(self.stages["logits"][0, -1:])[0]
            yield "next: " + ", ".join(f"“{self.word(token)}” {probability:.4f}" for token, probability in found)

    def page(self) -> str:
        """Return the page, one self-contained HTML file."""
        config, T = self.model.config, len(self.token_ids)
        steps, spans = walk()
        rows = {name: as_rows(array) for name, array in self.stages.items() if not name.endswith(SQUARES + PARTS)}
        groups = sum(T * -(-table.shape[1] // self.group(name, table.shape[1])) for name, table in rows.items())
        edge = max(2, NUMBERS // (4 * groups))
        data = {
            "model": self.model.name,
            "ids": self.token_ids,
            "pieces": [self.word(token_id) for token_id in self.token_ids],
            "C": config.n_embd,
            "H": config.n_head,
            "L": config.n_layer,
            "activation": forward_pass.ACTIVATIONS[config.activation_function].__name__,
            "epsilon": config.layer_norm_epsilon,
            "scales": [config.attention_scale(layer) for layer in range(config.n_layer)],
            "source": [segments(line, spans.get(n, [])) for n, line in enumerate(source().splitlines(), 1)],
            "steps": [step for step in steps.values() if not (step.stage == "logits" and self.model.no_logits)],
            "shapes": {step.stage: letters(step.stage) for step in steps.values()},
            "stages": {name: self.drawn(name, array, edge) for name, array in self.stages.items()},
            "norms": {name: self.kept(name, np.stack(norm), edge) for name, norm in self.norms()},
            "stream": self.stream(),
            "lens": self.lens(),
            "noLogits": self.model.no_logits,
        }  # fmt: skip
        return filled("npgpt explain", TEMPLATE, data)

    def group(self, name: str, width: int) -> int:
        """Return how many columns of a stage belong together: those of a head, or all of the logits."""
        head_width = self.model.config.head_width
        return head_width if width % head_width == 0 and name != "logits" else width

    def kept(self, name: str, rows: Array, edge: int) -> dict[str, Any]:
        """Return the values of rows for the page: the first and last `edge` of each group of columns."""
        group = self.group(name, rows.shape[1])
        numbers, exponents = _halves(rows, edge, group)
        edge = min(edge, -(-group // 2))  # not cut where this is half of a group
        return {"group": group, "edge": edge, "values": _base64(numbers), "exponents": exponents}

    def drawn(self, name: str, array: Array, edge: int) -> dict[str, Any]:
        """Return a stage's data for the page: a picture of 8 bits a point, and single values of 11 bits."""
        square, T = name.endswith(SQUARES), len(self.token_ids)
        rows = as_rows(array)
        mean, spread, token, channel = figures(rows)
        found: dict[str, Any] = {"shape": array.shape, "mean": _short(mean), "spread": _short(spread),
                                 "largest": [_short(rows[token, channel]), token, channel]}  # fmt: skip
        if square:
            values = array[0][(slice(None), *np.tril_indices(T))]
            numbers, exponents = _halves(values, values.shape[1], values.shape[1])
            return found | {"values": _base64(numbers), "exponents": exponents}
        width, group = rows.shape[1], self.group(name, rows.shape[1])
        pool = _pool(width, group, self.model.config.n_embd)
        padded = np.pad(rows, [(0, 0), (0, -width % pool)]).reshape(T, -1, pool).astype(np.float64)
        points = np.take_along_axis(padded, abs(padded).argmax(-1, keepdims=True), -1)[..., 0]
        scale = float(np.quantile(abs(points), 0.99)) or float(abs(points).max()) or 1.0
        wide = rows.astype(np.float64)
        places = abs(rows).argmax(axis=1)
        found |= self.kept(name, rows, edge) | {
            "width": width, "pool": pool, "scale": _short(scale),
            "picture": _base64(np.rint(np.clip(points / scale, -1, 1) * 127).astype(np.int8)),
            "means": [_short(value) for value in wide.mean(axis=1)],
            "variances": [_short(value) for value in wide.var(axis=1)],
            "most": [[_short(rows[t, c]), int(c)] for t, c in enumerate(places)],
        }  # fmt: skip
        if name.endswith(PARTS):  # columns of c_attn, whose numbers serve
            block, _, part = name.rpartition(".")
            found |= {"of": f"{block}.c_attn", "part": "qkv".index(part), "values": "", "picture": "", "exponents": []}
        return found

    def norms(self) -> Iterator[tuple[str, LayerNorm]]:
        """Yield every LayerNorm's gain and bias by the name of its stage."""
        for layer, block in enumerate(self.model.parameters.h):
            yield f"h.{layer}.ln_1", block.ln_1
            yield f"h.{layer}.ln_2", block.ln_2
        yield "ln_f", self.model.parameters.ln_f

    def stream(self) -> list[dict[str, Any]]:
        """Return, after each sublayer, the stream's norm, the norm of the addition and their cosine [T]."""
        before = as_rows(self.stages["embedding"]).astype(np.float64)
        norm = np.linalg.norm(before, axis=1)
        found = [{"stage": "embedding", "norm": [_short(value) for value in norm]}]
        for layer in range(self.model.config.n_layer):
            for sublayer, after in (("attn", f"h.{layer}.attn.residual"), ("mlp", f"h.{layer}")):
                added = as_rows(self.stages[f"h.{layer}.{sublayer}.c_proj"]).astype(np.float64)
                size = np.linalg.norm(added, axis=1)
                cosine = (added * before).sum(axis=1) / np.maximum(size * norm, 1e-300)
                before = as_rows(self.stages[after]).astype(np.float64)
                norm = np.linalg.norm(before, axis=1)
                columns = {"norm": norm, "added": size, "cosine": cosine}
                found.append({"stage": after} | {key: [*map(_short, values)] for key, values in columns.items()})
        return found

    def lens(self) -> list[list[list[tuple[str, float]]]]:
        """Return the likeliest next tokens of the embedding and of each block's output read through ln_f and the head.

        The last entry is what the model itself computes. Empty for a model without logits.
        """
        if self.model.no_logits:
            return []
        parameters, found = self.model.parameters, []
        for name in ("embedding", *(f"h.{layer}" for layer in range(self.model.config.n_layer - 1)), "logits"):
            stage = self.stages[name][0]
            if name != "logits":
                x = forward_pass.layer_norm(stage, *parameters.ln_f, self.model.config.layer_norm_epsilon)
                stage = product(x, parameters.lm_head.weight.T)
            found.append([[(self.word(one), round(p, 5)) for one, p in row] for row in likeliest(stage)])
        return found


@checked
def explain(
    text: str | ArrayLike, model: LanguageModel | str | os.PathLike[str] | None = None, *, special: bool = False
) -> Explanation:
    """Return what every line of model.py computes for a text or ids [T], as a page or as text.

    model: a model, its name or path; the default is the embedded model. special: encode <|endoftext|> and the like as
    special tokens. Raises NpgptError for a text or model that does not fit, for a text that is too long for a page, and
    for values that are not finite.
    """
    model = opened(model)
    token_ids = model.text_ids(text, special=special)
    config, T = model.config, len(token_ids)
    heads = config.n_layer * config.n_head * T * (T + 1) * 2 * 4 // 3
    # 14 stages of a block are rows of tokens, and c_attn, c_fc and act are several times as wide
    rows = config.n_layer * T * 18 * (min(config.n_embd, POINTS) + 8 * config.n_head)
    if (size := heads + rows) > LARGEST:
        raise NpgptError(
            f"a page of {T} tokens, {config.n_layer} layers and {config.n_head} heads would take {size / 2**20:.0f} "
            f"MiB, and may take {LARGEST // 2**20}: give a shorter text"
        )
    stages: dict[str, Array] = {}
    model(token_ids, record=stages.__setitem__)
    if model.no_logits:
        del stages["logits"]
    for name, array in stages.items():
        there = array[0][(slice(None), *np.tril_indices(T))] if name.endswith(SQUARES) else array
        if not np.isfinite(there).all():
            raise NpgptError(f"{model.name}: {name} has values that are not finite; see npgpt inspect")
    return Explanation(model, tuple(token_ids), stages)


def letters(name: str) -> str:
    """Return a stage's shape in letters: "B T 3C"."""
    return SHAPES.get(name.split(".", 2)[-1] if name.startswith("h.") else name, "B T C")


def as_rows(array: Array) -> Array:
    """Return a stage as rows of tokens: [T, C] of [1, T, C]; heads [1, H, T, D] are merged to [T, C]."""
    return forward_pass.merge_heads(array)[0] if array.ndim == 4 else array.reshape(-1, array.shape[-1])


def figures(rows: Array) -> tuple[float, float, int, int]:
    """Return the mean and the standard deviation of a stage's rows, and the row and column of the largest magnitude.

    Masked scores, which are −∞, do not count.
    """
    finite = np.isfinite(rows)
    seen = rows[finite].astype(np.float64)  # squares of float32 may overflow
    at = int(np.argmax(np.where(finite, abs(rows), -1)))
    return float(seen.mean()), float(seen.std()), *divmod(at, rows.shape[1])


def place(array: Array, row: int, column: int) -> str:
    """Return the place of a value of as_rows(array) in words; columns count from the beginning of a head."""
    head, column = divmod(column, array.shape[-1])
    return f"token {row}, {f'head {head}, ' if array.ndim == 4 else ''}column {column}"


def likeliest(logits: Array) -> list[list[tuple[int, float]]]:
    """Return the ids and probabilities of each row's likeliest tokens, most likely first: logits [T, V]."""
    probabilities = forward_pass.softmax(logits.astype(np.float64))
    best = np.argsort(-probabilities, axis=-1, kind="stable")[:, :LIKELIEST]
    return [[(int(one), float(row[one])) for one in ids] for row, ids in zip(probabilities, best, strict=True)]


def _pool(width: int, group: int, n_embd: int) -> int:
    """Return how many columns share a point of a picture; pools do not cross from head to head."""
    if group == width and width > n_embd:
        return -(-width // POINTS)
    return next(
        pool for pool in range(1, group + 1) if group % pool == 0 and (n_embd / pool <= POINTS or pool == group)
    )


def _halves(rows: Array, edge: int, group: int) -> tuple[Array, list[int]]:
    """Return the first and last `edge` of each group of columns as float16, and each row's power of two before that.

    A row is divided by that power, so that its largest is near 2¹⁵ and what is 10⁸ times smaller has 11 bits too.
    """
    rows = np.atleast_2d(rows).astype(np.float64)
    exponents = np.frexp(abs(rows).max(axis=1))[1] - 15
    scaled = np.ldexp(rows, -exponents[:, None]).reshape(len(rows), -1, group)
    if 2 * edge < group:
        scaled = np.concatenate([scaled[..., :edge], scaled[..., -edge:]], axis=-1)
    return scaled.astype("<f2"), [int(exponent) for exponent in exponents]


def _base64(array: Array | np.typing.NDArray[np.int8]) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _short(value: Any) -> float:
    return float(f"{value:.6g}")
