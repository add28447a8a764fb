"""The inverse of a Cholesky factor on NVIDIA GPUs in Pallas (Triton): one program per matrix.

N matrices of C x C in device memory, gone through in blocks of b x b, which fit registers and
shared memory. For the ridge write (ttt_jax/ops/ttt/writes.py): a chunk has a matrix, and a step
hundreds of chunks, so that every multiprocessor has one or two.

jax calls Pallas' Triton backend deprecated from 0.11 on; 0.12 still has it. The same in the
Triton language is 60 lines (`triton_kernels.py` is its place), but needs jax-triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

BLOCK = 64
# Rows of a matrix. A program has one multiprocessor, and its time grows with C^3: 5.5 ms at 1024
# rows (H200).
LARGEST = 512
# What a product rounds comes back multiplied by the condition number, 500 and more.
THREE_PASSES = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def why_not(dtype, C: int) -> str | None:
    """Say why such matrices cannot run on the GPUs here, or None."""
    # Compiling ahead of time, there is no device to ask.
    capability = str(getattr(jax.devices()[0], "compute_capability", "9.0"))
    major = capability.partition(".")[0]
    if not (major.isdigit() and int(major) >= 8):
        return f"it needs an NVIDIA GPU of compute capability 8.0 or more, not {capability}"
    if jnp.dtype(dtype) != jnp.float32:
        return f"it computes in float32, not in {jnp.dtype(dtype)}"
    return None if C % BLOCK == 0 else f"C = {C} is not a multiple of {BLOCK}"


def inverse_root_gpu(a_NCC, shift_N):
    """Lower triangular M with (A + shift I)^-1 = M^T M, for symmetric positive definite A + shift
    I, all float32. Only the lower triangle of A's blocks is read.
    """
    return _call(a_NCC, shift_N, BLOCK, THREE_PASSES, plgpu.debug_barrier, False)


def interpreted(a_NCC, shift_N, block: int):
    """The same in Pallas' interpreter, on any platform, with products in float32.

    Args:
      block: b, which divides C; a power of two.
    """
    return _call(a_NCC, shift_N, block, jax.lax.Precision.HIGHEST, lambda: None, True)


def _call(a_NCC, shift_N, b: int, precision, barrier: Callable[[], None], interpret: bool):
    N, C = a_NCC.shape[:2]
    matrix = pl.BlockSpec((None, C, C), lambda n: (n, 0, 0))
    return pl.pallas_call(
        functools.partial(_by_rows, C // b, b, precision, barrier),
        grid=(N,),
        in_specs=[matrix, pl.BlockSpec((1,), lambda n: (n,))],
        out_specs=matrix,
        out_shape=jax.ShapeDtypeStruct((N, C, C), jnp.float32),
        # One stage was faster than two, four warps than eight, and b = 64 than 32 (H200).
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="ttt_inverse_root",
    )(a_NCC, shift_N)


def _by_rows(count: int, b: int, precision, barrier, a_CC, shift_1, m_CC, swept=None):
    """Fill M row by row of blocks.

    With H the rows so far and Q the row of A left of its corner R: L = Q H^T, the corner M_ii is
    the inverse root of R - L L^T, and left of it is -M_ii L H. M's row holds L until it is
    overwritten, from the left: M_ij needs the L_ip from p = j on. That is two thirds of C^3
    multiplications and additions, no more than a factorisation and an inverse of its factor.
    """
    dot = functools.partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)
    at = lambda i, j: (pl.ds(i * b, b), pl.ds(j * b, b))
    zero_bb = jnp.zeros((b, b), jnp.float32)
    diagonal_bb = _index(b, 0) == _index(b, 1)

    def row(i, _):
        def fill_l(p, _):
            add = lambda q, acc_bb: acc_bb + dot(a_CC[at(i, q)], m_CC[at(p, q)].T)
            m_CC[at(i, p)] = jax.lax.fori_loop(0, p + 1, add, zero_bb)

        def subtract_square(p, acc_bb):
            l_bb = m_CC[at(i, p)]
            return acc_bb - dot(l_bb, l_bb.T)

        def fill_left(j, _):
            add = lambda p, acc_bb: acc_bb + dot(m_CC[at(i, p)], m_CC[at(p, j)])
            lh_bb = jax.lax.fori_loop(j, i, add, zero_bb)
            barrier()  # every thread has read L_ij
            m_CC[at(i, j)] = -dot(corner_bb, lh_bb)

        def fill_above(j, _):
            m_CC[at(i, j)] = zero_bb

        jax.lax.fori_loop(0, i, fill_l, None)
        barrier()
        corner_bb = a_CC[at(i, i)] + jnp.where(diagonal_bb, shift_1[0], 0.0)
        corner_bb = (swept or _swept)(jax.lax.fori_loop(0, i, subtract_square, corner_bb))
        jax.lax.fori_loop(0, i, fill_left, None)
        m_CC[at(i, i)] = corner_bb
        jax.lax.fori_loop(i + 1, count, fill_above, None)
        barrier()

    jax.lax.fori_loop(0, count, row, None)


def _swept(x_bb):
    """The inverse root of a block by elimination in place: after step k the columns up to k hold
    L^-1, those behind it what is left of A. Rows and columns are picked by sums, because registers
    have no addresses.
    """
    b = x_bb.shape[0]
    i_bb, j_bb = _index(b, 0), _index(b, 1)
    i_b = jax.lax.broadcasted_iota(jnp.int32, (b,), 0)

    def sweep(k, x_bb):
        row_b = jnp.sum(jnp.where(i_bb == k, x_bb, 0.0), axis=0)
        column_b = jnp.sum(jnp.where(j_bb == k, x_bb, 0.0), axis=1)
        scale = jax.lax.rsqrt(jnp.sum(jnp.where(i_b == k, row_b, 0.0)))
        row_b = jnp.where(i_b == k, 1.0, row_b) * scale
        below_b = jnp.where(i_b > k, column_b, 0.0) * scale
        x_bb = jnp.where(j_bb == k, 0.0, x_bb) - below_b[:, None] * row_b[None, :]
        return jnp.where(i_bb == k, jnp.where(j_bb <= k, row_b[None, :], 0.0), x_bb)

    return jax.lax.fori_loop(0, b, sweep, x_bb)


def _swept_by_rows(x_bb):
    """The same with one sum a step: what is left of A is symmetric, so its column is its row."""
    b = x_bb.shape[0]
    i_bb, j_bb = _index(b, 0), _index(b, 1)
    i_b = jax.lax.broadcasted_iota(jnp.int32, (b,), 0)

    def sweep(k, x_bb):
        row_b = jnp.sum(jnp.where(i_bb == k, x_bb, 0.0), axis=0)
        scale = jax.lax.rsqrt(jnp.sum(jnp.where(i_b == k, row_b, 0.0)))
        row_b = jnp.where(i_b == k, 1.0, row_b) * scale
        below_b = jnp.where(i_b > k, row_b, 0.0)
        x_bb = jnp.where(j_bb == k, 0.0, x_bb) - below_b[:, None] * row_b[None, :]
        return jnp.where(i_bb == k, jnp.where(j_bb <= k, row_b[None, :], 0.0), x_bb)

    return jax.lax.fori_loop(0, b, sweep, x_bb)


def _index(b: int, axis: int):
    return jax.lax.broadcasted_iota(jnp.int32, (b, b), axis)
