"""Attention in plain JAX, block by block: on any platform, in memory linear in the length.

B batch, T queries, S keys, N query heads, K KV heads, G = N / K, H head dim, Q queries in a block,
W window, A queries of a block of a sequence that is split over devices.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from ttt_jax.ops import platform
from ttt_jax.ops.numerics import accumulator, join_tokens, precision_for, split_tokens

_BLOCK_BYTES = 64 * 2**20  # logits that are held at a time
_CACHE_BYTES = 4 * 2**20  # the same on a CPU: in its cache a row of 4,096 takes 2/5 of the time
MASKED = -1e30


def _block_bytes() -> int:
    """Bytes of logits that are held at a time."""
    on_cpu = platform.compiled_for() == "cpu"
    return min(_BLOCK_BYTES, _CACHE_BYTES) if on_cpu else _BLOCK_BYTES


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
    Q = max(1, min(T, _block_bytes() // (4 * B * N * S)))
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
    together = max(1, _block_bytes() // (4 * B * N * 2 * W * W))
    o_blocks = jax.lax.map(block, xs, batch_size=min(together, xs[0].shape[0]))
    return join_tokens(o_blocks, T)


# ----------------------------------------------------------------------- blocks of a split sequence


def _block_logits(q_BAKGH, k_BSKH, q_ids_BA, k_ids_BS, q_start, causal: bool, dot):
    """Masked logits [B, K, G, A, S] of the queries q_start .. of a block."""
    # Tied to the queries, or differentiating a rematerialised layer would keep the masks of all
    # blocks for the backward pass: no gradient flows through their inputs, so they count as known
    # (30 GiB for Qwen3-8B, 128k tokens on 8 shards).
    q_BAKGH, q_ids_BA, k_ids_BS, q_start = jax.lax.optimization_barrier(
        (q_BAKGH, q_ids_BA, k_ids_BS, jnp.asarray(q_start))
    )
    logits = dot("bakgh,bskh->bkgas", q_BAKGH, k_BSKH) / math.sqrt(q_BAKGH.shape[-1])
    (B, A), S = q_BAKGH.shape[:2], k_BSKH.shape[1]
    seen_BAS = jnp.ones((B, A, S), bool)
    if causal:
        t_A = q_start + jnp.arange(A, dtype=jnp.int32)
        seen_BAS &= (t_A[:, None] >= jnp.arange(S, dtype=jnp.int32)[None])[None]
    if q_ids_BA is not None:
        seen_BAS &= q_ids_BA[:, :, None] == k_ids_BS[:, None, :]
    return jnp.where(jnp.broadcast_to(seen_BAS[:, None, None], logits.shape), logits, MASKED)


def _block_rows(q_BANH, k_BSKH) -> int:
    """Queries at a time."""
    B, A, N, _ = q_BANH.shape
    rows = max(1, _block_bytes() // (4 * B * N * k_BSKH.shape[1]))
    return A if rows >= A else -(-A // -(-A // rows))


def _heads(x_BANH, K: int):
    B, A, N, H = x_BANH.shape
    return x_BANH.reshape(B, A, K, N // K, H)


def _split(x_BAX, rows: int):
    return None if x_BAX is None else split_tokens(x_BAX, rows)


def forward_block(q_BANH, k_BSKH, v_BSKH, q_ids_BA, k_ids_BS, causal: bool):
    """A queries on S keys: the same tokens (`causal`), or all of them earlier ones. No gradient.

    Returns: o_BANH and the log-sum-exp [B, N, A], float32 (or float64).
    """
    (B, A, N, H), K = q_BANH.shape, k_BSKH.shape[2]
    acc, Q = accumulator(q_BANH.dtype), _block_rows(q_BANH, k_BSKH)
    dot = functools.partial(
        jnp.einsum, preferred_element_type=acc, precision=precision_for(q_BANH.dtype)
    )

    def some(xs):
        i, q_BQNH, ids_BQ = xs
        logits = _block_logits(_heads(q_BQNH, K), k_BSKH, ids_BQ, k_ids_BS, i * Q, causal, dot)
        lse_BKGQ = jax.nn.logsumexp(logits, axis=-1)
        weights = jnp.exp(logits - lse_BKGQ[..., None]).astype(v_BSKH.dtype)
        o_BQNH = dot("bkgqs,bskh->bqkgh", weights, v_BSKH).reshape(B, Q, N, H)
        return o_BQNH, jnp.moveaxis(lse_BKGQ.reshape(B, N, Q), 1, 2)

    n = -(-A // Q)
    o, lse = jax.lax.map(
        some, (jnp.arange(n, dtype=jnp.int32), _split(q_BANH, Q), _split(q_ids_BA, Q))
    )
    return join_tokens(o, A), jnp.moveaxis(join_tokens(lse, A), 2, 1)


def backward_block(
    q_BANH, k_BSKH, v_BSKH, q_ids_BA, k_ids_BS, causal: bool, o_BANH, lse_BNA, do_BANH
):
    """dq, dk, dv of one block, where o and the log-sum-exp are those of the whole row of blocks."""
    (_, A, N, H), K = q_BANH.shape, k_BSKH.shape[2]
    acc, dtype, Q = accumulator(q_BANH.dtype), q_BANH.dtype, _block_rows(q_BANH, k_BSKH)
    dot = functools.partial(jnp.einsum, preferred_element_type=acc, precision=precision_for(dtype))
    inner_BAN = jnp.sum(o_BANH.astype(acc) * do_BANH.astype(acc), axis=-1)

    def some(carry, xs):
        i, q_BQNH, ids_BQ, lse_BQN, inner_BQN, do_BQNH = xs
        by_head = lambda x_BQN: jnp.moveaxis(x_BQN.reshape(*x_BQN.shape[:2], K, N // K), 1, 3)[
            ..., None
        ]
        q_BQKGH, do_BQKGH = _heads(q_BQNH, K), _heads(do_BQNH, K)
        logits = _block_logits(q_BQKGH, k_BSKH, ids_BQ, k_ids_BS, i * Q, causal, dot)
        p = jnp.exp(logits - by_head(lse_BQN))
        dp = dot("bqkgh,bskh->bkgqs", do_BQKGH, v_BSKH)
        ds = (p * (dp - by_head(inner_BQN)) / math.sqrt(H)).astype(dtype)
        dk, dv = carry
        dk = dk + dot("bkgqs,bqkgh->bskh", ds, q_BQKGH)
        dv = dv + dot("bkgqs,bqkgh->bskh", p.astype(dtype), do_BQKGH)
        return (dk, dv), dot("bkgqs,bskh->bqkgh", ds, k_BSKH).reshape(q_BQNH.shape)

    n = -(-A // Q)
    rows = (q_BANH, q_ids_BA, jnp.moveaxis(lse_BNA, 1, 2), inner_BAN, do_BANH)
    zero = (jnp.zeros(k_BSKH.shape, acc), jnp.zeros(v_BSKH.shape, acc))
    dkv, dq = jax.lax.scan(
        some, zero, (jnp.arange(n, dtype=jnp.int32), *(_split(x, Q) for x in rows))
    )
    return join_tokens(dq, A), *dkv
