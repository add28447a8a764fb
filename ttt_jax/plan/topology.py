"""The devices of a plan: kinds of chips, how many, their memory and their rates."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import NamedTuple

from ttt_jax.errors import UserError

GB = 1e9
# Memory of one jax device in GB, vendors' figures. A TPU compiler keeps a part of it: it names the
# usable size when it refuses.
TPU_MEMORY = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
GPU_MEMORY = {"h100": 80, "h200": 141}


class Rates(NamedTuple):
    """What one jax device can do a second at most, vendors' figures: bfloat16 FLOPs, bytes of its
    memory, bytes that it sends to others of its slice or host.
    """

    flops: float
    memory: float
    links: float


RATES = {
    "v4": Rates(275e12, 1228e9, 300e9),
    "v5e": Rates(197e12, 819e9, 200e9),
    "v5p": Rates(459e12, 2765e9, 600e9),
    "v6e": Rates(918e12, 1640e9, 400e9),
    "h100": Rates(989.4e12, 3350e9, 450e9),
    "h200": Rates(989.4e12, 4800e9, 450e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A kind of chip and how many; `grid` is empty for GPUs."""

    text: str
    kind: str
    devices: int
    grid: tuple[int, ...] = ()

    @property
    def memory(self) -> float:
        """Bytes of one device."""
        return (TPU_MEMORY | GPU_MEMORY)[self.kind] * GB


def parse_topology(text: str) -> Topology:
    """`v5p:4x4x4`, `v6e:16x16`, `h100:8`. Raises `UserError`."""
    kind, _, size = text.lower().partition(":")
    known = ", ".join(
        [
            *(f"{k}:{'x'.join('2' * _dimensions(k))}" for k in TPU_MEMORY),
            *(f"{k}:8" for k in GPU_MEMORY),
        ]
    )
    if kind not in TPU_MEMORY | GPU_MEMORY or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        raise UserError(f"--topology {text}: unknown; write one such as {known}")
    grid = tuple(int(n) for n in size.split("x"))
    if kind in GPU_MEMORY:
        if len(grid) != 1:
            raise UserError(f"--topology {text}: give the number of GPUs, such as {kind}:8")
        return Topology(text, kind, grid[0])
    if len(grid) != (d := _dimensions(kind)):
        raise UserError(
            f"--topology {text}: {kind} is a grid of {d} sizes, such as {kind}:{'x'.join('4' * d)}"
        )
    return Topology(text, kind, math.prod(grid), grid)


def _dimensions(kind: str) -> int:
    return 3 if kind in ("v4", "v5p") else 2
