"""Transform the targets of a chunk before the ordinary update S += lr v^T z.

B batch, T tokens, D model width, F MLP width, C chunk size, M chunks, N = B M. Z is a chunk's keys
(C F), V its targets (C D), G = Z Z^T (C C).

    sum        V^T Z                                      the paper's rule; similar keys add up
    ridge      V^T Z (Z^T Z + lambda m I)^-1              least squares: z U^T closest to v
             = (A^-1 V)^T Z with A = G + lambda m I       m = mean ||z||^2: no units in lambda, lr

Ridge is C x C algebra on v: the op, its kernels, its backward, streams and shards know nothing of
it, and the writes of chunks still add up. A chunk's write depends on that chunk alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ttt_jax.ops.numerics import accumulator
from ttt_jax.ops.ttt.chunk_products import Terms, products_for
from ttt_jax.ops.ttt.inverse_root import inverse_root

TARGET = "ttt_target"  # under this name `remat_save` keeps targets and the inverse behind them


def all_chunks(function: Callable, *arrays_BMCX, wide: tuple[bool, ...], wide_out):
    """Call a function of whole chunks: `Devices.over_chunks` of one device."""
    del wide, wide_out
    return function(lambda x: x, *arrays_BMCX)


def transformed(
    write: str,
    z_BTF,
    v_BTD,
    chunk_size: int,
    *,
    ridge: float = 1.0,
    over_chunks: Callable = all_chunks,
):
    """Make targets v' such that v'^T z is what `write` writes for (z, v); in v's dtype.

    Args:
      z_BTF, v_BTD: keys and targets of whole chunks (T a multiple of `chunk_size`), one dtype.
      ridge: lambda of the ridge write.
      over_chunks: `Devices.over_chunks` of what computes.
    """
    B, T, D = v_BTD.shape
    if write == "sum":
        return v_BTD
    z_BMCF, v_BMCD = (x.reshape(B, T // chunk_size, chunk_size, -1) for x in (z_BTF, v_BTD))
    with jax.named_scope(f"ttt_write_{write}"):
        out_BMCD: Any = least_squares(z_BMCF, v_BMCD, ridge, over_chunks)
    return out_BMCD.reshape(B, T, D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def least_squares(z_BMCF, v_BMCD, ridge: float, over_chunks: Callable = all_chunks):
    """Compute A^-1 v with A = G + lambda m I, in v's dtype. One inverse serves the backward, too,
    and is kept with the result where the backward keeps targets.

    The gradient is that of a write v'^T z. In bfloat16 a cotangent that is no z G^T gets a dz that
    is right to fewer bits (`_gradients`).

    Where a chunk's keys are alike, A^-1 is the identity less a matrix of nearly the same size, and
    in bfloat16 nothing true would be left of the difference. So it is found in float32 at least,
    and a bfloat16 model then computes with it as a sum of two bfloat16 arrays, 16 bits.

    Args:
      z_BMCF, v_BMCD: float64, float32 or bfloat16, one dtype.
      ridge, over_chunks: as in `transformed`.
    """
    return _least_squares_forward(z_BMCF, v_BMCD, ridge, over_chunks)[0]


def _least_squares_forward(z_BMCF, v_BMCD, ridge, over_chunks):
    arrays, wide = (z_BMCF, v_BMCD), (True, False)
    inverse = over_chunks(functools.partial(_inverse, ridge), *arrays, wide=wide, wide_out=False)
    inverse = tuple(checkpoint_name(x_BMCC, TARGET) for x_BMCC in inverse)
    narrow = (False,) * len(inverse)
    out_BMCD = over_chunks(_applied, *arrays, *inverse, wide=(*wide, *narrow), wide_out=False)
    out_BMCD = checkpoint_name(out_BMCD, TARGET)
    return out_BMCD, (z_BMCF, out_BMCD, inverse)


def _least_squares_backward(ridge, over_chunks, residuals, do_BMCD):
    z_BMCF, out_BMCD, inverse = residuals
    arrays = z_BMCF, out_BMCD, do_BMCD, *inverse
    wide = (True,) + (False,) * (len(arrays) - 1)
    gradients = functools.partial(_gradients, ridge)
    return over_chunks(gradients, *arrays, wide=wide, wide_out=(True, False))


least_squares.defvjp(_least_squares_forward, _least_squares_backward)


# Each of these sees the shapes of all arrays, so that all three choose the same products.


def _inverse(ridge: float, sum_F: Callable, z_BMCF, v_BMCD) -> Terms:
    """A^-1. `sum_F` adds up what the devices that split F have."""
    (z_NCF,), products = _joined(z_BMCF), _products(z_BMCF, v_BMCD)
    C, acc = z_NCF.shape[1], accumulator(z_NCF.dtype)
    gram_NCC = sum_F(products.gram(z_NCF))
    mean_N = jnp.mean(jnp.diagonal(gram_NCC, axis1=1, axis2=2), axis=1)
    smallest = float(jnp.finfo(acc).tiny) ** 0.25  # far below any that matters
    mean_N = jnp.maximum(mean_N, smallest)  # a chunk of zeros writes nothing
    inverse = products.square(inverse_root(gram_NCC, ridge * mean_N, products))
    return tuple(x_NCC.reshape(*z_BMCF.shape[:2], C, C) for x_NCC in inverse)


def _applied(sum_F: Callable, z_BMCF, v_BMCD, *inverse_BMCC):
    del sum_F  # there is no F
    v_NCD, *inverse = _joined(v_BMCD, *inverse_BMCC)
    return _products(z_BMCF, v_BMCD).apply(tuple(inverse), v_NCD).reshape(v_BMCD.shape)


def _gradients(ridge: float, sum_F: Callable, z_BMCF, out_BMCD, do_BMCD, *inverse_BMCC):
    """dv = A^-1 do, and dA = -dv v'^T. z gets dA + dA^T, and with A's lambda m I twice
    lambda / C trace dA.

    One term is enough for dA, because what is written is v'^T z. Its gradient G makes do = z G^T
    and, for z, also v' G. There v' is rounded, too, and by no less: ||dv|| ||z|| <= ||G|| at
    lambda 1.
    """
    del sum_F  # each device has the gradient of its part of F
    z_NCF, out_NCD, do_NCD, *inverse = _joined(z_BMCF, out_BMCD, do_BMCD, *inverse_BMCC)
    C, acc, products = z_NCF.shape[1], accumulator(z_NCF.dtype), _products(z_BMCF, out_BMCD)
    dv_NCD = products.apply(tuple(inverse), do_NCD)
    both_NCC = products.outer(dv_NCD, out_NCD)
    trace_N = jnp.diagonal(both_NCC, axis1=1, axis2=2).astype(acc).sum(axis=1)
    dz_NCF = products.apply((both_NCC,), z_NCF, ridge / C * trace_N)
    return dz_NCF.reshape(z_BMCF.shape), dv_NCD.reshape(out_BMCD.shape)


def _products(z_BMCF, v_BMCD):
    return products_for(z_BMCF.dtype, *v_BMCD.shape[2:], z_BMCF.shape[3])


def _joined(*arrays_BMCX):
    return tuple(x.reshape(-1, *x.shape[2:]) for x in arrays_BMCX)
