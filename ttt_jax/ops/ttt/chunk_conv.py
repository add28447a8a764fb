"""The targets' convolution: depthwise over D, centred, with zeros at both edges of every chunk.

B batch, T tokens, D model width, C chunk size, M chunks, K taps (odd), E = C + K - 1 tokens of a
chunk with its edges.

Sums are float32 (float64 for float64), arrays in memory stay in the input's dtype. A chunk's edges
are written to memory before the taps are read: a sum over slices of one array loads several values
at once, where a sum over padded arrays asks for every value whether it exists.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ttt_jax.ops.numerics import accumulator


@jax.custom_vjp
def chunk_conv(x_BMCD, taps_DK):
    """t_c = sum_k taps_k x_{c + k - K // 2} inside each chunk, in x's dtype.

    Args:
      taps_DK: float32 (float64 for float64).
    """
    return _sum_of_taps(_with_edges(x_BMCD, taps_DK.shape[1]), taps_DK)


def _with_edges(x_BMCD, K: int):
    """[B, M, E, D], in memory."""
    edge = (K // 2, K // 2)
    return jax.lax.optimization_barrier(jnp.pad(x_BMCD, ((0, 0), (0, 0), edge, (0, 0))))


def _sum_of_taps(x_BMED, taps_DK):
    """sum_k taps_k x_{c+k}, [B, M, C, D] in x's dtype."""
    acc, K = accumulator(x_BMED.dtype), taps_DK.shape[1]
    total = 0
    for k in range(K):
        x_BMCD = x_BMED[:, :, k : x_BMED.shape[2] - K + 1 + k].astype(acc)
        total += x_BMCD * jnp.broadcast_to(taps_DK[:, k].astype(acc), x_BMCD.shape)
    return jnp.asarray(total, x_BMED.dtype)


def _forward(x_BMCD, taps_DK):
    return chunk_conv(x_BMCD, taps_DK), (x_BMCD, taps_DK)


def _backward(residuals, dt_BMCD):
    x_BMCD, taps_DK = residuals
    K, C, acc = taps_DK.shape[1], x_BMCD.shape[2], accumulator(x_BMCD.dtype)
    dx_BMCD = _sum_of_taps(_with_edges(dt_BMCD, K), taps_DK[:, ::-1])
    x_BMED = _with_edges(x_BMCD, K)
    product = lambda k: dt_BMCD.astype(acc) * x_BMED[:, :, k : k + C].astype(acc)
    dtaps_KD = jnp.stack([product(k).sum(axis=(0, 1, 2)) for k in range(K)])
    return dx_BMCD, dtaps_KD.T.astype(taps_DK.dtype)


chunk_conv.defvjp(_forward, _backward)
