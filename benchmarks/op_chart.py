"""Draw what `benchmarks/op.py --json` has measured, as a ratio to the bound. Needs no GPU.

python benchmarks/op_chart.py runs/op.jsonl docs/op.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def draw(rows: list[dict], path: Path) -> None:
    """Ratio to the bound, forward and forward + backward, a group of bars per case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["implementation"] != "down"]
    case = lambda row: f"{row['shape']} C={row['C']}\nB={row['B']} T={row['T'] // 1024}k"
    cases, names = (
        list(dict.fromkeys(map(case, rows))),
        sorted({row["implementation"] for row in rows}, reverse=True),
    )
    figure, axes = plt.subplots(2, 1, figsize=(max(7, 1.1 * len(cases)), 7), sharex=True)
    for axis, key, title in zip(
        axes, ("forward_ratio", "both_ratio"), ("forward", "forward + backward"), strict=True
    ):
        for n, this in enumerate(cases):
            here = {
                row["implementation"]: row[key] for row in rows if case(row) == this and key in row
            }
            for k, name in enumerate(sorted(here, reverse=True)):
                x = n + (k - (len(here) - 1) / 2) * 0.8 / max(len(here), 2)
                axis.bar(
                    x, here[name], width=0.8 / max(len(here), 2), color=f"C{names.index(name)}"
                )
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_title(f"{title}: time over the bound ({rows[0]['device']})")
        axis.set_xticks(range(len(cases)), cases, fontsize=7)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{k}") for k in range(len(names))]
    figure.legend(handles, names, loc="upper center", ncols=len(names))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    draw([json.loads(line) for line in source.read_text().splitlines()], target)
