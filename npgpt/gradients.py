"""GPT-2's backward pass in NumPy, the twin of model.py: the gradient of the loss with respect to every parameter.

    loss → logits → output head → ln_f → n_layer × block, last block first → wte + wpe

Functions stand in the order of model.py and bear its names. x_backward takes dy, the gradient of the loss with respect
to what x returned, and what x read. It returns the gradients of x's inputs, which have their shapes. Four rules are
enough: a product's gradient is the product with the other factor transposed; what was broadcast is summed; what went
two ways receives the sum of both gradients; a rearrangement is undone. Rumelhart, Hinton & Williams 1986, "Learning
representations by back-propagating errors". Shapes are as in model.py.

There is no second forward pass: the intermediates are those that forward(…, record=…) hands out. For B × T tokens they
are 10 C + 2 F numbers a token in every block, and the logits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import kernels
from .erf import erf
from .errors import NpgptError, checked, numbers, whole_number
from .model import attention_weights, forward, merge_heads, softmax, split_heads
from .parameters import MLP, Array, Attention, Block, Embedding, Kept, LayerNorm, Linear, Parameters, recorder

if TYPE_CHECKING:
    from .config import Config
    from .parameters import Record, StageRecord

    Ids = NDArray[np.integer[Any]]
    Targets = ArrayLike | None
    QKV = tuple[Array, Array, Array]


@kernels.by_row
def log_sum_exp(x: Array) -> Array:
    """Return log Σ exp(x) over the last axis of x [..., n] → [..., 1]."""
    m = x.max(axis=-1, keepdims=True)
    y: Array = np.log(np.exp(x - m).sum(axis=-1, keepdims=True)) + m
    return y


def cross_entropy(logits: Array, targets: Ids, ignore_index: int) -> float:
    """Return the mean of −log softmax(logits)[target] over the targets that are not ignore_index.

    logits [B, T, V], targets [B, T]; the mean is taken in float64. −log softmax(z)[i] = log Σ exp(z − m) + m − z[i].
    """
    places = np.nonzero(targets != ignore_index)
    losses = log_sum_exp(logits)[places][:, 0] - logits[(*places, targets[places])]
    return float(losses.mean(dtype=np.float64))


def cross_entropy_backward(logits: Array, targets: Ids, ignore_index: int) -> Array:
    """Return (softmax(logits) − one_hot(target)) / n for each of the n targets that count, and 0 elsewhere: [B, T, V].

    ∂/∂z log Σ exp(z) is softmax(z); ∂/∂z of −z[target] is −1 at the target.
    """
    places = np.nonzero(targets != ignore_index)
    d_logits = softmax(logits)
    d_logits[targets == ignore_index] = 0
    d_logits[(*places, targets[places])] -= 1
    return np.divide(d_logits, len(places[0]), out=d_logits)  # in place, because logits are large


def softmax_backward(dy: Array, y: Array) -> Array:
    """Return y · (dy − Σ dy · y) over the last axis, where y = softmax(x): any shape.

    ∂y_i/∂x_j = y_i (δ_ij − y_j), so dx_j = Σ_i dy_i y_i (δ_ij − y_j) = y_j (dy_j − Σ_i dy_i y_i). Where a key is
    masked, y and so dx are 0.
    """
    dx: Array = y * (dy - (dy * y).sum(axis=-1, keepdims=True))
    return dx


@kernels.elementwise
def gelu_derivative(x: Array) -> Array:
    """Return d gelu(x) / dx, any shape.

    For ½ x (1 + tanh u) with u = √(2/π) (x + 0.044715 x³) it is ½ (1 + tanh u) + ½ x (1 − tanh² u) du/dx.
    """
    tanh = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
    du_dx = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    dy_dx: Array = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * du_dx
    return dy_dx


@kernels.elementwise
def gelu_erf_derivative(x: Array) -> Array:
    """Return d gelu_erf(x) / dx = Φ(x) + x φ(x), any shape: the normal distribution's function and density."""
    dy_dx: Array = 0.5 * (1 + erf(x / math.sqrt(2))) + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return dy_dx


DERIVATIVES = {"gelu_new": gelu_derivative, "gelu_pytorch_tanh": gelu_derivative, "gelu": gelu_erf_derivative}


def layer_norm_backward(dy: Array, x: Array, weight: Array, epsilon: float) -> tuple[Array, LayerNorm]:
    """Return dx [..., C] and the gradients of weight and bias [C].

    y = weight · n + bias with n = (x − mean) / σ, σ = √(variance + epsilon), and dn = weight · dy. x acts on n in three
    ways: itself, 1/σ; through the mean, −1/(C σ) on every channel; through the variance, −n_i n_j / (C σ). Together
    dx = (dn − mean(dn) − n · mean(dn · n)) / σ. weight and bias are shared by all tokens, so their gradients are sums.
    """
    centred = x - x.mean(axis=-1, keepdims=True)
    sigma = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + epsilon)
    n, dn = centred / sigma, weight * dy
    dx = (dn - dn.mean(axis=-1, keepdims=True) - n * (dn * n).mean(axis=-1, keepdims=True)) / sigma
    tokens = tuple(range(dy.ndim - 1))
    return dx, LayerNorm((dy * n).sum(axis=tokens), dy.sum(axis=tokens))


def linear_backward(dy: Array, x: Array, weight: Array) -> tuple[Array, Linear]:
    """Return dx = dy weightᵀ [..., in], and the gradients xᵀ dy [in, out] and Σ dy [out] of weight and bias."""
    tokens, d_tokens = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    # the sum over tokens is a product with ones, which BLAS computes in several threads
    return kernels.product(dy, weight.T), Linear(tokens.T @ d_tokens, np.ones(len(tokens), dy.dtype) @ d_tokens)


def split_heads_backward(dy: Array) -> Array:
    """Return dx [B, T, C] of dy [B, H, T, D]: splitting moves each number to one place, and merging moves it back."""
    return merge_heads(dy)


def merge_heads_backward(dy: Array, n_head: int) -> Array:
    """Return dx [B, H, T, D] of dy [B, T, C]."""
    return split_heads(dy, n_head)


def attention_weights_backward(dy: Array, v: Array) -> Array:
    """Return d_weights = dy vᵀ [B, H, T, T] of dy [B, H, T, D], because y = weights v."""
    return dy @ v.swapaxes(2, 3)


@kernels.tiled_backward
def attention_backward(dy: Array, q: Array, k: Array, v: Array, scale: float) -> QKV:
    """Return dq, dk and dv [B, H, T, D] of dy [B, H, T, D].

    y = weights v, so dv = weightsᵀ dy. scores = scale · q kᵀ, so dq = scale · d_scores k and dk = scale · d_scoresᵀ q.
    The weights are computed again from q and k, since they would be most of what is kept.
    """
    weights = attention_weights(q, k, scale)
    d_products = scale * softmax_backward(attention_weights_backward(dy, v), weights)
    return d_products @ k, d_products.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ dy


def block_backward(
    dy: Array, stages: dict[str, Array], p: Block, config: Config, layer: int, record: StageRecord
) -> tuple[Array, Block]:
    """Return dx [B, T, C] of block `layer` and the gradients of its parameters; stages are the forward pass's.

    A residual x + f(x) went two ways: dx is dy itself, and what comes back through f.
    """
    epsilon, derivative = config.layer_norm_epsilon, DERIVATIVES[config.activation_function]
    before = stages[f"h.{layer - 1}" if layer else "embedding"]
    s = {name.removeprefix(f"h.{layer}."): stage for name, stage in stages.items() if name.startswith(f"h.{layer}.")}
    d, mlp_c_proj = linear_backward(record("mlp.c_proj", dy), s["mlp.act"], p.mlp.c_proj.weight)
    d = record("mlp.act", d) * derivative(s["mlp.c_fc"])
    d, c_fc = linear_backward(record("mlp.c_fc", d), s["ln_2"], p.mlp.c_fc.weight)
    d, ln_2 = layer_norm_backward(record("ln_2", d), s["attn.residual"], p.ln_2.weight, epsilon)
    dx = record("attn.residual", dy + d)
    d, attn_c_proj = linear_backward(record("attn.c_proj", dx), merge_heads(s["attn.heads"]), p.attn.c_proj.weight)
    d = record("attn.heads", merge_heads_backward(d, config.n_head))
    q, k, v, scale = s["attn.q"], s["attn.k"], s["attn.v"], config.attention_scale(layer)
    record("attn.weights", lambda: attention_weights_backward(d, v))  # computed only if recorded
    record("attn.scores", lambda: softmax_backward(attention_weights_backward(d, v), attention_weights(q, k, scale)))
    dq, dk, dv = attention_backward(d, q, k, v, scale)
    record("attn.q", dq), record("attn.k", dk), record("attn.v", dv)
    d = record("attn.c_attn", np.concatenate([split_heads_backward(part) for part in (dq, dk, dv)], axis=-1))
    d, c_attn = linear_backward(d, s["ln_1"], p.attn.c_attn.weight)
    d, ln_1 = layer_norm_backward(record("ln_1", d), before, p.ln_1.weight, epsilon)
    return dx + d, Block(ln_1, Attention(c_attn, attn_c_proj), ln_2, MLP(c_fc, mlp_c_proj))


def embedding_backward(dy: Array, rows: Ids, weight: Array) -> Embedding:
    """Return the gradient of weight [V, C], whose `rows` [...] were taken: a row's is the sum over all its uses."""
    d_weight = np.zeros_like(weight)
    np.add.at(d_weight, rows, dy)  # d_weight[rows] += dy would keep one use of a row alone
    return Embedding(d_weight)


@checked
def loss(
    parameters: Parameters, config: Config, token_ids: ArrayLike, targets: Targets = None, ignore_index: int = -100
) -> float:
    """Return the mean cross-entropy, in nats a token, of the model's predictions.

    token_ids: [T] or [B, T]. targets: of the same shape, the id that follows each token, or ignore_index where nothing
    is to be predicted; without any, the next token. Raises NpgptError for ids or targets that do not fit, and where no
    target counts.
    """
    token_ids = config.token_rows(token_ids)
    targets = target_rows(config, token_ids, targets, ignore_index)
    return cross_entropy(forward(parameters, config, token_ids), targets, ignore_index)


@checked
def loss_and_gradients(
    parameters: Parameters,
    config: Config,
    token_ids: ArrayLike,
    targets: Targets = None,
    ignore_index: int = -100,
    record: Record | None = None,
) -> tuple[float, Parameters]:
    """Return the loss and its gradient with respect to every parameter, in the parameters' structure and dtype.

    The arguments are those of loss(). A tied head's gradient is in wte, beside the embedding's. record(name, array)
    gets a copy of the gradient of every stage under "d." and the stage's name ("d.h.0.attn.c_attn").
    """
    token_ids = config.token_rows(token_ids)
    targets = target_rows(config, token_ids, targets, ignore_index)
    stages = Kept()
    logits = forward(parameters, config, token_ids, record=stages)
    stage = recorder(record, "d.")
    d = stage("logits", cross_entropy_backward(logits, targets, ignore_index))
    d, head = linear_backward(d, stages["ln_f"], parameters.lm_head.weight.T)
    last = stages[f"h.{config.n_layer - 1}"]
    d, ln_f = layer_norm_backward(stage("ln_f", d), last, parameters.ln_f.weight, config.layer_norm_epsilon)
    blocks: list[Block] = []
    for layer in reversed(range(config.n_layer)):
        d = stage(f"h.{layer}", d)
        d, block = block_backward(d, stages, parameters.h[layer], config, layer, recorder(record, f"d.h.{layer}."))
        blocks.insert(0, block)
    d = stage("wte", stage("embedding", d))
    wte = embedding_backward(d, token_ids, parameters.wte.weight)
    d = stage("wpe", d.sum(axis=0))  # every row of the batch read the same positions
    wpe = embedding_backward(d, np.arange(len(d)), parameters.wpe.weight)
    lm_head = Embedding(head.weight.T)
    if parameters.lm_head is parameters.wte:
        lm_head = wte = Embedding(wte.weight + lm_head.weight)
    return cross_entropy(logits, targets, ignore_index), Parameters(wte, wpe, tuple(blocks), ln_f, lm_head)


def target_rows(config: Config, token_ids: Ids, targets: Targets, ignore_index: int) -> Ids:
    """Return targets [B, T]: as given, or the next token's id, and ignore_index after the last one."""
    ignore_index = whole_number("ignore_index", ignore_index, low=-(2**31))
    if targets is None:
        rows = np.pad(token_ids[:, 1:], ((0, 0), (0, 1)), constant_values=ignore_index)
    else:
        rows = np.atleast_2d(numbers("targets", targets))
        if rows.shape != token_ids.shape:
            raise NpgptError(f"targets are {list(rows.shape)} and must be as token_ids are, {list(token_ids.shape)}")
    counting = rows[rows != ignore_index]
    config.check_ids(counting)
    if not counting.size:
        raise NpgptError(f"no target counts: all are ignore_index = {ignore_index}, or there is no next token")
    return rows
