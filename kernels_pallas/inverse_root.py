"""The inverse of a Cholesky factor on NVIDIA GPUs in Pallas (Triton): one program per matrix.

N matrices of C x C in device memory, gone through in blocks of b x b, which fit registers and
shared memory. For the ridge write (ttt_jax/ops/ttt/writes.py): a chunk has a matrix, and a step
hundreds of chunks, so that every multiprocessor has one or two.

The root is a sum of two bfloat16 arrays, its terms, and a product of two such sums is three of
bfloat16. Those keep 16 bits. What is left of A and the elimination are float32.

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
UNIT = 256  # what larger ones are halved to a multiple of: the tile of `gpu_terms.py`


def why_not(dtype, C: int) -> str | None:
    """Say why roots for such models cannot be found on the GPUs here, or None.

    Args:
      dtype: of keys and targets.
    """
    # Compiling ahead of time, there is no device to ask.
    capability = str(getattr(jax.devices()[0], "compute_capability", "9.0"))
    major = capability.partition(".")[0]
    if not (major.isdigit() and int(major) >= 8):
        return f"it needs an NVIDIA GPU of compute capability 8.0 or more, not {capability}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it computes in terms of bfloat16, not in {jnp.dtype(dtype)}"
    return None if C % BLOCK == 0 else f"C = {C} is not a multiple of {BLOCK}"


def inverse_root_gpu(a_NCC, shift_N):
    """Lower triangular M with (A + shift I)^-1 = M^T M, for symmetric positive definite A + shift
    I, float32. Only the lower triangle of A's blocks is read.

    Returns: the two terms of M, bfloat16.
    """
    return _call(a_NCC, shift_N, BLOCK, plgpu.debug_barrier, False)


def interpreted(a_NCC, shift_N, block: int):
    """The same in Pallas' interpreter, on any platform.

    Args:
      block: b, which divides C; a power of two.
    """
    return _call(a_NCC, shift_N, block, lambda: None, True)


def _call(a_NCC, shift_N, b: int, barrier: Callable[[], None], interpret: bool):
    N, C = a_NCC.shape[:2]
    matrix = pl.BlockSpec((None, C, C), lambda n: (n, 0, 0))
    return pl.pallas_call(
        functools.partial(_by_rows, C // b, b, barrier),
        grid=(N,),
        in_specs=[matrix, pl.BlockSpec((1,), lambda n: (n,))],
        out_specs=(matrix, matrix),
        out_shape=(jax.ShapeDtypeStruct((N, C, C), jnp.bfloat16),) * 2,
        # Three stages were faster than two, and four warps than eight (H200).
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="ttt_inverse_root",
    )(a_NCC, shift_N)


def _by_rows(count: int, b: int, barrier, a_CC, shift_1, high_CC, low_CC):
    """Fill M row by row of blocks.

    With H the rows so far and Q the row of A left of its corner R: L = Q H^T, the corner M_ii is
    the inverse root of R - L L^T, and left of it is -M_ii L H. M's row holds L until it is
    overwritten, from the left: M_ij needs the L_ip from p = j on. That is two thirds of C^3
    multiplications and additions, no more than a factorisation and an inverse of its factor.
    """
    at = lambda i, j: (pl.ds(i * b, b), pl.ds(j * b, b))
    load = lambda i, j: (high_CC[at(i, j)], low_CC[at(i, j)])
    zero_bb = jnp.zeros((b, b), jnp.float32)
    diagonal_bb = _index(b, 0) == _index(b, 1)

    def store(i, j, x_bb):
        high_CC[at(i, j)], low_CC[at(i, j)] = split(x_bb)

    def row(i, _):
        def fill_l(p, _):
            def add(q, acc_bb):
                high_bb, low_bb = load(p, q)
                return acc_bb + product(split(a_CC[at(i, q)]), (high_bb.T, low_bb.T))

            store(i, p, jax.lax.fori_loop(0, p + 1, add, zero_bb))

        def subtract_square(p, acc_bb):
            high_bb, low_bb = load(i, p)
            return acc_bb - product((high_bb, low_bb), (high_bb.T, low_bb.T))

        def fill_left(j, _):
            add = lambda p, acc_bb: acc_bb + product(load(i, p), load(p, j))
            lh_bb = jax.lax.fori_loop(j, i, add, zero_bb)
            barrier()  # every thread has read L_ij
            store(i, j, -product(split(corner_bb), split(lh_bb)))

        jax.lax.fori_loop(0, i, fill_l, None)
        barrier()
        corner_bb = a_CC[at(i, i)] + jnp.where(diagonal_bb, shift_1[0], 0.0)
        corner_bb = _swept(jax.lax.fori_loop(0, i, subtract_square, corner_bb))
        jax.lax.fori_loop(0, i, fill_left, None)
        store(i, i, corner_bb)
        jax.lax.fori_loop(i + 1, count, lambda j, _: store(i, j, zero_bb), None)
        barrier()

    jax.lax.fori_loop(0, count, row, None)


def split(x):
    """Two bfloat16 arrays whose sum is x to 16 bits."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def product(x, y):
    """The product of two sums of two terms in float32, without that of the small ones."""
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    return dot(x[0], y[1]) + dot(x[1], y[0]) + dot(x[0], y[0])


def _swept(x_bb):
    """The inverse root of a block by elimination in place: after step k the columns up to k hold
    L^-1, those behind it what is left of A. That stays symmetric, so that its column k is its row
    k, which is picked by a sum, because registers have no addresses.
    """
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
