"""GPT-2's configuration: its sizes and options, and those of the published models."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from .errors import NpgptError, numbers, whole_number

if TYPE_CHECKING:  # the command line needs the published names without waiting for NumPy
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu")  # the first two name the same formula
REQUIRED = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
LARGEST_SIZE = 2**31 - 1
MOST_LAYERS = 10_000  # the schema grows with it, so a damaged number must not make it huge


@dataclass(frozen=True, kw_only=True)
class Config:
    """The sizes and options of a GPT-2 under Hugging Face's names, validated on creation.

    n_layer is the number of blocks, one above the other. n_head is the number of heads side by side in each block; it
    must divide n_embd. layer_norm_epsilon is added to a variance.

    Raises NpgptError for a wrong type or range, and if n_embd is not divisible by n_head.
    """

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int | None = None  # width inside the MLP; None is 4 * n_embd
    activation_function: str = "gelu_new"  # the tanh form; "gelu" is the exact erf form
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True  # the output head is wte
    scale_attn_weights: bool = True  # scores / √head_width
    scale_attn_by_inverse_layer_idx: bool = False  # scores / (layer + 1) as well

    def __post_init__(self) -> None:
        for key in (*REQUIRED, *(() if self.n_inner is None else ("n_inner",))):
            high = MOST_LAYERS if key == "n_layer" else LARGEST_SIZE
            object.__setattr__(self, key, whole_number(key, getattr(self, key), high=high))
        for key in ("tie_word_embeddings", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"):
            if not isinstance(getattr(self, key), bool):
                raise NpgptError(f"{key} must be true or false, not {getattr(self, key)!r}")
        if not isinstance(self.activation_function, str) or self.activation_function not in ACTIVATIONS:
            raise NpgptError(
                f"activation_function {self.activation_function!r} is not one that GPT-2 uses: "
                "choose gelu_new (tanh form, GPT-2's own), gelu_pytorch_tanh (the same) or gelu (erf form)"
            )
        epsilon = self.layer_norm_epsilon
        if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)) or not 0 <= epsilon < 1:
            raise NpgptError(f"layer_norm_epsilon must be at least 0 and below 1, not {epsilon!r}")
        object.__setattr__(self, "layer_norm_epsilon", float(epsilon))  # NumPy scalars promote float32 to float64
        if self.n_embd % self.n_head:
            raise NpgptError(_why_heads_do_not_divide(self))

    @property
    def head_width(self) -> int:
        """D, the width of one head: n_embd / n_head."""
        return self.n_embd // self.n_head

    @property
    def inner_width(self) -> int:
        """F, the inner width of the MLP: n_inner, or 4 * n_embd if that is None."""
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd

    def attention_scale(self, layer: int) -> float:
        """Return the factor of the scores in block `layer` (from 0): 1 / √head_width unless options change it."""
        scale = 1 / math.sqrt(self.head_width) if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def published_name(self) -> str | None:
        """Return the name of the published model with these weight shapes, on which n_head has no effect, or None."""
        shape = attrgetter("n_layer", "n_embd", "n_positions", "inner_width")
        alike = (name for name, size in PUBLISHED.items() if shape(size) == shape(self))
        return next(alike, None) if self.vocab_size in GPT2_VOCAB_SIZES else None

    def token_rows(self, token_ids: ArrayLike, past: int = 0) -> NDArray[np.integer[Any]]:
        """Return token ids [T] or [B, T] as rows [B, T], checked to fit this model.

        past: number of positions already in a cache. Raises NpgptError for another type or rank, no ids, ids below 0 or
        not below vocab_size (NumPy would take −1 for the last row), and more tokens than n_positions has room for.
        """
        ids, past = numbers("token ids", token_ids), whole_number("past", past, low=0)
        if ids.size == 0:
            raise NpgptError("there are no token ids: a prompt needs at least one (<|endoftext|> for an empty text)")
        if ids.ndim not in (1, 2):
            raise NpgptError(f"token ids must have the shape [T] or [B, T], not {list(ids.shape)}")
        self.check_ids(ids)
        T, cached = ids.shape[-1], f" after {past} in the cache" if past else ""
        if past + T > self.n_positions:
            raise NpgptError(f"{T} tokens{cached} do not fit into the context of {self.n_positions} (n_positions)")
        return ids.reshape(-1, T)

    def check_ids(self, ids: NDArray[np.integer[Any]]) -> None:
        """Raise NpgptError if an id is negative or not below vocab_size."""
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            where = tuple(int(axis[0]) for axis in ((ids < 0) | (ids >= self.vocab_size)).nonzero())
            raise NpgptError(
                f"token id {ids[where]} at position {list(where)} is out of range: "
                f"vocab_size is {self.vocab_size}, so ids run from 0 to {self.vocab_size - 1}"
            )

    def first_of(self, T: int, logits_from: int) -> int:
        """Return logits_from, which may be negative, as an index from 0 into T tokens.

        Raises NpgptError if there is no such token; a slice would silently return no logits, or all of them.
        """
        return whole_number("logits_from", logits_from, low=-T, high=T - 1) % T


END_OF_TEXT = "<|endoftext|>"  # the special token between two documents of GPT-2's training text
GPT2_VOCAB_SIZES = (50257, 50304)  # OpenAI's 50000 merges + 256 bytes + <|endoftext|>; nanoGPT pads to a multiple of 64


# Every head is 64 wide. Radford et al. 2019, table 2; its parameter counts are too low and were corrected later.
_published = functools.partial(Config, vocab_size=50257, n_positions=1024)
PUBLISHED = {
    "gpt2": _published(n_layer=12, n_head=12, n_embd=768),  # 124M
    "gpt2-medium": _published(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": _published(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": _published(n_layer=48, n_head=25, n_embd=1600),  # 1558M
    "distilgpt2": _published(n_layer=6, n_head=12, n_embd=768),  # 82M, distilled by Hugging Face
}


def _why_heads_do_not_divide(config: Config) -> str:
    """Return a message that names the division, its likely cause and the way out."""
    n_embd, n_head = config.n_embd, config.n_head
    quotient = f"{n_embd} / {n_head} = {n_embd / n_head:.2f}"
    message = f"n_embd = {n_embd} is not divisible by n_head = {n_head}: {quotient} is not a whole number"
    for name, size in PUBLISHED.items():
        if size.n_embd == n_embd and size.n_layer == n_head:
            return (
                f"{message}; {n_head} is the n_layer of {name} (its number of blocks), "
                f"and its n_head is {size.n_head}: {n_embd} = {size.n_head} × {size.head_width}"
            )
    if n_embd % config.n_layer == 0:
        return (
            f"{message}; n_layer = {config.n_layer} would divide it "
            f"({n_embd} = {config.n_layer} × {n_embd // config.n_layer}): are n_layer and n_head swapped?"
        )
    small = [d for d in range(1, math.isqrt(n_embd) + 1) if n_embd % d == 0]
    nearest = min(small + [n_embd // d for d in small], key=lambda d: (abs(d - n_head), d))
    return f"{message}; the nearest n_head that divides it is {nearest}: {n_embd} = {nearest} × {n_embd // nearest}"
