"""Next-token cross-entropy that never holds the logits of all tokens.

B batch, T tokens, D model width, V vocabulary, N = B T tokens of all rows, Q tokens of a block, n
blocks of a group.

Logits are made in blocks. Beside its matmuls a block costs two passes over its logits in float32:
one for logsumexp and the target's logit, one that writes their gradient in the compute dtype.
Gradients of several blocks wait for each other, so that the output weight's gradient, V D numbers
in float32, is read and written once a group.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ttt_jax.ops import platform
from ttt_jax.ops.numerics import accumulator, dot
from ttt_jax.ops.ttt.targets import unit_rms

_LOGITS_BYTES = 5 * 2**27  # of a block's logits in float32, at most
_GRADIENT_BYTES = 5 * 2**28  # of the gradients of a group's logits in the compute dtype, at most


def token_nll(h_BTD, w_VD, targets_BT, axis: str | None = None):
    """-log p(target) for every token, float32 [B, T]; logits are made block by block. No gradient
    is meant to be taken.

    Args:
      axis: mesh axis whose devices split V, inside of a `shard_map`: `w_VD` is this device's part,
        and targets count from the first one's.
    """
    targets_BT = targets_BT - _first_token(w_VD, axis)
    log_z_BT, picked_BT = _block_by_block(_log_z_and_picked, h_BTD, w_VD, targets_BT)
    return _nll(log_z_BT, picked_BT, axis)


def token_nll_and_hit(h_BTD, w_VD, targets_BT, axis: str | None = None):
    """As `token_nll`, and whether the target is the most likely token, bool [B, T] (of equals, the
    lowest id).
    """
    first = _first_token(w_VD, axis)
    targets_BT = targets_BT - first

    def block(logits_QV, targets_Q):
        likely_Q = jnp.argmax(logits_QV, axis=-1).astype(targets_Q.dtype)
        largest_Q = jnp.take_along_axis(logits_QV, likely_Q[:, None], axis=1)[:, 0]
        return *_log_z_and_picked(logits_QV, targets_Q), largest_Q, likely_Q

    numbers = _block_by_block(block, h_BTD, w_VD, targets_BT)
    log_z_BT, picked_BT, largest_BT, likely_BT = numbers
    hit_BT = likely_BT == targets_BT
    if axis is not None:  # the likeliest of the parts with the largest logit that counts lowest
        best_BT = largest_BT == jax.lax.pmax(largest_BT, axis)
        last = jnp.iinfo(likely_BT.dtype).max
        likely_BT = jax.lax.pmin(jnp.where(best_BT, first + likely_BT, last), axis)
        hit_BT = likely_BT == first + targets_BT
    return _nll(log_z_BT, picked_BT, axis), hit_BT


def _first_token(w_VD, axis: str | None):
    """The token that this device's part of V begins with."""
    return 0 if axis is None else jax.lax.axis_index(axis) * w_VD.shape[0]


def _nll(log_z_BT, picked_BT, axis: str | None):
    """-log p of targets from what each part of V has: its logsumexp, and the target's logit or
    0.
    """
    if axis is not None:
        largest_BT = jax.lax.pmax(log_z_BT, axis)
        total_BT = jax.lax.psum(jnp.exp(log_z_BT - largest_BT), axis)
        log_z_BT = largest_BT + jnp.log(total_BT)
        picked_BT = jax.lax.psum(picked_BT, axis)
    return log_z_BT - picked_BT


def expected_row(h_BTD, w_VD, normalize: bool, axis: str | None = None):
    """sum_v p(v) w_v with p = softmax(h W^T) for every token, [B, T, D] in h's dtype; logits are
    made block by block. No gradient is meant to be taken.

    Args:
      normalize: divide each row of w by its root mean square in the sum, not in the logits.
      axis: see `token_nll`.
    """
    (B, T, D), V, dtype = h_BTD.shape, w_VD.shape[0], h_BTD.dtype
    acc, w_VD = accumulator(dtype), w_VD.astype(dtype)
    row_VD = unit_rms(w_VD) if normalize else w_VD

    def block(h_nQD):
        logits_QV = _logits(h_nQD[0], w_VD, acc)
        log_z_Q1 = jax.nn.logsumexp(logits_QV, axis=1, keepdims=True)
        row_QD = dot("qv,vd->qd", jnp.exp(logits_QV - log_z_Q1).astype(dtype), row_VD, acc)
        if axis is not None:  # the parts of V by what they weigh
            weight_Q1 = jnp.exp(log_z_Q1 - jax.lax.pmax(log_z_Q1, axis))
            row_QD = jax.lax.psum(weight_Q1 * row_QD, axis) / jax.lax.psum(weight_Q1, axis)
        return row_QD.astype(dtype)

    Q, _ = _block_sizes(B * T, V, dtype)
    rows = jax.lax.map(block, _in_blocks(h_BTD, 1, Q))
    return rows.reshape(-1, D)[: B * T].reshape(B, T, D)


@jax.custom_vjp
def cross_entropy(h_BTD, w_VD, targets_BT, weights_BT):
    """Sum over tokens of weight * -log p(target), a float32 scalar.

    Args:
      h_BTD: final hidden states. w_VD: output weights, cast to h's dtype. targets_BT: int32.
        weights_BT: float32 factors (0 for tokens without a target); no gradient flows to them.

    When differentiated, the gradients for h and w are made in the forward pass, while logits are at
    hand: the output matmul is not done twice. Peak memory is a block of logits, a group of their
    gradients and w's gradient.
    """
    return jnp.sum(weights_BT * token_nll(h_BTD, w_VD, targets_BT).astype(weights_BT.dtype))


def _forward(h_BTD, w_VD, targets_BT, weights_BT):
    (B, T, D), V, dtype = h_BTD.shape, w_VD.shape[0], h_BTD.dtype
    acc, w_cast_VD = accumulator(dtype), w_VD.astype(dtype)
    Q, n = _block_sizes(B * T, V, dtype)

    def block(carry, x):
        loss, d_nQV = carry
        i, h_QD, targets_Q, weights_Q = x
        weights_Q = weights_Q.astype(acc)
        logits_QV = _logits(h_QD, w_cast_VD, acc)
        log_z_Q, picked_Q = _log_z_and_picked(logits_QV, targets_Q)
        loss = loss + jnp.sum(weights_Q * (log_z_Q - picked_Q))
        p_QV = jnp.exp(logits_QV - log_z_Q[:, None])
        d_QV = weights_Q[:, None] * (p_QV - _hits(targets_Q, V).astype(acc))
        return (loss, jax.lax.dynamic_update_index_in_dim(d_nQV, d_QV.astype(dtype), i, 0)), None

    def group(carry, x):
        loss, dw_VD, d_nQV = carry
        (loss, d_nQV), _ = jax.lax.scan(block, (loss, d_nQV), (jnp.arange(n), *x))
        d_PV, h_PD = d_nQV.reshape(n * Q, V), x[0].reshape(n * Q, D)
        with jax.named_scope("logits_grad"):
            dh_PD = dot("pv,vd->pd", d_PV, w_cast_VD, dtype)
            dw_VD = dw_VD + dot("pv,pd->vd", d_PV, h_PD, acc)
        return (loss, dw_VD, d_nQV), dh_PD

    xs = tuple(_in_blocks(x, n, Q) for x in (h_BTD, targets_BT, weights_BT))
    # Every group overwrites the gradients of the one before: zeros are written once.
    start = jnp.zeros((), acc), jnp.zeros((V, D), acc), jnp.zeros((n, Q, V), dtype)
    (loss, dw_VD, _), dh_GPD = jax.lax.scan(group, start, xs)
    dh_BTD = dh_GPD.reshape(-1, D)[: B * T].reshape(B, T, D)
    return loss.astype(weights_BT.dtype), (dh_BTD, dw_VD.astype(w_VD.dtype))


def _backward(residuals, g):
    dh_BTD, dw_VD = residuals
    scale = lambda x: (g.astype(accumulator(x.dtype)) * x.astype(accumulator(x.dtype))).astype(
        x.dtype
    )
    return scale(dh_BTD), scale(dw_VD), None, None


cross_entropy.defvjp(_forward, _backward)


def _block_by_block(function, h_BTD, w_VD, targets_BT):
    """Numbers [B, T] of tokens from their logits."""
    (B, T, _), V = h_BTD.shape, w_VD.shape[0]
    acc, w_VD = accumulator(h_BTD.dtype), w_VD.astype(h_BTD.dtype)
    Q, _ = _block_sizes(B * T, V, h_BTD.dtype)
    block = lambda x: function(_logits(x[0][0], w_VD, acc), x[1][0])
    numbers = jax.lax.map(block, tuple(_in_blocks(x, 1, Q) for x in (h_BTD, targets_BT)))
    return jax.tree.map(lambda x: x.reshape(-1)[: B * T].reshape(B, T), numbers)


def _logits(h_QD, w_VD, acc):
    with jax.named_scope("logits"):
        return dot("qd,vd->qv", h_QD, w_VD, acc)


def _hits(targets_Q, V: int):
    return targets_Q[:, None] == jnp.arange(V, dtype=targets_Q.dtype)[None]


def _log_z_and_picked(logits_QV, targets_Q):
    """logsumexp of the logits, and the target's logit."""
    picked_QV = jnp.where(_hits(targets_Q, logits_QV.shape[1]), logits_QV, 0)
    if platform.compiled_for() == "gpu":
        return _in_one_pass(logits_QV, picked_QV)
    return jax.nn.logsumexp(logits_QV, axis=1), jnp.sum(picked_QV, axis=1)


def _in_one_pass(logits_QV, picked_QV):
    """logsumexp, and the sum of what is picked, reading the logits once: the larger maximum of two
    parts rescales the sums of both. XLA makes it one kernel on GPUs. A CPU computes it number by
    number, twenty times as long.
    """

    def join(x, y):
        largest = jnp.maximum(x[0], y[0])
        total = x[1] * jnp.exp(x[0] - largest) + y[1] * jnp.exp(y[0] - largest)
        return largest, total, x[2] + y[2]

    dtype = logits_QV.dtype
    # Not -inf: of two empty parts that would be exp(-inf + inf).
    empty = tuple(jnp.asarray(x, dtype) for x in (jnp.finfo(dtype).min, 0, 0))
    parts = (logits_QV, jnp.ones_like(logits_QV), picked_QV)
    largest_Q, total_Q, picked_Q = jax.lax.reduce(parts, empty, join, (1,))
    return largest_Q + jnp.log(total_Q), picked_Q


def _in_blocks(x_BTX, n: int, Q: int):
    """[B, T, ...] -> [groups, n, Q, ...]; the last blocks are padded with zeros."""
    x_NX = x_BTX.reshape(-1, *x_BTX.shape[2:])
    groups = -(-x_NX.shape[0] // (n * Q))
    rest = groups * n * Q - x_NX.shape[0]
    x_NX = jnp.pad(x_NX, ((0, rest), *((0, 0),) * (x_NX.ndim - 1)))
    return x_NX.reshape(groups, n, Q, *x_NX.shape[1:])


def _block_sizes(N: int, V: int, dtype) -> tuple[int, int]:
    """Tokens of a block, and blocks of a group, powers of two where N is one. Matmuls want
    multiples of 8, or XLA pads what they read.
    """
    power = lambda x: 1 << (max(x, 1).bit_length() - 1)
    most = power(_LOGITS_BYTES // (4 * V))
    together = power(_GRADIENT_BYTES // (jnp.dtype(dtype).itemsize * V) // most)
    blocks = -(-N // most)
    groups = -(-blocks // together)
    n = -(-blocks // groups)
    Q = -(-N // (groups * n))
    return (Q if Q <= 8 else -(-Q // 8) * 8), n
