"""The inverse of a Cholesky factor: (A + shift I)^-1 = M^T M with M lower triangular.

B rows of M chunks with a matrix of C x C each, N = B M. On one NVIDIA GPU the kernel of
`kernels_pallas/inverse_root.py` where it can run; elsewhere, and on a mesh that the compiler
partitions, matmuls, which every device does well.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ttt_jax.ops import platform
from ttt_jax.ops.numerics import dot

LEAF = 32  # size from which on a matrix is inverted element by element


def inverse_root(a_BMCC, shift_BM):
    """Make M for symmetric positive definite A + shift I, in A's dtype: float32 or float64."""
    a_NCC, shift_N = a_BMCC.reshape(-1, *a_BMCC.shape[2:]), shift_BM.reshape(-1)
    if platform.compiled_for() in ("gpu", "cuda") and platform.on_one_device():
        from ttt_jax.kernels_pallas import inverse_root as kernel

        if kernel.why_not(a_NCC.dtype, a_NCC.shape[1]) is None:
            return kernel.inverse_root_gpu(a_NCC, shift_N).reshape(a_BMCC.shape)
    eye_1CC = jnp.eye(a_NCC.shape[1], dtype=a_NCC.dtype)[None]
    return by_halves(a_NCC + shift_N[:, None, None] * eye_1CC).reshape(a_BMCC.shape)


def by_halves(a_NCC):
    """M for symmetric positive definite A, by halves.

    With A = [[P, Q^T], [Q, R]], P^-1 = H^T H and L = Q H^T, the Schur complement is R - L L^T,
    symmetric whatever rounding does. An inverse by halves of inverses is not: what was skew in its
    error grew from half to half, and with 512 keys, many of them the same token's, A^-1 v came out
    200 times too large.
    """
    C = a_NCC.shape[1]
    if C <= LEAF:
        return _swept(a_NCC)
    half, acc = C // 2, a_NCC.dtype
    product = lambda subscripts, x, y: dot(subscripts, x, y, acc)
    first_NHH = by_halves(a_NCC[:, :half, :half])
    below_NLH = product("nlh,nkh->nlk", a_NCC[:, half:, :half], first_NHH)
    last_NLL = by_halves(a_NCC[:, half:, half:] - product("nlh,nmh->nlm", below_NLH, below_NLH))
    below_NLH = -product("nlm,nmh->nlh", last_NLL, product("nlk,nkh->nlh", below_NLH, first_NHH))
    above_NHC = jnp.pad(first_NHH, ((0, 0), (0, 0), (0, C - half)))
    return jnp.concatenate([above_NHC, jnp.concatenate([below_NLH, last_NLL], axis=2)], axis=1)


def _swept(a_NCC):
    """The same by elimination: what takes A to L^T takes the identity to L^-1. Positive definite
    matrices need no pivots.
    """
    C = a_NCC.shape[1]
    place_C = jnp.arange(C)

    def sweep(k, both_NCX):
        row_NX = jax.lax.dynamic_index_in_dim(both_NCX, k, 1, keepdims=False)
        column_NC = jax.lax.dynamic_index_in_dim(both_NCX, k, 2, keepdims=False)
        scale_N1 = jax.lax.rsqrt(jax.lax.dynamic_index_in_dim(row_NX, k, 1))
        row_NX = row_NX * scale_N1
        below_NC = jnp.where(place_C[None] > k, column_NC * scale_N1, 0)
        both_NCX = both_NCX - below_NC[:, :, None] * row_NX[:, None]
        return jnp.where((place_C == k)[None, :, None], row_NX[:, None], both_NCX)

    eye_NCC = jnp.broadcast_to(jnp.eye(C, dtype=a_NCC.dtype), a_NCC.shape)
    return jax.lax.fori_loop(0, C, sweep, jnp.concatenate([a_NCC, eye_NCC], axis=2))[:, :, C:]
