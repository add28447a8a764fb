"""Sweep the kernels of the ridge write on one GPU: error and time of each product, of the root, and
of a write with its gradients, in matmuls of XLA and in kernels. What fails is one line.

    python benchmarks/ridge_sweep.py --seconds 100
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import writes as shapes

from ttt_jax.kernels_pallas import gpu_terms
from ttt_jax.kernels_pallas import inverse_root as root_kernel
from ttt_jax.ops.ttt import chunk_products, inverse_root, writes

START = time.perf_counter()
MATMULS = chunk_products.Matmuls(jnp.bfloat16)
KERNELS = {"whole": gpu_terms.Kernels(by_half=False), "half": gpu_terms.Kernels()}
# rows of the largest leaf, warps, stages, width
ROOTS = [
    (512, 4, 3, 1),
    (512, 4, 2, 2),
    (512, 4, 3, 2),
    (512, 8, 2, 2),
    (512, 4, 2, 4),
    (512, 8, 2, 4),
]
LARGE_ROOTS = [(512, 4, 3, 1), (256, 4, 3, 1), (256, 4, 2, 2), (512, 4, 2, 2)]


def elapsed() -> float:
    return time.perf_counter() - START


def joined(x):
    """Terms as one float32 array."""
    return sum(t.astype(jnp.float32) for t in (x if isinstance(x, tuple) else (x,)))


@jax.jit
def difference(got, want, lower):
    got, want = joined(got), joined(want)
    keep = jnp.where(lower, jnp.tril(jnp.ones(got.shape[1:], bool)), True)
    square = lambda x: jnp.sum(jnp.where(keep, x, 0) ** 2)
    return jnp.sqrt(square(got - want) / square(want))


def compiled(jobs: dict) -> dict:
    """Compile all at once in threads."""

    def one(job):
        function, arguments = job
        return jax.jit(function).lower(*arguments).compile()

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        futures = {name: pool.submit(one, job) for name, job in jobs.items()}
    done = {}
    for name, future in futures.items():
        try:
            done[name] = future.result()
        except Exception as error:
            print(f"  {name}: FAILED {str(error)[:200]!r}", flush=True)
    return done


def milliseconds(programs: dict, repeats: int) -> dict:
    """Medians in turns, of three calls at once."""
    times = {name: [] for name in programs}
    for _ in range(repeats + 1):
        for name, (function, arguments) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready([function(*arguments) for _ in range(3)])
            times[name].append((time.perf_counter() - start) / 3)
    return {name: 1000 * statistics.median(t[1:]) for name, t in times.items()}


def products(shape) -> dict:
    """name: (products -> function, arguments, FLOP that are needed)."""
    N, C, D, F = shape
    keys = iter(jax.random.split(jax.random.key(0), 16))
    array = lambda *s: jax.jit(
        lambda k: jax.random.normal(k, (N, *s), jnp.float32).astype(jnp.bfloat16)
    )(next(keys))
    z, v, do, h = array(C, F), array(C, D), array(C, D), array(C, C)
    h = jax.jit(lambda h: (h + h.swapaxes(1, 2)).astype(jnp.bfloat16))(h)
    low = jax.jit(lambda h: (h[:, ::-1, ::-1] * 2**-8).astype(jnp.bfloat16))(h)
    m = jax.jit(lambda h, low: (jnp.tril(h), jnp.tril(low)))(h, low)
    shift = jnp.full((N,), 0.5)
    return {
        "gram": (lambda p: p.gram, (z,), C * F / 2),
        "square": (lambda p: p.square, (m,), 3 * C * C / 3),
        "apply v": (lambda p: p.apply, ((h, low), v), 2 * C * D),
        "outer": (lambda p: p.outer, (do, v), C * D),
        "sandwich": (lambda p: p.sandwich, ((h, low), (h, low)), 4.5 * C * C),
        "apply z": (lambda p: p.apply, ((h, low), z, shift), 2 * C * F),
    }


def sweep_products(shape, names, repeats: int) -> None:
    table = products(shape)
    kinds = {"XLA": MATMULS} | {name: KERNELS[name] for name in names}
    jobs = {
        (name, kind): (function(p), arguments)
        for name, (function, arguments, _) in table.items()
        for kind, p in kinds.items()
    }
    programs = compiled(jobs)
    print(f"  compiled at {elapsed():.0f} s", flush=True)
    total = dict.fromkeys(kinds, 0.0)
    for name, (_, arguments, flop) in table.items():
        runs = {kind: (f, arguments) for (n, kind), f in programs.items() if n == name}
        want, errors = runs["XLA"][0](*arguments), {}
        for kind in list(runs):
            try:
                got = runs[kind][0](*arguments)
                lower = name in ("gram", "square", "outer", "sandwich")
                errors[kind] = float(difference(got, want, lower))
            except Exception as error:
                print(f"  {name} {kind}: FAILED {str(error)[:200]!r}", flush=True)
                del runs[kind]
        found = milliseconds(runs, repeats)
        for kind, ms in found.items():
            total[kind] += ms
        rate = 2 * flop * shape.N * shape.C / 1e9
        parts = (f"{k} {t:.3f} ({errors[k]:.0e}, {rate / t:.0f} TFLOP/s)" for k, t in found.items())
        print(f"  {name:9}" + "; ".join(parts), flush=True)
    print("  together: " + ", ".join(f"{k} {t:.2f} ms" for k, t in total.items()))


def root_of(largest: int, warps: int, stages: int, width: int, a, shift):
    """The root with another leaf."""
    options = {"warps": warps, "stages": stages, "width": width}
    invert = functools.partial(root_kernel.inverse_root_gpu, **options)
    leaf = inverse_root.Leaf(invert, largest, root_kernel.UNIT)
    return inverse_root.by_halves(a, shift, leaf, gpu_terms.Kernels())


def sweep_roots(shape, roots, repeats: int) -> None:
    _, arrays = shapes.chunk_arrays(shape)
    z = arrays[0].reshape(shape.N, shape.C, shape.F)
    gram = jax.jit(MATMULS.gram)(z)
    mean = jax.jit(lambda g: jnp.trace(g, axis1=1, axis2=2) / g.shape[1])(gram)
    exact_a = np.asarray(gram[:4], np.float64)
    exact_a += np.asarray(mean[:4], np.float64)[:, None, None] * np.eye(shape.C)
    exact = np.linalg.inv(exact_a)
    jobs = {root: (functools.partial(root_of, *root), (gram, mean)) for root in roots}
    programs = compiled(jobs)
    print(f"  compiled at {elapsed():.0f} s", flush=True)
    runs, errors = {}, {}
    for name, run in programs.items():
        try:
            m = sum(np.asarray(x[:4], np.float64) for x in run(gram, mean))
            got = m.transpose(0, 2, 1) @ m
            found = np.linalg.norm(got - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
            errors[name] = found.max()
            runs[name] = run, (gram, mean)
        except Exception as error:
            print(f"  {name}: FAILED {str(error)[:200]!r}", flush=True)
    for name, ms in milliseconds(runs, repeats).items():
        print(f"  root {name}: {ms:.3f} ms, error of the inverse {errors[name]:.1e}", flush=True)


def whole(shape, choices: dict, repeats: int) -> None:
    """A write with its gradients. Choices: products, and rows of the root's largest leaf."""
    four, arrays = shapes.chunk_arrays(shape)
    lowered, runs = {}, {}
    for name, (chosen, rows) in choices.items():
        writes.products_for = lambda *_, chosen=chosen: chosen
        root_kernel.LARGEST = rows
        lowered[name] = jax.jit(shapes.with_gradients(shape.C, 1.0)).lower(*arrays)
    print(f"  lowered at {elapsed():.0f} s", flush=True)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        programs = {name: pool.submit(x.compile) for name, x in lowered.items()}
    for name, program in programs.items():
        try:
            print(f"  {name}, at {elapsed():.0f} s", flush=True)
            if shapes.right(program.result(), shape, four, arrays, 1.0):
                runs[name] = program.result(), arrays
        except Exception as error:
            print(f"  {name}: FAILED {str(error)[:200]!r}", flush=True)
    for name, ms in milliseconds(runs, repeats).items():
        print(f"  with gradients, {name}: {ms:.3f} ms", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(jax.devices()[0].device_kind, f"jax {jax.__version__}", flush=True)
    books, large = shapes.SHAPES["books"], shapes.SHAPES["4b"]
    choices = {
        "matmuls": (MATMULS, 512),
        "kernels, whole": (KERNELS["whole"], 512),
        "kernels, half": (KERNELS["half"], 512),
    }
    large_choices = {
        "matmuls": (MATMULS, 512),
        "kernels, half, leaf 512": (KERNELS["half"], 512),
        "kernels, half, leaf 256": (KERNELS["half"], 256),
    }
    steps = [
        ("books, write", lambda: whole(books, choices, args.repeats)),
        ("books, root", lambda: sweep_roots(books, ROOTS, args.repeats)),
        ("4b, root", lambda: sweep_roots(large, LARGE_ROOTS, args.repeats)),
        ("4b, write", lambda: whole(large, large_choices, args.repeats)),
        ("books, products", lambda: sweep_products(books, KERNELS, args.repeats)),
    ]
    for name, step in steps:
        if elapsed() > args.seconds * 0.85:
            print(f"{name}: no time left", flush=True)
            continue
        print(f"{name}, at {elapsed():.0f} s", flush=True)
        try:
            step()
        except Exception as error:
            print(f"{name}: FAILED {str(error)[:300]!r}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
