"""The inverse of a Cholesky factor on NVIDIA GPUs in Pallas (Triton): a program per matrix.

N matrices of C x C, in blocks of b x b.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

THREE_PASSES = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def inverse_root_gpu(
    a_NCC, shift_N, *, block: int = 64, warps: int = 4, stages: int = 2, precision=THREE_PASSES,
    interpret: bool = False
):  # fmt: skip
    """Lower triangular M with (A + shift I)^-1 = M^T M."""
    N, C = a_NCC.shape[:2]
    matrix = pl.BlockSpec((None, C, C), lambda n: (n, 0, 0))
    barrier = (lambda: None) if interpret else plgpu.debug_barrier
    return pl.pallas_call(
        functools.partial(_by_rows, C // block, block, precision, barrier),
        grid=(N,),
        in_specs=[matrix, pl.BlockSpec((1,), lambda n: (n,))],
        out_specs=matrix,
        out_shape=jax.ShapeDtypeStruct((N, C, C), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name="inverse_root",
    )(a_NCC, shift_N)


def _by_rows(count, b, precision, barrier, a_CC, shift_1, m_CC):
    """Row by row of blocks.

    With H the rows so far and Q the row of A: L = Q H^T, M_ii from A_ii - L L^T, M_i = -M_ii L H.
    """
    dot = functools.partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)
    at = lambda i, j: (pl.ds(i * b, b), pl.ds(j * b, b))
    zero = jnp.zeros((b, b), jnp.float32)
    eye = jax.lax.broadcasted_iota(jnp.int32, (b, b), 0) == jax.lax.broadcasted_iota(
        jnp.int32, (b, b), 1
    )

    def row(i, _):
        def below(p, _):
            def add(q, acc):
                return acc + dot(a_CC[at(i, q)], m_CC[at(p, q)].T)

            m_CC[at(i, p)] = jax.lax.fori_loop(0, p + 1, add, zero)

        jax.lax.fori_loop(0, i, below, None)
        barrier()

        def schur(p, acc):
            l_bb = m_CC[at(i, p)]
            return acc - dot(l_bb, l_bb.T)

        first = a_CC[at(i, i)] + jnp.where(eye, shift_1[0], 0.0)
        corner = _swept(jax.lax.fori_loop(0, i, schur, first))

        def left(j, _):
            def add(p, acc):
                return acc + dot(m_CC[at(i, p)], m_CC[at(p, j)])

            below = jax.lax.fori_loop(j, i, add, zero)
            barrier()  # L_ij has been read by all threads
            m_CC[at(i, j)] = -dot(corner, below)

        jax.lax.fori_loop(0, i, left, None)
        m_CC[at(i, i)] = corner

        def above(j, _):
            m_CC[at(i, j)] = zero

        jax.lax.fori_loop(i + 1, count, above, None)
        barrier()

    jax.lax.fori_loop(0, count, row, None)


def _swept(x_bb):
    """The inverse root of a block by elimination in place: columns up to k hold L^-1, those after
    it what is left of A."""
    b = x_bb.shape[0]
    i_bb = jax.lax.broadcasted_iota(jnp.int32, (b, b), 0)
    j_bb = jax.lax.broadcasted_iota(jnp.int32, (b, b), 1)
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
