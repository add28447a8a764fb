"""Sweep tiles of the ridge write's products and leaves of its root on one GPU: error and time of
each against what XLA has. Variants that fail are one line.

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
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ttt_jax.kernels_pallas import inverse_root as root_kernel
from ttt_jax.kernels_pallas import term_products as tp
from ttt_jax.ops.ttt import chunk_products, writes
from ttt_jax.ops.ttt import inverse_root as halves

START = time.perf_counter()
TILES = {
    "128x256x64 w8 s3": tp.Tile(128, 256, 64, 8, 3),
    "128x128x64 w8 s3": tp.Tile(128, 128, 64, 8, 3),
    "128x128x64 w4 s3": tp.Tile(128, 128, 64, 4, 3),
    "128x128x64 w4 s2": tp.Tile(128, 128, 64, 4, 2),
    "128x128x32 w4 s4": tp.Tile(128, 128, 32, 4, 4),
    "128x256x32 w8 s4": tp.Tile(128, 256, 32, 8, 4),
}
ONE, TWO, THREE = ((0, 0),), ((0, 0), (1, 0)), ((0, 0), (0, 1), (1, 0))
TERMS = ("bfloat16", "bfloat16")


def elapsed() -> float:
    return time.perf_counter() - START


def joined(x):
    """Terms as one float32 array."""
    return sum(t.astype(jnp.float32) for t in x)


XLA = chunk_products.Matmuls(jnp.dtype("bfloat16"))


def gram_xla(z):
    return (XLA.gram(z),)


def square_xla(m):
    return XLA.square(m)


def applied_xla(h, l, y):
    return (XLA.apply((h, l), y),)


def outer_xla(do, v):
    return XLA.outer(do, v)


def half_xla(h, l, a, b):
    return XLA._terms(XLA._product((h, l), (a, b)))


def products(shape):
    """name: (XLA's, [options of the kernel's], arguments, needs a square tile)."""
    N, C, D, F = shape
    keys = iter(jax.random.split(jax.random.key(0), 16))
    array = lambda *s: jax.jit(
        lambda k: jax.random.normal(k, (N, *s), jnp.float32).astype(jnp.bfloat16)
    )(next(keys))
    z, v, do = array(C, F), array(C, D), array(C, D)
    h = array(C, C)
    h = jax.jit(lambda h: (h + h.swapaxes(1, 2)).astype(jnp.bfloat16))(h)
    l = jax.jit(lambda h: (h[:, ::-1, ::-1] * 2**-8).astype(jnp.bfloat16))(h)
    m = jax.jit(lambda h: jnp.tril(h.astype(jnp.float32) * 1.0001))(h)
    P = tp.Product
    return {
        "gram": (gram_xla, lambda t: lambda z: tp.multiply((z,), (z,), P("nt", ONE, symmetric=True), t), (z,), True),
        "M'M": (square_xla, lambda t: lambda m: tp.multiply((m,), (m,), P("tn", THREE, symmetric=True, mirrored=True, lower=True, out=TERMS), t), (m,), True),
        "P v": (applied_xla, lambda t: lambda h, l, y: tp.multiply((h, l), (y,), P("nn", TWO, out=("bfloat16",)), t), (h, l, v), False),
        "outer": (outer_xla, lambda t: lambda a, b: tp.multiply((a, b), (b, a), P("nt", ((0, 0), (1, 1)), symmetric=True, mirrored=True, out=TERMS), t), (do, v), True),
        "half": (half_xla, lambda t: lambda h, l, a, b: tp.multiply((h, l), (a, b), P("nn", THREE, out=TERMS), t), (h, l, h, l), False),
        "half nt": (half_xla, lambda t: lambda h, l, a, b: tp.multiply((h, l), (a, b), P("nt", THREE, out=TERMS), t), (h, l, h, l), False),
        "half P": (half_xla, lambda t: lambda h, l, a, b: tp.multiply((h, l), (a, b), P("nn", THREE, symmetric=True, mirrored=True, out=TERMS), t), (h, l, h, l), True),
        "dA z": (applied_xla, lambda t: lambda h, l, y: tp.multiply((h, l), (y,), P("nn", TWO, out=("bfloat16",)), t), (h, l, z), False),
    }  # fmt: skip


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
            print(f"  {name}: FAILED {str(error)[:150]!r}", flush=True)
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


def sweep_products(shape, only, repeats: int) -> None:
    table = products(shape)
    jobs = {}
    for name, (xla, kernel, arguments, square) in table.items():
        jobs[name, "XLA"] = xla, arguments
        for label, tile in TILES.items():
            if only and label not in only:
                continue
            if not (square and tile.BM != tile.BN):
                jobs[name, label] = kernel(tile), arguments
    programs = compiled(jobs)
    print(f"  compiled at {elapsed():.0f} s", flush=True)
    for name, (_, _, arguments, _) in table.items():
        runs = {label: (f, arguments) for (n, label), f in programs.items() if n == name}
        want, errors = runs["XLA"][0](*arguments), {}
        for label in list(runs):
            try:
                got = runs[label][0](*arguments)
                errors[label] = float(difference(got, want, name in ("gram",)))
            except Exception as error:
                print(f"  {name} {label}: FAILED {str(error)[:150]!r}", flush=True)
                del runs[label]
        found = milliseconds(runs, repeats)
        print(f"  {name:8}" + "; ".join(f"{k} {t:.3f} ({errors[k]:.0e})" for k, t in found.items()))
    print(f"  at {elapsed():.0f} s", flush=True)


def kernel_leaf(block, warps, stages, precision, swept=None):
    @jax.jit
    def leaf(a, shift):
        N, C = a.shape[:2]
        b = min(block, C)
        matrix = pl.BlockSpec((None, C, C), lambda n: (n, 0, 0))
        return pl.pallas_call(
            functools.partial(
                root_kernel._by_rows, C // b, b, precision, plgpu.debug_barrier, swept=swept
            ),
            grid=(N,),
            in_specs=[matrix, pl.BlockSpec((1,), lambda n: (n,))],
            out_specs=matrix,
            out_shape=jax.ShapeDtypeStruct((N, C, C), jnp.float32),
            compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
            name="leaf",
        )(a, shift)

    return leaf


def by_products(a, shift, leaf, largest, tile, tf32=False):
    """`by_halves` with products of bfloat16 terms in the kernel."""
    C = a.shape[1]
    if largest >= C:
        return leaf(a, shift)
    half = C // 2
    size = min(half, tile.BM)
    t = tp.Tile(size, size, min(tile.BK, half), tile.warps, tile.stages)
    P = functools.partial(tp.Product, tf32=tf32)
    THREE = globals()["ONE" if tf32 else "THREE"]
    first = by_products(a[:, :half, :half], shift, leaf, largest, tile, tf32)
    (below,) = tp.multiply((a[:, half:, :half],), (first,), P("nt", THREE), t)
    (schur,) = tp.multiply(
        (below,), (below,), P("nt", THREE, symmetric=True, negative=True), t, start=a[:, half:, half:]
    )  # fmt: skip
    last = by_products(schur, shift, leaf, largest, tile, tf32)
    (lh,) = tp.multiply((below,), (first,), P("nn", THREE), t)
    (below,) = tp.multiply((last,), (lh,), P("nn", THREE, negative=True), t)
    above = jnp.pad(first, ((0, 0), (0, 0), (0, C - half)))
    return jnp.concatenate([above, jnp.concatenate([below, last], axis=2)], axis=1)


def sweep_roots(shape, repeats: int) -> None:
    four, arrays = shapes.chunk_arrays(shape)
    z = arrays[0].reshape(shape.N, shape.C, shape.F)
    gram = jax.jit(lambda z: gram_xla(z)[0])(z)
    mean = jax.jit(lambda g: jnp.trace(g, axis1=1, axis2=2) / g.shape[1])(gram)
    exact_a = np.asarray(gram[:4], np.float64)
    exact_a += np.asarray(mean[:4], np.float64)[:, None, None] * np.eye(shape.C)
    exact = np.linalg.inv(exact_a)
    TF32 = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    variants = {
        "now": lambda a, s: halves.inverse_root(a, s, chunk_products.Matmuls(jnp.dtype("float32")))
    }
    for largest, warps, BM in (
        (64, 1, 128),
        (64, 2, 128),
        (64, 4, 128),
        (64, 4, 64),
        (128, 4, 128),
        (256, 4, 128),
    ):
        leaf = kernel_leaf(64, warps, 1, TF32)
        variants[f"leaf {largest} w{warps}, products {BM}"] = functools.partial(
            by_products, leaf=leaf, largest=largest, tile=tp.Tile(BM, BM, 32, 4, 3)
        )
    for BM, w in ((128, 8), (64, 4)):
        variants[f"leaf 64 w4, tf32x3 products {BM}"] = functools.partial(
            by_products,
            leaf=kernel_leaf(64, 4, 1, TF32),
            largest=64,
            tile=tp.Tile(BM, BM, 32, w, 2),
            tf32=True,
        )
    for b, w in ((64, 1), (64, 2), (64, 4), (16, 1)):
        rows = root_kernel._swept_by_rows
        variants[f"leaf 64 b{b} w{w} one sum, products 128"] = functools.partial(
            by_products,
            leaf=kernel_leaf(b, w, 1, TF32, rows),
            largest=64,
            tile=tp.Tile(128, 128, 32, 4, 3),
        )
    variants["one kernel, one sum"] = kernel_leaf(64, 4, 1, TF32, root_kernel._swept_by_rows)
    variants["leaf 64 b32 w1, products 128"] = functools.partial(
        by_products, leaf=kernel_leaf(32, 1, 1, TF32), largest=64, tile=tp.Tile(128, 128, 32, 4, 3)
    )
    if shape.C > 512:
        keep = (
            "now",
            "leaf 64 w4, products 128",
            "leaf 64 w4, products 64",
            "leaf 256 w4, products 128",
            "leaf 64 b64 w1 one sum, products 128",
            "leaf 64 b64 w4 one sum, products 128",
        )
        variants = {name: variants[name] for name in keep}
    programs = compiled({name: (f, (gram, mean)) for name, f in variants.items()})
    print(f"  compiled at {elapsed():.0f} s", flush=True)
    runs, errors = {}, {}
    for name, run in programs.items():
        try:
            m = np.asarray(run(gram, mean)[:4], np.float64)
            got = m.transpose(0, 2, 1) @ m
            found = np.linalg.norm(got - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
            errors[name] = found.max()
            runs[name] = run, (gram, mean)
        except Exception as error:
            print(f"  {name}: FAILED {str(error)[:150]!r}", flush=True)
    for name, ms in milliseconds(runs, repeats).items():
        print(f"  root {name}: {ms:.3f} ms, error of the inverse {errors[name]:.1e}", flush=True)


def whole(shape, repeats: int) -> None:
    """A write with its gradients, in matmuls and in kernels."""
    four, arrays = shapes.chunk_arrays(shape)
    runs = {}
    choices = {"matmuls": XLA, "kernels": tp.Kernels()}
    for tile in ("128x256x64 w8 s3", "128x128x64 w4 s2", "128x128x32 w4 s4"):
        choices[f"kernels {tile}"] = tp.Kernels(TILES[tile], tp.Tile(128, 128, 32, 4, 3))
    for name, chosen in choices.items():
        writes.products_for = lambda *_, chosen=chosen: chosen
        try:
            run = shapes.with_gradients("ridge", shape.C, 1.0)
            print(f"  {name}, at {elapsed():.0f} s")
            if shapes.right(run, shape, four, arrays, 1.0):
                runs[name] = run, arrays
        except Exception as error:
            print(f"  {name}: FAILED {str(error)[:150]!r}", flush=True)
    for name, ms in milliseconds(runs, repeats).items():
        print(f"  with gradients, {name}: {ms:.3f} ms", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(jax.devices()[0].device_kind, f"jax {jax.__version__}", flush=True)
    few = ("128x256x64 w8 s3", "128x128x64 w8 s3")
    steps = [
        ("books products", lambda: sweep_products(shapes.SHAPES["books"], None, args.repeats)),
        ("books whole", lambda: whole(shapes.SHAPES["books"], args.repeats)),
        ("books root", lambda: sweep_roots(shapes.SHAPES["books"], args.repeats)),
        ("4b root", lambda: sweep_roots(shapes.SHAPES["4b"], args.repeats)),
        ("4b products", lambda: sweep_products(shapes.SHAPES["4b"], few, args.repeats)),
    ]
    for name, step in steps:
        if elapsed() > args.seconds * 0.8:
            print(f"{name}: no time left", flush=True)
            continue
        print(f"{name}, at {elapsed():.0f} s", flush=True)
        step()
    return 0


if __name__ == "__main__":
    sys.exit(main())
