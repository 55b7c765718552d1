"""GPT-2 in pure NumPy: read it, run it, check others against it.

    >>> import npgpt
    >>> model = npgpt.load("gpt2")  # without a name: the embedded model
    >>> "".join(model.generate("It is a truth", max_tokens=40))
    >>> model([464, 3290])  # logits [1, 2, 50257]

Run
    load            a LanguageModel, by name or path, in any format
    LanguageModel   call it for logits; generate, generate_many, tokenizer
    Sampling        temperature, top_k, top_p, min_p, repetition_penalty
    Tokenizer       text to ids and back
    score           texts' log-probabilities and perplexity: yields Scores
    Score           what score yields for a text

Check
    check           another implementation's logits or stages, compared
    check_part      one function or layer of it: gelu, layer_norm, attention
    check_greedy    its greedy tokens
    (npgpt.testing.assert_matches does the same in a test suite)

Look inside
    attend          attention weights of a text, as numbers and as a page
    explain         model.py beside the numbers that each line computed
    trace           every intermediate array of a run, by name
    inspect         a checkpoint's configuration, tensors and files
    forward         the forward pass as a function: parameters, config, ids
    loss            mean cross-entropy of the next tokens
    loss_and_gradients  the same, and its gradient by every parameter
    KVCache         keys and values of tokens already seen
    Parameters      every tensor, by the checkpoint's names
    Config          the sizes and options of a model
    PUBLISHED       the Config of each published model, by name

Files
    save            write a model to a folder
    convert         write any checkpoint as safetensors
    NpgptError      the one exception for bad input
    tune_process    threads and memory settings, before NumPy is imported

The formulas are in npgpt/model.py. `npgpt --help` lists the commands.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cache import KVCache as KVCache
    from .checkpoints.inspect import inspect as inspect
    from .checkpoints.write import convert as convert
    from .checkpoints.write import save as save
    from .config import PUBLISHED as PUBLISHED
    from .config import Config as Config
    from .errors import NpgptError as NpgptError
    from .gradients import loss as loss
    from .gradients import loss_and_gradients as loss_and_gradients
    from .language_model import LanguageModel as LanguageModel
    from .language_model import forward as forward
    from .language_model import load as load
    from .oracle.check import check as check
    from .oracle.greedy import check_greedy as check_greedy
    from .oracle.parts import check_part as check_part
    from .parameters import Parameters as Parameters
    from .pictures.attention import attend as attend
    from .pictures.explain import explain as explain
    from .process import tune_process as tune_process
    from .scoring.likelihood import Score as Score
    from .scoring.scoring import score as score
    from .text.sampling import Sampling as Sampling
    from .text.tokenizer import Tokenizer as Tokenizer
    from .tracing import trace as trace

__version__ = "0.1.0"

# Names are imported when first used, so that the command line can set the number of threads before NumPy reads it, and
# `npgpt --help` does not wait for NumPy.
_HOME = {
    "KVCache": "cache",
    "PUBLISHED": "config",
    "Config": "config",
    "NpgptError": "errors",
    "loss": "gradients",
    "loss_and_gradients": "gradients",
    "LanguageModel": "language_model",
    "convert": "checkpoints.write",
    "inspect": "checkpoints.inspect",
    "load": "language_model",
    "save": "checkpoints.write",
    "forward": "language_model",
    "check": "oracle.check",
    "check_greedy": "oracle.greedy",
    "check_part": "oracle.parts",
    "Parameters": "parameters",
    "attend": "pictures.attention",
    "explain": "pictures.explain",
    "tune_process": "process",
    "Sampling": "text.sampling",
    "Score": "scoring.likelihood",
    "score": "scoring.scoring",
    "Tokenizer": "text.tokenizer",
    "trace": "tracing",
}
__all__ = sorted(_HOME)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'npgpt' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
