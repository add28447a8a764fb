"""Next-token cross-entropy that never holds the logits of all tokens.

B batch, T tokens, D model width, V vocabulary, Q tokens of a block.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ttt_jax.ops.numerics import accumulator, join_tokens, precision_for, split_tokens

_BLOCK_BYTES = 2**30  # float32 logits held at a time


def token_nll(h_BTD, w_VD, targets_BT):
    """-log p(target) for every token, float32 [B, T]; logits are made block by block. No gradient
    is meant to be taken.
    """
    acc = accumulator(h_BTD.dtype)
    w_VD = w_VD.astype(h_BTD.dtype)

    def block(x):
        logits_BQV = _logits(x[0], w_VD, acc)
        picked_BQ = jnp.take_along_axis(logits_BQV, x[1][..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits_BQV, axis=-1) - picked_BQ

    T = h_BTD.shape[1]
    Q = _block_size(h_BTD, w_VD)
    nll = jax.lax.map(block, (split_tokens(h_BTD, Q), split_tokens(targets_BT, Q)))
    return join_tokens(nll, T)


def token_nll_and_hit(h_BTD, w_VD, targets_BT):
    """As `token_nll`, and whether the target is the most likely token, bool [B, T] (of equals, the
    lowest id).
    """
    acc = accumulator(h_BTD.dtype)
    w_VD = w_VD.astype(h_BTD.dtype)

    def block(x):
        logits_BQV = _logits(x[0], w_VD, acc)
        picked_BQ = jnp.take_along_axis(logits_BQV, x[1][..., None], axis=-1)[..., 0]
        hit_BQ = jnp.argmax(logits_BQV, axis=-1).astype(x[1].dtype) == x[1]
        return jax.nn.logsumexp(logits_BQV, axis=-1) - picked_BQ, hit_BQ

    T = h_BTD.shape[1]
    Q = _block_size(h_BTD, w_VD)
    nll, hit = jax.lax.map(block, (split_tokens(h_BTD, Q), split_tokens(targets_BT, Q)))
    return join_tokens(nll, T), join_tokens(hit, T)


@jax.custom_vjp
def cross_entropy(h_BTD, w_VD, targets_BT, weights_BT):
    """Sum over tokens of weight * -log p(target), a float32 scalar.

    Args:
      h_BTD: final hidden states. w_VD: output weights, cast to h's dtype. targets_BT: int32.
        weights_BT: float32 factors (0 for tokens without a target); no gradient flows to them.

    When differentiated, the gradients for h and w are made in the forward pass, block by block,
    while a block's logits are at hand: the output matmul is not done twice and peak memory is one
    block of logits.
    """
    return jnp.sum(weights_BT * token_nll(h_BTD, w_VD, targets_BT).astype(weights_BT.dtype))


def _forward(h_BTD, w_VD, targets_BT, weights_BT):
    acc = accumulator(h_BTD.dtype)
    w_cast_VD = w_VD.astype(h_BTD.dtype)
    T = h_BTD.shape[1]
    Q = _block_size(h_BTD, w_VD)

    def block(carry, x):
        loss, dw_VD = carry
        h_BQD, targets_BQ, weights_BQ = x
        with jax.named_scope("logits"):
            logits_BQV = _logits(h_BQD, w_cast_VD, acc)
        log_z_BQ = jax.nn.logsumexp(logits_BQV, axis=-1)
        hit_BQV = (
            targets_BQ[..., None] == jnp.arange(w_VD.shape[0], dtype=targets_BQ.dtype)[None, None]
        )
        picked_BQ = jnp.sum(jnp.where(hit_BQV, logits_BQV, 0), axis=-1)
        loss = loss + jnp.sum(weights_BQ.astype(acc) * (log_z_BQ - picked_BQ))
        p_BQV = jnp.exp(logits_BQV - log_z_BQ[..., None])
        d_BQV = (weights_BQ.astype(acc)[..., None] * (p_BQV - hit_BQV.astype(acc))).astype(
            h_BQD.dtype
        )
        with jax.named_scope("logits_grad"):
            dot = functools.partial(jnp.einsum, precision=precision_for(h_BQD.dtype))
            dh_BQD = dot("bqv,vd->bqd", d_BQV, w_cast_VD)
            dw_VD = dw_VD + dot("bqv,bqd->vd", d_BQV, h_BQD, preferred_element_type=acc)
        return (loss, dw_VD), dh_BQD

    xs = (split_tokens(h_BTD, Q), split_tokens(targets_BT, Q), split_tokens(weights_BT, Q))
    (loss, dw_VD), dh_blocks = jax.lax.scan(
        block, (jnp.zeros((), acc), jnp.zeros(w_VD.shape, acc)), xs
    )
    return loss.astype(weights_BT.dtype), (join_tokens(dh_blocks, T), dw_VD.astype(w_VD.dtype))


def _backward(residuals, g):
    dh_BTD, dw_VD = residuals
    scale = lambda x: (g.astype(accumulator(x.dtype)) * x.astype(accumulator(x.dtype))).astype(
        x.dtype
    )
    return scale(dh_BTD), scale(dw_VD), None, None


cross_entropy.defvjp(_forward, _backward)


def _logits(h_BQD, w_VD, acc):
    return jnp.einsum(
        "bqd,vd->bqv", h_BQD, w_VD, preferred_element_type=acc, precision=precision_for(h_BQD.dtype)
    )


def _block_size(h_BTD, w_VD) -> int:
    B, T, _ = h_BTD.shape
    fits = max(1, _BLOCK_BYTES // (4 * B * w_VD.shape[0]))
    blocks = -(-T // fits)
    return -(-T // blocks)
