"""Train several variants of a preset, several seeds each, and put their held-out losses in one
table.

    python benchmarks/study.py configs/books.yaml --out study --seeds 0 1 2 --parallel 2 \\
        --base "--data.train books.jsonl.xz --data.tokenizer books_tokenizer.json --steps 300" \\
        --arm "none: --model.ttt.layers=[]" --arm "ridge: --model.ttt.write ridge --model.ttt.lr 1"

Processes train one run after the other, `--parallel` of them. Runs that are there already are not
repeated, so that a study can go on. On CPUs `--cores 2` gives each process two cores of its own.
An arm named `BASE+WHAT` is compared with the arm `BASE`, seed by seed, in a second table.
`--taps 2` in an arm is no field of the config: it trains that tap of the target's convolution alone
(target_taps.py).
On one GPU `--parallel 2` lets one run compile while another trains; tokens a second mean nothing
then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import shlex
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]


def run(
    args: argparse.Namespace, arm: str, overrides: str, seed: int, started: float
) -> dict | None:
    """One run's result; None where it failed or the time was up before it began."""
    name = f"{arm}-{seed}".replace("+", ".")
    folder = args.out / name
    if not (folder / "report.json").exists():
        if time.time() - started > args.seconds:
            print(f"{name}: not started, the time is up", flush=True)
            return None
        words = [args.config, *shlex.split(args.base), *shlex.split(overrides)]
        words += ["--runs_dir", str(args.out), "--name", name, "--seed", str(seed)]
        if code := train(words, args.out / f"{name}.log"):
            tail = (args.out / f"{name}.log").read_text(errors="replace").splitlines()[-3:]
            print(f"{name}: exit code {code}: {' | '.join(tail)}", flush=True)
            return None
    report = json.loads((folder / "report.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ratios = [
        v for row in rows for k, v in row.items() if k.endswith("state_ratio") and v is not None
    ]
    result = {
        "card": report["hardware"]["device"],
        "jax": report["versions"]["jax"],
        "commit": (report["commit"] or "")[:7],
        "date": report["date"][:10],
        "arm": arm,
        "seed": seed,
        "overrides": overrides,
        "heldout": report["heldout"],
        "tokens_per_second": report.get("tokens_per_second"),
        "ratio_last": [v for k, v in rows_last(rows).items() if k.endswith("state_ratio")],
        "ratio_max": max(ratios, default=0.0),
    }
    with (args.out / "results.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(line(result), f" {time.time() - started:.0f} s", flush=True)
    return result


def keep_to_cores(number, cores: int) -> None:
    """Give this process its own cores, before jax counts them."""
    with number.get_lock():
        mine, number.value = number.value, number.value + 1
    if cores:
        everything = sorted(os.sched_getaffinity(0))
        places = range(mine * cores, (mine + 1) * cores)
        os.sched_setaffinity(0, {everything[i % len(everything)] for i in places})


def train(words: list[str], log: Path) -> int:
    """Run `train.py` in this process, which has imported jax and read the data for the run
    before.
    """
    from target_taps import only_taps

    from train import main

    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ours.add_argument("--taps", type=int, nargs="+")
    args, words = ours.parse_known_args(words)
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            with only_taps(args.taps and tuple(args.taps)):
                return main(words)
        except Exception:
            traceback.print_exc()
            return 1


def rows_last(rows: list[dict]) -> dict:
    """The last row that has fast-weight ratios."""
    return next((row for row in reversed(rows) if any(k.endswith("state_ratio") for k in row)), {})


def figures(result: dict) -> dict[str, float]:
    on, off = result["heldout"]["ttt_on"], result["heldout"]["ttt_off"]
    return {
        "on": sum(on) / len(on),
        "off": sum(off) / len(off),
        "on, last": on[-1],
        "off, last": off[-1],
        "ratio": max(result["ratio_last"], default=0.0),
        "ratio, most": result["ratio_max"],
        "tok/s": result["tokens_per_second"] or 0.0,
    }


def line(result: dict) -> str:
    values = "  ".join(f"{name} {value:.4g}" for name, value in figures(result).items())
    return f"{result['arm']}-{result['seed']}: {values}"


def table(results: list[dict]) -> str:
    """Mean and 95 % interval over seeds (Student's t), one line an arm."""
    lines = []
    for arm in dict.fromkeys(r["arm"] for r in results):
        rows = [figures(r) for r in results if r["arm"] == arm]
        cells = [interval([row[name] for row in rows]) for name in rows[0]]
        lines.append(f"| {arm} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join([*head(list(figures(results[0]))), *lines])


def paired(results: list[dict]) -> str:
    """Each arm `BASE+WHAT` less `BASE`, seed by seed: below zero is better than the base. Empty
    without such arms.
    """
    by_run = {(r["arm"], r["seed"]): figures(r) for r in results}
    names, lines = ["on", "off", "on, last"], []
    for arm in dict.fromkeys(r["arm"] for r in results):
        base, plus, _ = arm.partition("+")
        seeds = [s for a, s in by_run if a == arm and (base, s) in by_run]
        if not plus or not seeds:
            continue
        less = lambda name, arm=arm, base=base, seeds=seeds: [
            by_run[arm, s][name] - by_run[base, s][name] for s in seeds
        ]
        cells = [interval(less(name)) for name in names]
        lines.append(f"| {arm} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join([*head([f"{n}, less base" for n in names]), *lines]) if lines else ""


def head(names: list[str]) -> list[str]:
    return ["| arm | seeds | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]


def mean_and_half(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half of its 95 % interval by Student's t; None for a single value."""
    quantile = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31}
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, None
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, quantile.get(n, 2.26) * deviation / math.sqrt(n)


def interval(values: list[float]) -> str:
    mean, half = mean_and_half(values)
    return f"{mean:.5g}" if half is None else f"{mean:.5g} +- {half:.2g}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--base", default="", help="overrides of all arms")
    parser.add_argument("--arm", action="append", required=True, help="'NAME: overrides'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--cores", type=int, default=0, help="cores of each process; 0: all")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="no run starts later than this"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    arms = [
        (name.strip(), overrides.strip())
        for name, _, overrides in (text.partition(":") for text in args.arm)
    ]
    started = time.time()
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / args.parallel:.2f}"
    jobs = [(arm, overrides, seed) for seed in args.seeds for arm, overrides in arms]
    context = multiprocessing.get_context("spawn")
    number = context.Value("i", 0)
    with ProcessPoolExecutor(
        args.parallel, mp_context=context, initializer=keep_to_cores, initargs=(number, args.cores)
    ) as pool:
        running = [pool.submit(run, args, *job, started) for job in jobs]
        results = [r for r in (future.result() for future in running) if r]
    if results:
        print(table(results))
        print(f"\n{paired(results)}")
    return 0 if results else 1


if __name__ == "__main__":
    sys.exit(main())
