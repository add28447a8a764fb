"""The inverse of a Cholesky factor: (A + shift I)^-1 = M^T M with M lower triangular.

N matrices of C x C. By halves, in matmuls, down to a leaf. On
one NVIDIA GPU the leaf is the kernel of `kernels_pallas/inverse_root.py` where it can run;
elsewhere, and on a mesh that the compiler partitions, it is an elimination.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.ops import platform
from ttt_jax.ops.ttt.chunk_products import Matmuls, Products, Terms


class Leaf(NamedTuple):
    """What inverts matrices of up to `largest` rows. Sizes are halved to a multiple of `unit`."""

    invert: Callable[[jax.Array, jax.Array], Terms]
    largest: int
    unit: int


def inverse_root(a_NCC, shift_N, products: Products) -> Terms:
    """Make M for symmetric positive definite A + shift I.

    Args:
      a_NCC: float32 or float64. Of a kernel's matrices only the lower triangle is read.
      products: of the compute dtype, of which M is a sum of terms.
    """
    if platform.compiled_for() in ("gpu", "cuda") and platform.on_one_device():
        from ttt_jax.kernels_pallas import inverse_root as kernel

        if kernel.why_not(products.dtype, a_NCC.shape[1]) is None:
            leaf = Leaf(kernel.inverse_root_gpu, kernel.LARGEST, kernel.UNIT)
            return by_halves(a_NCC, shift_N, leaf, products)
    leaf = Leaf(lambda *arrays: (swept(*arrays),), 32, 1)
    (root_NCC,) = by_halves(a_NCC, shift_N, leaf, Matmuls(a_NCC.dtype))
    return products.terms(root_NCC)


def by_halves(a_NCC, shift_N, leaf: Leaf, products: Products) -> Terms:
    """M for symmetric positive definite A + shift I, by halves.

    With A = [[P, Q^T], [Q, R]], P^-1 = H^T H and L = Q H^T, the Schur complement is R - L L^T,
    symmetric whatever rounding does. An inverse by halves of inverses is not: what was skew in its
    error grew from half to half, and with 512 keys, many of them the same token's, A^-1 v came out
    200 times too large.
    """
    C = a_NCC.shape[1]
    if leaf.largest >= C:
        return leaf.invert(a_NCC, shift_N)
    half = C // 2 // leaf.unit * leaf.unit
    product, terms = products.product, products.terms
    first = by_halves(a_NCC[:, :half, :half], shift_N, leaf, products)
    below = terms(product("nt", terms(a_NCC[:, half:, :half]), first))
    schur_NLL = a_NCC[:, half:, half:] - product("nt", below, below)
    last = by_halves(schur_NLL, shift_N, leaf, products)
    below = terms(-product("nn", last, terms(product("nn", below, first))))
    return tuple(map(_joined, first, below, last))


def _joined(first_NHH, below_NLH, last_NLL):
    above_NHC = jnp.pad(first_NHH, ((0, 0), (0, 0), (0, last_NLL.shape[1])))
    return jnp.concatenate([above_NHC, jnp.concatenate([below_NLH, last_NLL], axis=2)], axis=1)


def swept(a_NCC, shift_N):
    """The same by elimination: what takes A to L^T takes the identity to L^-1. Positive definite
    matrices need no pivots.
    """
    C = a_NCC.shape[1]
    place_C, eye_CC = jnp.arange(C), jnp.eye(C, dtype=a_NCC.dtype)
    a_NCC = a_NCC + shift_N[:, None, None] * eye_CC[None]

    def sweep(k, both_NCX):
        row_NX = jax.lax.dynamic_index_in_dim(both_NCX, k, 1, keepdims=False)
        column_NC = jax.lax.dynamic_index_in_dim(both_NCX, k, 2, keepdims=False)
        scale_N1 = jax.lax.rsqrt(jax.lax.dynamic_index_in_dim(row_NX, k, 1))
        row_NX = row_NX * scale_N1
        below_NC = jnp.where(place_C[None] > k, column_NC * scale_N1, 0)
        both_NCX = both_NCX - below_NC[:, :, None] * row_NX[:, None]
        return jnp.where((place_C == k)[None, :, None], row_NX[:, None], both_NCX)

    eye_NCC = jnp.broadcast_to(eye_CC, a_NCC.shape)
    return jax.lax.fori_loop(0, C, sweep, jnp.concatenate([a_NCC, eye_NCC], axis=2))[:, :, C:]
