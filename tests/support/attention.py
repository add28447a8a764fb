"""Inputs of attention, and attention written out to compare with."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import jit

from ttt_jax.ops.attention import xla as xla_attention


def make_inputs(B=2, T=37, N=4, K=2, H=8, S=None, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(B, T, N, H), (B, S or T, K, H), (B, S or T, K, H), (B, T, N, H)]
    return [rng.standard_normal(shape) for shape in shapes]


@jit
def plain(q, k, v, seen):
    """Softmax attention written out, `seen` [B, T, S]; every query head has its own copy of its key
    head.
    """
    repeat = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, repeat, axis=2), jnp.repeat(v, repeat, axis=2)
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1])
    weights = jnp.exp(logits - logits.max(-1, keepdims=True)) * seen[:, None]
    return jnp.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


def causal_mask(B, T, window=None, segments=None):
    t, s = np.mgrid[:T, :T]
    seen = (s <= t) & (t - s < (window or T))
    seen = np.broadcast_to(seen, (B, T, T)).copy()
    if segments is not None:
        seen &= segments[:, :, None] == segments[:, None, :]
    return seen


def documents_in_xla(calls):
    """Stands for the call of cuDNN, whose arguments it takes, and notes the rows, query heads and
    KV heads of each.
    """

    def call(q, k, v, offsets_BM, sizes_BM, window):
        (B, T, N, _), K = q.shape, k.shape[2]
        calls.append((B, N, K))
        assert offsets_BM.shape == (B, sizes_BM.shape[1] + 1)
        t_1T = jnp.arange(T, dtype=jnp.int32)[None]
        starts_BM1, sizes_BM1 = offsets_BM[:, :-1, None], sizes_BM[:, :, None]
        inside_BMT = (t_1T[None] >= starts_BM1) & (t_1T[None] < starts_BM1 + sizes_BM1)
        ids_BT = jnp.argmax(inside_BMT, axis=1).astype(jnp.int32)
        return xla_attention.blocked(q, k, v, t_1T, t_1T, ids_BT, ids_BT, window)

    return call
