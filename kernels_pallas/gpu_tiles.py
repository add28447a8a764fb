"""What a block of the Mosaic GPU kernels does: tiles of matrix products, through one ring in shared memory.

A tile is 256 x 256, of a pair of blocks (a cluster), 128 rows each. A block has three warpgroups: one feeds, two multiply, 64
rows each. The feeder copies 64 steps of a sum at a time into the ring (TMA): its own rows of the left operand, and half of the
right one, which both blocks get (multicast), because L2 cannot deliver 128 x 128 tiles to every multiprocessor at the speed of
the tensor cores. It runs ahead of the multipliers (wgmma) by as many steps as the ring holds, across tiles. What a finished sum
is added to, a tile of the state above all, comes through the same ring behind the operands, 64 columns at a time; read from
device memory at the end instead, it would cost as much as the sum.

A launch computes one chunk after the other. Its tiles wait for those they depend on, not for all of the chunk before: every
block counts what it has finished in device memory, and a feeder waits for the counts that the table names.

    nt    both operands with the summed dimension last
    nn    the left one only
    tn    neither
"""

from __future__ import annotations

import collections
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

TILE = 256  # rows and columns of a cluster's tile
BLOCKS = 2  # of a cluster: they share the columns
MULTIPLIERS = 2  # warpgroups of a block
ROWS = TILE // BLOCKS // MULTIPLIERS  # of a multiplier
BLOCK_K = 64
# In steps of BLOCK_K, measured on an H100 (docs/performance.md); they only balance the table.
UPDATE_STEPS, APPLY_STEPS = 10, 2  # what ends a tile: of the state, and of a result
APPLIES, UPDATES = 0, 1  # what blocks count
PIECE = 32  # columns of a tile that an epilogue holds at once beside the sums


class Product(NamedTuple):
    """Output tiles of one matrix product, for every sequence of the batch."""

    kind: Literal["nt", "nn", "tn"]
    rows: int
    columns: int
    length: int  # of the sum
    left: Callable[[Any], tuple[Any, Any]]  # b -> the operand of a sequence, and the first row of the chunk in it
    right: Callable[[Any], tuple[Any, Any]]
    # (b, first row, first column of a multiplier's part) -> what to do with each piece of the sums: a function of its number,
    # its columns, the sums, and the same piece of the float32 and of the bfloat16 array beside it.
    finish: Callable[..., Callable[..., None]]
    beside: Callable[[Any], tuple[Any, Any]]  # b -> these arrays, [rows, columns] from `row` on, or None
    row: Any = 0
    live: Callable[[Any], Any] | None = None  # b -> 0 where the sum is zero

    @property
    def updates(self) -> bool:
        """The state; applies read its copy."""
        return self.kind == "tn"


class Tile(NamedTuple):
    """Which tile a cluster computes, and what must be finished before: a row of the table."""

    product: Any
    b: Any
    row: Any  # the first
    column: Any
    step: Any  # the chunk, counted from the launch's first
    applies_before: Any  # runs of applies of the step before, over all clusters, to wait for; 0: known to be finished
    updates_before: Any  # of updates
    last: Any  # 1 for the last tile of a run, which is counted


_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
_LOAD_TAKES_INDEX = _INDEX is not None and _INDEX.default is inspect.Parameter.empty  # jax 0.10


def read(ref, part):
    """Part of a tile, in the layout of its sums."""
    part = ref.at[part]
    index = ((),) if _LOAD_TAKES_INDEX else ()
    return plgpu.load(part, *index, layout=plgpu.Layout.WGMMA, optimized=False)


def run_block(products_of, table, finished, stages, lefts, rights, full, empty):
    """All of a block's tiles. Threads are warpgroups: multipliers, then the feeder.

    Args:
      products_of: a step of the table, which is a chunk, -> what a tile's number stands for there.
      table: `schedule`'s, in device memory.
      finished: [steps, B, 2] counts of finished runs of applies and of updates, zero at first; None where there is one step.
      lefts: the ring for left operands, [stages, 128, 64] and, the same memory, [stages, 64, 128].
      rights: for right operands, [stages, 256, 64], [stages, 64, 256] and [stages, 128, 64] of float32.
      full, empty: barriers of each slot: filled in this block, and read in both blocks.
    """
    wg, block, pair = jax.lax.axis_index("wg"), jax.lax.axis_index("block"), jax.lax.axis_index("pair")
    count = table[pair, 0, 0]
    slot_of = lambda step: jax.lax.rem(step, jnp.int32(stages))

    def tiles(visit, before=None, after=None):
        """`visit(product, b, m0, n0, first step of the ring, steps)` for the block's tiles in order. All steps taken."""

        def one(j, step):
            tile = Tile(*(table[pair, j, k] for k in range(len(Tile._fields))))
            number, b, products = tile.product, tile.b, products_of(tile.step)
            m0, n0 = pl.multiple_of(tile.row + block * (TILE // BLOCKS), TILE // BLOCKS), pl.multiple_of(tile.column, TILE)
            steps = extra = jnp.int32(0)
            for k, product in enumerate(products):
                length = jnp.int32(product.length // BLOCK_K)
                if product.live is not None:
                    length = jnp.where(product.live(b) != 0, length, 0)
                steps = jnp.where(number == k, length, steps)
                extra = jnp.where(number == k, jnp.int32(_extra(product)), extra)
            if before is not None:
                before(tile)
            for k, product in enumerate(products):
                pl.when(number == k)(functools.partial(visit, product, b, m0, n0, step, steps))
            if after is not None:
                after(tile, products)
            return step + steps + extra

        return jax.lax.fori_loop(1, count + 1, one, jnp.int32(0))

    def wait(tile):
        def until(kind, runs):
            count = finished.at[tile.step - 1, tile.b, kind]
            pl.when(runs > 0)(
                lambda: plgpu.semaphore_wait(count, runs * (BLOCKS * MULTIPLIERS), decrement=False, memory_scope="gpu")
            )

        until(APPLIES, tile.applies_before)
        until(UPDATES, tile.updates_before)

    def signal(tile, products):
        of = {True: UPDATES, False: APPLIES}
        kind = jnp.int32(of[products[0].updates])
        for k, product in enumerate(products[1:], 1):
            kind = jnp.where(tile.product == k, jnp.int32(of[product.updates]), kind)

        @pl.when(tile.last != 0)
        def _():
            plgpu.wait_smem_to_gmem(0)  # written, not only read from shared memory
            plgpu.semaphore_signal(finished.at[tile.step, tile.b, kind], memory_scope="gpu")

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
                tn = product.kind == "tn"
                left = _transposed(lefts[True].at[slot, :, rows]) if tn else lefts[False].at[slot, rows]
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

        sums: Any = pl.run_scoped(scope, plgpu.ACC((ROWS, TILE), jnp.float32))  # pyright: ignore[reportPrivateImportUsage]
        piece = product.finish(b, pl.multiple_of(m0 + wg * ROWS, ROWS), n0)
        beside: list[Any] = [None, None]
        for k in range(TILE // PIECE):
            step, column = divmod(k * PIECE, BLOCK_K)
            if column == 0 and _extra(product):
                slot = slot_of(first + steps + step)
                plgpu.barrier_wait(full.at[slot])
                for j, (array, ring) in enumerate(zip(product.beside(b), (rights[2], lefts[0]), strict=True)):
                    beside[j] = None if array is None else read(ring, (slot, rows, slice(None)))
                plgpu.commit_smem()  # or TMA might overwrite what an ordinary read has not read yet
                plgpu.barrier_arrive(empty.at[slot])
            columns = pl.ds(pl.multiple_of(n0 + k * PIECE, PIECE), PIECE)
            sums_piece = sums[:, k * PIECE : (k + 1) * PIECE]
            piece(k, columns, sums_piece, *(None if x is None else x[:, column : column + PIECE] for x in beside))

    @pl.when(wg < MULTIPLIERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        tiles(multiply, after=None if finished is None else signal)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == MULTIPLIERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        total = tiles(feed, before=None if finished is None else wait)
        # A block that ends with a barrier half used is an error, so the last releases are waited for as well.
        drain = lambda step, _: plgpu.barrier_wait(empty.at[slot_of(step)])
        jax.lax.fori_loop(jnp.maximum(total - stages, 0), total, drain, None)


def _extra(product) -> int:
    """Steps of the ring that bring what the sums are added to."""
    return TILE // BLOCK_K if any(x is not None for x in product.beside(0)) else 0


def _transposed(ref):
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


@functools.cache
def schedule(shapes, B: int, clusters: int, steps: int = 1) -> np.ndarray:
    """Tiles of each cluster, in order: [clusters, 1 + most, 8] int32, rows of `Tile`; the first row holds their count.

    The applies of a step read the copy of the state that the updates of the step before wrote; its updates overwrite the copy
    that the applies of the step before read. Whenever a cluster is free in a simulated run, it takes the first tile of what
    is ready: the oldest step's, there updates, for which the next step waits; in the last step the longest sums. The order in
    which tiles start there is one in which nothing waits for what comes later, so that no real run can block, however long its
    tiles take.

    Args:
      shapes: rows, columns, length of the sum, and whether it updates the state, for each product.
    """
    cost = [length // BLOCK_K + (UPDATE_STEPS if updates else APPLY_STEPS) for *_, length, updates in shapes]
    grids = [[(m, n) for n in range(0, columns, TILE) for m in range(0, rows, TILE)] for rows, columns, *_ in shapes]
    unfinished = {
        (step, b, updates): sum(len(grid) for grid, shape in zip(grids, shapes, strict=True) if shape[3] == updates)
        for step in range(steps)
        for b in range(B)
        for updates in (False, True)
    }
    ready: list = []  # (step, 0 for what goes first, -cost, product, b, tiles not yet taken, the next one last)

    def release(step, b, updates):
        if step < steps:
            for k, shape in enumerate(shapes):
                if shape[3] == updates:
                    first = updates if step + 1 < steps else not updates
                    heapq.heappush(ready, (step, not first, -cost[k], k, b, grids[k][::-1]))

    def finish(step, b, updates):
        unfinished[step, b, updates] -= 1
        if unfinished[step, b, updates] == 0:
            if updates:
                release(step + 1, b, False)
            if unfinished[step, b, not updates] == 0:
                release(step + 1, b, True)

    for b in range(B):
        release(0, b, False)
        release(0, b, True)
    queues: list[list] = [[] for _ in range(clusters)]
    free, running = list(range(clusters)), []  # (time, cluster, group of tiles)
    now = 0
    while ready or running:
        while ready and free:
            step, *_, k, b, left = ready[0]
            cluster = heapq.heappop(free)
            queues[cluster].append((k, b, *left.pop(), step))
            heapq.heappush(running, (now + cost[k], cluster, (step, b, shapes[k][3])))
            if not left:
                heapq.heappop(ready)
        now = running[0][0]
        while running and running[0][0] == now:
            _, cluster, group = heapq.heappop(running)
            heapq.heappush(free, cluster)
            finish(*group)
    return _table(queues, [shape[3] for shape in shapes])


def _table(queues, updates) -> np.ndarray:
    """The schedule with what each cluster has to wait for, and where it has to tell."""
    group = lambda tile: (tile[4], tile[1], updates[tile[0]])
    runs = [[group(tile) for tile in queue] for queue in queues]
    last = [[j + 1 == len(run) or run[j + 1] != this for j, this in enumerate(run)] for run in runs]
    count = collections.Counter(
        g for run, ends in zip(runs, last, strict=True) for g, end in zip(run, ends, strict=True) if end
    )
    table = np.zeros((len(queues), 1 + max(map(len, queues)), len(Tile._fields)), np.int32)
    for c, queue in enumerate(queues):
        table[c, 0, 0], known = len(queue), set()
        for j, tile in enumerate(queue):
            step, b, is_update = group(tile)
            needed = [(step - 1, b, kind) for kind in ((False, True) if is_update else (True,)) if step > 0]
            wait = {g[2]: count[g] for g in needed if g not in known}
            known.update(needed)
            table[c, 1 + j] = (*tile, wait.get(False, 0), wait.get(True, 0), last[c][j])  # a Tile
    return table
