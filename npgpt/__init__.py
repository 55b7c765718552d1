"""GPT-2 in pure NumPy: to read, to run, and to check other implementations against.

    model = npgpt.load("gpt2")
    logits = model([464, 3290])
    for piece in model.generate("It is a truth", max_tokens=40, temperature=0): print(piece, end="")

Names are imported when they are first used, so that the command line can set the number of threads before NumPy
reads it, and `npgpt --help` does not wait for NumPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cache import KVCache as KVCache
    from .checkpoints.write import convert as convert
    from .checkpoints.write import save as save
    from .config import PUBLISHED as PUBLISHED
    from .config import Config as Config
    from .errors import NpgptError as NpgptError
    from .language_model import LanguageModel as LanguageModel
    from .language_model import forward as forward
    from .language_model import load as load
    from .oracle.check import check as check
    from .oracle.check import check_greedy as check_greedy
    from .oracle.parts import check_part as check_part
    from .parameters import Parameters as Parameters
    from .pictures.explain import explain as explain
    from .process import tune_process as tune_process
    from .scoring.likelihood import Score as Score
    from .scoring.scoring import score as score
    from .text.sampling import Sampling as Sampling
    from .text.tokenizer import Tokenizer as Tokenizer

__version__ = "0.1.0"

_HOME = {
    "KVCache": "cache",
    "PUBLISHED": "config",
    "Config": "config",
    "NpgptError": "errors",
    "LanguageModel": "language_model",
    "convert": "checkpoints.write",
    "load": "language_model",
    "save": "checkpoints.write",
    "forward": "language_model",
    "check": "oracle.check",
    "check_greedy": "oracle.check",
    "check_part": "oracle.parts",
    "Parameters": "parameters",
    "explain": "pictures.explain",
    "tune_process": "process",
    "Sampling": "text.sampling",
    "Score": "scoring.likelihood",
    "score": "scoring.scoring",
    "Tokenizer": "text.tokenizer",
}
__all__ = sorted(_HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'npgpt' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
