"""All states of a stretch of chunks in one Mosaic GPU launch, with the state in registers.

Letters as in `chunk_scan.py`; n chunks of the launch. A tile of the state, 256 x 256, belongs to
one cluster for all chunks of the launch:

    for every chunk i:    R_i = bf16(state)  or  bf16(state + W)
                          state = keep_i state + left_i^T right_i

So the float32 state is read and written once a launch, not once a chunk, and no tile waits for
another cluster's. What reads R_i, the applies, are other launches: products of all chunks at once.

    forward    left = lr v, right = z, R = S or W + S       reverse    left = do, right = z, R = G

The ring between producer and consumers is that of `gpu_tiles.py`. Behind a chunk's sum, TMA writes
R_i out of a staging buffer of a consumer's whole part, while the next sum runs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_jax.kernels_pallas.gpu_schedule import BLOCK_K, TILE
from ttt_jax.kernels_pallas.gpu_tiles import (
    BLOCK_ROWS,
    CONSUMER_ROWS,
    CONSUMERS,
    Place,
    Product,
    Ring,
    accumulate,
    produce_epilogue_input,
    produce_k_step,
    read,
    read_epilogue_input,
)

PARTS = TILE // BLOCK_K  # of a consumer's rows, 64 columns each


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A launch: its sizes, and the arrays in device memory."""

    B: int
    C: int
    D: int
    F: int
    M: int  # chunks of `keep`
    n: int  # chunks of the launch
    backwards: bool
    carries: bool  # whether accumulators can start from a state
    first: Any = None  # int32: the launch's first chunk in time
    keep: Any = None  # [B M] float32
    left_BTD: Any = None
    right_BTF: Any = None
    w_DF: Any = None  # added to what is read; or None
    S_BDF: Any = None
    R_BNDF: Any = None  # N = n

    def chunk(self, step):
        """The chunk of the launch that is visited in this step."""
        return self.n - 1 - step if self.backwards else step

    def keep_of(self, b, chunk):
        return self.keep[b * self.M + self.first + chunk]

    def product(self, chunk) -> Product:
        """left^T right of a chunk, and behind it in the ring what is added to R."""
        i = self.first + chunk
        return Product(
            "tn",
            rows=self.D,
            columns=self.F,
            length=self.C,
            operands=[
                (
                    lambda b: (self.left_BTD.at[b], i * self.C),
                    lambda b: (self.right_BTF.at[b], i * self.C),
                )
            ],
            epilogue=None,  # pyright: ignore[reportArgumentType]
            epilogue_input=None if self.w_DF is None else lambda b: self.w_DF,
        )

    @property
    def added_steps(self) -> int:
        """K-steps of the ring that bring W."""
        return 0 if self.w_DF is None else PARTS

    @property
    def chunk_steps(self) -> int:
        """K-steps of the ring for one chunk."""
        return self.added_steps + self.C // BLOCK_K


def run_block(sweep: Sweep, clusters: int, stages: int, left, right, full, empty, staging):
    """Compute all tiles of a block. A thread is a warpgroup: consumers first, then the producer.

    Args:
      left, right, full, empty: the ring, as in `gpu_tiles.run_block`.
      staging: [consumers, 4, 64, 64] bfloat16.
    """
    wg, pair = jax.lax.axis_index("wg"), jax.lax.axis_index("pair")
    ring = Ring(stages, left, right, full, empty)
    rows, columns = sweep.D // TILE, sweep.F // TILE
    total = sweep.B * rows * columns
    count = (total - pair + clusters - 1) // clusters

    def each(visit):
        def one(j, _):
            t = pair + j * clusters
            b, rest = t // (rows * columns), t % (rows * columns)
            m0 = (rest % rows) * TILE + jax.lax.axis_index("block") * BLOCK_ROWS
            m0, n0 = pl.multiple_of(m0, BLOCK_ROWS), pl.multiple_of((rest // rows) * TILE, TILE)
            visit(b, m0, n0, j * (sweep.n * sweep.chunk_steps))

        jax.lax.fori_loop(0, count, one, None)

    @pl.when(wg < CONSUMERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        each(lambda *tile: _consume(sweep, ring, staging, wg, *tile))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == CONSUMERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        each(lambda *tile: _produce(sweep, ring, *tile))
        ring.drain(count * (sweep.n * sweep.chunk_steps))


def _places(sweep, b, m0, n0, first, step):
    """Where a chunk's addend of R and its operands are in the ring."""
    first = first + step * sweep.chunk_steps
    added = Place(b, m0, n0, first, jnp.int32(0))
    return added, Place(b, m0, n0, first + sweep.added_steps, jnp.int32(sweep.C // BLOCK_K))


def _produce(sweep, ring, b, m0, n0, first):
    def chunk(step, _):
        product = sweep.product(sweep.chunk(step))
        added, operands = _places(sweep, b, m0, n0, first, step)
        produce_epilogue_input(ring, product, added)
        product = product._replace(epilogue_input=None)
        left, right = (operand(b) for operand in product.operands[0])

        def copy(s, _):
            produce_k_step(ring, product, operands, left, right, s, None)

        jax.lax.fori_loop(0, operands.k_steps, copy, None)

    jax.lax.fori_loop(0, sweep.n, chunk, None)


def _consume(sweep, ring, staging, wg, b, m0, n0, first):
    own = pl.multiple_of(wg * CONSUMER_ROWS, CONSUMER_ROWS)
    own_rows = pl.ds(own, CONSUMER_ROWS)
    rows = pl.ds(pl.multiple_of(m0 + own, CONSUMER_ROWS), CONSUMER_ROWS)
    here = b, rows, pl.ds(n0, TILE)

    def chunk(step, carry):
        state, keep = carry
        i, after = sweep.chunk(step), sweep.chunk(jnp.minimum(step + 1, sweep.n - 1))
        keep_after = sweep.keep_of(b, after)  # now: a load from device memory takes its time
        product = sweep.product(i)
        added, operands = _places(sweep, b, m0, n0, first, step)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the chunk before
        for k in range(PARTS):
            part = state[:, k * BLOCK_K : (k + 1) * BLOCK_K]
            if sweep.w_DF is not None:
                w_part: Any = read_epilogue_input(ring, added, own_rows, k)
                part = part + w_part.astype(jnp.float32)
            staging[wg, k] = part.astype(staging.dtype)
        plgpu.commit_smem()
        for k in range(PARTS):
            columns = pl.ds(pl.multiple_of(n0 + k * BLOCK_K, BLOCK_K), BLOCK_K)
            to = sweep.R_BNDF.at[b, i, rows, columns]
            plgpu.copy_smem_to_gmem(staging.at[wg, k], to, commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        return _updated(sweep, ring, product, operands, own_rows, keep * state), keep_after

    start = read(sweep.S_BDF, here), sweep.keep_of(b, sweep.chunk(0))
    sweep.S_BDF[here] = jax.lax.fori_loop(0, sweep.n, chunk, start)[0]


def _updated(sweep, ring, product, place, own_rows, state):
    """The state plus a chunk's sum."""

    def add(sums):
        accumulate(ring, product, place, own_rows, sums)

    def whole_sum(sums):
        add(sums)
        return sums[...]

    if sweep.carries:
        accumulator: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
        return pl.run_state(add)(accumulator.init(state))
    shape = CONSUMER_ROWS, TILE
    return state + pl.run_scoped(
        whole_sum,
        plgpu.ACC(shape, jnp.float32),  # pyright: ignore[reportPrivateImportUsage]
    )
