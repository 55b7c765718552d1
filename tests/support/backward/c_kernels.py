"""Kernels in the manner of llm.c's train_gpt2.c: on flat buffers, results in the first arguments, gradients +=.

B rows, T positions, N = B T, C channels, NH heads, hs head width, V ids. A weight is [OC, C], and flat, too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npgpt.parameters import Array

IGNORED = -100
GELU_SCALING_FACTOR = math.sqrt(2.0 / math.pi)
Ids = NDArray[Any]


def encoder_forward(out: Array, inp: Ids, wte: Array, wpe: Array, B: int, T: int, C: int) -> None:
    for b in range(B):
        for t in range(T):
            bt, ix = b * T + t, inp[b * T + t]
            out[bt * C : bt * C + C] = wte[ix * C : ix * C + C] + wpe[t * C : t * C + C]


def encoder_backward(dwte: Array, dwpe: Array, dout: Array, inp: Ids, B: int, T: int, C: int) -> None:
    for b in range(B):
        for t in range(T):
            bt, ix = b * T + t, inp[b * T + t]
            dout_bt = dout[bt * C : bt * C + C]
            dwte[ix * C : ix * C + C] += dout_bt
            dwpe[t * C : t * C + C] += dout_bt


def layernorm_forward(
    out: Array, mean: Array, rstd: Array, inp: Array, weight: Array, bias: Array, eps: float, N: int, C: int
) -> None:
    for bt in range(N):
        x = inp[bt * C : bt * C + C]
        m = x.sum() / C
        xshift = x - m
        v = (xshift * xshift).sum() / C
        s = 1.0 / np.sqrt(v + eps)
        out[bt * C : bt * C + C] = s * xshift * weight + bias
        mean[bt] = m
        rstd[bt] = s


def layernorm_backward(
    dinp: Array, dweight: Array, dbias: Array, dout: Array, inp: Array, weight: Array, mean: Array, rstd: Array, C: int
) -> None:
    for bt in range(len(mean)):
        dout_bt, inp_bt = dout[bt * C : bt * C + C], inp[bt * C : bt * C + C]
        norm_bt = (inp_bt - mean[bt]) * rstd[bt]
        dnorm = weight * dout_bt
        dnorm_mean = dnorm.sum() / C
        dnorm_norm_mean = (dnorm * norm_bt).sum() / C
        dbias += dout_bt
        dweight += norm_bt * dout_bt
        dval = dnorm
        dval = dval - dnorm_mean
        dval = dval - norm_bt * dnorm_norm_mean
        dval = dval * rstd[bt]
        dinp[bt * C : bt * C + C] += dval


def matmul_forward(out: Array, inp: Array, weight: Array, bias: Array | None, N: int, C: int, OC: int) -> None:
    w = weight.reshape(OC, C)
    for bt in range(N):
        out_bt = w @ inp[bt * C : bt * C + C]
        out[bt * OC : bt * OC + OC] = out_bt if bias is None else out_bt + bias


def matmul_backward(
    dinp: Array, dweight: Array, dbias: Array | None, dout: Array, inp: Array, weight: Array, N: int, C: int, OC: int
) -> None:
    w, dw = weight.reshape(OC, C), dweight.reshape(OC, C)
    for bt in range(N):
        dinp[bt * C : bt * C + C] += dout[bt * OC : bt * OC + OC] @ w
    for bt in range(N):
        dout_bt, inp_bt = dout[bt * OC : bt * OC + OC], inp[bt * C : bt * C + C]
        if dbias is not None:
            dbias += dout_bt
        dw += dout_bt[:, None] * inp_bt


def attention_forward(
    out: Array, preatt: Array, att: Array, qkv: Array, scale: float, B: int, T: int, C: int, NH: int
) -> None:
    hs = C // NH
    q, k, v = (qkv.reshape(B, T, 3, NH, hs)[:, :, part] for part in range(3))
    y = out.reshape(B, T, NH, hs)
    pre, a = preatt.reshape(B, NH, T, T), att.reshape(B, NH, T, T)
    for b in range(B):
        for t in range(T):
            for h in range(NH):
                pre[b, h, t, : t + 1] = k[b, : t + 1, h] @ q[b, t, h] * scale
                pre[b, h, t, t + 1 :] = -np.inf
                expv = np.exp(pre[b, h, t] - pre[b, h, t].max())
                a[b, h, t] = expv / expv.sum()
                y[b, t, h] = a[b, h, t, : t + 1] @ v[b, : t + 1, h]


def attention_backward(
    dqkv: Array, dpreatt: Array, datt: Array, dout: Array, qkv: Array, att: Array, scale: float, B: int, T: int, NH: int
) -> None:
    hs = len(qkv) // (B * T * 3 * NH)
    q, k, v = (qkv.reshape(B, T, 3, NH, hs)[:, :, part] for part in range(3))
    dq, dk, dv = (dqkv.reshape(B, T, 3, NH, hs)[:, :, part] for part in range(3))
    dy = dout.reshape(B, T, NH, hs)
    a, da, dpre = (x.reshape(B, NH, T, T) for x in (att, datt, dpreatt))
    for b in range(B):
        for t in range(T):
            for h in range(NH):
                att_bth, datt_bth, dpreatt_bth = (x[b, h, t, : t + 1] for x in (a, da, dpre))
                # through the weighted sum of the values
                datt_bth += v[b, : t + 1, h] @ dy[b, t, h]
                dv[b, : t + 1, h] += att_bth[:, None] * dy[b, t, h]
                # through the softmax
                for t2 in range(t + 1):
                    local_derivative = -att_bth[t2] * att_bth
                    local_derivative[t2] += att_bth[t2]
                    dpreatt_bth += local_derivative * datt_bth[t2]
                # through the product of query and keys
                dq[b, t, h] += dpreatt_bth @ k[b, : t + 1, h] * scale
                dk[b, : t + 1, h] += dpreatt_bth[:, None] * q[b, t, h] * scale


def gelu_forward(out: Array, inp: Array) -> None:
    cube = 0.044715 * inp * inp * inp
    out[:] = 0.5 * inp * (1.0 + np.tanh(GELU_SCALING_FACTOR * (inp + cube)))


def gelu_backward(dinp: Array, inp: Array, dout: Array) -> None:
    x = inp
    cube = 0.044715 * x * x * x
    tanh_arg = GELU_SCALING_FACTOR * (x + cube)
    tanh_out = np.tanh(tanh_arg)
    sech_out = 1.0 - tanh_out * tanh_out
    local_grad = 0.5 * (1.0 + tanh_out) + x * 0.5 * sech_out * GELU_SCALING_FACTOR * (1.0 + 3.0 * 0.044715 * x * x)
    dinp += local_grad * dout


def residual_forward(out: Array, inp1: Array, inp2: Array) -> None:
    out[:] = inp1 + inp2


def residual_backward(dinp1: Array, dinp2: Array, dout: Array) -> None:
    dinp1 += dout
    dinp2 += dout


def softmax_forward(probs: Array, logits: Array, N: int, V: int) -> None:
    for bt in range(N):
        x = logits[bt * V : bt * V + V]
        e = np.exp(x - x.max())
        probs[bt * V : bt * V + V] = e / e.sum()


def crossentropy_forward(losses: Array, probs: Array, targets: Ids, N: int, V: int) -> None:
    for bt in range(N):
        ix = targets[bt]
        if ix != IGNORED:
            losses[bt] = -np.log(probs[bt * V + ix])


def crossentropy_softmax_backward(dlogits: Array, dlosses: Array, probs: Array, targets: Ids, N: int, V: int) -> None:
    for bt in range(N):
        ix = targets[bt]
        if ix == IGNORED:
            continue
        dlogits_bt = dlogits[bt * V : bt * V + V]
        dlogits_bt += probs[bt * V : bt * V + V] * dlosses[bt]
        dlogits_bt[ix] -= dlosses[bt]
