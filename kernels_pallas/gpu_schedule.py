"""Order the output tiles of a Mosaic GPU launch: which cluster computes which, and when.

Made on the host, when the kernel is traced. `gpu_tiles.py` reads it on the device.
"""

from __future__ import annotations

import collections
import functools
import heapq
from typing import Any, NamedTuple

import numpy as np

TILE = 256  # rows and columns of a cluster's tile
BLOCK_K = 64  # of the summed dimension: one k-step
# Cost of an epilogue, in k-steps, as measured on an H100 (docs/performance.md). It only balances
# the table.
UPDATE_STEPS, APPLY_STEPS = 10, 2


class Tile(NamedTuple):
    """One row of the table: the tile that a cluster computes, and what must be finished before.

    An apply multiplies by the copy of the state, an update writes the state and its next copy. A
    run is a stretch of one cluster's tiles that belong to the same chunk, sequence and kind.
    """

    product: Any  # its number among the launch's products
    b: Any
    row: Any  # first row and column
    column: Any
    chunk: Any  # counted from the launch's first
    applies_before: Any  # runs of applies of the chunk before, over all clusters, to wait for
    updates_before: Any  # runs of updates; 0: known to be finished
    last: Any  # 1 for the last tile of a run, which is counted


class ProductShape(NamedTuple):
    """Rows, columns and length of the sum of a product, and whether it updates the state."""

    rows: int
    columns: int
    length: int
    updates: bool

    @property
    def tiles(self) -> list[tuple[int, int]]:
        """First row and column of each output tile."""
        return [(m, n) for n in range(0, self.columns, TILE) for m in range(0, self.rows, TILE)]

    @property
    def cost(self) -> int:
        """Duration of a tile, in k-steps."""
        return self.length // BLOCK_K + (UPDATE_STEPS if self.updates else APPLY_STEPS)


@functools.cache
def schedule(
    shapes, B: int, clusters: int, chunks: int = 1, together: int = 1 << 30, latency: int = 0
) -> np.ndarray:
    """Order the tiles of a launch and share them out among clusters.

    The applies of a chunk read the copy of the state that the updates of the chunk before wrote.
    Its updates overwrite the copy that the applies of the chunk before read. Whenever a cluster is
    free in a simulated run, it takes the first tile of what is ready: the oldest chunk's, there
    updates, for which the next chunk waits; in the last chunk the longest sums. Before that, it
    prefers the sequences that go `together`, so that their states stay in L2. In the order in
    which tiles start there, nothing waits for what comes later, so no real run can block, however
    long its tiles take.

    Args:
      shapes: (rows, columns, length of the sum, updates the state?) of each product.
      B: sequences.
      clusters: of the launch.
      chunks: of the launch.
      together: sequences that are preferred to those behind them.
      latency: k-steps from the end of a group of tiles to the start of those that wait for it.

    Returns:
      [clusters, 1 + most tiles of a cluster, 8] int32: rows of `Tile`; the first row holds their
      count.
    """
    shapes = [ProductShape(*shape) for shape in shapes]
    waiting = _Waiting(shapes, B, chunks, together)
    queues: list[list] = [[] for _ in range(clusters)]
    free, running = list(range(clusters)), []  # running: (time, cluster, group of tiles)
    finished: list = []  # (time, group of tiles)
    now = 0
    while waiting.ready or running or finished:
        while waiting.ready and free:
            cluster = heapq.heappop(free)
            chunk, k, b, row_column = waiting.take()
            queues[cluster].append((k, b, *row_column, chunk))
            group = chunk, b, shapes[k].updates
            heapq.heappush(running, (now + shapes[k].cost, cluster, group))
        now = min(heap[0][0] for heap in (running, finished) if heap)
        while running and running[0][0] == now:
            _, cluster, group = heapq.heappop(running)
            heapq.heappush(free, cluster)
            heapq.heappush(finished, (now + latency, group))
        while finished and finished[0][0] == now:
            waiting.finish(*heapq.heappop(finished)[1])
    return _table(queues, [shape.updates for shape in shapes])


class _Waiting:
    """Tiles that no cluster has taken yet; those in `ready` may start."""

    def __init__(self, shapes, B, chunks, together):
        self.shapes, self.chunks, self.together = shapes, chunks, together
        # (those that go together, chunk, 0 for what goes first, -cost, product, b, tiles left, the
        # next one last)
        self.ready: list = []
        count = {
            updates: sum(len(shape.tiles) for shape in shapes if shape.updates == updates)
            for updates in (False, True)
        }
        self.unfinished = {
            (chunk, b, updates): count[updates]
            for chunk in range(chunks)
            for b in range(B)
            for updates in (False, True)
        }
        for b in range(B):
            self.release(0, b, False)
            self.release(0, b, True)

    def take(self):
        """Remove and return the first tile that may start: chunk, product, b, (row, column)."""
        _, chunk, *_, k, b, left = self.ready[0]
        tile = left.pop()
        if not left:
            heapq.heappop(self.ready)
        return chunk, k, b, tile

    def release(self, chunk, b, updates):
        """Let a group of tiles start."""
        if chunk == self.chunks:
            return
        first = updates if chunk + 1 < self.chunks else not updates
        for k, shape in enumerate(self.shapes):
            if shape.updates == updates:
                order = b // self.together, chunk, not first, -shape.cost
                heapq.heappush(self.ready, (*order, k, b, shape.tiles[::-1]))

    def finish(self, chunk, b, updates):
        """Count a finished tile, and release the groups that waited for its group only."""
        self.unfinished[chunk, b, updates] -= 1
        if self.unfinished[chunk, b, updates] > 0:
            return
        if updates:
            self.release(chunk + 1, b, False)
        if self.unfinished[chunk, b, not updates] == 0:
            self.release(chunk + 1, b, True)


def _table(queues, updates) -> np.ndarray:
    """The schedule with what each cluster has to wait for, and where it has to signal."""

    def group_of(tile):
        return tile[4], tile[1], updates[tile[0]]

    groups = [[group_of(tile) for tile in queue] for queue in queues]
    last = [
        [j + 1 == len(queue) or queue[j + 1] != group for j, group in enumerate(queue)]
        for queue in groups
    ]
    runs = collections.Counter(
        group
        for queue, ends in zip(groups, last, strict=True)
        for group, end in zip(queue, ends, strict=True)
        if end
    )
    table = np.zeros((len(queues), 1 + max(map(len, queues)), len(Tile._fields)), np.int32)
    for c, queue in enumerate(queues):
        table[c, 0, 0], known = len(queue), set()
        for j, tile in enumerate(queue):
            chunk, b, is_update = groups[c][j]
            kinds = (False, True) if is_update else (True,)
            needed = [(chunk - 1, b, kind) for kind in kinds if chunk > 0]
            wait = {group[2]: runs[group] for group in needed if group not in known}
            known.update(needed)
            table[c, 1 + j] = (*tile, wait.get(False, 0), wait.get(True, 0), last[c][j])
    return table
