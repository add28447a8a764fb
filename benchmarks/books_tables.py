"""Write the tables of the studies into the documents, and draw the README's picture.

    python benchmarks/books_tables.py

Reads docs/results/*.jsonl: lines of benchmarks/study.py (an arm and a seed with `heldout`) and of
benchmarks/books_eval.py (with `perplexity`); and docs/results/*memory-smollm2*.json, results of
benchmarks/memory_study.py. Blocks of the documents (PAGES) are made anew, between the lines `<!--
tables: NAME -->` and `<!-- tables: end -->`. So new results are put into docs/results/, and this is
run. Needs no GPU and trains nothing. `--print` writes nothing.

Intervals are 95 %. Over seeds, three or more: Student's t of differences seed by seed. Over books:
bootstrap of differences book by book, each the mean over the seeds that both arms have.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import memory_tables  # noqa: E402
from books_chart import draw  # noqa: E402
from study import mean_and_half  # noqa: E402

from ttt_jax.eval.statistics import mean_with_interval  # noqa: E402

NAMES = {
    "none": "no TTT, 300 steps",
    "sum": "`sum`, lr 0.002, 300 steps",
    "ridge1": "`ridge`, 300 steps",
    "none512": "no TTT, 512 steps",
    "ridge358": "`ridge`, 358 steps",
    "decay358": "`ridge`, decay 0.9, 358 steps",
    "sum358": "`sum` by the rule, 358 steps",
    "noproj": "no W_target (the preset)",
    "sumnoproj": "the preset with `sum`",
    "error": "the preset with prediction errors",
    "drop": "`decay358` with `ttt_drop`",
}
STEPS = [("none", "sum"), ("none", "ridge1"), ("sum", "ridge1")]  # equal steps
TIME = [("none512", "ridge358"), ("none512", "decay358"), ("none512", "noproj")]  # equal time
OTHER = [  # equal steps again, later code
    ("sum358", "decay358"),
    ("ridge358", "decay358"),
    ("decay358", "noproj"),
    ("sumnoproj", "noproj"),
    ("noproj", "error"),
]
PICTURE = [
    ("none512", "trained without TTT, 512 steps"),
    ("noproj", "TTT, least squares, 358 steps (less time)"),
]
PAGES = {
    "books": "docs/results.md",
    "books, details": "docs/lab/2026-11-30-study1.md",
    "ablations": "docs/lab/2026-11-30-ablations.md",
    "memory, smollm2": "docs/memory.md",
    "memory, smollm2, all": "docs/lab/2026-11-30-memories-smollm2.md",
}
SHOWN = (0, 1, 2, 4)  # eighths of a row, beside the last
Runs = dict[tuple[str, int], dict[str, Any]]


def read(folder: Path, key: str, pattern: str) -> Runs:
    """Results by arm and seed that hold `key`; of two results the later counts."""
    rows: list[dict[str, Any]] = []
    for file in sorted(folder.glob(pattern)):
        rows += [json.loads(text) for text in file.read_text().splitlines()]
    rows.sort(key=lambda row: str(row.get("date") or ""))
    return {(row["arm"], row["seed"]): row for row in rows if key in row}


def seeds_of(runs: Runs, *arms: str) -> list[int]:
    return sorted(set.intersection(*({s for a, s in runs if a == arm} for arm in arms)))


def last(row: dict[str, Any], mode: str = "ttt_on") -> float:
    return row["heldout"][mode][-1]


def mean(row: dict[str, Any], mode: str = "ttt_on") -> float:
    losses = row["heldout"][mode]
    return sum(losses) / len(losses)


def over_seeds(values: Sequence[float], form: str = ".3f") -> str:
    """Write a mean and its interval; a mean alone for one or two seeds, nothing for none."""
    if not values:
        return ""
    middle, half = mean_and_half(list(values))
    if half is None or len(values) < 3:  # the interval of two says nothing: 12.7 deviations
        return f"{middle:{form}}"
    return f"{middle:{form}} ({middle - half:{form}} to {middle + half:{form}})"


def short(values: Sequence[float]) -> str:
    """Write a difference and half of its interval."""
    middle, half = mean_and_half(list(values))
    alone = half is None or len(values) < 3
    return f"{middle:+.3f}" if alone else f"{middle:+.3f} ± {half:.3f}"


def over_books(value_N: np.ndarray, form: str = ".3f") -> str:
    found = mean_with_interval(value_N)
    return f"{found['mean']:{form}} ({found['low']:{form}} to {found['high']:{form}})"


def table(headings: list[str], rows: list[list[str]]) -> str:
    ruler = "|---" + "|---:" * (len(headings) - 1) + "|"
    return "\n".join(["| " + " | ".join(r) + " |" for r in [headings]] + [ruler] + [
        "| " + " | ".join(row) + " |" for row in rows
    ])  # fmt: skip


# ------------------------------------------------------------------------------------------ losses


def losses(runs: Runs, arms: Sequence[str]) -> str:
    rows = []
    for arm in arms:
        found = [runs[arm, seed] for seed in seeds_of(runs, arm)]
        if not found:
            continue
        ttt = any(row["ratio_last"] for row in found)
        cells = [over_seeds([last(row) for row in found])]
        cells += [over_seeds([last(row, "ttt_off") for row in found])[:5] if ttt else ""]
        cells += [over_seeds([mean(row) for row in found])]
        rows.append([f"`{arm}`: {NAMES[arm]}", str(len(found)), *cells])
    return table(["trained", "seeds", "last, on", "last, off", "all positions, on"], rows)


def books_of(evals: Runs, arm: str, seeds: list[int], mode: str) -> np.ndarray | None:
    """Losses of the last tokens by book, mean over seeds; None where a seed was not evaluated."""
    if not seeds or any((arm, seed) not in evals for seed in seeds):
        return None
    parts = [evals[arm, seed]["perplexity"] for seed in seeds]
    found = [
        part["positions"][-1]["per_document"][mode if mode in part["modes"] else "off"]
        for part in parts
    ]
    return np.mean(found, axis=0)


def differences(runs: Runs, evals: Runs, pairs: Sequence[tuple[str, str]]) -> str:
    """How far the second arm is below the first."""
    rows = []
    for floor, arm in pairs:
        seeds = seeds_of(runs, floor, arm)
        if not seeds:
            continue
        pair = [(runs[floor, seed], runs[arm, seed]) for seed in seeds]
        cells = [over_seeds([value(a) - value(b) for a, b in pair]) for value in (last, mean)]
        both = [s for s in seeds if (floor, s) in evals and (arm, s) in evals]
        base, ours = (books_of(evals, name, both, "on") for name in (floor, arm))
        cells.append("" if base is None or ours is None else over_books(base - ours))
        rows.append([f"`{floor}` less `{arm}`", str(len(seeds)), *cells])
    heads = ["", "seeds", "last, over seeds", "all, over seeds", "last, over books"]
    return table(heads, rows) if rows else ""


def by_position(runs: Runs, pairs: Sequence[tuple[str, str]]) -> str:
    rows = []
    for floor, arm in pairs:
        seeds = seeds_of(runs, floor, arm)
        if not seeds:
            continue
        gain_SP = np.array(
            [
                np.subtract(runs[floor, s]["heldout"]["ttt_on"], runs[arm, s]["heldout"]["ttt_on"])
                for s in seeds
            ]
        )
        rows.append([f"`{floor}` - `{arm}`", *(f"{x:.3f}" for x in gain_SP.mean(axis=0))])
    return table(["tokens from", *(f"{2 * n}k" for n in range(8))], rows) if rows else ""


# ------------------------------------------------------------------------------------ same weights


def controls(evals: Runs) -> str:
    """Off less on, and off less another book's S, on the same weights, by position."""
    rows, arms = [], list(dict.fromkeys(arm for arm, _ in evals))
    for arm, (key, mode) in itertools.product(arms, (("on", "on"), ("other book", "shuffled"))):
        parts = [evals[arm, seed]["perplexity"] for seed in seeds_of(evals, arm)]
        if mode not in parts[0]["modes"]:
            continue
        gain_SPN = np.array(
            [
                [np.subtract(e["per_document"]["off"], e["per_document"][mode]) for e in p]
                for p in (part["positions"] for part in parts)
            ]
        )
        cells = [f"{x:.3f}" for x in gain_SPN.mean(axis=(0, 2))]
        rows.append([f"`{arm}`, {key}", str(len(parts)), *(cells[n] for n in SHOWN)])
        rows[-1].append(over_books(gain_SPN[:, -1].mean(axis=0)))
    heads = ["off less", "seeds", *(f"{2 * n}k" for n in SHOWN), "14k, over books"]
    return table(heads, rows) if rows else ""


def strict(evals: Runs) -> str:
    """What S alone carries: cold less strict, by the length that was read."""
    rows, read = [], []
    for arm in dict.fromkeys(arm for arm, _ in evals):
        parts = [evals[arm, s]["perplexity"]["lengths"] for s in seeds_of(evals, arm)]
        if "strict" not in parts[0][0]:
            continue
        cells, read = [], [f"{entry['length'] // 1024}k read" for entry in parts[0]]
        for entries in zip(*parts, strict=True):
            books = [e["per_document"] for e in entries]
            cells.append(
                over_books(np.mean([np.subtract(b["cold"], b["strict"]) for b in books], 0))
            )
        rows.append([f"`{arm}`", str(len(parts)), *cells])
    return table(["cold less strict", "seeds", *read], rows) if rows else ""


def recalled(evals: Runs, arm: str, length: int, mode: str) -> np.ndarray:
    """Recall by book, mean over seeds."""
    found = []
    for seed in seeds_of(evals, arm):
        entries = evals[arm, seed]["recall"]["lengths"]
        books = next(e for e in entries if e["length"] == length)[mode]["per_document"]
        found.append(np.subtract(books["control"], books["second"]))
    return np.mean(found, axis=0)


def recall(evals: Runs) -> str:
    """Recall by arm and length, on and off, and how often that of the first `sum` arm."""
    arms = [
        arm
        for arm in dict.fromkeys(a for a, _ in evals)
        if "recall" in evals[arm, seeds_of(evals, arm)[0]]
    ]
    floor = next((arm for arm in arms if arm.startswith("sum")), None)
    rows = []
    for arm in arms:
        lengths = [e["length"] for e in evals[arm, seeds_of(evals, arm)[0]]["recall"]["lengths"]]
        for length in lengths:
            on, off = (recalled(evals, arm, length, mode) for mode in ("on", "off"))
            cells = [over_books(on, ".4f"), f"{np.abs(off).max():.4f}"]
            if floor:
                cells.append(ratio(on, recalled(evals, floor, length, "on")))
            rows.append([f"`{arm}`", f"{length // 1024}k", str(len(seeds_of(evals, arm))), *cells])
    heads = ["", "read", "seeds", "recall, on", "largest of a book, off"]
    return table([*heads, *([f"times `{floor}`"] if floor else [])], rows) if rows else ""


def ratio(a_N: np.ndarray, b_N: np.ndarray, draws: int = 2000) -> str:
    """Write mean(a) / mean(b) with a bootstrap interval over books."""
    index = np.random.default_rng(0).integers(0, len(a_N), (draws, len(a_N)))
    low, high = np.percentile(a_N[index].mean(axis=1) / b_N[index].mean(axis=1), [2.5, 97.5])
    return f"{a_N.mean() / b_N.mean():.1f} ({low:.1f} to {high:.1f})"


# -------------------------------------------------------------------------------------- ablations


def ablations(runs: Runs, base: str, arms: Sequence[str]) -> str:
    """Each arm less the base, seed by seed; above zero is worse."""
    rows = []
    for arm in [base, *arms]:
        seeds = seeds_of(runs, base, arm)
        if not seeds:
            continue
        found = [(runs[arm, seed], runs[base, seed]) for seed in seeds]
        first = lambda row: row["heldout"]["ttt_on"][0]
        values = (first, last, mean)
        if arm == base:
            cells = [over_seeds([value(a) for a, _ in found])[:5] for value in values]
        else:
            cells = [short([value(a) - value(b) for a, b in found]) for value in values]
        gain = [last(a, "ttt_off") - last(a) for a, _ in found]
        ratios = [max(a["ratio_last"]) for a, _ in found if a["ratio_last"]]
        name = arm.rpartition("+")[2]
        rows.append([f"`{name}`", str(len(seeds)), *cells, over_seeds(gain)[:5]])
        rows[-1].append(f"{max(ratios):.2f}" if ratios else "")
    heads = ["arm", "seeds", "first eighth", "last eighth", "all positions"]
    return table([*heads, "off less on, last", "ratio"], rows) if rows else ""


# ------------------------------------------------------------------------------------------- pages


def blocks(results: Path) -> dict[str, list[str]]:
    """The tables by the name of their block."""
    runs, evals = read(results, "heldout", "*books*.jsonl"), read(results, "perplexity", "*.jsonl")
    small = read(results, "heldout", "*ablations*default*.jsonl")
    pairs = [*STEPS, *TIME, *OTHER]
    arms = list(dict.fromkeys(arm for pair in pairs for arm in pair))
    arms.sort(key=list(NAMES).index)
    known = {arm for arm, _ in runs}
    tried = [arm for arm in known if re.match("layers|chunk|rate|no(conv|decay)|raw|drop", arm)]
    by_loss = lambda table: lambda arm: mean(table[arm, seeds_of(table, arm)[0]])
    ours = {arm for arm, _ in small} - {"base"}
    today = {arm for arm in ours if arm.startswith("noproj+")}
    return {
        "books": [losses(runs, arms), differences(runs, evals, [*STEPS, *TIME])],
        "books, details": [
            differences(runs, evals, pairs),
            by_position(runs, pairs),
            controls(evals),
            strict(evals),
            recall(evals),
        ],
        "ablations": [
            ablations(runs, "noproj", sorted([*tried, "decay358"], key=by_loss(runs))),
            ablations(small, "base", sorted(ours - today, key=by_loss(small))),
            ablations(small, "noproj", sorted(today, key=by_loss(small))),
        ],
        **memory_tables.pages(results),
    }


def put(file: Path, name: str, parts: list[str]) -> None:
    """Write a block of a document anew. Raises SystemExit when it has no such block."""
    text = file.read_text(encoding="utf-8")
    begin, end = f"<!-- tables: {name} -->\n", "<!-- tables: end -->"
    if begin not in text:
        raise SystemExit(f"{file}: has no line {begin.strip()}")
    before, rest = text.split(begin, 1)
    after = rest.split(end, 1)[1]
    body = "\n\n".join(part for part in parts if part)
    file.write_text(f"{before}{begin}\n{body}\n\n{end}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "docs/results")
    parser.add_argument("--print", action="store_true", help="write nothing")
    args = parser.parse_args()
    made = blocks(args.results)
    if args.print:
        for name, parts in made.items():
            print(f"## {name}\n\n" + "\n\n".join(part for part in parts if part) + "\n")
        return
    for name, page in PAGES.items():
        put(ROOT / page, name, made[name])
    runs = read(args.results, "heldout", "*books*.jsonl")
    for arm, _ in PICTURE:
        if len(seeds_of(runs, arm)) < 3:
            print(f"docs/books_ttt.png stays as it is: {arm} has fewer than three seeds")
            return
    draw(sorted(args.results.glob("*books*.jsonl")), PICTURE, ROOT / "docs/books_ttt.png")


if __name__ == "__main__":
    main()
