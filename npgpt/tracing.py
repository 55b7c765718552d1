"""Trace a run: its intermediates by name, in memory or in files, for comparing another implementation."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import __version__
from .checkpoints import configs, llmc, raw, safetensors
from .checkpoints.atomic import new_folder, writing
from .checkpoints.inspect import sha256
from .errors import NpgptError, checked, counted, numbers, whole_number
from .gradients import cross_entropy, loss_and_gradients, target_rows
from .language_model import LanguageModel, opened
from .parameters import Array, to_arrays

NO_TARGET = -100  # after the last token
MEANINGS = {
    "loss": "the mean cross-entropy of the next token, in nats a token; the last token has none",
    "gradients": "d.NAME is the derivative of the loss with respect to the stage or parameter NAME",
}


@checked
def trace(
    text: str | ArrayLike,
    model: LanguageModel | str | os.PathLike[str] | None = None,
    *,
    only: Sequence[str] = (),
    loss: bool = False,
    gradients: bool = False,
    special: bool = False,
) -> dict[str, Array]:
    """Return the intermediates of a text, or of ids [T], by name in the order of computation, with B = 1 in front.

    model: a model, or its name or path; None is the embedded one. only: shell patterns such as logits or h.0.*; without
    any, all are returned. loss: add "loss" [], the mean cross-entropy of the next tokens. gradients: add its derivative
    by every stage and parameter under "d." and the name: "d.wte" [1, T, C] is the stage's, "d.wte.weight" [V, C] the
    parameter's. special: encode <|endoftext|> and the like as special tokens. A classifier's body has no logits, loss
    or gradients. Raises NpgptError for a pattern that matches no name, for a text or ids that do not fit the model, and
    for a single token if a loss is asked for.
    """
    model = opened(model)
    token_ids, only = model.text_ids(text, special=special), tuple(only)
    if loss or gradients:
        check_targets(model, token_ids)
    found: dict[str, Array] = {}
    names: list[str] = []

    def record(name: str, array: Array) -> None:
        if name == "logits" and model.no_logits:  # products with wte, which is not this model's head
            return
        names.append(name)
        if not only or any(fnmatchcase(name, pattern) for pattern in only):
            found[name] = array

    logits = model(token_ids, record=record)
    if loss:
        targets = target_rows(model.config, np.array([token_ids]), None, NO_TARGET)
        record("loss", np.array(cross_entropy(logits, targets, NO_TARGET), logits.dtype))
    if gradients:
        _, derivatives = loss_and_gradients(model.parameters, model.config, token_ids, record=record)
        for name, array in to_arrays(derivatives).items():
            record(f"d.{name}", array)
    for pattern in only:
        if model.no_logits and fnmatchcase("logits", pattern) and not found:
            raise NpgptError(f"{model.name} gives no logits: {model.no_logits}")
        if not any(fnmatchcase(name, pattern) for name in names):
            known = ", ".join(name for name in names if re.match(r"(?!d\.|h\.[1-9])", name))
            known += "" if loss else "; loss needs --loss"
            known += "; d.NAME of each and of each parameter" if gradients else "; d.NAME needs --gradients"
            raise NpgptError(f"no intermediate is called {pattern!r:.80}; for the first block they are {known}")
    return found


def check_targets(model: LanguageModel, token_ids: Sequence[int]) -> None:
    """Raise NpgptError for a model that gives no logits, and for a text without a next token."""
    if model.no_logits:
        raise NpgptError(f"{model.name} gives no logits, and so no loss and no gradients: {model.no_logits}")
    if len(token_ids) < 2:
        raise NpgptError("the text has one token, and none after it to predict: a loss needs two or more")


def metadata(
    model: LanguageModel, token_ids: Sequence[int], text: str | None, names: Collection[str] = ()
) -> dict[str, Any]:
    """Return the origin of the numbers: npgpt's version, the model, the sha256 of its weights, the text and ids.

    With the names of the stages, it also says what a loss and gradients among them are.
    """
    held = {"loss": "loss" in names, "gradients": any(name.startswith("d.") for name in names)}
    return {
        "npgpt": __version__,
        "model": model.name,
        "weights": {path.name: sha256(path) for path in model.files},
        "config": configs.to_dict(model.config),
        "dtype": str(model.parameters.wte.weight.dtype),
        "text": text,
        "token_ids": list(token_ids),
        **{key: meaning for key, meaning in MEANINGS.items() if held[key]},
    }


def write(path: Path, stages: Mapping[str, Array], about: Mapping[str, Any], form: str | None = None) -> None:
    """Write stages, ids and metadata whole or not at all: to a file by its suffix, or to a folder in a form of FOLDERS.

    Raises NpgptError for an unknown suffix and for the file of the model's own weights, OSError if it cannot be
    written.
    """
    if path.is_file() and sha256(path) in about["weights"].values():
        raise NpgptError(f"{path} holds the model's own weights: write the intermediates to another file")
    writer = FOLDERS[form] if form else FILES[suffix(path)]
    writer(path, {"token_ids": np.array([about["token_ids"]], np.int64), **stages}, about)


def write_llmc(
    folder: Path, model: LanguageModel, token_ids: Sequence[int], batch: int, length: int
) -> tuple[float, str]:
    """Write what llm.c's test_gpt2.c reads, in float32, to a new folder, whole or not at all.

    gpt2_124M.bin holds the parameters, gpt2_124M_debug_state.bin a run of the first batch × length ids, each with the
    next one as its target, gpt2_tokenizer.bin the vocabulary. Returns the loss, and why there is no tokenizer's file,
    which may be empty. Raises NpgptError for a model that llm.c does not have, and for too few ids; OSError if the
    folder cannot be written.
    """
    config, (B, T) = model.config, (whole_number("--batch", batch), whole_number("--length", length))
    llmc.check_config(config)
    if model.parameters.wte.weight.dtype != np.float32:
        raise NpgptError(f"llm.c's files hold float32, and {model.name} is {model.parameters.wte.weight.dtype}")
    if config.n_positions < T:
        raise NpgptError(f"--length {T} is longer than the context of {config.n_positions}: give at most that")
    largest = B * T * max(llmc.padded_size(config.vocab_size), config.n_head * T)  # logits, or attention weights
    if largest >= 2**31:
        raise NpgptError(
            f"--batch {B} × --length {T} make an array of {largest:,} numbers, and llm.c counts them as int, up to "
            "2³¹ − 1: give a smaller --batch"
        )
    ids = numbers("token ids", token_ids)
    if ids.size < B * T + 1:
        raise NpgptError(
            f"the text has {counted(ids.size, 'token')}, and --batch {B} × --length {T} takes {B * T + 1}, the last "
            "one as a target: give a longer text, or a smaller --batch or --length"
        )
    config.check_ids(ids)
    check_targets(model, ids.tolist())
    rows, targets = ids[: B * T].reshape(B, T), ids[1 : B * T + 1].reshape(B, T)
    why_no_tokenizer = ""
    with new_folder(folder) as unfinished:
        llmc.write_model(unfinished / "gpt2_124M.bin", config, model.parameters)
        try:
            known = model.tokenizer
            llmc.write_tokenizer(unfinished / "gpt2_tokenizer.bin", known.pieces, known.end_of_text, known.source)
        except NpgptError as error:
            why_no_tokenizer = str(error)
        logits = model(rows)
        loss, gradients = loss_and_gradients(model.parameters, config, rows, targets)
        llmc.write_state(unfinished / "gpt2_124M_debug_state.bin", rows, targets, logits, loss, gradients)
    return loss, why_no_tokenizer


def suffix(path: Path) -> str:
    """Return a path's suffix. Raises NpgptError unless it is .npz or .safetensors."""
    if path.suffix not in FILES:
        raise NpgptError(f"{path} must end in .npz or .safetensors, or give --to raw {path} for a folder of numbers")
    return path.suffix


def _write_npz(path: Path, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> None:
    """Write .npz with the metadata as JSON in UTF-8 bytes, because not every reader of .npz supports text."""
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    with writing(path) as file:
        np.savez(file, metadata=text, **arrays)  # type: ignore[arg-type]  # to NumPy 2.0 allow_pickle is an array


def _write_safetensors(path: Path, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> None:
    """Write safetensors; a value of the metadata that is not a text is stored as JSON."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    safetensors.write(path, arrays, texts)


Writer: TypeAlias = Callable[[Path, Mapping[str, NDArray[Any]], Mapping[str, Any]], None]
FILES: dict[str, Writer] = {".npz": _write_npz, ".safetensors": _write_safetensors}
FOLDERS: dict[str, Writer] = {"raw": raw.write}
