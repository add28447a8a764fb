"""The pipeline of the Mosaic GPU kernels: a block computes output tiles, one after the other.

A tile is 256 x 256 and belongs to a cluster of two blocks; each block has 128 of its rows. A block
has three warpgroups: one producer and two consumers.

                     device memory: operands, and what an epilogue reads
                        |
                        |  TMA. Left operand: the block's own 128 rows. Right operand: each block
                        |  copies half of the 256 columns, and both receive it (multicast).
                        v
    PRODUCER         produce: per k-step   wait empty[s] -> copy -> full[s] completes
    warpgroup 2         |                                        L2 prefetch for the epilogue
                        v
    RING of          +---------+---------+---------+---------+
    shared memory    | stage 0 | stage 1 | stage 2 | stage 3 |   k-step j uses stage j mod 4,
                     +---------+---------+---------+---------+   also across tiles
                        |                                ^
                        |  wait full[s]                  |  arrive empty[s], in both blocks of
                        v                                |  the cluster
    CONSUMERS        consume: wgmma, 64 k a step, into 64 x 256 float32 sums in registers
    warpgroups 0, 1     |    one wgmma stays in flight; the stage before it is released
                        v
                     epilogue: 64 columns at a time; its input arrives as four more k-steps, 64
                        |      columns each, through the same ring behind the operands
                        v
                     staging buffers in shared memory -> TMA -> device memory

    full[s]      2 arrivals, in this block: left and right operand of stage s are there
    empty[s]     2 arrivals from each block, one per consumer: both blocks have read stage s

Multicast halves the traffic of L2, which cannot deliver 128 x 128 tiles to every multiprocessor at
the speed of the tensor cores. The producer runs ahead by as many k-steps as the ring has stages.
An epilogue's input comes through the ring, too: reading it from device memory at the end would take
as long as a sum.

Kinds of products, by where the summed dimension is:

    nt    last in both operands
    nn    last in the left one only
    tn    first in both
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_jax.kernels_pallas.gpu_schedule import BLOCK_K, TILE, Tile

BLOCKS = 2  # of a cluster: they share the columns
CONSUMERS = 2  # warpgroups of a block
BLOCK_ROWS = TILE // BLOCKS
CONSUMER_ROWS = BLOCK_ROWS // CONSUMERS


class Product(NamedTuple):
    """Output tiles of one matrix product, for every sequence of the batch."""

    kind: Literal["nt", "nn", "tn"]
    rows: int
    columns: int
    length: int  # of one product's sum
    # Left and right operand of each product that is summed: functions b -> the operand of a
    # sequence [tokens or rows, columns], and the first row of the chunk in it.
    operands: list[tuple[Callable[[Any], tuple[Any, Any]], Callable[[Any], tuple[Any, Any]]]]
    # (b, first row, first column of a consumer's part) -> what to do with the sums of some columns:
    # a function of their number, their columns, the sums, and the same part of the input.
    epilogue: Callable[..., Callable[..., None]]
    # b -> a bfloat16 array [rows, columns]; None where the epilogue reads nothing
    epilogue_input: Callable[[Any], Any] | None = None
    # that an epilogue holds at once in registers, besides the sums, and writes: 128 bytes
    epilogue_columns: int = BLOCK_K

    @property
    def k_steps(self) -> int:
        """K-steps of the ring that bring operands."""
        return len(self.operands) * (self.length // BLOCK_K)

    @property
    def epilogue_steps(self) -> int:
        """K-steps of the ring that bring the input of the epilogue."""
        return TILE // BLOCK_K if self.epilogue_input else 0


class Place(NamedTuple):
    """Where a block's part of a tile is: in the output, and in the ring."""

    b: Any
    m0: Any  # first row of the block
    n0: Any  # first column
    first: Any  # k-step, counted over all tiles of the block
    k_steps: Any  # of the sum


class Ring(NamedTuple):
    """Stages of shared memory between producer and consumers, and their barriers."""

    stages: int
    left: Any  # [stages, 128, 64] and, the same memory, [stages, 64, 128]
    right: Any  # [stages, 256, 64], and [stages, 64, 256]
    full: Any
    empty: Any

    def stage(self, k_step):
        """The stage that a k-step uses."""
        return jax.lax.rem(k_step, jnp.int32(self.stages))

    def wait_empty(self, k_step):
        """Wait until the consumers of both blocks have released the stage, and return it."""

        @pl.when(k_step >= self.stages)
        def _():
            plgpu.barrier_wait(self.empty.at[self.stage(k_step)])

        return self.stage(k_step)

    def release(self, k_step):
        """Say that this consumer has read the stage."""
        plgpu.barrier_arrive(self.empty.at[self.stage(k_step)])

    def drain(self, k_steps):
        """Wait for the last releases, too: a barrier left half used at the end is an error."""

        def wait(k_step, _):
            plgpu.barrier_wait(self.empty.at[self.stage(k_step)])

        jax.lax.fori_loop(jnp.maximum(k_steps - self.stages, 0), k_steps, wait, None)


def run_block(products, table, stages, left, right, full, empty):
    """Compute all of a block's tiles. A thread is a warpgroup: consumers first, then the producer.

    Args:
      products: of the launch, which a tile names by number.
      table: `gpu_schedule.schedule`'s, in device memory.
      stages: of the ring.
      left: stages for left operands, [stages, 128, 64] and, the same memory, [stages, 64, 128].
      right: for right operands, [stages, 256, 64] and [stages, 64, 256].
      full: barriers of the stages, filled in this block.
      empty: barriers of the stages, released in both blocks.
    """
    wg = jax.lax.axis_index("wg")
    ring = Ring(stages, left, right, full, empty)

    @pl.when(wg < CONSUMERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        _visit(products, table, functools.partial(consume, ring, wg))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == CONSUMERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        ring.drain(_visit(products, table, functools.partial(produce, ring)))


def _visit(products, table, compute):
    """Call `compute(product, place)` for every tile of this block, in the order of the table.

    Producer and consumers each go through them. Returns the k-steps of all tiles.
    """
    pair, block = jax.lax.axis_index("pair"), jax.lax.axis_index("block")

    def entry(j):
        return Tile(*(table[pair, j, k] for k in range(len(Tile._fields))))

    def one(j, carry):
        k_step, tile = carry
        after = entry(j + 1)  # now: a load from device memory takes its time
        m0 = pl.multiple_of(tile.row + block * BLOCK_ROWS, BLOCK_ROWS)
        n0 = pl.multiple_of(tile.column, TILE)
        k_steps = epilogue_steps = jnp.int32(0)
        for k, product in enumerate(products):
            here = tile.product == k
            k_steps = jnp.where(here, jnp.int32(product.k_steps), k_steps)
            epilogue_steps = jnp.where(here, jnp.int32(product.epilogue_steps), epilogue_steps)
        place = Place(tile.b, m0, n0, k_step, k_steps)
        for k, product in enumerate(products):
            pl.when(tile.product == k)(functools.partial(compute, product, place))
        return k_step + k_steps + epilogue_steps, after

    return jax.lax.fori_loop(1, table[pair, 0, 0] + 1, one, (jnp.int32(0), entry(1)))[0]


def produce(ring, product, place):
    """Copy a tile's operands into the ring, one k-step at a time, then the epilogue's input."""
    steps = product.length // BLOCK_K
    for p, (left, right) in enumerate(product.operands):
        part = place._replace(first=place.first + p * steps)
        arrays = left(place.b), right(place.b)
        copy = functools.partial(produce_k_step, ring, product, part, *arrays)
        jax.lax.fori_loop(0, steps, copy, None)
    produce_epilogue_input(ring, product, place)


def produce_epilogue_input(ring, product, place):
    """Copy what the epilogue reads into the ring, 64 columns at a time, behind the operands."""
    for k in range(product.epilogue_steps):
        stage = ring.wait_empty(place.first + place.k_steps + k)
        rows = pl.ds(pl.multiple_of(place.m0, BLOCK_ROWS), BLOCK_ROWS)
        columns = pl.ds(pl.multiple_of(place.n0 + k * BLOCK_K, BLOCK_K), BLOCK_K)
        plgpu.barrier_arrive(ring.full.at[stage])  # for the right operand, of which there is none
        source = product.epilogue_input(place.b).at[rows, columns]
        plgpu.copy_gmem_to_smem(source, ring.left[0].at[stage], ring.full.at[stage])


def produce_k_step(ring, product, place, left_operand, right_operand, s, _):
    """Copy k-step s of both operands."""
    (left, left_row), (right, right_row) = left_operand, right_operand
    block_rows, tile_columns = pl.ds(place.m0, BLOCK_ROWS), pl.ds(place.n0, TILE)
    k = pl.multiple_of(s * BLOCK_K, BLOCK_K)
    stage, ks = ring.wait_empty(place.first + s), pl.ds(k, BLOCK_K)
    _prefetch(product, place, s)

    if product.kind == "tn":
        source = left.at[pl.ds(pl.multiple_of(left_row + k, BLOCK_K), BLOCK_K), block_rows]
    else:
        rows = pl.ds(pl.multiple_of(left_row + place.m0, BLOCK_ROWS), BLOCK_ROWS)
        source = left.at[rows, ks]
    buffer = ring.left[product.kind == "tn"].at[stage]
    plgpu.copy_gmem_to_smem(source, buffer, ring.full.at[stage])

    if product.kind == "nt":
        source = right.at[pl.ds(pl.multiple_of(right_row + place.n0, TILE), TILE), ks]
    else:
        source = right.at[pl.ds(pl.multiple_of(right_row + k, BLOCK_K), BLOCK_K), tile_columns]
    buffer = ring.right[product.kind != "nt"].at[stage]
    plgpu.copy_gmem_to_smem(source, buffer, ring.full.at[stage], collective_axes="block")


def _prefetch(product, place, s):
    """Prefetch a share of the epilogue's input into L2; all at once would delay the operands."""
    if product.epilogue_input is None:
        return
    shares = min(16, product.length // BLOCK_K)
    share = BLOCK_ROWS // shares

    @pl.when(s < shares)
    def _():
        rows = pl.ds(pl.multiple_of(place.m0 + s * share, share), share)
        array = product.epilogue_input(place.b)
        plgpu.async_prefetch(array.at[rows, pl.ds(place.n0, TILE)])


def consume(ring, wg, product, place, ranges=None):
    """Sum this consumer's 64 rows of a tile, and hand them to the product's epilogue. `ranges`: as
    in `accumulate`.
    """
    own_rows = pl.ds(pl.multiple_of(wg * CONSUMER_ROWS, CONSUMER_ROWS), CONSUMER_ROWS)
    accumulator = plgpu.ACC(  # pyright: ignore[reportPrivateImportUsage]
        (CONSUMER_ROWS, TILE), jnp.float32
    )

    def whole_sum(sums):
        accumulate(ring, product, place, own_rows, sums, ranges)
        return sums[...]

    m0 = pl.multiple_of(place.m0 + wg * CONSUMER_ROWS, CONSUMER_ROWS)
    write = product.epilogue(place.b, m0, place.n0)  # what it loads is there after the sum
    sums: Any = pl.run_scoped(whole_sum, accumulator)
    values: Any = None
    size = product.epilogue_columns
    for k in range(TILE // size):
        step, column = divmod(k * size, BLOCK_K)
        if column == 0 and product.epilogue_steps:
            values = read_epilogue_input(ring, place, own_rows, step)
        first = pl.multiple_of(place.n0 + k * size, size)
        same = None if values is None else values[:, column : column + size]
        write(k, pl.ds(first, size), sums[:, k * size : (k + 1) * size], same)


def accumulate(ring, product, place, own_rows, sums, ranges=None):
    """Add the whole sum to an accumulator [64, 256] float32.

    `ranges`: kind, first k-step and end of each part of the sum, where they are not all of the
    product's kind.
    """
    for kind, begin, end in ranges or [(product.kind, 0, place.k_steps)]:
        step = functools.partial(_consume_k_step, ring, kind, place, own_rows, sums)
        jax.lax.fori_loop(begin, end, step, None)
    plgpu.wgmma_wait(0)

    @pl.when(place.k_steps > 0)
    def _():
        ring.release(place.first + place.k_steps - 1)


def _consume_k_step(ring, kind, place, own_rows, sums, s, _):
    """Multiply the operands of one stage; release the stage before it."""
    stage = ring.stage(place.first + s)
    plgpu.barrier_wait(ring.full.at[stage])
    if kind[0] == "t":
        left = _transposed(ring.left[True].at[stage, :, own_rows])
    else:
        left = ring.left[False].at[stage, own_rows]
    if kind[1] == "t":
        right = _transposed(ring.right[False].at[stage])
    else:
        right = ring.right[True].at[stage]
    plgpu.wgmma(sums, left, right)
    plgpu.wgmma_wait(1)  # the one before this

    @pl.when(s > 0)
    def _():
        ring.release(place.first + s - 1)


def read_epilogue_input(ring, place, own_rows, step):
    """64 columns of the input, [64, 64], out of the ring."""
    stage = ring.stage(place.first + place.k_steps + step)
    plgpu.barrier_wait(ring.full.at[stage])
    values = read(ring.left[0], (stage, own_rows, slice(None)))
    plgpu.commit_smem()  # or TMA might overwrite what an ordinary read has not read yet
    plgpu.barrier_arrive(ring.empty.at[stage])
    return values


_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
_LOAD_TAKES_INDEX = _INDEX is not None and _INDEX.default is inspect.Parameter.empty  # jax 0.10


def read(ref, part):
    """Read part of an array, in the layout of a tile's sums."""
    part = ref.at[part]
    index = ((),) if _LOAD_TAKES_INDEX else ()
    return plgpu.load(part, *index, layout=plgpu.Layout.WGMMA, optimized=False)


def _transposed(ref):
    if hasattr(ref, "transpose"):
        return ref.transpose((1, 0))
    return plgpu.transpose_ref(ref, (1, 0))


def shared_memory(shape, dtype):
    """Shared memory, tiled and swizzled as TMA and wgmma want it: rows of at most 128 bytes."""
    itemsize = jnp.dtype(dtype).itemsize
    columns = min(shape[-1], 128 // itemsize)
    transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns * itemsize)
    return plgpu.SMEM(shape, dtype=dtype, transforms=transforms)


def device_multiprocessors() -> int:
    """Of the device that is there; of an H100 where none is."""
    return getattr(jax.devices()[0], "core_count", 132)
