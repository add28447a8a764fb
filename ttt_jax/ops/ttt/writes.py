"""Transform the targets of a chunk before the ordinary update S += lr v^T z.

B batch, T tokens, D model width, F MLP width, C chunk size, M chunks, X = C times the number of
arrays that a matrix is the sum of. Z is a chunk's keys (C F), V its targets (C D), G = Z Z^T (C C).

    sum        V^T Z                                      the paper's rule; similar keys add up
    ridge      V^T Z (Z^T Z + lambda m I)^-1              least squares: z U^T closest to v
             = (A^-1 V)^T Z with A = G + lambda m I       m = mean ||z||^2: no units in lambda, lr
    spectral   the nearest matrix with singular values 1  Newton-Schulz on V^T Z, as in Muon

All are C x C algebra on v: the op, its kernels, its backward, streams and shards know nothing of
them, and the writes of chunks still add up. A chunk's write depends on that chunk alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ttt_jax.ops.numerics import accumulator, dot
from ttt_jax.ops.ttt.inverse_root import inverse_root

# the quintic of Muon: singular values from 0.003 to 1 go to 0.7 .. 1.2
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
TARGET = "ttt_target"  # under this name `remat_save` keeps targets and the inverse behind them


def transformed(
    write: str,
    z_BTF,
    v_BTD,
    chunk_size: int,
    *,
    ridge: float = 1.0,
    unit: jax.typing.ArrayLike = 1.0,
    root: Callable[[jax.Array, jax.Array], jax.Array] = inverse_root,
):
    """Make targets v' such that v'^T z is what `write` writes for (z, v); in v's dtype.

    Args:
      z_BTF, v_BTD: keys and targets of whole chunks (T a multiple of `chunk_size`), one dtype.
      ridge: lambda of the ridge write.
      unit: size of the singular values of the spectral write, a number or a scalar array.
      root: `inverse_root`, or what does the same for [B, M, C, C] on a mesh.
    """
    B, T, D = v_BTD.shape
    if write == "sum":
        return v_BTD
    z_BMCF, v_BMCD = (x.reshape(B, T // chunk_size, chunk_size, -1) for x in (z_BTF, v_BTD))
    out_BMCD: Any
    with jax.named_scope(f"ttt_write_{write}"):
        if write == "ridge":
            out_BMCD = least_squares(z_BMCF, v_BMCD, ridge, root)
        else:
            out_BMCD = _spectral(z_BMCF, v_BMCD, unit)
    return out_BMCD.astype(v_BTD.dtype).reshape(B, T, D)


def _smallest(dtype):
    """Get a positive number far below any that matters, whose inverse squared still exists."""
    return float(jnp.finfo(dtype).tiny) ** 0.25


# -------------------------------------------------------------------------------------------- ridge


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def least_squares(z_BMCF, v_BMCD, ridge: float, root=inverse_root):
    """Compute A^-1 v with A = G + lambda m I, in v's dtype. One inverse serves the backward, too,
    and is kept where the backward keeps targets.

    Where a chunk's keys are alike, A^-1 is the identity less a matrix of nearly the same size, and
    in bfloat16 nothing true would be left of the difference. So it is found in float32 at least,
    and a bfloat16 model then computes with it as a sum of two bfloat16 arrays, 16 bits.

    Args:
      z_BMCF, v_BMCD: float64, float32 or bfloat16, one dtype.
      ridge, root: as in `transformed`.
    """
    return _least_squares_forward(z_BMCF, v_BMCD, ridge, root)[0]


def _least_squares_forward(z_BMCF, v_BMCD, ridge, root):
    dtype, acc = v_BMCD.dtype, accumulator(v_BMCD.dtype)
    gram_BMCC = dot("bmcf,bmkf->bmck", z_BMCF, z_BMCF, acc)
    mean_BM = jnp.mean(jnp.diagonal(gram_BMCC, axis1=2, axis2=3), axis=2)
    mean_BM = jnp.maximum(mean_BM, _smallest(acc))  # a chunk of zeros writes nothing
    root_BMCC = _terms(root(gram_BMCC, ridge * mean_BM), dtype)
    inverse_BMCC = dot("bmkc,bmkl->bmcl", root_BMCC[0], root_BMCC[0], acc)
    for low_BMCC in root_BMCC[1:]:
        cross_BMCC = dot("bmkc,bmkl->bmcl", root_BMCC[0], low_BMCC, acc)
        inverse_BMCC += cross_BMCC + jnp.swapaxes(cross_BMCC, 2, 3)
    inverse_BMCX = jnp.concatenate(_terms(inverse_BMCC, dtype), axis=3)
    inverse_BMCX = checkpoint_name(inverse_BMCX, TARGET)
    return _applied(inverse_BMCX, v_BMCD), (z_BMCF, v_BMCD, inverse_BMCX)


def _least_squares_backward(ridge, root, residuals, do_BMCD):
    """dA = -A^-1 do v^T A^-1, of which z gets dA + dA^T."""
    z_BMCF, v_BMCD, inverse_BMCX = residuals
    C, dtype, acc = v_BMCD.shape[2], v_BMCD.dtype, accumulator(v_BMCD.dtype)
    inverse_BMCC = jnp.split(inverse_BMCX, inverse_BMCX.shape[3] // C, axis=3)
    outer_BMCC = dot("bmcd,bmkd->bmck", do_BMCD, v_BMCD, acc)
    outer_BMCC = outer_BMCC + jnp.swapaxes(outer_BMCC, 2, 3)
    half_BMCC = _product(inverse_BMCC, _terms(outer_BMCC, dtype))
    da_BMCC = -_product(_terms(half_BMCC, dtype), inverse_BMCC)
    through_mean_BM1 = (
        ridge / C * jnp.sum(jnp.diagonal(da_BMCC, axis1=2, axis2=3), axis=2, keepdims=True)
    )
    da_BMCC += through_mean_BM1[..., None] * jnp.eye(C, dtype=acc)[None, None]
    da_BMCX = jnp.concatenate(_terms(da_BMCC, dtype), axis=3)
    return _applied(da_BMCX, z_BMCF), _applied(inverse_BMCX, do_BMCD)


least_squares.defvjp(_least_squares_forward, _least_squares_backward)


def _terms(x, dtype):
    """x as a sum of arrays of the compute dtype, the largest first: two of bfloat16, else one."""
    if jnp.dtype(dtype).itemsize > 2:
        return (x,)
    high = jax.lax.reduce_precision(x, 8, 7)  # XLA takes a cast there and back for nothing
    return high.astype(dtype), (x - high).astype(dtype)


def _applied(x_BMCX, y_BMCD):
    """x y, rounded to y's dtype once, with the terms of x side by side: one matmul sums them."""
    y_BMXD = jnp.tile(y_BMCD, (1, 1, x_BMCX.shape[3] // x_BMCX.shape[2], 1))
    return dot("bmcx,bmxd->bmcd", x_BMCX, y_BMXD, y_BMCD.dtype)


def _product(xs, ys):
    """x y from the terms of both, without the product of the small ones, as one matmul."""
    pairs = [(i, j) for i in range(len(xs)) for j in range(len(ys)) if i + j < 2]
    x_BMCX = jnp.concatenate([xs[i] for i, _ in pairs], axis=3)
    y_BMXC = jnp.concatenate([ys[j] for _, j in pairs], axis=2)
    return dot("bmcx,bmxk->bmck", x_BMCX, y_BMXC, accumulator(x_BMCX.dtype))


# ----------------------------------------------------------------------------------------- spectral


def _spectral(z_BMCF, v_BMCD, unit):
    """unit M^T v with M from Newton-Schulz on U = V^T M Z, where U U^T U = V^T (M G M^T V V^T
    M) Z.
    """
    a, b, c = NEWTON_SCHULZ
    C, acc = v_BMCD.shape[2], accumulator(v_BMCD.dtype)
    gram_BMCC = dot("bmcf,bmkf->bmck", z_BMCF, z_BMCF, acc)
    # Everything from here on is of size one: Z and V are divided by their Frobenius norms.
    gram_BMCC, key_BM11 = _unit_trace(gram_BMCC)
    targets_BMCC, target_BM11 = _unit_trace(dot("bmcd,bmkd->bmck", v_BMCD, v_BMCD, acc))
    square_BM11 = jnp.sum(gram_BMCC * targets_BMCC, axis=(2, 3), keepdims=True)  # ||V^T Z||_F^2
    some_BM11 = square_BM11 > _smallest(acc)
    first_BM11 = jnp.where(some_BM11, jax.lax.rsqrt(jnp.where(some_BM11, square_BM11, 1)), 0)
    # token space squares the condition number: no bf16
    product = lambda x, y: dot("bmck,bmkl->bmcl", x, y, acc)
    m_BMCC = first_BM11 * jnp.eye(C, dtype=acc)[None, None]
    for _ in range(ROUNDS):
        x_BMCC = product(product(m_BMCC, gram_BMCC), jnp.swapaxes(m_BMCC, 2, 3))
        x_BMCC = product(x_BMCC, targets_BMCC)
        xm_BMCC = product(x_BMCC, m_BMCC)
        m_BMCC = a * m_BMCC + b * xm_BMCC + c * product(x_BMCC, xm_BMCC)
    return (
        jnp.asarray(unit, acc)
        * product(jnp.swapaxes(m_BMCC, 2, 3), v_BMCD.astype(acc))
        / (key_BM11 * target_BM11)
    )


def _unit_trace(gram_BMCC):
    """G / trace G and sqrt(trace G); a G of zeros stays zeros."""
    trace_BM11 = jnp.trace(gram_BMCC, axis1=2, axis2=3)[..., None, None]
    trace_BM11 = jnp.maximum(trace_BM11, _smallest(gram_BMCC.dtype))
    return gram_BMCC / trace_BM11, jnp.sqrt(trace_BM11)
