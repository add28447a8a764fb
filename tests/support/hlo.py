"""Counts what a compiled program sends between devices."""

import re

import numpy as np

SIZES = {"f64": 8, "f32": 4, "bf16": 2, "s64": 8, "s32": 4, "u32": 4, "pred": 1}
KINDS = ("all-to-all", "all-gather", "all-reduce", "collective-permute", "reduce-scatter")


def collectives(hlo: str) -> list[tuple[str, int]]:
    """(kind, bytes of the result on one device) of every collective in a compiled program's
    text.
    """
    found = []
    for result, kind, rest in re.findall(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\((.*)", hlo):
        if re.search(r"replica_groups=(\{\{0\}|\[\d+,1\])", rest):
            continue  # every device by itself: nothing moves
        size = 0
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
            size += SIZES[dtype] * int(np.prod([int(n) for n in shape.split(",") if n]))
        found.append((kind, size))
    return found


def collective_bytes(hlo: str) -> dict[str, int]:
    """Bytes by kind."""
    totals = dict.fromkeys(KINDS, 0)
    for kind, size in collectives(hlo):
        totals[kind] += size
    return totals
