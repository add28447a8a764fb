"""A KV cache whose slots are split over a mesh axis. The function runs inside `jax.shard_map`, once
per shard.

B batch, T new tokens of a call, P shards, L slots of the cache, N query heads, K KV heads, H head
dim.

One token: every shard writes the slot if it is its own, and attends to its slots; the softmax and
the sum over values go over the axis. Nothing but one token's activations is sent.

Many tokens: keys and values are gathered, those of the cache and the new ones (few heads under
GQA), as `attention_shard` does for fresh sequences. A shard attends from its own new tokens, for
which the tokens of the shards before it are older ones.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ttt_jax.ops.attention import cached
from ttt_jax.ops.attention.cached import KVCache


def attend_shard(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    cache: KVCache,
    start_B,
    lengths_B,
    *,
    axis: str,
    shards: int,
    split_tokens: bool,
    split_slots: bool,
    ring: bool,
    implementation: str | None = None,
) -> tuple[jax.Array, KVCache]:
    """`attend` of cached.py on one shard; see there for what is not listed.

    Args:
      axis, shards: name and size of the mesh axis.
      split_tokens: T are this shard's tokens, one after the other over the axis; else all.
      split_slots: the cache holds this shard's L / P slots; else all.

    Returns: o of the tokens that came in, and this shard's part of the cache.
    """
    T, p = q_BTNH.shape[1], jax.lax.axis_index(axis)
    if T == 1 and split_slots and not split_tokens:
        first = p * cache.k_BKLH.shape[2]
        part = cached.Slots(first, shards * cache.k_BKLH.shape[2], axis)
        cache = cached.write(cache, k_BTKH, v_BTKH, start_B, lengths_B, ring=ring, slots=part)
        return cached.decode(q_BTNH, cache, start_B, ring=ring, slots=part), cache
    local = cache.k_BKLH.shape[2]
    if split_slots:
        cache = KVCache(*(jax.lax.all_gather(x, axis, axis=2, tiled=True) for x in cache))
    if not split_tokens:
        new = (q_BTNH, k_BTKH, v_BTKH)
        o_BTNH, cache = cached.attend(
            *new, cache, start_B, lengths_B, ring=ring, implementation=implementation
        )
    else:
        all_k, all_v = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (k_BTKH, v_BTKH))
        here_B = jnp.full_like(start_B, p * T)
        before_B = here_B if lengths_B is None else jnp.minimum(lengths_B, here_B)
        before = cached.write(cache, all_k, all_v, start_B, before_B, ring=ring)
        options = {"ring": ring, "implementation": implementation}
        o_BTNH = cached.attend(q_BTNH, k_BTKH, v_BTKH, before, start_B + here_B, None, **options)[0]
        cache = cached.write(cache, all_k, all_v, start_B, lengths_B, ring=ring)
    if split_slots:
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, p * local, local, axis=2)
        cache = KVCache(*map(take, cache))
    return o_BTNH, cache
