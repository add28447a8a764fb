"""In-Place TTT on Hopper GPUs in Pallas (Mosaic GPU): the three launches of `chunk_scan.py`.

Letters as there. Thread blocks stay on the multiprocessors and go through output tiles of several
products and chunks. Applies, which sum over all of F, run next to updates, which move the state, so
that arithmetic and traffic overlap.

    gpu.py             what can run, and how a launch is laid out on the machine
    gpu_products.py    what a launch computes: its products and their epilogues
    gpu_schedule.py    which cluster computes which tile, in which order: a table, made when traced
    gpu_tiles.py       how a block computes tiles: the pipeline, with a picture
    gpu_launch.py      a launch as a primitive of jax
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_jax.kernels_pallas import chunk_scan
from ttt_jax.kernels_pallas.gpu_launch import Launch, launch_p
from ttt_jax.kernels_pallas.gpu_products import (
    Chunk,
    Sizes,
    Staging,
    forward_products,
    fused_products,
    replay_products,
    reverse_products,
)
from ttt_jax.kernels_pallas.gpu_schedule import BLOCK_K, TILE, schedule
from ttt_jax.kernels_pallas.gpu_tiles import (
    BLOCK_ROWS,
    BLOCKS,
    CONSUMER_ROWS,
    CONSUMERS,
    EPILOGUE_COLUMNS,
    run_block,
)

MOST_TILES, MOST_CHUNKS = 16384, 64  # of a launch

_interpreted: contextvars.ContextVar[MosaicLaunches | None] = contextvars.ContextVar(
    "interpreted", default=None
)


@contextlib.contextmanager
def interpreted(params, multiprocessors: int = 4):
    """Run kernels that are traced inside in Pallas' interpreter, on any platform.

    For tests: very slow.

    Args:
      params: `plgpu.InterpretGPUParams`.
      multiprocessors: of the simulated machine.
    """
    launches = MosaicLaunches(multiprocessors=multiprocessors, interpret=params)
    token = _interpreted.set(launches)
    try:
        yield
    finally:
        _interpreted.reset(token)


def why_not(platform: str, dtype, C: int, D: int, F: int) -> str | None:
    """Say why these inputs cannot run here, or None."""
    if _interpreted.get() is None:
        if platform not in ("gpu", "cuda"):
            return f"it needs an NVIDIA GPU, and the platform is {platform}"
        # Compiling ahead of time, there is no device to ask.
        capability = str(getattr(jax.devices()[0], "compute_capability", "9.0"))
        if not capability.startswith("9."):
            return f"it needs a Hopper GPU (compute capability 9.0), and this one has {capability}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it computes in bfloat16, not in {jnp.dtype(dtype)}"
    for name, size in (("chunk_size", C), ("D", D), ("F", F)):
        if size % TILE:
            return f"{name} = {size} is not a multiple of {TILE}"
    return None


def in_place_ttt_gpu(
    z_BTF, v_BTD, w_DF, *, lr, chunk_size, state_BDF, keep_BM=None, apply: str = "split"
):
    """Apply and update the fast weight: section 3 of arXiv 2604.06169, o_i = z_i (W + S_i)^T.

    Same contract as `in_place_ttt_xla`. C, D and F are multiples of 256; `why_not` says what else
    is needed.

    Args:
      z_BTF, v_BTD, w_DF: bfloat16.
      lr: float32 scalar.
      chunk_size: C.
      state_BDF: float32, S_0.
      keep_BM: float32, 0 where the state before an update is dropped; None: no documents.

    Returns:
      o_BTD bfloat16, and the state after the last whole chunk, float32.
    """
    launches = _interpreted.get() or MosaicLaunches()
    return chunk_scan.in_place_ttt(
        launches,
        z_BTF,
        v_BTD,
        w_DF,
        lr=lr,
        chunk_size=chunk_size,
        state_BDF=state_BDF,
        keep_BM=keep_BM,
        apply=apply,
    )


@dataclasses.dataclass(frozen=True)
class MosaicLaunches:
    """The three launches, and how they use the 227 KiB of shared memory (docs/performance.md)."""

    stages: int = 4  # of the ring
    buffers: int = 1  # of a consumer's results on their way from shared to device memory
    together: int = 1 << 30  # sequences whose chunks go before those of others
    latency: int = 0  # k-steps from a tile to those that wait for it
    multiprocessors: int | None = None  # None: as many as the device has
    interpret: Any = None

    def make_u(self, v_BTD, lr):
        """Return v: sums are multiplied by lr, so no array of lr v is made, and none is rounded."""
        return v_BTD

    def chunks_per_launch(self, B, C, D, F):
        """Take as many chunks as keep the table of tiles small.

        Tiles of several chunks wait for each other, so all blocks must run at the same time. One
        chunk, therefore, where other kernels, NCCL's, may hold multiprocessors. And in the
        interpreter, which has no semaphores.
        """
        if self.interpret or jax.sharding.get_abstract_mesh().size > 1:
            return 1
        tiles = D * F + 2 * C * (D + F)  # at most, in the backward
        return max(1, min(MOST_CHUNKS, MOST_TILES * TILE**2 // (B * tiles)))

    def forward(self, C, n, scalars, z_BTF, u_BTD, base_BTD, o_BTD, S_BDF, R_2BDF):
        """See `chunk_scan.Launches`."""
        sizes = Sizes(C, u_BTD.shape[2], z_BTF.shape[2])
        operands, in_place = (z_BTF, u_BTD, base_BTD), (o_BTD, S_BDF, R_2BDF)
        return self._call("ttt_forward", forward_products, sizes, n, scalars, operands, in_place)

    def fused(self, C, n, scalars, z_BTF, u_BTD, w_DF, o_BTD, S_BDF, R_2BDF):
        """See `chunk_scan.Launches`."""
        sizes = Sizes(C, u_BTD.shape[2], z_BTF.shape[2])
        operands, in_place = (z_BTF, u_BTD, w_DF), (o_BTD, S_BDF, R_2BDF)
        return self._call("ttt_fused", fused_products, sizes, n, scalars, operands, in_place)

    def replay(self, C, n, scalars, z_BTF, u_BTD, do_BTD, w_DF, dz_BTF, S_BDF, R_2BDF):
        """See `chunk_scan.Launches`."""
        sizes = Sizes(C, u_BTD.shape[2], z_BTF.shape[2])
        operands, in_place = (z_BTF, u_BTD, do_BTD, w_DF), (dz_BTF, S_BDF, R_2BDF)
        return self._call("ttt_replay", replay_products, sizes, n, scalars, operands, in_place)

    def reverse(self, C, n, scalars, z_BTF, u_BTD, v_BTD, do_BTD, dz_BTF, dv_BTD, G_BDF, R_2BDF):
        """See `chunk_scan.Launches`. The partial sums of dlr are [B, D / 256, n C]."""
        (B, _, F), D = z_BTF.shape, v_BTD.shape[2]
        partial_dlr = jnp.zeros((B, D // TILE, n * C), jnp.float32)
        operands = z_BTF, v_BTD, do_BTD
        in_place = dz_BTF, dv_BTD, G_BDF, R_2BDF, partial_dlr
        return self._call(
            "ttt_reverse", reverse_products, Sizes(C, D, F), -n, scalars, operands, in_place
        )

    def _call(self, name, products, sizes, n, scalars, operands, in_place):
        """Launch |n| chunks, backwards where n is negative.

        Args:
          name: of the kernel.
          products: one of the functions of `gpu_products.py`.

        Returns: the arrays of `in_place`, updated.
        """
        B, M = scalars.keep_BM.shape
        multiprocessors = self.multiprocessors or _multiprocessors()
        clusters = multiprocessors // BLOCKS
        # The shapes of the products do not depend on what they read.
        no_arrays = [None] * (len(operands) + len(in_place))
        shapes = tuple(
            (p.rows, p.columns, p.length, p.updates)
            for p in products(sizes, Chunk(sizes.C), *no_arrays)
        )
        table = jnp.asarray(schedule(shapes, B, clusters, abs(n), self.together, self.latency))
        body = functools.partial(_body, products, sizes, n, B, M, self.stages, self.buffers)
        kernel = self._kernel(name, body, clusters)
        flat_scalars = tuple(x.reshape(-1) for x in scalars)

        def launch(*arrays):
            refs = [jax.new_ref(x) for x in arrays[: len(in_place)]]
            kernel(*arrays[len(in_place) :], *refs)
            return tuple(ref[...] for ref in refs)

        arrays = (*in_place, table, *flat_scalars, *operands)
        if self.interpret:
            return launch(*arrays)
        types = tuple((x.shape, x.dtype) for x in arrays)
        program = Launch(launch, self, name, sizes.C, n, types)
        return tuple(launch_p.bind(*arrays, launch=program, results=len(in_place)))

    def _kernel(self, name, body, clusters):
        """The kernel that runs `body` in every warpgroup of every block."""
        mesh = plgpu.Mesh(
            grid=(clusters,),
            grid_names=("pair",),
            cluster=(BLOCKS,),
            cluster_names=("block",),
            num_threads=CONSUMERS + 1,
            thread_name="wg",
        )
        scratch = self._scratch()

        def scoped(*arrays):
            run = functools.partial(body, *arrays)
            return pl.run_scoped(run, *scratch, collective_axes="wg")

        return pl.kernel(
            scoped,
            mesh=mesh,
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
            interpret=self.interpret or False,
            name=name,
        )

    def _scratch(self):
        """Shared memory and barriers of a block: the ring, as `gpu_tiles.run_block` takes it, and
        the staging buffers in bfloat16 and float32."""

        def operands(rows):
            shapes = (self.stages, rows, BLOCK_K), (self.stages, BLOCK_K, rows)
            return [_shared_memory(shape, jnp.bfloat16) for shape in shapes]

        float32 = _shared_memory((self.stages, BLOCK_ROWS, BLOCK_K), jnp.float32)
        staging = CONSUMERS, self.buffers, CONSUMER_ROWS, EPILOGUE_COLUMNS
        # The interpreter watches a union as a whole, and takes the use of one stage for that of
        # another.
        one_ring = (lambda *views: views) if self.interpret else plgpu.RefUnion
        return (
            one_ring(*operands(BLOCK_ROWS)),
            one_ring(*operands(TILE), float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=self.stages),
            plgpu.ClusterBarrier(
                collective_axes=("block",), num_arrivals=CONSUMERS, num_barriers=self.stages
            ),
            _shared_memory(staging, jnp.bfloat16),
            _shared_memory(staging, jnp.float32),
        )


def _body(products, sizes, n, B, M, stages, buffers, table, i, row, lr, keep, live, *arrays):
    """What a warpgroup runs. `arrays`: operands, results, and `_scratch`."""
    *arrays, left, right, full, empty, bfloat16, float32 = arrays
    finished = None
    if abs(n) > 1:
        finished = pl.get_global(plgpu.SemaphoreType.REGULAR((abs(n), B, 2)))
    staging = Staging(buffers, bfloat16, float32)

    def products_of(step):
        i_now = i[0] + (step if n > 0 else -step)
        row_now = row[0] + step * sizes.C
        chunk = Chunk(sizes.C, M, step, i_now, row_now, lr[0], keep, live, staging)
        return products(sizes, chunk, *arrays)

    run_block(products_of, table, finished, stages, left, right, full, empty)


def _shared_memory(shape, dtype):
    """Shared memory, tiled and swizzled as TMA and wgmma want it: rows of at most 128 bytes."""
    itemsize = jnp.dtype(dtype).itemsize
    columns = min(shape[-1], 128 // itemsize)
    transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns * itemsize)
    return plgpu.SMEM(shape, dtype=dtype, transforms=transforms)


def _multiprocessors() -> int:
    return getattr(jax.devices()[0], "core_count", 132)
