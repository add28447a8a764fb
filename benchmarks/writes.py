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


def chunk_arrays(B: int, T: int, C: int, D: int, F: int, like: float):
    """bf16 keys, of which the first chunk's share a direction `like` times their spread, and
    targets.
    """
    rng = np.random.default_rng(0)
    z_BTF = rng.standard_normal((B, T, F), np.float32)
    z_BTF[:, :C] += like
    v_BTD = rng.standard_normal((B, T, D), np.float32)
    return jnp.asarray(z_BTF, "bfloat16"), jnp.asarray(v_BTD, "bfloat16")


def ridge_oracle(z_CF, v_CD, ridge: float):
    """v' = A^-1 V of one chunk with A = Z Z^T + lambda m I, and the gradient of ||v'||^2 by V;
    float64.
    """
    z_CF, v_CD = np.asarray(z_CF, np.float64), np.asarray(v_CD, np.float64)
    gram_CC = z_CF @ z_CF.T
    a_CC = gram_CC + ridge * np.mean(np.diag(gram_CC)) * np.eye(len(gram_CC))
    exact_CD = np.linalg.solve(a_CC, v_CD)
    return exact_CD, 2 * np.linalg.solve(a_CC, exact_CD)


def check(args: argparse.Namespace, like: float) -> bool:
    z, v = chunk_arrays(args.rows, args.tokens, args.chunk, args.d_model, args.d_ff, like)
    run = jax.jit(lambda z, v: transformed("ridge", z, v, args.chunk, ridge=args.ridge))
    grad = jax.jit(jax.grad(lambda z, v: jnp.sum(jnp.square(run(z, v).astype("float32"))), (0, 1)))
    out, (dz, dv) = run(z, v), grad(z, v)
    again = all(
        np.array_equal(out, run(z, v)) and np.array_equal(dz, grad(z, v)[0])
        for _ in range(args.repeats)
    )
    errors = {"targets": 0.0, "dv": 0.0}
    for start in range(0, args.tokens, args.chunk):
        piece = slice(start, start + args.chunk)
        exact = dict(zip(errors, ridge_oracle(z[0, piece], v[0, piece], args.ridge), strict=True))
        for name, got in (("targets", out), ("dv", dv)):
            error = np.linalg.norm(
                np.asarray(got[0, piece], np.float64) - exact[name]
            ) / np.linalg.norm(exact[name])
            errors[name] = max(errors[name], float(error))
    finite = bool(jnp.isfinite(dz.astype("float32")).all())
    right = max(errors.values()) < 1e-2 and again and finite
    shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    print(
        f"keys alike by {like:g}: relative errors {shown}; the same {args.repeats} times: "
        f"{again}; dz finite: {finite}"
        f" -> {'right' if right else 'WRONG'}",
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
    print(jax.devices()[0], f"jax {jax.__version__}", flush=True)
    right = [check(args, like) for like in (0.0, 0.5, 3.0, 60.0)]
    if not all(right):
        print("wrong results: nothing is timed")
        return 1
    z, v = chunk_arrays(args.rows, args.tokens, args.chunk, args.d_model, args.d_ff, 0.5)
    for write in ("ridge", "spectral"):
        run = lambda z, v, write=write: transformed(write, z, v, args.chunk, ridge=args.ridge)
        both = jax.grad(lambda z, v, run=run: jnp.sum(run(z, v).astype("float32")), (0, 1))
        forward, backward = (
            milliseconds(jax.jit(f), z, v, repeats=args.repeats) for f in (run, both)
        )
        print(f"{write}: forward {forward:.2f} ms, with gradients {backward:.2f} ms", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
