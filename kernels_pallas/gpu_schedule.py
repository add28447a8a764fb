"""Share out the output tiles of a Mosaic GPU launch: which cluster computes which, and in which
order.

Made on the host, when the kernel is traced. `gpu_tiles.py` reads it on the device.
"""

from __future__ import annotations

import functools
import heapq
from typing import Any, NamedTuple

import numpy as np

TILE = 256  # rows and columns of a cluster's tile
BLOCK_K = 64  # of the summed dimension: one k-step
EPILOGUE_STEPS = 2  # cost of an epilogue, in k-steps. It only balances the table.


class Tile(NamedTuple):
    """One row of the table: the tile that a cluster computes."""

    product: Any  # its number among the launch's products
    b: Any
    row: Any  # first row and column
    column: Any


class ProductShape(NamedTuple):
    """Rows, columns and length of the sum of a product."""

    rows: int
    columns: int
    length: int

    @property
    def tiles(self) -> list[tuple[int, int]]:
        """First row and column of each output tile."""
        return [(m, n) for n in range(0, self.columns, TILE) for m in range(0, self.rows, TILE)]

    @property
    def cost(self) -> int:
        """Duration of a tile, in k-steps."""
        return self.length // BLOCK_K + EPILOGUE_STEPS


@functools.cache
def schedule(shapes: tuple[ProductShape, ...], B: int, clusters: int) -> np.ndarray:
    """Give the tiles, the longest first, to whichever cluster is free.

    Args:
      shapes: of each product.
      B: sequences, which all have these products.
      clusters: of the launch.

    Returns:
      [clusters, 2 + most tiles of a cluster, 4] int32: rows of `Tile`; the first row holds their
      count, and behind every cluster's last one is a row of zeros.
    """
    order = sorted(range(len(shapes)), key=lambda k: -shapes[k].cost)
    tiles = [Tile(k, b, *at) for k in order for b in range(B) for at in shapes[k].tiles]
    free = [(0, cluster) for cluster in range(clusters)]
    queues: list[list[Tile]] = [[] for _ in free]
    for tile in tiles:
        now, cluster = heapq.heappop(free)
        queues[cluster].append(tile)
        heapq.heappush(free, (now + shapes[tile.product].cost, cluster))
    table = np.zeros((clusters, 2 + max(map(len, queues)), len(Tile._fields)), np.int32)
    for cluster, queue in enumerate(queues):
        table[cluster, 0, 0] = len(queue)
        for j, tile in enumerate(queue):
            table[cluster, 1 + j] = tile
    return table
