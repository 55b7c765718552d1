"""npgpt convert: write any checkpoint as a folder that npgpt and transformers load."""

from __future__ import annotations

import argparse
import os
import shlex
import warnings
from typing import TYPE_CHECKING

from .options import add_common, importing, note, show, unwinding
from .progress import bar

if TYPE_CHECKING:
    from ..checkpoints.open import Checkpoint


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Read a GPT-2 checkpoint in any format (safetensors, torch.save, TensorFlow, llm.c, GGUF) and write a "
        "folder with model.safetensors, config.json and the vocabulary, for npgpt and transformers."
    )
    parser.epilog = "example: npgpt convert out/ckpt.pt weights/mine"
    argument = parser.add_argument
    argument("source", help="name or path of a model")
    argument("folder", metavar="dest", help="folder to write, such as weights/mine")
    argument(
        "--name-scheme",
        metavar="S",
        help="whose tensor names the checkpoint has, if npgpt guesses wrong: huggingface, openai, nanogpt, mingpt, "
        "llms-from-scratch, llm.c, llama.cpp",
    )
    add_common(parser, "--n-head", "--activation")
    argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        metavar="D",
        help="to write: float32 (default), float16 or bfloat16",
    )
    argument("--overwrite", action="store_true", help="replace a model that was converted before")


def run(options: argparse.Namespace) -> int:
    """Convert; see the help."""
    with importing():
        from ..checkpoints.write import convert

    with warnings.catch_warnings(record=True) as left, unwinding(), bar("MB", 1e6) as progress:
        warnings.simplefilter("always", UserWarning)
        checkpoint = convert(
            options.source,
            options.folder,
            dtype=options.dtype,
            n_head=options.n_head,
            activation=options.activation,
            name_scheme=options.name_scheme,
            overwrite=options.overwrite,
            progress=progress,
        )
    for warning in left:
        note(str(warning.message))
    show(report(checkpoint, options.folder, options.dtype))
    return 0


def report(checkpoint: Checkpoint, folder: str, dtype: str) -> list[str]:
    """Return the lines to print: what was read, what was written, what to run next."""
    config, stored = checkpoint.config, checkpoint.dtypes()
    exact = not checkpoint.updates and (stored <= {dtype} or (dtype == "float32" and "float64" not in stored))
    rounded = "" if exact else ", rounded"
    files = ", ".join(sorted(os.listdir(os.path.expanduser(folder))))
    activation = "erf GELU" if config.activation_function == "gelu" else "tanh GELU"
    activation += " (a guess, written down)" if checkpoint.guesses_gelu else ""
    head = "tied head" if config.tie_word_embeddings else "a head of its own"
    zeros = sum(not source.parts for source in checkpoint.sources.values())
    absent = f", {zeros} absent biases are zeros" if zeros else ""
    return [
        f"read     {checkpoint.base}: {checkpoint.description}, {', '.join(sorted(stored))}",
        f"model    {config.n_layer} blocks, {config.n_embd} = {config.n_head} heads × {config.head_width}, "
        f"{config.n_positions} positions, {config.vocab_size} ids, {activation}, {head}{absent}",
        *(f"note     {line}" for line in checkpoint.notes),
        f"written  {folder}: {files}; {len(checkpoint.sources)} tensors {dtype}{rounded}",
        *(f"not used {text}" for text in checkpoint.ends.notes),
        f"next     npgpt inspect {shlex.quote(folder)}",
    ]
