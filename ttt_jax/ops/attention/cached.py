"""The KV cache of one layer, and attention of new tokens on it.

B batch, T new tokens, L slots, N query heads, K KV heads, G = N / K, H head dim, W window.

Full attention: slot p holds position p. Sliding window: a ring of W slots, position p in slot p %
W, so memory does not grow with the stream. Heads come before slots: then a decode step reads each
head's keys as one matrix, whatever the batch.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.ops import platform
from ttt_jax.ops.attention import cudnn
from ttt_jax.ops.attention.api import uses_cudnn
from ttt_jax.ops.attention.xla import MASKED, blocked, windowed_after
from ttt_jax.ops.numerics import accumulator, precision_for


class KVCache(NamedTuple):
    """Keys (already rotated) and values."""

    k_BKLH: jax.Array
    v_BKLH: jax.Array


class Slots(NamedTuple):
    """Which slots of a cache a shard holds (cached_shard.py).

    Fields:
      first: its first one, int32. total: those of all shards. axis: the mesh axis.
    """

    first: jax.Array
    total: int
    axis: str


def empty(batch: int, heads: int, slots: int, head_dim: int, dtype) -> KVCache:
    shape = (batch, heads, slots, head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def grow(cache: KVCache, slots: int) -> KVCache:
    """`slots` more of them, for full attention."""
    return KVCache(*(jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, slots), (0, 0))) for x in cache))


def write(
    cache: KVCache,
    k_BTKH,
    v_BTKH,
    start_B,
    lengths_B,
    *,
    ring: bool,
    slots: Slots | None = None,
) -> KVCache:
    """Put the first `lengths_B` (None: all) of T tokens at positions start_B, start_B + 1, ...

    Args:
      slots: those that the cache holds; None: all.
    """
    T, here = k_BTKH.shape[1], cache.k_BKLH.shape[2]
    L = here if slots is None else slots.total
    t_1T = jnp.arange(T, dtype=jnp.int32)[None]
    slot_BT = start_B[:, None] + t_1T
    length_B1 = jnp.full_like(start_B, T)[:, None] if lengths_B is None else lengths_B[:, None]
    used_BT = t_1T < length_B1
    if ring:  # only the last L tokens stay, so no slot is written twice
        used_BT &= t_1T >= length_B1 - L
        slot_BT = slot_BT % L
    if slots is not None:
        slot_BT = slot_BT - slots.first
        used_BT &= slot_BT >= 0
    slot_BT = jnp.where(used_BT, slot_BT, here)  # out of bounds: dropped
    put = jax.vmap(
        lambda x_KLH, slot_T, y_TKH: x_KLH.at[:, slot_T].set(jnp.swapaxes(y_TKH, 0, 1), mode="drop")
    )
    return KVCache(put(cache.k_BKLH, slot_BT, k_BTKH), put(cache.v_BKLH, slot_BT, v_BTKH))


def attend(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    cache: KVCache,
    start_B,
    lengths_B,
    *,
    ring: bool,
    implementation: str | None = None,
) -> tuple[jax.Array, KVCache]:
    """Write T new tokens into the cache, and attend from them to all that the cache holds.

    Args:
      cache: has room for the new tokens.
      others: as in `write` and `extend`.

    Returns: o_BTNH and the cache with the new tokens.
    """
    old, cache = cache, write(cache, k_BTKH, v_BTKH, start_B, lengths_B, ring=ring)
    new = (q_BTNH, k_BTKH, v_BTKH)
    if q_BTNH.shape[1] == 1:
        return decode(q_BTNH, cache, start_B, ring=ring), cache
    if ring:
        return extend_window(*new, old, start_B, implementation=implementation), cache
    return extend(*new, cache, start_B, implementation=implementation), cache


def decode(
    q_B1NH, cache: KVCache, position_B, *, ring: bool, slots: Slots | None = None
) -> jax.Array:
    """Attention of one token per row, which the cache holds already, at `position_B`.

    Args:
      slots: those that the cache holds; None: all.

    Returns: o_B1NH, of all slots.
    """
    (B, _, N, H), (K, L) = q_B1NH.shape, cache.k_BKLH.shape[1:3]
    acc = accumulator(q_B1NH.dtype)
    dot = functools.partial(
        jnp.einsum, preferred_element_type=acc, precision=precision_for(q_B1NH.dtype)
    )
    # A ring holds the window and nothing else; before it is full, the slots after the position are
    # empty.
    slot_1L, total = jnp.arange(L, dtype=jnp.int32)[None], L
    if slots is not None:
        slot_1L, total = slot_1L + slots.first, slots.total
    seen_BL = (slot_1L <= position_B[:, None]) | (ring & (position_B[:, None] >= total))
    q_BKGH = q_B1NH.reshape(B, K, N // K, H)
    logits_BKGL = dot("bkgh,bklh->bkgl", q_BKGH, cache.k_BKLH) / math.sqrt(H)
    logits_BKGL = jnp.where(
        jnp.broadcast_to(seen_BL[:, None, None], logits_BKGL.shape), logits_BKGL, MASKED
    )
    over = (lambda x, _: x) if slots is None else (lambda x, reduce: reduce(x, slots.axis))
    top_BKG1 = over(logits_BKGL.max(axis=-1, keepdims=True), jax.lax.pmax)
    p_BKGL = jnp.exp(logits_BKGL - top_BKG1)
    p_BKGL = p_BKGL / over(p_BKGL.sum(axis=-1, keepdims=True), jax.lax.psum)
    o_BKGH = dot("bkgl,bklh->bkgh", p_BKGL.astype(q_B1NH.dtype), cache.v_BKLH)
    return over(o_BKGH, jax.lax.psum).astype(q_B1NH.dtype).reshape(B, 1, N, H)


def extend(
    q_BTNH, k_BTKH, v_BTKH, cache: KVCache, start_B, *, implementation: str | None = None
) -> jax.Array:
    """Full causal attention of T new tokens on the tokens before them and on themselves: a piece of
    a long prefill.

    Args:
      q_BTNH, k_BTKH, v_BTKH: of the new tokens.
      cache: holds the new tokens already.
      start_B: int32, position of each row's first new token.
      implementation: as in `self_attention`.

    Returns: o_BTNH.
    """
    if uses_cudnn(q_BTNH, implementation):
        return cudnn.extend(q_BTNH, k_BTKH, v_BTKH, *cache, start_B)
    keys, values = (jnp.swapaxes(x, 1, 2) for x in cache)
    if values.dtype.itemsize <= 2 and platform.compiled_for() == "cpu":
        # Or XLA compiles a product in bfloat16 that it cannot run.
        values = jax.lax.optimization_barrier(values)
    q_position_BT = start_B[:, None] + jnp.arange(q_BTNH.shape[1], dtype=jnp.int32)[None]
    k_position_BL = jnp.broadcast_to(
        jnp.arange(keys.shape[1], dtype=jnp.int32)[None], keys.shape[:2]
    )
    return blocked(q_BTNH, keys, values, q_position_BT, k_position_BL)


def extend_window(
    q_BTNH, k_BTKH, v_BTKH, ring: KVCache, start_B, *, implementation: str | None = None
) -> jax.Array:
    """Sliding-window attention of T new tokens on the W tokens before them and on themselves; cost
    linear in T.

    Args:
      ring: as it was before the new tokens were written.
      others: as in `extend`.

    Returns: o_BTNH.
    """
    (B, T), W = q_BTNH.shape[:2], ring.k_BKLH.shape[2]
    # In order, slot j holds position start - W + j; negative positions hold nothing.
    slot_BW = (start_B[:, None] + jnp.arange(W, dtype=jnp.int32)[None]) % W
    in_order = jax.vmap(lambda x_KWH, slot_W: jnp.swapaxes(x_KWH, 0, 1)[slot_W])
    keys, values = (
        jnp.concatenate([in_order(old, slot_BW), new], axis=1)
        for old, new in zip(ring, (k_BTKH, v_BTKH), strict=True)
    )
    empty_B = jnp.maximum(W - start_B, 0)
    if uses_cudnn(q_BTNH, implementation):
        # Queries for the old tokens too, whose outputs are dropped: cuDNN aligns queries and keys
        # at their starts.
        queries = jnp.pad(q_BTNH, ((0, 0), (W, 0), (0, 0), (0, 0)))
        offsets_B2 = jnp.stack([empty_B, jnp.full((B,), -1, jnp.int32)], axis=1)
        sizes_B1 = (W + T - empty_B)[:, None]
        return cudnn.cudnn_documents(queries, keys, values, offsets_B2, sizes_B1, W)[:, W:]
    real_BS = (jnp.arange(W + T, dtype=jnp.int32)[None] >= empty_B[:, None]).astype(jnp.int32)
    return windowed_after(q_BTNH, keys, values, W, jnp.ones((B, T), jnp.int32), real_BS)
