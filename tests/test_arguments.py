"""Wrong arguments to the public API give a result or a one-line error, never an internal exception."""

from __future__ import annotations

import fractions
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npgpt
from npgpt import testing, tracing
from npgpt.checkpoints import inspect
from npgpt.checkpoints.ends import Ends
from npgpt.errors import NpgptError
from npgpt.model import gelu
from npgpt.oracle import check as oracle
from npgpt.oracle import parts
from npgpt.oracle.diagnosis import Diagnosis
from npgpt.oracle.report import Report
from npgpt.pictures.attention import attend
from npgpt.scoring.scoring import totals
from npgpt.text.sampling import Sampling
from tests.support.models import random_parameters, small, store
from tests.support.thorough import examples

CONFIG = small()
PARAMETERS = random_parameters(CONFIG)
AUSTEN = npgpt.load()
BARE = npgpt.LanguageModel("bare", CONFIG, PARAMETERS)


class Broken:
    """An object that converts to no array, number, text or path."""

    def __array__(self, *arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no array")

    def __repr__(self) -> str:
        return "broken"


def endless() -> list[Any]:
    """Return a list that contains itself."""
    found: list[Any] = []
    found.append(found)
    return found


WRONG: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "NumPy's True": lambda: np.bool_(True),
    "0": lambda: 0,
    "-1": lambda: -1,
    "2**70": lambda: 2**70,
    "1.5": lambda: 1.5,
    "2.0": lambda: 2.0,
    "NaN": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "1j": lambda: 1j,
    "a fraction": lambda: fractions.Fraction(1, 2),
    "'no'": lambda: "no",
    "''": lambda: "",
    "a surrogate": lambda: "\ud800",
    "a zero byte": lambda: "a\0b",
    "bytes": lambda: b"x",
    "[]": list,
    "()": tuple,
    "[True]": lambda: [True, 1],
    "[1.5]": lambda: [1.5],
    "[1.0, 2]": lambda: [1.0, 2],
    "[-1]": lambda: [-1],
    "[2**70]": lambda: [2**70],
    "[None]": lambda: [None],
    "['a']": lambda: ["a", "b"],
    "['\\0']": lambda: ["\0"],
    "ragged": lambda: [[1], [1, 2]],
    "[[True]]": lambda: [[True, 2]],
    "a list in itself": endless,
    "a generator": lambda: (number for number in (1, 2)),
    "a range": lambda: range(2),
    "a set": lambda: {1, 2},
    "a dict": lambda: {"a": 1},
    "{}": dict,
    "an object": object,
    "a broken object": Broken,
    "a function": lambda: lambda *_: None,
    "a function that raises": lambda: lambda *_: 1 / 0,
    "a type": lambda: int,
    "...": lambda: ...,
    "a path": lambda: Path("nowhere"),
    "masked": lambda: np.ma.masked_array([1, 2], [True, False]),
    "masked floats": lambda: np.ma.masked_array([[1.0, 2.0]], [[True, False]]),
    "a masked number": lambda: np.ma.masked_array(2, True),
    "floats": lambda: np.array([1.0, 2.0]),
    "booleans": lambda: np.array([True, False]),
    "complex": lambda: np.array([1j, 2]),
    "texts": lambda: np.array(["a", "b"]),
    "objects": lambda: np.array([1, None], object),
    "dates": lambda: np.array(["2020-01-01"], "datetime64[D]"),
    "records": lambda: np.zeros(2, [("a", "i4")]),
    "no numbers": lambda: np.zeros(0, int),
    "a number's array": lambda: np.array(2),
    "three axes": lambda: np.ones((1, 1, 2), int),
    "a Config": lambda: CONFIG,
    "Parameters": lambda: PARAMETERS,
    "a model": lambda: BARE,
    "a cache": lambda: npgpt.KVCache(CONFIG, 1, 4),
}
PLACE = Path("stands for a new folder")
SOURCE = Path("stands for a model's folder")


def consumed(call: Callable[..., Any]) -> Callable[..., Any]:
    """Make the call and exhaust its iterator."""
    return lambda *arguments, **options: list(call(*arguments, **options))


IDS = [1, 2]
LOGITS = np.zeros((2, 40))
MANY = {"prompts": ["a"], "max_tokens": 1, "seed": 1, "stop": (), "ignore_eos": False}
STEPS = {"prompt": IDS, "max_tokens": 1, "sampling": Sampling(), "seed": 1, "stop": (), "ignore_eos": False}
CACHE = npgpt.KVCache(CONFIG, 1, 4, "float64")
CONFIG_FIELDS: dict[str, Any] = {
    **{key: getattr(CONFIG, key) for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")},
    "activation_function": "gelu",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
CALLS: dict[str, tuple[Callable[..., Any], Mapping[str, Any]]] = {
    "load": (npgpt.load, {"model": SOURCE, "dtype": "float32", "n_head": None, "config": None, "name_scheme": None}),
    "Config": (npgpt.Config, CONFIG_FIELDS),
    "token_rows": (CONFIG.token_rows, {"token_ids": IDS, "past": 0}),
    "first_of": (lambda logits_from: CONFIG.first_of(2, logits_from), {"logits_from": 0}),
    "KVCache": (npgpt.KVCache, {"config": CONFIG, "batch_size": 1, "capacity": 2, "dtype": "float32"}),
    "KVCache.rows": (CACHE.rows, {"rows": [0]}),
    "KVCache.advance": (lambda tokens: npgpt.KVCache(CONFIG, 1, 4).advance(tokens), {"tokens": 1}),
    "KVCache.past": (CACHE.past, {"config": CONFIG}),
    "KVCache.extend": (
        lambda **keywords: npgpt.KVCache(CONFIG, 1, 4, "float64").extend(**keywords),
        {"layer": 0, "k": np.zeros((1, 3, 1, 7)), "v": np.zeros((1, 3, 1, 7))},
    ),
    "Sampling": (
        Sampling,
        {"temperature": 1.0, "top_k": 1, "top_p": 1.0, "min_p": 0.1, "repetition_penalty": 1.0},
    ),
    "forward": (
        npgpt.forward,
        {
            "parameters": PARAMETERS,
            "config": CONFIG,
            "token_ids": IDS,
            "cache": None,
            "record": None,
            "logits_from": 0,
        },
    ),
    "LanguageModel()": (BARE, {"token_ids": IDS, "cache": None, "record": None, "logits_from": 0}),
    "LanguageModel": (
        npgpt.LanguageModel,
        {
            "name": "m",
            "config": CONFIG,
            "parameters": PARAMETERS,
            "open_tokenizer": lambda: AUSTEN.tokenizer,
            "ends": Ends(),
        },
    ),
    "Ends": (Ends, {"eos": (1, 2), "bos": 1}),
    "encode_prompt": (AUSTEN.encode_prompt, {"text": "a", "special": False}),
    "generate": (
        consumed(AUSTEN.generate),
        {
            "prompt": "a",
            "max_tokens": 1,
            "seed": 1,
            "stop": (),
            "special": False,
            "ignore_eos": False,
            "keep_last": False,
            "temperature": 1.0,
            "top_k": 1,
        },
    ),
    "generate_many": (consumed(AUSTEN.generate_many), MANY | {"special": False, "keep_last": False, "top_k": 1}),
    "steps": (consumed(BARE.steps), STEPS | {"samples": 1}),
    "steps_many": (consumed(BARE.steps_many), MANY | {"prompts": [IDS], "sampling": Sampling()}),
    "Tokenizer.encode": (AUSTEN.tokenizer.encode, {"text": "a", "special": False}),
    "Tokenizer.decode": (AUSTEN.tokenizer.decode, {"token_ids": IDS}),
    "Tokenizer.piece": (AUSTEN.tokenizer.piece, {"token_id": 1}),
    "Tokenizer.has_text": (AUSTEN.tokenizer.has_text, {"token_id": 1}),
    "totals": (
        consumed(totals),
        {"texts": ["a"], "model": AUSTEN, "special": False, "names": (), "skip": (), "progress": None},
    ),
    "score": (
        consumed(npgpt.score),
        {
            "texts": ["a"],
            "model": AUSTEN,
            "executor": None,
            "convention": "rolling",
            "context": None,
            "stride": None,
            "end_of_text": None,
            "special": False,
            "top": 0,
            "names": (),
            "skip": (),
            "progress": None,
        },
    ),
    "check": (
        npgpt.check,
        {
            "theirs": LOGITS,
            "prompt": IDS,
            "weights": BARE,
            "dtype": None,
            "config": None,
            "n_head": None,
            "attention_mask": None,
            "chunks": (),
            "targets": None,
            "gradients": False,
            "shape": (),
            "perturb": True,
            "progress": None,
        },
    ),
    "check_greedy": (npgpt.check_greedy, {"theirs": IDS, "prompt": IDS, "weights": BARE, "dtype": "float32"}),
    "check_part": (
        npgpt.check_part,
        {
            "part": "gelu",
            "theirs": gelu,
            "weights": None,
            "n_head": None,
            "x": [[0.0, 1.0]],
            "dtype": None,
            "seed": 0,
            "perturb": True,
        },
    ),
    "assert_matches": (testing.assert_matches, {"theirs": LOGITS, "prompt": IDS, "weights": BARE}),
    "convert": (
        npgpt.convert,
        {
            "source": SOURCE,
            "folder": PLACE,
            "dtype": "float32",
            "n_head": None,
            "name_scheme": None,
            "overwrite": False,
            "progress": None,
        },
    ),
    "save": (npgpt.save, {"model": BARE, "folder": PLACE}),
    "trace": (tracing.trace, {"text": IDS, "model": BARE, "only": (), "loss": False, "gradients": False}),
    "inspect": (inspect.inspect, {"model": SOURCE, "n_head": None}),
    "attend": (attend, {"text": IDS, "model": BARE, "layer": 0, "head": 0}),
}

# What is taken, by the argument's name, or where that says too little by call and name: all else is refused.
NUMBER = ("a number's array",)
NONE = ("None",)
TRUTH = ("True", "NumPy's True")
REAL = ("None", "0", "1.5", "2.0", "2**70", "a fraction", *NUMBER)
COUNT = ("None", "0", *NUMBER)
EMPTY = ("[]", "()", "no numbers")
TEXTS = (*EMPTY, "['a']", "['\\0']", "texts")
TEXT = ("'no'", "''", "a zero byte")
CONFIG_OR_NONE = ("None", "a Config")
FUNCTIONS = ("a function", "a function that raises", "a type", "a model")
TAKEN: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("overwrite", "special", "ignore_eos", "keep_last", "perturb", "loss", "gradients"), TRUTH),
    **dict.fromkeys(("dtype", "name_scheme", "cache", "executor"), NONE),
    **dict.fromkeys(("n_head", "context", "stride"), NONE + NUMBER),
    **dict.fromkeys(("vocab_size", "n_positions", "n_layer", "n_inner"), NONE + NUMBER),
    **dict.fromkeys(("batch_size", "capacity", "samples"), NUMBER),
    **dict.fromkeys(("max_tokens", "seed", "top_k", "top", "layer", "head", "past", "tokens"), COUNT),
    **dict.fromkeys(("temperature", "repetition_penalty", "top_p", "min_p"), REAL),
    **dict.fromkeys(("tie_word_embeddings", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"), TRUTH),
    **dict.fromkeys(("token_ids", "prompt"), ("a range",)),
    **dict.fromkeys(("record", "progress"), NONE + FUNCTIONS),
    **dict.fromkeys(("chunks", "shape"), EMPTY),
    **dict.fromkeys(("only", "names", "steps.stop", "steps_many.stop"), TEXTS),
    "texts": (*TEXTS, "ragged"),
    "model": ("None", "a model"),
    "source": NONE,
    "eos": (*EMPTY, "a generator", "a range", "a set"),
    "bos": COUNT,
    "weights": ("None", "a model", "{}"),
    "check_part.weights": ("None", "{}", "a dict"),
    "config": CONFIG_OR_NONE,
    "parameters": ("Parameters",),
    "logits_from": ("0", "-1"),
    "layer_norm_epsilon": ("0",),
    "end_of_text": NONE + TRUTH,
    "name": (*TEXT, "a surrogate"),
    "text": TEXT,
    **dict.fromkeys(("trace.text", "attend.text"), (*TEXT, "a range")),
    "open_tokenizer": FUNCTIONS,
    "generate_many.prompts": ("['a']", "['\\0']", "texts", "ragged", "three axes"),
    "steps_many.prompts": ("ragged", "three axes"),
    "generate.prompt": (*TEXT, "a range"),
    "stop": (*TEXTS, "None", "'no'", "a zero byte"),
    "Tokenizer.decode.token_ids": (*EMPTY, "''", "a generator", "a range", "a set"),
    "token_id": COUNT[1:],
    "Tokenizer.has_text.token_id": ("0", "-1", *NUMBER),
    "skip": (*EMPTY, "{}", "[-1]", "[2**70]", "a range", "a set"),
    "check.theirs": ("a model",),
    "check.targets": NONE,
    "check.gradients": (),  # logits have none
    "assert_matches.theirs": ("a model",),
    "theirs": ("a range",),
    "check_part.theirs": ("a type",),
    "attention_mask": ("None", "[True]", "booleans", "a range"),
    "x": ("None", "[1.5]", "[1.0, 2]", "[-1]", "a range", "floats", "three axes"),
    "folder": ("'no'", "a path"),
    "inspect.model": NONE,
    "load.model": NONE,
    "forward.config": ("a Config",),
}
# Of these what is raised may be the user's own error.
CALLABLE = {"record", "progress", "theirs", "open_tokenizer"}


@pytest.mark.parametrize("call", CALLS)
def test_wrong_arguments_are_one_line(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Try every wrong value for every argument; plain runs try a third, a different one for each argument."""
    step = examples(3, 1)
    for module in (oracle, parts):
        monkeypatch.setattr(module, "compare", lambda *_, **__: Report([], Diagnosis([], [], []), "float64"))
    monkeypatch.chdir(tmp_path)
    source = store(tmp_path / "source", small(n_embd=3, n_layer=1))
    function, right = CALLS[call]
    for place, argument in enumerate(right):
        taken = TAKEN.get(f"{call}.{argument}", TAKEN.get(argument, ()))
        for number, (label, make) in enumerate([*WRONG.items()][place % step :: step]):
            given = {key: source if value is SOURCE else value for key, value in right.items()} | {argument: make()}
            given = {key: tmp_path / f"{argument}{number}" if value is PLACE else value for key, value in given.items()}
            found = outcome(function, given)
            if found == "taken":
                assert label in taken, f"{call}({argument}={label}) is taken"
            elif found != "refused":  # the user's function may raise what it will
                users = argument in CALLABLE and callable(given[argument])
                assert users, f"{call}({argument}={label}): {found}"


def outcome(function: Callable[..., Any], given: Mapping[str, Any]) -> str:
    """Return a call's outcome: taken, refused in one line, or the internal error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            function(**given)
    except NpgptError as error:
        return "refused" if "\n" not in str(error) else f"several lines: {error}"
    except AssertionError:  # of npgpt.testing, which is an answer
        return "taken"
    except OSError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


# not: what a mask hides taken as numbers
@pytest.mark.parametrize("kind", ["bool", "complex128", "object", "M8[D]", "U1", "masked"])
def test_logits_that_are_none(kind: str) -> None:
    logits: Any = np.ma.ones((2, 40)) if kind == "masked" else np.zeros((2, 40)).astype(int).astype(kind)
    for theirs in (logits, {"logits": logits}):
        with pytest.raises(NpgptError, match=r"must be numbers|not an array of numbers|a masked array has numbers"):
            npgpt.check(theirs, IDS, BARE)


def test_a_message_names_argument_and_value() -> None:
    for call, message in (
        (lambda: npgpt.convert("austen", "x", overwrite="no"), "overwrite must be True or False, not 'no'"),  # type: ignore[arg-type]
        (lambda: npgpt.load(3), "model must be a path: a text or a pathlib.Path, not 3"),  # type: ignore[arg-type]
        (lambda: npgpt.load("a\0b"), r"model must be a path: a text or a pathlib.Path, not 'a\x00b'"),
        (lambda: BARE([1, True]), "token ids must be integers (of 64 bits at most), not bool"),
        (lambda: BARE(np.ma.masked_array([1, 2])), "not a masked array: fill it or select a part of it"),
        (lambda: AUSTEN.generate("a", ignore_eos=1), "ignore_eos must be True or False, not 1"),  # type: ignore[arg-type]
        (lambda: AUSTEN.generate("a", temperature="hot"), "temperature must be a number, not 'hot'"),
        (lambda: npgpt.forward(3, CONFIG, IDS), "parameters must be npgpt.Parameters, not 3"),  # type: ignore[arg-type]
    ):
        with pytest.raises(NpgptError) as error:
            call()
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("config", "parameters", "message"),
    [
        (
            small(n_embd=6),
            PARAMETERS,
            r"m does not fit its configuration: wte.weight is \[40, 21\] and must be \[40, 6\]",
        ),
        (small(tie_word_embeddings=False), PARAMETERS, "lm_head.weight is missing"),
        (CONFIG, PARAMETERS._replace(h=PARAMETERS.h[:1]), "it has 1 blocks and n_layer is 2"),
        (CONFIG, npgpt.Parameters(*range(5)), "parameters that are not arrays"),
        (CONFIG, PARAMETERS._replace(ln_f="ab"), "parameters that are not arrays"),  # type: ignore[arg-type]
        (
            CONFIG,
            PARAMETERS._replace(ln_f=random_parameters(CONFIG, dtype="float32").ln_f),
            "all float32 or all float64",
        ),
    ],
)
def test_parameters_that_do_not_fit(config: npgpt.Config, parameters: npgpt.Parameters, message: str) -> None:
    with pytest.raises(NpgptError, match=message):
        npgpt.LanguageModel("m", config, parameters)
