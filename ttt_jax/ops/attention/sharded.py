"""Causal attention of a sequence that is split over a mesh axis. The functions run inside
`jax.shard_map`, once per shard.

B batch, T tokens of this shard, P shards, A = T / 2 tokens of a half, S keys, N query heads, K KV
heads, G = N / K, H head dim.

Tokens lie in order: shard p holds the halves 2p and 2p + 1 of the sequence's 2P halves.

Full attention. Keys and values are gathered (few heads under GQA) and the queries are exchanged, so
that device p computes the halves p and 2P - 1 - p. Whatever p, these two see p + 1 and 2P - p
halves of keys: two diagonal blocks and 2P - 1 whole ones, the same work on every device and nothing
computed in vain. The blocks are merged by their log-sum-exp. Outputs go back the way the queries
came, so the rest of the model never sees the exchange. Backward: written out, block by block.

Sliding windows. The shard takes the tokens before it that its first queries see from its neighbour,
and nothing is gathered.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ttt_jax.errors import UserError
from ttt_jax.ops.attention import cudnn, splash, xla
from ttt_jax.ops.attention.api import IMPLEMENTATIONS, fastest, self_attention
from ttt_jax.ops.numerics import accumulator


def attention_shard(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    *,
    axis: str,
    shards: int,
    window: int | None = None,
    segment_ids_BT=None,
    segment_multiple: int = 1,
    implementation: str | None = None,
) -> jax.Array:
    """`ttt_jax.ops.attention.api.self_attention` on one shard of the sequence: same arguments and
    result, for this shard's tokens.

    Args:
      axis, shards: name and size of the mesh axis that splits T.

    Raises: UserError if the named implementation does not support the call.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise UserError(
            f"attention implementation {implementation!r}: unknown; use one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    T = q_BTNH.shape[1]
    segment_multiple = math.gcd(segment_multiple, T)  # counted from where a shard starts
    axis_ = _Axis(axis, shards)
    options = {
        "window": window,
        "segment_multiple": segment_multiple,
        "implementation": implementation,
    }
    if window is not None:
        halo = min(-(-(window - 1) // segment_multiple) * segment_multiple, T) if window > 1 else 0
        if halo >= window - 1:
            return _neighbour(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, axis_, halo, options)
    reasons = _why_not_blocks(q_BTNH, window, segment_ids_BT)
    kernel = fastest(**reasons) if implementation is None else implementation
    if reason := reasons.get(kernel):
        raise UserError(f"attention implementation {kernel!r} over a split sequence: {reason}")
    if window is not None or T % 2:
        return _gathered(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, axis_, window)
    return _balanced(_Static(axis_, kernel), q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


class _Axis(NamedTuple):
    name: str
    size: int


class _Static(NamedTuple):
    axis: _Axis
    kernel: str


def _why_not_blocks(q_BTNH, window, segment_ids_BT) -> dict[str, str | None]:
    """Why each kernel cannot compute the blocks of a split sequence, or None."""
    T = q_BTNH.shape[1]
    shape = None
    if window is not None:
        shape = f"the window of {window} tokens is longer than a shard of {T}"
    elif T % 2:
        shape = f"a shard of {T} tokens has no halves"
    packed = None if segment_ids_BT is None else "packed rows with full attention are not supported"
    return {
        "cudnn": cudnn.why_not(q_BTNH) or packed or shape,
        "splash": splash.why_not(q_BTNH) or shape or splash.why_not_blocks(T // 2),
    }


# ---------------------------------------------------------------------------------- sliding windows


def _neighbour(
    q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, axis: _Axis, halo: int, options
) -> jax.Array:
    """Ordinary attention within the shard; the first queries again, behind the neighbour's last
    `halo` tokens.

    The shard's own attention is right for every query that sees no neighbour, and on the first
    shard for all of them. This needs no mask for a missing neighbour, so every implementation of
    `self_attention` serves.
    """
    own_BTNH = self_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT=segment_ids_BT, **options)
    if not halo:
        return own_BTNH
    forward = [(p, p + 1) for p in range(axis.size - 1)]

    def behind_neighbour(x_BTX):
        before = jax.lax.ppermute(x_BTX[:, -halo:], axis.name, forward)
        return jnp.concatenate([before, x_BTX[:, :halo]], axis=1)

    # Outputs of the neighbour's queries are dropped; they are there because queries and keys share
    # one sequence.
    q, k, v = map(behind_neighbour, (q_BTNH, k_BTKH, v_BTKH))
    ids = None if segment_ids_BT is None else behind_neighbour(segment_ids_BT)
    first_BANH = self_attention(q, k, v, segment_ids_BT=ids, **options)[:, halo:]
    first_BANH = jnp.where(jax.lax.axis_index(axis.name) == 0, own_BTNH[:, :halo], first_BANH)
    return jnp.concatenate([first_BANH, own_BTNH[:, halo:]], axis=1)


def _gathered(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, axis: _Axis, window) -> jax.Array:
    """All keys, masked by position: for windows longer than a shard, and shards that cannot be
    halved.
    """
    gather = lambda x: jax.lax.all_gather(x, axis.name, axis=1, tiled=True)
    T = q_BTNH.shape[1]
    q_position_1T = (jax.lax.axis_index(axis.name) * T + jnp.arange(T, dtype=jnp.int32))[None]
    k_position_1S = jnp.arange(T * axis.size, dtype=jnp.int32)[None]
    k_ids = None if segment_ids_BT is None else gather(segment_ids_BT)
    return xla.blocked(
        q_BTNH,
        gather(k_BTKH),
        gather(v_BTKH),
        q_position_1T,
        k_position_1S,
        segment_ids_BT,
        k_ids,
        window,
    )


# ----------------------------------------------------------------------------------- full attention


def _holder(half: int, shards: int) -> int:
    """The device that computes a half."""
    return half if half < shards else 2 * shards - 1 - half


def _exchange(x_BTX, axis: _Axis, back: bool = False):
    """From the halves 2p, 2p + 1 to the halves (p, 2P - 1 - p), stacked [2, B, A, ...]; or `back`.

    Of the two halves that a device computes one has an even number and one an odd one, so the even
    and the odd halves travel by one permutation each.
    """
    perms = [[(p, _holder(2 * p + odd, axis.size)) for p in range(axis.size)] for odd in (0, 1)]
    low_is_odd = jax.lax.axis_index(axis.name) % 2 == 1
    swap = lambda a, b: (jnp.where(low_is_odd, b, a), jnp.where(low_is_odd, a, b))
    if back:
        even, odd = swap(x_BTX[0], x_BTX[1])
        pieces = (
            jax.lax.ppermute(x, axis.name, [(to, p) for p, to in perm])
            for x, perm in zip((even, odd), perms, strict=True)
        )
        return jnp.concatenate(list(pieces), axis=1)
    even, odd = (
        jax.lax.ppermute(x, axis.name, perm)
        for x, perm in zip(jnp.split(x_BTX, 2, axis=1), perms, strict=True)
    )
    return jnp.stack(swap(even, odd))


class _Block(NamedTuple):
    """One block of the work: which of the device's two query halves meets which half of the
    keys.
    """

    query: jax.Array  # 0: half p, 1: half 2P - 1 - p
    key: jax.Array


def _whole_blocks(axis: _Axis) -> _Block:
    """The 2P - 1 blocks below the diagonal: the low half sees the key halves 0 .. p - 1, the high
    one 0 .. 2P - 2 - p.
    """
    p = jax.lax.axis_index(axis.name)
    j = jnp.arange(2 * axis.size - 1, dtype=jnp.int32)
    return _Block((j >= p).astype(jnp.int32), jnp.where(j < p, j, j - p))


def _take_half(x_BSX, half, A: int):
    return None if x_BSX is None else jax.lax.dynamic_slice_in_dim(x_BSX, half * A, A, axis=1)


def _add_half(x_BSX, half, piece_BAX):
    A = piece_BAX.shape[1]
    return jax.lax.dynamic_update_slice_in_dim(
        x_BSX, _take_half(x_BSX, half, A) + piece_BAX, half * A, axis=1
    )


class _Gathered(NamedTuple):
    """What a device needs: its two halves of queries, and all keys."""

    q: jax.Array  # [2, B, A, N, H]
    q_ids: jax.Array | None  # [2, B, A]
    k: jax.Array  # [B, S, K, H]
    v: jax.Array
    k_ids: jax.Array | None  # [B, S]


def _gather(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, axis: _Axis) -> _Gathered:
    gather = lambda x: jax.lax.all_gather(x, axis.name, axis=1, tiled=True)
    with jax.named_scope("gather_keys"):
        ids = (
            (None, None)
            if segment_ids_BT is None
            else (_exchange(segment_ids_BT, axis), gather(segment_ids_BT))
        )
        return _Gathered(_exchange(q_BTNH, axis), ids[0], gather(k_BTKH), gather(v_BTKH), ids[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _balanced(static: _Static, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    return _forward(static, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)[0]


def _forward(static: _Static, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    axis, forward = static.axis, _KERNELS[static.kernel][0]
    x = _gather(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, axis)
    A, p = x.q.shape[2], jax.lax.axis_index(axis.name)

    def block(query, key, causal):
        take = lambda y: _take_half(y, key, A)
        ids = (None, None) if x.q_ids is None else (x.q_ids[query], take(x.k_ids))
        return forward(x.q[query], take(x.k), take(x.v), *ids, causal)

    diagonal = [block(i, half, True) for i, half in enumerate((p, 2 * axis.size - 1 - p))]
    o, lse = (jnp.stack(pieces) for pieces in zip(*diagonal, strict=True))

    def merge(carry, where: _Block):
        o, lse = carry
        o_new, lse_new = block(where.query, where.key, False)
        o_old, lse_old = o[where.query], lse[where.query]
        total = jnp.logaddexp(lse_old, lse_new)
        share = lambda one: jnp.moveaxis(jnp.exp(one - total), 1, 2)[..., None]  # [B, A, N, 1]
        o_sum = o_old * jnp.broadcast_to(share(lse_old), o_old.shape) + o_new * jnp.broadcast_to(
            share(lse_new), o_new.shape
        )
        return (o.at[where.query].set(o_sum), lse.at[where.query].set(total)), None

    (o, lse), _ = jax.lax.scan(merge, (o, lse), _whole_blocks(axis))
    # Kept under `remat_save: [attention]`, as for the kernels that keep their own statistics.
    o_BTNH = checkpoint_name(_exchange(o.astype(q_BTNH.dtype), axis, back=True), "attention")
    lse = checkpoint_name(lse, "attention")
    return o_BTNH, (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, o_BTNH, lse)


def _backward(static: _Static, residuals, do_BTNH):
    q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, o_BTNH, lse = residuals
    axis, backward = static.axis, _KERNELS[static.kernel][1]
    x = _gather(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, axis)
    o, do = _exchange(o_BTNH, axis), _exchange(do_BTNH, axis)
    A, p = x.q.shape[2], jax.lax.axis_index(axis.name)
    acc = accumulator(q_BTNH.dtype)

    def add(carry, query, key, causal):
        dq, dk, dv = carry
        take = lambda y: _take_half(y, key, A)
        ids = (None, None) if x.q_ids is None else (x.q_ids[query], take(x.k_ids))
        pieces = backward(
            x.q[query], take(x.k), take(x.v), *ids, causal, o[query], lse[query], do[query]
        )
        dq_BANH, dk_BAKH, dv_BAKH = (piece.astype(acc) for piece in pieces)
        return dq.at[query].add(dq_BANH), _add_half(dk, key, dk_BAKH), _add_half(dv, key, dv_BAKH)

    carry = tuple(jnp.zeros(y.shape, acc) for y in (x.q, x.k, x.v))
    for i, half in enumerate((p, 2 * axis.size - 1 - p)):
        carry = add(carry, i, half, True)
    step = lambda carry, where: (add(carry, where.query, where.key, False), None)
    (dq, dk, dv), _ = jax.lax.scan(step, carry, _whole_blocks(axis))
    scatter = lambda y, like: jax.lax.psum_scatter(
        y, axis.name, scatter_dimension=1, tiled=True
    ).astype(like.dtype)
    dq_BTNH = _exchange(dq.astype(q_BTNH.dtype), axis, back=True)
    return dq_BTNH, scatter(dk, k_BTKH), scatter(dv, v_BTKH), None


_balanced.defvjp(_forward, _backward)


# ---------------------------------------------------------------------------------------- one block


# forward(q [B,A,N,H], k, v [B,A,K,H], ids or None, causal) -> o [B,A,N,H], log-sum-exp [B,N,A]
# backward(..., o, lse, do) -> dq, dk, dv, where o and lse are those of the whole row of blocks
_KERNELS = {
    name: (kernel.forward_block, kernel.backward_block)
    for name, kernel in {"xla": xla, "cudnn": cudnn, "splash": splash}.items()
}
