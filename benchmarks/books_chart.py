"""Draw held-out loss by position for arms of `benchmarks/study.py`, over seeds with intervals.

    python benchmarks/books_chart.py docs/books_ttt.png docs/results/2026-11-24-books-*.jsonl \\
        --arm "none: trained without TTT" --arm "sum: TTT, the paper's write" \\
        --arm "ridge1: TTT, least squares"

An interval is 95 % by Student's t over seeds, so an arm needs two at least. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from study import mean_and_half


def by_seed(files: list[Path], arm: str) -> dict[int, dict]:
    """Held-out losses of one arm by seed; of two results for a seed the last counts."""
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {row["seed"]: row["heldout"] for row in rows if row["arm"] == arm and "heldout" in row}


def draw(files: list[Path], arms: list[tuple[str, str]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5))
    for n, (arm, label) in enumerate(arms):
        seeds = by_seed(files, arm)
        if len(seeds) < 2:
            raise SystemExit(f"arm {arm}: {len(seeds)} seed(s) in these files; needs two or more")
        positions = next(iter(seeds.values()))["positions"]
        places = [(low + high) / 2 for low, high in positions]
        columns = zip(*(heldout["ttt_on"] for heldout in seeds.values()), strict=True)
        means, halves = zip(*(mean_and_half(list(column)) for column in columns), strict=True)
        axis.errorbar(
            [x + 120 * (n - 1) for x in places],
            means,
            yerr=halves,
            color=f"C{n}",
            marker="o",
            capsize=3,
            label=f"{label} ({len(seeds)} seeds)",
        )
    axis.set_xlabel("position in the book (tokens)")
    axis.set_ylabel("held-out loss (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--arm", action="append", required=True, help="'NAME: label'")
    args = parser.parse_args()
    arms = [tuple(part.strip() for part in text.split(":", 1)) for text in args.arm]
    draw(args.results, arms, args.out)


if __name__ == "__main__":
    main()
