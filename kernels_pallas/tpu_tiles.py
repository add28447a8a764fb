"""The sweeps of the TPU kernel, what each needs of VMEM and HBM, and the tiles it runs in.

Letters as in `tpu.py`, where the sweeps are described.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

from jax.experimental import pallas as pl

LANES, SUBLANES = 128, 16  # of a bf16 tile; float32 needs 8 sublanes only
DEFAULT_VMEM = 64 * 2**20  # of v5p and v7x, per core; v5e and v6e have twice as much
HEADROOM = 8 * 2**20  # of VMEM, for what the estimate in `_vmem` does not see: the compiler's own

LONGEST = 1024  # side of a tile
# For comparing tiles, in FLOPs: what v6e computes while it moves a byte of HBM, and (assumed) in a
# grid step's overhead of a third of a microsecond. The other generations compute less meanwhile, so
# their compute hides more.
FLOPS_PER_BYTE, FLOPS_PER_STEP = 560, 3e8
PRODUCTS = {"separate": 3, "folded": 2, "none": 2}  # matmuls of a step


@dataclasses.dataclass(frozen=True)
class Core:
    """What the kernels are compiled for.

    `tiles` is (bP, bQ), for tests; None takes the best that fit. `interpret` is `pallas_call`'s.
    """

    vmem_bytes: int = DEFAULT_VMEM
    tiles: tuple[int, int] | None = None
    interpret: Any = False


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One of the four sweeps of `tpu.py`."""

    name: str
    reverse: bool  # from the last chunk to the first
    transposed: bool  # X is tiled over F: P = F, Q = D, and HBM holds its transpose
    # How W is applied besides X: in a product of its own, in the rounded sum W + X, or not at all.
    weight: Literal["separate", "folded", "none"]
    gradients: bool = False  # also dW, summed over sequences and documents, and the rows of dlr
    final: bool = False  # X after the last step is a result


FORWARD = Sweep("ttt_forward", reverse=False, transposed=False, weight="separate", final=True)
FUSED = dataclasses.replace(FORWARD, name="ttt_fused", weight="folded")
REPLAY = Sweep("ttt_replay", reverse=False, transposed=True, weight="folded")
REVERSE_DV = Sweep(
    "ttt_reverse_dv", reverse=True, transposed=False, weight="none", gradients=True, final=True
)
REVERSE_DZ = Sweep("ttt_reverse_dz", reverse=True, transposed=True, weight="none")
SWEEPS = (FORWARD, REPLAY, REVERSE_DV, REVERSE_DZ)


def round_up(size: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-size // multiple) * multiple


@functools.cache
def choose_tiles(sweep: Sweep, core: Core, P, Q, C, itemsize) -> tuple[int, int] | None:
    """Choose (bP, bQ): the lowest cost among the tiles that fit VMEM; None if none does.

    Wide tiles of P, because streams are read once per tile, but no wider than P needs, and long
    blocks of Q. P need not be a multiple of bP.
    """
    if core.tiles is not None:
        return core.tiles

    def cost(tile):
        bP, bQ = tile
        tiles = pl.cdiv(P, bP)
        flops = 2 * PRODUCTS[sweep.weight] * C * tiles * bP * Q
        bytes_moved = traffic(sweep, P, Q, C, itemsize, bP)
        return flops + FLOPS_PER_BYTE * bytes_moved + FLOPS_PER_STEP * tiles * (Q // bQ)

    sides = range(LANES, LONGEST + 1, LANES)
    candidates = [(bP, bQ) for bP in sides if bP <= P for bQ in sides if Q % bQ == 0]
    most = core.vmem_bytes - HEADROOM
    fitting = [tile for tile in candidates if _vmem(sweep, C, Q, itemsize, *tile) <= most]
    return min(fitting, key=cost, default=None)


def _vmem(sweep: Sweep, C, Q, itemsize, bP, bQ) -> int:
    """Bytes of VMEM: scratch, blocks (twice, for the pipeline) and what the matmuls return."""
    block = bP * bQ
    scratch = bP * Q * 4 * (2 if sweep.gradients else 1) + bP * C * (itemsize + 4)
    states = 1 + sweep.final + sweep.gradients
    streams = C * bQ * itemsize * (2 if sweep.transposed else 1)
    tokens = C * bP * itemsize * (3 if sweep.gradients or sweep is REVERSE_DZ else 2)
    weight = 0 if sweep.weight == "none" else block * itemsize
    values = C * bP * 4 + block * (8 + itemsize) + C * bQ * itemsize
    return scratch + 2 * (states * block * 4 + streams + tokens + weight) + values


def traffic(sweep: Sweep, P, Q, C, itemsize, bP) -> int:
    """Count bytes of HBM per chunk: every tile of P streams a and q (and W), and its own tokens."""
    streams = pl.cdiv(P, bP) * C * Q * itemsize * (2 if sweep.transposed else 1)
    tokens = C * P * itemsize * (3 if sweep.gradients or sweep is REVERSE_DZ else 2)
    return streams + tokens + (0 if sweep.weight == "none" else P * Q * itemsize)
