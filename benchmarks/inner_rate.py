"""Does one inner learning rate, by the rule `auto`, stay near the best one over shapes?

    python benchmarks/inner_rate.py --out rates --parallel 16 --cores 2

Trains the default run's model at three widths, row lengths and chunk sizes, with 1/3, 1 and 3 times
the rate of the rule (ttt_jax/config/inner_rate.py), through benchmarks/study.py. The tokens of a
step stay the same. In the table every shape has three rows: the rule holds where the same factor is
the best, or as good as the best, in all of them. Other options go to study.py (--seeds, --seconds).
"""

from __future__ import annotations

import argparse
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
    "small chunk": (96, 2048, 32),
    "large chunk": (96, 2048, 128),
}


def overrides(write: str, D: int, T: int, C: int) -> list[str]:
    """Widths change together, and init_std so that projections keep their scale."""
    std = 0.06 * (96 / D) ** 0.5
    return (
        f"--model.ttt.write {write} --model.ttt.lr auto --model.d_model {D} --model.d_ff "
        f"{D * 8 // 3} --model.head_dim {D // 2} --model.init_std {std:.5f} --data.seq_len {T} "
        f"--model.max_positions {T} --data.batch_size {TOKENS // T} --model.ttt.chunk_size {C}"
    ).split()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--writes", nargs="+", default=["ridge", "sum"])
    parser.add_argument("--factors", type=float, nargs="+", default=[1 / 3, 1, 3])
    parser.add_argument("--steps", type=int, default=120)
    args, rest = parser.parse_known_args()
    arms = []
    for write in args.writes:
        for shape, sizes in SHAPES.items():
            words = overrides(write, *sizes)
            rate = load_config("default", words).model.ttt.lr
            for factor in args.factors:
                name = f"{write}.{shape.replace(' ', '.')}.x{factor:.2g}"
                text = " ".join([*words, "--model.ttt.lr", f"{rate * factor:.4g}"])
                arms += ["--arm", f"{name}: {text}"]
    base = (
        f"--steps {args.steps} --log.probe_every 0 --log.tensorboard false --compile_cache null "
        "--checkpoint.every 0"
    )
    study = [sys.executable, str(ROOT / "benchmarks/study.py"), "default", "--base", base]
    return subprocess.run([*study, *arms, *rest]).returncode


if __name__ == "__main__":
    sys.exit(main())
