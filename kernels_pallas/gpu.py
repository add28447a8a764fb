"""In-Place TTT on Hopper GPUs in Pallas (Mosaic GPU): what can run, and how launches are laid out.

Letters as in `gpu_sweep.py`. Thread blocks stay on the multiprocessors and go through tiles.

    gpu.py             what can run, and how a launch is laid out on the machine
    gpu_sweep.py       the op as sweeps over states and products of all chunks
    gpu_states.py      a sweep: states of all chunks, with tiles in registers
    gpu_products.py    what the other launches compute: products and their epilogues
    gpu_schedule.py    which cluster computes which tile of them: a table, made when traced
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

from ttt_jax.kernels_pallas import gpu_products, gpu_states, gpu_sweep
from ttt_jax.kernels_pallas.gpu_launch import Launch, launch_p
from ttt_jax.kernels_pallas.gpu_products import Sizes, Staging
from ttt_jax.kernels_pallas.gpu_schedule import BLOCK_K, TILE, ProductShape, schedule
from ttt_jax.kernels_pallas.gpu_tiles import (
    BLOCK_ROWS,
    BLOCKS,
    CONSUMER_ROWS,
    CONSUMERS,
    device_multiprocessors,
    run_block,
    shared_memory,
)

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
    return gpu_sweep.in_place_ttt(
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
    """The launches of `gpu_sweep.py`, and how they use the 227 KiB of shared memory."""

    state_stages: int = 3  # of a sweep's ring, beside whole parts on their way to device memory
    stages: int = 4  # of the ring of products
    buffers: int = 2  # of a consumer's results on their way from shared to device memory
    multiprocessors: int | None = None  # None: as many as the device has
    interpret: Any = None

    @property
    def clusters(self) -> int:
        """Pairs of multiprocessors."""
        return (self.multiprocessors or device_multiprocessors()) // BLOCKS

    def states(self, C, chunks, backwards, right_BTF, left_BTD, keep_BM, w_DF, S_BDF):
        """Sweep over `chunks`. Returns R [B, n, D, F] of these, and the state behind."""
        (B, D, F), M, n = S_BDF.shape, keep_BM.shape[1], len(chunks)
        sweep = gpu_states.Sweep(B, C, D, F, M, n, backwards, carries=not self.interpret)
        R_BNDF = jax.lax.empty((B, n, D, F), right_BTF.dtype)
        names = ["first", "keep", "left_BTD", "right_BTF"]
        operands = [_scalar(chunks.start), keep_BM.reshape(-1), left_BTD, right_BTF]
        if w_DF is not None:
            names, operands = [*names, "w_DF"], [*operands, w_DF]
        names += ["S_BDF", "R_BNDF"]
        body = functools.partial(_sweep, sweep, names, self.clusters, self.state_stages)
        staging = CONSUMERS, gpu_states.PARTS, CONSUMER_ROWS, BLOCK_K
        scratch = (*self._ring(self.state_stages), shared_memory(staging, jnp.bfloat16))
        key = "states", sweep
        S_BDF, R_BNDF = self._launch("ttt_states", body, scratch, key, operands, [S_BDF, R_BNDF])
        return R_BNDF, S_BDF

    def forward(self, C, chunks, z_BTF, w_DF, R_BNDF, o_BTD):
        """Return o, with these chunks written. No W: R holds it."""
        if w_DF is None:
            function, operands = gpu_products.fused_products, (z_BTF, R_BNDF)
        else:
            function, operands = gpu_products.forward_products, (z_BTF, w_DF, R_BNDF)
        return self._applies(C, chunks, function, operands, (o_BTD,))[0]

    def replay(self, C, chunks, do_BTD, R_BNDF, dz_BTF):
        """Return dz, with these chunks written."""
        function, operands = gpu_products.replay_products, (do_BTD, R_BNDF)
        return self._applies(C, chunks, function, operands, (dz_BTF,))[0]

    def reverse(self, C, chunks, lr, z_BTF, v_BTD, R_BNDF, dz_BTF, du_BTD):
        """Return dz and du, with these chunks written."""
        operands, in_place = (z_BTF, v_BTD, R_BNDF), (dz_BTF, du_BTD)
        return self._applies(C, chunks, gpu_products.reverse_products, operands, in_place, lr=lr)

    def turn(self, C, chunks, z_BTF, u_BTD, do_BTD, W_BNDF, R_BNDF, dz_BTF, du_BTD):
        """Return dz and du, with these chunks written; `W_BNDF` are copies of W + S."""
        operands, in_place = (z_BTF, u_BTD, do_BTD, W_BNDF, R_BNDF), (dz_BTF, du_BTD)
        return self._applies(C, chunks, gpu_products.turn_products, operands, in_place)

    def _applies(self, C, chunks, products, operands, in_place, lr=0.0):
        """Launch products of these chunks. `in_place` and `operands` are [B, T, X], W or R."""
        (B, n, D, F), M = operands[-1].shape, operands[0].shape[1] // C
        sizes = Sizes(C, D, F)
        no_arrays = [None] * (len(operands) + len(in_place))
        # The shapes of the products do not depend on what they read.
        shapes = tuple(
            ProductShape(p.rows, p.columns, p.k_steps * BLOCK_K)
            for p in products(sizes, gpu_products.Chunks(), *no_arrays)
        )
        table = jnp.asarray(schedule(shapes, B * n, self.clusters))
        rows = {3: (-1, C), 4: (-1, D)}  # of a chunk; W stays as it is
        by_chunk = lambda x: x.reshape(*rows[x.ndim], x.shape[-1]) if x.ndim in rows else x
        scalars = table, _scalar(chunks.start), jnp.asarray(lr, jnp.float32).reshape(1)
        arrays = *scalars, *map(by_chunk, operands)
        body = functools.partial(_products, products, sizes, n, M, self.stages, self.buffers)
        staging = CONSUMERS, self.buffers, CONSUMER_ROWS, BLOCK_K
        scratch = (*self._ring(self.stages), shared_memory(staging, jnp.bfloat16))
        name = "ttt_" + products.__name__.removesuffix("_products")
        key = name, sizes, n, M
        written = self._launch(name, body, scratch, key, arrays, [by_chunk(x) for x in in_place])
        return [x.reshape(y.shape) for x, y in zip(written, in_place, strict=True)]

    def _ring(self, stages):
        """Operands, as `gpu_tiles.run_block` takes them, and their barriers."""

        def operands(rows):
            shapes = (stages, rows, BLOCK_K), (stages, BLOCK_K, rows)
            return [shared_memory(shape, jnp.bfloat16) for shape in shapes]

        # The interpreter watches a union as a whole, and takes the use of one stage for that of
        # another.
        one_ring = (lambda *views: views) if self.interpret else plgpu.RefUnion
        return (
            one_ring(*operands(BLOCK_ROWS)),
            one_ring(*operands(TILE)),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.ClusterBarrier(
                collective_axes=("block",), num_arrivals=CONSUMERS, num_barriers=stages
            ),
        )

    def _launch(self, name, body, scratch, key, operands, in_place):
        """Run `body` in every warpgroup of every block. Returns `in_place`, updated."""
        mesh = plgpu.Mesh(
            grid=(self.clusters,),
            grid_names=("pair",),
            cluster=(BLOCKS,),
            cluster_names=("block",),
            num_threads=CONSUMERS + 1,
            thread_name="wg",
        )

        def scoped(*arrays):
            run = functools.partial(body, *arrays)
            return pl.run_scoped(run, *scratch, collective_axes="wg")

        kernel = pl.kernel(
            scoped,
            mesh=mesh,
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
            interpret=self.interpret or False,
            name=name,
        )

        def launch(*arrays):
            refs = [jax.new_ref(x) for x in arrays[: len(in_place)]]
            kernel(*arrays[len(in_place) :], *refs)
            return tuple(ref[...] for ref in refs)

        arrays = (*in_place, *operands)
        if self.interpret:
            return launch(*arrays)
        types = tuple((x.shape, x.dtype) for x in arrays)
        program = Launch(launch, self, key, types)
        return launch_p.bind(*arrays, launch=program, results=len(in_place))


def _sweep(sweep, names, clusters, stages, *arrays):
    """What a warpgroup of a sweep runs."""
    arrays, scratch = arrays[: len(names)], arrays[len(names) :]
    sweep = dataclasses.replace(sweep, **dict(zip(names, arrays, strict=True)))
    sweep = dataclasses.replace(sweep, first=sweep.first[0])
    gpu_states.run_block(sweep, clusters, stages, *scratch)


def _products(products, sizes, n, M, stages, buffers, table, first, lr, *arrays):
    """What a warpgroup of a launch of products runs."""
    *arrays, left, right, full, empty, staged = arrays
    staging = Staging(buffers, staged)
    chunks = gpu_products.Chunks(n=n, M=M, first=first[0], lr=lr[0], staging=staging)
    found = products(sizes, chunks, *arrays)
    run_block(found, table, stages, left, right, full, empty)


def _scalar(x):
    return jnp.asarray(x, jnp.int32).reshape(1)
