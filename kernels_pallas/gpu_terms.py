"""Products of matrices that are sums of bfloat16 terms, on Hopper GPUs in Pallas (Mosaic GPU).

N products of X (R x K) and Y (K x S), with the pipeline of `gpu_tiles.py`. For the ridge write
(ttt_jax/ops/ttt/writes.py), whose C x C matrices are sums of two bfloat16 arrays, the terms: a tile
sums the products of several pairs of terms, one pair after the other, in the same registers. Its
epilogue takes a result apart into terms. cuBLAS would need the terms side by side in memory, the
other factor once for each, and passes for the rest.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_jax.kernels_pallas.gpu_launch import apart
from ttt_jax.kernels_pallas.gpu_products import Staging
from ttt_jax.kernels_pallas.gpu_schedule import BLOCK_K, TILE
from ttt_jax.kernels_pallas.gpu_tiles import (
    BLOCK_ROWS,
    BLOCKS,
    CONSUMER_ROWS,
    CONSUMERS,
    Place,
    Product,
    Ring,
    consume,
    device_multiprocessors,
    shared_memory,
)

ONE = ((0, 0),)
OF_FOUR = ((0, 0), (0, 1), (1, 0))  # of two terms and two, without that of the small ones
TERMS = ("bfloat16", "bfloat16")
STAGES = 4  # of the ring: three were slower
BUFFERS = 2  # of results on their way to device memory: one was slower (H200)


@dataclasses.dataclass(frozen=True)
class Sums:
    """What a launch computes.

    Attributes:
      kind: as in `gpu_tiles.py`: "nn" X Y, "nt" X Y^T, "tn" X^T Y, of the arrays as they lie.
        With a symmetric X "nn".
      pairs: terms (i of X, j of Y) whose products are summed.
      out: dtypes of the result, or of its terms.
      lower: only tiles that touch the lower triangle are computed; the others hold anything. So it
        is with symmetric results.
      symmetric: X is, and is read in tiles that touch the lower triangle only.
      triangular: X and Y are lower triangular, and what is zero is left out.
      negative: minus the sum.
    """

    kind: Literal["nt", "nn", "tn"]
    pairs: tuple[tuple[int, int], ...]
    out: tuple[str, ...] = TERMS
    lower: bool = False
    symmetric: bool = False
    triangular: bool = False
    negative: bool = False

    def sizes(self, x, y) -> tuple[int, int, int]:
        """R, S and K."""
        R, K = x.shape[:0:-1] if self.kind == "tn" else x.shape[1:]
        return R, y.shape[1 if self.kind == "nt" else 2], K

    @property
    def epilogue_columns(self) -> int:
        """Columns that are written at once: 128 bytes."""
        return 128 // jnp.dtype(self.out[0]).itemsize

    def ranges(self, m0, first, K_steps: int):
        """Kind, first k-step and end of each part of a tile's sum: what lies above the diagonal of
        a symmetric matrix is read below it, transposed.
        """
        if not self.symmetric:
            return [(self.kind, first, K_steps)]
        middle = (m0 + TILE) // BLOCK_K
        return [("nn", 0, middle), ("tn", middle, K_steps)]

    def tiles(self, R: int, S: int) -> np.ndarray:
        """First row, first column and first k-step of each tile of a matrix."""
        found = [(m, n) for m in range(0, R, TILE) for n in range(0, S, TILE)]
        rows = [
            (m, n, max(m, n) // BLOCK_K if self.triangular else 0)
            for m, n in found
            if n <= m or not self.lower
        ]
        return np.asarray(rows, np.int32)


@functools.partial(jax.jit, static_argnames=("sums", "interpret"))
def multiply(xs, ys, sums: Sums, start=None, shift_N=None, interpret: Any = None):
    """Compute the sum of the products of terms, plus shift times `start`.

    Args:
      xs, ys: terms, bfloat16 [N, ., .]. R and S are multiples of 256, K of 64.
      start: bfloat16 [N, R, S], or None.
      shift_N: float32.
      interpret: None, or `plgpu.InterpretGPUParams`.

    Returns: the result, or its terms, as a list.
    """
    extra = () if start is None else (shift_N, start)

    # Under `jax.vmap` there are more products, and still one launch.
    @jax.custom_batching.custom_vmap
    def run(*arrays):
        return _launch(sums, len(xs), len(ys), interpret, arrays)

    @run.def_vmap
    def _(size, batched, *arrays):
        spread = [
            x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_batched in zip(arrays, batched, strict=True)
        ]
        results = run(*(x.reshape(-1, *x.shape[2:]) for x in spread))
        results = [x.reshape(size, -1, *x.shape[1:]) for x in results]
        return results, [True] * len(results)

    return run(*xs, *ys, *extra)


def _launch(sums, count_x, count_y, interpret, arrays):
    """`arrays`: terms of X and of Y, and, where there is one, shift and start."""
    xs, ys, extra = _parts(arrays, count_x, count_y)
    N, sizes = xs[0].shape[0], sums.sizes(xs[0], ys[0])
    clusters = (4 if interpret else device_multiprocessors()) // BLOCKS
    # The interpreter takes the use of one stage of a union for that of another.
    one_ring = (lambda *views: views) if interpret else plgpu.RefUnion

    def operands(rows):
        shapes = (STAGES, rows, BLOCK_K), (STAGES, BLOCK_K, rows)
        return [shared_memory(shape, jnp.bfloat16) for shape in shapes]

    scratch = (
        one_ring(*operands(BLOCK_ROWS)),
        one_ring(*operands(TILE)),
        plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        plgpu.ClusterBarrier(
            collective_axes=("block",), num_arrivals=CONSUMERS, num_barriers=STAGES
        ),
        shared_memory(
            (CONSUMERS, BUFFERS, CONSUMER_ROWS, sums.epilogue_columns), jnp.dtype(sums.out[0])
        ),
    )
    body = functools.partial(_body, sums, sizes, N, clusters, count_x, count_y)

    def scoped(*arrays):
        pl.run_scoped(functools.partial(body, *arrays), *scratch, collective_axes="wg")

    run = pl.kernel(
        scoped,
        [jax.ShapeDtypeStruct((N, *sizes[:2]), dtype) for dtype in sums.out],
        mesh=plgpu.Mesh(
            grid=(clusters,),
            grid_names=("pair",),
            cluster=(BLOCKS,),
            cluster_names=("block",),
            num_threads=CONSUMERS + 1,
            thread_name="wg",
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret or False,
        name="ttt_terms",
    )
    arrays = *xs, *ys, jnp.asarray(sums.tiles(*sizes[:2])), *extra
    return apart(run, *arrays)


def _parts(arrays, count_x, count_y):
    end = count_x + count_y
    return arrays[:count_x], arrays[count_x:end], arrays[end:]


def _body(sums, sizes, N, clusters, count_x, count_y, *arrays):
    """What a warpgroup runs: consumers first, then the producer."""
    *arrays, left, right, full, empty, staged = arrays
    xs, ys, (table, *arrays) = _parts(arrays, count_x, count_y)
    outs = arrays[-len(sums.out) :]
    shift_N, start = arrays[: -len(sums.out)] or (None, None)
    ring, staging = Ring(STAGES, left, right, full, empty), Staging(BUFFERS, staged)
    product = Product(
        sums.kind,
        *sizes,
        operands=[],  # `_produce` knows them
        epilogue=functools.partial(_write, sums, outs, staging, shift_N),
        epilogue_input=None if start is None else lambda n: start.at[n],
        epilogue_columns=sums.epilogue_columns,
    )
    wg, block, pair = (jax.lax.axis_index(name) for name in ("wg", "block", "pair"))
    tiles, K_steps = table.shape[0], sizes[2] // BLOCK_K

    def visit(compute):
        """Call `compute(place, ranges)` for each tile; the k-steps of all."""

        def entry(j):
            i = jax.lax.rem(pair + j * clusters, jnp.int32(tiles))
            return table[i, 0], table[i, 1], table[i, 2]

        def one(j, carry):
            k_step, (row, column, first) = carry
            after = entry(j + 1)  # now: a load from device memory takes its time
            n = jax.lax.div(pair + j * clusters, jnp.int32(tiles))
            m0 = pl.multiple_of(row + block * BLOCK_ROWS, BLOCK_ROWS)
            n0, k_steps = pl.multiple_of(column, TILE), len(sums.pairs) * (K_steps - first)
            ranges = sums.ranges(row, first, K_steps)
            compute(Place(n, m0, n0, k_step, k_steps), ranges)
            return k_step + k_steps + product.epilogue_steps, after

        count = jax.lax.div(N * tiles - pair + clusters - 1, jnp.int32(clusters))
        return jax.lax.fori_loop(0, count, one, (jnp.int32(0), entry(jnp.int32(0))))[0]

    @pl.when(wg < CONSUMERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        visit(functools.partial(_consume, ring, wg, product, len(sums.pairs)))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == CONSUMERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        ring.drain(visit(functools.partial(_produce, ring, sums, xs, ys, start)))


def _consume(ring, wg, product, pairs, place, ranges):
    """Sum a tile in the order in which `_produce` copies."""
    first = ranges[0][1]
    parts = [(kind, pairs * (begin - first), pairs * (end - first)) for kind, begin, end in ranges]
    consume(ring, wg, product, place, parts)


def _produce(ring, sums, xs, ys, start, place, ranges):
    """Copy a tile's operands into the ring: range by range, and in it one pair of terms after the
    other. Then `start`.
    """
    n, rows, columns = place.b, pl.ds(place.m0, BLOCK_ROWS), pl.ds(place.n0, TILE)

    def copy(kind, i, j, before, s, _):
        stage = ring.wait_empty(before + s)
        ks = pl.ds(pl.multiple_of(s * BLOCK_K, BLOCK_K), BLOCK_K)
        x = xs[i].at[n, ks, rows] if kind[0] == "t" else xs[i].at[n, rows, ks]
        y = ys[j].at[n, columns, ks] if kind[1] == "t" else ys[j].at[n, ks, columns]
        left, right = ring.left[kind[0] == "t"], ring.right[kind[1] != "t"]
        plgpu.copy_gmem_to_smem(x, left.at[stage], ring.full.at[stage])
        plgpu.copy_gmem_to_smem(y, right.at[stage], ring.full.at[stage], collective_axes="block")

    before = place.first
    for kind, begin, end in ranges:
        for i, j in sums.pairs:
            jax.lax.fori_loop(begin, end, functools.partial(copy, kind, i, j, before - begin), None)
            before += end - begin
    if start is None:
        return
    for k in range(TILE // BLOCK_K):
        stage = ring.wait_empty(place.first + place.k_steps + k)
        columns = pl.ds(pl.multiple_of(place.n0 + k * BLOCK_K, BLOCK_K), BLOCK_K)
        plgpu.barrier_arrive(ring.full.at[stage])
        plgpu.copy_gmem_to_smem(
            start.at[n, rows, columns], ring.left[0].at[stage], ring.full.at[stage]
        )


def _write(sums, outs, staging, shift_N, n, m0, n0):
    """The epilogue: what it makes of some columns."""
    rows = pl.ds(m0, CONSUMER_ROWS)
    shift = None if shift_N is None else shift_N[n]

    def write(k, columns, total, start):
        if sums.negative:
            total = -total
        if start is not None:
            total += shift * start.astype(jnp.float32)
        for t, out in enumerate(outs):
            staging.write(k * len(outs) + t, out.at[n, rows, columns], total)
            total -= total.astype(out.dtype).astype(jnp.float32)

    return write


def why_not(dtype, *sizes: int) -> str | None:
    """Say why chunks of such sizes (C, D, F) cannot run on the GPUs here, or None."""
    # Compiling ahead of time, there is no device to ask.
    capability = str(getattr(jax.devices()[0], "compute_capability", "9.0"))
    if not capability.startswith("9."):
        return f"it needs a Hopper GPU (compute capability 9.0), and this one has {capability}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it computes in bfloat16, not in {jnp.dtype(dtype)}"
    if any(size % TILE for size in sizes):
        return f"{sizes} are not all multiples of {TILE}"
    return None


@dataclasses.dataclass(frozen=True)
class Kernels:
    """`Products` of ttt_jax/ops/ttt/chunk_products.py.

    Attributes:
      interpret: as in `multiply`.
    """

    interpret: Any = None
    dtype: Any = jnp.bfloat16

    def terms(self, x_NPQ):
        high = jax.lax.reduce_precision(x_NPQ, 8, 7)  # XLA takes a cast there and back for nothing
        return high.astype(jnp.bfloat16), (x_NPQ - high).astype(jnp.bfloat16)

    def product(self, kind, x, y):
        return self._run("product", x, y, Sums(kind, OF_FOUR, ("float32",)))[0]

    def gram(self, z_NCF):
        sums = Sums("nt", ONE, ("float32",), lower=True)
        return self._run("gram", (z_NCF,), (z_NCF,), sums)[0]

    def square(self, m):
        return self._run("square", m, m, Sums("tn", OF_FOUR, lower=True, triangular=True))

    def outer(self, x_NCD, y_NCD):
        pairs = (0, 0), (1, 1)
        sums = Sums("nt", pairs, ("bfloat16",), lower=True, negative=True)
        return self._run("outer", (x_NCD, y_NCD), (y_NCD, x_NCD), sums)[0]

    def apply(self, a, y_NCS, shift_N=None):
        start = {} if shift_N is None else {"start": y_NCS, "shift_N": shift_N}
        pairs = tuple((i, 0) for i in range(len(a)))
        sums = Sums("nn", pairs, ("bfloat16",), symmetric=True)
        return self._run(
            "apply" if shift_N is None else "apply_shifted", a, (y_NCS,), sums, **start
        )[0]

    def _run(self, name, xs, ys, sums, **options):
        with jax.named_scope(name):  # for profiles
            return tuple(multiply(xs, ys, sums, interpret=self.interpret, **options))
