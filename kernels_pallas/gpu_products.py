"""Which matrix products the three Mosaic GPU launches compute for a chunk, and their epilogues.

Letters as in `chunk_scan.py`, where the equations are. A function `*_products` takes the sizes,
the chunk and the arrays of a launch, and returns the products by number, as `gpu_schedule.Tile`
names them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_jax.kernels_pallas.gpu_schedule import TILE
from ttt_jax.kernels_pallas.gpu_tiles import CONSUMER_ROWS, EPILOGUE_COLUMNS, Product


class Sizes(NamedTuple):
    """Chunk size, model width, MLP width."""

    C: int
    D: int
    F: int


class Staging(NamedTuple):
    """Shared memory for results on their way to device memory, [consumers, buffers, 64, 32]."""

    buffers: int
    bfloat16: Any = None
    float32: Any = None

    def write(self, k, *parts):
        """Write part k of a tile, (destination [64, 32], values) each.

        Through shared memory: registers would write eight bytes at a time.
        """
        wg, buffer = jax.lax.axis_index("wg"), k % self.buffers
        plgpu.wait_smem_to_gmem(self.buffers - 1, wait_read_only=True)
        for ref, values in parts:
            self._of(ref)[wg, buffer] = values.astype(ref.dtype)
        plgpu.commit_smem()
        for ref, _ in parts:
            plgpu.copy_smem_to_gmem(self._of(ref).at[wg, buffer], ref, commit_group=False)
        plgpu.commit_smem_to_gmem_group()

    def _of(self, ref):
        return self.float32 if ref.dtype == jnp.float32 else self.bfloat16


class Chunk:
    """A chunk of a launch, and the scalars that belong to it.

    Without arguments after `C`, only the shapes of its products are of use.
    """

    def __init__(
        self,
        C: int,
        M: int = 0,
        step: Any = 0,  # counted from the launch's first
        i: Any = 0,
        row: Any = 0,  # where it starts in `base`
        lr: Any = None,
        keep_BM: Any = None,  # flat, as `live_BM`
        live_BM: Any = None,
        staging: Staging | None = None,
    ):
        self.M, self.i, self.step = M, i, step
        self.token, self.row = i * C, row
        self.read_slot, self.write_slot = i % 2, (i + 1) % 2  # of R
        self.lr, self.keep_BM, self.live_BM = lr, keep_BM, live_BM
        self.staging: Any = staging

    def keep(self, b):
        """What the update multiplies the state before it by."""
        return self.keep_BM[b * self.M + self.i]

    def live(self, b):
        """0 where R is zero."""
        return self.live_BM[b * self.M + self.i]

    def tokens(self, array_BTX):
        """An operand: the chunk's rows of [B, T, X]."""
        return lambda b: (array_BTX.at[b], self.token)

    def fast_weight(self, R_2BDF):
        """An operand: the slot of R that the chunk reads."""
        return lambda b: (R_2BDF.at[self.read_slot, b], 0)


def forward_products(sizes: Sizes, chunk: Chunk, z_BTF, v_BTD, base_BTD, o_BTD, S_BDF, R_2BDF):
    """o = base + z R^T, and S += lr v^T z."""
    C, D, F = sizes
    apply = Product(
        "nt",
        rows=C,
        columns=D,
        length=F,
        left=chunk.tokens(z_BTF),
        right=chunk.fast_weight(R_2BDF),
        epilogue=functools.partial(_write_o, chunk, o_BTD),
        epilogue_inputs=lambda b: (base_BTD.at[b], None),
        row=chunk.row,
        live=chunk.live,
    )
    return [apply, _update(sizes, chunk, v_BTD, z_BTF, S_BDF, R_2BDF, chunk.lr)]


def fused_products(sizes: Sizes, chunk: Chunk, z_BTF, v_BTD, w_DF, o_BTD, S_BDF, R_2BDF):
    """o = z R^T, and S += lr v^T z, with R a copy of W + S."""
    apply = _plain_apply(sizes, chunk, "nt", z_BTF, R_2BDF, o_BTD)
    return [apply, _update(sizes, chunk, v_BTD, z_BTF, S_BDF, R_2BDF, chunk.lr, w_DF)]


def replay_products(sizes: Sizes, chunk: Chunk, z_BTF, v_BTD, do_BTD, w_DF, dz_BTF, S_BDF, R_2BDF):
    """dz = do R, and S += lr v^T z, with R a copy of W + S."""
    apply = _plain_apply(sizes, chunk, "nn", do_BTD, R_2BDF, dz_BTF)
    return [apply, _update(sizes, chunk, v_BTD, z_BTF, S_BDF, R_2BDF, chunk.lr, w_DF)]


def reverse_products(
    sizes: Sizes,
    chunk: Chunk,
    z_BTF,
    v_BTD,
    do_BTD,
    dz_BTF,
    dv_BTD,
    G_BDF,
    R_2BDF,
    dlr,
):
    """dv = lr z R^T with rows of dlr = <v, z R^T>, dz += lr v R, and G += do^T z."""
    C, D, F = sizes
    to_v = Product(
        "nt",
        rows=C,
        columns=D,
        length=F,
        left=chunk.tokens(z_BTF),
        right=chunk.fast_weight(R_2BDF),
        epilogue=functools.partial(_write_dv, chunk, C, dv_BTD, dlr),
        epilogue_inputs=lambda b: (None, v_BTD.at[b]),
        row=chunk.token,
    )
    to_z = Product(
        "nn",
        rows=C,
        columns=F,
        length=D,
        left=chunk.tokens(v_BTD),
        right=chunk.fast_weight(R_2BDF),
        epilogue=functools.partial(_add_to_dz, chunk, dz_BTF),
        epilogue_inputs=lambda b: (None, dz_BTF.at[b]),
        row=chunk.token,
    )
    return [to_v, to_z, _update(sizes, chunk, do_BTD, z_BTF, G_BDF, R_2BDF)]


def _plain_apply(sizes: Sizes, chunk: Chunk, layout: str, left_BTX, R_2BDF, out_BTX) -> Product:
    """out = left R^T ("nt") or left R ("nn"), written as it is."""
    C, D, F = sizes
    columns, length = (D, F) if layout == "nt" else (F, D)
    return Product(
        layout,
        rows=C,
        columns=columns,
        length=length,
        left=chunk.tokens(left_BTX),
        right=chunk.fast_weight(R_2BDF),
        epilogue=functools.partial(_write_rows, chunk, out_BTX),
        epilogue_inputs=lambda b: (None, None),
    )


def _update(
    sizes: Sizes,
    chunk,
    left_BTD,
    right_BTF,
    state,
    R,
    scale: Any = 1.0,
    w=None,
) -> Product:
    """keep state + scale left^T right, and its copy R, with W added where there is one."""
    return Product(
        "tn",
        rows=sizes.D,
        columns=sizes.F,
        length=sizes.C,
        left=chunk.tokens(left_BTD),
        right=chunk.tokens(right_BTF),
        epilogue=functools.partial(_write_state, chunk, state, R, scale, w),
        epilogue_inputs=lambda b: (state.at[b], w),
    )


# Epilogues. m0 and n0 are the first row and column of a consumer's part of the tile. What they
# return writes 32 columns: their number k, the columns, the sums [64, 32] float32, and the same
# part of the float32 and of the bfloat16 input.


def _rows(first):
    return pl.ds(pl.multiple_of(first, CONSUMER_ROWS), CONSUMER_ROWS)


def _write_o(chunk, o_BTD, b, m0, n0):
    def write(k, columns, sums, base, _):
        chunk.staging.write(k, (o_BTD.at[b, _rows(chunk.token + m0), columns], base + sums))

    return write


def _write_rows(chunk, y_BTX, b, m0, n0):
    def write(k, columns, sums, _, __):
        chunk.staging.write(k, (y_BTX.at[b, _rows(chunk.token + m0), columns], sums))

    return write


def _add_to_dz(chunk, dz_BTF, b, m0, n0):
    def write(k, columns, sums, _, dz_before):
        part = dz_BTF.at[b, _rows(chunk.token + m0), columns]
        chunk.staging.write(k, (part, dz_before.astype(jnp.float32) + chunk.lr * sums))

    return write


def _write_dv(chunk, C, dv_BTD, dlr, b, m0, n0):
    by_row = []

    def write(k, columns, sums, _, v):
        by_row.append(jnp.sum(v.astype(jnp.float32) * sums, axis=1))
        part = dv_BTD.at[b, _rows(chunk.token + m0), columns]
        chunk.staging.write(k, (part, chunk.lr * sums))
        if k == TILE // EPILOGUE_COLUMNS - 1:
            dlr[b, n0 // TILE, _rows(chunk.step * C + m0)] = sum(by_row)

    return write


def _write_state(chunk, state_BDF, R_2BDF, scale, w, b, m0, n0):
    keep = chunk.keep(b)

    def write(k, columns, sums, before, w_part):
        part = b, _rows(m0), columns
        value = keep * before + scale * sums
        copy = value if w is None else value + w_part.astype(jnp.float32)
        chunk.staging.write(
            k, (state_BDF.at[part], value), (R_2BDF.at[chunk.write_slot, *part], copy)
        )

    return write
