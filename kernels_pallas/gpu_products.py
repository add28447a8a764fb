"""The products of all chunks with their states, for Mosaic GPU launches, and their epilogues.

Letters as in `gpu_sweep.py`. Each of a launch's chunks counts as a sequence of its own: a tile's
`b` is a chunk of one of them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_jax.kernels_pallas.gpu_tiles import CONSUMER_ROWS, Product


class Sizes(NamedTuple):
    """Chunk size, model width, MLP width."""

    C: int
    D: int
    F: int


class Staging(NamedTuple):
    """Shared memory for results on their way to device memory: [consumers, buffers, 64, 64], or 32
    of float32.
    """

    buffers: int
    staged: Any = None  # of the results' dtype

    def write(self, k, ref, values):
        """Write part k of a tile to `ref`.

        Through shared memory: registers would write eight bytes at a time.
        """
        wg, buffer = jax.lax.axis_index("wg"), k % self.buffers
        plgpu.wait_smem_to_gmem(self.buffers - 1, wait_read_only=True)
        self.staged[wg, buffer] = values.astype(ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.staged.at[wg, buffer], ref)


class Chunks(NamedTuple):
    """The chunks of a launch among all chunks Q, sequence by sequence."""

    n: int = 1  # of a sequence in the launch
    M: int = 1  # of a sequence in all
    first: Any = 0
    lr: Any = None
    staging: Any = None

    def q(self, b):
        """The chunk among all."""
        return (b // self.n) * self.M + self.first + b % self.n


def forward_products(sizes: Sizes, chunks: Chunks, z_QCF, w_DF, R_QDF, o_QCD):
    """o = z R^T + z W^T, one sum. R is the small one: its products come first."""
    slow = _rows_of(chunks, z_QCF), lambda b: (w_DF, 0)
    return [_apply("nt", sizes, chunks, z_QCF, R_QDF, _write_rows, o_QCD, more=[slow])]


def fused_products(sizes: Sizes, chunks: Chunks, z_QCF, R_QDF, o_QCD):
    """o = z R^T."""
    return [_apply("nt", sizes, chunks, z_QCF, R_QDF, _write_rows, o_QCD)]


def replay_products(sizes: Sizes, chunks: Chunks, do_QCD, R_QDF, dz_QCF):
    """dz = do R."""
    return [_apply("nn", sizes, chunks, do_QCD, R_QDF, _write_rows, dz_QCF)]


def reverse_products(sizes: Sizes, chunks: Chunks, z_QCF, v_QCD, R_QDF, dz_QCF, du_QCD):
    """du = z R^T and dz += lr v R."""
    dz = lambda b: dz_QCF.at[chunks.q(b)]
    return [
        _apply("nt", sizes, chunks, z_QCF, R_QDF, _write_rows, du_QCD),
        _apply("nn", sizes, chunks, v_QCD, R_QDF, _add_to_rows, dz_QCF, dz),
    ]


def turn_products(sizes: Sizes, chunks: Chunks, z_QCF, u_QCD, do_QCD, W_QDF, R_QDF, dz_QCF, du_QCD):
    """The same with dz = do (W + S) + u R, one sum. W is W + S."""
    fast = _rows_of(chunks, u_QCD), lambda b: (R_QDF.at[b], 0)
    return [
        _apply("nt", sizes, chunks, z_QCF, R_QDF, _write_rows, du_QCD),
        _apply("nn", sizes, chunks, do_QCD, W_QDF, _write_rows, dz_QCF, more=[fast]),
    ]


def _rows_of(chunks, x_QCX):
    return lambda b: (x_QCX.at[chunks.q(b)], 0)


def _apply(layout, sizes, chunks, left_QCX, R_QDF, write, out_QCX, read=None, more=()) -> Product:
    """left R^T ("nt") or left R ("nn"), and the products of `more` operands."""
    C, D, F = sizes
    columns, length = (D, F) if layout == "nt" else (F, D)
    return Product(
        layout,
        rows=C,
        columns=columns,
        length=length,
        operands=[(_rows_of(chunks, left_QCX), lambda b: (R_QDF.at[b], 0)), *more],
        epilogue=functools.partial(write, chunks, out_QCX),
        epilogue_input=read,
    )


# Epilogues. m0 and n0 are the first row and column of a consumer's part of the tile. What they
# return writes 64 columns: their number k, the columns, the sums [64, 64] float32, and the same
# part of the bfloat16 input.


def _rows(first):
    return pl.ds(pl.multiple_of(first, CONSUMER_ROWS), CONSUMER_ROWS)


def _write_rows(chunks, y_QCX, b, m0, n0):
    def write(k, columns, sums, _):
        chunks.staging.write(k, y_QCX.at[chunks.q(b), _rows(m0), columns], sums)

    return write


def _add_to_rows(chunks, y_QCX, b, m0, n0):
    def write(k, columns, sums, before):
        part = y_QCX.at[chunks.q(b), _rows(m0), columns]
        chunks.staging.write(k, part, before.astype(jnp.float32) + chunks.lr * sums)

    return write
