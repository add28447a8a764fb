"""Check the writes on this device against float64 on the CPU, then time them.

    python benchmarks/writes.py                              # the shapes of `books`
    XLA_FLAGS=--xla_gpu_enable_triton_gemm=false python benchmarks/writes.py

A result that is wrong, or not the same twice, is printed and not timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ttt_jax.ops.ttt.writes import transformed

KEYS = ("random", "shared", "tokens", "few")


def chunk_arrays(kind: str, B: int, T: int, C: int, D: int, F: int):
    """bf16 keys and targets. Keys of text are far from random: `shared` have a direction in common,
    `tokens` repeat as often as words do, `few` lie in six dimensions and differ in size. The first
    chunk is of that kind and the others are random.
    """
    rng = np.random.default_rng(0)
    z_BTF = rng.standard_normal((B, T, F), np.float32)
    if kind == "shared":
        z_BTF[:, :C] += 3
    elif kind == "tokens":
        z_BTF[:, :C] = (rng.standard_normal((301, F)) + 1)[np.minimum(rng.zipf(1.3, C), 300)]
    elif kind == "few":
        z_BTF[:, :C] = (
            rng.standard_normal((C, 6))
            @ rng.standard_normal((6, F))
            * np.exp(rng.standard_normal((C, 1)))
        )
    v_BTD = rng.standard_normal((B, T, D), np.float32)
    return jnp.asarray(z_BTF, "bfloat16"), jnp.asarray(v_BTD, "bfloat16")


def with_gradients(write: str, C: int, ridge: float):
    """A program that gives v' and the gradients of sum(v * v') by z and v."""

    def all_three(z, v):
        out, vjp = jax.vjp(lambda z, v: transformed(write, z, v, C, ridge=ridge), z, v)
        return out, *vjp(v)

    return all_three


def ridge_oracle(z_CF, v_CD, ridge: float):
    """The same for one chunk in float64: v' = A^-1 V with A = Z Z^T + lambda m I."""
    z_CF, v_CD = np.asarray(z_CF, np.float64), np.asarray(v_CD, np.float64)
    gram_CC, C = z_CF @ z_CF.T, len(z_CF)
    exact_CD = np.linalg.solve(gram_CC + ridge * np.trace(gram_CC) / C * np.eye(C), v_CD)
    by_a_CC = -exact_CD @ exact_CD.T
    return exact_CD, 2 * by_a_CC @ z_CF + 2 * ridge / C * np.trace(by_a_CC) * z_CF, exact_CD


def check(args: argparse.Namespace, run, kind: str) -> bool:
    z, v = chunk_arrays(kind, args.rows, args.tokens, args.chunk, args.d_model, args.d_ff)
    got = run(z, v)
    again = all(
        np.array_equal(x, y, equal_nan=True)
        for _ in range(3)
        for x, y in zip(got, run(z, v), strict=True)
    )
    errors = {"targets": 0.0, "dz": 0.0, "dv": 0.0}
    for start in range(0, min(args.tokens, 4 * args.chunk), args.chunk):
        piece = slice(start, start + args.chunk)
        for name, x, exact in zip(
            errors, got, ridge_oracle(z[0, piece], v[0, piece], args.ridge), strict=True
        ):
            error = np.linalg.norm(np.asarray(x[0, piece], np.float64) - exact) / np.linalg.norm(
                exact
            )
            errors[name] = float(np.maximum(errors[name], error))  # nan stays
    right = again and all(error < 1e-2 for error in errors.values())
    shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    print(
        f"keys {kind}: relative errors {shown}; the same again: {again} -> "
        f"{'right' if right else 'WRONG'}",
        flush=True,
    )
    return right


def milliseconds(function, *arrays, repeats: int) -> float:
    jax.block_until_ready(function(*arrays))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arrays))
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {
        "rows": 8,
        "tokens": 16384,
        "chunk": 512,
        "d-model": 768,
        "d-ff": 2048,
        "repeats": 10,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ridge", type=float, default=1.0)
    args = parser.parse_args()
    print(jax.devices()[0].device_kind, f"jax {jax.__version__}", flush=True)
    programs = {
        write: jax.jit(with_gradients(write, args.chunk, args.ridge))
        for write in ("ridge", "spectral")
    }
    right = [check(args, programs["ridge"], kind) for kind in KEYS]
    if not all(right):
        print("wrong results: nothing is timed")
        return 1
    z, v = chunk_arrays("random", args.rows, args.tokens, args.chunk, args.d_model, args.d_ff)
    for write, both in programs.items():
        run = jax.jit(
            lambda z, v, write=write: transformed(write, z, v, args.chunk, ridge=args.ridge)
        )
        forward, backward = (milliseconds(f, z, v, repeats=args.repeats) for f in (run, both))
        print(f"{write}: forward {forward:.2f} ms, with gradients {backward:.2f} ms", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
