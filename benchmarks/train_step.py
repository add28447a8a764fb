"""Speed and memory of one training step on this machine's accelerator, beside the matmul rate
measured in the same run.

    python benchmarks/train_step.py --preset qwen3_1p7b --seq 8192 --batch 4 --chunk 1024
    python benchmarks/train_step.py --preset qwen3_1p7b --seq 65536 --batch 1 --chunk 1024 \\
        --remat-save attention
    python benchmarks/train_step.py --preset default                     # also runs on a CPU

Random tokens, one document per row, float32 master weights, AdamW; TTT on and off in one run (the
overhead is their ratio). Needs neither grain nor the command line. Prints a table and, with --json
FILE, appends one JSON object per line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import config as config_lib
from ttt_jax.flops import model_flops_per_token
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.pretrained.start_config import load_start_config
from ttt_jax.training.step import abstract_state, init_state, make_train_step
from ttt_jax.training.step_memory import settled_remat

ROOT = Path(__file__).resolve().parents[1]


def matmul_rate(dtype) -> float:
    """FLOP/s of a large matmul on random data: the ceiling that MFU is measured against. Median of
    20.
    """
    n = 8192 if jax.default_backend() != "cpu" else 1024
    a, b = (
        jax.random.normal(jax.random.key(i), (n, n), jnp.float32).astype(dtype) for i in range(2)
    )
    matmul = jax.jit(jnp.matmul)
    return 2 * n**3 / timed(lambda: matmul(a, b), 20)


def timed(run, repeats: int) -> float:
    """Median seconds of `run()`, each call waited for, after two warm-ups."""
    jax.block_until_ready(run())
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def room_for(path: Path, tokens: int) -> list[str]:
    """The override that lets a preset's model take rows of so many tokens; none if it does."""
    most = load_start_config(path).model.max_positions
    return [f"--model.max_positions={tokens}"] if tokens > most else []


def measure(config: config_lib.Config, steps: int) -> dict:
    mesh = make_mesh(config.mesh)
    abstract, tx = abstract_state(config, mesh)
    B, T = config.data.batch_size, config.data.seq_len
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, (B, T + 1)).astype(np.int32)
    batch = {
        "ids": jnp.asarray(ids[:, :-1]),
        "targets": jnp.asarray(ids[:, 1:]),
        "weights": jnp.ones((B, T), jnp.float32),
    }
    start = time.perf_counter()
    compiled = make_train_step(config, tx).lower(abstract, batch).compile()
    compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    state = init_state(config, abstract, tx)
    losses = []

    def run():
        nonlocal state
        state, metrics = compiled(state, batch)
        losses.append(metrics["loss"])
        return metrics["loss"]

    seconds = timed(run, steps)
    losses = [float(x) for x in losses]
    # Random tokens: the first loss must be that of a uniform guess, and nothing may blow up.
    if not np.all(np.isfinite(losses)) or abs(losses[0] - np.log(config.model.vocab_size)) > 1.0:
        raise SystemExit(f"refusing to report: losses {losses} are not those of a working step")
    del state
    return {
        "seconds": seconds,
        "tokens_per_second": B * T / seconds,
        "compile_seconds": compile_seconds,
        "temp_gib": memory.temp_size_in_bytes / 2**30,
        # outputs alias arguments
        "peak_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
        "model_tflops": B
        * T
        * model_flops_per_token(config.model, T, training=True)
        / seconds
        / 1e12,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="default", help="name of a file in configs/")
    parser.add_argument("--seq", type=int, help="tokens per row")
    parser.add_argument("--batch", type=int, help="rows")
    parser.add_argument("--chunk", type=int, help="TTT chunk size")
    parser.add_argument(
        "--remat-save",
        help="activations kept for the backward, comma-separated; 'none' recomputes all",
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps (the median is reported)")
    parser.add_argument("--only", choices=["on", "off"], help="measure TTT on or off alone")
    parser.add_argument("--json", help="append results to this file, one JSON object a line")
    args, overrides = parser.parse_known_args()  # dotted config fields, e.g. --model.ttt.lr=1

    words = ["--data.pack=false", "--optimizer.accumulate=1", *overrides]
    for field, value in (
        ("data.seq_len", args.seq),
        ("data.batch_size", args.batch),
        ("model.ttt.chunk_size", args.chunk),
    ):
        if value is not None:
            words.append(f"--{field}={value}")
    path = ROOT / "configs" / f"{args.preset}.yaml"
    words += room_for(path, args.seq or 0)
    if args.remat_save is not None:
        words.append(
            f"--remat_save={[] if args.remat_save == 'none' else args.remat_save.split(',')}"
        )
    on = load_start_config(path, words)
    on = settled_remat(on, make_mesh(on.mesh))  # the same with TTT off
    off = config_lib.replace(on, {"model.ttt.layers": []})
    rate = matmul_rate(on.compute_dtype)
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, {on.compute_dtype} matmul {rate / 1e12:.0f} TFLOP/s")
    results = {}
    for name, config in (("off", off), ("on", on)):
        if args.only in (None, name):
            r = results[name] = measure(config, args.steps)
            print(
                f"{args.preset} B={on.data.batch_size} T={on.data.seq_len} "
                f"C={on.model.ttt.chunk_size} "
                f"remat_save={on.remat_save} TTT {name:3}: {r['seconds'] * 1e3:8.1f} ms  "
                f"{r['tokens_per_second']:9.0f} tok/s  "
                f"MFU {r['model_tflops'] * 1e12 / rate:5.1%}  peak {r['peak_gib']:5.1f} GiB (temp "
                f"{r['temp_gib']:.1f})  "
                f"compile {r['compile_seconds']:.0f} s",
                flush=True,
            )
            if args.json:
                row = {
                    "preset": args.preset,
                    "ttt": name,
                    "batch": on.data.batch_size,
                    "seq": on.data.seq_len,
                }
                row |= {
                    "chunk": on.model.ttt.chunk_size,
                    "remat_save": on.remat_save,
                    "device": device,
                    **r,
                }
                row |= {"matmul_tflops": rate / 1e12, "jax": jax.__version__}
                with open(args.json, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    if len(results) == 2:
        print(f"TTT overhead: {results['on']['seconds'] / results['off']['seconds'] - 1:+.1%}")


if __name__ == "__main__":
    main()
