"""The source of model.py beside what each of its lines computed for one text: as a page, or as a walk in text."""

from __future__ import annotations

import ast
import base64
import io
import keyword
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .. import model as forward_pass
from ..errors import NpgptError, checked, printable
from ..kernels import product
from ..language_model import LanguageModel, opened
from ..parameters import Array, LayerNorm
from ..text.tokenizer import shown
from .attention import _piece
from .page import filled, in_notebook

TEMPLATE = Path(__file__).with_name("explain_page.html")
OUTPUT = "h.{layer}"  # the block's output; the other stages of a block have it and a dot in front
SHAPES = {  # of stages that are not B T C
    "wpe": "T C",
    "attn.c_attn": "B T 3C",
    **dict.fromkeys(("attn.q", "attn.k", "attn.v", "attn.heads"), "B H T D"),
    **dict.fromkeys(("attn.scores", "attn.weights"), "B H T S"),
    **dict.fromkeys(("mlp.c_fc", "mlp.act"), "B T F"),
    "logits": "B T V",
}
SQUARES = ("attn.scores", "attn.weights")
LARGEST = 32 * 2**20  # bytes of a page
NUMBERS = 1_100_000  # bytes for single values, before base64; then 30 tokens of gpt2's shape take less than 3 MB
POINTS = 128  # columns of a picture of [T, C], at most
LIKELIEST = 10


class Step(NamedTuple):
    """A stage of model.py: its name there, the lines that compute it, and the functions that they call."""

    stage: str  # "wte", "h.{layer}.ln_1"
    lines: tuple[int, ...]
    functions: tuple[str, ...]


@cache
def source() -> str:
    """Return the text of model.py: of the file that runs."""
    return Path(str(forward_pass.__file__)).read_text("utf-8")


def calls_in(node: ast.AST, name: str = "") -> list[ast.Call]:
    """Return the calls of functions by a plain name, of one or of all, in the order of the text."""
    found = [part for part in ast.walk(node) if isinstance(part, ast.Call) and isinstance(part.func, ast.Name)]
    found.sort(key=lambda call: (call.lineno, call.col_offset))
    return [call for call in found if name in ("", ast.unparse(call.func))]


@cache
def walk() -> tuple[dict[str, Step], dict[int, list[tuple[int, int, str, str]]]]:
    """Return the stages in the order of computation, and by line the spans (start, end, kind, what) of the source.

    A stage's kind is "@". Raises ValueError where model.py has a form that is not expected.
    """
    functions = {node.name: node for node in ast.parse(source()).body if isinstance(node, ast.FunctionDef)}
    known, lines = {*functions, "activation"}, source().splitlines()
    spans: dict[int, list[tuple[int, int, str, str]]] = {}

    def mark(node: ast.expr | ast.stmt, stage: str) -> None:
        line = lines[node.lineno - 1].encode()  # ast counts bytes
        start, end = (len(line[:at].decode()) for at in (node.col_offset, node.end_col_offset or 0))
        spans.setdefault(node.lineno, []).append((start, end, "@", stage))

    def steps_of(function: str, call: str, prefix: str) -> Iterator[Step]:
        before: ast.stmt | None = None
        for node in (part for part in ast.walk(functions[function]) if isinstance(part, ast.stmt)):
            simple = isinstance(node, (ast.Assign, ast.Expr, ast.Return))
            for found in calls_in(node, call) if simple else ():
                name, value = found.args
                text = ast.literal_eval(ast.unparse(name).removeprefix("f"))
                mark(name, prefix + text)
                origin = before if isinstance(value, ast.Name) and before else value  # the line before computed a name
                used = [one for one in (ast.unparse(inner.func) for inner in calls_in(origin)) if one in known]
                yield Step(prefix + text, (found.lineno,), tuple(used))
            before = node if isinstance(node, ast.Assign) else before

    def in_order(steps: Iterator[Step]) -> list[Step]:
        return sorted(steps, key=lambda step: step.lines)  # stable: ast.walk goes breadth first

    outside, inside = in_order(steps_of("forward", "stage", "")), in_order(steps_of("block", "record", OUTPUT + "."))
    returned = functions["block"].body[-1]
    mark(returned, OUTPUT)
    at = next(number for number, step in enumerate(outside) if step.stage == OUTPUT)
    outside[at : at + 1] = [*inside, Step(OUTPUT, (returned.lineno, *outside[at].lines), ())]
    return {step.stage: step for step in outside}, _highlighted(spans, known)


def _highlighted(
    stages: Mapping[int, list[tuple[int, int, str, str]]], known: set[str]
) -> dict[int, list[tuple[int, int, str, str]]]:
    """Return stages' spans and those of keywords "k", strings "s", comments "c" and model.py's functions "f"."""
    kinds, lines = {tokenize.COMMENT: "c", tokenize.STRING: "s"}, source().splitlines()
    spans = {number: list(found) for number, found in stages.items()}
    before = ""
    for token in tokenize.generate_tokens(io.StringIO(source()).readline):
        kind = kinds.get(token.type, "s" if tokenize.tok_name[token.type].startswith("FSTRING") else "")
        if token.type == tokenize.NAME:
            kind = "k" if keyword.iskeyword(token.string) else "f" if token.string in known and before != "." else ""
        before = token.string
        (first, start), (last, end) = token.start, token.end
        for number in range(first, last + 1) if kind else ():
            span = start if number == first else 0, end if number == last else len(lines[number - 1])
            if not any(one[0] < span[1] and span[0] < one[1] for one in stages.get(number, ())):
                spans.setdefault(number, []).append((*span, kind, token.string if kind == "f" else ""))
    return {number: sorted(found) for number, found in spans.items()}


@dataclass(frozen=True, eq=False)
class Explanation:
    """Every stage of one run over T tokens, under the names of record=. In a notebook it shows itself as a page."""

    model: LanguageModel = field(repr=False)
    token_ids: tuple[int, ...]
    stages: Mapping[str, Array] = field(repr=False)

    def __repr__(self) -> str:
        return f"<Explanation of {len(self.token_ids)} tokens by {self.model.name}: {len(self.stages)} stages>"

    def _repr_html_(self) -> str:
        return in_notebook(self.page(), 900)

    @property
    def pieces(self) -> list[str]:
        """The tokens as printable text; a token's id where it has no text."""
        return [self.word(token_id) for token_id in self.token_ids]

    def word(self, token_id: int) -> str:
        """Return a token as printable text."""
        return printable(shown(_piece(self.model, token_id)))

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
        """Yield the walk as text: for each stage its line of model.py and, below, its figures; at the end what is next."""
        lines, last = source().splitlines(), len(self.token_ids) - 1
        for name, step in self.order():
            array, code = self.stages[name], lines[step.lines[0] - 1].split("  # ")[0].strip()
            rows = as_rows(array)
            seen = rows[np.isfinite(rows)]
            token, channel = np.unravel_index(np.argmax(np.where(np.isfinite(rows), abs(rows), -1)), rows.shape)
            numbers = " ".join(f"{value:.3g}" for value in rows[last, :4])
            yield (
                f"model.py:{step.lines[0]}  {code}\n"
                f"  {name} [{', '.join(letters(name).split())}] = {list(array.shape)}: mean {seen.mean():.3g}, "
                f"spread {seen.std():.3g}, largest {rows[token, channel]:.4g} at token {token}, column {channel}; "
                f"token {last} “{self.pieces[last]}”: {numbers}{' …' if rows.shape[1] > 4 else ''}"
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
        rows = {name: as_rows(array) for name, array in self.stages.items() if not name.endswith(SQUARES)}
        groups = sum(T * -(-table.shape[1] // self.group(table.shape[1])) for table in rows.values())
        edge = max(2, NUMBERS // (4 * groups))
        data = {
            "model": self.model.name,
            "ids": self.token_ids,
            "pieces": self.pieces,
            "C": config.n_embd,
            "H": config.n_head,
            "L": config.n_layer,
            "activation": forward_pass.ACTIVATIONS[config.activation_function].__name__,
            "epsilon": config.layer_norm_epsilon,
            "scales": [config.attention_scale(layer) for layer in range(config.n_layer)],
            "source": [_segments(line, spans.get(n, [])) for n, line in enumerate(source().splitlines(), 1)],
            "steps": [step for step in steps.values() if not (step.stage == "logits" and self.model.no_logits)],
            "shapes": {step.stage: letters(step.stage) for step in steps.values()},
            "stages": {name: self.drawn(name, array, edge) for name, array in self.stages.items()},
            "norms": {name: self.kept(np.stack(norm), edge) for name, norm in self.norms()},
            "stream": self.stream(),
            "lens": self.lens(),
            "noLogits": self.model.no_logits,
        }  # fmt: skip
        return filled(TEMPLATE, data)

    def group(self, width: int) -> int:
        """Return how many columns belong together: a head's, or all where heads have no part in them."""
        config = self.model.config
        return config.head_width if width % config.head_width == 0 and width != config.vocab_size else width

    def kept(self, rows: Array, edge: int) -> dict[str, Any]:
        """Return the values of rows that the page holds, the first and last `edge` of each group of columns."""
        group = self.group(rows.shape[1])
        numbers, exponents = _halves(rows, edge, group)
        edge = min(edge, -(-group // 2))  # not cut where this is half of a group
        return {"group": group, "edge": edge, "values": _base64(numbers), "exponents": exponents}

    def drawn(self, name: str, array: Array, edge: int) -> dict[str, Any]:
        """Return a stage as the page holds it: a picture of 8 bits a point, and single values of 11 bits."""
        square, T = name.endswith(SQUARES), len(self.token_ids)
        rows = as_rows(array)
        seen = rows[np.isfinite(rows)].astype(np.float64)
        at = int(np.argmax(np.where(np.isfinite(rows), abs(rows), -1)))
        found: dict[str, Any] = {"shape": array.shape, "mean": _short(seen.mean()), "spread": _short(seen.std()),
                                 "largest": [_short(rows.flat[at]), *divmod(at, rows.shape[1])]}  # fmt: skip
        if square:
            values = array[0][(slice(None), *np.tril_indices(T))]
            numbers, exponents = _halves(values, values.shape[1], values.shape[1])
            return found | {"values": _base64(numbers), "exponents": exponents}
        width, group = rows.shape[1], self.group(rows.shape[1])
        pool = _pool(width, group, self.model.config.n_embd)
        padded = np.pad(rows, [(0, 0), (0, -width % pool)]).reshape(T, -1, pool).astype(np.float64)
        points = np.take_along_axis(padded, abs(padded).argmax(-1, keepdims=True), -1)[..., 0]
        scale = float(np.quantile(abs(points), 0.99)) or float(abs(points).max()) or 1.0
        wide = rows.astype(np.float64)
        places = abs(rows).argmax(axis=1)
        return found | self.kept(rows, edge) | {
            "width": width, "pool": pool, "scale": _short(scale),
            "picture": _base64(np.rint(np.clip(points / scale, -1, 1) * 127).astype(np.int8)),
            "means": [_short(value) for value in wide.mean(axis=1)],
            "variances": [_short(value) for value in wide.var(axis=1)],
            "most": [[_short(rows[t, c]), int(c)] for t, c in enumerate(places)],
        }  # fmt: skip

    def norms(self) -> Iterator[tuple[str, LayerNorm]]:
        """Yield every LayerNorm's gain and bias by the name of its stage."""
        for layer, block in enumerate(self.model.parameters.h):
            yield f"h.{layer}.ln_1", block.ln_1
            yield f"h.{layer}.ln_2", block.ln_2
        yield "ln_f", self.model.parameters.ln_f

    def stream(self) -> list[dict[str, Any]]:
        """Return the residual stream: after each sublayer its norm, the norm of what was added, and their cosine [T]."""
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
def explain(text: str | ArrayLike, model: LanguageModel | str | None = None, *, special: bool = False) -> Explanation:
    """Return what every line of model.py computes for a text or ids [T], to be shown as a page or read as text.

    model: a model, its name or path; without one, the embedded model. special: read <|endoftext|> as such. Raises
    NpgptError for a text or model that does not fit, for a text that is too long to be shown, and for
    values that are not finite.
    """
    model = opened(model)
    token_ids = model.prompt_ids(text, special=special)
    config, T = model.config, len(token_ids)
    heads = config.n_layer * config.n_head * T * (T + 1) * 2 * 4 // 3
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
    """Return a stage as rows of tokens: [T, C] of [1, T, C], and heads [1, H, T, D] side by side, as they are merged."""
    return forward_pass.merge_heads(array)[0] if array.ndim == 4 else array.reshape(-1, array.shape[-1])


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

    A row is divided by that power, so that its largest is near 2¹⁴ and what is 10⁹ times smaller has 11 bits too.
    """
    rows = np.atleast_2d(rows).astype(np.float64)
    exponents = np.frexp(abs(rows).max(axis=1))[1] - 14
    scaled = np.ldexp(rows, -exponents[:, None]).reshape(len(rows), -1, group)
    if 2 * edge < group:
        scaled = np.concatenate([scaled[..., :edge], scaled[..., -edge:]], axis=-1)
    return scaled.astype("<f2"), [int(exponent) for exponent in exponents]


def _base64(array: Array | np.typing.NDArray[np.int8]) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _short(value: Any) -> float:
    return float(f"{value:.6g}")


def _segments(line: str, spans: list[tuple[int, int, str, str]]) -> list[tuple[str, str, str]]:
    """Return a line of source as (text, kind, what), the parts between spans as plain text."""
    found, at = [], 0
    for start, end, kind, what in spans:
        found += [(line[at:start], "", ""), (line[start:end], kind, what)]
        at = end
    return [one for one in (*found, (line[at:], "", "")) if one[0]]
