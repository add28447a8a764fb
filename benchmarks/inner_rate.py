"""Does one inner learning rate, by the rule `auto`, stay near the best one over shapes?

    python benchmarks/inner_rate.py --out rates --parallel 16 --cores 2

Trains the default run's model at three widths, row lengths and chunk sizes, with 1/3, 1 and 3 times
the rate of the rule (ttt_jax/config/inner_rate.py), through benchmarks/study.py. The tokens of a
step stay the same. The last table says for every shape how much the rule's rate loses to the best
of the rates tried, mean over the seeds that all of them have. Other options go to study.py
(--seeds, --seconds). `--table FILE` prints that table from a results.jsonl and trains nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ttt_jax.config import load_config  # noqa: E402

TOKENS = 4096  # of a step
SHAPES = {  # D, T, C
    "wide": (192, 2048, 64),
    "base": (96, 2048, 64),
    "narrow": (48, 2048, 64),
    "short": (96, 1024, 64),
    "long": (96, 4096, 64),
    "small.chunk": (96, 2048, 32),
    "large.chunk": (96, 2048, 128),
}


def overrides(write: str, D: int, T: int, C: int) -> list[str]:
    """Widths change together, and init_std so that projections keep their scale."""
    std = 0.06 * (96 / D) ** 0.5
    return (
        f"--model.ttt.write {write} --model.ttt.lr auto --model.d_model {D} --model.d_ff "
        f"{D * 8 // 3} --model.head_dim {D // 2} --model.init_std {std:.5f} --data.seq_len {T} "
        f"--model.max_positions {T} --data.batch_size {TOKENS // T} --model.ttt.chunk_size {C}"
    ).split()


def verdict(results: list[dict]) -> str:
    """Held-out loss by shape and factor on the rule's rate, and what the rule's rate loses."""
    by_arm: dict[str, dict[int, float]] = {}
    for row in results:
        on = row["heldout"]["ttt_on"]
        by_arm.setdefault(row["arm"], {})[row["seed"]] = sum(on) / len(on)
    factors = sorted({float(arm.rpartition(".x")[2]) for arm in by_arm})
    names = [f"x{factor:g}" for factor in factors]
    lines = [f"| write, shape | seeds | {' | '.join(names)} | rule less best |"]
    lines.append("|---" * (len(factors) + 3) + "|")
    for shape in dict.fromkeys(arm.rpartition(".x")[0] for arm in by_arm):
        tried = {f: by_arm[f"{shape}.x{f:g}"] for f in factors if f"{shape}.x{f:g}" in by_arm}
        seeds = set.intersection(*(set(found) for found in tried.values()))
        if not seeds or 1.0 not in tried:
            continue
        means = {f: sum(found[s] for s in seeds) / len(seeds) for f, found in tried.items()}
        lost = means[1.0] - min(means.values())
        cells = " | ".join(f"{means[f]:.4f}" if f in means else "" for f in factors)
        lines.append(f"| {shape} | {len(seeds)} | {cells} | {lost:.4f} |")
    return "\n".join(lines)


def read(file: Path) -> list[dict]:
    return [json.loads(text) for text in file.read_text().splitlines()] if file.is_file() else []


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--writes", nargs="+", default=["ridge", "sum"])
    parser.add_argument("--factors", type=float, nargs="+", default=[1, 3, 0.33])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--out", type=Path, default=Path("rates"))
    parser.add_argument("--table", type=Path)
    args, rest = parser.parse_known_args()
    if args.table:
        print(verdict(read(args.table)))
        return 0
    arms = []
    # The factor last: a study that is cut short has whole columns.
    for factor, write, shape in itertools.product(args.factors, args.writes, args.shapes):
        words = overrides(write, *SHAPES[shape])
        rate = load_config("default", words).model.ttt.lr
        text = " ".join([*words, "--model.ttt.lr", f"{rate * factor:.4g}"])
        arms += ["--arm", f"{write}.{shape}.x{factor:g}: {text}"]
    base = (
        f"--steps {args.steps} --log.probe_every 0 --log.tensorboard false --compile_cache null "
        "--checkpoint.every 0"
    )
    study = [sys.executable, str(ROOT / "benchmarks/study.py"), "default", "--base", base]
    code = subprocess.run([*study, *arms, "--out", str(args.out), *rest]).returncode
    print(verdict(read(args.out / "results.jsonl")))
    return code


if __name__ == "__main__":
    sys.exit(main())
