"""In-Place TTT on Hopper GPUs in Pallas (Mosaic GPU): the three launches of `chunk_scan.py`.

Letters as there. Pairs of blocks (clusters) stay on the multiprocessors and go through output tiles of 256 x 256, 128 rows a block. A
block has three warpgroups: one feeds, two multiply, 64 rows each. The feeder copies 64 steps of the sum at a time into a ring in shared
memory (TMA), its own rows of the left operand and half of the right one, which both blocks get (multicast): at the speed of the
tensor cores L2 cannot deliver 128 x 128 tiles to every multiprocessor by itself. It runs ahead of the multipliers (wgmma) by
as many blocks as the ring holds, across tiles. What a finished sum is added to, a tile of the state above all, comes through the
same ring behind the operands, 64 columns at a time; read from device memory at the end instead, it would cost as much as the sum.

A launch holds tiles of several products: apply tiles, which sum over all of F, run beside updates, which move the state, so
that arithmetic and traffic overlap. Which tiles a cluster computes is a table made when the kernel is traced: the longest first,
each to the cluster with the least work.

    nt    z R^T: both operands with the summed dimension last        o, dv
    nn    do R, u R                                                  dz
    tn    u^T z, do^T z                                              S, G
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import heapq
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import chunk_scan

TILE = 256  # rows and columns of a cluster's tile
BLOCKS = 2  # of a cluster: they share the columns
MULTIPLIERS = 2  # warpgroups of a block
ROWS = TILE // BLOCKS // MULTIPLIERS  # of a multiplier
BLOCK_K = 64
EPILOGUE_STEPS = 12  # what reading and writing a tile of the state costs, in steps of BLOCK_K; only balances the table
PIECE = 32  # columns of a tile that an epilogue holds at once beside the sums


_interpreted: contextvars.ContextVar[MosaicLaunches | None] = contextvars.ContextVar("interpreted", default=None)


@contextlib.contextmanager
def interpreted(params, multiprocessors: int = 4):
    """Kernels traced inside run in Pallas' interpreter (`plgpu.InterpretGPUParams`), on any platform. For tests: very slow."""
    token = _interpreted.set(MosaicLaunches(multiprocessors=multiprocessors, interpret=params))
    try:
        yield
    finally:
        _interpreted.reset(token)


def why_not(platform: str, dtype, C: int, D: int, F: int) -> str | None:
    """Why these inputs cannot run here, or None."""
    if _interpreted.get() is None:
        if platform not in ("gpu", "cuda"):
            return f"it needs an NVIDIA GPU, and the platform is {platform}"
        capability = str(getattr(jax.devices()[0], "compute_capability", "9.0"))  # without a device: compiling ahead of time
        if not capability.startswith("9."):
            return f"it needs a Hopper GPU (compute capability 9.0), and this one has {capability}"
    if jax.sharding.get_abstract_mesh().manual_axes:
        return "inside a shard_map jax does not let a Pallas kernel update arrays in place that vary over mesh axes"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it computes in bfloat16, not in {jnp.dtype(dtype)}"
    for name, size in (("chunk_size", C), ("D", D), ("F", F)):
        if size % TILE:
            return f"{name} = {size} is not a multiple of {TILE}"
    return None


def in_place_ttt_gpu(z_BTF, v_BTD, w_DF, *, lr, chunk_size, state_BDF, keep_BM=None):
    """Same contract as `in_place_ttt_xla`; z, v and W are bfloat16, lr, the state and keep are float32."""
    launches = _interpreted.get() or MosaicLaunches()
    return chunk_scan.in_place_ttt(
        launches, z_BTF, v_BTD, w_DF, lr=lr, chunk_size=chunk_size, state_BDF=state_BDF, keep_BM=keep_BM
    )


class _Product(NamedTuple):
    """Output tiles of one matrix product, for every sequence of the batch."""

    kind: Literal["nt", "nn", "tn"]
    rows: int
    columns: int
    length: int  # of the sum
    left: Callable[[Any], tuple[Any, Any]]  # b -> the operand of a sequence, and the first row of the chunk in it
    right: Callable[[Any], tuple[Any, Any]]
    finish: Callable[
        ..., Callable[..., None]
    ]  # (b, m0, n0) -> a function of (piece number, columns, sums, float32, bfloat16 beside)
    beside: Callable[[Any], tuple[Any, Any]]  # b -> float32 and bfloat16 arrays of the result's shape, or None, read at the end
    row: Any = 0  # the result's first row in them
    live: Callable[[Any], Any] | None = None  # b -> 0 where the sum is zero


@dataclasses.dataclass(frozen=True)
class MosaicLaunches:
    """The three launches, and how they are laid out. Three rings of 48 KiB and two pieces staged were slower (docs/performance.md)."""

    stages: int = 4  # of the ring
    staged: int = 1  # pieces of a multiplier on their way from shared to device memory
    multiprocessors: int | None = None  # None: as many as the device has
    interpret: Any = None

    def forward(self, C, scalars, z_BTF, u_BTD, base_BTD, o_BTD, S_BDF, R_2BDF):
        (B, T, F), D = z_BTF.shape, u_BTD.shape[2]

        def products(at, z, u, base, o, S, R):
            def finish(b, m0, n0):
                return lambda k, n, sums, base, _: at.write(k, (o.at[b, _rows(at.token + m0), n], base + sums))

            read = lambda b: (R.at[at.slot, b], 0)
            beside = lambda b: (base.at[b], None)
            return [
                _Product("nt", C, D, F, lambda b: (z.at[b], at.token), read, finish, beside, at.token, lambda b: at.live(b)),
                _update(at, C, D, F, u, z, S, R),
            ]

        return self._call("ttt_forward", C, scalars, products, (z_BTF, u_BTD, base_BTD), (o_BTD, S_BDF, R_2BDF))

    def replay(self, C, scalars, z_BTF, u_BTD, do_BTD, w_DF, dz_BTF, S_BDF, R_2BDF):
        (B, T, F), D = z_BTF.shape, u_BTD.shape[2]

        def products(at, z, u, do, w, dz, S, R):
            def finish(b, m0, n0):
                return lambda k, n, sums, _, __: at.write(k, (dz.at[b, _rows(at.token + m0), n], sums))

            weight = lambda b: (R.at[at.slot, b], 0)
            return [
                _Product("nn", C, F, D, lambda b: (do.at[b], at.token), weight, finish, lambda b: (None, None)),
                _update(at, C, D, F, u, z, S, R, w),
            ]

        return self._call("ttt_replay", C, scalars, products, (z_BTF, u_BTD, do_BTD, w_DF), (dz_BTF, S_BDF, R_2BDF))

    def reverse(self, C, scalars, z_BTF, u_BTD, v_BTD, do_BTD, dz_BTF, dv_BTD, dw_BDF, G_BDF, R_2BDF):
        (B, T, F), D = z_BTF.shape, u_BTD.shape[2]
        collects = dw_BDF is not None

        def products(at, z, u, v, do, dz, dv, G, R, dlr, dw=None):
            def finish_v(b, m0, n0):
                by_row = []

                def piece(k, n, sums, _, v):
                    by_row.append(jnp.sum(v.astype(jnp.float32) * sums, axis=1))
                    at.write(k, (dv.at[b, _rows(at.token + m0), n], at.lr * sums))
                    if k == TILE // PIECE - 1:
                        dlr[b, n0 // TILE, _rows(m0)] = sum(by_row)

                return piece

            def finish_z(b, m0, n0):
                return lambda k, n, sums, _, dz_before: at.write(
                    k, (dz.at[b, _rows(at.token + m0), n], dz_before.astype(jnp.float32) + sums)
                )

            read = lambda b: (R.at[at.slot, b], 0)
            of = lambda array: lambda b: (array.at[b], at.token)
            return [
                _Product("nt", C, D, F, of(z), read, finish_v, lambda b: (None, v.at[b]), at.token),
                _Product("nn", C, F, D, of(u), read, finish_z, lambda b: (None, dz.at[b]), at.token),
                _update(at, C, D, F, do, z, G, R, collected=dw),
            ]

        partial_dlr = jnp.zeros((B, D // TILE, C), jnp.float32)
        in_place = (dz_BTF, dv_BTD, G_BDF, R_2BDF, partial_dlr, *((dw_BDF,) if collects else ()))
        results = self._call("ttt_reverse", C, scalars, products, (z_BTF, u_BTD, v_BTD, do_BTD), in_place)
        dz_BTF, dv_BTD, G_BDF, R_2BDF, partial_dlr, *dw = results
        return dz_BTF, dv_BTD, dw[0] if collects else None, G_BDF, R_2BDF, partial_dlr

    def _call(self, name, C, scalars, products, operands, in_place):
        """Results are the arrays of `in_place`, updated."""
        B, T, F = operands[0].shape
        D, M = operands[1].shape[2], scalars.keep_BM.shape[1]
        sms = self.multiprocessors or _multiprocessors()
        # The shapes of the products do not depend on what they read.
        sizes = products(_Place(C), *[None] * (len(operands) + len(in_place)))
        table = jnp.asarray(_schedule(tuple((p.rows, p.columns, p.length, p.kind == "tn") for p in sizes), B, sms // BLOCKS))
        refs = [jax.new_ref(x) for x in in_place]

        def body(table, i, lr, keep, live, *arrays):
            *arrays, left_k, right_k, full, empty, low, high = arrays
            at = _Place(C, M, i[0], lr[0], keep, live, (low, high), self.staged)
            _block(products(at, *arrays), table, self.stages, left_k, right_k, full, empty)

        swizzled = functools.partial(
            plgpu.SMEM, dtype=jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        )
        staging = lambda dtype, bytes: plgpu.SMEM(
            (MULTIPLIERS, self.staged, ROWS, PIECE),
            dtype,
            transforms=(plgpu.TilingTransform((8, min(PIECE, 128 // bytes))), plgpu.SwizzleTransform(min(128, PIECE * bytes))),
        )
        views = lambda size: (swizzled((self.stages, size, BLOCK_K)), swizzled((self.stages, BLOCK_K, size)))
        float32 = plgpu.SMEM(
            (self.stages, TILE // BLOCKS, BLOCK_K),
            jnp.float32,
            transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)),
        )
        scratch = (
            plgpu.RefUnion(*views(TILE // BLOCKS)),
            plgpu.RefUnion(*views(TILE), float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=self.stages),
            plgpu.ClusterBarrier(collective_axes=("block",), num_arrivals=MULTIPLIERS, num_barriers=self.stages),
            staging(jnp.bfloat16, 2),
            staging(jnp.float32, 4),
        )
        mesh = plgpu.Mesh(
            grid=(sms // BLOCKS,),
            grid_names=("pair",),
            cluster=(BLOCKS,),
            cluster_names=("block",),
            num_threads=MULTIPLIERS + 1,
            thread_name="wg",
        )
        kernel = pl.kernel(
            lambda *arrays: pl.run_scoped(functools.partial(body, *arrays), *scratch, collective_axes="wg"),
            mesh=mesh,
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
            interpret=self.interpret or False,
            name=name,
        )
        flat_scalars = (scalars.i, scalars.lr, scalars.keep_BM.reshape(-1), scalars.live_BM.reshape(-1))
        kernel(table, *flat_scalars, *operands, *refs)
        return tuple(ref[...] for ref in refs)


class _Place:
    """Which chunk this is, what belongs to it, and the way out of shared memory."""

    def __init__(self, C, M=0, i=0, lr=None, keep=None, live=None, staging=(), staged=0):
        self.token, self.slot, self.slot_written = i * C, i % 2, (i + 1) % 2
        self.lr = lr
        self.keep = lambda b: keep[b * M + i]
        self.live = lambda b: live[b * M + i]
        self.staging, self.staged = staging, staged

    def write(self, k, *parts):
        """Piece k of a tile, (destination, values) each, through shared memory: from registers, rows of eight bytes would go out."""
        wg, slot = jax.lax.axis_index("wg"), k % self.staged
        plgpu.wait_smem_to_gmem(self.staged - 1, wait_read_only=True)
        for ref, values in parts:
            self.staging[ref.dtype == jnp.float32][wg, slot] = values.astype(ref.dtype)
        plgpu.commit_smem()
        for ref, _ in parts:
            plgpu.copy_smem_to_gmem(self.staging[ref.dtype == jnp.float32].at[wg, slot], ref, commit_group=False)
        plgpu.commit_smem_to_gmem_group()


def _rows(start):
    """Of a multiplier."""
    return pl.ds(pl.multiple_of(start, ROWS), ROWS)


_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
_LOAD_TAKES_INDEX = _INDEX is not None and _INDEX.default is inspect.Parameter.empty  # jax 0.10


def _read(ref, part):
    """Part of a tile, in the layout of its sums."""
    part = ref.at[part]
    index = ((),) if _LOAD_TAKES_INDEX else ()
    return plgpu.load(part, *index, layout=plgpu.Layout.WGMMA, optimized=False)


def _update(at, C, D, F, left, right, state, R, w=None, collected=None) -> _Product:
    """keep (state + left^T right), and its copy R, with W added where there is one."""

    def finish(b, m0, n0):
        kept = at.keep(b)

        def piece(k, n, sums, before, w_piece):
            part = b, _rows(m0), n
            total = sums if before is None else before + sums
            value = kept * total
            read = value if w is None else value + w_piece.astype(jnp.float32)
            at.write(k, (state.at[part], value), (R.at[at.slot_written, *part], read))
            if collected is not None:  # where a document starts at this chunk, G is the whole of its share of dW

                @pl.when(kept != 1)
                def _():
                    collected[part] = _read(collected, part) + (1 - kept) * total

        return piece

    token = lambda array: lambda b: (array.at[b], at.token)
    return _Product("tn", D, F, C, token(left), token(right), finish, lambda b: (state.at[b], w))


def _block(products, table, stages, lefts, rights, full, empty):
    """What one block does; threads are warpgroups: multipliers, then the feeder."""
    wg, block, pair = jax.lax.axis_index("wg"), jax.lax.axis_index("block"), jax.lax.axis_index("pair")
    count = table[pair, 0, 0]
    slot_of = lambda step: jax.lax.rem(step, jnp.int32(stages))

    def tiles(visit):
        """`visit(product, b, m0, n0, first step of the ring, steps)` for the block's tiles in order. All steps taken."""

        def one(j, step):
            number, b, m0, n0 = (table[pair, j, k] for k in range(4))
            m0, n0 = pl.multiple_of(m0 + block * (TILE // BLOCKS), TILE // BLOCKS), pl.multiple_of(n0, TILE)
            steps = extra = jnp.int32(0)
            for k, product in enumerate(products):
                length = jnp.int32(product.length // BLOCK_K)
                if product.live is not None:
                    length = jnp.where(product.live(b) != 0, length, 0)
                steps = jnp.where(number == k, length, steps)
                extra = jnp.where(number == k, jnp.int32(_extra(product)), extra)
            for k, product in enumerate(products):
                pl.when(number == k)(functools.partial(visit, product, b, m0, n0, step, steps))
            return step + steps + extra

        return jax.lax.fori_loop(1, count + 1, one, jnp.int32(0))

    def feed(product, b, m0, n0, first, steps):
        (left, left_row), (right, right_row) = product.left(b), product.right(b)
        own, all_n = pl.ds(m0, TILE // BLOCKS), pl.ds(n0, TILE)
        spread = min(16, product.length // BLOCK_K)
        some = TILE // BLOCKS // spread

        def prefetch(s):
            """A share of what the sums are added to into L2; all at once it would hold up the operands."""

            @pl.when(s < spread)
            def _():
                for array in product.beside(b):
                    if array is not None:
                        rows = pl.ds(pl.multiple_of(product.row + m0 + s * some, some), some)
                        plgpu.async_prefetch(array.at[rows, all_n])

        def free_slot(step):
            @pl.when(step >= stages)
            def _():
                plgpu.barrier_wait(empty.at[slot_of(step)])

            return slot_of(step)

        def copy(s, _):
            k = pl.multiple_of(s * BLOCK_K, BLOCK_K)
            slot, ks = free_slot(first + s), pl.ds(k, BLOCK_K)
            prefetch(s)
            if product.kind == "tn":
                source = left.at[pl.ds(pl.multiple_of(left_row + k, BLOCK_K), BLOCK_K), own]
            else:
                source = left.at[pl.ds(pl.multiple_of(left_row + m0, TILE // BLOCKS), TILE // BLOCKS), ks]
            plgpu.copy_gmem_to_smem(source, lefts[product.kind == "tn"].at[slot], full.at[slot])
            if product.kind == "nt":
                source = right.at[pl.ds(pl.multiple_of(right_row + n0, TILE), TILE), ks]
            else:
                source = right.at[pl.ds(pl.multiple_of(right_row + k, BLOCK_K), BLOCK_K), all_n]
            plgpu.copy_gmem_to_smem(source, rights[product.kind != "nt"].at[slot], full.at[slot], collective_axes="block")

        jax.lax.fori_loop(0, steps, copy, None)
        for k in range(_extra(product)):
            slot = free_slot(first + steps + k)
            rows = pl.ds(pl.multiple_of(product.row + m0, TILE // BLOCKS), TILE // BLOCKS)
            part = rows, pl.ds(pl.multiple_of(n0 + k * BLOCK_K, BLOCK_K), BLOCK_K)
            for array, ring in zip(product.beside(b), (rights[2], lefts[0]), strict=True):
                if array is None:
                    plgpu.barrier_arrive(full.at[slot])
                else:
                    plgpu.copy_gmem_to_smem(array.at[part], ring.at[slot], full.at[slot])

    def multiply(product, b, m0, n0, first, steps):
        rows = pl.ds(pl.multiple_of(wg * ROWS, ROWS), ROWS)

        def scope(sums):
            def one(s, _):
                slot = slot_of(first + s)
                plgpu.barrier_wait(full.at[slot])
                if product.kind == "tn":
                    left = _transposed(lefts[True].at[slot, :, rows])
                else:
                    left = lefts[False].at[slot, rows]
                right = _transposed(rights[False].at[slot]) if product.kind == "nt" else rights[True].at[slot]
                plgpu.wgmma(sums, left, right)
                plgpu.wgmma_wait(1)  # the one before this

                @pl.when(s > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[slot_of(first + s - 1)])

            jax.lax.fori_loop(0, steps, one, None)
            plgpu.wgmma_wait(0)

            @pl.when(steps > 0)
            def _():
                plgpu.barrier_arrive(empty.at[slot_of(first + steps - 1)])

            return sums[...]

        sums = pl.run_scoped(scope, plgpu.ACC((ROWS, TILE), jnp.float32))
        piece = product.finish(b, pl.multiple_of(m0 + wg * ROWS, ROWS), n0)
        beside = [None, None]
        for k in range(TILE // PIECE):
            step, column = divmod(k * PIECE, BLOCK_K)
            if column == 0 and _extra(product):
                slot = slot_of(first + steps + step)
                plgpu.barrier_wait(full.at[slot])
                for j, (array, ring) in enumerate(zip(product.beside(b), (rights[2], lefts[0]), strict=True)):
                    beside[j] = None if array is None else _read(ring, (slot, rows, slice(None)))
                plgpu.barrier_arrive(empty.at[slot])
            columns = pl.ds(pl.multiple_of(n0 + k * PIECE, PIECE), PIECE)
            sums_piece = sums[:, k * PIECE : (k + 1) * PIECE]
            piece(k, columns, sums_piece, *(None if x is None else x[:, column : column + PIECE] for x in beside))

    @pl.when(wg < MULTIPLIERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        tiles(multiply)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == MULTIPLIERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        total = tiles(feed)
        # A block that ends with a barrier half used is an error, so the last releases are waited for as well.
        drain = lambda step, _: plgpu.barrier_wait(empty.at[slot_of(step)])
        jax.lax.fori_loop(jnp.maximum(total - stages, 0), total, drain, None)


def _extra(product) -> int:
    """Steps of the ring that bring what the sums are added to."""
    return TILE // BLOCK_K if any(x is not None for x in product.beside(0)) else 0


def _transposed(ref):
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


@functools.cache
def _schedule(shapes, B: int, clusters: int) -> np.ndarray:
    """Tiles of each cluster: [clusters, 1 + most, 4] int32; row 0 holds the count, then product, b, first row, first column.

    Longest first, each to the cluster with the least work so far.
    """
    tiles = []
    for k, (rows, columns, length, updates) in enumerate(shapes):
        cost = length // BLOCK_K + (EPILOGUE_STEPS if updates else EPILOGUE_STEPS // 2)
        for b in range(B):
            tiles += [(cost, k, b, m, n) for n in range(0, columns, TILE) for m in range(0, rows, TILE)]
    tiles.sort(key=lambda tile: -tile[0])
    loads = [(0, cluster) for cluster in range(clusters)]
    queues: list[list] = [[] for _ in range(clusters)]
    for cost, *tile in tiles:
        load, cluster = heapq.heappop(loads)
        queues[cluster].append(tile)
        heapq.heappush(loads, (load + cost, cluster))
    table = np.zeros((clusters, 1 + max(map(len, queues)), 4), np.int32)
    for cluster, queue in enumerate(queues):
        table[cluster, 0, 0] = len(queue)
        if queue:
            table[cluster, 1 : 1 + len(queue)] = queue
    return table


def _multiprocessors() -> int:
    return getattr(jax.devices()[0], "core_count", 132)
