"""Check the ridge write on this device against float64 on the CPU, then time them.

    python benchmarks/writes.py                # the shapes of `books` and of a 4B model

A result that is wrong, or not the same twice, is printed and not timed. "Targets" is the forward;
"with gradients" is what a training step pays that keeps `ttt_target`, in kernels where they run
and, for comparison, in matmuls of XLA.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
import unittest.mock
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ttt_jax.ops.ttt import chunk_products, writes
from ttt_jax.ops.ttt.inverse_root import inverse_root
from ttt_jax.ops.ttt.writes import transformed

KEYS = ("random", "shared", "tokens", "few")


class Shape(NamedTuple):
    """N chunks of C tokens, widths D and F."""

    N: int
    C: int
    D: int
    F: int


SHAPES = {"books": Shape(256, 512, 768, 2048), "4b": Shape(32, 1024, 2560, 9728)}


def keys_of(kind: str, C: int, F: int, rng):
    """Keys of text are far from random: `shared` have a direction in common, `tokens` repeat as
    often as words do, `few` lie in six dimensions and differ in size.
    """
    if kind == "tokens":
        return (rng.standard_normal((301, F)) + 1)[np.minimum(rng.zipf(1.3, C), 300)]
    if kind == "few":
        z_CF = rng.standard_normal((C, 6)) @ rng.standard_normal((6, F))
        return z_CF * np.exp(rng.standard_normal((C, 1)))
    return rng.standard_normal((C, F)) + (3 if kind == "shared" else 0)


def chunk_arrays(shape: Shape):
    """bf16 keys, targets and cotangents of four chunks of four kinds, [4, C, .], and the same
    again and again, [1, N C, .]. Cotangents are what the op makes of a gradient G of what is
    written, [F, D].
    """
    rng = np.random.default_rng(0)
    z = np.stack([keys_of(kind, shape.C, shape.F, rng) for kind in KEYS])
    v, G = rng.standard_normal((4, shape.C, shape.D)), rng.standard_normal((shape.F, shape.D))
    four = tuple(jnp.asarray(x, "bfloat16") for x in (z, v, z @ G))
    repeat = jax.jit(lambda x: jnp.tile(x, (shape.N // 4, 1, 1)).reshape(1, -1, x.shape[2]))
    return four, tuple(map(repeat, four)), G


def ridge_oracle(z_CF, v_CD, do_CD, ridge: float):
    """v', dz and dv of one chunk in float64: v' = A^-1 V with A = Z Z^T + lambda m I."""
    z_CF, v_CD, do_CD = (np.asarray(x, np.float64) for x in (z_CF, v_CD, do_CD))
    gram_CC, C = z_CF @ z_CF.T, len(z_CF)
    a_CC = gram_CC + ridge * np.trace(gram_CC) / C * np.eye(C)
    out_CD, dv_CD = np.split(np.linalg.solve(a_CC, np.hstack([v_CD, do_CD])), 2, axis=1)
    by_a_CC = -dv_CD @ out_CD.T
    dz_CF = (by_a_CC + by_a_CC.T) @ z_CF + 2 * ridge / C * np.trace(by_a_CC) * z_CF
    return out_CD, dz_CF, dv_CD


def with_gradients(C: int, ridge: float):
    """A program that gives v' and the gradients of z and v."""

    def all_three(z, v, do):
        out, vjp = jax.vjp(lambda z, v: transformed("ridge", z, v, C, ridge=ridge), z, v)
        return out, *vjp(do)

    return all_three


def right(run, shape: Shape, four, arrays, G, ridge: float) -> bool:
    """Print the errors of a ridge program, and say whether it is right on all chunks. That of dz is
    relative to the gradient of v'^T z, of which it is a part.
    """
    equal = jax.jit(lambda x, y: jnp.array_equal(x, y, equal_nan=True))
    first, second = run(*arrays), run(*arrays)
    again = all(bool(equal(x, y)) for x, y in zip(first, second, strict=True))
    chunks = [x.reshape(-1, 4, shape.C, x.shape[2]) for x in first]
    alike = all(bool(equal(x, jnp.broadcast_to(x[:1], x.shape))) for x in chunks)
    worst = 0.0
    for k, kind in enumerate(KEYS):
        exact = ridge_oracle(four[0][k], four[1][k], four[2][k], ridge)
        found = [np.asarray(x[0, k], np.float64) for x in chunks]
        errors = [
            float(np.linalg.norm(x - y) / np.linalg.norm(y))
            for x, y in zip(of_written(found, G), of_written(exact, G), strict=True)
        ]
        worst = float(np.maximum(worst, np.max(errors)))  # nan stays
        print("  keys {}: v' {:.1e}, dz {:.1e}, dv {:.1e}".format(kind, *errors))
    fine = again and alike and worst < 5e-3
    print(f"  the same again: {again}, in every chunk: {alike}: {'right' if fine else 'WRONG'}")
    return fine


def of_written(results, G_FD):
    """v', the gradient of v'^T z by z, and dv, of v', dz and dv."""
    out_CD, dz_CF, dv_CD = results
    return out_CD, dz_CF + out_CD @ G_FD.T, dv_CD


def milliseconds(programs: dict, repeats: int) -> dict[str, float]:
    """Medians over repeats in turns."""
    times = {name: [] for name in programs}
    for _ in range(repeats + 1):
        for name, (function, arrays) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready([function(*arrays) for _ in range(3)][-1])
            times[name].append((time.perf_counter() - start) / 3)
    return {name: 1000 * statistics.median(found[1:]) for name, found in times.items()}


def in_matmuls(function):
    """The same program with products in matmuls of XLA; the root stays what it is."""
    chosen = lambda dtype, *sizes: chunk_products.Matmuls(dtype)

    def run(*arrays):
        with unittest.mock.patch.object(writes, "products_for", chosen):
            return function(*arrays)

    return jax.jit(run)


def time_shape(name: str, shape: Shape, args: argparse.Namespace) -> bool:
    four, arrays, G = chunk_arrays(shape)
    z, v, _ = arrays
    print(f"{name}: {shape}", flush=True)
    gradients = with_gradients(shape.C, args.ridge)
    if not right(jax.jit(gradients), shape, four, arrays, G, args.ridge):
        print("  wrong results: nothing is timed", flush=True)
        return False
    targets = functools.partial(transformed, "ridge", chunk_size=shape.C, ridge=args.ridge)
    z_NCF = z.reshape(shape.N, shape.C, shape.F)
    products = chunk_products.products_for(z.dtype, shape.C, shape.D, shape.F)
    gram_NCC = jax.jit(chunk_products.Matmuls(z.dtype).gram)(z_NCF)
    root = lambda gram, shift: inverse_root(gram, shift, products)
    programs = {
        "with gradients": (jax.jit(gradients), arrays),
        "with gradients, in matmuls": (in_matmuls(gradients), arrays),
        "targets": (jax.jit(lambda z, v: targets(z, v)), (z, v)),
        "root": (jax.jit(root), (gram_NCC, jnp.full(shape.N, float(shape.F)))),
    }
    for what, ms in milliseconds(programs, args.repeats).items():
        print(f"  {what}: {ms:.2f} ms", flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--ridge", type=float, default=1.0)
    args = parser.parse_args()
    print(jax.devices()[0].device_kind, f"jax {jax.__version__}", flush=True)
    done = [time_shape(name, SHAPES[name], args) for name in args.shapes]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
