"""In-Place TTT on Hopper GPUs in Pallas (Mosaic GPU): the three launches of `chunk_scan.py`.

Letters as there. One block of four warpgroups stays on every multiprocessor. Two of them multiply, each on output tiles of its
own, and two feed one of them each: a feeder copies 128 x 64 blocks of both operands into a ring in shared memory (TMA) and runs
ahead of its multiplier (wgmma) by as many blocks as the ring holds, across tiles. While one multiplier reads and writes its tile of
the state, the other keeps the tensor cores busy, and an apply tile, which sums over all of F, beside updates, which move
the state, balances arithmetic with traffic. Which tiles a multiplier computes is a table made when the kernel is traced: the longest
first, each to the multiprocessor with the least work.

    nt    z R^T: both operands with the summed dimension last        o, dv
    nn    do R, u R                                                  dz
    tn    u^T z, do^T z                                              S, G
"""

from __future__ import annotations

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

TILE, BLOCK_K = 128, 64
WORKERS = 2  # multipliers of a block
EPILOGUE_STEPS = 6  # what reading and writing a tile of the state costs, in steps of BLOCK_K; only balances the table
PIECE = 32  # columns of a tile that an epilogue holds at once beside the sums


def why_not(platform: str, dtype, C: int, D: int, F: int) -> str | None:
    """Why these inputs cannot run here, or None."""
    if platform not in ("gpu", "cuda"):
        return f"it needs an NVIDIA GPU, and the platform is {platform}"
    capability = getattr(jax.devices()[0], "compute_capability", "9.0")
    if not str(capability).startswith("9."):
        return f"it needs a Hopper GPU (compute capability 9.0), and this one has {capability}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it computes in bfloat16, not in {jnp.dtype(dtype)}"
    for name, size in (("chunk_size", C), ("D", D), ("F", F)):
        if size % TILE:
            return f"{name} = {size} is not a multiple of {TILE}"
    return None


def in_place_ttt_gpu(z_BTF, v_BTD, w_DF, *, lr, chunk_size, state_BDF, keep_BM=None, launches=None):
    """Same contract as `in_place_ttt_xla`; z, v and W are bfloat16, lr, the state and keep are float32."""
    return chunk_scan.in_place_ttt(
        launches or MosaicLaunches(), z_BTF, v_BTD, w_DF, lr=lr, chunk_size=chunk_size, state_BDF=state_BDF, keep_BM=keep_BM
    )


class _Product(NamedTuple):
    """Output tiles of one matrix product, for every sequence of the batch."""

    kind: Literal["nt", "nn", "tn"]
    rows: int
    columns: int
    length: int  # of the sum
    left: Callable[[Any], tuple[Any, Any]]  # b -> the operand of a sequence, and the first row of the chunk in it
    right: Callable[[Any], tuple[Any, Any]]
    finish: Callable[..., None]  # (b, m0, n0, sums)
    live: Callable[[Any], Any] | None = None  # b -> 0 where the sum is zero
    touches_state: bool = False


@dataclasses.dataclass(frozen=True)
class MosaicLaunches:
    stages: int = 3  # blocks in each ring
    multiprocessors: int | None = None  # None: as many as the device has
    interpret: Any = None

    def forward(self, C, scalars, z_BTF, u_BTD, base_BTD, o_BTD, S_BDF, R_2BDF):
        (B, T, F), D = z_BTF.shape, u_BTD.shape[2]

        def products(at, z, u, base, o, S, R):
            def finish(b, m0, n0, sums):
                for columns, piece in _pieces(sums, n0):
                    part = b, _rows(at.token + m0), columns
                    o[part] = (_read(base, part) + piece).astype(o.dtype)

            read = lambda b: (R.at[at.slot, b], 0)
            return [
                _Product("nt", C, D, F, lambda b: (z.at[b], at.token), read, finish, live=lambda b: at.live(b)),
                _update(at, C, D, F, u, z, S, R),
            ]

        return self._call("ttt_forward", C, scalars, products, (z_BTF, u_BTD, base_BTD), (o_BTD, S_BDF, R_2BDF))

    def replay(self, C, scalars, z_BTF, u_BTD, do_BTD, w_DF, dz_BTF, S_BDF, R_2BDF):
        (B, T, F), D = z_BTF.shape, u_BTD.shape[2]

        def products(at, z, u, do, w, dz, S, R):
            def finish(b, m0, n0, sums):
                for columns, piece in _pieces(sums, n0):
                    dz[b, _rows(at.token + m0), columns] = piece.astype(dz.dtype)

            return [
                _Product("nn", C, F, D, lambda b: (do.at[b], at.token), lambda b: (R.at[at.slot, b], 0), finish),
                _update(at, C, D, F, u, z, S, R, w),
            ]

        return self._call("ttt_replay", C, scalars, products, (z_BTF, u_BTD, do_BTD, w_DF), (dz_BTF, S_BDF, R_2BDF))

    def reverse(self, C, scalars, z_BTF, u_BTD, v_BTD, do_BTD, dz_BTF, dv_BTD, dw_BDF, G_BDF, R_2BDF):
        (B, T, F), D = z_BTF.shape, u_BTD.shape[2]
        collects = dw_BDF is not None

        def products(at, z, u, v, do, dz, dv, G, R, dlr, dw=None):
            def finish_v(b, m0, n0, sums):
                by_row = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
                for columns, piece in _pieces(sums, n0):
                    part = b, _rows(at.token + m0), columns
                    by_row += jnp.sum(_read(v, part).astype(jnp.float32) * piece, axis=1)
                    dv[part] = (at.lr * piece).astype(dv.dtype)
                dlr[b, n0 // TILE, _rows(m0)] = by_row

            def finish_z(b, m0, n0, sums):
                for columns, piece in _pieces(sums, n0):
                    part = b, _rows(at.token + m0), columns
                    dz[part] = (_read(dz, part).astype(jnp.float32) + piece).astype(dz.dtype)

            read = lambda b: (R.at[at.slot, b], 0)
            return [
                _Product("nt", C, D, F, lambda b: (z.at[b], at.token), read, finish_v),
                _Product("nn", C, F, D, lambda b: (u.at[b], at.token), read, finish_z),
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
        sizes = products(None, *[None] * (len(operands) + len(in_place)))
        table = jnp.asarray(_schedule(tuple((p.rows, p.columns, p.length, p.touches_state) for p in sizes), B, sms))
        refs = [jax.new_ref(x) for x in in_place]

        def body(table, i, lr, keep, live, *arrays):
            *arrays, left_k, right_k, full, empty = arrays
            at = _Place(C, M, i[0], lr[0], keep, live)
            _block(products(at, *arrays), table, self.stages, left_k, right_k, full, empty)

        body.__name__ = name
        swizzled = functools.partial(
            plgpu.SMEM, dtype=jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        )
        slots = WORKERS * self.stages
        either = lambda: plgpu.RefUnion(swizzled((slots, TILE, BLOCK_K)), swizzled((slots, BLOCK_K, TILE)))
        kernel = plgpu.kernel(
            body,
            out_type=(),
            scratch_types=[
                either(),
                either(),
                plgpu.Barrier(num_arrivals=2, num_barriers=slots),
                plgpu.Barrier(num_arrivals=1, num_barriers=slots),
            ],
            grid=(sms,),
            grid_names=("sm",),
            num_threads=2 * WORKERS,
            thread_name="wg",
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
            interpret=self.interpret,
        )
        flat_scalars = (scalars.i, scalars.lr, scalars.keep_BM.reshape(-1), scalars.live_BM.reshape(-1))
        kernel(table, *flat_scalars, *operands, *refs)
        return tuple(ref[...] for ref in refs)


class _Place:
    """Which chunk this is, and what belongs to it."""

    def __init__(self, C, M, i, lr, keep, live):
        self.token, self.slot, self.slot_written = pl.multiple_of(i * C, TILE), i % 2, (i + 1) % 2
        self.lr = lr
        self.keep = lambda b: keep[b * M + i]
        self.live = lambda b: live[b * M + i]


def _rows(start):
    return pl.ds(pl.multiple_of(start, TILE), TILE)


def _pieces(sums, n0):
    """A tile's sums, a few columns at a time, with their columns in the array."""
    for start in range(0, TILE, PIECE):
        yield pl.ds(pl.multiple_of(n0 + start, PIECE), PIECE), sums[:, start : start + PIECE]


_LOAD_TAKES_INDEX = inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty


def _read(ref, part):
    """Part of a tile, in the layout of its sums."""
    part = ref.at[part]
    index = ((),) if _LOAD_TAKES_INDEX else ()
    return plgpu.load(part, *index, layout=plgpu.Layout.WGMMA, optimized=False)


def _update(at, C, D, F, left, right, state, R, w=None, collected=None) -> _Product:
    """keep (state + left^T right), and its copy R, with W added where there is one."""

    def finish(b, m0, n0, sums):
        kept = at.keep(b)
        for columns, piece in _pieces(sums, n0):
            part = b, _rows(m0), columns
            total = _read(state, part) + piece
            value = kept * total
            state[part] = value
            if w is not None:
                value = value + _read(w, part[1:]).astype(jnp.float32)
            R[at.slot_written, *part] = value.astype(R.dtype)
            if collected is not None:  # where a document starts at this chunk, G is the whole of its share of dW

                @pl.when(kept != 1)
                def _(total=total, part=part):
                    collected[part] = _read(collected, part) + (1 - kept) * total

    token = lambda array: lambda b: (array.at[b], at.token)
    return _Product("tn", D, F, C, token(left), token(right), finish, touches_state=True)


def _block(products, table, stages, lefts, rights, full, empty):
    """What one block does; threads are warpgroups: multipliers first, then their feeders."""
    wg = jax.lax.axis_index("wg")
    worker = jax.lax.rem(wg, jnp.int32(WORKERS))
    row = jax.lax.axis_index("sm") * WORKERS + worker
    count = table[row, 0, 0]
    slot_of = lambda step: worker * stages + jax.lax.rem(step, jnp.int32(stages))

    def tiles(visit):
        """`visit(product, b, m0, n0, first step of the ring, steps)` for the worker's tiles in order. All steps taken."""

        def one(j, step):
            number, b, m0, n0 = (table[row, j, k] for k in range(4))
            m0, n0 = pl.multiple_of(m0, TILE), pl.multiple_of(n0, TILE)
            steps = jnp.int32(0)
            for k, product in enumerate(products):
                length = jnp.int32(product.length // BLOCK_K)
                if product.live is not None:
                    length = jnp.where(product.live(b) != 0, length, 0)
                steps = jnp.where(number == k, length, steps)
            for k, product in enumerate(products):
                pl.when(number == k)(functools.partial(visit, product, b, m0, n0, step, steps))
            return step + steps

        return jax.lax.fori_loop(1, count + 1, one, jnp.int32(0))

    def feed(product, b, m0, n0, first, steps):
        (left, left_row), (right, right_row) = product.left(b), product.right(b)

        def copy(s, _):
            step, k = first + s, pl.multiple_of(s * BLOCK_K, BLOCK_K)
            slot = slot_of(step)

            @pl.when(step >= stages)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            if product.kind == "tn":
                source = left.at[pl.ds(pl.multiple_of(left_row + k, BLOCK_K), BLOCK_K), pl.ds(m0, TILE)]
            else:
                source = left.at[_rows(left_row + m0), pl.ds(k, BLOCK_K)]
            plgpu.copy_gmem_to_smem(source, lefts[product.kind == "tn"].at[slot], full.at[slot])
            if product.kind == "nt":
                source = right.at[_rows(right_row + n0), pl.ds(k, BLOCK_K)]
            else:
                source = right.at[pl.ds(pl.multiple_of(right_row + k, BLOCK_K), BLOCK_K), pl.ds(n0, TILE)]
            plgpu.copy_gmem_to_smem(source, rights[product.kind != "nt"].at[slot], full.at[slot])

        jax.lax.fori_loop(0, steps, copy, None)

    def multiply(product, b, m0, n0, first, steps):
        def scope(sums):
            def one(s, _):
                slot = slot_of(first + s)
                plgpu.barrier_wait(full.at[slot])
                left, right = lefts[product.kind == "tn"].at[slot], rights[product.kind != "nt"].at[slot]
                left = _transposed(left) if product.kind == "tn" else left
                right = _transposed(right) if product.kind == "nt" else right
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

        product.finish(b, m0, n0, pl.run_scoped(scope, plgpu.ACC((TILE, TILE), jnp.float32)))

    @pl.when(wg < WORKERS)
    def _():
        plgpu.set_max_registers(216, action="increase")
        tiles(multiply)

    @pl.when(wg >= WORKERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        total = tiles(feed)
        # A block that ends with a barrier half used is an error, so the last releases are waited for as well.
        drain = lambda step, _: plgpu.barrier_wait(empty.at[slot_of(step)])
        jax.lax.fori_loop(jnp.maximum(total - stages, 0), total, drain, None)


def _transposed(ref):
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


@functools.cache
def _schedule(shapes, B: int, sms: int) -> np.ndarray:
    """Tiles of each worker: [sms * WORKERS, 1 + most, 4] int32; row 0 holds the count, then product, b, first row, first column.

    Longest first, each to the multiprocessor with the least work so far, and there to its less loaded worker.
    """
    tiles = []
    for k, (rows, columns, length, touches_state) in enumerate(shapes):
        cost = length // BLOCK_K + (EPILOGUE_STEPS if touches_state else EPILOGUE_STEPS // 2)
        for b in range(B):
            tiles += [(cost, k, b, m, n) for n in range(0, columns, TILE) for m in range(0, rows, TILE)]
    tiles.sort(key=lambda tile: -tile[0])
    loads = [(0, sm) for sm in range(sms)]
    of_worker = [[0] * WORKERS for _ in range(sms)]
    queues: list[list] = [[] for _ in range(sms * WORKERS)]
    for cost, *tile in tiles:
        load, sm = heapq.heappop(loads)
        worker = min(range(WORKERS), key=of_worker[sm].__getitem__)
        of_worker[sm][worker] += cost
        queues[sm * WORKERS + worker].append(tile)
        heapq.heappush(loads, (load + cost, sm))
    table = np.zeros((len(queues), 1 + max(map(len, queues)), 4), np.int32)
    for row, queue in enumerate(queues):
        table[row, 0, 0] = len(queue)
        if queue:
            table[row, 1 : 1 + len(queue)] = queue
    return table


def _multiprocessors() -> int:
    return getattr(jax.devices()[0], "core_count", 132)
