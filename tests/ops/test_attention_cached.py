"""Attention on a cache against a plain softmax over the whole sequence: pieces of any length, rows
at different places.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from support.attention import causal_mask, make_inputs, plain
from support.tolerance import assert_close

from ttt_jax import jax_internals
from ttt_jax.ops.attention import cached as kv_cache
from ttt_jax.ops.attention import xla as xla_attention

T = 43
# Tokens that each of two rows reads in each call; the piece is as wide as the larger.
CALLS = [(5, 3), (1, 1), (0, 1), (9, 9), (1, 0), (7, 16), (14, 0), (1, 1), (5, 12)]


@functools.partial(jit, static_argnums=(0, 1))
def call(window, single, q, k, v, cache, start, lengths):
    old, cache = cache, kv_cache.write(cache, k, v, start, lengths, ring=window is not None)
    if single:
        return kv_cache.decode(q, cache, start, ring=window is not None), cache
    if window is None:
        return kv_cache.extend(q, k, v, cache, start), cache
    return kv_cache.extend_window(q, k, v, old, start), cache


@pytest.mark.parametrize("window", [None, 1, 6, 64], ids=str)
@pytest.mark.parametrize("rows", [None, 2])
def test_pieces_equal_the_whole(monkeypatch, rows, window, x64):
    """Nothing of the cache but the tokens that were read is seen: it starts full of large
    numbers.
    """
    assert tuple(np.sum(CALLS, axis=0)) == (T, T)
    if rows is not None:
        monkeypatch.setattr(xla_attention, "_BLOCK_BYTES", 4 * 2 * 4 * 50 * rows)
    q, k, v, _ = make_inputs(T=T)
    seen = causal_mask(2, T, window)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        oracle = np.asarray(
            plain(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(seen))
        )
    slots = window or T + 7
    cache = kv_cache.KVCache(*(jnp.full((2, 2, slots, 8), 1e3) for _ in range(2)))
    start, got = np.zeros(2, np.int32), np.full(oracle.shape, np.nan)
    for lengths in CALLS:
        width = max(lengths)
        piece = [np.full((2, width, *x.shape[2:]), 7.0) for x in (q, k, v)]
        for b, n in enumerate(lengths):
            for padded, x in zip(piece, (q, k, v), strict=True):
                padded[b, :n] = x[b, start[b] : start[b] + n]
        arrays = [jnp.asarray(x) for x in piece]
        o, cache = call(
            window, width == 1, *arrays, cache, jnp.asarray(start), jnp.asarray(lengths, jnp.int32)
        )
        for b, n in enumerate(lengths):
            got[b, start[b] : start[b] + n] = o[b, :n]
        start = start + np.array(lengths, np.int32)
    assert_close("o", got, oracle, 1e-12)


def test_pieces_of_several_bfloat16_rows():
    """XLA for CPUs compiled a product that it could not run."""
    q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in make_inputs(T=16))
    (B, T), (K, H) = q.shape[:2], k.shape[2:]
    cache = kv_cache.empty(B, K, 24, H, jnp.bfloat16)
    start, lengths = jnp.zeros(B, jnp.int32), jnp.full((B,), T, jnp.int32)
    got, _ = call(None, False, q, k, v, cache, start, lengths)
    exact = (x.astype(jnp.float32) for x in (q, k, v))
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        oracle = plain(*exact, jnp.asarray(causal_mask(B, T, None)))
    assert_close("o", got, oracle, 1e-2)


def test_growing_keeps_what_was_read():
    cache = kv_cache.KVCache(jnp.ones((2, 3, 4, 5)), 2 * jnp.ones((2, 3, 4, 5)))
    grown = kv_cache.grow(cache, 2)
    assert grown.k_BKLH.shape == (2, 3, 6, 5)
    np.testing.assert_array_equal(grown.v_BKLH[:, :, :4], 2)
    np.testing.assert_array_equal(grown.v_BKLH[:, :, 4:], 0)


@pytest.mark.parametrize("start", [0, 3, 40])
def test_cudnn_is_given_room_for_a_second_document(monkeypatch, start):
    """With room for one, jax ignores where it starts: a piece read before the window was full came
    out wrong.
    """
    seen = {}

    def spy(q, k, v, **options):
        seen.update(options)
        return q

    monkeypatch.setattr(jax_internals, "cudnn_attention", spy)
    monkeypatch.setattr(kv_cache, "uses_cudnn", lambda q, implementation: True)
    W, T = 8, 5
    q, old = jnp.zeros((1, T, 2, 16)), jnp.zeros((1, 2, W, 16))
    kv_cache.extend_window(q, q, q, kv_cache.KVCache(old, old), jnp.array([start]))
    empty = max(W - start, 0)
    assert seen["q_offsets"].tolist() == seen["kv_offsets"].tolist() == [[empty, -1, -1]]
    assert seen["q_seqlen"].tolist() == seen["kv_seqlen"].tolist() == [[W + T - empty, -1]]
