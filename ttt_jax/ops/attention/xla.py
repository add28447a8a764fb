from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from ttt_jax.ops.numerics import accumulator, join_tokens, precision_for, split_tokens

_BLOCK_BYTES = 64 * 2**20  # logits that the XLA path holds at a time


MASKED = -1e30


def _attend(q_BQNH, k_BSKH, v_BSKH, seen_BQS):
    """Softmax attention with an explicit mask, logits in float32."""
    B, Q, N, H = q_BQNH.shape
    K = k_BSKH.shape[2]
    acc = accumulator(q_BQNH.dtype)
    q_BQKGH = q_BQNH.reshape(B, Q, K, N // K, H)
    dot = functools.partial(
        jnp.einsum, preferred_element_type=acc, precision=precision_for(q_BQNH.dtype)
    )
    logits_BKGQS = dot("bqkgh,bskh->bkgqs", q_BQKGH, k_BSKH) / math.sqrt(H)
    logits_BKGQS = jnp.where(
        jnp.broadcast_to(seen_BQS[:, None, None], logits_BKGQS.shape), logits_BKGQS, MASKED
    )
    p_BKGQS = jax.nn.softmax(logits_BKGQS, axis=-1).astype(v_BSKH.dtype)
    return dot("bkgqs,bskh->bqkgh", p_BKGQS, v_BSKH).astype(q_BQNH.dtype).reshape(B, Q, N, H)


def _seen(q_position_BQ, k_position_BS, q_segment_BQ, k_segment_BS, window):
    distance_BQS = q_position_BQ[:, :, None] - k_position_BS[:, None, :]
    seen_BQS = distance_BQS >= 0
    if window is not None:
        seen_BQS &= distance_BQS < window
    if q_segment_BQ is not None:
        seen_BQS &= q_segment_BQ[:, :, None] == k_segment_BS[:, None, :]
    return seen_BQS


def blocked(
    q_BTNH, k_BSKH, v_BSKH, q_position, k_position, q_segment=None, k_segment=None, window=None
):
    """Blocks of queries against all keys; the backward recomputes each block's probabilities."""
    B, T, N, _ = q_BTNH.shape
    S = k_BSKH.shape[1]
    Q = max(1, min(T, _BLOCK_BYTES // (4 * B * N * S)))
    if Q >= T:
        return _attend(
            q_BTNH, k_BSKH, v_BSKH, _seen(q_position, k_position, q_segment, k_segment, window)
        )

    @jax.checkpoint
    def block(x):
        q_BQNH, position_BQ, segment_BQ = x
        return _attend(
            q_BQNH, k_BSKH, v_BSKH, _seen(position_BQ, k_position, segment_BQ, k_segment, window)
        )

    split = functools.partial(split_tokens, size=Q)
    o_blocks = jax.lax.map(
        block, (split(q_BTNH), split(q_position), None if q_segment is None else split(q_segment))
    )
    return join_tokens(o_blocks, T)


def windowed(q_BTNH, k_BTKH, v_BTKH, window, segment_ids_BT):
    """Blocks of `window` queries against their own and the previous block: cost linear in T."""
    B, T = q_BTNH.shape[:2]
    # 0: before the first token
    segment_BT = jnp.ones((B, T), jnp.int32) if segment_ids_BT is None else segment_ids_BT + 1
    before = lambda x: jnp.pad(x, ((0, 0), (window, 0), *((0, 0),) * (x.ndim - 2)))
    return windowed_after(
        q_BTNH, before(k_BTKH), before(v_BTKH), window, segment_BT, before(segment_BT)
    )


def windowed_after(q_BTNH, k_BSKH, v_BSKH, window, q_segment_BT, k_segment_BS):
    """The same for T queries and S = window + T keys, of which the first `window` lie before the
    first query.
    """
    B, T, N, _ = q_BTNH.shape
    W = window

    def own_and_previous(x_BSX):
        blocks = split_tokens(x_BSX, W)  # one more than there are blocks of queries
        return jnp.concatenate([blocks[:-1], blocks[1:]], axis=2)

    q_position_1Q, k_position_1S = jnp.arange(W, 2 * W)[None], jnp.arange(2 * W)[None]

    @jax.checkpoint
    def block(x):
        q, k, v, q_segment, k_segment = x
        return _attend(q, k, v, _seen(q_position_1Q, k_position_1S, q_segment, k_segment, window))

    keys, values, key_segments = map(own_and_previous, (k_BSKH, v_BSKH, k_segment_BS))
    xs = (split_tokens(q_BTNH, W), keys, values, split_tokens(q_segment_BT, W), key_segments)
    together = max(1, _BLOCK_BYTES // (4 * B * N * 2 * W * W))
    o_blocks = jax.lax.map(block, xs, batch_size=min(together, xs[0].shape[0]))
    return join_tokens(o_blocks, T)
